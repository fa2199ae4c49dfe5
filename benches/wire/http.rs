//! HTTP/1.1 as both ends of the bench speak it: a head, then a body by length, in chunks, or until the end.
//!
//! It costs the bench little, because engines and clients share one CPU, and it counts what a measurement of streams
//! needs to know: how many reads there were, and how many chunks.

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};
use memchr::{memchr_iter, memmem};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Room for a read of which nothing is known.
const ROOM: usize = 16 << 10;
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What is left of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Bytes(usize),
    ChunkHead,
    Chunk(usize),
    ChunkEnd,
    UntilClose,
}

/// Everything before a body.
pub struct Head {
    bytes: Bytes,
    /// Whether the connection stays open after the body.
    pub keeps: bool,
}

impl Head {
    /// The first line.
    pub fn first_line(&self) -> &[u8] {
        self.bytes.split(|&byte| byte == b'\r').next().unwrap_or_default()
    }

    /// The status of an answer; 0 if it is none.
    pub fn status(&self) -> u16 {
        let digits = self.bytes.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok());
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }
}

/// A connection, and the message that is being read from it.
pub struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
    left: Left,
    /// Reads that brought something.
    pub reads: u64,
    /// Chunks of bodies.
    pub chunks: u64,
}

impl Connection {
    /// Of a stream on which nothing was read yet.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: BytesMut::new(), left: Left::Nothing, reads: 0, chunks: 0 })
    }

    /// Writes all of it, in as few system calls as there can be.
    pub async fn write(&mut self, mut bytes: impl bytes::Buf) -> io::Result<()> {
        self.stream.write_all_buf(&mut bytes).await
    }

    /// The head of the next message, of an answer if `is_answer`; nothing if the other side has closed.
    pub async fn head(&mut self, is_answer: bool) -> io::Result<Option<Head>> {
        let end = loop {
            if let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(broken("a head without an end"));
            }
            if !self.read(ROOM).await? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        };
        let bytes = self.buffer.split_to(end).freeze();
        let mut head = Head { bytes, keeps: true };
        self.left = if is_answer { Left::UntilClose } else { Left::Nothing };
        let mut start = 0;
        for line_end in memchr_iter(b'\n', &head.bytes) {
            let line = &head.bytes[start..line_end];
            start = line_end + 1;
            let Some(colon) = memchr::memchr(b':', line) else { continue };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"content-length") {
                let length = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
                self.left = Left::Bytes(length.ok_or_else(|| broken("not a content length"))?);
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                self.left = Left::ChunkHead;
            } else if name.eq_ignore_ascii_case(b"connection") {
                head.keeps = !value.eq_ignore_ascii_case(b"close");
            }
        }
        head.keeps &= self.left != Left::UntilClose;
        Ok(Some(head))
    }

    /// The whole body.
    pub async fn whole(&mut self) -> io::Result<Bytes> {
        if let Left::Bytes(length) = self.left {
            while self.buffer.len() < length {
                if !self.read(length - self.buffer.len()).await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            self.left = Left::Nothing;
            return Ok(self.buffer.split_to(length).freeze());
        }
        let mut whole = BytesMut::new();
        while let Some(part) = self.part().await? {
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    /// The next bytes of the body, never of two chunks; nothing at its end.
    pub async fn part(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.left {
                Left::Nothing | Left::Bytes(0) => return Ok(None),
                Left::ChunkEnd => {
                    let line = self.line().await?;
                    self.left =
                        if line == 0 { Left::ChunkHead } else { return Err(broken("no end of a chunk")) };
                }
                Left::ChunkHead => self.chunk_head().await?,
                Left::UntilClose => {
                    let is_there = !self.buffer.is_empty() || self.read(ROOM).await?;
                    return Ok(is_there.then(|| self.buffer.split().freeze()));
                }
                Left::Bytes(left) | Left::Chunk(left) => {
                    if self.buffer.is_empty() && !self.read(left.max(ROOM)).await? {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let taken = left.min(self.buffer.len());
                    self.left = match self.left {
                        Left::Chunk(_) if taken == left => Left::ChunkEnd,
                        Left::Chunk(_) => Left::Chunk(left - taken),
                        _ => Left::Bytes(left - taken),
                    };
                    return Ok(Some(self.buffer.split_to(taken).freeze()));
                }
            }
        }
    }

    /// Waits until the other side closes; what it still sends is dropped.
    pub async fn closed(&mut self) {
        while matches!(self.read(ROOM).await, Ok(true)) {
            self.buffer.clear();
        }
    }

    /// The size of a chunk; after the last, what follows it.
    async fn chunk_head(&mut self) -> io::Result<()> {
        let length = self.line_end().await?;
        let digits = self.buffer[..length].split(|byte| !byte.is_ascii_hexdigit()).next().unwrap_or_default();
        let size = std::str::from_utf8(digits).ok().and_then(|digits| usize::from_str_radix(digits, 16).ok());
        let size = size.ok_or_else(|| broken("not the size of a chunk"))?;
        self.buffer.advance(length + 2);
        if size > 0 {
            self.chunks += 1;
            self.left = Left::Chunk(size);
            return Ok(());
        }
        while self.line().await? > 0 {}
        self.left = Left::Nothing;
        Ok(())
    }

    /// Takes a line; its length.
    async fn line(&mut self) -> io::Result<usize> {
        let length = self.line_end().await?;
        self.buffer.advance(length + 2);
        Ok(length)
    }

    /// The length of the next line, which is in the buffer then.
    async fn line_end(&mut self) -> io::Result<usize> {
        loop {
            if let Some(end) = memmem::find(&self.buffer, b"\r\n") {
                return Ok(end);
            }
            if !self.read(ROOM).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Reads what there is, up to `room` and more if there is room; whether there was something.
    async fn read(&mut self, room: usize) -> io::Result<bool> {
        self.buffer.reserve(room);
        let read = self.stream.read_buf(&mut self.buffer).await?;
        self.reads += u64::from(read > 0);
        Ok(read > 0)
    }
}

/// An answer that is none.
pub fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
