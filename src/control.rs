//! What another process of ours is asked over its admin listener: `plimsoll reload`.
//!
//! Where that listener is, and which token it wants, is in the configuration that both have read.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::config::{Admin, AdminAddress};

/// How long an answer may take: names that do not resolve take their time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks the process behind `admin` to read its configuration again; what it says of it.
///
/// # Errors
/// Why it has not done so, or that nobody is there.
pub fn reload(admin: &Admin) -> Result<String, String> {
    let whom = match &admin.address {
        AdminAddress::Tcp(address) => address.clone(),
        AdminAddress::Unix(socket) => format!("unix:{}", socket.display()),
    };
    match ask(admin, "POST", "/reload") {
        Ok((200, said)) => Ok(said.trim_end().to_owned()),
        Ok((401, _)) => Err(format!("the process at {whom} wants another token than `admin.token`")),
        Ok((_, why)) => Err(why.trim_end().to_owned()),
        Err(e) => Err(format!("no answer from {whom}, where `admin` says that Plimsoll is: {e}")),
    }
}

/// One request; the answer's status and body.
fn ask(admin: &Admin, method: &str, path: &str) -> io::Result<(u16, String)> {
    let token = admin.token.as_ref().map(|token| format!("authorization: Bearer {}\r\n", token.expose()));
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: plimsoll\r\ncontent-length: 0\r\nconnection: close\r\n{}\r\n",
        token.unwrap_or_default()
    );
    let answer = match &admin.address {
        AdminAddress::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(stream, &request)?
        }
        AdminAddress::Unix(socket) => {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(stream, &request)?
        }
    };
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "that is not HTTP"))
}

fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Status and body of an answer that ended with its connection.
fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_is_one() {
        let answer = "HTTP/1.1 422 Unprocessable Entity\r\ncontent-length: 4\r\n\r\nwhy\n";
        assert_eq!(parse(answer), Some((422, "why\n".to_owned())));
        for other in ["", "HTTP/1.1 200 OK", "SSH-2.0\r\n\r\n", "HTTP/1.1 2\r\n\r\n", "HTTP/1.1 é\r\n\r\n"] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }
}
