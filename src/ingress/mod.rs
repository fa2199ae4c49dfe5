//! The front door: what happens to a client's connection before, between and after its requests.
//!
//! Pingora accepts; from there to the first byte of a request it has no deadline of our choosing, and it parses a head
//! before anybody may look at it. So the connection is run here, with Pingora's own parts:
//!
//! ```text
//! accepted -> TLS, in time -> HTTP/2: to Pingora
//!                          -> HTTP/1: head, in time -> head.rs -> Pingora, one request -> kept? wait, in time
//! ```
//!
//! A request whose head is refused here is answered here, and Pingora never hears of it: no byte of it can reach an
//! engine. What needs the parsed request (routes, bodies, queues) is refused in `proxy`.

pub mod certificates;
pub mod chunks;
mod clients;
mod downstream;
pub mod frames;
pub mod head;
pub mod proxy_header;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use parking_lot::RwLock;
use pingora::apps::{HttpServerApp, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::stream::Stream as TcpStream;
use pingora::protocols::{ALPN, GetSocketDigest, Stream};
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::clock::Clock;
use crate::config::{Config, Limits, Network};
use crate::observe::metrics::Metrics;
use crate::proxy::{InFlight, Refusal};
use certificates::Tls;
use clients::Clients;
use downstream::Downstream;
use frames::Frames;

/// What an HTTP/2 client says first (RFC 9113 s.3.4), and how much of it looks like a head.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HTTP2_HEAD: usize = 18;

/// What a refused client may still send, and for how long: a socket closed over unread bytes is reset, and
/// the reset overtakes the answer.
const LINGER_BYTES: usize = 1 << 20;
const LINGER: Duration = Duration::from_secs(2);

/// The same for one of a crowd, who has hardly said anything yet.
const LINGER_IN_CROWD: Duration = Duration::from_millis(100);

/// A listener, as its connections need to know it.
pub struct Listener {
    /// Where it listens; the host may be unspecified.
    pub address: SocketAddr,
    /// Present: TLS first.
    pub tls: Option<Tls>,
    /// Whether clients have to show a certificate: an operator wants to know who is turned away.
    pub mutual: bool,
    /// Whether HTTP/2 is spoken.
    pub http2: bool,
    /// Whether each connection begins with a header of the PROXY protocol.
    pub proxy_protocol: bool,
}

/// The front door as the server knows it: the same through all configurations. Clones share everything.
pub struct Door<A>(Arc<RwLock<Arc<Ingress<A>>>>);

impl<A> Clone for Door<A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<A> Door<A> {
    /// The door behind which `ingress` stands.
    pub fn new(ingress: Ingress<A>) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(ingress))))
    }

    /// From now on new connections go as `config` says. Those there are stay as they are. So do the sockets that were
    /// opened at the start: a listener that is new waits for a restart, one that is gone is served as it was.
    pub fn configure(&self, config: &Config, listeners: Vec<Listener>) {
        let successor = self.0.read().successor(config, listeners);
        *self.0.write() = Arc::new(successor);
    }
}

#[async_trait]
impl<A: HttpServerApp + ServerApp + Send + Sync + 'static> ServerApp for Door<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let ingress = self.0.read().clone();
        ingress.accept(stream, shutdown).await;
        None
    }

    async fn cleanup(&self) {
        let app = self.0.read().app.clone();
        app.http_cleanup().await;
    }
}

