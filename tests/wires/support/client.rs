//! The client of the wire tests: one request at a time over any of the four ways into a listener.
//!
//! An answer can be read piece by piece as it arrives, with the reads counted, because the flush of each
//! event is a promise of the product: [`Client::piece`] returns what one chunk (HTTP/1.1) or one DATA frame
//! (HTTP/2) carried.

use super::http1::{self, Wire};
use super::http2::Http2;
use super::{tls, within};
use bytes::{Bytes, BytesMut};
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;

/// A way into the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Plain HTTP/1.1.
    Http1,
    /// HTTP/1.1 over TLS, by ALPN.
    Http1Tls,
    /// HTTP/2 without TLS, by prior knowledge.
    Http2,
    /// HTTP/2 over TLS, by ALPN.
    Http2Tls,
}

/// How the length of a request body is made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// By a content-length.
    Declared,
    /// Not at all: chunked in HTTP/1.1, no content-length in HTTP/2.
    Open,
}

/// A request to send.
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
    framing: Framing,
    missing: usize,
}

impl Request {
    /// A GET without a body.
    pub fn get(path: &str) -> Self {
        Self { framing: Framing::Open, ..Self::post(path, "") }.method_of("GET")
    }

    /// A PUT without a body.
    pub fn put(path: &str) -> Self {
        Self::post(path, "").method_of("PUT")
    }

    /// A POST of declared length.
    pub fn post(path: &str, body: impl Into<Bytes>) -> Self {
        Self {
            method: "POST".into(),
            path: path.into(),
            headers: Vec::new(),
            body: body.into(),
            framing: Framing::Declared,
            missing: 0,
        }
    }

    /// A chat completion that asks `prompt` of `model`, not streamed.
    pub fn chat(model: &str, prompt: &str) -> Self {
        Self::json(
            &serde_json::json!({ "model": model, "messages": [{ "role": "user", "content": prompt }] }),
        )
    }

    /// A streamed chat completion.
    pub fn streamed(model: &str, prompt: &str) -> Self {
        let messages = serde_json::json!([{ "role": "user", "content": prompt }]);
        Self::json(&serde_json::json!({ "model": model, "messages": messages, "stream": true }))
    }

    /// A chat completion with this body.
    pub fn json(body: &serde_json::Value) -> Self {
        Self::post("/v1/chat/completions", body.to_string()).with("content-type", "application/json")
    }

    /// The same with one more header.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with its length declared or open.
    pub fn framed(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// Declares `count` bytes more than are sent: the body never comes to its end.
    pub fn missing_bytes(mut self, count: usize) -> Self {
        self.missing = count;
        self
    }

    /// Its method.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Its path and query.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its headers, without those that frame the body.
    pub fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// What is sent of its body.
    pub fn body(&self) -> Bytes {
        self.body.clone()
    }

    /// How the length of its body is made known.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// How many bytes of its body are never sent.
    pub fn missing(&self) -> usize {
        self.missing
    }

    fn method_of(mut self, method: &str) -> Self {
        self.method = method.into();
        self
    }

    /// The request in HTTP/1.1. An open body goes in chunks of 16 KiB.
    pub fn http1(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.body.len() + 1024);
        let mut put = |text: &str| bytes.extend_from_slice(text.as_bytes());
        put(&format!("{} {} HTTP/1.1\r\n", self.method, self.path));
        if !self.headers.iter().any(|(name, _)| name == "host") {
            put("host: plimsoll\r\n");
        }
        for (name, value) in &self.headers {
            put(&format!("{name}: {value}\r\n"));
        }
        match self.framing {
            Framing::Declared => {
                put(&format!("content-length: {}\r\n\r\n", self.body.len() + self.missing));
                bytes.extend_from_slice(&self.body);
            }
            Framing::Open if self.method == "GET" => put("\r\n"),
            Framing::Open => {
                put("transfer-encoding: chunked\r\n\r\n");
                for chunk in self.body.chunks(16 * 1024) {
                    bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    bytes.extend_from_slice(chunk);
                    bytes.extend_from_slice(b"\r\n");
                }
                if self.missing == 0 {
                    bytes.extend_from_slice(b"0\r\n\r\n");
                }
            }
        }
        bytes.freeze()
    }
}

/// The status and headers of a response, of either protocol.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The first header of that (lower case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// As far as it came, free of any framing.
    pub body: Bytes,
    /// Whether the body came to its proper end (last chunk, declared length, END_STREAM).
    pub complete: bool,
}

