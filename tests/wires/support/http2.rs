//! The HTTP/2 side of the client, on the `h2` crate: one connection, any number of requests one after
//! another.

use super::client::{Framing, Head, Request};
use super::within;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use std::future::poll_fn;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

/// A connection and the request that is under way on it.
pub struct Http2 {
    sender: SendRequest<Bytes>,
    scheme: &'static str,
    driver: JoinHandle<()>,
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    reads: u64,
}

impl Http2 {
    /// Says hello and starts to drive the connection; `scheme` is what its requests carry.
    pub async fn connect<S>(stream: S, scheme: &'static str) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 22);
        let (sender, connection) = within("an h2 handshake", builder.handshake(stream)).await.expect("h2");
        let driver = tokio::spawn(async {
            let _end = connection.await;
        });
        Self { sender, scheme, driver, response: None, body: None, reads: 0 }
    }

    /// DATA frames received that were not empty.
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// Sends the request and as much of its body as the peer will take.
    pub async fn send(&mut self, request: &Request) {
        if let Some(stream) = self.begin(request).await {
            pump(stream, request.body(), request.missing() == 0).await;
        }
    }

    /// Sends a request and waits for the head of its response, which may come before the body is sent.
    pub async fn exchange(&mut self, request: &Request) -> io::Result<Head> {
        let stream = self.begin(request).await;
        let send = async {
            if let Some(stream) = stream {
                pump(stream, request.body(), request.missing() == 0).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            head = self.head() => head,
            () = send => unreachable!("pending"),
        }
    }

    /// Sends the head of the request; the stream for its body, if there is any.
    async fn begin(&mut self, request: &Request) -> Option<SendStream<Bytes>> {
        let uri = format!("{}://plimsoll{}", self.scheme, request.path());
        let mut head = http::Request::builder().method(request.method()).uri(uri);
        for (name, value) in request.headers() {
            head = head.header(name, value);
        }
        let length = request.body().len() + request.missing();
        if request.framing() == Framing::Declared {
            head = head.header("content-length", length);
        }
        let ends = length == 0;
        poll_fn(|cx| self.sender.poll_ready(cx)).await.expect("a connection that takes requests");
        let head = head.body(()).expect("a valid request");
        let (response, stream) = self.sender.send_request(head, ends).expect("an open connection");
        self.response = Some(response);
        (!ends).then_some(stream)
    }

    /// The head of the response.
    pub async fn head(&mut self) -> io::Result<Head> {
        // Taken only when it has come: whoever stops waiting for it has not given the request up.
        let response = self.response.as_mut().expect("a request was sent").await;
        self.response = None;
        let response = response.map_err(io::Error::other)?;
        let (parts, body) = response.into_parts();
        self.body = Some(body);
        let headers = parts.headers.iter();
        let headers =
            headers.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()));
        Ok(Head { status: parts.status.as_u16(), headers: headers.collect() })
    }

    /// The next DATA frame that is not empty; None at the proper end.
    pub async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        let Some(body) = &mut self.body else { return Ok(None) };
        loop {
            match body.data().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(io::Error::other(error)),
                Some(Ok(data)) => {
                    let _window = body.flow_control().release_capacity(data.len());
                    if !data.is_empty() {
                        self.reads += 1;
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// Gives the request up (RST_STREAM); the connection stays.
    pub fn cancel(&mut self) {
        self.response = None;
        self.body = None;
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Sends `body` as the windows open. A peer that answers early and refuses the rest is no error here: its
/// answer tells.
async fn pump(mut stream: SendStream<Bytes>, mut body: Bytes, ends: bool) {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let Some(Ok(room)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
        let piece = body.split_to(room.min(body.len()));
        let last = ends && body.is_empty();
        if stream.send_data(piece, last).is_err() {
            return;
        }
    }
    if !ends {
        // The handle must live on or h2 would reset the stream: the peer is to believe that more is coming.
        tokio::spawn(async move {
            let _reset = poll_fn(|cx| stream.poll_reset(cx)).await;
        });
    }
}
