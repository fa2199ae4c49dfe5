//! The signals that end this process: TERM drains, INT ends at once, USR2 hands over to a successor.
//!
//! QUIT, which in Pingora hands over to whoever may be there, ends nothing here. Each is watched for from the first
//! moment on: what nobody watches for would kill the process.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::listening::Gate;
use super::successor::{Successor, Upgrader};
use crate::observe::metrics::Metrics;
use crate::proxy::InFlight;

/// The signals of the process, watched.
pub(super) struct Watched {
    /// Asks for a reload.
    pub(super) hangup: Signal,
    /// The others.
    ending: Ending,
}

struct Ending {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    upgrade: Signal,
}

impl Watched {
    /// Watches from now on. The handlers stay when the runtime goes in which they were installed.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            Ok(Self {
                hangup: signal(SignalKind::hangup())?,
                ending: Ending {
                    terminate: signal(SignalKind::terminate())?,
                    interrupt: signal(SignalKind::interrupt())?,
                    quit: signal(SignalKind::quit())?,
                    upgrade: signal(SignalKind::user_defined2())?,
                },
            })
        })
    }

    /// Those that end this process, and the one that asks for a reload.
    pub(super) fn split(self) -> (Signal, EndingSignals) {
        (self.hangup, EndingSignals(Mutex::new(Some(self.ending))))
    }
}

/// The signals that end this process, for whoever waits for them first.
pub(super) struct EndingSignals(Mutex<Option<Ending>>);

/// Whom to tell what came of an upgrade that was asked for.
pub(super) type Asked = oneshot::Sender<Result<String, String>>;

/// Waits for the end.
pub(super) struct Signals {
    pub(super) signals: EndingSignals,
    /// Upgrades that are asked for otherwise.
    pub(super) asked: Mutex<Option<mpsc::Receiver<Asked>>>,
    pub(super) upgrader: Arc<Upgrader>,
    pub(super) in_flight: InFlight,
    pub(super) gate: Gate,
    pub(super) metrics: Arc<Metrics>,
}

impl Signals {
    /// The next signal that ends this process.
    async fn wait(&self) -> ShutdownSignal {
        let (Some(mut signals), Some(mut asked)) = (self.signals.0.lock().take(), self.asked.lock().take())
        else {
            return std::future::pending().await;
        };
        loop {
            let whom = tokio::select! {
                _ = signals.terminate.recv() => return self.stop(ShutdownSignal::GracefulTerminate),
                _ = signals.interrupt.recv() => return self.stop(ShutdownSignal::FastShutdown),
                _ = signals.quit.recv() => {
                    log::warn!("SIGQUIT refused: SIGUSR2 hands over to a successor, SIGTERM drains and ends");
                    continue;
                }
                _ = signals.upgrade.recv() => None,
                Some(whom) = asked.recv() => Some(whom),
            };
            // Whoever wants the end gets it in the midst of an upgrade, too; the candidate goes with us.
            tokio::select! {
                upgraded = self.upgrade(whom) => if upgraded { return ShutdownSignal::GracefulUpgrade },
                _ = signals.terminate.recv() => return self.stop(ShutdownSignal::GracefulTerminate),
                _ = signals.interrupt.recv() => return self.stop(ShutdownSignal::FastShutdown),
            }
        }
    }

    fn stop(&self, signal: ShutdownSignal) -> ShutdownSignal {
        self.in_flight.stop();
        self.upgrader.let_go();
        signal
    }

    /// Whether a successor serves in our place now.
    async fn upgrade(&self, whom: Option<Asked>) -> bool {
        let upgraded = self.upgrader.upgrade().await;
        let said = match &upgraded {
            Ok(Successor { pid, .. }) => {
                self.in_flight.hand_over();
                // Whoever hears of it and connects meets the successor.
                self.gate.deserted().await;
                let left = self.in_flight.count();
                log::info!("upgraded successor={pid} in_flight={left}");
                Ok(format!("process {pid} serves; {left} requests end in process {}", std::process::id()))
            }
            Err(why) => {
                log::error!("not upgraded, nothing has changed\n{}", why.trim_end());
                Err(why.clone())
            }
        };
        self.metrics.upgraded(upgraded.is_ok());
        if let Some(whom) = whom {
            // Who asked may have gone.
            let _told = whom.send(said);
        }
        let Ok(successor) = upgraded else { return false };
        let upgrader = self.upgrader.clone();
        tokio::spawn(async move { upgrader.share_load(successor).await });
        true
    }
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        self.wait().await
    }
}