impl Answer {
    /// The first header of that (lower case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON, or a failure that shows it.
    pub fn value(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    /// `error.code` of an answer in the shape of OpenAI's errors.
    pub fn code(&self) -> String {
        self.value()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// The `data:` values of an event stream, in order.
    pub fn events(&self) -> Vec<String> {
        let text = self.text();
        let blocks =
            text.split("\n\n").filter_map(|block| block.trim_start_matches('\n').strip_prefix("data: "));
        blocks.map(str::to_owned).collect()
    }
}

/// A connection to the proxy, or to an engine directly.
pub enum Client {
    /// Over HTTP/1.1.
    One(Http1),
    /// Over HTTP/2.
    Two(Http2),
}

impl Client {
    /// Connects to `address`, which must speak what `line` says.
    pub async fn connect(address: SocketAddr, line: Line) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.expect("a listener");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        match line {
            Line::Http1 => Self::One(Http1::new(stream)),
            Line::Http1Tls => Self::One(Http1::new(tls::handshake(stream, "http/1.1").await)),
            Line::Http2 => Self::Two(Http2::connect(stream, "http").await),
            Line::Http2Tls => Self::Two(Http2::connect(tls::handshake(stream, "h2").await, "https").await),
        }
    }

    /// Sends a request, not waiting for its response.
    pub async fn send(&mut self, request: &Request) {
        let send = async {
            match self {
                Self::One(client) => client.send(request).await,
                Self::Two(client) => client.send(request).await,
            }
        };
        within("a request to be sent", send).await;
    }

    /// The head of the response; interim (1xx) ones are passed over.
    pub async fn head(&mut self) -> Head {
        let head = async {
            match self {
                Self::One(client) => client.head().await,
                Self::Two(client) => client.head().await,
            }
        };
        within("the head of a response", head).await.expect("a response")
    }

    /// The next piece of the body, None at its proper end, an error where it was cut.
    pub async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        let piece = async {
            match self {
                Self::One(client) => client.piece().await,
                Self::Two(client) => client.piece().await,
            }
        };
        within("a piece of the response", piece).await
    }

    /// What is left of the body, and whether it came to its proper end.
    pub async fn rest(&mut self) -> (Bytes, bool) {
        let mut body = BytesMut::new();
        loop {
            match self.piece().await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                Ok(None) => return (body.freeze(), true),
                Err(_) => return (body.freeze(), false),
            }
        }
    }

    /// Sends a request and reads the whole response, meanwhile still sending if the response comes early.
    pub async fn ask(&mut self, request: &Request) -> Answer {
        let exchange = async {
            match self {
                Self::One(client) => client.exchange(request).await,
                Self::Two(client) => client.exchange(request).await,
            }
        };
        let head = within("a response", exchange).await.expect("a response");
        let (body, complete) = self.rest().await;
        Answer { status: head.status, headers: head.headers, body, complete }
    }

    /// Reads of the socket (HTTP/1.1) or DATA frames (HTTP/2) so far.
    pub fn reads(&self) -> u64 {
        match self {
            Self::One(client) => client.wire.reads(),
            Self::Two(client) => client.reads(),
        }
    }

    /// Gives up the request under way: closes the connection (HTTP/1.1), resets the stream (HTTP/2).
    pub fn cancel(self) -> Option<Self> {
        match self {
            Self::One(_) => None,
            Self::Two(mut client) => {
                client.cancel();
                Some(Self::Two(client))
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// The HTTP/1.1 side of the client.
pub struct Http1 {
    wire: Wire<ReadHalf<Box<dyn Stream>>>,
    writer: WriteHalf<Box<dyn Stream>>,
    framing: http1::Framing,
}

impl Http1 {
    fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (reader, writer) = tokio::io::split(Box::new(stream) as Box<dyn Stream>);
        Self { wire: Wire::new(reader), writer, framing: http1::Framing::Done }
    }

    async fn send(&mut self, request: &Request) {
        self.writer.write_all(&request.http1()).await.expect("a peer that reads");
        self.writer.flush().await.expect("a peer that reads");
    }

    async fn head(&mut self) -> io::Result<Head> {
        let head = self.wire.final_head().await?;
        self.framing = head.response_framing()?;
        Ok(Head { status: head.status(), headers: head.headers })
    }

    /// A peer may answer and close before it has read all: what counts is what it said.
    async fn exchange(&mut self, request: &Request) -> io::Result<Head> {
        let bytes = request.http1();
        let Self { wire, writer, .. } = self;
        let send = async {
            if writer.write_all(&bytes).await.is_ok() {
                let _flushed = writer.flush().await;
            }
            std::future::pending::<()>().await;
        };
        let head = tokio::select! {
            head = wire.final_head() => head?,
            () = send => unreachable!("pending"),
        };
        self.framing = head.response_framing()?;
        Ok(Head { status: head.status(), headers: head.headers })
    }

    async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        self.wire.piece(&mut self.framing).await
    }
}
