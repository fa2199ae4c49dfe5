//! A certificate for 127.0.0.1 that the client of the tests trusts, made once per run; authorities of one's own, and
//! clients that show certificates and ask for names.

use super::within;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};

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

/// Who signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

/// A certificate and its key.
pub struct Signed {
    certificate_pem: String,
    /// The certificate as it is sent.
    pub der: CertificateDer<'static>,
    key: KeyPair,
}

impl Authority {
    /// A new one, which nobody trusts yet.
    pub fn unknown() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let (pem, der) = (certificate.pem(), certificate.der().clone());
        Self { issuer: Issuer::new(params, key), pem, der }
    }

    /// A certificate for these names, of the years from `from` to `to`.
    pub fn sign_between(&self, names: &[&str], from: i32, to: i32) -> Signed {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Signed { certificate_pem: certificate.pem(), der: certificate.der().clone(), key }
    }

    /// A certificate for these names, valid now.
    pub fn sign(&self, names: &[&str]) -> Signed {
        self.sign_between(names, 2000, 3000)
    }

    /// Writes its own certificate into `folder`.
    pub fn write(&self, folder: &Path) -> PathBuf {
        let file = folder.join("authority.pem");
        std::fs::write(&file, &self.pem).expect("a writable folder");
        file
    }
}

impl Signed {
    /// Writes certificate and key into `folder`; the keys of a configuration that name the two files.
    pub fn write(&self, folder: &Path, name: &str) -> String {
        let [certificate, key] = ["pem", "key"].map(|end| folder.join(format!("{name}.{end}")));
        std::fs::write(&certificate, &self.certificate_pem).expect("a writable folder");
        write_secret(&key, &self.key.serialize_pem());
        format!("certificate: {}, key: {}", certificate.display(), key.display())
    }
}

/// A client with a mind of its own about TLS.
pub struct Visitor<'a> {
    roots: RootCertStore,
    shows: Option<&'a Signed>,
    versions: Vec<&'static SupportedProtocolVersion>,
}

impl<'a> Visitor<'a> {
    /// One that trusts `authority`, beside the certificate of every proxy under test.
    pub fn trusting(authority: &Authority) -> Self {
        let mut roots = RootCertStore::empty();
        for root in [&IDENTITY.certificate, &authority.der] {
            roots.add(root.clone()).expect("our own certificate");
        }
        Self { roots, shows: None, versions: vec![&TLS12, &TLS13] }
    }

    /// The same, showing this certificate if it is asked for one.
    pub fn showing(self, shows: &'a Signed) -> Self {
        Self { shows: Some(shows), ..self }
    }

    /// The same, speaking this version of TLS only: 2 or 3, after the 1.
    pub fn speaking(self, version: u8) -> Self {
        Self { versions: vec![if version == 2 { &TLS12 } else { &TLS13 }], ..self }
    }

    /// Asks `/health` of what listens at `address`, as `name`; the certificate it was shown, and the answer.
    pub async fn visit(
        &self,
        address: SocketAddr,
        name: &str,
    ) -> io::Result<(CertificateDer<'static>, String)> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&self.versions)
            .expect("versions that the provider has")
            .with_root_certificates(self.roots.clone());
        let config = match self.shows {
            None => config.with_no_client_auth(),
            Some(signed) => {
                let key = signed.key.serialize_der().try_into().expect("a key");
                config
                    .with_client_auth_cert(vec![signed.der.clone()], key)
                    .expect("a certificate and its key")
            }
        };
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let visit = async {
            let stream = TcpStream::connect(address).await?;
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            let shown = stream.get_ref().1.peer_certificates().expect("a handshake")[0].clone();
            stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok((shown.into_owned(), answer))
        };
        within("an answer over TLS", visit).await
    }
}
