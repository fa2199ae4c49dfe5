//! The recorded answers of real engines, for the tests of this room.

use std::path::PathBuf;

/// The folder of the captures.
fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "captures"].iter().collect()
}

/// The body of a captured answer, its chunk framing removed.
pub(super) fn body(file: &str) -> Vec<u8> {
    parse(&std::fs::read(folder().join(file)).unwrap()).1
}

/// Every captured event stream: its path and its body.
pub(super) fn streams() -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for engine in std::fs::read_dir(folder()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        for file in std::fs::read_dir(engine.path()).unwrap().flatten() {
            let path = file.path();
            if path.extension().is_some_and(|extension| extension == "http") {
                let (head, body) = parse(&std::fs::read(&path).unwrap());
                if head.to_ascii_lowercase().contains("content-type: text/event-stream") {
                    found.push((path.display().to_string(), body));
                }
            }
        }
    }
    found
}

fn parse(answer: &[u8]) -> (String, Vec<u8>) {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return (String::new(), Vec::new());
    };
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let mut rest = &answer[end + 4..];
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (head, rest.to_vec());
    }
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap().trim(), 16).unwrap();
        let chunk = &rest[end + 2..];
        body.extend_from_slice(&chunk[..size.min(chunk.len())]);
        rest = chunk.get(size + 2..).unwrap_or_default();
    }
    (head, body)
}
