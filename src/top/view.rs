//! What the screen shows and what a key does to it: plain data, so that both can be tried without a terminal.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::seen::{Backend, Seen};

/// Rows that a page key goes.
const PAGE: usize = 10;

/// By what the backends of an upstream are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    /// As the configuration names them.
    #[default]
    Configured,
    Pending,
    Share,
    Rate,
    Wait,
    /// Those that are not up first.
    State,
}

impl Sort {
    const ALL: [Self; 6] =
        [Self::Configured, Self::Pending, Self::Share, Self::Rate, Self::Wait, Self::State];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Pending => "pending",
            Self::Share => "share",
            Self::Rate => "req/s",
            Self::Wait => "TTFT",
            Self::State => "state",
        }
    }

    fn next(self) -> Self {
        let place = Self::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Self::ALL[(place + 1) % Self::ALL.len()]
    }
}

/// Something to change about a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) drain: bool,
    pub(super) upstream: String,
    pub(super) backend: String,
}

/// What keys mean at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    Table,
    Help,
    /// Waiting for a yes.
    Sure(Change),
}

/// What a key asks of the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Leave,
    Change(Change),
}

/// Everything the screen shows.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) seen: Seen,
    /// Where the process is asked.
    pub(super) whom: String,
    /// Seconds since the last answer.
    pub(super) age: Option<f64>,
    /// Why there has been no answer since.
    pub(super) trouble: Option<String>,
    /// What came of the last change.
    pub(super) said: Option<String>,
    pub(super) mode: Mode,
    pub(super) sort: Sort,
    pub(super) paused: bool,
    pub(super) colour: bool,
    /// Upstream and address; the first row if there is none such.
    pub(super) selected: Option<(String, String)>,
}

impl View {
    /// Every upstream's backends in the order in which they are shown.
    pub(super) fn rows(&self) -> Vec<(&str, Vec<&Backend>)> {
        let upstreams = self.seen.status.upstreams.iter();
        upstreams
            .map(|(name, upstream)| {
                let mut backends: Vec<&Backend> = upstream.backends.iter().collect();
                // The sort is stable: those that are alike stay as the configuration names them.
                if self.sort != Sort::Configured {
                    backends.sort_by(|one, other| self.key(name, other).total_cmp(&self.key(name, one)));
                }
                (name.as_str(), backends)
            })
            .collect()
    }

    /// What a backend is sorted by, the greatest first.
    fn key(&self, upstream: &str, backend: &Backend) -> f64 {
        let lately = || self.seen.lately(upstream, &backend.address);
        match self.sort {
            Sort::Configured => 0.0,
            Sort::Pending => backend.pending_tokens.unwrap_or(0) as f64,
            Sort::Share => backend.share.unwrap_or(0.0),
            Sort::Rate => lately().map_or(0.0, |done| done.rate()),
            Sort::Wait => lately().and_then(|done| done.wait()).unwrap_or(0.0),
            Sort::State => f64::from(u8::from(backend.state != "up")),
        }
    }

    /// Whether this row is the selected one.
    pub(super) fn is_selected(&self, upstream: &str, address: &str) -> bool {
        self.keys().get(self.place()).is_some_and(|(name, own)| (*name, *own) == (upstream, address))
    }

    fn keys(&self) -> Vec<(&str, &str)> {
        let rows = self.rows().into_iter();
        rows.flat_map(|(name, backends)| backends.into_iter().map(move |b| (name, b.address.as_str())))
            .collect()
    }

    fn place(&self) -> usize {
        let selected = self.selected.as_ref().map(|(name, address)| (name.as_str(), address.as_str()));
        self.keys().iter().position(|key| Some(*key) == selected).unwrap_or(0)
    }

    fn select(&mut self, place: usize) {
        let keys = self.keys();
        let key = keys.get(place.min(keys.len().saturating_sub(1)));
        self.selected = key.map(|(name, address)| ((*name).to_owned(), (*address).to_owned()));
    }

