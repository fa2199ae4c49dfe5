//! A small HTTP/1.1 client: one request per connection, bodies by length, in chunks or until the end.
//!
//! The demo and `benches/replay` measure the balancer from outside, over a real socket, as a user's client
//! would; more than this they do not need. Answers are read as they come, because the moment of the first
//! token is what both are about.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Longest line of a header or of a chunk size.
const LINE_BYTES_MAX: u64 = 16 << 10;
/// Largest chunk read at once.
const PART_BYTES_MAX: usize = 64 << 10;

/// An answer whose header has been read.
#[derive(Debug)]
pub struct Reply {
    /// The status, as a number.
    pub status: u16,
    /// Value of the header `x-plimsoll-backend`.
    pub backend: Option<String>,
    framing: Framing,
    reader: BufReader<TcpStream>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// Bytes still to come.
    Length(usize),
    /// Bytes still to come of the current chunk; the next begins with its size.
    Chunked(usize),
    UntilClose,
    Done,
}

/// Sends a request, with a JSON body if there is one, and reads the header of the answer.
///
/// # Errors
/// If there is no connection, or what comes back is no HTTP.
pub async fn send(address: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    Reply::read(BufReader::new(stream)).await
}

impl Reply {
    async fn read(mut reader: BufReader<TcpStream>) -> io::Result<Self> {
        let first = line(&mut reader).await?;
        let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| broken("not an HTTP answer"))?;
        let mut reply = Self { status, backend: None, framing: Framing::UntilClose, reader };
        loop {
            let header = line(&mut reply.reader).await?;
            let Some((name, value)) = header.split_once(':') else {
                return if header.is_empty() { Ok(reply) } else { Err(broken("not a header")) };
            };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    reply.framing =
                        Framing::Length(value.parse().map_err(|_| broken("not a content length"))?);
                }
                "transfer-encoding" if value == "chunked" => reply.framing = Framing::Chunked(0),
                "x-plimsoll-backend" => reply.backend = Some(value.to_owned()),
                _ => {}
            }
        }
    }

    /// The next bytes of the body as they came in; nothing at its end.
    ///
    /// # Errors
    /// If the connection ends before the body, or the body is not framed as its header says.
    pub async fn part(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.framing == Framing::Chunked(0) {
            let size = line(&mut self.reader).await?;
            let size = size.split(';').next().unwrap_or_default();
            let size = usize::from_str_radix(size, 16).map_err(|_| broken("not a chunk size"))?;
            self.framing = if size == 0 { Framing::Done } else { Framing::Chunked(size) };
        }
        let most = match self.framing {
            Framing::Length(left) | Framing::Chunked(left) => left.min(PART_BYTES_MAX),
            Framing::UntilClose => PART_BYTES_MAX,
            Framing::Done => 0,
        };
        if most == 0 {
            return Ok(None);
        }
        let mut part = vec![0; most];
        let read = self.reader.read(&mut part).await?;
        part.truncate(read);
        match (&mut self.framing, read) {
            (Framing::UntilClose, 0) => return Ok(None),
            (_, 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (Framing::Length(left), _) => *left -= read,
            (Framing::Chunked(left), _) => {
                *left -= read;
                if *left == 0 {
                    line(&mut self.reader).await?;
                }
            }
            _ => {}
        }
        Ok(Some(part))
    }

    /// The whole body as text.
    ///
    /// # Errors
    /// As [`Reply::part`], or if it is not UTF-8.
    pub async fn text(mut self) -> io::Result<String> {
        let mut body = Vec::new();
        while let Some(part) = self.part().await? {
            body.extend_from_slice(&part);
        }
        String::from_utf8(body).map_err(|_| broken("not UTF-8"))
    }
}

async fn line(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = Vec::new();
    (&mut *reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    String::from_utf8(line).map_err(|_| broken("not UTF-8"))
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the client makes of these bytes: status, backend, parts, and how it ended.
    fn read(answer: &'static str) -> (u16, Option<String>, Vec<String>, Option<io::ErrorKind>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            };
            let client = async {
                let mut reply = send(address, "POST", "/", "{}").await.unwrap();
                let mut parts = Vec::new();
                let end = loop {
                    match reply.part().await {
                        Ok(Some(part)) => parts.push(String::from_utf8(part).unwrap()),
                        Ok(None) => break None,
                        Err(error) => break Some(error.kind()),
                    }
                };
                (reply.status, reply.backend.clone(), parts, end)
            };
            tokio::join!(server, client).1
        })
    }

    #[test]
    fn chunks_come_out_as_they_were_sent() {
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Plimsoll-Backend: b:1\r\n\r\n\
                      3\r\none\r\n5;x=y\r\nthree\r\n0\r\n\r\n";
        let parts = vec!["one".to_owned(), "three".to_owned()];
        assert_eq!(read(answer), (200, Some("b:1".to_owned()), parts, None));
    }

    #[test]
    fn a_body_ends_after_its_length_or_with_the_connection() {
        let counted = read("HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nbusy, and more");
        assert_eq!(counted, (503, None, vec!["busy".to_owned()], None));
        assert_eq!(read("HTTP/1.0 200 OK\r\n\r\nall").2, ["all"]);
    }

    #[test]
    fn a_body_that_is_cut_is_an_error() {
        let eof = Some(io::ErrorKind::UnexpectedEof);
        assert_eq!(read("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbu").3, eof);
        assert_eq!(read("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").3, eof);
        assert_eq!(read("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n").3, eof);
    }
}
