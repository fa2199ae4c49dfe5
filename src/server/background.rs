//! What runs beside the proxy: probes and polls of the present configuration, reloads, and both ends of the process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::handover::Message;
use super::listening::Gate;
use super::notify::{notify, watchdog_timeout};
use super::predecessor::{self, Predecessor};
use super::reload::Reloader;
use crate::observe::Records;
use crate::proxy::InFlight;

/// What the last frames of a finished HTTP/2 answer get to leave the process.
const LAST_FRAMES: Duration = Duration::from_millis(100);

/// How often a drain says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// Runs it all.
pub(super) struct Background {
    pub(super) reloader: Arc<Reloader>,
    /// Watched for since before there was anything to reload, so that none is lost.
    pub(super) hangup: Mutex<Option<Signal>>,
    pub(super) in_flight: InFlight,
    /// Which may not be at their end.
    pub(super) records: Records,
    /// Behind it the services that accept, and how many they are.
    pub(super) gate: Gate,
    pub(super) services: usize,
    /// The addresses of the listeners.
    pub(super) listeners: Vec<String>,
    /// Whose place we take.
    pub(super) predecessor: Mutex<Option<Predecessor>>,
    /// Whether it still drains.
    pub(super) follows: watch::Sender<bool>,
}

#[async_trait]
impl BackgroundService for Background {
    async fn start(&self, shutdown: ShutdownWatch) {
        let mut stop = shutdown.clone();
        let life = async {
            tokio::select! {
                _ = async { futures::join!(self.begin(), self.reload()) } => {}
                // An error means that the server itself is gone, which is the end as well.
                _ = stop.changed() => {}
            }
            self.drain().await;
        };
        // Streams of an engine that goes while we drain have to end, too.
        let (_sender, never) = watch::channel(false);
        futures::join!(life, self.watch(never));
    }
}

impl Background {
    /// Lets the services accept, as soon as the process before us agrees, and tells log and systemd; then follows that
    /// process to its end, and gives signs of life.
    async fn begin(&self) {
        let predecessor = self.predecessor.lock().take();
        let line = predecessor.and_then(|predecessor| {
            let line = predecessor.line();
            line.inspect_err(|e| log::error!("the process before us cannot be heard error={e}")).ok()
        });
        let Some(mut line) = line else {
            self.gate.open(self.services).await;
            return self.announce();
        };
        let _told = line.send(&Message::Ready).await;
        // Should it have gone meanwhile, its place is ours all the same.
        while !matches!(line.next().await, Some(Message::Go) | None) {}
        self.gate.open(self.services).await;
        let _told = line.send(&Message::Serving).await;
        while !matches!(line.next().await, Some(Message::Yours) | None) {}
        if let Err(e) = self.reloader.write_pid() {
            log::error!("{e}");
        }
        self.announce();
        self.follows.send_replace(true);
        let (follows, generations) = (self.follows.clone(), self.reloader.generations.subscribe());
        // Goes on while we drain.
        tokio::spawn(async move {
            predecessor::follow(line, generations).await;
            follows.send_replace(false);
        });
    }

    /// Tells log and systemd that we accept connections, and gives signs of life from then on.
    fn announce(&self) {
        log::info!("ready listeners={} pid={}", self.listeners.join(","), std::process::id());
        notify(&format!("READY=1\nSTATUS=serving on {}", self.listeners.join(", ")));
        // Goes on while we drain.
        tokio::spawn(live(self.gate.clone(), self.in_flight.clone()));
    }

    /// Probes and polls the upstreams, and after each reload those that there are then.
    async fn watch(&self, shutdown: ShutdownWatch) {
        let mut generations = self.reloader.generations.subscribe();
        loop {
            let generation = generations.borrow_and_update().clone();
            let upstreams =
                futures::future::join_all(generation.upstreams.iter().map(|u| u.run(shutdown.clone())));
            let work = async {
                futures::join!(upstreams, generation.probes.run(shutdown.clone()));
                // Nothing to probe or poll is no reason to end.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = work => {}
                changed = generations.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Reloads at each SIGHUP.
    async fn reload(&self) {
        let mut hangup = self.hangup.lock().take();
        loop {
            next(&mut hangup).await;
            let reloader = self.reloader.clone();
            // The outcome has been told; files and names are read where nobody waits for it.
            let _told = tokio::task::spawn_blocking(move || reloader.reload()).await;
        }
    }

    /// Ends the process when the last request has ended, at the latest after `drain_timeout`, or at a second
    /// signal. One that has handed over waits for its connections as well, and no longer speaks for the service; one
    /// that has a predecessor waits for that too, since systemd would end it with us.
    async fn drain(&self) {
        if !self.in_flight.is_handed_over() {
            notify("STOPPING=1\nSTATUS=draining");
        }
        let drain_timeout = *self.reloader.drain_timeout.lock();
        let [mut terminate, mut interrupt] = [SignalKind::terminate(), SignalKind::interrupt()].map(|kind| {
            let watched = signal(kind);
            watched.inspect_err(|e| log::error!("a second signal cannot be watched error={e}")).ok()
        });
        log::info!("draining {}", self.left());
        tokio::select! {
            () = self.at_rest() => log::info!("drained"),
            () = self.report() => {}
            () = tokio::time::sleep(drain_timeout) => log::warn!("drain timeout cut={}", self.in_flight.count()),
            () = next(&mut terminate) => log::warn!("second signal cut={}", self.in_flight.count()),
            () = next(&mut interrupt) => log::warn!("second signal cut={}", self.in_flight.count()),
        }
        let records = self.records.clone();
        let _written = tokio::task::spawn_blocking(move || records.finish()).await;
        log::logger().flush();
        std::process::exit(0);
    }

    /// Resolves when nothing has been in flight for a moment: the last frames of an HTTP/2 answer are still
    /// being written when its request has ended.
    async fn at_rest(&self) {
        loop {
            self.in_flight.none().await;
            let mut follows = self.follows.subscribe();
            // Its sender is ours.
            let _ended = follows.wait_for(|follows| !follows).await.is_ok();
            tokio::time::sleep(LAST_FRAMES).await;
            if self.in_flight.is_none() {
                return;
            }
        }
    }

    /// Says now and then what the drain waits for.
    async fn report(&self) {
        loop {
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            log::info!("still draining {}", self.left());
        }
    }

    fn left(&self) -> String {
        let (requests, connections) = (self.in_flight.count(), self.in_flight.connections());
        let before = if *self.follows.borrow() { " and the process before us" } else { "" };
        format!("in_flight={requests} connections={connections}{before}")
    }
}

/// Gives systemd signs of life, if it wants them: as long as those who serve connections get to run, and until the
/// service is another process's.
async fn live(gate: Gate, in_flight: InFlight) {
    let Some(timeout) = watchdog_timeout() else { return };
    while !in_flight.is_handed_over() {
        for runtime in gate.runtimes() {
            let _it_ran = runtime.spawn(async {}).await;
        }
        notify("WATCHDOG=1");
        tokio::time::sleep(timeout / 3).await;
    }
}

/// The next signal; never, if it cannot be watched.
async fn next(signal: &mut Option<Signal>) {
    let came = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending().await
    }
}
