//! A configuration: read the same twice, every problem inside the text, and nothing in a message that a terminal obeys.

use std::path::Path;

use plimsoll::config::{Config, Report, parse};
use plimsoll::policy::Policies;

/// Where no file is.
const FOLDER: &str = "/nowhere/that/is/there";

/// Holds of any text that names no device: to read some of those never ends.
pub fn holds(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    if ["/dev", "/proc", "/sys"].iter().any(|folder| text.contains(folder)) {
        return;
    }
    let first = read(text);
    assert_eq!(first, read(text), "the same text, another meaning");
    // A byte order mark stands only at the very start.
    let plain = text.strip_prefix('\u{feff}').unwrap_or(text);
    let below = (!plain.starts_with('\u{feff}')).then(|| read(&format!("# a comment\n{plain}")));
    match (first, below) {
        (Ok(config), below) => assert!(below.is_none_or(|below| below == Ok(config))),
        (Err(report), below) => {
            is_placed(&report, text);
            is_printable(&report);
            match below {
                Some(Ok(_)) => panic!("a comment in front makes it sound: {report}"),
                Some(Err(below)) => moves_down(&report, &below),
                None => {}
            }
        }
    }
}

fn read(text: &str) -> Result<Config, Report> {
    parse("fuzz.yaml", text, Path::new(FOLDER), &Policies::default())
}

fn is_placed(report: &Report, text: &str) {
    assert!(!report.problems().is_empty(), "refused without a problem");
    let lines = lines(text);
    let mut last = None;
    for problem in report.problems() {
        let place = problem.place().unwrap_or_else(|| panic!("no place: {problem:?}"));
        let source = lines.get(place.0 - 1).unwrap_or_else(|| panic!("no such line: {problem:?}"));
        assert!((1..=source.chars().count() + 1).contains(&place.1), "no such column: {problem:?}");
        assert!(last <= Some(place), "not in the order of the file");
        last = Some(place);
    }
}

/// The lines of `text`, as YAML cuts them.
fn lines(text: &str) -> Vec<&str> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines = vec![];
    let mut rest = text;
    while let Some(end) = rest.find(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']) {
        lines.push(&rest[..end]);
        let width = rest[end..].chars().next().map_or(0, char::len_utf8);
        rest = rest[end..].strip_prefix("\r\n").unwrap_or_else(|| &rest[end + width..]);
    }
    lines.push(rest);
    lines
}

/// No line of a message but those that stand there on purpose, and no escape sequence.
fn is_printable(report: &Report) {
    let shown = report.to_string();
    assert!(shown.starts_with("error: "));
    let obeyed = shown.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t'));
    assert_eq!(obeyed, None, "{shown:?}");
}

/// A comment in front moves every problem by one line, and changes none.
fn moves_down(report: &Report, below: &Report) {
    let words = |report: &Report| -> Vec<String> {
        // The parser is terser on the first line.
        let first = |message: &str| message.split(", while ").next().unwrap_or_default().to_owned();
        let mut words: Vec<String> = report.problems().iter().map(|p| first(p.message())).collect();
        words.sort();
        words
    };
    assert_eq!(words(report), words(below));
    for (problem, moved) in report.problems().iter().zip(below.problems()) {
        let (Some((line, column)), Some(to)) = (problem.place(), moved.place()) else { continue };
        // What is wrong with the file as a whole stands at its start.
        assert!(to == (line + 1, column) || to == (1, 1), "{problem:?} moves to {moved:?}");
    }
}
