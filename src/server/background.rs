//! What runs beside the proxy: probes and polls of the present configuration, reloads, and the end of the process.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::notify::notify;
use super::reload::Reloader;
use crate::proxy::InFlight;

/// What the last frames of a finished HTTP/2 answer get to leave the process.
const LAST_FRAMES: Duration = Duration::from_millis(100);

/// Runs it all.
pub(super) struct Background {
    pub(super) reloader: Arc<Reloader>,
    /// Watched for since before there was anything to reload, so that none is lost.
    pub(super) hangup: Mutex<Option<Signal>>,
    pub(super) in_flight: InFlight,
    /// The addresses of the listeners.
    pub(super) listeners: Vec<String>,
}

#[async_trait]
impl BackgroundService for Background {
    async fn start(&self, shutdown: ShutdownWatch) {
        let work = async { futures::join!(self.announce(), self.watch(shutdown.clone()), self.reload()) };
        let mut stop = shutdown.clone();
        tokio::select! {
            _ = work => {}
            // An error means that the server itself is gone, which is the end as well.
            _ = stop.changed() => {}
        }
        self.drain().await;
    }
}

impl Background {
    /// Tells log and systemd that we accept connections.
    async fn announce(&self) {
        let ports: Vec<_> = self.listeners.iter().filter_map(|address| port(address)).collect();
        while listening_ports().is_some_and(|open| !ports.iter().all(|port| open.contains(port))) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        log::info!("ready listeners={} pid={}", self.listeners.join(","), std::process::id());
        notify("READY=1");
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
    /// signal.
    async fn drain(&self) {
        notify("STOPPING=1");
        let drain_timeout = *self.reloader.drain_timeout.lock();
        let terminate = signal(SignalKind::terminate());
        let mut again = terminate.inspect_err(|e| log::error!("SIGTERM cannot be watched error={e}")).ok();
        log::info!("draining in_flight={}", self.in_flight.count());
        tokio::select! {
            () = self.at_rest() => log::info!("drained"),
            () = tokio::time::sleep(drain_timeout) => log::warn!("drain timeout cut={}", self.in_flight.count()),
            () = next(&mut again) => log::warn!("second signal cut={}", self.in_flight.count()),
        }
        log::logger().flush();
        std::process::exit(0);
    }

    /// Resolves when nothing has been in flight for a moment: the last frames of an HTTP/2 answer are still
    /// being written when its request has ended.
    async fn at_rest(&self) {
        loop {
            self.in_flight.none().await;
            tokio::time::sleep(LAST_FRAMES).await;
            if self.in_flight.count() == 0 {
                return;
            }
        }
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

fn port(address: &str) -> Option<u16> {
    address.rsplit_once(':')?.1.parse().ok()
}

/// The TCP ports that somebody listens on, by the kernel's own table: a connection made to find out would be
/// logged as a failed handshake. `None` where there is no such table.
fn listening_ports() -> Option<HashSet<u16>> {
    let mut ports = HashSet::new();
    let mut found = false;
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(table) = File::open(table) else { continue };
        found = true;
        // Listening sockets come first, and a busy machine has very many others.
        let listening = |row: &String| row.split_whitespace().nth(3) == Some("0A");
        for row in BufReader::new(table).lines().map_while(Result::ok).skip(1).take_while(listening) {
            let local = row.split_whitespace().nth(1).and_then(|local| local.rsplit_once(':'));
            ports.extend(local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok()));
        }
    }
    found.then_some(ports)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listening_port_is_seen_without_connecting_to_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listening_ports().unwrap().contains(&port));
        drop(listener);
        assert!(!listening_ports().unwrap().contains(&port));
    }
}
