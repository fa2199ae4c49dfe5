//! The process before us, seen from its successor: whose sockets we take over, and whose load we know of while it ends.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::handover::{self, Line, Message};
use super::reload::Generation;
use super::sockets::Socket;
use crate::upstream::Heritage;

/// How long the process that started us may take to tell what it leaves us.
const PATIENCE: Duration = Duration::from_secs(10);

/// The process that started us to take its place.
pub struct Predecessor {
    stream: UnixStream,
    /// Its sockets.
    pub(super) sockets: Vec<Socket>,
    /// What it knows of the upstreams, by name.
    pub(super) heritage: BTreeMap<String, Heritage>,
}

impl Predecessor {
    /// The one at the other end of our standard input.
    ///
    /// # Errors
    /// There is none.
    pub fn at_stdin() -> io::Result<Self> {
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        stream.set_read_timeout(Some(PATIENCE))?;
        let sockets = handover::receive(&stream)?;
        let mut line = String::new();
        // It says nothing more until it has heard of us: nothing of a later message is lost with the reader.
        BufReader::new(&stream).read_line(&mut line)?;
        let Some(Message::Heritage(heritage)) = Message::parse(&line) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "that is no process of ours"));
        };
        Ok(Self { stream, sockets, heritage })
    }

    /// We cannot take its place; it goes on.
    pub fn disappoint(&self, why: &str) {
        // If it is gone, nobody is disappointed.
        let _told = (&self.stream).write_all(Message::Failed(why.to_owned()).line().as_bytes());
    }

    /// The line to it, and a handle by which its end can be waited for. On a thread of a tokio runtime.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn line(&self) -> io::Result<Line> {
        Line::new(self.stream.try_clone()?)
    }
}

/// Follows what the predecessor at the other end of `line` still has in flight, until it has ended.
pub(super) async fn follow(mut line: Line, generations: watch::Receiver<Arc<Generation>>) {
    let tell = |load: &BTreeMap<String, crate::upstream::Load>| {
        let generation = generations.borrow().clone();
        for upstream in &generation.upstreams {
            upstream.observe_predecessor(load.get(&upstream.name));
        }
    };
    while let Some(message) = line.next().await {
        if let Message::Load(load) = message {
            tell(&load);
        }
    }
    tell(&BTreeMap::new());
    log::info!("predecessor ended");
}
