//! A scrape of an engine: line by line, written out and read again the same, and no number that no whole line says.

use std::fmt::Write as _;

use plimsoll::engine::{Engine, Reading, Sample, read, samples};

/// Holds of any scrape.
pub fn holds(scrape: &[u8]) {
    let text = String::from_utf8_lossy(scrape);
    let all: Vec<String> = samples(&text).map(written).collect();
    let by_line: Vec<String> = text.split_inclusive('\n').flat_map(samples).map(written).collect();
    assert_eq!(all, by_line, "a line means the same alone");
    let again: String = all.concat();
    assert_eq!(samples(&again).map(written).collect::<Vec<_>>(), all, "what was read, written out");

    let sum = scrape.iter().map(|&byte| usize::from(byte)).sum::<usize>();
    for cut in [text.len().saturating_sub(1), sum % (text.len() + 1)] {
        let Some(cut) = text.get(..cut) else { continue };
        let kept: Vec<String> = samples(cut).map(written).collect();
        assert!(all.starts_with(&kept), "a text that was cut says what the whole one does not");
    }
    for engine in Engine::ALL {
        let reading = read(engine, &text);
        assert_eq!(reading, read(engine, &text));
        makes_sense(&reading);
        let blank = format!("# TYPE a gauge\n\n{text}");
        assert_eq!(read(engine, &blank), reading, "comments and empty lines are nothing");
    }
    assert_eq!(read(Engine::Openai, &text).running, None, "it has no metrics");
}

fn makes_sense(reading: &Reading) {
    let Reading { kv_usage, process_start, .. } = reading;
    assert!(kv_usage.is_none_or(|usage| (0.0..=1.0).contains(&usage)), "{reading:?}");
    assert!(process_start.is_none_or(|start| start.is_finite() && start >= 0.0), "{reading:?}");
}

/// The line that says this sample, by the book.
fn written(sample: Sample<'_>) -> String {
    let first = sample.name.bytes().next().expect("a name");
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
    assert!(!first.is_ascii_digit() && sample.name.bytes().all(is_name), "{:?}", sample.name);
    let mut line = format!("{}{{", sample.name);
    for (name, value) in sample.labels.iter() {
        assert!(sample.labels.value(name).is_some());
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        write!(line, "{name}=\"{value}\",").expect("a string takes all");
    }
    writeln!(line, "}} {}", sample.value).expect("a string takes all");
    line
}
