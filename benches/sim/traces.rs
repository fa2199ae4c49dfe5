//! The recorded traces, which lie beside the repository and not in it.

use std::path::{Path, PathBuf};

use plimsoll::sim::trace::Trace;
use plimsoll::simulate::file;

/// Where they are looked for.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/traces")
}

/// The trace called `name`; nothing if its file is not there.
///
/// # Panics
/// If the file is there and is no trace.
pub fn read(name: &str) -> Option<Trace> {
    let path = folder().join(format!("{name}.jsonl.zst"));
    if !path.exists() {
        return None;
    }
    match file::read(&path) {
        Ok(trace) => Some(trace),
        Err(why) => panic!("{why}"),
    }
}
