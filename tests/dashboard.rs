//! The dashboard in a real browser: headless Chromium looks at the real binary between scripted engines.
//!
//! A page that is only read by its author shows what its author expects. Here a browser runs it under the policy that
//! forbids everything else, and the test compares what stands on it with what `/status` says. The rule for every page:
//! no complaint on the console, no request to another host, nothing that a client wrote taken for HTML.
//! `PLIMSOLL_WRITE=1` also takes the picture for docs/ from a run of `plimsoll demo`.

#![expect(clippy::print_stderr, reason = "a test that is skipped says so")]

#[path = "dashboard/driver.rs"]
mod driver;
#[path = "wires/support/mod.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the wire tests use the rest of their stage, and share it as it is"
)]
mod support;

use driver::Browser;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use support::client::{Line, Request};
use support::engine::{Answer, Engine, Gate, delta};
use support::port::Port;
use support::proxy::{Keys, Proxy, binary, folder};
use support::{one_upstream, tls, wait_until};

const TOKEN: &str = "canary-7f3a";
/// Closes whatever it may stand in, and says so if it is taken for HTML.
const HOSTILE: &str =
    r#"</td></script><img src=x onerror="document.title='taken'"><script>document.title='taken'</script>"#;

/// The largest picture that is kept in docs/.
const MOST_BYTES: usize = 250_000;

/// Every backend as the page shows it: address to state, reason, and the number behind each label.
const ROWS: &str = r#"return Object.fromEntries([...document.querySelectorAll('tr[data-backend]')].map(row => [
    row.dataset.backend, {
        state: row.querySelector('.word').textContent, reason: row.querySelector('.state small').textContent,
        done: row.querySelector('[data-label="req/s"] data').title,
        ...Object.fromEntries([...row.querySelectorAll('td[data-label]')].map(
            cell => [cell.dataset.label, cell.querySelector('data').value]))
    }]))"#;