    /// Does what a key means, as far as that is here.
    pub(super) fn press(&mut self, key: KeyEvent) -> Option<Wish> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return (key.code == KeyCode::Char('c')).then_some(Wish::Leave);
        }
        match std::mem::take(&mut self.mode) {
            Mode::Sure(change) => {
                return matches!(key.code, KeyCode::Char('y')).then_some(Wish::Change(change));
            }
            Mode::Help if key.code != KeyCode::Char('q') => return None,
            Mode::Help | Mode::Table => {}
        }
        self.said = None;
        match key.code {
            KeyCode::Char('q') => return Some(Wish::Leave),
            KeyCode::Char('?' | 'h') => self.mode = Mode::Help,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('d') => self.ask(true),
            KeyCode::Char('u') => self.ask(false),
            KeyCode::Up | KeyCode::Char('k') => self.select(self.place().saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(self.place() + 1),
            KeyCode::PageUp => self.select(self.place().saturating_sub(PAGE)),
            KeyCode::PageDown => self.select(self.place() + PAGE),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        None
    }

    fn ask(&mut self, drain: bool) {
        let place = self.place();
        let change = self.keys().get(place).map(|(upstream, backend)| Change {
            drain,
            upstream: (*upstream).to_owned(),
            backend: (*backend).to_owned(),
        });
        self.mode = change.map_or(Mode::Table, Mode::Sure);
        // It is this one that is asked about, wherever it goes while we wait.
        self.select(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        let status = serde_json::from_str(
            r#"{"upstreams":{"b":{"backends":[{"address":"x:1","state":"up","pending_tokens":5},
                {"address":"x:2","state":"down","pending_tokens":9},{"address":"x:3","state":"up","pending_tokens":5}]},
                "a":{"backends":[{"address":"x:1","state":"up"}]}}}"#,
        );
        let mut view = View::default();
        view.seen.look(status.unwrap(), Vec::new(), 0.0);
        view
    }

    fn press(view: &mut View, keys: &str) -> Option<Wish> {
        let codes = keys.chars().map(KeyCode::Char);
        codes.filter_map(|code| view.press(KeyEvent::new(code, KeyModifiers::NONE))).last()
    }

    fn order(view: &View) -> Vec<&str> {
        view.keys().into_iter().map(|(_, address)| address).collect()
    }

    #[test]
    fn the_selection_stays_with_its_backend_when_the_order_changes() {
        let mut view = view();
        assert!(view.is_selected("a", "x:1"));
        press(&mut view, "kjj");
        assert!(view.is_selected("b", "x:2") && !view.is_selected("a", "x:1"));
        assert_eq!(order(&view), ["x:1", "x:1", "x:2", "x:3"]);
        press(&mut view, "s");
        assert_eq!((view.sort, order(&view)), (Sort::Pending, vec!["x:1", "x:2", "x:1", "x:3"]));
        assert!(view.is_selected("b", "x:2"));
        press(&mut view, "jjjjjj");
        assert!(view.is_selected("b", "x:3"));
        press(&mut view, "sssss");
        assert_eq!(view.sort, Sort::Configured);
        view.seen.look(serde_json::from_str("{}").unwrap(), Vec::new(), 1.0);
        assert_eq!(press(&mut view, "jkdy"), None, "there is nothing to drain");
        assert_eq!(view.mode, Mode::Table);
    }

    #[test]
    fn a_change_is_made_only_after_a_yes() {
        let mut view = view();
        press(&mut view, "jj");
        let change = |drain| Change { drain, upstream: "b".to_owned(), backend: "x:2".to_owned() };
        assert_eq!(press(&mut view, "d"), None);
        assert_eq!(view.mode, Mode::Sure(change(true)));
        assert_eq!(press(&mut view, "n"), None);
        assert_eq!(view.mode, Mode::Table);
        assert_eq!(press(&mut view, "dy"), Some(Wish::Change(change(true))));
        assert_eq!(press(&mut view, "uy"), Some(Wish::Change(change(false))));
        assert_eq!(press(&mut view, "dq"), None, "q is no yes");
        assert_eq!(press(&mut view, "q"), Some(Wish::Leave));
    }

    #[test]
    fn any_key_ends_the_help_and_q_leaves_from_there() {
        let mut view = view();
        press(&mut view, "?");
        assert_eq!(view.mode, Mode::Help);
        assert_eq!(press(&mut view, "d"), None);
        assert_eq!(view.mode, Mode::Table);
        assert_eq!(press(&mut view, "?q"), Some(Wish::Leave));
        let control = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(view.press(control), Some(Wish::Leave));
        press(&mut view, "p");
        assert!(view.paused);
    }
}
