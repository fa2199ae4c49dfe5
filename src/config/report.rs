//! Everything that is wrong with a configuration file, as its author sees it.
//!
//! ```text
//! error: unknown key `max_fail`
//!   --> conf/prod.yaml:14:5 (upstreams.llama)
//! 14 |     max_fail: 3
//!    |     ^^^^^^^^ did you mean `max_fails`?
//! ```
//!
//! A problem says what is wrong, where, and what to write instead; in the order of the file, all of them at
//! once.

use std::fmt::{self, Write as _};

use super::place::{Place, lines};
use super::tree::{KEYS, Path, Step, names_secret};

/// A problem that is not placed yet: what the checks find.
#[derive(Clone, Debug)]
pub(super) struct Flaw {
    /// What it is about.
    pub(super) path: Path,
    /// Whether the key at the end of the path is to blame, or missing below; else its value.
    pub(super) on_key: bool,
    /// A lowercase fragment.
    pub(super) message: String,
    /// What to write instead; empty if there is nothing to say.
    pub(super) hint: String,
}

/// One thing that is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    message: String,
    /// What the message is about: `upstreams.llama`; empty for the whole file.
    path: String,
    /// `None` if the file could not be read.
    place: Option<Place>,
    hint: String,
}

impl Problem {
    /// A problem of the file as a whole.
    pub(super) fn of_file(message: String) -> Self {
        Self { message, path: String::new(), place: None, hint: String::new() }
    }

    /// A problem of the text at `place`.
    pub(super) fn of_text(message: String, hint: String, place: Place) -> Self {
        Self { message, path: String::new(), place: Some(place), hint }
    }

    /// `flaw`, found in `text`.
    pub(super) fn placed(flaw: Flaw, text: &str) -> Self {
        let place = Place::of_path(text, &flaw.path, flaw.on_key);
        let last_is_key = matches!(flaw.path.0.last(), Some(Step::Key(_)));
        let about = if flaw.on_key && last_is_key { flaw.path.parent() } else { flaw.path };
        Self { message: flaw.message, path: about.to_string(), place: Some(place), hint: flaw.hint }
    }

    /// What is wrong: a lowercase fragment.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Line and column, in characters, counted from 1; `None` if the file could not be read at all.
    pub fn place(&self) -> Option<(usize, usize)> {
        self.place.map(|place| (place.line, place.column))
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, name: &str, text: &str) -> fmt::Result {
        write!(f, "error: {}\n  --> {name}", printable(&self.message))?;
        let Some(Place { line, column }) = self.place else { return Ok(()) };
        write!(f, ":{line}:{column}")?;
        if !self.path.is_empty() {
            write!(f, " ({})", printable(&self.path))?;
        }
        let Some(source) = lines(text).nth(line - 1) else { return Ok(()) };
        let may_hold_secret =
            names_secret(&self.path) || self.path.split('.').next() == Some(KEYS) || names_secret(source);
        if may_hold_secret || source.chars().count() > WIDEST_LINE {
            return if self.hint.is_empty() { Ok(()) } else { write!(f, "\n  {}", printable(&self.hint)) };
        }
        let gutter = line.to_string().len();
        let margin: String =
            source.chars().take(column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let carets = "^".repeat(extent(source, column));
        write!(f, "\n{line} | {}\n{:gutter$} | {margin}{carets}", printable(source), "")?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, " {}", printable(&self.hint)) }
    }
}

/// A source line longer than this, in characters, is not shown.
const WIDEST_LINE: usize = 240;

/// All problems of one file, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    name: String,
    text: String,
    problems: Vec<Problem>,
}

impl Report {
    /// The problems of the file `name` that holds `text`.
    pub(super) fn new(name: &str, text: &str, mut problems: Vec<Problem>) -> Self {
        // The parser complains of an end that comes too soon on the line after the last.
        let end = Place::end_of(text);
        for problem in &mut problems {
            problem.place = problem.place.map(|place| place.min(end));
        }
        problems.sort_by_key(|problem| problem.place);
        Self { name: name.to_owned(), text: text.to_owned(), problems }
    }

    /// The problems, in the order of the file.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.problems.iter().enumerate() {
            if n > 0 {
                f.write_char('\n')?;
            }
            problem.write(f, &self.name, &self.text)?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

/// What the reader should try: the nearest known name, or all of them.
pub(super) fn suggestion<S: AsRef<str>>(written: &str, known: &[S]) -> String {
    match nearest(written, known) {
        Some(name) => format!("did you mean `{name}`?"),
        None if known.is_empty() => String::new(),
        None => format!("known: {}", super::decode::listed(known)),
    }
}

/// The name that was probably meant: few letters away, or begun in the same way.
pub(crate) fn nearest<'a, S: AsRef<str>>(written: &str, known: &'a [S]) -> Option<&'a str> {
    let names = || known.iter().map(AsRef::as_ref);
    let near = names()
        .map(|name| (distance(written, name), name))
        .filter(|(distance, name)| *distance <= name.chars().count().div_ceil(3))
        .min_by_key(|(distance, _)| *distance);
    let begun = || names().find(|name| written.len() >= 4 && name.starts_with(written));
    near.map(|(_, name)| name).or_else(begun)
}