/// No complaint, no foreign host, nothing wider than the screen.
async fn assert_clean(browser: &Browser, host: &str) {
    let console = browser.console().await;
    assert!(console.is_empty(), "{console:#?}");
    let own = format!("http://{host}/");
    let asked = browser.asked().await;
    let foreign: Vec<_> =
        asked.iter().filter(|url| !url.starts_with(&own) && !url.starts_with("data:")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

/// Looks at the page in every way that people do: nothing may stand outside of the screen.
async fn assert_fits(browser: &Browser) {
    for (width, scheme) in
        [(390, "light"), (390, "dark"), (320, "light"), (820, "dark"), (1280, "light"), (1920, "dark")]
    {
        browser.look(width, 844, scheme).await;
        let overhang = "return document.documentElement.scrollWidth - document.documentElement.clientWidth";
        assert_eq!(browser.run(overhang).await, 0, "at {width} pixels");
    }
    browser.look(1280, 900, "light").await;
}

#[tokio::test]
async fn the_page_shows_what_status_says_and_takes_no_name_for_html() {
    let Some(browser) = Browser::start().await else { return };
    let gate = Gate::new();
    let scripted = gate.clone();
    // Its first request it answers half, and goes on when the test lets it.
    let first = AtomicBool::new(true);
    let streaming = Engine::start(move |_| match first.swap(false, Relaxed) {
        true => Answer::stream().event(&delta("a")).wait(&scripted).event(&delta("b")).event("[DONE]").end(),
        false => Answer::json(200, r#"{"object":"chat.completion","choices":[]}"#),
    });
    let (good, gone) = (Engine::good(), Engine::dead(|_| Answer::json(200, "{}")));
    let addresses = [streaming.address(), good.address(), gone.address()];
    let upstreams = one_upstream(&addresses, "policy: round_robin, max_fails: 1, fail_timeout: 1h");
    let proxy = Proxy::start(&upstreams).await;
    let host = proxy.admin_address().to_string();
    browser.open(&format!("http://{host}/")).await;
    browser.until("document.querySelectorAll('tr[data-backend]').length === 3").await;

    // One stream that stays, some answers, and a backend that refuses and is ejected for it.
    let mut client = proxy.client(Line::Http1).await;
    while streaming.count() == 0 {
        client.send(&Request::streamed(HOSTILE, "hello")).await;
        assert_eq!(client.head().await.status, 200);
        if streaming.count() == 0 {
            client.rest().await;
        }
    }
    let mut asked = 0;
    wait_until("answers and an ejection", async || {
        asked += 1;
        assert_eq!(proxy.ask(&Request::chat("tiny", "how deep may she lie?")).await.status, 200);
        asked >= 12 && proxy.log().contains("ejected")
    })
    .await;
    let status = || async {
        let answer = proxy.admin(&Request::get("/status").with("host", &host)).await;
        serde_json::from_str::<Value>(&answer.text()).expect("JSON")
    };
    browser
        .wait("the page to agree with /status", async || {
            let (shown, told) = (browser.run(ROWS).await, status().await);
            let backends = told["upstreams"]["llm"]["backends"].as_array().expect("backends");
            backends.len() == 3 && backends.iter().all(|backend| agrees(&shown, backend))
        })
        .await;
    let shown = browser.run(ROWS).await;
    assert_eq!(shown[&addresses[2]]["state"], "ejected", "{shown:#}");
    assert!(shown[&addresses[2]]["reason"].as_str().is_some_and(|why| why.contains("failure")), "{shown:#}");
    assert_eq!(shown[&addresses[0]]["active"], "1", "{shown:#}");

    // What is in flight, and what the client called its model, letter by letter.
    let text = |what: &str| {
        format!("[...document.querySelectorAll('#{what} td.model')].map(cell => cell.textContent)")
    };
    browser.until(&format!("{}.includes({HOSTILE:?})", text("requests"))).await;
    browser.until(&format!("{}.includes({HOSTILE:?})", text("choices"))).await;
    browser.until("document.querySelector('#requests').innerText.includes('streaming')").await;
    assert_eq!(browser.run("return document.querySelectorAll('main img, main script').length").await, 0);
    let title = browser.run("return document.title").await;
    assert_eq!(title, "(1 not up) Plimsoll");
    let refused = browser
        .run("try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } return null")
        .await;
    assert_eq!(refused, "TypeError", "the policy lets nothing make HTML of text");
    browser.console().await;
    assert_fits(&browser).await;
    let picture = browser.picture().await;
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000, "{} bytes", picture.len());
    assert_clean(&browser, &host).await;
    gate.open();
    client.rest().await;
}

/// Whether the page shows this backend of `/status` as it is.
fn agrees(shown: &Value, backend: &Value) -> bool {
    let row = &shown[backend["address"].as_str().expect("an address")];
    let near = |label: &str, told: &Value| {
        let shown = row[label].as_str().and_then(|value| value.parse::<f64>().ok());
        shown.zip(told.as_f64()).is_some_and(|(shown, told)| (shown - told).abs() < 0.02)
    };
    let done: u64 =
        backend["requests"].as_object().into_iter().flat_map(|o| o.values()).filter_map(Value::as_u64).sum();
    row["state"].as_str().map(|state| state.replace(' ', "_")).as_deref() == backend["state"].as_str()
        && near("pending", &backend["pending_tokens"])
        && near("active", &backend["active_requests"])
        && near("context", &backend["context_tokens"])
        && near("share", &backend["share"])
        && row["done"].as_str().is_some_and(|text| text.starts_with(&format!("{done} since the start")))
}

#[tokio::test]
async fn without_the_token_the_page_is_empty_and_with_it_a_backend_is_drained_after_a_question() {
    let (engine, other, folder) = (Engine::good(), Engine::good(), folder());
    tls::write_secret(&folder.join("token"), TOKEN);
    let admin = format!("token: {{ file: {} }}", folder.join("token").display());
    let upstreams = one_upstream(&[engine.address(), other.address()], "");
    let proxy = Proxy::start_keyed(Keys { admin: &admin, ..Keys::default() }, &upstreams).await;
    for path in ["/", "/dashboard"] {
        let page = proxy.admin(&Request::get(path)).await;
        assert_eq!((page.status, page.header("cache-control")), (200, Some("no-store")), "{path}");
        assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
        let policy = page.header("content-security-policy").expect("a policy");
        for part in
            ["default-src 'none'", "script-src 'sha256-", "frame-ancestors 'none'", "connect-src 'self'"]
        {
            assert!(policy.contains(part) && !policy.contains("unsafe"), "{policy}");
        }
        assert!(
            !page.text().contains(&engine.address()) && !page.text().contains("llm"),
            "the page holds no data"
        );
    }
    let Some(browser) = Browser::start().await else { return };
    let host = proxy.admin_address().to_string();
    browser.open(&format!("http://{host}/")).await;
    browser.until("!document.querySelector('#token').hidden").await;
    assert_fits(&browser).await;
    browser.type_into("#secret", "another").await;
    browser.click("#token button").await;
    browser.until("document.querySelector('#wrong').textContent === 'That is not the token.'").await;
    assert_eq!(browser.run("return document.querySelectorAll('tr[data-backend]').length").await, 0);
    browser.type_into("#secret", TOKEN).await;
    browser.click("#token button").await;
    browser.until("document.querySelectorAll('tr[data-backend]').length === 2").await;
    assert_eq!(
        browser.run("return [localStorage.length, document.cookie]").await,
        serde_json::json!([0, ""])
    );

    // A browser says of each 401 that it was one; the page says nothing.
    let console = browser.console().await;
    assert!(console.iter().all(|(source, said)| source == "network" && said.contains("401")), "{console:#?}");
    browser.run("location.reload()").await;
    browser.until("document.querySelectorAll('tr[data-backend]').length === 2").await;

    let word =
        format!("document.querySelector('tr[data-backend=\"{}\"] .word').textContent", engine.address());
    let button = format!("tr[data-backend=\"{}\"] .act", engine.address());
    browser.click(&button).await;
    browser.click("#sure button[value=no]").await;
    browser.click(&button).await;
    browser.click("#yes").await;
    browser.until(&format!("{word} === 'draining'")).await;
    for _ in 0..4 {
        assert_eq!(proxy.ask(&Request::chat("tiny", "hello")).await.status, 200);
    }
    assert_eq!((engine.count(), other.count()), (0, 4));
    browser
        .until(&format!(
            "document.querySelector('{}').textContent === 'undrain'",
            button.replace('"', "\\\"")
        ))
        .await;
    browser.click(&button).await;
    browser.click("#yes").await;
    browser.until(&format!("{word} === 'up'")).await;
    assert_clean(&browser, &host).await;

    browser.click("#forget").await;
    browser.until("!document.querySelector('#token').hidden").await;
    assert_eq!(browser.run("return sessionStorage.length").await, 0);
    let text = browser.run("return document.documentElement.outerHTML").await;
    assert!(
        !text.as_str().expect("a page").contains(&engine.address()),
        "what was seen with the token is gone"
    );
    assert!(!proxy.log().contains(TOKEN));
}

#[tokio::test]
async fn a_process_that_is_away_is_said_to_be_and_its_numbers_are_grey_until_it_is_back() {
    let Some(browser) = Browser::start().await else { return };
    let (engine, admin) = (Engine::good(), Port::take());
    let address = format!("address: {}", admin.address());
    let start = || {
        Proxy::spawn_keyed(
            Keys { admin: &address, ..Keys::default() },
            &one_upstream(&[engine.address()], ""),
            &[],
        )
    };
    let listens = async || {
        wait_until("the admin listener", async || {
            tokio::net::TcpStream::connect(admin.address()).await.is_ok()
        })
        .await;
    };
    let first = start();
    listens().await;
    browser.open(&format!("http://{}/", admin.address())).await;
    browser.until("document.querySelector('#link').textContent === 'live'").await;
    browser.until("document.querySelectorAll('tr[data-backend]').length === 1").await;
    assert_clean(&browser, &admin.address().to_string()).await;
    drop(first);
    browser.until("document.querySelector('#link').textContent === 'not reachable'").await;
    browser.until("document.body.classList.contains('stale')").await;
    let said = browser.run("return document.querySelector('#said').innerText").await;
    assert!(
        said.as_str().is_some_and(|said| said.contains("does not answer") && said.contains(" old")),
        "{said}"
    );
    assert_eq!(
        browser.run("return document.querySelectorAll('tr[data-backend]').length").await,
        1,
        "what was known stays"
    );
    let _second = start();
    listens().await;
    browser.until("document.querySelector('#link').textContent === 'live'").await;
    browser
        .until("!document.body.classList.contains('stale') && document.querySelector('#said').hidden")
        .await;
    let console = browser.console().await;
    assert!(console.iter().all(|(source, _)| source == "network"), "{console:#?}");
}

/// The demo, which ends with the test.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        // Its balancer ends with it only if it is told, not killed.
        let _told = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        let _status = self.0.wait();
    }
}

