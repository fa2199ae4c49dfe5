//! Clients over HTTP/1.1 and HTTP/2 that can leave at any moment, in every way there is.
//!
//! `demo::client` asks once per connection and reads to the end. These keep their connection, stop in the middle of
//! an upload, and then close, reset, half-close, reset only the stream, or say goodbye and close.

use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};

use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// How a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// HTTP/1.1: the socket is closed after what had come was read, so that a FIN goes out.
    Fin,
    /// HTTP/1.1: the connection is reset.
    Reset,
    /// HTTP/1.1: the client says that it will send no more, and keeps the socket.
    HalfClose,
    /// HTTP/2: RST_STREAM with CANCEL; the connection stays.
    StreamReset,
    /// HTTP/2: GOAWAY, then the connection is closed.
    GoAway,
}

impl Way {
    /// Those of HTTP/1.1.
    pub const HTTP1: [Self; 3] = [Self::Fin, Self::Reset, Self::HalfClose];
    /// Those of HTTP/2.
    pub const HTTP2: [Self; 2] = [Self::StreamReset, Self::GoAway];

    /// The word in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fin => "h1 FIN",
            Self::Reset => "h1 RST",
            Self::HalfClose => "h1 half-close",
            Self::StreamReset => "h2 RST_STREAM",
            Self::GoAway => "h2 GOAWAY, close",
        }
    }
}

/// The header of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status, as a number.
    pub status: u16,
    /// The number of the engine, if one has answered.
    pub engine: Option<usize>,
}

/// An answer that was read as far as it came.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its header.
    pub head: Head,
    /// What came of the body.
    pub body: Vec<u8>,
    /// Whether it ended as its framing says.
    pub is_whole: bool,
}

/// A connection, or a lane of one, and the request under way on it.
pub enum Client {
    /// HTTP/1.1.
    One(Http1),
    /// HTTP/2.
    Two(Http2),
}

impl Client {
    /// A connection of its own.
    pub async fn connect(address: SocketAddr, is_http2: bool) -> io::Result<Self> {
        if is_http2 {
            Http2::connect(address).await.map(Self::Two)
        } else {
            Http1::connect(address).await.map(Self::One)
        }
    }

    /// Sends the head of a POST and the first `upto` bytes of `body`.
    pub async fn send(&mut self, body: &Bytes, upto: usize) -> io::Result<()> {
        match self {
            Self::One(client) => client.send(body, upto, "").await,
            Self::Two(client) => client.send(body, upto).await,
        }
    }

    /// The header of the answer.
    pub async fn head(&mut self) -> io::Result<Head> {
        match self {
            Self::One(client) => client.head().await,
            Self::Two(client) => client.head().await,
        }
    }

    /// The next bytes of the body; nothing at its end.
    pub async fn part(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::One(client) => client.part().await,
            Self::Two(client) => client.part().await,
        }
    }

    /// Asks, and reads the answer as far as it comes. An error means that there is not even a header.
    pub async fn ask(&mut self, body: &Bytes) -> io::Result<Reply> {
        self.send(body, body.len()).await?;
        let head = self.head().await?;
        Ok(self.rest(head).await)
    }

    /// The rest of an answer whose header is `head`.
    pub async fn rest(&mut self, head: Head) -> Reply {
        let mut reply = Reply { head, body: Vec::new(), is_whole: false };
        loop {
            match self.part().await {
                Ok(Some(part)) => reply.body.extend_from_slice(&part),
                Ok(None) => reply.is_whole = true,
                Err(_) => return reply,
            }
            if reply.is_whole {
                return reply;
            }
        }
    }

    /// Leaves; what is given back is to be kept until the effect has been seen.
    pub async fn leave(self, way: Way) -> io::Result<Option<Self>> {
        match (self, way) {
            (Self::One(client), Way::Fin) => {
                // Unread bytes would make it a reset.
                let mut unread = [0; 4096];
                while matches!(client.stream.try_read(&mut unread), Ok(1..)) {}
                Ok(None)
            }
            (Self::One(client), Way::Reset) => client.stream.set_zero_linger().map(|()| None),
            (Self::One(mut client), _) => {
                client.stream.shutdown().await?;
                Ok(Some(Self::One(client)))
            }
            (Self::Two(client), Way::GoAway) => {
                client.connection.say_goodbye().map(|()| Some(Self::Two(client)))
            }
            (Self::Two(mut client), _) => {
                if let Some(mut upload) = client.upload.take() {
                    upload.send_reset(Reason::CANCEL);
                }
                client.answer = None;
                Ok(Some(Self::Two(client)))
            }
        }
    }

    /// Whether another request may follow.
    pub fn is_reusable(&self) -> bool {
        match self {
            Self::One(client) => client.keep && client.framing == Framing::Done,
            Self::Two(_) => true,
        }
    }
}

