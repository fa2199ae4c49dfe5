//! Real engines behind the real binary, real clients in front of it: the main job of the product, end to end.
//!
//! Three llama.cpp servers with a tiny model and one with a slow model are driven by the official OpenAI client and by
//! aiperf (tests/engines), because a scripted engine only does what its author thought of: llama.cpp closes connections
//! without saying so, answers 503 while it loads, and dies with its requests when it is killed.
//!
//! The rule: no request fails, except one whose answer had begun on an engine that was killed; and afterwards nothing
//! is charged to any backend. `tests/engines/setup.sh` installs engines and clients below target/; where it cannot, the
//! tests fail in CI and are skipped loudly elsewhere.

#![expect(clippy::print_stderr, reason = "a long test says what it is at")]

#[path = "wires/support/mod.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the wire tests use the rest of their stage, and share it as it is"
)]
mod support;

use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use support::client::{Answer, Client, Line, Request};
use support::metrics::Metrics;
use support::port::Port;
use support::proxy::{Proxy, folder};
use support::wait_until;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, MutexGuard};

/// What one client program may take, several times what it takes on two cores.
const PROGRAM: Duration = Duration::from_secs(150);

#[tokio::test]
async fn an_application_session_works_and_a_shared_prefix_lands_where_it_is_cached() {
    let Some(stage) = Stage::set().await else { return };
    let report = stage.run("session.py", &[&stage.base_url()], |_| ()).await;
    assert_eq!(report["failed"], Value::Array(Vec::new()), "checks of session.py");
    stage.assert_at_rest().await;
}

#[tokio::test]
async fn two_thousand_requests_of_mixed_size_lose_none() {
    let Some(stage) = Stage::set().await else { return };
    let report = stage.run("load.py", &[&stage.base_url()], |_| ()).await;
    assert_eq!(count(&report, "ok"), 2000, "{report}");
    for engine in &stage.tiny {
        let answers = count(&report["backends"], &engine.address());
        assert!(answers > 200, "{} gave {answers} of 2000 answers: {report}", engine.address());
    }
    stage.assert_at_rest().await;
    stage.proxy.counts("plimsoll_requests_total", &[("upstream", "tiny"), ("outcome", "ok")], 2000.0).await;
    for kind in ["prompt", "completion", "cached"] {
        let said = count(&report["tokens"], kind) as f64;
        stage.proxy.counts("plimsoll_tokens_total", &[("upstream", "tiny"), ("kind", kind)], said).await;
    }
}

#[tokio::test]
async fn an_engine_killed_and_restarted_under_load_costs_only_the_answers_it_had_begun() {
    let Some(mut stage) = Stage::set().await else { return };
    let mut victim = stage.tiny.remove(0);
    let report = stage
        .run("load.py", &[&stage.base_url()], |line| match line {
            "done 500" => victim.kill(),
            "done 1000" => victim.spawn(),
            _ => (),
        })
        .await;
    let cut = count(&report, "cut");
    assert_eq!(count(&report, "failed"), 0, "{report}");
    assert_eq!(count(&report, "ok") + cut, 2000, "{report}");
    assert!(cut <= 16, "no more answers can have begun than requests were under way: {report}");
    stage.tiny.push(victim);
    stage.assert_at_rest().await;
    let retried = stage.proxy.metrics().await.sum("plimsoll_retries_total", &[("upstream", "tiny")]);
    assert!(retried >= 1.0, "the engine was killed, yet nothing was retried: {report}");
    let since_restart = stage.tiny[2].metrics().await.sum("llamacpp:tokens_predicted_total", &[]);
    assert!(since_restart > 0.0, "the restarted engine got no request");
}

#[tokio::test]
async fn aiperf_loses_no_request() {
    let Some(stage) = Stage::set().await else { return };
    let installed = installed_to().display().to_string();
    let report = stage.run("aiperf_load.py", &[&stage.base_url(), &installed], |_| ()).await;
    assert_eq!(count(&report, "ok"), 400, "{report}");
    stage.assert_at_rest().await;
}