/// Runs the connections of all listeners, and gives their requests to `app`.
pub struct Ingress<A> {
    app: Arc<A>,
    listeners: Vec<Arc<Listener>>,
    limits: Limits,
    trusted: Vec<Network>,
    clients: Clients,
    in_flight: InFlight,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl<A> Ingress<A> {
    /// The front door of `app` with the limits of `config`. `app` has to speak HTTP/2 with whoever begins so,
    /// TLS or not.
    pub fn new(
        app: A,
        listeners: Vec<Listener>,
        config: &Config,
        in_flight: InFlight,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (limits, trusted) = (config.limits.clone(), config.trusted_proxies.clone());
        let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        show_certificates(&metrics, &listeners);
        let clients = Clients::default();
        Self { app: Arc::new(app), listeners, limits, trusted, clients, in_flight, clock, metrics }
    }

    /// The front door of the same application, with the same crowd before it, by another configuration.
    fn successor(&self, config: &Config, listeners: Vec<Listener>) -> Self {
        let mut new: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        let renewed = |old: &Arc<Listener>| {
            let place = new.iter().position(|listener| listener.address == old.address);
            place.map_or_else(|| old.clone(), |place| new.swap_remove(place))
        };
        let listeners: Vec<_> = self.listeners.iter().map(renewed).collect();
        show_certificates(&self.metrics, &listeners);
        Self {
            app: self.app.clone(),
            listeners,
            limits: config.limits.clone(),
            trusted: config.trusted_proxies.clone(),
            clients: self.clients.clone(),
            in_flight: self.in_flight.clone(),
            clock: self.clock,
            metrics: self.metrics.clone(),
        }
    }

    /// The listener that accepted a connection to `local`.
    fn listener(&self, local: SocketAddr) -> Option<&Arc<Listener>> {
        let everywhere =
            |l: &&Arc<Listener>| l.address.ip().is_unspecified() && l.address.port() == local.port();
        let exactly = self.listeners.iter().find(|listener| listener.address == local);
        exactly.or_else(|| self.listeners.iter().find(everywhere))
    }

    fn is_trusted(&self, address: IpAddr) -> bool {
        Network::any_contains(&self.trusted, address)
    }

    fn count(&self, code: &str) {
        self.metrics.refusal(code).inc();
    }
}

/// Shows when the certificates expire that clients are shown.
fn show_certificates(metrics: &Metrics, listeners: &[Arc<Listener>]) {
    let shown = listeners.iter().flat_map(|listener| {
        let certificates = listener.tls.iter().flat_map(|tls| &tls.shown);
        certificates.map(|shown| (listener.address.to_string(), shown.file.as_str(), shown.expires))
    });
    metrics.show_certificates(shown);
}

/// What a client came with.
enum Arrival {
    /// A head that may be read in one way only.
    Head(BytesMut),
    /// HTTP/2, by prior knowledge.
    Http2,
    /// Nothing that could be served.
    Refused(Refusal),
    /// It went away, or we do.
    Gone,
}

impl<A: HttpServerApp + ServerApp + Send + Sync + 'static> Ingress<A> {
    /// Runs a connection that Pingora has accepted.
    async fn accept(&self, stream: Stream, shutdown: &ShutdownWatch) -> Option<()> {
        let _connected = self.in_flight.connect();
        let tcp = stream.into_any().downcast::<TcpStream>().ok()?;
        let digest = tcp.get_socket_digest()?;
        let listener = self.listener(*digest.local_addr()?.as_inet()?)?;
        let client = digest.peer_addr()?.as_inet()?.ip();
        self.serve(listener, client, *tcp, shutdown).await;
        Some(())
    }

    async fn serve(&self, listener: &Listener, peer: IpAddr, mut tcp: TcpStream, shutdown: &ShutdownWatch) {
        let Some(client) = self.named(listener, peer, &mut tcp).await else {
            return self.count("proxy_header");
        };
        // A proxy that we trust has many clients behind its one address.
        let limit = self.limits.client_connections.filter(|_| !self.is_trusted(client));
        let connected = limit.map(|limit| self.clients.enter(client, limit));
        if let Some(None) = connected {
            let refusal = Refusal::too_many_connections();
            return match &listener.tls {
                None => self.refuse(Box::new(tcp), &refusal, LINGER_IN_CROWD).await,
                Some(_) => self.count(refusal.code),
            };
        }
        let stream: Stream = match &listener.tls {
            None => Box::new(tcp),
            Some(tls) => match timeout(self.limits.tls_timeout, tls.acceptor.tls_handshake(tcp)).await {
                Ok(Ok(stream)) => Box::new(stream),
                Ok(Err(e)) => {
                    let level = if listener.mutual { log::Level::Info } else { log::Level::Debug };
                    log::log!(level, "no TLS client={client} error={:?}", certificates::reason(&e));
                    return self.count("tls_failed");
                }
                Err(_) => return self.count("tls_timeout"),
            },
        };
        let is_http2 = stream.selected_alpn_proto() == Some(ALPN::H2);
        let downstream = Downstream::new(stream, self.limits.client_write_timeout);
        if is_http2 {
            self.serve_http2(downstream, shutdown).await;
        } else {
            self.serve_http1(listener, downstream, shutdown).await;
        }
    }

    /// Whose connection it is: that of `peer`, or of whom a balancer names, who is believed if he is trusted.
    async fn named(&self, listener: &Listener, peer: IpAddr, tcp: &mut TcpStream) -> Option<IpAddr> {
        if !listener.proxy_protocol {
            return Some(peer);
        }
        if !self.is_trusted(peer) {
            log::debug!("PROXY header not believed peer={peer}");
            return None;
        }
        timeout(self.limits.header_timeout, proxy_header::read(tcp, peer)).await.ok().flatten()
    }

    /// Pingora runs all requests of an HTTP/2 connection, once the preface is there: it would wait for ever.
    async fn serve_http2(&self, mut downstream: Downstream, shutdown: &ShutdownWatch) {
        let preface = async {
            while downstream.ahead.len() < HTTP2_PREFACE.len() {
                if !matches!(downstream.read_ahead().await, Ok(1..)) {
                    return false;
                }
            }
            true
        };
        match timeout(self.limits.header_timeout, preface).await {
            Ok(true) if downstream.ahead.starts_with(HTTP2_PREFACE) => {}
            Ok(true) => return self.count("bad_request"),
            Ok(false) => return,
            Err(_) => return self.count("header_timeout"),
        }
        let floods = self.metrics.refusal("http2_flood");
        downstream.begin_http2(Frames::new(self.limits.http2_control_frames, self.clock, floods));
        self.app.process_new(Box::new(downstream), shutdown).await;
    }