/// Where the body of an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    /// The size of a chunk comes next.
    Size,
    /// Bytes left of a chunk.
    Chunk(usize),
    UntilClose,
    Done,
}

/// A connection that speaks HTTP/1.1.
pub struct Http1 {
    stream: TcpStream,
    buffer: BytesMut,
    framing: Framing,
    keep: bool,
}

impl Http1 {
    async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: BytesMut::new(), framing: Framing::Done, keep: true })
    }

    async fn send(&mut self, body: &Bytes, upto: usize, headers: &str) -> io::Result<()> {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: endure\r\ncontent-type: application/json\r\n{headers}\
             content-length: {}\r\n\r\n",
            body.len()
        );
        self.stream.write_all(&[head.as_bytes(), &body[..upto]].concat()).await
    }

    /// Asks for leave to send `body`, and sends its first `upto` bytes once there is.
    pub async fn send_when_told(&mut self, body: &Bytes, upto: usize) -> io::Result<()> {
        self.send(body, 0, "expect: 100-continue\r\n").await?;
        let line = self.lines().await?;
        if !line.starts_with("HTTP/1.1 100") {
            return Err(io::Error::other(format!("no 100 but {line}")));
        }
        self.stream.write_all(&body[..upto]).await
    }

    /// A head as text.
    async fn lines(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n") {
                return Ok(String::from_utf8_lossy(&self.buffer.split_to(end + 4)).into_owned());
            }
            self.more().await?;
        }
    }

    async fn head(&mut self) -> io::Result<Head> {
        let text = self.lines().await?;
        let mut lines = text.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
        let mut head = Head { status: status.ok_or(io::ErrorKind::InvalidData)?, engine: None };
        self.framing = Framing::UntilClose;
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    self.framing = Framing::Length(value.parse().map_err(|_| io::ErrorKind::InvalidData)?);
                }
                "transfer-encoding" => self.framing = Framing::Size,
                "connection" => self.keep &= !value.eq_ignore_ascii_case("close"),
                "x-engine" => head.engine = value.parse().ok(),
                _ => {}
            }
        }
        Ok(head)
    }

    async fn part(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.framing {
                Framing::Done => return Ok(None),
                Framing::Length(0) => self.framing = Framing::Done,
                Framing::Size => {
                    let Some(end) = memmem::find(&self.buffer, b"\r\n") else {
                        self.more().await?;
                        continue;
                    };
                    let line = self.buffer.split_to(end + 2);
                    let size = std::str::from_utf8(&line[..end]).ok();
                    let size = size.and_then(|size| usize::from_str_radix(size, 16).ok());
                    let size = size.ok_or(io::ErrorKind::InvalidData)?;
                    // With the CRLF behind it.
                    self.framing = if size == 0 { Framing::Done } else { Framing::Chunk(size) };
                    while self.buffer.len() < size + 2 {
                        self.more().await?;
                    }
                    if size == 0 {
                        let _crlf = self.buffer.split_to(2);
                    }
                }
                Framing::Chunk(size) => {
                    let part = self.buffer.split_to(size).freeze();
                    let _crlf = self.buffer.split_to(2);
                    self.framing = Framing::Size;
                    return Ok(Some(part));
                }
                Framing::Length(_) | Framing::UntilClose if self.buffer.is_empty() => {
                    let ended = self.more().await;
                    if self.framing == Framing::UntilClose && ended.is_err() {
                        self.framing = Framing::Done;
                        self.keep = false;
                    } else {
                        ended?;
                    }
                }
                Framing::Length(left) => {
                    let part = self.buffer.split_to(left.min(self.buffer.len())).freeze();
                    self.framing = Framing::Length(left - part.len());
                    return Ok(Some(part));
                }
                Framing::UntilClose => return Ok(Some(self.buffer.split().freeze())),
            }
        }
    }

    async fn more(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// An HTTP/2 connection.
struct Connection {
    /// A second handle of the socket, for the last words.
    socket: std::net::TcpStream,
    driver: tokio::task::JoinHandle<()>,
}

impl Connection {
    /// GOAWAY without an error, and the end in both directions.
    fn say_goodbye(&self) -> io::Result<()> {
        // Length 8, type 7, no flags, stream 0; last stream 0, NO_ERROR.
        let frame = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        io::Write::write_all(&mut &self.socket, &frame)?;
        self.socket.shutdown(Shutdown::Both)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A lane of a connection that speaks HTTP/2: one request at a time, beside those of other lanes.
pub struct Http2 {
    sender: SendRequest<Bytes>,
    connection: std::sync::Arc<Connection>,
    upload: Option<SendStream<Bytes>>,
    response: Option<ResponseFuture>,
    answer: Option<RecvStream>,
}

impl Http2 {
    async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let stream = stream.into_std()?;
        let socket = stream.try_clone()?;
        let stream = TcpStream::from_std(stream)?;
        let (sender, connection) = h2::client::handshake(stream).await.map_err(io::Error::other)?;
        let driver = tokio::spawn(async {
            let _end = connection.await;
        });
        let connection = std::sync::Arc::new(Connection { socket, driver });
        Ok(Self { sender, connection, upload: None, response: None, answer: None })
    }

    /// Another lane of the same connection.
    pub fn lane(&self) -> Self {
        let (sender, connection) = (self.sender.clone(), self.connection.clone());
        Self { sender, connection, upload: None, response: None, answer: None }
    }

    async fn send(&mut self, body: &Bytes, upto: usize) -> io::Result<()> {
        (self.upload, self.response, self.answer) = (None, None, None);
        poll_fn(|cx| self.sender.poll_ready(cx)).await.map_err(io::Error::other)?;
        let head = http::Request::post("http://endure/v1/chat/completions")
            .header("content-type", "application/json")
            .header("content-length", body.len());
        let head = head.body(()).map_err(io::Error::other)?;
        let (response, mut upload) = self.sender.send_request(head, false).map_err(io::Error::other)?;
        self.response = Some(response);
        let mut left = body.slice(..upto);
        while !left.is_empty() {
            upload.reserve_capacity(left.len());
            let Some(Ok(room)) = poll_fn(|cx| upload.poll_capacity(cx)).await else { break };
            let piece = left.split_to(room.min(left.len()));
            let is_last = left.is_empty() && upto == body.len();
            if upload.send_data(piece, is_last).is_err() {
                // Whoever answers early and refuses the rest says why in the answer.
                break;
            }
        }
        self.upload = Some(upload);
        Ok(())
    }

    async fn head(&mut self) -> io::Result<Head> {
        let Some(response) = &mut self.response else { return Err(io::ErrorKind::NotConnected.into()) };
        let response = response.await;
        self.response = None;
        let (parts, body) = response.map_err(io::Error::other)?.into_parts();
        self.answer = Some(body);
        let engine = parts.headers.get("x-engine").and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Head { status: parts.status.as_u16(), engine })
    }

    async fn part(&mut self) -> io::Result<Option<Bytes>> {
        let Some(answer) = &mut self.answer else { return Ok(None) };
        match answer.data().await {
            None => Ok(None),
            Some(Err(error)) => Err(io::Error::other(error)),
            Some(Ok(data)) => {
                answer.flow_control().release_capacity(data.len()).map_err(io::Error::other)?;
                Ok(Some(data))
            }
        }
    }
}
