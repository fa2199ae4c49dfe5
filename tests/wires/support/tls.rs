//! A certificate for 127.0.0.1 that the client of the tests trusts, made once per run.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

struct Identity {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key_pem: String,
}

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])
        .expect("a self-signed certificate");
    Identity {
        certificate: made.cert.der().clone(),
        certificate_pem: made.cert.pem(),
        key_pem: made.signing_key.serialize_pem(),
    }
});

/// Writes `cert.pem` and `key.pem` into `folder`.
pub fn write_pem(folder: &Path) {
    std::fs::write(folder.join("cert.pem"), &IDENTITY.certificate_pem).expect("a writable folder");
    write_secret(&folder.join("key.pem"), &IDENTITY.key_pem);
}

/// Writes a file that nobody else may read, as every file with a secret in it has to be.
pub fn write_secret(file: &Path, text: &str) {
    std::fs::write(file, text).expect("a writable folder");
    std::fs::set_permissions(file, Permissions::from_mode(0o600)).expect("a file of ours");
}

/// Handshakes over `stream`, offering exactly the protocol `alpn`, and checks that it was chosen.
pub async fn handshake(stream: TcpStream, alpn: &str) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(IDENTITY.certificate.clone()).expect("our own certificate");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider's own versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("a TLS handshake");
    let chosen = stream.get_ref().1.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
    assert!(chosen.as_deref() == Some(alpn) || (chosen.is_none() && alpn == "http/1.1"), "ALPN {chosen:?}");
    stream
}
