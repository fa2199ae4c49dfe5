//! The real binary with a configuration of the bench, and everything that can be known of it from outside.
//!
//! Its log goes through a pipe and is counted line by line, so that the access log is part of what is measured and
//! a panic cannot hide in it. Memory, descriptors and threads are read from `/proc`, the rest from `/metrics`.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use plimsoll::demo::client;

use super::{say, scrape};

const START_TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(50);
/// Lines of the log that are kept, of those that are no access lines.
const KEPT_LINES: usize = 20;

/// What the log has said so far.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Access lines by the outcome that they tell.
    pub outcomes: BTreeMap<String, u64>,
    /// Lines that speak of a panic.
    pub panics: Vec<String>,
    /// The first of all other lines.
    pub others: Vec<String>,
}

impl Log {
    fn read(&mut self, line: &str) {
        if line.contains("panicked") {
            self.panics.push(line.to_owned());
        }
        let outcome = line.split_once(" outcome=").filter(|_| line.contains("plimsoll::access"));
        if let Some(outcome) = outcome.and_then(|(_, rest)| rest.split(' ').next()) {
            match self.outcomes.get_mut(outcome) {
                Some(count) => *count += 1,
                None => drop(self.outcomes.insert(outcome.to_owned(), 1)),
            }
        } else if self.others.len() < KEPT_LINES {
            self.others.push(line.to_owned());
        }
    }
}

/// What the process holds at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Holding {
    /// Resident memory, in KiB.
    pub rss: u64,
    /// Of that, what is not shared with others, in KiB.
    pub pss: u64,
    /// Open files and sockets.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
}

/// A running balancer; killed when dropped.
pub struct Proxy {
    child: Child,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where its metrics are.
    pub admin: SocketAddr,
    file: PathBuf,
    log: Arc<Mutex<Log>>,
    /// Those that have taken its place.
    successors: Mutex<Vec<u32>>,
}

impl Proxy {
    /// Starts it with these upstreams, as YAML below `upstreams:`, and waits until it answers.
    pub async fn start(folder: &Path, upstreams: &str) -> io::Result<Self> {
        Self::start_from(&binary(), folder, upstreams).await
    }

    /// The same from a binary that is installed at a place of its own.
    pub async fn start_from(program: &Path, folder: &Path, upstreams: &str) -> io::Result<Self> {
        let [address, admin] = free_addresses()?;
        let file = folder.join(format!("{}.yaml", address.port()));
        fs::write(&file, configuration([address, admin], upstreams))?;
        let mut child = Command::new(program)
            .args(["run", "--config"])
            .arg(&file)
            // What the log tells is part of the measurement.
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let log = Arc::new(Mutex::new(Log::default()));
        if let Some(stderr) = child.stderr.take() {
            let log = log.clone();
            std::thread::Builder::new().name("log".to_owned()).spawn(move || read(stderr, &log))?;
        }
        let mut proxy = Self { child, address, admin, file, log, successors: Mutex::default() };
        proxy.wait().await.map_err(|error| {
            let said = proxy.log.lock().others.join("\n");
            io::Error::other(format!("{} did not start: {error}\n{said}", binary().display()))
        })?;
        Ok(proxy)
    }

    async fn wait(&mut self) -> io::Result<()> {
        for _ in 0..START_TRIES {
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(status.to_string()));
            }
            if let Ok(reply) = client::send(self.address, "GET", "/v1/models", "").await
                && reply.status == 200
            {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Writes other upstreams into its configuration.
    pub fn rewrite(&self, upstreams: &str) -> io::Result<()> {
        fs::write(&self.file, configuration([self.address, self.admin], upstreams))
    }

    /// The process `pid` has taken its place, and ends with it.
    pub fn adopt(&self, pid: u32) {
        self.successors.lock().push(pid);
    }

    /// Waits until it has ended by itself.
    pub async fn exit(&mut self) -> io::Result<()> {
        while self.child.try_wait()?.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Its page of metrics.
    pub async fn page(&self) -> io::Result<String> {
        scrape::page(self.admin).await
    }

    /// What it holds now.
    pub fn holding(&self) -> io::Result<Holding> {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let memory = fs::read_to_string(folder.join("smaps_rollup"))?;
        let status = fs::read_to_string(folder.join("status"))?;
        Ok(Holding {
            rss: number(&memory, "Rss:")?,
            pss: number(&memory, "Pss:")?,
            descriptors: fs::read_dir(folder.join("fd"))?.count(),
            threads: number(&status, "Threads:")?,
        })
    }

    /// Seconds of CPU time that it has used.
    pub fn cpu(&self) -> io::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may hold spaces; user and system time are the 14th and 15th field, in ticks of 10 ms.
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
        Ok(fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0)
    }

    /// What its log has said.
    pub fn log(&self) -> Log {
        self.log.lock().clone()
    }

    /// Waits until it owes nobody anything and `is_over`, but not longer than `patience`; what it still owes.
    pub async fn rest(
        &self,
        patience: Duration,
        is_over: impl Fn(&Holding) -> bool,
    ) -> io::Result<Vec<String>> {
        let mut tries = patience.as_millis() / PAUSE.as_millis();
        loop {
            let owed = scrape::owed(&self.page().await?);
            tries = tries.saturating_sub(1);
            if tries == 0 || (owed.is_empty() && is_over(&self.holding()?)) {
                return Ok(owed);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended by itself: an interrupt from the terminal reaches it too.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.successors.lock().iter() {
            let _ = Command::new("kill")
                .args(["-KILL".to_owned(), pid.to_string()])
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn configuration([address, admin]: [SocketAddr; 2], upstreams: &str) -> String {
    format!(
        "listeners:\n  - {{ address: {address}, http2: true }}\nadmin: {{ address: {admin} }}\n\
         observe: {{ access_log: true }}\nupstreams:\n{upstreams}"
    )
}

/// What is tested: `PLIMSOLL_BIN`, or what cargo has built beside this bench.
pub fn binary() -> PathBuf {
    env::var_os("PLIMSOLL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_plimsoll").into(), PathBuf::from)
}

/// Says which binary is tested.
pub fn introduce() -> io::Result<()> {
    let binary = binary();
    let bytes = fs::metadata(&binary)?.len();
    say(&format!("binary: {} ({} MB)", binary.display(), bytes / 1_000_000));
    Ok(())
}

fn read(stderr: ChildStderr, log: &Mutex<Log>) {
    let mut lines = BufReader::with_capacity(1 << 16, stderr);
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(1..)) {
        log.lock().read(line.trim_end());
        line.clear();
    }
}

fn number(text: &str, name: &str) -> io::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("no {name} in /proc")))
}

/// Two addresses on which nobody listens. Somebody may take one before the balancer does; then it says so and exits.
fn free_addresses() -> io::Result<[SocketAddr; 2]> {
    let [one, two] = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([one.local_addr()?, two.local_addr()?])
}
