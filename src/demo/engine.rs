//! The simulated engine in real time: a [`Replica`] behind a lock, and one task that sleeps until its next
//! step ends.
//!
//! Virtual time is the machine's clock times `speed`. The task may wake late without harm, because the
//! replica completes its steps at their virtual ends, not at the moment of waking. Whoever wants tokens holds
//! a [`Ticket`]; dropping it takes the job out of the batch, so that a client that leaves frees the engine on
//! every path.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pingora_core::server::Fds;
use pingora_core::services::Service as _;
use pingora_core::services::listening::Service;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};

use super::endpoint::Endpoint;
use super::vllm::{Question, Served};
use crate::clock::{Clock, Time};
use crate::sim::hardware::Hardware;
use crate::sim::replica::{Emission, Job, Kind, Refusal, Replica, Stats};

/// Which engine to simulate, and where.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineOptions {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// Name of the model it serves.
    #[arg(long, default_value = "sim-8b")]
    pub model: String,
    /// Model and GPU whose timing it imitates.
    #[arg(long, value_name = "NAME", default_value = Hardware::ALL[0].name, value_parser = hardware)]
    pub hardware: Hardware,
    /// How much faster than the real thing it runs.
    #[arg(long, value_name = "FACTOR", default_value = "1.0", value_parser = speed)]
    pub speed: f64,
    /// Capacity of the KV cache in tokens, if not the usual one of the hardware.
    #[arg(long, value_name = "N")]
    pub kv_tokens: Option<u64>,
    /// Seed of the ids it gives to answers, which choose their words.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Serves one simulated engine until SIGINT or SIGTERM, after printing `engine listening on ADDRESS`.
///
/// # Errors
/// If it cannot listen on the address.
pub fn run_engine(options: EngineOptions) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen)?;
    let address = listener.local_addr()?;
    let engine = Arc::new(Engine::new(options));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let (_keep, shutdown) = watch::channel(false);
        writeln!(io::stdout(), "engine listening on {address}")?;
        tokio::select! {
            served = serve(engine, listener, shutdown) => served,
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminate.recv() => Ok(()),
        }
    })
}

/// Serves `engine` on `listener` until `shutdown` turns true.
///
/// # Errors
/// If the listener cannot be handed over.
pub async fn serve(
    engine: Arc<Engine>,
    listener: TcpListener,
    shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?.to_string();
    let mut fds = Fds::new();
    fds.add(address.clone(), listener.into_raw_fd());
    let mut service = Service::new(format!("engine {address}"), Endpoint::new(engine.clone()));
    service.add_tcp(&address);
    tokio::select! {
        () = service.start_service(Some(Arc::new(Mutex::new(fds))), shutdown, 1) => Ok(()),
        () = engine.drive() => Ok(()),
    }
}

/// A simulated engine.
#[derive(Debug)]
pub struct Engine {
    options: EngineOptions,
    clock: Clock,
    /// Seconds since 1970.
    started: f64,
    state: Mutex<State>,
    /// Rung when an idle replica got work.
    work: Notify,
}

#[derive(Debug)]
struct State {
    replica: Replica,
    streams: HashMap<u64, mpsc::UnboundedSender<Kind>>,
    /// Emissions on their way; kept for its capacity.
    emissions: Vec<Emission>,
    next_id: u64,
    prompt_tokens: u64,
    aborted: u64,
}

impl Engine {
    /// An idle engine whose time starts now. `options.listen` is not used: see [`serve`].
    pub fn new(mut options: EngineOptions) -> Self {
        options.hardware.kv_tokens = options.kv_tokens.unwrap_or(options.hardware.kv_tokens);
        let clock = Clock::start();
        let state = State {
            replica: Replica::new(options.hardware),
            streams: HashMap::new(),
            emissions: Vec::new(),
            next_id: options.seed,
            prompt_tokens: 0,
            aborted: 0,
        };
        let started = clock.unix_time().as_secs_f64();
        Self { options, clock, started, state: Mutex::new(state), work: Notify::new() }
    }

