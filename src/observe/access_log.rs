//! One line per request, `key=value`, written when the request has ended.
//!
//! The target of these lines is [`TARGET`], so that `RUST_LOG` can switch them on their own. Values that
//! could hold a space or a quote are quoted and escaped; what a client sent is never written raw, and bodies,
//! query strings and credentials are never written at all.
//!
//! A line looks like any other of the log, but it does not go the way of the others, which would cost a tenth of what
//! a request costs: it is put together without `core::fmt`, and waits some milliseconds for a thread that writes all
//! there are at once. If nobody takes them, lines are lost, and the log says how many; requests never wait.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::{Condvar, Mutex};

use super::Outcome;

/// The `log` target of access lines.
pub const TARGET: &str = "plimsoll::access";

/// How long a line waits for company, if there are not so many bytes of it before.
const DELAY: Duration = Duration::from_millis(10);
const ENOUGH_BYTES: usize = 64 << 10;

/// What may wait at most; beyond it lines are lost.
const MOST_BYTES: usize = 8 << 20;

/// Room for a usual line.
const LINE_BYTES: usize = 512;

/// What is known of a request at its end. Absent values are left out.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// The request's id, from the client or made by us.
    pub id: &'a str,
    /// The id of the trace that it is part of.
    pub trace: Option<u128>,
    /// The client's address.
    pub client: Option<String>,
    /// The name of the key that it showed.
    pub key: Option<&'a str>,
    /// Method and path, without the query.
    pub method: &'a str,
    /// See `method`.
    pub path: &'a str,
    /// The status that went downstream; 0 if none did.
    pub status: u16,
    /// How it ended.
    pub outcome: Outcome,
    /// The upstream it was routed to.
    pub upstream: Option<&'a str>,
    /// The backend that answered, or was tried last.
    pub backend: Option<&'a str>,
    /// Why that backend was chosen.
    pub reason: Option<&'static str>,
    /// Attempts made.
    pub attempts: u32,
    /// The model asked for.
    pub model: Option<&'a str>,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// Estimated prompt tokens.
    pub prompt_estimate: u64,
    /// Of those, tokens that the chosen backend had probably cached.
    pub matched_estimate: u64,
    /// From arrival to the first content byte.
    pub ttft: Option<Duration>,
    /// From arrival to the end.
    pub duration: Duration,
    /// Body bytes received and sent.
    pub bytes_in: usize,
    /// See `bytes_in`.
    pub bytes_out: usize,
    /// Prompt, completion and cached tokens, as the engine reported them.
    pub tokens: Option<(u64, u64, Option<u64>)>,
    /// The last failure, or why we refused.
    pub error: Option<&'a str>,
    /// What is known of the last failure of a connection.
    pub detail: Option<&'a str>,
}

/// The lines on their way to the standard error.
#[derive(Default)]
pub struct AccessLog {
    waiting: Mutex<Waiting>,
    due: Condvar,
    /// Taken and not written yet; held while they are.
    taken: Mutex<Vec<u8>>,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    lost: u64,
    /// How lines begin in this second of the calendar.
    beginning: String,
    second: u64,
}

impl AccessLog {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let log = Arc::new(Self::default());
        let writer = log.clone();
        thread::Builder::new().name("access log".to_owned()).spawn(move || writer.write_on())?;
        Ok(log)
    }

    /// Writes a line about `entry` soon, if `RUST_LOG` wants such lines. `unix_time` is the time since 1970.
    pub fn write(&self, entry: &Entry<'_>, unix_time: Duration) {
        if !log::log_enabled!(target: TARGET, log::Level::Info) {
            return;
        }
        let mut line = Line(Vec::with_capacity(LINE_BYTES));
        line.entry(entry);
        let mut waiting = self.waiting.lock();
        let was_empty = waiting.bytes.is_empty();
        waiting.add(&line.0, unix_time.as_secs());
        let is_due = was_empty || waiting.bytes.len() >= ENOUGH_BYTES;
        drop(waiting);
        if is_due {
            self.due.notify_one();
        }
    }

    /// Writes what waits, now.
    pub fn flush(&self) {
        let mut taken = self.taken.lock();
        let lost = {
            let mut waiting = self.waiting.lock();
            std::mem::swap(&mut waiting.bytes, &mut taken);
            std::mem::take(&mut waiting.lost)
        };
        // Where that fails there is nobody to tell.
        let _written = io::stderr().lock().write_all(&taken);
        taken.clear();
        if lost > 0 {
            log::warn!("access lines lost count={lost}: nobody took them in time");
        }
    }

    fn write_on(&self) {
        loop {
            let mut waiting = self.waiting.lock();
            self.due.wait_while(&mut waiting, |waiting| waiting.bytes.is_empty());
            self.due.wait_while_for(&mut waiting, |waiting| waiting.bytes.len() < ENOUGH_BYTES, DELAY);
            drop(waiting);
            self.flush();
        }
    }
}

impl Waiting {
    fn add(&mut self, line: &[u8], second: u64) {
        if self.bytes.len() + line.len() > MOST_BYTES {
            self.lost += 1;
            return;
        }
        if second != self.second || self.beginning.is_empty() {
            self.second = second;
            // As env_logger writes all others.
            let time = Timestamp::from_second(second.cast_signed()).unwrap_or_default();
            self.beginning = format!("[{time} INFO  {TARGET}] ");
        }
        self.bytes.extend_from_slice(self.beginning.as_bytes());
        self.bytes.extend_from_slice(line);
        self.bytes.push(b'\n');
    }
}

