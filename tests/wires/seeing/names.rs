//! The names of metrics in an expression, and whether there are such metrics.

use super::table::{rows, series};

/// Fails if `expression` names a metric of ours, or of the process, that nobody registers; or none at all.
pub(super) fn assert_known(expression: &str) {
    let known: Vec<String> = rows().iter().flat_map(series).collect();
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let names: Vec<&str> = words
        .filter(|word| *word == "up" || word.starts_with("plimsoll_") || word.starts_with("process_"))
        .collect();
    assert!(!names.is_empty(), "no metric in `{expression}`");
    for name in names {
        assert!(name == "up" || known.iter().any(|known| known == name), "no metric {name}: `{expression}`");
    }
}

#[test]
fn a_name_that_nobody_registers_is_found() {
    assert_known("up == 0 and sum(rate(plimsoll_ttft_seconds_bucket[5m]))");
    for wrong in ["plimsoll_ttft_seconds", "rate(plimsoll_request_total[1m])", "process_fds", "vector(1)"] {
        assert!(std::panic::catch_unwind(|| assert_known(wrong)).is_err(), "{wrong}");
    }
}
