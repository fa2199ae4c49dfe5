//! One line per request, `key=value`, written when the request has ended.
//!
//! The target of these lines is [`TARGET`], so that `RUST_LOG` can switch them on their own. Values that
//! could hold a space or a quote are quoted and escaped; what a client sent is never written raw, and bodies,
//! query strings and credentials are never written at all.

use std::fmt;
use std::time::Duration;

use super::Outcome;

/// The `log` target of access lines.
pub const TARGET: &str = "plimsoll::access";

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

impl Entry<'_> {
    /// Writes the line.
    pub fn write(&self) {
        log::info!(target: TARGET, "{self}");
    }
}

impl fmt::Display for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "request id={} method={} path={}",
            Quoted(self.id),
            Quoted(self.method),
            Quoted(self.path)
        )?;
        write!(f, " status={} outcome={}", self.status, self.outcome.name())?;
        if let Some(trace) = self.trace {
            write!(f, " trace={trace:032x}")?;
        }
        if let Some(client) = &self.client {
            write!(f, " client={client}")?;
        }
        if let Some(key) = self.key {
            write!(f, " key={key}")?;
        }
        if let Some(upstream) = self.upstream {
            write!(f, " upstream={upstream}")?;
        }
        if let Some(backend) = self.backend {
            write!(f, " backend={backend} attempts={}", self.attempts)?;
        }
        if let Some(reason) = self.reason {
            write!(f, " reason={reason}")?;
        }
        if let Some(model) = self.model {
            write!(f, " model={}", Quoted(model))?;
        }
        if self.prompt_estimate > 0 {
            write!(
                f,
                " stream={} prompt_est={} matched_est={}",
                self.stream, self.prompt_estimate, self.matched_estimate
            )?;
        }
        if let Some(ttft) = self.ttft {
            write!(f, " ttft_ms={:.1}", ttft.as_secs_f64() * 1e3)?;
        }
        write!(f, " duration_ms={:.1}", self.duration.as_secs_f64() * 1e3)?;
        write!(f, " bytes_in={} bytes_out={}", self.bytes_in, self.bytes_out)?;
        if let Some((prompt, completion, cached)) = self.tokens {
            write!(f, " prompt_tokens={prompt} completion_tokens={completion}")?;
            if let Some(cached) = cached {
                write!(f, " cached_tokens={cached}")?;
            }
        }
        if let Some(error) = self.error {
            write!(f, " error={}", Quoted(error))?;
        }
        if let Some(detail) = self.detail {
            write!(f, " detail={}", Quoted(detail))?;
        }
        Ok(())
    }
}

/// A value as it is if it is plain, else quoted and escaped; at most 200 characters.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '=' && c != '\\';
        if !self.0.is_empty() && self.0.len() <= 200 && self.0.chars().all(plain) {
            return f.write_str(self.0);
        }
        f.write_str("\"")?;
        for c in self.0.chars().take(200) {
            write!(f, "{}", c.escape_default())?;
        }
        f.write_str("\"")
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

    #[test]
    fn a_line_says_who_asked_what_where_it_went_why_and_how_it_ended() {
        assert_eq!(
            entry().to_string(),
            "request id=r-1 method=POST path=/v1/chat/completions status=200 outcome=ok client=10.1.1.1:5000 \
             key=team-a upstream=llama backend=10.0.0.1:8000 attempts=1 reason=cache model=llama-3.1-8b stream=true \
             prompt_est=800 matched_est=640 ttft_ms=12.3 duration_ms=900.0 bytes_in=3200 bytes_out=10000 \
             prompt_tokens=775 completion_tokens=64 cached_tokens=640"
        );
    }

    #[test]
    fn the_trace_is_written_as_tracing_systems_show_it() {
        let line = Entry { trace: Some(0x2f35), ..entry() }.to_string();
        assert!(line.contains(" outcome=ok trace=00000000000000000000000000002f35 client="), "{line}");
    }

    #[test]
    fn a_client_cannot_forge_a_second_line_or_key() {
        let line = Entry { model: Some("a\nrequest id=\"x\" status=200"), path: "/p\u{1b}[31m", ..entry() }
            .to_string();
        assert!(!line.contains('\n') && !line.contains('\u{1b}'), "{line}");
        assert!(line.contains(r#"model="a\nrequest id=\"x\" status=200""#), "{line}");
    }
}
