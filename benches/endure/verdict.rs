//! What an answer is worth: whole, cut and said to be, refused, or not what any engine has said.
//!
//! The one place that compares bytes. An answer is right if what the client got is the beginning of what the engine
//! that it names says for that plan, and if whatever is missing is announced as the interface promises.

use memchr::memmem;

use super::client::Reply;
use super::engine::{self, Ending, Plan};

/// What came of a request, as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sort {
    /// The whole answer.
    Whole,
    /// A failure that the engine itself reported.
    EngineError,
    /// The beginning of an answer, and then the news that no more will come.
    Cut,
    /// An error of the balancer's own: no engine has answered.
    Unserved,
    /// The client left, as planned.
    Aborted,
}

impl Sort {
    /// Every sort, in the order of tables.
    pub const ALL: [Self; 5] = [Self::Whole, Self::EngineError, Self::Cut, Self::Unserved, Self::Aborted];

    /// The word in tables, and how the balancer calls it in its metrics.
    pub const fn names(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Whole => ("whole", &["ok"]),
            Self::EngineError => ("engine's error", &["engine_error"]),
            Self::Cut => ("cut", &["cut"]),
            Self::Unserved => ("unserved", &["unreachable", "refused"]),
            Self::Aborted => ("aborted", &["client_gone"]),
        }
    }
}

/// Judges an answer to `plan`; an error says what is wrong with it.
pub fn judge(plan: &Plan, reply: &Reply) -> Result<Sort, String> {
    let wrong = |what: &str| {
        let (head, body) = (&reply.head, String::from_utf8_lossy(&reply.body));
        Err(format!("{what}: {plan:?} {head:?} whole={} body={body:?}", reply.is_whole))
    };
    let Some(engine) = reply.head.engine else {
        let is_ours = reply.head.status >= 500 && error_code(&reply.body).is_some();
        return if is_ours && reply.is_whole {
            Ok(Sort::Unserved)
        } else {
            wrong("not an answer of anybody")
        };
    };
    if reply.head.status != 200 {
        return if reply.is_whole { Ok(Sort::EngineError) } else { wrong("an engine's error in part") };
    }
    let whole = engine::answer(engine, plan, false);
    if reply.body == whole {
        return if reply.is_whole { Ok(Sort::Whole) } else { wrong("everything but its end") };
    }
    if let Ending::Error(_) = plan.ending {
        let failed = engine::answer(engine, plan, true);
        if reply.body == failed && reply.is_whole {
            return Ok(Sort::EngineError);
        }
    }
    if !plan.stream {
        // There is no place to say it but the missing rest.
        let is_cut = !reply.is_whole && whole.starts_with(&reply.body);
        return if is_cut { Ok(Sort::Cut) } else { wrong("no beginning of the engine's answer") };
    }
    match announced(&reply.body) {
        Some(before) if reply.is_whole && begins(&whole, before) => Ok(Sort::Cut),
        _ => wrong("no beginning of the engine's stream with the news that it was cut"),
    }
}

/// What comes before the event in which the balancer says that the stream is cut, if that is the last event.
fn announced(body: &[u8]) -> Option<&[u8]> {
    let code = memmem::rfind(body, b"\"stream_cut\"")?;
    let start = memmem::rfind(&body[..code], b"data: ")?;
    let event = body[start..].strip_prefix(b"data: ")?.strip_suffix(b"\n\n")?;
    (error_code(event)? == "stream_cut").then_some(&body[..start])
}

/// Whether `whole` begins so, if the blank line is left out that ends a broken event.
fn begins(whole: &[u8], before: &[u8]) -> bool {
    whole.starts_with(before) || before.strip_suffix(b"\n\n").is_some_and(|before| whole.starts_with(before))
}

fn error_code(json: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(json).ok()?;
    value["error"]["code"].as_str().map(str::to_owned)
}
