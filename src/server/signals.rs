//! The signals that end this process: TERM drains, INT ends at once, QUIT hands over to a successor if there is one.
//!
//! Without a successor, Pingora would stop serving on QUIT for nothing; so it is refused then.

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{SignalKind, signal};

use crate::proxy::InFlight;

/// Waits for them.
pub(super) struct Signals {
    /// Where a successor would listen.
    pub(super) upgrade_socket: Option<String>,
    pub(super) in_flight: InFlight,
}

impl Signals {
    /// Whether a process listens on the upgrade socket.
    fn successor_waits(&self) -> bool {
        let Some(path) = &self.upgrade_socket else { return false };
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let is_listening =
            |line: &str| line.ends_with(path.as_str()) && line.split_whitespace().nth(3) == Some("00010000");
        sockets.lines().any(is_listening)
    }

    /// The next signal that ends this process.
    async fn wait(&self) -> ShutdownSignal {
        let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()].map(signal);
        let [Ok(mut term), Ok(mut int), Ok(mut quit)] = signals else {
            log::error!("signals cannot be watched");
            return std::future::pending().await;
        };
        loop {
            tokio::select! {
                _ = term.recv() => return ShutdownSignal::GracefulTerminate,
                _ = int.recv() => return ShutdownSignal::FastShutdown,
                _ = quit.recv() => {
                    if self.successor_waits() {
                        return ShutdownSignal::GracefulUpgrade;
                    }
                    log::warn!("SIGQUIT refused: no successor listens on server.upgrade_socket");
                }
            }
        }
    }
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let signal = self.wait().await;
        self.in_flight.stop();
        signal
    }
}
