//! What engines and balancer say of themselves: pages of metrics, and the access log.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use plimsoll::demo::client;

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

/// Prompt tokens of which the balancer expected, when it chose, that the chosen engine had them cached.
pub fn expected_hits(log: &Path) -> io::Result<u64> {
    let log = fs::read_to_string(log)?;
    let matched = log.lines().filter_map(|line| line.split_once(" matched_est="));
    Ok(matched.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok()).sum())
}
