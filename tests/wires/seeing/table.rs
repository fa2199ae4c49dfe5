//! The tables of `docs/metrics.md`: written by this, compared by this.

use crate::support::client::Request;
use crate::support::engine::Engine;
use crate::support::metrics::Metrics;
use crate::support::proxy::{Proxy, folder};
use crate::support::tls::write_secret;
use crate::support::{upstream, wait_until};
use plimsoll::observe::metrics::{self, Row};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// How to write them.
const HOW: &str = "PLIMSOLL_WRITE=1 cargo test --test wires seeing::table";

/// The labels whose values are fixed.
const FIXED: [&str; 5] = ["outcome", "kind", "reason", "code", "result"];

/// Every metric that the program registers.
pub(super) fn rows() -> Vec<Row> {
    metrics::Metrics::new().expect("one metric of each name").rows()
}

/// The names under which a metric has series.
pub(super) fn series(row: &Row) -> Vec<String> {
    match row.kind {
        "histogram" => ["bucket", "sum", "count"].map(|end| format!("{}_{end}", row.name)).into(),
        _ => vec![row.name.clone()],
    }
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md")
}

/// A scrape of a proxy that has everything that metrics are about, and has served nobody.
async fn at_rest() -> Metrics {
    let (engine, folder) = (Engine::good(), folder());
    engine.set_readings(1, 2, 0.5);
    write_secret(&folder.join("key"), "a-key-of-32-characters-0123456789");
    let keys = format!("keys: {{ team: {{ file: {} }} }}\n", folder.join("key").display());
    let upstream = upstream(&[engine.address()], "engine: vllm, models: any, poll: { interval: 10ms }");
    std::fs::write(folder.join("backends.json"), format!("[\"{}\"]", engine.address()))
        .expect("a folder of ours");
    let found = format!(
        "{{ discover: {{ file: {} }}, models: [found], probe: off, poll: off }}",
        folder.join("backends.json").display()
    );
    let proxy = Proxy::start(&format!("{keys}upstreams: {{ llm: {upstream}, found: {found} }}\n")).await;
    wait_until("a reading", async || proxy.metrics().await.has("plimsoll_engine_waiting", &[])).await;
    let answer = proxy.admin(&Request::get("/metrics")).await;
    Metrics::parse(&answer.text())
}

#[tokio::test]
async fn every_series_is_there_before_the_first_request() {
    let scrape = at_rest().await;
    for row in rows() {
        for name in series(&row) {
            assert!(scrape.has(&name, &[]), "no {name} before the first request");
        }
    }
    for name in ["requests", "attempts", "retries", "ejections", "choices", "tokens", "key_requests"] {
        assert_eq!(scrape.sum(&format!("plimsoll_{name}_total"), &[]), 0.0, "{name}");
    }
}

#[tokio::test]
async fn the_docs_say_what_the_program_registers() {
    let file = std::fs::read_to_string(path()).expect("docs/metrics.md");
    let rows = rows();
    let wanted = between(&file, "metrics", &table(&rows));
    let wanted = between(&wanted, "labels", &labels(&rows, &at_rest().await));
    if std::env::var_os("PLIMSOLL_WRITE").is_some() {
        std::fs::write(path(), wanted).expect("docs/ is writable");
        return;
    }
    let differs = file.lines().zip(wanted.lines()).find(|(is, should)| is != should);
    assert!(
        file == wanted,
        "docs/metrics.md is not what the program registers; write it: {HOW}\n{differs:#?}"
    );
}

/// `file` with `text` between the marks of that name.
fn between(file: &str, name: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let (before, rest) = file.split_once(&begin).expect("the beginning of a table");
    let (_, after) = rest.split_once(&end).expect("the end of a table");
    format!("{before}{begin}\n{text}\n{end}{after}")
}

fn table(rows: &[Row]) -> String {
    let mut text = "| name | type | labels | meaning | unit |\n|---|---|---|---|---|\n".to_owned();
    for row in rows {
        let labels: Vec<_> = row.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, kind, help, unit) = (&row.name, row.kind, &row.help, row.unit());
        writeln!(text, "| `{name}` | {kind} | {} | {help} | {unit} |", labels.join(" ")).expect("a string");
    }
    text
}

/// What each fixed label of each metric can be; metrics that agree share a row.
fn labels(rows: &[Row], scrape: &Metrics) -> String {
    let mut sets: Vec<(&str, Vec<String>, Vec<&str>)> = Vec::new();
    for row in rows {
        for label in FIXED.iter().filter(|label| row.labels.iter().any(|has| has == *label)) {
            let values = scrape.values(&row.name, label);
            match sets.iter_mut().find(|(of, known, _)| of == label && *known == values) {
                Some((_, _, names)) => names.push(&row.name),
                None => sets.push((label, values, vec![&row.name])),
            }
        }
    }
    let mut text = "| label | of | values |\n|---|---|---|\n".to_owned();
    let quoted = |words: &[&str]| words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" ");
    for (label, values, names) in sets {
        let values: Vec<_> = values.iter().map(String::as_str).collect();
        writeln!(text, "| `{label}` | {} | {} |", quoted(&names), quoted(&values)).expect("a string");
    }
    text
}
