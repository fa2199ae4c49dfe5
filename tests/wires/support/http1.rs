//! HTTP/1.1 as bytes: just enough of RFC 9112 for both ends of a test, counting every read of the socket.
//!
//! Written by hand on purpose: a library would hide how many reads an answer took and would repair what the
//! proxy got wrong. Anything malformed is an error, never a guess.

use bytes::{Buf, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// A start line and its headers, names in lower case.
#[derive(Clone, Debug)]
pub struct Head {
    /// The request or status line.
    pub start: String,
    /// In their order; names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The head in `bytes`, which end with its empty line.
    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let mut headers = Vec::new();
        for line in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').ok_or_else(|| malformed(line))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Ok(Self { start, headers })
    }

    /// The first header of that (lower case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The status code of a response head; 0 if the start line has none.
    pub fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    /// The method of a request head.
    pub fn method(&self) -> &str {
        self.start.split(' ').next().unwrap_or_default()
    }

    /// The request target of a request head.
    pub fn path(&self) -> &str {
        self.start.split(' ').nth(1).unwrap_or_default()
    }

    /// How the body of a request with this head ends.
    pub fn request_framing(&self) -> io::Result<Framing> {
        Ok(self.framing()?.unwrap_or(Framing::Length(0)))
    }

    /// How the body of a response with this head ends.
    pub fn response_framing(&self) -> io::Result<Framing> {
        if matches!(self.status(), 100..=199 | 204 | 304) {
            return Ok(Framing::Length(0));
        }
        Ok(self.framing()?.unwrap_or(Framing::Close))
    }

    fn framing(&self) -> io::Result<Option<Framing>> {
        let coding = self.header("transfer-encoding");
        let length = self.header("content-length");
        match (coding, length) {
            (Some(_), Some(_)) => Err(malformed("both transfer-encoding and content-length")),
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => Ok(Some(Framing::Chunked)),
            (Some(coding), None) => Err(malformed(coding)),
            (None, Some(length)) => Ok(Some(Framing::Length(length.parse().map_err(|_| malformed(length))?))),
            (None, None) => Ok(None),
        }
    }
}

/// How much of a body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// That many bytes.
    Length(usize),
    /// Chunks up to the empty one.
    Chunked,
    /// Whatever comes before the connection is closed.
    Close,
    /// Nothing: the body is complete.
    Done,
}

/// The reading side of a connection.
pub struct Wire<R> {
    stream: R,
    buffer: BytesMut,
    reads: u64,
}

impl<R: AsyncRead + Unpin> Wire<R> {
    /// Reads from `stream`, which may be a file's bytes as well.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: BytesMut::new(), reads: 0 }
    }

    /// Reads of the socket that returned bytes.
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// The stream itself; what was read and not used is lost.
    pub fn into_inner(self) -> R {
        self.stream
    }

    /// Reads once; false when the peer has closed.
    pub async fn fill(&mut self) -> io::Result<bool> {
        self.buffer.reserve(64 * 1024);
        let count = self.stream.read_buf(&mut self.buffer).await?;
        self.reads += u64::from(count > 0);
        Ok(count > 0)
    }

    /// The next head, or None if the peer closed before the first byte of one.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                return Head::parse(&self.buffer.split_to(end + 4)).map(Some);
            }
            if !self.fill().await? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(cut("inside a head")) };
            }
        }
    }

    /// The next response head that is not an interim (1xx) one.
    pub async fn final_head(&mut self) -> io::Result<Head> {
        loop {
            let head = self.head().await?.ok_or_else(|| cut("instead of a response"))?;
            if head.status() >= 200 {
                return Ok(head);
            }
        }
    }

    /// The next piece of a body: one chunk of a chunked body, one read of any other. None at its proper end.
    pub async fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Bytes>> {
        match framing {
            Framing::Done => Ok(None),
            Framing::Length(0) => {
                *framing = Framing::Done;
                Ok(None)
            }
            Framing::Length(left) => {
                if self.buffer.is_empty() && !self.fill().await? {
                    return Err(cut("inside a body of known length"));
                }
                let count = self.buffer.len().min(*left);
                *left -= count;
                Ok(Some(self.buffer.split_to(count).freeze()))
            }
            Framing::Chunked => {
                let chunk = self.chunk().await?;
                if chunk.is_none() {
                    *framing = Framing::Done;
                }
                Ok(chunk)
            }
            Framing::Close => {
                if self.buffer.is_empty() && !self.fill().await? {
                    *framing = Framing::Done;
                    return Ok(None);
                }
                Ok(Some(self.buffer.split().freeze()))
            }
        }
    }

    /// A whole body.
    pub async fn body(&mut self, mut framing: Framing) -> io::Result<Bytes> {
        let mut whole = BytesMut::new();
        while let Some(piece) = self.piece(&mut framing).await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        let line = self.line().await?;
        let digits = line.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(digits, 16).map_err(|_| malformed(&line))?;
        if size == 0 {
            while !self.line().await?.is_empty() {}
            return Ok(None);
        }
        while self.buffer.len() < size + 2 {
            if !self.fill().await? {
                return Err(cut("inside a chunk"));
            }
        }
        let chunk = self.buffer.split_to(size).freeze();
        if !self.buffer.starts_with(b"\r\n") {
            return Err(malformed("a chunk that is longer than its size"));
        }
        self.buffer.advance(2);
        Ok(Some(chunk))
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n") {
                let line = self.buffer.split_to(end + 2);
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !self.fill().await? {
                return Err(cut("between chunks"));
            }
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed HTTP/1.1: {what}"))
}

fn cut(place: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the peer closed {place}"))
}
