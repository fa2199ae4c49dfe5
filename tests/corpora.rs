//! What the fuzzer found worth keeping, tried again: every file of `tests/fuzz/corpus/<target>/` against the property
//! of its target.
//!
//! To try one file, such as a fresh finding: `PLIMSOLL_INPUT=path cargo test --test corpora <target>`.

#[path = "fuzz/properties/mod.rs"]
pub mod properties;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// Inputs that each target has, at least.
const FEWEST: usize = 15;

/// Tries every input of `target`, and says of which the property does not hold.
fn replay(target: &str, holds: fn(&[u8])) {
    let given = std::env::var_os("PLIMSOLL_INPUT").map(PathBuf::from);
    let inputs = given.map_or_else(|| corpus(target), |path| vec![path]);
    let fails = |path: &&PathBuf| {
        let bytes = std::fs::read(path).expect("an input can be read");
        catch_unwind(AssertUnwindSafe(|| holds(&bytes))).is_err()
    };
    let failed: Vec<&PathBuf> = inputs.iter().filter(fails).collect();
    assert!(failed.is_empty(), "the property of `{target}` does not hold of {failed:#?}");
}

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "fuzz", "corpus", target].iter().collect();
    let entries = std::fs::read_dir(folder).expect("the corpus is there");
    let mut inputs: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    inputs.sort();
    assert!(inputs.len() >= FEWEST, "only {} inputs", inputs.len());
    inputs
}

#[test]
fn config() {
    replay("config", properties::config::holds);
}

#[test]
fn digest() {
    replay("digest", properties::digest::holds);
}

#[test]
fn metrics() {
    replay("metrics", properties::metrics::holds);
}

#[test]
fn preface() {
    replay("preface", properties::preface::holds);
}

#[test]
fn request() {
    replay("request", properties::request::holds);
}

#[test]
fn stream() {
    replay("stream", properties::stream::holds);
}
