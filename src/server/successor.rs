//! The successor: a process that takes our sockets over while we serve, and is proven alive before we let go.
//!
//! It is started from the same path as we were, with the same arguments: another binary if one was installed there
//! meanwhile. A binary that does not start, a configuration with mistakes, a crash before it accepts: it is said, and
//! nothing else has happened. `server/handover.rs` has the conversation.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::handover::{self, Line, Message};
use super::notify::{notify, reloading};
use super::reload::Generation;
use super::sockets::Socket;
use crate::upstream::{Heritage, Load};

/// The option with which a successor is told that it is one.
pub(super) const OPTION: &str = "--successor";

/// How long a successor may take until it serves; names that do not resolve take their time.
const PROOF_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to end when it has hung up.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// How often it is told what we still have in flight.
const LOAD_INTERVAL: Duration = Duration::from_millis(250);

/// What belongs to the process before: the successor has the descriptors from us, and the watchdog is told by pid.
const NOT_INHERITED: [&str; 4] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID"];

/// Starts successors.
pub(super) struct Upgrader {
    /// The configuration file.
    pub(super) file: PathBuf,
    /// Our sockets once more; none when they are a successor's, or nobody's.
    pub(super) sockets: Mutex<Vec<Socket>>,
    pub(super) generations: watch::Receiver<Arc<Generation>>,
}

/// A process that serves in our place.
pub(super) struct Successor {
    line: Line,
    child: Child,
    /// Its process id.
    pub(super) pid: u32,
}

impl Upgrader {
    /// Starts a successor, and returns when it serves, in whose hands everything is then.
    ///
    /// # Errors
    /// Why it does not. Then it has ended, and we go on.
    pub(super) async fn upgrade(&self) -> Result<Successor, String> {
        if std::process::id() == 1 {
            // With the first process of a container all others end.
            return Err("process 1 cannot be replaced: replace the container".to_owned());
        }
        reloading();
        let successor = self.raise().await;
        match &successor {
            Ok(successor) => {
                self.let_go();
                notify(&format!("MAINPID={}", successor.pid));
            }
            Err(_) => notify("READY=1"),
        }
        let mut successor = successor?;
        // If it has gone again by now, it is too late to say so: the service is its own.
        let _told = successor.line.send(&Message::Yours).await;
        Ok(successor)
    }

    /// We listen no more: whoever connects must not wait for us in vain.
    pub(super) fn let_go(&self) {
        self.sockets.lock().clear();
    }

    async fn raise(&self) -> Result<Successor, String> {
        let cannot = |e: std::io::Error| format!("no successor: {e}");
        let (ours, theirs) = UnixStream::pair().map_err(cannot)?;
        // Dropped after the candidate, which would take a broken line for our end, and serve.
        let mut line = None;
        let candidate = Candidate::start(&self.file, theirs).map_err(cannot)?;
        let proof = tokio::time::timeout(PROOF_TIMEOUT, self.prove(ours, &mut line)).await;
        let late = || Err(Unfit::Said(format!("it did not serve within {PROOF_TIMEOUT:?}")));
        match (proof.unwrap_or_else(|_| late()), candidate) {
            (Ok(()), candidate) => match (line, candidate.release()) {
                (Some(line), Some(child)) => Ok(Successor { line, pid: child.id(), child }),
                _ => Err("no successor".to_owned()),
            },
            (Err(why), candidate) => Err(candidate.end(why).await),
        }
    }

    /// Waits until the successor at the other end of `stream`, which becomes `line`, serves.
    async fn prove(&self, stream: UnixStream, line: &mut Option<Line>) -> Result<(), Unfit> {
        let cannot = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Unfit::HungUp,
            _ => Unfit::Said(format!("it cannot be told: {e}")),
        };
        let passed = handover::pass(&stream, &self.sockets.lock());
        let line = line.insert(Line::new(stream).map_err(cannot)?);
        passed.map_err(cannot)?;
        let told = self.generations.borrow().clone();
        line.send(&Message::Heritage(self.heritage())).await.map_err(cannot)?;
        loop {
            match line.next().await.ok_or(Unfit::HungUp)? {
                Message::Ready if !Arc::ptr_eq(&told, &self.generations.borrow()) => {
                    return Err(Unfit::Said("there was a reload meanwhile: ask again".to_owned()));
                }
                Message::Ready => line.send(&Message::Go).await.map_err(cannot)?,
                Message::Serving => return Ok(()),
                Message::Failed(why) => return Err(Unfit::Said(why)),
                _ => {}
            }
        }
    }

    fn heritage(&self) -> BTreeMap<String, Heritage> {
        let generation = self.generations.borrow().clone();
        generation.upstreams.iter().map(|upstream| (upstream.name.clone(), upstream.heritage())).collect()
    }

    /// Tells `successor` what we have in flight, for as long as both of us live. If it dies while we drain, systemd,
    /// whose child it is not, cannot know: we end at once, so that it learns of it and starts another.
    pub(super) async fn share_load(&self, mut successor: Successor) {
        loop {
            match successor.child.try_wait() {
                // It may have handed over itself.
                Ok(Some(status)) if status.success() => return,
                Ok(Some(status)) => {
                    log::error!("the successor died pid={} {status}", successor.pid);
                    if std::env::var_os("NOTIFY_SOCKET").is_some() {
                        log::logger().flush();
                        std::process::exit(1);
                    }
                    return;
                }
                _ => {}
            }
            let generation = self.generations.borrow().clone();
            let load: BTreeMap<String, Load> = generation
                .upstreams
                .iter()
                .map(|upstream| (upstream.name.clone(), upstream.load()))
                .collect();
            // Whether it is gone shows as soon as it has ended.
            let _told = successor.line.send(&Message::Load(load)).await;
            tokio::time::sleep(LOAD_INTERVAL).await;
        }
    }
}

/// Why a successor is not fit to serve.
enum Unfit {
    /// It has told, or we know.
    Said(String),
    /// It is gone, or says nothing any more: how it ends may tell.
    HungUp,
}

/// A process of ours that has not been proven, and ends if it never is.
struct Candidate(Option<Child>);

impl Candidate {
    fn start(file: &std::path::Path, stdin: UnixStream) -> std::io::Result<Self> {
        // The path that we were started by, not the file: that may have been replaced, and should have been.
        let program = std::env::args_os().next().unwrap_or_else(|| OsString::from("plimsoll"));
        let mut command = Command::new(program);
        command.args(["run", "--config"]).arg(file).arg(OPTION).stdin(Stdio::from(OwnedFd::from(stdin)));
        NOT_INHERITED.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.spawn().map(|child| Self(Some(child)))
    }

    /// It is on its own from here on.
    fn release(mut self) -> Option<Child> {
        self.0.take()
    }

    /// It is not wanted; what is to be said of it.
    async fn end(mut self, why: Unfit) -> String {
        if let Unfit::Said(why) = why {
            return format!("the new process is not fit to serve: {why}");
        }
        let deadline = tokio::time::Instant::now() + END_TIMEOUT;
        while let Some(child) = &mut self.0 {
            match child.try_wait() {
                Ok(Some(status)) => {
                    return format!("the new process ended before it served: {status}; its log says why");
                }
                Ok(None) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                _ => break,
            }
        }
        "the new process is not fit to serve: it hung up".to_owned()
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ended = child.kill();
            let _status = child.wait();
        }
    }
}