/// Letters to insert, remove, replace or swap with their neighbour to get from `a` to `b`, whatever their
/// case.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().take(LONGEST_NAME).collect();
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut before = vec![0; b.len() + 1];
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

/// What is written longer than this, in characters, resembles no name we know.
const LONGEST_NAME: usize = 64;

/// How many characters of `line`, from `column` on, belong to what begins there: a quoted string, a bracket
/// with all that it holds, or a word up to `: `, a comment or (in brackets) a comma. At least 1.
fn extent(line: &str, column: usize) -> usize {
    let chars: Vec<char> = line.chars().skip(column - 1).collect();
    let in_brackets = line.chars().take(column - 1).any(|c| matches!(c, '[' | '{'));
    let mut depth = 0_usize;
    let mut quote = None;
    let mut end = chars.len();
    for (n, &c) in chars.iter().enumerate() {
        let next_is_blank = chars.get(n + 1).is_none_or(|c| c.is_whitespace());
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some(_), _) => continue,
            (None, '"' | '\'') if n == 0 || depth > 0 => quote = Some(c),
            (None, '[' | '{') if n == 0 || depth > 0 => depth += 1,
            (None, ']' | '}') if depth > 0 => depth -= 1,
            (None, ',' | ']' | '}') if in_brackets && depth == 0 => end = n,
            (None, ':') if depth == 0 && next_is_blank => end = n,
            (None, '#') if n > 0 && chars[n - 1].is_whitespace() => end = n,
            _ => continue,
        }
        if end == n {
            break;
        }
        if depth == 0 && quote.is_none() {
            end = n + 1;
            break;
        }
    }
    chars[..end].iter().collect::<String>().trim_end().chars().count().max(1)
}

/// `text` without characters that a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_miss_is_suggested_and_anything_else_gets_the_list() {
        let known = ["max_fails", "fail_timeout", "poll"];
        assert_eq!(suggestion("max_fail", &known), "did you mean `max_fails`?");
        assert_eq!(suggestion("fial_timeout", &known), "did you mean `fail_timeout`?");
        assert_eq!(suggestion("Poll", &known), "did you mean `poll`?");
        assert_eq!(suggestion("least_conn", &["least_connections"]), "did you mean `least_connections`?");
        assert_eq!(suggestion("keepalive", &known), "known: `max_fails`, `fail_timeout`, `poll`");
        assert_eq!(suggestion::<&str>("x", &[]), "");
    }

    #[test]
    fn a_swap_of_neighbours_is_one_mistake() {
        assert_eq!(distance("tiemout", "timeout"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }

    #[test]
    fn carets_cover_what_is_meant_and_no_more() {
        let covered = |line: &str, column: usize| -> String {
            line.chars().skip(column - 1).take(extent(line, column)).collect()
        };
        assert_eq!(covered("  max_fail: 3", 3), "max_fail");
        assert_eq!(covered("a: 10.0.0.1:8000  # one", 4), "10.0.0.1:8000");
        assert_eq!(covered("t: { connect: 5, send: 6 }", 15), "5");
        assert_eq!(covered("t: { connect: 5, send: 6 } # x", 4), "{ connect: 5, send: 6 }");
        assert_eq!(covered("m: [a, [b, 'c]']]", 4), "[a, [b, 'c]']]");
        assert_eq!(covered("m: 'it: is' # x", 4), "'it: is'");
        assert_eq!(covered("m: a, b", 4), "a, b");
        assert_eq!(extent("m:", 3), 1, "at the end of the line");
    }

    #[test]
    fn a_secret_written_where_its_source_belongs_is_not_shown() {
        for api_key in ["hunter2", "\n      hunter2", "[hunter2]", "{ env: [hunter2] }", "&x !y hunter2"] {
            for key in ["upstreams:\n  u:\n    api_key", "admin:\n  address: localhost:1\n  token"] {
                let text = format!("{key}: {api_key}\n");
                let policies = crate::policy::Policies::default();
                let report = crate::config::parse("x.yaml", &text, std::path::Path::new(""), &policies);
                let shown = report.unwrap_err().to_string();
                assert!(!shown.contains("hunter2"), "{shown}");
                assert!(shown.contains(":3:") || shown.contains(":4:"), "{shown}");
            }
        }
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let problem = Problem::of_text("found \u{1b}[2J".to_owned(), String::new(), Place::START);
        let shown = Report::new("x.yaml", "\u{1b}]0;x", vec![problem]).to_string();
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
    }
}
