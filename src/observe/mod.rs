//! What an operator sees: the metrics, the access log, the traces, and how much else is logged.

pub mod access_log;
pub mod metrics;
mod process;
mod registry;
pub mod traces;
pub mod verbosity;

/// How a request ended, as one word for metrics and log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The engine's answer arrived whole.
    Ok,
    /// The engine answered 4xx.
    ClientError,
    /// The engine answered 5xx, or put an error into its stream.
    EngineError,
    /// The engine's answer broke off after its first byte.
    Cut,
    /// The client left before the end.
    ClientGone,
    /// No engine answered.
    Unreachable,
    /// We refused the request before an engine saw it.
    Refused,
    /// We answered it ourselves.
    Local,
}

impl Outcome {
    /// Every outcome, in the order of the counters.
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::ClientError,
        Self::EngineError,
        Self::Cut,
        Self::ClientGone,
        Self::Unreachable,
        Self::Refused,
        Self::Local,
    ];

    /// The label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::EngineError => "engine_error",
            Self::Cut => "cut",
            Self::ClientGone => "client_gone",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Local => "local",
        }
    }
}
