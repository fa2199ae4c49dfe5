//! Clients that speak HTTP/2 over TLS, several requests at a time on a connection, and the certificate of all proxies.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use h2::client::SendRequest;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::http::broken;
use super::load::{Tally, check};
use super::process;
use super::prompt::{PATH, Plan, Prompts};

/// A prompt of a megabyte should not wait for a window.
const WINDOW: u32 = 1 << 20;

/// Writes `certificate.pem`, `key.pem`, and `both.pem`, which is what HAProxy wants.
pub fn write_certificate() -> io::Result<()> {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).map_err(io::Error::other)?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    for (name, text) in
        [("certificate.pem", &certificate), ("key.pem", &key), ("both.pem", &(certificate.clone() + &key))]
    {
        let file = process::folder().join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// A connection on which requests can be sent.
pub async fn connect(address: SocketAddr) -> io::Result<SendRequest<Bytes>> {
    let certificate = CertificateDer::from_pem_file(process::folder().join("certificate.pem"));
    let mut roots = RootCertStore::empty();
    roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().map_err(io::Error::other)?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("127.0.0.1").map_err(io::Error::other)?;
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(broken("it offers no HTTP/2"));
    }
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(WINDOW);
    let (sender, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        // Whoever waits for an answer is told.
        let _ = connection.await;
    });
    Ok(sender)
}

/// Asks for one document; an error unless the answer is right.
async fn ask(sender: &mut SendRequest<Bytes>, prompts: &Prompts, nonce: u64) -> io::Result<()> {
    let mut body = prompts.body(&Plan { nonce, ..Plan::default() });
    let mut body = body.copy_to_bytes(body.remaining());
    let head = http::Request::post(format!("https://127.0.0.1:7701{PATH}"))
        .header("user-agent", "wire/1")
        .header("accept", "*/*")
        .header("authorization", "Bearer sk-wire")
        .header("content-type", "application/json")
        .header("content-length", body.len());
    let head = head.body(()).map_err(io::Error::other)?;
    let mut ready = sender.clone().ready().await.map_err(io::Error::other)?;
    let (response, mut upload) = ready.send_request(head, false).map_err(io::Error::other)?;
    while !body.is_empty() {
        upload.reserve_capacity(body.len());
        let room = std::future::poll_fn(|cx| upload.poll_capacity(cx)).await;
        let room = room.ok_or_else(|| broken("the upload was refused"))?.map_err(io::Error::other)?;
        let piece = body.split_to(room.min(body.len()));
        upload.send_data(piece, body.is_empty()).map_err(io::Error::other)?;
    }
    let (head, mut answer) = response.await.map_err(io::Error::other)?.into_parts();
    let mut text = BytesMut::new();
    while let Some(data) = answer.data().await {
        let data = data.map_err(io::Error::other)?;
        answer.flow_control().release_capacity(data.len()).map_err(io::Error::other)?;
        text.extend_from_slice(&data);
    }
    check(head.status.as_u16(), &text, nonce, prompts.length(nonce))
}

/// `connections`, each with `streams` clients that ask again as soon as they have an answer.
pub async fn closed(
    address: SocketAddr,
    prompts: &Arc<Prompts>,
    [connections, streams]: [usize; 2],
    tally: &Arc<Tally>,
) -> io::Result<JoinSet<()>> {
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let sender = connect(address).await?;
        for _ in 0..streams {
            let (mut sender, prompts, tally) = (sender.clone(), prompts.clone(), tally.clone());
            clients.spawn(async move {
                while !tally.is_over() {
                    let asked = tally.clock.now();
                    let answer = ask(&mut sender, &prompts, tally.nonce()).await;
                    tally.settle(asked, &answer);
                    if answer.is_err() {
                        // A connection that was closed is not opened again: the run is invalid anyway.
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            });
        }
    }
    Ok(clients)
}

/// Asks once, on a connection of its own.
pub async fn once(address: SocketAddr, prompts: &Prompts, tally: &Tally) -> io::Result<()> {
    let asked = async { ask(&mut connect(address).await?, prompts, tally.nonce()).await };
    tokio::time::timeout(Duration::from_secs(5), asked).await.map_err(|_| broken("no answer within 5 s"))?
}