#[tokio::test]
async fn the_picture_in_docs_is_small_and_can_be_taken_again() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/dashboard.png");
    if std::env::var_os("PLIMSOLL_WRITE").is_some()
        && let Some(browser) = Browser::start().await
    {
        std::fs::write(&path, picture_of_a_demo(&browser).await).expect("docs/ is writable");
    }
    let picture = std::fs::read(&path).expect("docs/dashboard.png: PLIMSOLL_WRITE=1 takes it");
    assert!(picture.starts_with(b"\x89PNG") && picture.len() < MOST_BYTES, "{} bytes", picture.len());
}

/// The dashboard of the demo's second balancer, when it has a minute of traffic behind it.
async fn picture_of_a_demo(browser: &Browser) -> Vec<u8> {
    let mut demo = Command::new(binary())
        .args(["demo", "--seconds", "75"])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map(Demo)
        .expect("the binary starts");
    let said = BufReader::new(demo.0.stdout.take().expect("it is piped"));
    // The line stands there twice: once for each balancer.
    let urls = tokio::task::spawn_blocking(move || {
        let lines = said.lines().map_while(Result::ok);
        lines.filter_map(|line| Some(line[line.find("http://")?..].trim().to_owned())).nth(1)
    });
    let url = tokio::time::timeout(Duration::from_secs(200), urls).await.expect("a demo in time");
    let url = url.expect("no panic").expect("the demo says where its dashboard is");
    browser.look(1280, 860, "dark").await;
    browser.open(&url).await;
    browser.until("document.querySelectorAll('tr[data-backend]').length === 4").await;
    tokio::time::sleep(Duration::from_secs(66)).await;
    browser.picture().await
}