    /// What it serves, for the dialect.
    pub(super) fn served(&self) -> Served<'_> {
        Served { model: &self.options.model, hardware: &self.options.hardware, started: self.started }
    }

    /// Seconds since 1970.
    pub(super) fn unix_seconds(&self) -> u64 {
        self.clock.unix_time().as_secs()
    }

    /// Puts a question in the queue.
    pub(super) fn submit(self: &Arc<Self>, question: &Question) -> Result<Ticket, Refusal> {
        let (sender, tokens) = mpsc::unbounded_channel();
        let now = self.now();
        let mut state = self.state.lock();
        state.advance(now);
        let id = state.next_id;
        let was_idle = state.replica.next_step().is_none();
        state.replica.submit(
            now,
            Job {
                id,
                prompt_tokens: question.prompt_tokens,
                blocks: question.blocks.clone(),
                output_tokens: question.output_tokens,
            },
        )?;
        state.next_id = id.wrapping_add(1);
        state.prompt_tokens += question.prompt_tokens;
        state.streams.insert(id, sender);
        drop(state);
        if was_idle {
            self.work.notify_one();
        }
        Ok(Ticket { engine: self.clone(), id, tokens })
    }

    /// The page of metrics.
    pub(super) fn metrics(&self) -> String {
        let state = self.state.lock();
        let (stats, prompt_tokens, aborted) = (state.replica.stats(), state.prompt_tokens, state.aborted);
        drop(state);
        self.served().metrics(&stats, prompt_tokens, aborted)
    }

    /// The gauges and counters of the replica.
    pub fn stats(&self) -> Stats {
        self.state.lock().replica.stats()
    }

    /// Forgets every cached prefix that is not in use.
    pub fn reset_prefix_cache(&self) {
        self.state.lock().replica.clear_cache();
    }

    /// Completes steps as they fall due, for ever.
    async fn drive(&self) {
        loop {
            let due = {
                let now = self.now();
                let mut state = self.state.lock();
                state.advance(now);
                state.replica.next_step().map(|end| end.since(now))
            };
            match due {
                Some(wait) => tokio::time::sleep(wait.div_f64(self.options.speed)).await,
                None => self.work.notified().await,
            }
        }
    }

    /// Virtual time.
    fn now(&self) -> Time {
        Time::from_nanos((self.clock.now().as_nanos() as f64 * self.options.speed) as u64)
    }

    fn leave(&self, id: u64) {
        let now = self.now();
        let mut state = self.state.lock();
        state.advance(now);
        state.streams.remove(&id);
        if state.replica.cancel(id) {
            state.aborted += 1;
        }
    }
}

impl State {
    fn advance(&mut self, now: Time) {
        self.replica.advance(now, &mut self.emissions);
        for Emission { id, kind, .. } in self.emissions.drain(..) {
            if kind == Kind::Finished {
                self.streams.remove(&id);
            } else if let Some(stream) = self.streams.get(&id) {
                // A receiver that is gone is about to take its job out.
                let _ = stream.send(kind);
            }
        }
    }
}

/// A place in the engine, held by whoever waits for its tokens.
#[derive(Debug)]
pub(super) struct Ticket {
    engine: Arc<Engine>,
    id: u64,
    tokens: mpsc::UnboundedReceiver<Kind>,
}

impl Ticket {
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The next token; nothing after the last. Can be dropped and called again.
    pub(super) async fn token(&mut self) -> Option<Kind> {
        self.tokens.recv().await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.engine.leave(self.id);
    }
}

/// A row of the table of hardware, from the command line.
pub(crate) fn hardware(name: &str) -> Result<Hardware, String> {
    Hardware::named(name).ok_or_else(|| {
        let names = Hardware::ALL.map(|row| row.name).join(", ");
        format!("no such hardware, known are {names}")
    })
}

fn speed(text: &str) -> Result<f64, String> {
    let usable = |speed: &f64| (1e-3..=1e4).contains(speed);
    text.parse().ok().filter(usable).ok_or_else(|| "not a number from 0.001 to 10000".to_owned())
}

/// Idle connections are closed after this time, as uvicorn does.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(5);
