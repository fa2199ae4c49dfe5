//! The real binary, started with a configuration of its own on ports of its own, and killed with the test.

use super::client::{Answer, Client, Line, Request};
use super::metrics::Metrics;
use super::port::Port;
use super::{tls, wait_until};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::net::TcpStream;

/// The binary under test: the one cargo built, or what PLIMSOLL_BIN names (a release build, say).
pub fn binary() -> PathBuf {
    std::env::var_os("PLIMSOLL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_plimsoll").into(), PathBuf::from)
}

/// One of `examples/`, which cargo builds beside the binary of a whole `cargo test`.
pub fn example(name: &str) -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_plimsoll")).with_file_name("examples").join(name);
    let path = beside.with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.exists(), "{} is missing: build it with `cargo build --examples`", path.display());
    path
}

/// A new empty folder below cargo's folder for the files of tests.
pub fn folder() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("wires-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("cargo's folder for tests is writable");
    folder
}

/// Further keys of a configuration in flow style (`proxy_protocol: true`), or nothing.
#[derive(Clone, Copy, Default)]
pub struct Keys<'a> {
    /// Of each listener.
    pub listener: &'a str,
    /// Of the `tls` of the listener that has it.
    pub tls: &'a str,
    /// Of `admin`; its own `address` takes the place of ours.
    pub admin: &'a str,
}

/// A running proxy with a plaintext, an h2c and a TLS listener and an admin listener.
pub struct Proxy {
    child: Child,
    folder: PathBuf,
    listeners: String,
    plain: Port,
    h2c: Port,
    tls: Port,
    admin: Port,
}

impl Proxy {
    /// Starts a proxy whose configuration is the listeners followed by `rest`, and waits until it is ready.
    pub async fn start(rest: &str) -> Self {
        Self::start_keyed(Keys::default(), rest).await
    }

    /// The same with further keys for each of its listeners (`proxy_protocol: true`).
    pub async fn start_with(listener: &str, rest: &str) -> Self {
        Self::start_keyed(Keys { listener, ..Keys::default() }, rest).await
    }

    /// The same with further keys for its own sections.
    pub async fn start_keyed(keys: Keys<'_>, rest: &str) -> Self {
        Self::start_as(&binary(), keys, rest).await
    }

    /// The same, run by another binary on our library.
    pub async fn start_binary(binary: &Path, rest: &str) -> Self {
        Self::start_as(binary, Keys::default(), rest).await
    }

    async fn start_as(binary: &Path, keys: Keys<'_>, rest: &str) -> Self {
        let mut proxy = Self::spawn_as(binary, keys, rest, &[]);
        proxy.listens().await;
        wait_until("the proxy to be ready", async || {
            proxy.admin(&Request::get("/readyz")).await.status == 200 && !proxy.processes().is_empty()
        })
        .await;
        proxy
    }

    /// Waits until every listener accepts connections, ready or not.
    pub async fn listens(&mut self) {
        for port in [self.plain.address(), self.h2c.address(), self.tls.address(), self.admin.address()] {
            wait_until("the proxy to listen", async || {
                self.assert_alive();
                TcpStream::connect(port).await.is_ok()
            })
            .await;
        }
    }

    /// Starts a proxy with further environment variables, not waiting for anything.
    pub fn spawn(rest: &str, environment: &[(&str, &str)]) -> Self {
        Self::spawn_keyed(Keys::default(), rest, environment)
    }

    /// The same with further keys for its own sections.
    pub fn spawn_keyed(keys: Keys<'_>, rest: &str, environment: &[(&str, &str)]) -> Self {
        Self::spawn_as(&binary(), keys, rest, environment)
    }

