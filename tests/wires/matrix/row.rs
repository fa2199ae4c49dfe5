//! A row of the matrix as data: the scene, and what has to come of it.

use super::backend::Backend;
use super::run::Run;
use crate::support::client::{Answer as Reply, Line};
use crate::support::engine::{Answer, Gate, delta};
use crate::support::stage::{BOTH, assert_error};
use std::future::Future;
use std::pin::Pin;

/// A scene and its expected end.
pub(super) struct Row {
    /// Who does what.
    pub(super) scene: Scene,
    /// The protocols over which a client plays it.
    pub(super) lines: &'static [Line],
    /// Whether a stream is asked for.
    pub(super) streamed: bool,
    /// Further keys of the upstream that matter to the end, in flow style.
    pub(super) upstream: &'static str,
    /// Those without which the scene would not be one, such as a short interval of probes.
    pub(super) beside: &'static str,
    /// Further sections of the configuration.
    pub(super) limits: &'static str,
    /// What is charged at the moment before the failure.
    pub(super) charged: Charged,
    /// How each of its requests ends, in their order.
    pub(super) ends: Vec<End>,
    /// How often the engines see them, all together.
    pub(super) seen: usize,
    /// The reason counted in `plimsoll_retries_total`, and how often.
    pub(super) retried: Option<(&'static str, u32)>,
    /// The reason counted in `plimsoll_ejections_total`.
    pub(super) ejected: Option<&'static str>,
    /// Where a request that comes after it goes.
    pub(super) next: Next,
}

/// Who does what.
pub(super) enum Scene {
    /// Of two backends the one that is asked first does this; the other is well.
    One(Ill),
    /// Both do it.
    Both(Ill),
    /// The engine is well, and the client goes.
    Goes(Stage, Way),
    /// A play of its own on backends of its own.
    Play(fn(&Gate) -> Vec<Backend>, Play),
}

/// Plays a scene up to the last answer.
pub(super) type Play = for<'a> fn(&'a Run<'a>) -> Pin<Box<dyn Future<Output = Vec<Option<Reply>>> + 'a>>;

/// How a backend fails.
#[derive(Clone, Copy)]
pub(super) enum Ill {
    /// Its port refuses connections.
    Refuses,
    /// Its port does not answer at all.
    BlackHole,
    /// It accepts connections and closes them before it has read anything.
    ClosesAtOnce,
    /// It takes the request and does this, waiting at the gate before it fails.
    Does(fn(&Gate) -> Answer),
}

/// How far a request has come when its client goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its body is being sent.
    Uploading,
    /// It waits for a backend with room.
    Queued,
    /// The engine has it and says nothing.
    Waiting,
    /// The engine has sent the header of a stream, and no event.
    Opened,
    /// The first event has arrived.
    Streaming,
}

/// How a client goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Closes its connection.
    Fin,
    /// Resets its connection.
    Rst,
    /// Closes its sending side, and goes on reading.
    HalfClose,
    /// Resets its HTTP/2 stream; the connection lives on.
    RstStream,
    /// Says GOAWAY and closes the connection.
    GoAway,
    /// Says GOAWAY, and stays for the rest of the stream.
    GoAwayAndStays,
}

impl Way {
    /// The protocol in which one can go so.
    pub(super) const fn line(self) -> &'static [Line] {
        match self {
            Self::Fin | Self::Rst | Self::HalfClose => &[Line::Http1],
            Self::RstStream | Self::GoAway | Self::GoAwayAndStays => &[Line::Http2],
        }
    }
}

/// What is charged to the backends for a request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Charged {
    /// There is no moment to look.
    Unseen,
    /// Nothing yet.
    Nothing,
    /// A place and the prompt, to one backend.
    Prompt,
    /// Only the place: the first content has come.
    Place,
}

