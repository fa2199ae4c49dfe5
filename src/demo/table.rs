//! The live table: what the balancer owes each engine, what each has cached, and how long users wait.
//!
//! A [`Board`] collects sightings and readings and turns into text without touching the terminal; a
//! [`Screen`] redraws that text in place on a terminal and prints only the last state of it anywhere else.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use super::balancer::Owed;
use super::traffic::Sighting;
use crate::sim::report::Samples;

/// Width of the bar of pending tokens, and what a full one stands for.
const BAR_CELLS: u64 = 12;
const BAR_TOKENS: u64 = 60_000;

/// Everything seen under one policy.
#[derive(Clone, Debug)]
pub(super) struct Board {
    pub(super) policy: &'static str,
    rows: Vec<Row>,
    sent: u64,
    answered: u64,
    failures: Vec<String>,
    /// From the start to the last complete answer.
    lasted: Duration,
}

#[derive(Clone, Debug, Default)]
struct Row {
    backend: String,
    owed: Owed,
    peak_tokens: u64,
    chosen: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    first_token: Samples,
}

/// The figures a policy is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Verdict {
    /// Time to the first token: p50, p90, p99.
    pub(super) first_token: [Duration; 3],
    /// Share of prompt tokens that were cached, 0..=1.
    pub(super) hits: f64,
    /// Tokens generated per second.
    pub(super) output_rate: f64,
    /// Requests answered.
    pub(super) answered: u64,
    /// Requests that failed.
    pub(super) failed: usize,
}

impl Board {
    pub(super) fn new(policy: &'static str, backends: impl IntoIterator<Item = String>) -> Self {
        let rows = backends.into_iter().map(|backend| Row { backend, ..Row::default() }).collect();
        Self { policy, rows, sent: 0, answered: 0, failures: Vec::new(), lasted: Duration::ZERO }
    }

    /// Requests sent and not yet answered.
    pub(super) fn in_flight(&self) -> u64 {
        self.sent.saturating_sub(self.answered + self.failures.len() as u64)
    }

    /// The first failure, as an example.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failures.first().map(String::as_str)
    }

    /// Books what a client saw, `elapsed` after the start.
    pub(super) fn see(&mut self, sighting: Sighting, elapsed: Duration) {
        match sighting {
            Sighting::Sent => self.sent += 1,
            Sighting::Failed(problem) => self.failures.push(problem),
            Sighting::First { backend, after } => {
                if let Some(row) = self.row(&backend) {
                    row.chosen += 1;
                    row.first_token.push(after);
                }
            }
            Sighting::Done { backend, usage } => {
                self.answered += 1;
                self.lasted = elapsed;
                if let Some(row) = self.row(&backend) {
                    row.prompt_tokens += usage.prompt_tokens;
                    row.cached_tokens += usage.cached_tokens();
                    row.output_tokens += usage.completion_tokens;
                }
            }
        }
    }

    /// Books what the balancer says it owes a backend.
    pub(super) fn read(&mut self, backend: &str, owed: Owed) {
        if let Some(row) = self.row(backend) {
            row.owed = owed;
            row.peak_tokens = row.peak_tokens.max(owed.pending_tokens);
        }
    }

    /// The figures so far.
    pub(super) fn verdict(&self) -> Verdict {
        let all = self.total();
        Verdict {
            first_token: all.first_token.quantiles([0.5, 0.9, 0.99]).unwrap_or_default(),
            hits: ratio(all.cached_tokens, all.prompt_tokens),
            output_rate: all.output_tokens as f64 / self.lasted.as_secs_f64().max(1e-3),
            answered: self.answered,
            failed: self.failures.len(),
        }
    }

    /// The table as lines of text, `elapsed` after the start of `length`.
    pub(super) fn text(&self, elapsed: Duration, length: Duration) -> String {
        let phase = if elapsed < length {
            format!("{:.0} s of {} s", elapsed.as_secs_f64(), length.as_secs())
        } else if self.in_flight() > 0 {
            "last answers".to_owned()
        } else {
            "done".to_owned()
        };
        let mut text = format!(
            "{}: {phase}, {} requests sent, {} in flight, {} failed\n",
            self.policy,
            self.sent,
            self.in_flight(),
            self.failures.len()
        );
        let _ = writeln!(
            text,
            "  {:<16} {:<12} {:>9} {:>9} {:>7} {:>7} {:>7} {:>10} {:>10}",
            "backend", "", "pending", "peak", "active", "share", "hits", "TTFT p50", "TTFT p99"
        );
        let total = self.total();
        for row in self.rows.iter().chain([&total]) {
            row.write(&mut text, total.chosen);
        }
        text
    }

    fn row(&mut self, backend: &str) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.backend == backend)
    }

    fn total(&self) -> Row {
        let mut total = Row { backend: "all".to_owned(), ..Row::default() };
        for row in &self.rows {
            total.owed.pending_tokens += row.owed.pending_tokens;
            total.owed.active += row.owed.active;
            total.peak_tokens = total.peak_tokens.max(row.peak_tokens);
            total.chosen += row.chosen;
            total.prompt_tokens += row.prompt_tokens;
            total.cached_tokens += row.cached_tokens;
            total.output_tokens += row.output_tokens;
            total.first_token.merge(&row.first_token);
        }
        total
    }
}

