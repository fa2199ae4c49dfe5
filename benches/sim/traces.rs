//! The recorded traces, which lie beside the repository and not in it.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use plimsoll::sim::trace::Trace;
use ruzstd::decoding::StreamingDecoder;

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
    let bytes = std::fs::read(&path).ok()?;
    let mut text = Vec::new();
    let trace = StreamingDecoder::new(bytes.as_slice())
        .map_err(|error| error.to_string())
        .and_then(|mut frame| frame.read_to_end(&mut text).map_err(|error| error.to_string()))
        .and_then(|_| Trace::parse(&text).map_err(|fault| fault.to_string()));
    match trace {
        Ok(trace) => Some(trace),
        Err(why) => panic!("{}: {why}", path.display()),
    }
}