/// A line that is being written.
struct Line(Vec<u8>);

impl Line {
    fn entry(&mut self, entry: &Entry<'_>) {
        self.text("request id=").value(entry.id).text(" method=").value(entry.method);
        self.text(" path=").value(entry.path);
        self.text(" status=").number(entry.status).text(" outcome=").text(entry.outcome.name());
        if let Some(trace) = entry.trace {
            self.text(" trace=").hex(trace);
        }
        if let Some(client) = &entry.client {
            self.text(" client=").text(client);
        }
        if let Some(key) = entry.key {
            self.text(" key=").text(key);
        }
        if let Some(upstream) = entry.upstream {
            self.text(" upstream=").text(upstream);
        }
        if let Some(backend) = entry.backend {
            self.text(" backend=").text(backend).text(" attempts=").number(entry.attempts);
        }
        if let Some(reason) = entry.reason {
            self.text(" reason=").text(reason);
        }
        if let Some(model) = entry.model {
            self.text(" model=").value(model);
        }
        if entry.prompt_estimate > 0 {
            self.text(" stream=").text(if entry.stream { "true" } else { "false" });
            self.text(" prompt_est=").number(entry.prompt_estimate);
            self.text(" matched_est=").number(entry.matched_estimate);
        }
        if let Some(ttft) = entry.ttft {
            self.text(" ttft_ms=").milliseconds(ttft);
        }
        self.text(" duration_ms=").milliseconds(entry.duration);
        self.text(" bytes_in=").number(entry.bytes_in).text(" bytes_out=").number(entry.bytes_out);
        if let Some((prompt, completion, cached)) = entry.tokens {
            self.text(" prompt_tokens=").number(prompt).text(" completion_tokens=").number(completion);
            if let Some(cached) = cached {
                self.text(" cached_tokens=").number(cached);
            }
        }
        if let Some(error) = entry.error {
            self.text(" error=").value(error);
        }
        if let Some(detail) = entry.detail {
            self.text(" detail=").value(detail);
        }
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    fn number(&mut self, number: impl itoa::Integer) -> &mut Self {
        self.text(itoa::Buffer::new().format(number))
    }

    fn hex(&mut self, number: u128) -> &mut Self {
        self.text(&format!("{number:032x}"))
    }

    /// To a tenth.
    fn milliseconds(&mut self, time: Duration) -> &mut Self {
        let tenths = (time.as_micros() + 50) / 100;
        self.number(tenths / 10).text(".").number(tenths % 10)
    }

    /// A value as it is if it is plain, else quoted and escaped; at most 200 characters.
    fn value(&mut self, value: &str) -> &mut Self {
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'"' | b'=' | b'\\');
        if !value.is_empty() && value.len() <= 200 && value.bytes().all(plain) {
            return self.text(value);
        }
        let escaped: String = value.chars().take(200).flat_map(char::escape_default).collect();
        self.text("\"").text(&escaped).text("\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry<'static> {
        Entry {
            id: "r-1",
            trace: None,
            client: Some("10.1.1.1:5000".to_owned()),
            key: Some("team-a"),
            method: "POST",
            path: "/v1/chat/completions",
            status: 200,
            outcome: Outcome::Ok,
            upstream: Some("llama"),
            backend: Some("10.0.0.1:8000"),
            reason: Some("cache"),
            attempts: 1,
            model: Some("llama-3.1-8b"),
            stream: true,
            prompt_estimate: 800,
            matched_estimate: 640,
            ttft: Some(Duration::from_micros(12_345)),
            duration: Duration::from_millis(900),
            bytes_in: 3_200,
            bytes_out: 10_000,
            tokens: Some((775, 64, Some(640))),
            error: None,
            detail: None,
        }
    }

    fn line(entry: &Entry<'_>) -> String {
        let mut line = Line(Vec::new());
        line.entry(entry);
        String::from_utf8(line.0).unwrap()
    }

    #[test]
    fn a_line_says_who_asked_what_where_it_went_why_and_how_it_ended() {
        assert_eq!(
            line(&entry()),
            "request id=r-1 method=POST path=/v1/chat/completions status=200 outcome=ok client=10.1.1.1:5000 \
             key=team-a upstream=llama backend=10.0.0.1:8000 attempts=1 reason=cache model=llama-3.1-8b stream=true \
             prompt_est=800 matched_est=640 ttft_ms=12.3 duration_ms=900.0 bytes_in=3200 bytes_out=10000 \
             prompt_tokens=775 completion_tokens=64 cached_tokens=640"
        );
    }

    #[test]
    fn the_trace_is_written_as_tracing_systems_show_it() {
        let line = line(&Entry { trace: Some(0x2f35), ..entry() });
        assert!(line.contains(" outcome=ok trace=00000000000000000000000000002f35 client="), "{line}");
    }

    #[test]
    fn a_client_cannot_forge_a_second_line_or_key() {
        let line =
            line(&Entry { model: Some("a\nrequest id=\"x\" status=200"), path: "/p\u{1b}[31m", ..entry() });
        assert!(!line.contains('\n') && !line.contains('\u{1b}'), "{line}");
        assert!(line.contains(r#"model="a\nrequest id=\"x\" status=200""#), "{line}");
    }
}
