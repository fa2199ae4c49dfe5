//! What another process of ours is asked over its admin listener: `plimsoll reload`, `upgrade`, `status`, `drain`.
//!
//! Where that listener is, and which token it wants, is in the configuration that both have read.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::config::{Admin, AdminAddress};

/// How long an answer may take: names that do not resolve take their time.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether a backend is drained.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Asks the process behind `admin` to read its configuration again; what it says of it.
///
/// # Errors
/// Why it has not done so, or that nobody is there.
pub fn reload(admin: &Admin) -> Result<String, String> {
    told(admin, "POST", "/reload")
}

/// Asks the process behind `admin` to let another one take its place; what it says of it.
///
/// # Errors
/// Why none has, or that nobody is there.
pub fn upgrade(admin: &Admin) -> Result<String, String> {
    told(admin, "POST", "/upgrade")
}

/// Asks the process behind `admin` how its backends are: JSON, as `/status` has it.
///
/// # Errors
/// Why it does not tell, or that nobody is there.
pub fn status(admin: &Admin) -> Result<String, String> {
    told(admin, "GET", "/status")
}

/// A backend, in one upstream or in every one that has it.
pub struct Named<'a> {
    /// Its address and port.
    pub address: &'a str,
    /// The upstream, if only one is meant.
    pub upstream: Option<&'a str>,
}

impl Named<'_> {
    /// As a query of the admin listener.
    fn query(&self) -> String {
        let upstream = self.upstream.map(|name| format!("&upstream={}", encoded(name)));
        format!("?backend={}{}", encoded(self.address), upstream.unwrap_or_default())
    }

    /// What a status says of the requests that it has in flight; `None` if it is not there.
    fn in_flight(&self, status: &Value) -> Option<u64> {
        let upstreams = status["upstreams"].as_object()?;
        let meant = upstreams.iter().filter(|(name, _)| self.upstream.is_none_or(|only| only == *name));
        let backends = meant.flat_map(|(_, upstream)| upstream["backends"].as_array().into_iter().flatten());
        // The same address may be written in two ways.
        let is = |text: Option<&str>| text.and_then(|text| text.parse::<SocketAddr>().ok());
        let ours = is(Some(self.address))?;
        let found = backends.filter(|backend| is(backend["address"].as_str()) == Some(ours));
        found.map(|backend| backend["active_requests"].as_u64()).sum()
    }
}

/// Tells the process behind `admin` to send no new request to a backend; what it says of it.
///
/// # Errors
/// Why it does not do so, or that nobody is there.
pub fn drain(admin: &Admin, backend: &Named<'_>) -> Result<String, String> {
    told(admin, "POST", &format!("/drain{}", backend.query()))
}

/// Waits until a backend has no request in flight, or is gone.
///
/// # Errors
/// That nobody answers any more.
#[expect(clippy::disallowed_methods, reason = "a command that waits for another process")]
pub fn drained(admin: &Admin, backend: &Named<'_>) -> Result<String, String> {
    loop {
        let status = status(admin)?;
        let status: Value = serde_json::from_str(&status).map_err(|e| format!("/status is no JSON: {e}"))?;
        match backend.in_flight(&status) {
            Some(0) | None => return Ok(format!("{} has no request in flight", backend.address)),
            Some(_) => std::thread::sleep(LOOK_INTERVAL),
        }
    }
}

/// Tells the process behind `admin` to let a backend serve again; what it says of it.
///
/// # Errors
/// Why it does not do so, or that nobody is there.
pub fn undrain(admin: &Admin, backend: &Named<'_>) -> Result<String, String> {
    told(admin, "POST", &format!("/undrain{}", backend.query()))
}

/// Tells the process behind `admin` to give a backend this weight; what it says of it.
///
/// # Errors
/// Why it does not do so, or that nobody is there.
pub fn weigh(admin: &Admin, backend: &Named<'_>, weight: u32) -> Result<String, String> {
    told(admin, "POST", &format!("/weight{}&weight={weight}", backend.query()))
}

/// What [`status`] says, as a table for people; as it is if it cannot be read.
pub fn status_table(json: &str) -> String {
    let Ok(status) = serde_json::from_str::<Value>(json) else { return json.to_owned() };
    let mut out = format!("plimsoll {}\n", status["version"].as_str().unwrap_or("?"));
    for (name, upstream) in status["upstreams"].as_object().into_iter().flatten() {
        out += &format!("\n{name}, {}\n", upstream["policy"].as_str().unwrap_or("?"));
        let mut rows = vec![HEADINGS.map(str::to_owned)];
        rows.extend(upstream["backends"].as_array().into_iter().flatten().map(row));
        let widths: Vec<usize> =
            (0..HEADINGS.len()).map(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0)).collect();
        for row in rows {
            let cells = row.iter().zip(&widths).enumerate();
            let line: Vec<String> =
                cells
                    .map(|(at, (cell, width))| {
                        if at < 2 || at == 10 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                    })
                    .collect();
            out += &format!("  {}\n", line.join("  ").trim_end());
        }
    }
    out.truncate(out.trim_end().len());
    out
}

