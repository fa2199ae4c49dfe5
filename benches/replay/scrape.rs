//! What engines and balancer say of themselves on their pages of metrics. `benches/endure` reads them so, too.

use std::io;
use std::net::SocketAddr;

use plimsoll::demo::client;

/// What must be zero when nothing is in flight.
const GAUGES: [&str; 5] = [
    "plimsoll_pending_tokens",
    "plimsoll_active_requests",
    "plimsoll_context_tokens",
    "plimsoll_buffered_body_bytes",
    "plimsoll_queued_requests",
];

/// The page of metrics at `address`.
pub async fn page(address: SocketAddr) -> io::Result<String> {
    client::send(address, "GET", "/metrics", "").await?.text().await
}

/// The sum of all samples of `name` whose labels contain `label`; nothing if there is none.
pub fn sum(page: &str, name: &str, label: &str) -> Option<f64> {
    let values = page.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (series, labels) = series.split_once('{').unwrap_or((series, ""));
        (series == name && labels.contains(label)).then(|| value.parse::<f64>().ok())?
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// What must be zero when nothing is in flight, and is not.
pub fn owed(page: &str) -> Vec<String> {
    let owed =
        GAUGES.into_iter().map(|gauge| (gauge, sum(page, gauge, ""))).filter(|(_, sum)| *sum != Some(0.0));
    owed.map(|(gauge, sum)| format!("{gauge} is {sum:?}, not 0")).collect()
}
