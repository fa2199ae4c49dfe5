//! How much is logged, which can be changed while the process runs.
//!
//! The logger itself takes everything; what reaches it is decided here, by a filter of `RUST_LOG`'s form that can be
//! put in the place of another. Whatever it asks for, heads and what else may hold credentials are left out, unless
//! somebody names who writes them.

use std::sync::Arc;

use env_filter::{Builder, Filter};
use parking_lot::RwLock;

/// What is logged if nothing is asked for.
const QUIET: &str = "info,pingora=warn,pingora_core=warn,pingora_proxy=error,pingora_load_balancing=error";

/// How much is logged. Clones share it.
#[derive(Clone)]
pub struct Verbosity(Arc<RwLock<Asked>>);

struct Asked {
    filter: Filter,
    words: String,
}

impl Asked {
    fn parse(words: &str) -> Result<Self, String> {
        let filter = Builder::new().try_parse(&discreet(words)).map_err(|e| e.to_string())?.build();
        Ok(Self { filter, words: words.to_owned() })
    }
}

impl Verbosity {
    /// From now on the process logs what `RUST_LOG` asks for. To be called once: a second log would not be started.
    pub fn start() -> Self {
        let asked = std::env::var("RUST_LOG").ok().filter(|asked| !asked.is_empty());
        let words = asked.as_deref().unwrap_or(QUIET);
        // As env_logger does, what cannot be read of it is left out.
        let lenient =
            || Asked { filter: Builder::new().parse(&discreet(words)).build(), words: words.to_owned() };
        let verbosity = Self(Arc::new(RwLock::new(Asked::parse(words).unwrap_or_else(|_| lenient()))));
        let mut log = env_logger::Builder::new();
        log.filter_level(log::LevelFilter::Trace);
        if let Ok(style) = std::env::var("RUST_LOG_STYLE") {
            log.parse_write_style(&style);
        }
        let filtered = Filtered { log: log.build(), verbosity: verbosity.clone() };
        if log::set_boxed_logger(Box::new(filtered)).is_ok() {
            verbosity.announce();
        }
        verbosity
    }

    /// From now on logs what `words` ask for, in the form of `RUST_LOG`: `debug`, or `info,plimsoll::proxy=debug`.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn set(&self, words: &str) -> Result<(), String> {
        // Alone, a word that is no level would be taken for the name of who may log everything.
        let mut directives = words.split('/').next().unwrap_or_default().split(',').map(str::trim);
        if let Some(word) = directives.find(|d| !d.contains('=') && d.parse::<log::LevelFilter>().is_err()) {
            return Err(format!("`{word}` is no level: off, error, warn, info, debug, trace"));
        }
        let asked = Asked::parse(words)?;
        *self.0.write() = asked;
        self.announce();
        Ok(())
    }

    /// What is asked for.
    pub fn words(&self) -> String {
        self.0.read().words.clone()
    }

    /// Records of a level that nobody wants need not be made at all.
    fn announce(&self) {
        log::set_max_level(self.0.read().filter.filter());
    }
}

/// A logger that is shown only what is asked for.
struct Filtered {
    log: env_logger::Logger,
    verbosity: Verbosity,
}

impl log::Log for Filtered {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.verbosity.0.read().filter.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let wanted = self.verbosity.0.read().filter.matches(record);
        if wanted {
            self.log.log(record);
        }
    }

    fn flush(&self) {
        self.log.flush();
    }
}

/// The filter `asked`, without what others write of requests, credentials included, unless it is asked for by name:
/// Pingora and h2 write heads at debug and trace, and Pingora's part below `admin` what it cannot read, as an error.
fn discreet(asked: &str) -> String {
    let directives = asked.split('/').next().unwrap_or_default().split(',');
    // A name stands for all that begin with it; what is no more than the beginning of theirs does not name them.
    let concerns =
        |name: &str| ["pingora", "h2"].iter().any(|theirs| *theirs != name && theirs.starts_with(name));
    let mut levels = directives.filter_map(|directive| match directive.split_once('=') {
        Some((name, level)) if concerns(name.trim()) => level.trim().parse::<log::LevelFilter>().ok(),
        Some(_) => None,
        None => directive.trim().parse().ok(),
    });
    let verbose = levels.any(|level| level > log::LevelFilter::Info);
    // Of two directives for one name the last one counts.
    let capped = if verbose { "pingora=info,h2=info," } else { "" };
    format!("pingora_core::apps::http_app=off,{capped}{asked}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_names_pingora_gets_what_it_writes_at_debug() {
        let logs = |asked: &str, target: &str| {
            let Asked { filter, .. } = Asked::parse(asked).unwrap();
            let debug = log::Metadata::builder().level(log::Level::Debug).target(target).build();
            let info = log::Metadata::builder().level(log::Level::Info).target(target).build();
            [filter.enabled(&info), filter.enabled(&debug)]
        };
        for all in [
            "debug",
            "trace",
            "info,debug",
            "plimsoll=info, DEBUG",
            "debug/x",
            "=debug",
            "p=debug,h=trace,debug",
        ] {
            assert_eq!(logs(all, "pingora_proxy"), [true, false], "{all}");
            assert_eq!(logs(all, "pingora_core::protocols"), [true, false], "{all}");
            assert_eq!(logs(all, "h2::codec"), [true, false], "{all}");
        }
        assert_eq!(logs("debug", "plimsoll::proxy"), [true, true]);
        assert_eq!(logs("debug,pingora_proxy=debug", "pingora_proxy"), [true, true]);
        assert_eq!(logs("debug,pingora_proxy=debug", "pingora_core"), [true, false]);
        assert_eq!(logs("pingora=debug,debug", "pingora_core"), [true, true]);
        assert_eq!(logs("warn,plimsoll=debug", "pingora_proxy"), [false, false]);
        assert_eq!(logs("off", "pingora_proxy"), [false, false]);
        let below_admin = "pingora_core::apps::http_app";
        assert_eq!(logs("trace,pingora=trace", below_admin), [false, false]);
        assert_eq!(logs(&format!("{below_admin}=debug"), below_admin), [true, true]);
    }

    #[test]
    fn what_cannot_be_read_changes_nothing() {
        let verbosity = Verbosity(Arc::new(RwLock::new(Asked::parse("warn").unwrap())));
        for flawed in ["", "loud", "info=loud", "a=b=c", "info,plimsoll", "info/(", "a=info/b/c"] {
            assert!(verbosity.set(flawed).is_err(), "{flawed}");
            assert_eq!(verbosity.words(), "warn");
        }
    }
}
