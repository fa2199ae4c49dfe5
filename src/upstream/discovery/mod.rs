//! Which backends are there? DNS says it, or a file that somebody else writes.
//!
//! A [`Source`] is a `ServiceDiscovery` of Pingora's that also knows how long its answer holds. One task for each
//! upstream that discovers asks it again and again, and this is what it makes of the answers:
//!
//! * A good one becomes the view of the upstream, if it says anything new.
//! * A failure, or an answer without backends, changes nothing: an upstream loses no backend because a name server
//!   does, or because a file is half written. It is counted each time, and logged when it begins and when it ends.
//!
//! A start waits for the first answer, but not for long ([`FIRST_ANSWER`]): the process then begins without backends,
//! is not ready, and takes them up when they come.

mod dns;
mod file;

use std::fmt::Display;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use pingora_load_balancing::discovery::ServiceDiscovery;

use super::{Member, Upstream};
use crate::config;
use crate::observe::metrics::DiscoveryMetrics;

/// How long a start, or a reload that names another source, waits for the answers of the sources that are new.
const FIRST_ANSWER: Duration = Duration::from_secs(5);

/// After an answer that is of no use it is asked again so soon, or after its interval if that is shorter.
const AGAIN: Duration = Duration::from_secs(5);

/// Says which backends an upstream has.
pub trait Source: ServiceDiscovery + Send + Sync {
    /// How long its last answer holds.
    fn holds_for(&self) -> Duration;
}

/// The source that `config` describes.
pub fn source(config: &config::Discover) -> Arc<dyn Source> {
    match &config.file {
        Some(path) => Arc::new(file::File::new(path.clone(), config.interval())),
        None => Arc::new(dns::Dns::new(config)),
    }
}

/// Where the backends of an upstream come from, and which they are at first.
pub struct Origin {
    /// Those that are there at first; none are those that there were before.
    pub members: Vec<Member>,
    /// Who says which there are from then on; `None` if they stay.
    pub source: Option<Arc<dyn Source>>,
}

/// What each source says at first; none if it says nothing good within [`FIRST_ANSWER`]. Blocks: it is not for a thread
/// that serves requests.
///
/// # Errors
/// There is no runtime to be had.
pub fn first_answers(sources: &[Arc<dyn Source>]) -> std::io::Result<Vec<Vec<Member>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let first = async |source: &Arc<dyn Source>| {
        let answer = tokio::time::timeout(FIRST_ANSWER, ask(source.as_ref())).await;
        match answer {
            Ok(Answer::Members(members)) => members,
            // What is wrong is told by the task that asks again.
            Ok(Answer::Useless(..)) | Err(_) => Vec::new(),
        }
    };
    let answers = runtime.block_on(join_all(sources.iter().map(first)));
    // A file or a name that hangs is left to itself.
    runtime.shutdown_background();
    Ok(answers)
}

/// What a source said.
enum Answer {
    /// These, at least one.
    Members(Vec<Member>),
    /// Nothing that could be used: the result, as it is counted, and why.
    Useless(&'static str, String),
}

async fn ask(source: &dyn Source) -> Answer {
    match source.discover().await {
        Ok((backends, _)) if backends.is_empty() => {
            Answer::Useless("empty", "an answer without backends".to_owned())
        }
        Ok((backends, _)) => {
            let mut members: Vec<Member> = backends.iter().filter_map(Member::of).collect();
            members.sort_by_key(|member| member.address);
            members.dedup_by_key(|member| member.address);
            Answer::Members(members)
        }
        Err(e) => Answer::Useless("failed", e.context.as_ref().map_or("", |why| why.as_str()).to_owned()),
    }
}

/// Keeps the backends of `upstream` as `source` says.
pub(super) async fn run(upstream: &Upstream, source: &dyn Source, metrics: &DiscoveryMetrics) {
    let mut trouble: Option<String> = None;
    let of = upstream.config.discover.as_ref().map(ToString::to_string).unwrap_or_default();
    let name = &upstream.name;
    loop {
        let result = match ask(source).await {
            Answer::Members(members) => {
                upstream.replace(members);
                if trouble.take().is_some() {
                    log::info!("discovery working again upstream={name} source={of:?}");
                }
                "ok"
            }
            Answer::Useless(result, why) => {
                if trouble.as_ref() != Some(&why) {
                    // What is wrong with a file has several lines.
                    let shown =
                        if why.contains('\n') { format!("\n{why}") } else { format!(" error={why:?}") };
                    log::warn!("discovery failing, backends stay upstream={name} source={of:?}{shown}");
                    trouble = Some(why);
                }
                result
            }
        };
        metrics.count(result);
        tokio::time::sleep(source.holds_for()).await;
    }
}

/// The addresses of `backends`; a name with several addresses is several backends. Blocks.
///
/// # Errors
/// The first name that does not resolve.
pub fn resolve(backends: &[config::Backend]) -> Result<Vec<Member>, String> {
    let mut members: Vec<Member> = Vec::new();
    for backend in backends {
        let unresolved = |e: &dyn Display| format!("backend {} does not resolve: {e}", backend.address);
        for address in backend.address.to_socket_addrs().map_err(|e| unresolved(&e))? {
            if !members.iter().any(|known| known.address == address) {
                let host = backend.address.rsplit_once(':').map_or("", |(host, _)| host);
                members.push(Member { address, weight: backend.weight, host: host.to_owned() });
            }
        }
    }
    Ok(members)
}

/// What went wrong, as an error of Pingora's.
fn failed<T>(why: String) -> pingora::Result<T> {
    pingora::Error::e_explain(pingora::ErrorType::Custom("discovery"), why)
}
