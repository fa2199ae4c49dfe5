//! TLS with clients: several certificates by name, certificates of clients, versions, and what `check` says of files.

use crate::support::client::Line;
use crate::support::engine::Engine;
use crate::support::proxy::{Keys, Proxy, binary, folder};
use crate::support::tls::{Authority, Visitor};
use crate::support::{one_upstream, within};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn proxy(engine: &Engine, tls: &str) -> Proxy {
    Proxy::start_keyed(Keys { tls, ..Keys::default() }, &one_upstream(&[engine.address()], "")).await
}

/// What `plimsoll check` says of a configuration with this `tls` and nothing else wrong.
fn check(tls: &str) -> Output {
    let file = folder().join("plimsoll.yaml");
    let listener = format!("{{ address: 127.0.0.1:8443, tls: {{ {tls} }} }}");
    let text = format!("listeners: [{listener}]\nupstreams: {{ llm: {{ backends: [127.0.0.1:8000] }} }}\n");
    std::fs::write(&file, text).expect("a writable folder");
    Command::new(binary()).arg("check").arg(&file).env_remove("RUST_LOG").output().expect("the binary starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn each_client_is_shown_the_certificate_of_the_name_it_asks_for() {
    let (engine, folder, authority) = (Engine::good(), folder(), Authority::unknown());
    let [wild, exact] = [authority.sign(&["*.llm.test"]), authority.sign(&["llm.test", "other.test"])];
    let others = [(&wild, "wild"), (&exact, "exact")].map(|(signed, name)| signed.write(&folder, name));
    let proxy = proxy(&engine, &format!("others: [{{ {} }}, {{ {} }}]", others[0], others[1])).await;
    let visitor = Visitor::trusting(&authority);
    for (name, expected) in [
        ("a.llm.test", Some(&wild)),
        ("llm.test", Some(&exact)),
        ("other.test", Some(&exact)),
        ("localhost", None),
        ("127.0.0.1", None),
    ] {
        for version in [2, 3] {
            let visitor = Visitor::trusting(&authority).speaking(version);
            let visit = visitor.visit(proxy.address(Line::Http1Tls), name).await;
            let (shown, answer) = visit.unwrap_or_else(|e| panic!("{name}, TLS 1.{version}: {e}"));
            assert!(answer.starts_with("HTTP/1.1 200 "), "{name}: {answer}");
            assert_eq!(
                [&wild, &exact].into_iter().find(|s| s.der == shown).map(|s| &s.der),
                expected.map(|s| &s.der)
            );
        }
    }
    let unknown = visitor.visit(proxy.address(Line::Http1Tls), "unknown.test").await.unwrap_err();
    assert!(unknown.to_string().contains("unknown.test"), "the client itself says what is wrong: {unknown}");
}

#[tokio::test]
async fn when_each_certificate_expires_is_a_metric_and_a_reload_renews_it() {
    let (engine, folder, authority) = (Engine::good(), folder(), Authority::unknown());
    let until = |year| authority.sign_between(&["llm.test"], 2000, year).write(&folder, "llm");
    let proxy = proxy(&engine, &format!("others: [{{ {} }}]", until(2030))).await;
    let file = folder.join("llm.pem").display().to_string();
    let listener = proxy.address(Line::Http1Tls).to_string();
    let labels = [("certificate", file.as_str()), ("listener", listener.as_str())];
    let name = "plimsoll_certificate_expiry_timestamp_seconds";
    // 2030-01-01 and 2040-01-01.
    assert_eq!(proxy.metrics().await.sum(name, &labels), 1_893_456_000.0);
    assert_eq!(proxy.metrics().await.values(name, "certificate").len(), 2);
    until(2040);
    assert_eq!(proxy.reload(&one_upstream(&[engine.address()], "")).await.status, 200);
    assert_eq!(proxy.metrics().await.sum(name, &labels), 2_208_988_800.0);
    assert_eq!(proxy.metrics().await.values(name, "certificate").len(), 2);
}

#[tokio::test]
async fn a_client_without_a_certificate_of_our_authority_gets_no_handshake() {
    let (engine, folder, authority) = (Engine::good(), folder(), Authority::unknown());
    let client_ca = authority.write(&folder);
    let proxy = proxy(&engine, &format!("client_ca: {}", client_ca.display())).await;
    let address = proxy.address(Line::Http1Tls);
    let ours = authority.sign(&["client-7"]);
    let expired = authority.sign_between(&["client-7"], 2001, 2002);
    // Of the same name as ours.
    let foreign = Authority::unknown().sign(&["client-7"]);
    // Whether it listens was found out by a connection without a handshake.
    let mut refused = 1;
    for version in [2, 3] {
        let visitor = || Visitor::trusting(&authority).speaking(version);
        for (visitor, reason) in [
            (visitor(), "error=\"peer sent no certificates"),
            (visitor().showing(&expired), "error=\"invalid peer certificate: certificate expired"),
            (visitor().showing(&foreign), "error=\"invalid peer certificate: BadSignature"),
        ] {
            let visit = visitor.visit(address, "localhost").await;
            assert!(visit.is_err(), "TLS 1.{version}, {reason}: {visit:?}");
            refused += 1;
            proxy.counts("plimsoll_refusals_total", &[("code", "tls_failed")], f64::from(refused)).await;
            let log = proxy.log();
            let told =
                log.lines().rfind(|line| line.contains("no TLS client=127.0.0.1 ")).unwrap_or_default();
            assert!(told.contains("INFO") && told.contains(reason), "{reason}: {told}");
        }
        let (_, answer) =
            visitor().showing(&ours).visit(address, "localhost").await.expect("a good certificate");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    assert_eq!(proxy.ask(&crate::support::client::Request::get("/health")).await.status, 200, "without TLS");
}

#[tokio::test]
async fn tls_older_than_1_2_is_refused() {
    let engine = Engine::good();
    let proxy = proxy(&engine, "").await;
    for minor in [1, 2] {
        // A ClientHello of TLS 1.0 or 1.1: cipher suites of that time, P-256, uncompressed points, ECDSA with SHA-256
        // (which clients of that time do not mention, and are refused for already).
        let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 4, 0, 2, 4, 3];
        let suites = [0xc0, 0x09, 0xc0, 0x13, 0xc0, 0x0a, 0xc0, 0x14, 0, 0x2f, 0, 0x35];
        let hello = [
            &[3, minor][..],
            &[7; 32],
            &[0, 0, suites.len() as u8],
            &suites,
            &[1, 0, 0, extensions.len() as u8],
            &extensions,
        ]
        .concat();
        let length = hello.len() as u8;
        let record = [&[0x16, 3, 1, 0, length + 4, 1, 0, 0, length][..], &hello].concat();
        let mut stream = TcpStream::connect(proxy.address(Line::Http1Tls)).await.expect("a listener");
        stream.write_all(&record).await.expect("a listener that reads");
        let mut answer = Vec::new();
        within("the end of the connection", stream.read_to_end(&mut answer)).await.expect("an orderly end");
        // A fatal alert, protocol_version.
        assert_eq!((answer[0], &answer[3..]), (0x15, &[0, 2, 2, 70][..]), "TLS 1.{}: {answer:?}", minor - 1);
    }
    proxy.counts("plimsoll_refusals_total", &[("code", "tls_failed")], 3.0).await;
}

#[test]
fn check_tells_a_certificate_that_does_not_fit_its_key_and_one_that_has_expired() {
    let (folder, authority) = (folder(), Authority::unknown());
    let good = authority.sign(&["llm.test"]).write(&folder, "good");
    authority.sign(&["llm.test"]).write(&folder, "other");
    let output = check(&good);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));

    let output = check(&good.replace("good.key", "other.key"));
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(
        said(&output).contains("good.pem with key /") && said(&output).contains("other.key: "),
        "{}",
        said(&output)
    );

    let output = check(&format!("{good}, others: [{{ {} }}]", good.replace("good.key", "other.key")));
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));

    let old = authority.sign_between(&["llm.test"], 2001, 2002).write(&folder, "old");
    let output = check(&old);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(
        said(&output).contains("certificate has expired") && said(&output).contains("old.pem"),
        "{}",
        said(&output)
    );

    std::fs::write(folder.join("bad.pem"), "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n")
        .unwrap();
    let output = check(&format!("{good}, client_ca: {}", folder.join("bad.pem").display()));
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(said(&output).contains("client_ca /"), "{}", said(&output));
}

#[test]
fn check_refuses_a_key_that_everybody_may_read() {
    let (folder, authority) = (folder(), Authority::unknown());
    let tls = authority.sign(&["llm.test"]).write(&folder, "a");
    std::fs::set_permissions(folder.join("a.key"), Permissions::from_mode(0o644)).unwrap();
    let output = check(&tls);
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(said(&output).contains("(listeners[0].tls.key)"), "{}", said(&output));
    assert!(said(&output).contains("chmod o-rwx"), "{}", said(&output));
}