/// Where a later, healthy request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nobody asks.
    Unasked,
    /// To the backend that has failed.
    Same,
    /// To the other one.
    Other,
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// What the client gets.
    pub(super) gets: Gets,
    /// `outcome` in metrics and log.
    pub(super) outcome: &'static str,
    /// `attempts` in the log; none if no backend was chosen.
    pub(super) attempts: Option<u32>,
    /// `error` in the log.
    pub(super) error: Option<&'static str>,
}

/// What a client gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gets {
    /// A good answer, whole.
    Good,
    /// The engine's answer with this status, unchanged, and its Retry-After.
    Passed(u16, Option<&'static str>),
    /// An answer of ours with this status and code.
    Own(u16, &'static str),
    /// What came of the stream, the error event of ours, a clean end.
    Cut,
    /// What came of the answer, and no end.
    Truncated,
    /// The engine's stream with an error in it, whole.
    StreamError,
    /// Nothing, for it has left.
    Gone,
    /// The end of its connection.
    Closed,
}

/// The body of a status that an ill engine gives.
pub(super) const ILL_BODY: &str = r#"{"error":{"message":"ill"}}"#;

/// The body of a good answer.
pub(super) const GOOD_BODY: &str = r#"{"object":"chat.completion","choices":[]}"#;

impl Gets {
    /// Checks that this is what came; `reply` is none where the client had left.
    pub(super) fn check(self, reply: Option<&Reply>) {
        let Some(reply) = reply else {
            assert!(matches!(self, Self::Gone | Self::Closed), "no answer, but {self:?} was expected");
            return;
        };
        let text = reply.text();
        let got = (reply.status, reply.complete);
        match self {
            Self::Good => {
                assert_eq!(got, (200, true), "{text}");
                assert!(text == GOOD_BODY || text.ends_with("data: [DONE]\n\n"), "{text}");
                assert!(!text.contains("\"error\""), "{text}");
            }
            Self::Passed(status, retry_after) => {
                assert_eq!((got, &*text), ((status, true), ILL_BODY));
                assert_eq!(reply.header("retry-after"), retry_after);
            }
            Self::Own(status, code) => assert_error(reply, status, code),
            Self::Cut => {
                assert_eq!(got, (200, true), "{text}");
                assert!(text.starts_with(&format!("data: {}\n\n", delta("a"))), "{text}");
                let last = reply.events().pop().unwrap_or_default();
                let error: serde_json::Value = serde_json::from_str(&last).expect("JSON in the last event");
                assert_eq!(error["error"]["code"], "stream_cut", "{text}");
            }
            Self::Truncated => assert_eq!(got, (200, false), "{text}"),
            Self::StreamError => {
                assert_eq!(got, (200, true), "{text}");
                assert!(text.contains("{\"error\"") && !text.contains("stream_cut"), "{text}");
            }
            Self::Gone | Self::Closed => panic!("{} {text}, but nothing was expected", reply.status),
        }
    }
}

impl End {
    const fn new(gets: Gets, outcome: &'static str, attempts: u32) -> Self {
        Self { gets, outcome, attempts: Some(attempts), error: None }
    }

    /// The engine's good answer.
    pub(super) const fn good(attempts: u32) -> Self {
        Self::new(Gets::Good, "ok", attempts)
    }

    /// The engine's own error, passed on.
    pub(super) const fn passed(
        status: u16,
        retry_after: Option<&'static str>,
        outcome: &'static str,
        attempts: u32,
    ) -> Self {
        Self::new(Gets::Passed(status, retry_after), outcome, attempts)
    }

    /// The engine's own error event, passed on.
    pub(super) const fn stream_error(outcome: &'static str, attempts: u32) -> Self {
        Self::new(Gets::StreamError, outcome, attempts)
    }

    /// No engine answered, and we say so.
    pub(super) const fn own(status: u16, code: &'static str, attempts: u32) -> Self {
        Self::new(Gets::Own(status, code), "unreachable", attempts).error(code)
    }

    /// The answer broke off after its first byte.
    pub(super) const fn cut(gets: Gets, error: &'static str) -> Self {
        Self::new(gets, "cut", 1).error(error)
    }

    /// The client has left.
    pub(super) const fn gone(gets: Gets, attempts: Option<u32>) -> Self {
        Self { gets, outcome: "client_gone", attempts, error: None }
    }

    /// The same with an `error` in the log.
    pub(super) const fn error(mut self, error: &'static str) -> Self {
        self.error = Some(error);
        self
    }
}

impl Row {
    fn new(scene: Scene, end: End, seen: usize) -> Self {
        Self {
            scene,
            lines: &BOTH,
            streamed: false,
            upstream: "",
            beside: "",
            limits: "",
            charged: Charged::Prompt,
            ends: vec![end],
            seen,
            retried: None,
            ejected: None,
            next: Next::Unasked,
        }
    }

    /// One of two backends is ill.
    pub(super) fn one(ill: Ill, end: End, seen: usize) -> Self {
        Self { next: Next::Same, ..Self::new(Scene::One(ill), end, seen) }
    }

    /// Both are.
    pub(super) fn both(ill: Ill, end: End, seen: usize) -> Self {
        Self::new(Scene::Both(ill), end, seen)
    }

    /// A client goes.
    pub(super) fn goes(stage: Stage, way: Way, end: End, charged: Charged) -> Self {
        let seen = usize::from(!matches!(stage, Stage::Uploading | Stage::Queued));
        let gets = if way == Way::HalfClose { Gets::Closed } else { end.gets };
        let row = Self::new(Scene::Goes(stage, way), End { gets, ..end }, seen);
        Self { lines: way.line(), streamed: stage != Stage::Waiting, charged, ..row }
    }

    /// A play of its own, with as many requests as there are ends.
    pub(super) fn play(backends: fn(&Gate) -> Vec<Backend>, play: Play, ends: Vec<End>, seen: usize) -> Self {
        let row = Self::new(Scene::Play(backends, play), ends[0], seen);
        Self { ends, charged: Charged::Unseen, ..row }
    }

    /// The same, asking for a stream.
    pub(super) fn streamed(self) -> Self {
        Self { streamed: true, ..self }
    }

    /// The same with further keys of the upstream.
    pub(super) fn upstream(self, upstream: &'static str) -> Self {
        Self { upstream, ..self }
    }

    /// The same with keys of the upstream that the table need not tell.
    pub(super) fn beside(self, beside: &'static str) -> Self {
        Self { beside, ..self }
    }

    /// The same with further sections of the configuration.
    pub(super) fn limits(self, limits: &'static str) -> Self {
        Self { limits, ..self }
    }

    /// The same, over HTTP/1.1 only.
    pub(super) fn over_http1(self) -> Self {
        Self { lines: &[Line::Http1], ..self }
    }

    /// The same, with this charged before the failure.
    pub(super) fn charged(self, charged: Charged) -> Self {
        Self { charged, ..self }
    }

    /// The same, with this `error` in the log.
    pub(super) fn error(mut self, error: &'static str) -> Self {
        self.ends.iter_mut().for_each(|end| *end = end.error(error));
        self
    }

    /// The same, tried again for this reason.
    pub(super) fn retried(self, reason: &'static str) -> Self {
        self.retried_times(1, reason)
    }

    /// The same, tried again so many times in all its requests.
    pub(super) fn retried_times(self, times: u32, reason: &'static str) -> Self {
        Self { retried: Some((reason, times)), ..self }
    }

    /// The same, held against the backend for this reason: the next request goes to the other.
    pub(super) fn ejected(self, reason: &'static str) -> Self {
        let next = if matches!(self.scene, Scene::One(_)) { Next::Other } else { self.next };
        Self { ejected: Some(reason), next, ..self }
    }

    /// The same, with the next request going there.
    pub(super) fn next(self, next: Next) -> Self {
        Self { next, ..self }
    }
}
