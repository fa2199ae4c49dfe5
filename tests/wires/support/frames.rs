//! A client that sends exactly the HTTP/2 frames a test gives it: for what no library would send.

use super::within;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What a client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds of frames (RFC 9113 s.6).
pub mod kind {
    /// A part of a body.
    pub const DATA: u8 = 0;
    /// The beginning of a head, or trailers.
    pub const HEADERS: u8 = 1;
    /// What a stream depends on; of no effect any more.
    pub const PRIORITY: u8 = 2;
    /// The end of one stream.
    pub const RST_STREAM: u8 = 3;
    /// What the sender wants.
    pub const SETTINGS: u8 = 4;
    /// Nothing that a client may send.
    pub const PUSH_PROMISE: u8 = 5;
    /// A question whether anybody is there.
    pub const PING: u8 = 6;
    /// No further streams.
    pub const GOAWAY: u8 = 7;
    /// Room for more data.
    pub const WINDOW_UPDATE: u8 = 8;
    /// More of a head.
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flag {
    /// No flag at all.
    pub const NONE: u8 = 0;
    /// An answer to SETTINGS or PING.
    pub const ACK: u8 = 1;
    /// The sender sends no more on the stream.
    pub const END_STREAM: u8 = 1;
    /// The head is whole.
    pub const END_HEADERS: u8 = 4;
    /// The payload has padding.
    pub const PADDED: u8 = 8;
    /// The head begins with what the stream depends on.
    pub const PRIORITY: u8 = 0x20;
    /// A head without a body.
    pub const WHOLE: u8 = END_STREAM | END_HEADERS;
}

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A block of headers in HPACK, each a literal that no table remembers (RFC 7541 s.6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            match u8::try_from(text.len()) {
                Ok(length @ ..127) => block.push(length),
                _ => block.extend([127, u8::try_from(text.len() - 127).expect("below 255 bytes") | 0x80, 1]),
            }
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// How the server took what it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The stream was answered.
    Answered {
        /// Whether it was 200.
        well: bool,
    },
    /// The stream was reset.
    Reset,
    /// The connection was ended.
    Ended,
}

/// A plaintext HTTP/2 connection whose SETTINGS have been exchanged.
pub struct Frames {
    stream: TcpStream,
}

impl Frames {
    /// Connects to `address`.
    pub async fn connect(address: SocketAddr) -> Self {
        let mut stream = within("a connection", TcpStream::connect(address)).await.expect("a listener");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let hello =
            [PREFACE, &frame(kind::SETTINGS, flag::NONE, 0, []), &frame(kind::SETTINGS, flag::ACK, 0, [])];
        stream.write_all(&hello.concat()).await.expect("an open connection");
        Self { stream }
    }

    /// Sends these bytes; a connection that was ended meanwhile takes no more.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ended = within("bytes to be sent", self.stream.write_all(bytes)).await;
    }

    /// What becomes of `stream`, or of the connection. Frames that are about neither are passed over.
    pub async fn taken(&mut self, stream: u32) -> Taken {
        within(&format!("an end of stream {stream}"), async {
            while let Some((kind, of, payload)) = self.read().await {
                match kind {
                    // Of the static table, 8 is 200.
                    kind::HEADERS if of == stream => {
                        let field = payload.iter().find(|&&byte| !(0x20..0x40).contains(&byte));
                        return Taken::Answered { well: field == Some(&0x88) };
                    }
                    kind::RST_STREAM if of == stream => return Taken::Reset,
                    kind::GOAWAY if payload.get(4..8) != Some(&[0; 4]) => return Taken::Ended,
                    _ => {}
                }
            }
            Taken::Ended
        })
        .await
    }

    /// The next frame: kind, stream and payload; `None` at the end of the connection.
    async fn read(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let [high, middle, low, kind, _, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some((kind, u32::from_be_bytes(stream), payload))
    }
}