const HEADINGS: [&str; 11] = [
    "backend", "state", "weight", "pending", "active", "context", "share", "running", "waiting", "kv",
    "reason",
];

/// A backend's line in the table.
fn row(backend: &Value) -> [String; HEADINGS.len()] {
    let number = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), |number| number.to_string());
    let percent = |value: &Value| {
        value.as_f64().map_or_else(|| "-".to_owned(), |part| format!("{:.0} %", part * 100.0))
    };
    let engine = &backend["engine"];
    [
        backend["address"].as_str().unwrap_or("?").to_owned(),
        backend["state"].as_str().unwrap_or("?").replace('_', " "),
        number(&backend["weight"]),
        number(&backend["pending_tokens"]),
        number(&backend["active_requests"]),
        number(&backend["context_tokens"]),
        percent(&backend["share"]),
        number(&engine["running"]),
        number(&engine["waiting"]),
        percent(&engine["kv_usage"]),
        backend["reason"].as_str().unwrap_or("").to_owned(),
    ]
}

/// Asks the process behind `admin` for `path`: the body of a good answer.
///
/// # Errors
/// What it says instead, or that nobody is there.
pub fn told(admin: &Admin, method: &str, path: &str) -> Result<String, String> {
    let whom = match &admin.address {
        AdminAddress::Tcp(address) => address.clone(),
        AdminAddress::Unix(socket) => format!("unix:{}", socket.display()),
    };
    match ask(admin, method, path) {
        Ok((200, said)) => Ok(said.trim_end().to_owned()),
        Ok((401, _)) => Err(format!("the process at {whom} wants another token than `admin.token`")),
        Ok((_, why)) => Err(why.trim_end().to_owned()),
        Err(e) => Err(format!("no answer from {whom}, where `admin` says that Plimsoll is: {e}")),
    }
}

/// As it can stand in a query.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |out, byte| match byte {
        b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'.' | b'-' | b'_' => {
            out + char::from(byte).to_string().as_str()
        }
        byte => out + &format!("%{byte:02x}"),
    })
}

/// One request; the answer's status and body.
fn ask(admin: &Admin, method: &str, path: &str) -> io::Result<(u16, String)> {
    let token = admin.token.as_ref().map(|token| format!("authorization: Bearer {}\r\n", token.expose()));
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n{}\r\n",
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
    fn a_status_is_a_table_with_the_worst_that_is_true_of_each_backend() {
        let backend = |address: &str, more: &str| {
            format!(
                r#"{{"address":"{address}","weight":1,"healthy":true,"pending_tokens":1200,"active_requests":3,
                    "context_tokens":9,"share":0.25{more}}}"#
            )
        };
        let backends = [
            backend(
                "10.0.0.1:8000",
                r#","state":"up","reason":null,"engine":{"running":3,"waiting":0,"kv_usage":0.413}"#,
            ),
            backend("10.0.0.10:8000", r#","state":"on_trial","reason":"why","engine":null"#),
        ];
        let status = format!(
            r#"{{"version":"0.1.0","upstreams":{{"llama":{{"policy":"round_robin","backends":[{}]}}}}}}"#,
            backends.join(",")
        );
        assert_eq!(
            status_table(&status),
            "plimsoll 0.1.0\n\nllama, round_robin\n  \
             backend         state     weight  pending  active  context  share  running  waiting    kv  reason\n  \
             10.0.0.1:8000   up             1     1200       3        9   25 %        3        0  41 %\n  \
             10.0.0.10:8000  on trial       1     1200       3        9   25 %        -        -     -  why"
        );
        assert_eq!(status_table("no JSON"), "no JSON");
        assert_eq!(status_table("{}"), "plimsoll ?");
    }

    #[test]
    fn a_backend_is_named_in_a_query_and_found_in_a_status() {
        let named = Named { address: "[::1]:8000", upstream: Some("a&b") };
        assert_eq!(named.query(), "?backend=%5b%3a%3a1%5d%3a8000&upstream=a%26b");
        let backends =
            |n| serde_json::json!({ "backends": [{ "address": "[::1]:8000", "active_requests": n }] });
        let status = serde_json::json!({ "upstreams": { "a&b": backends(3), "c": backends(4) } });
        assert_eq!(named.in_flight(&status), Some(3));
        assert_eq!(Named { upstream: None, ..named }.in_flight(&status), Some(7));
    }

    #[test]
    fn only_an_answer_is_one() {
        let answer = "HTTP/1.1 422 Unprocessable Entity\r\ncontent-length: 4\r\n\r\nwhy\n";
        assert_eq!(parse(answer), Some((422, "why\n".to_owned())));
        for other in ["", "HTTP/1.1 200 OK", "SSH-2.0\r\n\r\n", "HTTP/1.1 2\r\n\r\n", "HTTP/1.1 é\r\n\r\n"] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }
}
