//! Which certificate a client is shown, and which it has to show.
//!
//! A client names the host it wants in its first message. It is shown the first certificate of the listener that is
//! valid for this name, else the first of all: a client that asks for an IP address names none, and one whose name
//! is in no certificate says so itself, in clearer words than a handshake that failed. rustls decides whether a
//! certificate is valid for a name, once per handshake and certificate; that takes about a microsecond.
//!
//! With `client_ca`, a client that shows no valid certificate gets no handshake: none of its requests is read.
//!
//! What is wrong with the files is found out here, before anything listens. Pingora would panic in a task.

use std::path::Path;
use std::sync::Arc;

use pingora::listeners::tls::{Acceptor, TlsSettings};
use rustls::RootCertStore;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

use crate::config::{Identity, ListenerTls};

/// The TLS of a listener.
pub struct Tls {
    /// What does its handshakes.
    pub acceptor: Acceptor,
    /// What it shows to clients.
    pub shown: Vec<Shown>,
}

/// A certificate that clients are shown.
pub struct Shown {
    /// The file that it came from.
    pub file: String,
    /// When it expires, in seconds since 1970.
    pub expires: i64,
}

/// The TLS of a listener with this `tls`; with `http2`, HTTP/2 is offered beside HTTP/1.1. A
/// certificate out of its dates is worth a warning: whoever renews it may be late, and some clients do not look.
///
/// # Errors
/// A file that cannot be used, by its name, as a lowercase fragment.
pub fn acceptor(tls: &ListenerTls, http2: bool) -> Result<Tls, String> {
    pingora::tls::install_default_crypto_provider();
    let mut settings = TlsSettings::intermediate("", "").map_err(|e| e.to_string())?;
    let identities: Vec<_> = tls.identities().collect();
    let certified = identities.iter().map(|identity| certified_key(identity).map(Arc::new));
    let certified = certified.collect::<Result<Vec<_>, _>>()?;
    let shown =
        identities.iter().zip(&certified).filter_map(|(identity, certified)| shown(identity, certified));
    let shown = shown.collect();
    settings.set_cert_resolver(Arc::new(Certificates(certified)));
    if let Some(file) = &tls.client_ca {
        settings.set_client_cert_verifier(verifier(file)?);
    }
    if http2 {
        settings.enable_h2();
    }
    Ok(Tls { acceptor: settings.build(), shown })
}

/// Why a handshake failed, in rustls' words; Pingora puts them at the end of its own.
pub(super) fn reason(e: &pingora::Error) -> String {
    let whole = e.to_string();
    whole.rsplit_once("tls connect error: ").map_or_else(|| whole.trim(), |(_, reason)| reason).to_owned()
}

/// The certificates of a listener, in the order of the configuration; at least one.
#[derive(Debug)]
struct Certificates(Vec<Arc<CertifiedKey>>);

impl Certificates {
    fn of(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let name = name.filter(|_| self.0.len() > 1).and_then(|name| ServerName::try_from(name).ok());
        let named = name.and_then(|name| self.0.iter().find(|certified| is_valid_for(certified, &name)));
        named.or_else(|| self.0.first()).cloned()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.of(hello.server_name())
    }
}

fn is_valid_for(certified: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let leaf = certified.cert.first().and_then(|leaf| ParsedCertificate::try_from(leaf).ok());
    leaf.is_some_and(|leaf| verify_server_name(&leaf, name).is_ok())
}

fn certified_key(identity: &Identity) -> Result<CertifiedKey, String> {
    let [certificate, key] = [&identity.certificate, &identity.key].map(|path| path.display().to_string());
    let fail = |e: &dyn std::fmt::Display| format!("certificate {certificate} with key {key}: {e}");
    let (chain, private) = match pingora::tls::load_certs_and_key_files(&certificate, &key) {
        Ok(Some(pair)) => pair,
        Ok(None) => return Err(fail(&"no usable certificate or key in these files")),
        Err(e) => return Err(fail(&e)),
    };
    let provider = CryptoProvider::get_default().ok_or_else(|| fail(&"no cryptography"))?;
    let certified = CertifiedKey::from_der(chain, private, provider).map_err(|e| fail(&e))?;
    if let Some(odd) = certified.cert.first().and_then(|leaf| out_of_date(leaf)) {
        log::warn!("certificate {odd} file={certificate}");
    }
    Ok(certified)
}

/// What an operator is told of a certificate; nothing if only rustls can read it.
fn shown(identity: &Identity, certified: &CertifiedKey) -> Option<Shown> {
    let (_, leaf) = X509Certificate::from_der(certified.cert.first()?).ok()?;
    let file = identity.certificate.display().to_string();
    Some(Shown { file, expires: leaf.validity().not_after.timestamp() })
}

/// What is wrong with the dates of this certificate, if anything is.
fn out_of_date(leaf: &[u8]) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
    let (validity, now) = (leaf.validity(), ASN1Time::now());
    if now > validity.not_after {
        Some(format!("has expired not_after={:?}", validity.not_after.to_string()))
    } else if now < validity.not_before {
        Some(format!("is not valid yet not_before={:?}", validity.not_before.to_string()))
    } else {
        None
    }
}

/// Believes the certificates that one of those in `file` has signed.
fn verifier(file: &Path) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let fail = |e: &dyn std::fmt::Display| format!("client_ca {}: {e}", file.display());
    let mut roots = RootCertStore::empty();
    pingora::tls::load_ca_file_into_store(file, &mut roots).map_err(|e| fail(&e))?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().map_err(|e| fail(&e))?;
    Ok(verifier)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::ring::default_provider;

    fn made(names: &[&str], dates: Option<[i32; 2]>) -> CertifiedKey {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        if let Some([from, to]) = dates {
            params.not_before = rcgen::date_time_ymd(from, 1, 1);
            params.not_after = rcgen::date_time_ymd(to, 1, 1);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let private = key.serialize_der().try_into().unwrap();
        CertifiedKey::from_der(vec![certificate.der().clone()], private, &default_provider()).unwrap()
    }

    #[test]
    fn a_client_is_shown_the_first_certificate_that_has_its_name_else_the_first() {
        let names: [&[&str]; 4] = [&["a.test", "127.0.0.1"], &["*.b.test"], &["x.b.test"], &["c.test"]];
        let certificates = Certificates(names.iter().map(|names| Arc::new(made(names, None))).collect());
        let shown = |name: Option<&str>| {
            let shown = certificates.of(name).unwrap();
            certificates.0.iter().position(|certified| Arc::ptr_eq(certified, &shown)).unwrap()
        };
        for (name, place) in [
            ("a.test", 0),
            ("A.Test", 0),
            ("x.b.test", 1),
            ("c.test", 3),
            ("b.test", 0),
            ("y.x.b.test", 0),
            ("elsewhere.test", 0),
            ("", 0),
            ("no name", 0),
        ] {
            assert_eq!(shown(Some(name)), place, "{name}");
        }
        assert_eq!(shown(None), 0);
    }

    #[test]
    fn a_certificate_out_of_its_dates_is_told() {
        let said = |dates| out_of_date(&made(&["a.test"], dates).cert[0]);
        assert_eq!(said(None), None);
        assert!(said(Some([2001, 2002])).unwrap().starts_with("has expired not_after=\"Jan  1 "));
        assert!(said(Some([3001, 3002])).unwrap().starts_with("is not valid yet not_before=\"Jan  1 "));
        assert_eq!(out_of_date(b"no certificate"), None);
    }
}
