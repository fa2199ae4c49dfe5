//! What an operator sees: the metrics, the access log, the traces, and how much else is logged.

pub mod access_log;
pub mod metrics;
mod process;
mod registry;
pub mod traces;
pub mod verbosity;

use std::sync::Arc;

use access_log::AccessLog;
use metrics::Metrics;
use traces::Traces;

use crate::config;

/// Where it is written down what became of each request. Clones share it.
#[derive(Clone)]
pub struct Records {
    /// The line.
    pub access_log: Arc<AccessLog>,
    /// The spans, if somebody wants them.
    pub traces: Option<Arc<Traces>>,
}

impl Records {
    /// Opens them as `config` says.
    ///
    /// # Errors
    /// A lowercase fragment.
    pub fn open(config: &config::Observe, metrics: &Metrics) -> Result<Self, String> {
        let access_log = AccessLog::start().map_err(|e| format!("no thread for the log: {e}"))?;
        let traces = config.traces.as_ref().map(|traces| Traces::new(traces, metrics.exports()));
        let traces = traces.transpose().map_err(|e| format!("observe.traces: {e}"))?.map(Arc::new);
        Ok(Self { access_log, traces })
    }

    /// Writes and tells what is left. Blocks, at most for half a second.
    pub fn finish(&self) {
        if let Some(traces) = &self.traces {
            traces.finish();
        }
        self.access_log.flush();
    }
}

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

    /// Whether no whole good answer came of an engine, through no fault of the client's.
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::EngineError | Self::Cut | Self::Unreachable)
    }

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
