//! What a process and its successor say to each other, over a socket pair that is the successor's standard input.
//!
//! ```text
//! old:  starts the new one, passes the sockets, and Heritage
//! new:  reads its configuration, gets everything ready       Ready       or Failed, or it ends: nothing has changed
//! old:  Go
//! new:  accepts                                              Serving
//! old:  tells systemd, Yours; accepts no more, drains
//! old:  Load, Load, Load ...                                 until it ends
//! ```
//!
//! Up to `Serving` the old process goes on as if there were no other. One line of JSON per message; what one of them
//! does not know, because it is older, it passes over.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use super::sockets::Socket;
use crate::upstream::{Heritage, Load};

/// More descriptors the kernel does not pass at once (`SCM_MAX_FD`).
const MOST_SOCKETS: usize = 253;

/// What goes over the line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// What is known of the upstreams, by name.
    Heritage(BTreeMap<String, Heritage>),
    /// Everything but accepting works.
    Ready,
    /// Why it does not.
    Failed(String),
    /// Accept.
    Go,
    /// Connections are accepted.
    Serving,
    /// The service is the successor's from here on.
    Yours,
    /// What the old process still has in flight, by upstream.
    Load(BTreeMap<String, Load>),
}

impl Message {
    pub(super) fn line(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_else(|e| {
            log::error!("a message to another process cannot be written error={e}");
            String::new()
        });
        json + "\n"
    }

    pub(super) fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// The line between both.
pub(super) struct Line {
    stream: BufReader<tokio::net::UnixStream>,
    text: String,
}

impl Line {
    /// Over `stream`, on a thread of a tokio runtime.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: BufReader::new(tokio::net::UnixStream::from_std(stream)?), text: String::new() })
    }

    pub(super) async fn send(&mut self, message: &Message) -> io::Result<()> {
        self.stream.write_all(message.line().as_bytes()).await
    }

    /// The next message; `None` if the other process is gone.
    pub(super) async fn next(&mut self) -> Option<Message> {
        loop {
            self.text.clear();
            if !matches!(self.stream.read_line(&mut self.text).await, Ok(1..)) {
                return None;
            }
            if let Some(message) = Message::parse(&self.text) {
                return Some(message);
            }
        }
    }
}

/// Passes `sockets` on.
pub(super) fn pass(stream: &UnixStream, sockets: &[Socket]) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if descriptors.len() > MOST_SOCKETS || !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other(format!("{} sockets, at most {MOST_SOCKETS}", descriptors.len())));
    }
    // Descriptors travel with at least one byte.
    sendmsg(stream, &[IoSlice::new(b"\n")], &mut control, SendFlags::empty())?;
    Ok(())
}

/// The sockets that [`pass`] has passed at the other end.
pub(super) fn receive(stream: &UnixStream) -> io::Result<Vec<Socket>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = Vec::new();
    for message in control.drain() {
        let RecvAncillaryMessage::ScmRights(descriptors) = message else { continue };
        sockets.extend(descriptors.map(|descriptor: OwnedFd| Socket::from_descriptor(descriptor)));
    }
    sockets.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_passed_accepts_who_had_connected_before() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (old, new) = UnixStream::pair().unwrap();
        let waiting = std::net::TcpStream::connect(address).unwrap();
        pass(&old, &[Socket::Tcp(listener)]).unwrap();
        let sockets = receive(&new).unwrap();
        let [Socket::Tcp(listener)] = &sockets[..] else { panic!("{sockets:?}") };
        assert_eq!(listener.accept().unwrap().1, waiting.local_addr().unwrap());
    }

    #[test]
    fn what_a_newer_version_says_is_passed_over() {
        assert!(matches!(Message::parse(&Message::Ready.line()), Some(Message::Ready)));
        assert!(matches!(Message::parse(r#"{"heritage":{"u":{"novelty":1}}}"#), Some(Message::Heritage(_))));
        assert!(Message::parse(r#""novelty""#).is_none());
        assert!(Message::parse("").is_none());
    }
}
