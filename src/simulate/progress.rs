//! One line on the terminal's error output that says how far we are; nothing anywhere else.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};

use parking_lot::Mutex;

/// How far all that runs has come.
pub(super) struct Progress {
    /// Nothing is kept if nothing is shown.
    now: Option<Mutex<Now>>,
}

struct Now {
    tasks: usize,
    done: usize,
    /// What runs, by the number of its task, and how much of it in percent.
    running: BTreeMap<usize, (String, usize)>,
}

/// A replay says so often how far it is; a hundred times is what can be seen.
const STEPS: usize = 100;

/// More would not fit into a line.
const MOST_SHOWN: usize = 3;

impl Progress {
    /// Of `tasks` tasks, on a terminal.
    pub(super) fn of(tasks: usize) -> Self {
        let now = || Mutex::new(Now { tasks, done: 0, running: BTreeMap::new() });
        Self { now: io::stderr().is_terminal().then(now) }
    }

    /// `sent` of `requests` have been sent in a replay that belongs to the task of that number; `label` is
    /// what it is called.
    pub(super) fn show(&self, task: usize, sent: usize, requests: usize, label: impl FnOnce() -> String) {
        if let Some(now) = &self.now
            && sent.is_multiple_of(requests.div_ceil(STEPS))
        {
            let mut now = now.lock();
            now.running.insert(task, (label(), sent * 100 / requests));
            write(&format!("\r\x1b[K{}", now.line()));
        }
    }

    /// The task of that number is done.
    pub(super) fn end(&self, task: usize) {
        if let Some(now) = &self.now {
            let mut now = now.lock();
            now.running.remove(&task);
            now.done += 1;
        }
    }

    /// Takes the line away.
    pub(super) fn clear(&self) {
        if self.now.is_some() {
            write("\r\x1b[K");
        }
    }
}

impl Now {
    fn line(&self) -> String {
        let mut line = format!("{} of {} done", self.done, self.tasks);
        for (number, (label, percent)) in self.running.values().take(MOST_SHOWN).enumerate() {
            let before = if number == 0 { "; " } else { ", " };
            let _ = write!(line, "{before}{label} {percent} %");
        }
        if let Some(more) = self.running.len().checked_sub(MOST_SHOWN).filter(|more| *more > 0) {
            let _ = write!(line, " and {more} more");
        }
        line
    }
}

/// A terminal that is gone is no reason to stop.
fn write(text: &str) {
    let mut terminal = io::stderr().lock();
    let _ = terminal.write_all(text.as_bytes()).and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_done_and_what_runs_as_far_as_it_fits() {
        let running = |count: usize| (0..count).map(|n| (n, (format!("policy{n}"), n * 10))).collect();
        let line = |count| Now { tasks: 9, done: 2, running: running(count) }.line();
        assert_eq!(line(0), "2 of 9 done");
        assert_eq!(line(2), "2 of 9 done; policy0 0 %, policy1 10 %");
        assert_eq!(line(5), "2 of 9 done; policy0 0 %, policy1 10 %, policy2 20 % and 2 more");
    }
}
