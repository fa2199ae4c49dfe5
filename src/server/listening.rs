//! Accepting: from our sockets to the application, for as long as we serve.
//!
//! As Pingora's own listening service does it, but over sockets that we have opened, and not before the [`Gate`] opens:
//! a successor accepts nothing until the process before it lets it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::apps::ServerApp;
use pingora::protocols::l4::listener::Listener;
use pingora::protocols::l4::stream::Stream;
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::Service;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::sockets::Socket;
use crate::proxy::InFlight;

/// How long to wait for a descriptor, say, before the next try to accept.
const BREATH: Duration = Duration::from_millis(100);

/// How long those are still accepted who had connected when the process was told to stop.
const LAST_CALL: Duration = Duration::from_millis(20);

/// Longer than it takes to stop accepting.
const LETTING_GO: Duration = Duration::from_secs(1);

/// What the accepting services wait at. Clones share everything.
#[derive(Clone)]
pub(super) struct Gate {
    open: watch::Sender<bool>,
    /// How many accept.
    passed: watch::Sender<usize>,
    /// The runtimes of those who passed.
    runtimes: Arc<Mutex<Vec<Handle>>>,
}

impl Gate {
    /// A closed gate.
    pub(super) fn closed() -> Self {
        Self { open: watch::Sender::new(false), passed: watch::Sender::new(0), runtimes: Arc::default() }
    }

    /// Opens, and returns when `services` accept.
    pub(super) async fn open(&self, services: usize) {
        self.open.send_replace(true);
        let mut passed = self.passed.subscribe();
        // Its sender is ours.
        let _all = passed.wait_for(|passed| *passed >= services).await.is_ok();
    }

    /// The runtimes on which connections are served.
    pub(super) fn runtimes(&self) -> Vec<Handle> {
        self.runtimes.lock().clone()
    }

    /// Waits until it is open; false if that will not be.
    async fn pass(&self, shutdown: &mut ShutdownWatch) -> bool {
        let mut open = self.open.subscribe();
        tokio::select! {
            opened = open.wait_for(|open| *open) => opened.is_ok(),
            _ = shutdown.wait_for(|stopping| *stopping) => false,
        }
    }

    /// Returns when nobody accepts any more, at the latest after [`LETTING_GO`].
    pub(super) async fn deserted(&self) {
        let mut passed = self.passed.subscribe();
        let nobody = passed.wait_for(|passed| *passed == 0);
        if tokio::time::timeout(LETTING_GO, nobody).await.is_err() {
            log::warn!("a listener is slow to let go");
        }
    }

    fn passed(&self) {
        self.runtimes.lock().push(Handle::current());
        self.passed.send_modify(|passed| *passed += 1);
    }

    fn left(&self) {
        self.passed.send_modify(|passed| *passed -= 1);
    }
}

/// A service that gives `app` the connections of these sockets.
pub(super) struct Listening<A> {
    pub(super) name: &'static str,
    pub(super) app: Arc<A>,
    pub(super) sockets: Vec<Socket>,
    /// Threads of its own; `None` is as many as the configuration says.
    pub(super) threads: Option<usize>,
    pub(super) gate: Gate,
    pub(super) in_flight: InFlight,
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> Service for Listening<A> {
    async fn start_service(&mut self, _: Option<ListenFds>, mut shutdown: ShutdownWatch, _: usize) {
        if !self.gate.pass(&mut shutdown).await {
            return;
        }
        let sockets = std::mem::take(&mut self.sockets);
        let listeners: Vec<_> =
            match sockets.into_iter().map(Socket::into_listener).collect::<io::Result<_>>() {
                Ok(listeners) => listeners,
                Err(e) => return log::error!("{} cannot listen error={e}", self.name),
            };
        self.gate.passed();
        let accepting = listeners.into_iter().map(|listener| {
            let (app, in_flight) = (self.app.clone(), self.in_flight.clone());
            accept(listener, app, shutdown.clone(), in_flight)
        });
        futures::future::join_all(accepting.map(tokio::spawn)).await;
        self.gate.left();
        self.app.cleanup().await;
    }

    fn name(&self) -> &str {
        self.name
    }

    fn threads(&self) -> Option<usize> {
        self.threads
    }
}

/// Accepts until the process stops. Those who had connected by then are served.
async fn accept<A: ServerApp + Send + Sync + 'static>(
    listener: Listener,
    app: Arc<A>,
    stop: ShutdownWatch,
    in_flight: InFlight,
) {
    // Whoever is served waits for the end to come: a receiver that has seen it would wait for another one.
    let mut end = stop.clone();
    let handed_over = in_flight.handed_over();
    tokio::pin!(handed_over);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = end.wait_for(|stopping| *stopping) => break,
            () = &mut handed_over => break,
        };
        match accepted {
            Ok(stream) => serve(stream, &app, &stop),
            // Of a client that has gone nobody needs to hear.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) => {
                log::error!("cannot accept error={e}");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
    if in_flight.is_handed_over() {
        // Who waits is for the successor.
        return;
    }
    // The queue of a socket that nobody else has goes with it.
    let last_call = tokio::time::sleep(LAST_CALL);
    tokio::pin!(last_call);
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => match accepted {
                Ok(stream) => serve(stream, &app, &stop),
                Err(_) => return,
            },
            () = &mut last_call => return,
        }
    }
}

fn serve<A: ServerApp + Send + Sync + 'static>(mut stream: Stream, app: &Arc<A>, stop: &ShutdownWatch) {
    // Events of a stream are small, and none waits for the next. A client that has gone again shows that later.
    let _best_effort = stream.set_nodelay();
    let (app, stop) = (app.clone(), stop.clone());
    tokio::spawn(async move {
        let mut next: Option<pingora::protocols::Stream> = Some(Box::new(stream));
        while let Some(stream) = next {
            next = app.process_new(stream, &stop).await;
        }
    });
}