    fn spawn_as(binary: &Path, keys: Keys<'_>, rest: &str, environment: &[(&str, &str)]) -> Self {
        let folder = folder();
        tls::write_pem(&folder);
        let (plain, h2c, tls, admin) = (Port::take(), Port::take(), Port::take(), Port::take());
        let Keys { listener, tls: of_tls, admin: of_admin } = keys;
        let of_admin = match admin.address() {
            _ if of_admin.contains("address:") => of_admin.to_owned(),
            own => format!("address: {own}, {of_admin}"),
        };
        let listeners = format!(
            "listeners:\n  - {{ address: {}, {listener} }}\n  - {{ address: {}, http2: true, {listener} }}\n  - {{ \
             address: {}, tls: {{ certificate: cert.pem, key: key.pem, {of_tls} }}, {listener} }}\nadmin: {{ \
             {of_admin} }}\n",
            plain.address(),
            h2c.address(),
            tls.address(),
        );
        let file = folder.join("plimsoll.yaml");
        std::fs::write(&file, listeners.clone() + rest).expect("a writable folder");
        let child = Command::new(binary)
            .args(["run", "--config"])
            .arg(&file)
            .env("RUST_LOG", "info,plimsoll=debug")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("stderr")).expect("a writable folder"))
            .spawn()
            .expect("the binary starts");
        Self { child, folder, listeners, plain, h2c, tls, admin }
    }

    /// Writes another configuration with the same listeners, and has it read; what the admin listener says of it.
    pub async fn reload(&self, rest: &str) -> Answer {
        self.rewrite(rest);
        self.admin(&Request::post("/reload", "")).await
    }

    /// Writes another configuration with the same listeners.
    pub fn rewrite(&self, rest: &str) {
        std::fs::write(self.file(), self.listeners.clone() + rest).expect("a writable folder");
    }

    /// Its configuration.
    pub fn file(&self) -> PathBuf {
        self.folder.join("plimsoll.yaml")
    }

    /// Where it listens for that kind of client.
    pub fn address(&self, line: Line) -> SocketAddr {
        match line {
            Line::Http1 => self.plain.address(),
            Line::Http2 => self.h2c.address(),
            Line::Http1Tls | Line::Http2Tls => self.tls.address(),
        }
    }

    /// A new connection to it.
    pub async fn client(&self, line: Line) -> Client {
        Client::connect(self.address(line), line).await
    }

    /// The answer to one request on a new plaintext HTTP/1.1 connection.
    pub async fn ask(&self, request: &Request) -> Answer {
        self.client(Line::Http1).await.ask(request).await
    }

    /// Where its admin listener is.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address()
    }

    /// The answer of the admin listener.
    pub async fn admin(&self, request: &Request) -> Answer {
        let address = self.admin.address();
        let named = request.headers().iter().any(|(name, _)| name == "host");
        let request =
            if named { request.clone() } else { request.clone().with("host", &address.to_string()) };
        Client::connect(address, Line::Http1).await.ask(&request).await
    }

    /// What `GET /metrics` says now.
    pub async fn metrics(&self) -> Metrics {
        let answer = self.admin(&Request::get("/metrics")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        Metrics::parse(&answer.text())
    }

    /// Waits until the samples of that name with those labels add up to `value`: a request is settled after
    /// its answer.
    pub async fn counts(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        let mut last = f64::NAN;
        wait_until(&format!("{name}{labels:?} == {value}"), async || {
            let now = self.metrics().await.sum(name, labels);
            if now != last {
                eprintln!("{name}{labels:?} is {now}, wanted {value}");
            }
            last = now;
            now == value
        })
        .await;
    }

    /// Waits until nothing is charged to any backend and no body is held.
    pub async fn assert_at_rest(&self) {
        let metrics = self.metrics().await;
        for gauge in ["plimsoll_pending_tokens", "plimsoll_active_requests", "plimsoll_context_tokens"] {
            assert!(metrics.has(gauge, &[]), "no {gauge} in the metrics");
            self.counts(gauge, &[], 0.0).await;
        }
        assert!(
            metrics.has("plimsoll_buffered_body_bytes", &[]),
            "no plimsoll_buffered_body_bytes in the metrics"
        );
        self.counts("plimsoll_buffered_body_bytes", &[], 0.0).await;
    }

    /// What it has written to stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("stderr")).unwrap_or_default()
    }

    /// Sends it a signal by its name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        signal(name, self.child.id());
    }

    /// The processes that have served under this configuration, each the successor of the one before.
    pub fn processes(&self) -> Vec<u32> {
        let log = self.log();
        let ready = log.lines().filter(|line| line.contains(" ready listeners="));
        ready.filter_map(|line| line.rsplit_once("pid=")?.1.trim().parse().ok()).collect()
    }

    /// Replaces the process by a successor, and returns when that serves; its process id.
    pub async fn upgrade(&self) -> u32 {
        let before = self.processes();
        signal("USR2", *before.last().expect("a process that serves"));
        wait_until("the successor to serve", async || self.processes().len() > before.len()).await;
        // Up to then both accept.
        let left = || self.log().matches("service 'proxy' exited").count();
        wait_until("the old process to accept no more", async || left() >= before.len()).await;
        *self.processes().last().expect("it serves")
    }

    /// Waits until the process has ended by itself.
    pub async fn exit(&mut self) -> ExitStatus {
        let mut status = None;
        let child = &mut self.child;
        wait_until("the process to end", async || {
            status = child.try_wait().expect("our own child");
            status.is_some()
        })
        .await;
        status.expect("it has ended")
    }

    fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("our own child") {
            panic!("the proxy ended: {status}");
        }
    }
}

/// Sends the process `pid` a signal by its name, such as `TERM`.
pub fn signal(name: &str, pid: u32) {
    let command = format!("kill -{name} {pid}");
    assert!(Command::new("sh").args(["-c", &command]).status().expect("sh").success(), "{command}");
}

/// Whether there is a process `pid`, dead ones that nobody has asked for apart.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let successors = self.processes();
        for pid in successors.into_iter().filter(|pid| *pid != self.child.id() && is_alive(*pid)) {
            signal("KILL", pid);
        }
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stderr of the proxy:\n{}", self.log());
        } else {
            let _left_behind = std::fs::remove_dir_all(&self.folder);
        }
    }
}
