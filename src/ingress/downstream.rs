//! A client's HTTP/1 connection as Pingora sees it: the body of one request, and then nothing until the next.
//!
//! What the client sends ahead (a stray CRLF, or its next request) stays here, so that Pingora neither takes
//! it for a fault of the request under way nor closes the connection for it. While an answer is under way the
//! connection is still read, because that is how one notices that the client has gone.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::SslDigest;
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
    TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::chunks::{Chunks, Malformed};
use super::frames::Frames;
use super::head::Framing;

/// Room made for a head at first.
const HEAD_ROOM: usize = 4 * 1024;

/// How much a client may send ahead of its turn. What exceeds it is lost, and the connection with it once the
/// answer under way has ended; it has to be read all the same, to notice when the client goes.
const AHEAD_LIMIT: usize = 128 * 1024;

/// What is written waits for the flush, up to so many bytes: a head and its body, or the three parts of a chunk, go out
/// together. Each send costs as much as all else that is done for an event.
const TOGETHER_BYTES: usize = 16 * 1024;

/// Room for what waits that is kept from one flush to the next: enough for an event.
const KEPT_BYTES: usize = 1024;

/// A connection, and how much of it belongs to the present request.
pub(super) struct Downstream {
    inner: Stream,
    /// Written by Pingora, and not sent yet.
    unsent: BytesMut,
    /// Read from the client, and not taken yet.
    pub(super) ahead: BytesMut,
    body: Body,
    /// More came ahead than is kept.
    lost: bool,
    /// How long a write may wait for the client. Pingora limits that of bodies only.
    patience: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

/// Without what the client said: there may be keys and prompts in it.
impl fmt::Debug for Downstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ahead, body) = (self.ahead.len(), &self.body);
        f.debug_struct("Downstream").field("ahead", &ahead).field("body", body).finish_non_exhaustive()
    }
}

/// What is left of the body.
#[derive(Debug)]
enum Body {
    Length(u64),
    Chunked(Chunks),
    /// HTTP/2, all of it.
    Frames(Frames),
    /// Its end cannot be found any more.
    Broken,
}

impl Body {
    const fn is_over(&self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunks::Done))
    }

    /// How many of `bytes` belong to it; they are taken off.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        match self {
            Self::Length(left) => {
                let here = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= here as u64;
                Ok(here)
            }
            Self::Chunked(chunks) => chunks.follow(bytes),
            Self::Frames(frames) => frames.follow(bytes),
            Self::Broken => Err(Malformed),
        }
    }

    /// The same as an operation of the connection; once it has failed it always fails.
    fn cut(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.take(bytes).map_err(|_: Malformed| {
            *self = Self::Broken;
            io::Error::from(io::ErrorKind::InvalidData)
        })
    }
}

impl Downstream {
    /// A connection on which no write may wait longer than `patience`.
    pub(super) fn new(inner: Stream, patience: Duration) -> Self {
        Self {
            inner,
            unsent: BytesMut::new(),
            ahead: BytesMut::new(),
            body: Body::Length(0),
            lost: false,
            patience,
            stalled: None,
        }
    }

    /// Waits for more from the client; zero if it has ended.
    pub(super) async fn read_ahead(&mut self) -> io::Result<usize> {
        self.ahead.reserve(HEAD_ROOM);
        self.inner.read_buf(&mut self.ahead).await
    }

    /// Forgets empty lines before a request, which some clients send after a body (RFC 9112 s.2.2).
    pub(super) fn skip_empty_lines(&mut self) {
        while self.ahead.starts_with(b"\r\n") {
            self.ahead.advance(2);
        }
    }

    /// Takes the next request's head, `length` bytes; what follows it is its body.
    pub(super) fn begin(&mut self, length: usize, framing: Framing) -> BytesMut {
        self.body = match framing {
            Framing::Bodiless => Body::Length(0),
            Framing::Length(length) => Body::Length(length),
            Framing::Chunked => Body::Chunked(Chunks::START),
        };
        self.ahead.split_to(length)
    }

    /// From now on this is an HTTP/2 connection, from its preface on.
    pub(super) fn begin_http2(&mut self, frames: Frames) {
        self.body = Body::Frames(frames);
    }

    /// Whether the body of the last request has been read to its end, and all that came after it kept.
    pub(super) const fn is_between_requests(&self) -> bool {
        self.body.is_over() && !self.lost
    }

    /// What is below.
    pub(super) fn into_inner(self) -> Stream {
        self.inner
    }

    /// Keeps what a client sends before its answer has ended, until it ends itself.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whoever reads now has nothing more to write at the moment.
        if let Poll::Ready(Err(e)) = self.poll_send(cx) {
            return Poll::Ready(Err(e));
        }
        let mut probe = [0; 512];
        loop {
            let mut read = ReadBuf::new(&mut probe);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.ahead.len() < AHEAD_LIMIT {
                self.ahead.extend_from_slice(read.filled());
            } else {
                self.lost = true;
            }
        }
    }

    /// Sends what waits.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(sent);
        }
        if self.unsent.capacity() > KEPT_BYTES {
            self.unsent = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// The outcome of `next`, which comes after what waits.
    fn poll_after<T>(
        &mut self,
        cx: &mut Context<'_>,
        next: impl FnOnce(Pin<&mut Stream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let done = match self.poll_send(cx) {
            Poll::Ready(Ok(())) => next(Pin::new(&mut self.inner), cx),
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => Poll::Pending,
        };
        self.in_time(cx, done)
    }

    /// The outcome of a write, which fails once the client has let it wait too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, write: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if write.is_ready() {
            self.stalled = None;
            return write;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Downstream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.body.is_over() {
            return this.poll_ahead(cx);
        }
        if !this.ahead.is_empty() {
            let length = this.ahead.len().min(buf.remaining());
            let taken = this.body.cut(&this.ahead[..length])?;
            buf.put_slice(&this.ahead[..taken]);
            this.ahead.advance(taken);
            return Poll::Ready(Ok(()));
        }
        // Straight into the caller's buffer, which is not filled with zeros first; the rest is taken back.
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        let taken = this.body.cut(&buf.filled()[before..])?;
        this.ahead.extend_from_slice(&buf.filled()[before + taken..]);
        buf.set_filled(before + taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Downstream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_after(cx, |inner, cx| inner.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_after(cx, |inner, cx| inner.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if self.unsent.len() + length <= TOGETHER_BYTES {
            self.unsent.reserve(length);
            bufs.iter().for_each(|buf| self.unsent.extend_from_slice(buf));
            return Poll::Ready(Ok(length));
        }
        // What is large is not copied.
        self.poll_after(cx, |inner, cx| inner.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[async_trait]
impl Shutdown for Downstream {
    async fn shutdown(&mut self) {
        // Nobody who shuts a connection down waits for a client that takes nothing.
        let _sent = futures::poll!(std::future::poll_fn(|cx| self.poll_send(cx)));
        self.inner.shutdown().await;
    }
}

impl UniqueID for Downstream {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for Downstream {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl GetTimingDigest for Downstream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_timing_digest()
    }
}

impl GetProxyDigest for Downstream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.get_proxy_digest()
    }
}

impl GetSocketDigest for Downstream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }
}

// No peeking: nothing of this connection is read twice. Pingora then takes the connection for what it was told.
impl Peek for Downstream {}
