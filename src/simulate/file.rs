//! A trace file: read whole, decompressed if it is zstd, and parsed; or a sentence that says why not.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ruzstd::decoding::StreamingDecoder;

use crate::sim::trace::Trace;

/// Larger than any trace that would be replayed, and small enough to be held.
const LARGEST: u64 = 1 << 30;

/// How a zstd frame begins.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Reads the trace at `path`.
///
/// # Errors
/// `path: why`, or `path:line: why` if it is a line that is not understood.
pub fn read(path: &Path) -> Result<Trace, String> {
    let shown = path.display();
    let text = text(path).map_err(|error| format!("{shown}: {error}"))?;
    Trace::parse(&text).map_err(|fault| format!("{shown}:{fault}"))
}

fn text(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = bounded(File::open(path)?)?;
    if !bytes.starts_with(&ZSTD) {
        return Ok(bytes);
    }
    let mut text = Vec::new();
    let mut rest = bytes.as_slice();
    // Frames may follow each other.
    while !rest.is_empty() {
        let broken = |error: &dyn std::fmt::Display| io::Error::other(format!("broken zstd: {error}"));
        let mut frame = StreamingDecoder::new(&mut rest).map_err(|error| broken(&error))?;
        let left = LARGEST.saturating_sub(text.len() as u64);
        (&mut frame).take(left + 1).read_to_end(&mut text).map_err(|error| broken(&error))?;
        if text.len() as u64 > LARGEST {
            return Err(too_large());
        }
        let decoder = frame.into_frame_decoder();
        let (written, counted) = (decoder.get_checksum_from_data(), decoder.get_calculated_checksum());
        if written.is_some() && written != counted {
            return Err(broken(&"the checksum does not match"));
        }
    }
    Ok(text)
}

fn bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST { Err(too_large()) } else { Ok(bytes) }
}

fn too_large() -> io::Error {
    io::Error::other(format!("more than {LARGEST} bytes"))
}
