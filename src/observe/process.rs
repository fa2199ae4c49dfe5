//! What the process itself uses, under the names that every Prometheus client library gives it.
//!
//! Read from `/proc` when it is scraped. The `process` feature of the prometheus crate does the same with five more
//! crates, and counts the CPU in whole seconds, which is too coarse for a rate over a minute.

use std::fs;

use prometheus::{Counter, IntGauge, Opts};

use super::registry::Registry;

/// Linux counts time for programs in hundredths of a second (`USER_HZ`), however its kernel was built.
const TICKS_PER_SECOND: f64 = 100.0;

/// The gauges and the one counter. Without `/proc` they stay at zero.
pub(super) struct Process {
    cpu: Counter,
    open_files: IntGauge,
    open_files_limit: IntGauge,
    resident: IntGauge,
    threads: IntGauge,
}

impl Process {
    /// Registers them.
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| r.register(IntGauge::new(name, help)?);
        let cpu = "User and system time of all threads, to a hundredth of a second.";
        let limit = "Open files and sockets that the process may have (`server.open_files`).";
        let started = gauge("process_start_time_seconds", "When the process started.")?;
        started.set(start_time().unwrap_or_default());
        Ok(Self {
            cpu: r.register(Counter::with_opts(Opts::new("process_cpu_seconds_total", cpu))?)?,
            open_files: gauge("process_open_fds", "Open files and sockets.")?,
            open_files_limit: gauge("process_max_fds", limit)?,
            resident: gauge("process_resident_memory_bytes", "Memory that is really there.")?,
            threads: gauge("process_threads", "Threads.")?,
        })
    }

    /// Brings them up to date.
    pub(super) fn read(&self) {
        if let Some(ticks) = cpu_ticks(&proc("self/stat")) {
            // A counter only grows; two scrapes at the same moment may each see the other's.
            let seconds = ticks as f64 / TICKS_PER_SECOND - self.cpu.get();
            self.cpu.inc_by(seconds.max(0.0));
        }
        // One of them is the folder that is being read.
        let open = fs::read_dir("/proc/self/fd").map_or(0, |folder| folder.count().saturating_sub(1));
        self.open_files.set(i64::try_from(open).unwrap_or(i64::MAX));
        let limit = rlimit::Resource::NOFILE.get_soft().unwrap_or_default();
        self.open_files_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
        let status = proc("self/status");
        self.resident.set(number_after(&status, "VmRSS:").unwrap_or_default().saturating_mul(1024));
        self.threads.set(number_after(&status, "Threads:").unwrap_or_default());
    }
}

fn proc(path: &str) -> String {
    fs::read_to_string(format!("/proc/{path}")).unwrap_or_default()
}

/// Seconds since 1970.
fn start_time() -> Option<i64> {
    let booted = number_after(&proc("stat"), "btime")?;
    let ticks: i64 = field(&proc("self/stat"), 22)?.parse().ok()?;
    Some(booted + (ticks as f64 / TICKS_PER_SECOND) as i64)
}

fn cpu_ticks(stat: &str) -> Option<u64> {
    Some(field(stat, 14)?.parse::<u64>().ok()? + field(stat, 15)?.parse::<u64>().ok()?)
}

/// A field of `/proc/PID/stat` by its number in proc(5), 3 or later: the second one is a name that may hold blanks and
/// brackets.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)
}

/// The number behind the word that a line begins with.
fn number_after(text: &str, word: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_be_called_anything() {
        let rest = "S 1 2 3 0 -1 4194560 99 0 0 0 250 50 0 0 20 0 7 0 123456 1 2";
        for name in ["plimsoll", "a b", ") S 1 (", ""] {
            let stat = format!("42 ({name}) {rest}");
            assert_eq!((cpu_ticks(&stat), field(&stat, 22)), (Some(300), Some("123456")), "{name}");
        }
        assert_eq!((cpu_ticks(""), field("42 (a", 3), field("42 (a) S", 4)), (None, None, None));
    }

    #[test]
    fn this_process_has_memory_files_threads_and_a_past() {
        let registry = Registry::default();
        let process = Process::new(&registry).unwrap();
        process.read();
        let shown = [&process.open_files, &process.open_files_limit, &process.resident, &process.threads];
        assert!(shown.iter().all(|gauge| gauge.get() > 0), "{:?}", shown.map(IntGauge::get));
        assert!(process.open_files.get() < process.open_files_limit.get());
        assert!(process.resident.get() > 1 << 20);
        assert!(start_time().unwrap() > 1_600_000_000);
        let before = process.cpu.get();
        process.read();
        assert!(process.cpu.get() >= before);
    }
}
