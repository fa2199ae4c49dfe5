//! A client's HTTP/1 connection as Pingora sees it: the body of one request, and then nothing until the next.
//!
//! What the client sends ahead (a stray CRLF, or its next request) stays here, so that Pingora neither takes
//! it for a fault of the request under way nor closes the connection for it. While an answer is under way the
//! connection is still read, because that is how one notices that the client has gone.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::SslDigest;
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
    TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::chunks::{Chunks, Malformed};
use super::frames::Frames;
use super::head::Framing;

/// Room made for a head at first.
const HEAD_ROOM: usize = 4 * 1024;

/// How much a client may send ahead of its turn before it is no longer read.
const AHEAD_LIMIT: usize = 16 * 1024;

/// A connection, and how much of it belongs to the present request.
#[derive(Debug)]
pub(super) struct Downstream {
    inner: Stream,
    /// Read from the client, and not taken yet.
    pub(super) ahead: BytesMut,
    body: Body,
}

/// What is left of the body.
#[derive(Debug)]
enum Body {
    Length(u64),
    Chunked(Chunks),
    /// HTTP/2, all of it.
    Frames(Frames),
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
        }
    }
}

impl Downstream {
    pub(super) fn new(inner: Stream) -> Self {
        Self { inner, ahead: BytesMut::new(), body: Body::Length(0) }
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

    /// Whether the body of the last request has been read to its end.
    pub(super) const fn is_between_requests(&self) -> bool {
        self.body.is_over()
    }

    /// What is below, and what was read of it already.
    pub(super) fn into_parts(self) -> (Stream, BytesMut) {
        (self.inner, self.ahead)
    }

    /// Keeps what a client sends before its answer has ended, until it ends itself.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut probe = [0; 512];
        while self.ahead.len() < AHEAD_LIMIT {
            let mut read = ReadBuf::new(&mut probe);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.ahead.extend_from_slice(read.filled());
        }
        // It is read on when this request has ended, so nothing has to wake us.
        Poll::Pending
    }
}

impl AsyncRead for Downstream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.body.is_over() {
            return this.poll_patience(cx);
        }
        let invalid = |_: Malformed| io::Error::from(io::ErrorKind::InvalidData);
        if !this.ahead.is_empty() {
            let length = this.ahead.len().min(buf.remaining());
            let taken = this.body.take(&this.ahead[..length]).map_err(invalid)?;
            buf.put_slice(&this.ahead[..taken]);
            this.ahead.advance(taken);
            return Poll::Ready(Ok(()));
        }
        let room = match this.body {
            Body::Length(left) => buf.remaining().min(usize::try_from(left).unwrap_or(usize::MAX)),
            Body::Chunked(_) | Body::Frames(_) => buf.remaining(),
        };
        let mut read = ReadBuf::new(buf.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
        let bytes = read.filled();
        let taken = this.body.take(bytes).map_err(invalid)?;
        this.ahead.extend_from_slice(&bytes[taken..]);
        buf.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Downstream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[async_trait]
impl Shutdown for Downstream {
    async fn shutdown(&mut self) {
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

// No peeking: nothing of this connection is read twice.
impl Peek for Downstream {}
