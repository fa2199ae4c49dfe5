//! A client that sends exactly the bytes a test gives it: for HTTP that no library would write.

use super::client::Answer;
use super::http1::{Framing, Head, Wire};
use super::within;
use bytes::Bytes;
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// A plaintext connection.
pub struct Raw {
    wire: Wire<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Raw {
    /// Connects to `address`.
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.expect("a listener");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let (reader, writer) = stream.into_split();
        Self { wire: Wire::new(reader), writer }
    }

    /// Sends these bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        within("bytes to be sent", self.writer.write_all(bytes.as_ref())).await
    }

    /// Waits until there is something to read, without reading it.
    pub async fn readable(&self) {
        within("an answer", self.writer.as_ref().readable()).await.expect("a socket");
    }

    /// The next head, interim (1xx) ones included.
    pub async fn head(&mut self) -> Head {
        let head = within("a head", self.wire.head()).await.expect("well-formed HTTP/1.1");
        head.expect("a head before the end of the connection")
    }

    /// The next whole answer.
    pub async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        let framing = head.response_framing().expect("one framing");
        let body = within("a body", self.wire.body(framing)).await;
        let (status, complete) = (head.status(), body.is_ok());
        Answer { status, headers: head.headers, body: body.unwrap_or_default(), complete }
    }

    /// Every byte up to the end of the connection, however that comes.
    pub async fn until_ended(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut stream = self.wire.into_inner();
        let _reset = within("the end of the connection", stream.read_to_end(&mut bytes)).await;
        bytes
    }

    /// The next piece of a body, None at its proper end.
    pub async fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Bytes>> {
        within("a piece of an answer", self.wire.piece(framing)).await
    }

    /// Says that nothing more will be sent, and goes on reading.
    pub async fn half_close(&mut self) {
        within("the end of what is sent", self.writer.shutdown()).await.expect("an open connection");
    }

    /// Resets the connection.
    pub fn reset(self) {
        self.writer.as_ref().set_zero_linger().expect("SO_LINGER");
        // Without its farewell, which would be an orderly end.
        self.writer.forget();
    }

    /// Every byte up to the end of the connection, which has to come in good order.
    pub async fn until_closed(&mut self) -> Bytes {
        let rest = within("the end of the connection", self.wire.body(Framing::Close)).await;
        rest.expect("an orderly end of the connection")
    }
}