    /// One request after another, until client or proxy has had enough.
    async fn serve_http1(&self, listener: &Listener, mut downstream: Downstream, shutdown: &ShutdownWatch) {
        let mut new = true;
        loop {
            let head = match self.arrival(&mut downstream, new, shutdown).await {
                Arrival::Head(head) => head,
                Arrival::Http2 if new && listener.tls.is_none() && listener.http2 => {
                    return self.serve_http2(downstream, shutdown).await;
                }
                Arrival::Http2 => {
                    return self.refuse(downstream.into_inner(), &Refusal::malformed("HTTP/2"), LINGER).await;
                }
                Arrival::Refused(refusal) => {
                    return self.refuse(downstream.into_inner(), &refusal, LINGER).await;
                }
                Arrival::Gone => return,
            };
            let mut session = ServerSession::new_http1(Box::new(downstream));
            session.set_pipelined_prefix(head);
            let Some(reusable) = self.app.process_new_http(session, shutdown).await else { return };
            // The settings that come along are for the session, which is made anew from its request.
            let (stream, _settings) = reusable.consume();
            let Ok(same) = stream.into_any().downcast::<Downstream>() else { return };
            downstream = *same;
            if !downstream.is_between_requests() {
                return;
            }
            new = false;
        }
    }

    /// Waits for the next request: on a new connection for as long as a head may take, on one that was kept
    /// for as long as it may be idle, unless the process is about to end.
    async fn arrival(&self, downstream: &mut Downstream, new: bool, shutdown: &ShutdownWatch) -> Arrival {
        if !new {
            let begun = tokio::select! {
                biased;
                begun = timeout(self.limits.client_idle, begins(downstream)) => begun.unwrap_or(false),
                () = self.end(shutdown.clone()) => false,
            };
            if !begun {
                return Arrival::Gone;
            }
        }
        let head =
            async { if begins(downstream).await { self.head(downstream).await } else { Arrival::Gone } };
        match timeout(self.limits.header_timeout, head).await {
            Ok(arrival) => arrival,
            Err(_) => self.late(downstream),
        }
    }

    /// Resolves when connections between two requests have to close. A process with a successor has the time to let
    /// each of them have one more request, and tell it then.
    async fn end(&self, mut shutdown: ShutdownWatch) {
        let _gone = shutdown.wait_for(|stopping| *stopping).await.is_err();
        if self.in_flight.is_handed_over() {
            std::future::pending().await
        }
    }

    /// A client that has said nothing gets no answer: it asked nothing.
    fn late(&self, downstream: &Downstream) -> Arrival {
        if downstream.ahead.is_empty() {
            self.count("header_timeout");
            Arrival::Gone
        } else {
            Arrival::Refused(Refusal::header_timeout())
        }
    }

    /// Reads a whole head, and looks at it.
    async fn head(&self, downstream: &mut Downstream) -> Arrival {
        let mut searched = 0;
        let length = loop {
            match head::length(&downstream.ahead, searched, &self.limits) {
                Err(refusal) => return Arrival::Refused(refusal),
                Ok(Some(length)) => break length,
                Ok(None) => searched = downstream.ahead.len().saturating_sub(1),
            }
            if !matches!(downstream.read_ahead().await, Ok(1..)) {
                return Arrival::Gone;
            }
        };
        if downstream.ahead[..length] == HTTP2_PREFACE[..HTTP2_HEAD] {
            return Arrival::Http2;
        }
        match head::check(&downstream.ahead[..length], &self.limits) {
            Ok(framing) => Arrival::Head(downstream.begin(length, framing)),
            Err(refusal) => Arrival::Refused(refusal),
        }
    }

    /// Answers and closes, in an order in which the client can read the answer.
    async fn refuse(&self, mut stream: Stream, refusal: &Refusal, linger: Duration) {
        self.count(refusal.code);
        let id = crate::proxy::new_id();
        log::debug!("refused id={id} code={} message={:?}", refusal.code, refusal.message);
        let farewell = async {
            stream.write_all(refusal.http1(&id).as_bytes()).await?;
            AsyncWriteExt::shutdown(&mut stream).await?;
            tokio::io::copy(&mut stream.take(LINGER_BYTES as u64), &mut tokio::io::sink()).await
        };
        let _in_vain = timeout(linger, farewell).await;
    }
}

/// Waits until something of a request is there; false if nothing will come.
async fn begins(downstream: &mut Downstream) -> bool {
    loop {
        downstream.skip_empty_lines();
        // The other half of an empty line may be on its way.
        if !downstream.ahead.is_empty() && downstream.ahead[..] != b"\r"[..] {
            return true;
        }
        if !matches!(downstream.read_ahead().await, Ok(1..)) {
            return false;
        }
    }
}
