//! The proxy under test: how it is started, what it has cost, what it holds, and how it ends.
//!
//! A peer is a script in `peers/` that is told `version`, `start` or `tls`; `start` becomes the proxy, so its process
//! is the child of this one, and what that starts belongs to it. Everything it prints goes to a file.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use plimsoll::clock::Time;
use rustix::process::{Pid, Signal, kill_process};

use super::load::{self, Tally};
use super::prompt::Prompts;

/// The one that is no proxy: clients ask the engines themselves.
pub const DIRECT: &str = "direct";
/// All of them, in the order of the tables.
pub const PEERS: [&str; 12] = [
    DIRECT,
    "nginx",
    "haproxy",
    "envoy",
    "pingora",
    "plimsoll",
    "vllm-router",
    "vllm-router-cache",
    "smg",
    "smg-cache",
    "sglang-router",
    "sglang-router-cache",
];

/// Where every proxy listens.
pub const PLAIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7700);
/// The same, over TLS.
pub const TLS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7701);

/// The CPU of the bench, and that of the proxy.
pub const CPUS: [usize; 2] = [0, 1];
/// Python takes its time.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Below valgrind, everything does.
const END_LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(1);
/// `utime` and `stime` are told in hundredths of a second.
const TICK: u64 = 10_000_000;

/// Where scripts run, and where everything is that a run leaves.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/wire")
}

/// What is tested: `PLIMSOLL_BIN`, or what cargo has built beside this bench.
pub fn plimsoll() -> PathBuf {
    env::var_os("PLIMSOLL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_plimsoll").into(), PathBuf::from)
}

fn script(peer: &str, what: &str) -> io::Result<Command> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/wire/peers").join(format!("{peer}.sh"));
    let mut command = Command::new("sh");
    command.arg(file).arg(what).stdin(Stdio::null()).env_remove("RUST_LOG");
    command.env("PLIMSOLL_BIN", plimsoll()).env("WIRE_BENCH", env::current_exe()?);
    Ok(command)
}

/// What a peer says to `version` or `tls`; nothing if it is not installed, or has none.
pub fn said(peer: &str, what: &str) -> Option<String> {
    if peer == DIRECT {
        return (what == "version").then(|| "no proxy".to_owned());
    }
    let output = script(peer, what).and_then(|mut command| command.stderr(Stdio::null()).output()).ok()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !said.is_empty()).then_some(said)
}

/// A running proxy; killed when dropped.
pub struct Proxy {
    child: Child,
    log: PathBuf,
    /// From its start to its first right answer.
    pub ready_after: Duration,
}

impl Proxy {
    /// Starts a peer, and waits until it answers.
    pub async fn start(peer: &str, with_tls: bool, prompts: &Prompts, tally: &Tally) -> io::Result<Self> {
        let settings: &[_] = if with_tls { &[("WIRE_TLS", "1")] } else { &[] };
        Self::start_with(settings, peer, with_tls, prompts, tally).await
    }

    /// The same below another program, valgrind say.
    pub async fn start_below(
        program: &str,
        peer: &str,
        prompts: &Prompts,
        tally: &Tally,
    ) -> io::Result<Self> {
        Self::start_with(&[("WIRE_BELOW", program)], peer, false, prompts, tally).await
    }

    async fn start_with(
        settings: &[(&str, &str)],
        peer: &str,
        with_tls: bool,
        prompts: &Prompts,
        tally: &Tally,
    ) -> io::Result<Self> {
        let log = folder().join("log").join(format!("{peer}.log"));
        let file = File::create(&log)?;
        // If this process is killed, nobody is left to end the proxy.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "taskset"]);
        let inner = script(peer, "start")?;
        command.args(["--cpu-list", &CPUS[1].to_string()]).arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.envs(settings.iter().copied());
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let started = tally.clock.now();
        let mut proxy = Self { child: command.spawn()?, log, ready_after: Duration::ZERO };
        match proxy.wait(started, with_tls, prompts, tally).await {
            Ok(()) => Ok(proxy),
            Err(error) => {
                let said = fs::read_to_string(&proxy.log).unwrap_or_default();
                let tail = said.lines().rev().take(5).collect::<Vec<_>>();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                Err(io::Error::other(format!("{peer} did not start: {error}\n{tail}")))
            }
        }
    }

    async fn wait(
        &mut self,
        started: Time,
        with_tls: bool,
        prompts: &Prompts,
        tally: &Tally,
    ) -> io::Result<()> {
        loop {
            let asked = match with_tls {
                true => super::tls::once(TLS, prompts, tally).await,
                false => load::once(PLAIN, prompts, tally).await,
            };
            self.ready_after = tally.clock.now().since(started);
            match asked {
                Ok(()) => return Ok(()),
                Err(error) if self.ready_after > START_LIMIT => return Err(error),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(status.to_string()));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Ends it as a user at a terminal would, and waits until it has ended.
    pub async fn interrupt(mut self) -> io::Result<()> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::INT)?;
        }
        for _ in 0..END_LIMIT.as_millis() {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(io::Error::other("it does not end"))
    }

    /// CPU time that it has used.
    pub fn cpu(&self) -> io::Result<Duration> {
        self.processes().into_iter().map(cpu).sum()
    }

    /// Memory of all its processes, in bytes; what they share is shared out among them.
    pub fn memory(&self) -> io::Result<u64> {
        let rollup = |pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
        let pss = |text: String| {
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        self.processes().into_iter().map(|pid| Ok(pss(rollup(pid)?).unwrap_or(0) * 1024)).sum()
    }

    /// Its process, and all that descend from it.
    fn processes(&self) -> BTreeSet<u32> {
        let parents: Vec<(u32, u32)> =
            fs::read_dir("/proc").into_iter().flatten().filter_map(parent).collect();
        let mut family = BTreeSet::from([self.child.id()]);
        loop {
            let more: Vec<u32> =
                parents.iter().filter(|(_, p)| family.contains(p)).map(|(pid, _)| *pid).collect();
            let before = family.len();
            family.extend(more);
            if family.len() == before {
                return family;
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for pid in self.processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}

/// A process and its parent.
fn parent(entry: io::Result<fs::DirEntry>) -> Option<(u32, u32)> {
    let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some((pid, fields(&stat).nth(1)?.parse().ok()?))
}

/// What `/proc/PID/stat` says after the name, which stands in parentheses and may hold anything: the state first.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit(") ").next().unwrap_or_default().split(' ')
}

/// CPU time of a process, from the kernel's own books.
///
/// `schedstat` of each thread is exact, but a thread that has ended takes its account with it. `stat` keeps the sum of
/// all threads there ever were, in hundredths of a second, cut off; it adds children that have ended. So a process has
/// used what its living threads have used, or what `stat` says if that is more, and what its dead children have.
pub fn cpu(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // utime, stime, and both of children that were waited for: the 14th to 17th field, of which the state is the 3rd.
    let ticks: Vec<u64> = fields(&stat).skip(11).take(4).filter_map(|field| field.parse().ok()).collect();
    let [user, system, of_children @ ..] = &ticks[..] else { return Err(io::ErrorKind::InvalidData.into()) };
    let mut living = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while it is looked at.
        let account = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        living += account.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0);
    }
    let ever = (user + system) * TICK;
    Ok(Duration::from_nanos(living.max(ever) + of_children.iter().sum::<u64>() * TICK))
}