/// Four engines and the balancer before them; one test has it at a time, for two cores carry no more.
struct Stage {
    tiny: Vec<Engine>,
    slow: Engine,
    proxy: Proxy,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    /// Starts it all, or says loudly why this machine cannot.
    async fn set() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let alone = ALONE.lock().await;
        if let Err(reason) = setup() {
            let in_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
            assert!(!in_ci, "the real engines cannot be installed, and in CI they must be:\n{reason}");
            // Not by eprintln!, which cargo test keeps to itself when a test passes.
            let notice =
                format!("SKIPPED, NOTHING WAS TESTED: the real engines cannot be installed:\n{reason}\n");
            std::io::stderr().write_all(notice.as_bytes()).expect("stderr");
            return None;
        }
        let tiny: Vec<Engine> = (0..3).map(|_| Engine::start("tiny")).collect();
        let slow = Engine::start("slow");
        for engine in tiny.iter().chain([&slow]) {
            engine.ready().await;
        }
        // Probes and ejection are hastier than the defaults, so that a restarted engine is back within the test.
        let hasty = "engine: llamacpp, fail_timeout: 1s, probe: { interval: 500ms }";
        let addresses: Vec<String> = tiny.iter().map(Engine::address).collect();
        let upstreams = format!(
            "upstreams:\n  tiny: {{ {hasty}, backends: [{}] }}\n  slow: {{ {hasty}, backends: [{}] }}\n",
            addresses.join(", "),
            slow.address()
        );
        let proxy = Proxy::start(&upstreams).await;
        Some(Self { tiny, slow, proxy, _alone: alone })
    }

    /// Where a client of the OpenAI API is pointed to.
    fn base_url(&self) -> String {
        format!("http://{}/v1", self.proxy.address(Line::Http1))
    }

    /// Runs one client program to its end, passing on each line it prints; its last line is its report.
    async fn run(&self, program: &str, arguments: &[&str], mut on_line: impl FnMut(&str)) -> Value {
        let mut child = tokio::process::Command::new(installed_to().join("venv/bin/python"))
            .arg(scripts().join(program))
            .args(arguments)
            .env("NO_PROXY", "127.0.0.1")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("setup.sh installed it");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut last = String::new();
        let read = async {
            while let Some(line) = lines.next_line().await.expect("text") {
                eprintln!("{program}: {line}");
                on_line(&line);
                last = line;
            }
            child.wait().await.expect("our own child")
        };
        let status = tokio::time::timeout(PROGRAM, read).await;
        let status = status.unwrap_or_else(|_| panic!("{program} has not ended within {PROGRAM:?}"));
        serde_json::from_str(&last).unwrap_or_else(|_| panic!("{program} ended without a report: {status}"))
    }

    /// Waits until the balancer has settled every charge and the engines work on nothing.
    async fn assert_at_rest(&self) {
        self.proxy.assert_at_rest().await;
        for engine in self.tiny.iter().chain([&self.slow]) {
            engine.assert_at_rest().await;
        }
    }
}

/// One llama.cpp server; it dies with this value.
struct Engine {
    model: &'static str,
    port: Port,
    log: PathBuf,
    child: Child,
}

impl Engine {
    /// Starts a server of `model` on a port of its own, not waiting for it.
    fn start(model: &'static str) -> Self {
        let port = Port::take();
        let log = folder().join("log");
        let child = Self::process(model, &port, &log);
        Self { model, port, log, child }
    }

    /// Starts it again on the same port.
    fn spawn(&mut self) {
        self.child = Self::process(self.model, &self.port, &self.log);
    }

    /// Ends it as `kill -9` does.
    fn kill(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }

    fn process(model: &str, port: &Port, log: &Path) -> Child {
        Command::new(installed_to().join("venv/bin/python"))
            .arg(scripts().join("server.py"))
            .arg(installed_to().join(format!("{model}.gguf")))
            .args([&port.address().port().to_string(), model])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log).expect("a writable folder"))
            .spawn()
            .expect("setup.sh installed it")
    }

    /// `host:port`, as the configuration and the `x-plimsoll-backend` header spell it.
    fn address(&self) -> String {
        self.port.address().to_string()
    }

    /// Waits until it has loaded its model: before, it refuses, and then answers 503.
    async fn ready(&self) {
        wait_until(&format!("the engine {} to be ready", self.address()), async || {
            let listens = TcpStream::connect(self.port.address()).await.is_ok();
            listens && self.get("/health").await.status == 200
        })
        .await;
    }

    async fn get(&self, path: &str) -> Answer {
        Client::connect(self.port.address(), Line::Http1).await.ask(&Request::get(path)).await
    }

    /// Waits until it works on nothing. It looks for clients that left only after a second without any result for
    /// anybody, and a scrape is a result: asked more often, it would go on for a client that is gone.
    async fn assert_at_rest(&self) {
        let gauges = ["llamacpp:requests_processing", "llamacpp:requests_deferred"];
        for _ in 0..6 {
            let metrics = self.metrics().await;
            assert!(
                gauges.iter().all(|gauge| metrics.has(gauge, &[])),
                "no gauges in the metrics of llama.cpp"
            );
            if gauges.iter().all(|gauge| metrics.sum(gauge, &[]) == 0.0) {
                return;
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        panic!("the engine {} still works for a client that is gone", self.address());
    }

    async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.get("/metrics").await.text())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("last lines of the engine {}, the newest first:\n{}", self.address(), end.join("\n"));
        }
        let _left_behind = self.log.parent().map(std::fs::remove_dir_all);
    }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/engines")
}

fn installed_to() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/engines")
}

/// Installs engines and clients, once in a process; the error is what setup.sh printed.
fn setup() -> Result<(), &'static str> {
    static OUTCOME: OnceLock<Result<(), String>> = OnceLock::new();
    let outcome = OUTCOME.get_or_init(|| {
        let output = Command::new("bash").arg(scripts().join("setup.sh")).arg(installed_to()).output();
        let output = output.map_err(|error| format!("bash: {error}"))?;
        let printed = [output.stdout, output.stderr].concat();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&printed).into_owned()) }
    });
    outcome.as_ref().copied().map_err(String::as_str)
}

/// The whole number under `key`; 0 where there is none.
fn count(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_default()
}