impl Row {
    fn write(&self, text: &mut String, chosen: u64) {
        let quantiles = self.first_token.quantiles([0.5, 0.99]);
        let [p50, p99] = quantiles.map_or_else(Default::default, |both| both.map(milliseconds));
        let cells = (self.owed.pending_tokens * BAR_CELLS).div_ceil(BAR_TOKENS).min(BAR_CELLS) as usize;
        let bar = if self.backend == "all" { String::new() } else { "#".repeat(cells) };
        let _ = writeln!(
            text,
            "  {:<16} {:<12} {:>9} {:>9} {:>7} {:>7} {:>7} {:>10} {:>10}",
            self.backend,
            bar,
            grouped(self.owed.pending_tokens),
            grouped(self.peak_tokens),
            self.owed.active,
            percent(ratio(self.chosen, chosen)),
            percent(ratio(self.cached_tokens, self.prompt_tokens)),
            p50,
            p99
        );
    }
}

/// The two policies side by side.
pub(super) fn comparison(before: &Board, after: &Board) -> String {
    let (old, new) = (before.verdict(), after.verdict());
    let mut text = String::new();
    let mut line = |name: &str, old: &str, new: &str, remark: &str| {
        let line = format!("  {name:<28} {old:>14} {new:>22}   {remark}");
        let _ = writeln!(text, "{}", line.trim_end());
    };
    line("", before.policy, after.policy, "");
    for (index, name) in ["p50", "p90", "p99"].into_iter().enumerate() {
        let (old, new) = (old.first_token[index], new.first_token[index]);
        let name = format!("time to first token, {name}");
        line(&name, &milliseconds(old), &milliseconds(new), &shorter(old, new));
    }
    line("prompt tokens from cache", &percent(old.hits), &percent(new.hits), "");
    line("output tokens per second", &rate(old.output_rate), &rate(new.output_rate), "");
    line("requests answered", &grouped(old.answered), &grouped(new.answered), "");
    line("requests failed", &old.failed.to_string(), &new.failed.to_string(), "");
    text
}

/// A place to draw on.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    /// Lines of the last drawing, to be drawn over.
    drawn: usize,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self { terminal: io::stdout().is_terminal(), drawn: 0 }
    }

    /// Prints text that stays.
    pub(super) fn say(&mut self, text: &str) -> io::Result<()> {
        self.drawn = 0;
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    }

    /// Draws over the last drawing, if this is a terminal.
    pub(super) fn draw(&mut self, text: &str) -> io::Result<()> {
        if self.terminal { self.overdraw(text) } else { Ok(()) }
    }

    /// Draws for the last time: what comes next goes below.
    pub(super) fn finish(&mut self, text: &str) -> io::Result<()> {
        if self.terminal {
            self.overdraw(text)?;
            return self.say("");
        }
        self.say(text)
    }

    fn overdraw(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.drawn > 0 {
            write!(out, "\x1b[{}A", self.drawn)?;
        }
        for line in text.lines() {
            writeln!(out, "{line}\x1b[K")?;
        }
        self.drawn = text.lines().count();
        out.flush()
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn rate(per_second: f64) -> String {
    grouped(per_second.round() as u64)
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", grouped(time.as_secs_f64().mul_add(1e3, 0.5) as u64))
}

/// How a waiting time changed, in words.
fn shorter(old: Duration, new: Duration) -> String {
    let factor = old.as_secs_f64() / new.as_secs_f64().max(1e-6);
    if factor >= 1.05 {
        format!("{factor:.1} times shorter")
    } else if factor > 0.95 || old.is_zero() {
        "about the same".to_owned()
    } else {
        format!("{:.1} times longer", 1.0 / factor)
    }
}

/// A number with its thousands set apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::traffic::Usage;
    use super::*;

    fn board() -> Board {
        let mut board = Board::new("round_robin", ["a:1".to_owned(), "b:2".to_owned()]);
        let usage: Usage = serde_json::from_str(
            r#"{"prompt_tokens":1000,"completion_tokens":50,"prompt_tokens_details":{"cached_tokens":250}}"#,
        )
        .unwrap();
        for (backend, millis) in [("a:1", 30), ("a:1", 1234), ("b:2", 50)] {
            let backend = backend.to_owned();
            board.see(Sighting::Sent, Duration::ZERO);
            let after = Duration::from_millis(millis);
            board.see(Sighting::First { backend: backend.clone(), after }, Duration::from_secs(1));
            board.see(Sighting::Done { backend, usage }, Duration::from_secs(2));
        }
        board.see(Sighting::Sent, Duration::ZERO);
        board.read("b:2", Owed { pending_tokens: 31_000, active: 3 });
        board
    }

    #[test]
    fn the_table_shows_what_was_seen() {
        let text = board().text(Duration::from_secs(3), Duration::from_secs(20));
        assert_eq!(
            text.lines().next(),
            Some("round_robin: 3 s of 20 s, 4 requests sent, 1 in flight, 0 failed")
        );
        let words =
            |line: usize| text.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(2), "a:1 0 0 0 66.7% 25.0% 30 ms 1,234 ms");
        assert_eq!(words(3), "b:2 ####### 31,000 31,000 3 33.3% 25.0% 50 ms 50 ms");
        assert_eq!(words(4), "all 31,000 31,000 3 100.0% 25.0% 50 ms 1,234 ms");
    }

    #[test]
    fn the_verdict_sums_over_the_backends() {
        let verdict = board().verdict();
        assert_eq!(verdict.first_token, [50, 1234, 1234].map(Duration::from_millis));
        assert_eq!((verdict.hits, verdict.output_rate, verdict.answered), (0.25, 75.0, 3));
    }

    #[test]
    fn a_change_for_the_worse_is_called_that() {
        let ms = Duration::from_millis;
        assert_eq!(shorter(ms(300), ms(100)), "3.0 times shorter");
        assert_eq!(shorter(ms(100), ms(102)), "about the same");
        assert_eq!(shorter(ms(100), ms(200)), "2.0 times longer");
        let text = comparison(&board(), &board());
        assert!(text.contains("about the same"), "{text}");
    }
}
