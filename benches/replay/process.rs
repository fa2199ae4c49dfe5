//! The processes of a run: four engines and a balancer of the same build as this bench, killed when dropped.
//!
//! Each run starts its own, so caches are empty, counters begin at zero, and no policy inherits anything from
//! the one before. What a process has cost is read from `/proc`, because engines, balancer and clients share
//! this machine, and a figure that was taken without an idle core left says nothing.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use plimsoll::demo::client;

use super::{ENGINES, SPEED};

/// What the engines serve.
pub const MODEL: &str = "sim-8b";

/// How long the balancer may take until it serves the model.
const START_TRIES: u32 = 200;
const START_PAUSE: Duration = Duration::from_millis(50);
/// What the kernel counts CPU time in, on every Linux: `USER_HZ`.
const TICK: Duration = Duration::from_millis(10);

/// A child; killed when dropped.
struct Process(Child);

impl Process {
    fn start(arguments: &[&str], log: &Path, stdout: Stdio) -> io::Result<Self> {
        Command::new(env!("CARGO_BIN_EXE_plimsoll"))
            .args(arguments)
            // What the log tells is part of the measurement.
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(log)?)
            .spawn()
            .map(Self)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself: an interrupt from the terminal reaches it too.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Four engines with a balancer in front.
pub struct Stage {
    engines: Vec<Process>,
    balancer: Process,
    /// Where the engines listen.
    pub backends: Vec<SocketAddr>,
    /// Where clients connect.
    pub proxy: SocketAddr,
    /// Where the balancer's metrics are.
    pub admin: SocketAddr,
}

impl Stage {
    /// Starts everything, with files in `folder`, and waits until the balancer serves the model.
    pub async fn start(policy: &str, folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let started = (0..ENGINES).map(|number| engine(number, folder));
        let (engines, backends): (Vec<_>, Vec<_>) =
            started.collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        let [proxy, admin] = free_addresses()?;
        let file = folder.join("plimsoll.yaml");
        fs::write(&file, configuration(policy, &backends, proxy, admin))?;
        let arguments = ["run", "--config", &file.to_string_lossy()];
        let balancer = Process::start(&arguments, &folder.join("log"), Stdio::null())?;
        let mut stage = Self { engines, balancer, backends, proxy, admin };
        stage.wait().await.map_err(|error| {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            io::Error::other(format!("the balancer did not start: {error}\n{log}"))
        })?;
        Ok(stage)
    }

    /// CPU time used so far by the engines, the balancer, this process, and everything on the machine, and
    /// the time that all cores have spent idle.
    pub fn cpu(&self) -> io::Result<Cpu> {
        let engines = self.engines.iter().map(|engine| cpu_of(engine.0.id())).sum::<io::Result<_>>()?;
        let stat = fs::read_to_string("/proc/stat")?;
        let ticks: Vec<u32> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|it| it.parse().ok())
            .collect();
        Ok(Cpu {
            engines,
            balancer: cpu_of(self.balancer.0.id())?,
            clients: cpu_of(std::process::id())?,
            // user nice system idle iowait irq softirq steal; guests are counted in user.
            idle: TICK * ticks.iter().skip(3).take(2).sum(),
            all: TICK * ticks.iter().take(8).sum(),
        })
    }

    async fn wait(&mut self) -> io::Result<()> {
        for _ in 0..START_TRIES {
            if let Some(status) = self.balancer.0.try_wait()? {
                return Err(io::Error::other(status.to_string()));
            }
            if let Ok(reply) = client::send(self.proxy, "GET", "/v1/models", "").await
                && reply.status == 200
                && reply.text().await?.contains(MODEL)
            {
                return Ok(());
            }
            tokio::time::sleep(START_PAUSE).await;
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// CPU time, counted from some moment.
#[derive(Clone, Copy)]
pub struct Cpu {
    /// Of the four engines together.
    pub engines: Duration,
    /// Of the balancer.
    pub balancer: Duration,
    /// Of this process.
    pub clients: Duration,
    /// Nobody's.
    pub idle: Duration,
    /// Of the whole machine, idle or not: as many seconds per second as there are cores.
    pub all: Duration,
}

impl Cpu {
    /// What was used after `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            engines: self.engines.saturating_sub(earlier.engines),
            balancer: self.balancer.saturating_sub(earlier.balancer),
            clients: self.clients.saturating_sub(earlier.clients),
            idle: self.idle.saturating_sub(earlier.idle),
            all: self.all.saturating_sub(earlier.all),
        }
    }
}

fn engine(number: usize, folder: &Path) -> io::Result<(Process, SocketAddr)> {
    let (speed, seed) = (SPEED.to_string(), ((number as u64) << 32).to_string());
    let arguments =
        ["engine", "--listen", "127.0.0.1:0", "--model", MODEL, "--speed", &speed, "--seed", &seed];
    let mut engine = Process::start(&arguments, &folder.join(format!("engine-{number}")), Stdio::piped())?;
    let mut line = String::new();
    if let Some(stdout) = engine.0.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let address = line.trim_end().rsplit(' ').next().and_then(|address| address.parse().ok());
    let address = address.ok_or_else(|| io::Error::other(format!("an engine did not start: {line:?}")))?;
    Ok((engine, address))
}

fn configuration(policy: &str, backends: &[SocketAddr], proxy: SocketAddr, admin: SocketAddr) -> String {
    let backends = backends.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "listeners:\n  - address: {proxy}\n\
         admin: {{ address: {admin} }}\n\
         observe: {{ access_log: true, backend_header: true }}\n\
         upstreams:\n  sim:\n    engine: vllm\n    policy: {policy}\n    backends: [{backends}]\n"
    )
}

/// Two addresses on which nobody listens. Somebody may take one before the balancer does; then it says so and
/// exits.
fn free_addresses() -> io::Result<[SocketAddr; 2]> {
    let [one, two] = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([one.local_addr()?, two.local_addr()?])
}

/// The CPU time of all threads of a process.
fn cpu_of(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the process, in parentheses, may hold spaces. Fields 14 and 15 are user and system time.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Ok(TICK * fields.filter_map(|ticks| ticks.parse::<u32>().ok()).sum())
}
