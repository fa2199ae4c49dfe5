//! Bare Pingora: a proxy that takes backends in turn, and nothing else. What the framework itself costs.
//!
//! It is a peer like the others, in a process of its own, but from the bench's binary, so that it is built as Plimsoll
//! is, with the same versions, profile and allocator. One thread, Pingora's defaults, no log.

use std::io;

use async_trait::async_trait;
use pingora::listeners::tls::TlsSettings;
use pingora::server::Server;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::upstreams::peer::HttpPeer;
use pingora_load_balancing::LoadBalancer;
use pingora_load_balancing::selection::RoundRobin;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

use super::engine;
use super::process::{PLAIN, TLS, folder};

struct Bare(LoadBalancer<RoundRobin>);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut Self::CTX) -> pingora::Result<Box<HttpPeer>> {
        let backend = self.0.select(b"", 256).ok_or_else(|| pingora::Error::new_str("no backend"))?;
        Ok(Box::new(HttpPeer::new(backend, false, String::new())))
    }
}

/// Runs it until the process is killed.
pub fn run() -> io::Result<()> {
    let mut server =
        Server::new_with_opt_and_conf(Opt::default(), ServerConf { threads: 1, ..ServerConf::default() });
    server.bootstrap();
    let backends = LoadBalancer::try_from_iter(engine::addresses())?;
    let mut service = http_proxy_service(&server.configuration, Bare(backends));
    service.add_tcp(&PLAIN.to_string());
    let files = ["certificate.pem", "key.pem"].map(|name| folder().join(name).display().to_string());
    let mut tls = TlsSettings::intermediate(&files[0], &files[1]).map_err(io::Error::other)?;
    tls.enable_h2();
    service.add_tls_with_settings(&TLS.to_string(), None, tls);
    server.add_service(service);
    server.run_forever()
}
