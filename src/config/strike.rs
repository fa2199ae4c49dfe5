//! Reads a type from a tree and finds every fault, though serde stops at the first.
//!
//! The part that was refused is struck out of the tree and the rest is read again, until it is clean. What is
//! missing only because it was struck, perhaps for a letter in its key, is not a fault of its own: then the
//! part around it goes too, in silence. The checks that follow ask [`Reading::is_intact`] before they
//! complain of what the author did write.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::decode::What;
use super::report::{Flaw, nearest, suggestion};
use super::tree::{Path, Step, Tree};
use super::units;

/// What could be read, and what was struck out on the way.
pub(super) struct Reading<T> {
    /// `None` if too little was left.
    pub(super) value: Option<T>,
    /// Why each part was struck out.
    pub(super) flaws: Vec<Flaw>,
    tree: Tree,
    struck: BTreeSet<Path>,
}

/// A file with this many faults is something else than a configuration.
const MOST_FLAWS: usize = 100;

impl<T: for<'de> Deserialize<'de>> Reading<T> {
    /// Reads all of `tree` that makes sense.
    pub(super) fn of(tree: Tree) -> Self {
        let mut reading = Self { value: None, flaws: Vec::new(), tree, struck: BTreeSet::new() };
        while reading.flaws.len() < MOST_FLAWS {
            let (what, path, on_key) = match T::deserialize(&reading.tree) {
                Ok(value) => {
                    reading.value = Some(value);
                    break;
                }
                Err(fault) => fault.into_parts(),
            };
            if let What::UnknownKey { known } = &what
                && let Some(meant) = nearest(&last_key(&path), known)
            {
                let meant = path.parent().key(meant);
                if !reading.is_written(&meant) {
                    reading.struck.insert(meant);
                }
            }
            if !reading.is_consequence(&what, &path) {
                reading.flaws.push(flaw(what, path.clone(), on_key));
            }
            if !reading.tree.strike(&path) {
                break;
            }
            reading.struck.insert(path);
        }
        reading
    }
}

impl<T> Reading<T> {
    /// Whether the fault is there only because of what was struck out before.
    fn is_consequence(&self, what: &What, path: &Path) -> bool {
        match what {
            What::MissingKey(key) => self.struck.contains(&path.key(key)),
            What::Unexpected { .. } | What::Other(_) => {
                self.struck.iter().any(|struck| struck.0.starts_with(&path.0))
            }
            What::UnknownKey { .. } | What::UnknownName { .. } => false,
        }
    }

    /// Whether nothing was struck out at `path`, in it, or around it.
    pub(super) fn is_intact(&self, path: &Path) -> bool {
        !self.struck.iter().any(|struck| struck.0.starts_with(&path.0) || path.0.starts_with(&struck.0))
    }

    /// Whether the author wrote anything at `path` that was not refused.
    pub(super) fn is_written(&self, path: &Path) -> bool {
        self.tree.at(path).is_some()
    }

    /// Whether there is nothing at `path`, or nothing in it.
    pub(super) fn is_empty(&self, path: &Path) -> bool {
        match self.tree.at(path) {
            None | Some(Tree::Null) => true,
            Some(Tree::Map(entries)) => entries.is_empty(),
            Some(_) => false,
        }
    }

    /// Where the `index`-th item that was read from the list at `path` stands in the file.
    pub(super) fn item(&self, path: &Path, index: usize) -> Path {
        let Some(Tree::List(items)) = self.tree.at(path) else { return path.item(index) };
        let kept = items.iter().enumerate().filter(|(_, item)| item.is_some()).nth(index);
        path.item(kept.map_or(index, |(written, _)| written))
    }
}

/// The sentence for a fault.
fn flaw(what: What, path: Path, on_key: bool) -> Flaw {
    let last = last_key(&path);
    match what {
        What::UnknownKey { known } => {
            Flaw { path, on_key, message: format!("unknown key `{last}`"), hint: suggestion(&last, known) }
        }
        What::UnknownName { found, known } => {
            let message = if last.is_empty() || on_key {
                format!("unknown name `{found}`")
            } else {
                format!("unknown {last} `{found}`")
            };
            Flaw { path, on_key, message, hint: suggestion(&found, known) }
        }
        What::MissingKey(key) => {
            Flaw { path, on_key: true, message: format!("missing key `{key}`"), hint: String::new() }
        }
        What::Unexpected { found, expected } => {
            if path.is_secret() {
                let message = format!("expected {}", plain(&expected));
                return Flaw {
                    path,
                    on_key,
                    message,
                    hint: "a secret is kept elsewhere, not in this file".to_owned(),
                };
            }
            let hint = match found.strip_prefix("the number ").map(str::parse::<u64>) {
                Some(Ok(number)) if expected == units::DURATION && number > 0 => {
                    format!("did you mean `{number}s`?")
                }
                _ => String::new(),
            };
            Flaw { path, on_key, message: format!("expected {}, found {found}", plain(&expected)), hint }
        }
        What::Other(message) => Flaw { path, on_key, message, hint: String::new() },
    }
}

/// The key at the end of `path`; empty for a list item.
fn last_key(path: &Path) -> String {
    match path.0.last() {
        Some(Step::Key(key)) => key.clone(),
        _ => String::new(),
    }
}

/// Serde's word for what it expected, in ours.
fn plain(expected: &str) -> &str {
    match expected {
        "f64" => "a number",
        "u64" | "u32" | "usize" => "a whole number",
        "path string" => "a path",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Root {
        list: Vec<Item>,
        size: u32,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Item {
        name: String,
        #[serde(default)]
        size: u32,
    }

    fn read(text: &str) -> Reading<Root> {
        Reading::of(Tree::parse(text).unwrap())
    }

    fn messages(reading: &Reading<Root>) -> Vec<String> {
        reading.flaws.iter().map(|flaw| format!("{}: {}", flaw.path, flaw.message)).collect()
    }

    #[test]
    fn every_fault_is_found_in_one_reading() {
        let reading =
            read("list: [{name: a, sise: 1}, {name: []}, {size: 1}, {name: d}]\nsize: big\nother: 1");
        assert_eq!(
            messages(&reading),
            [
                "list[0].sise: unknown key `sise`",
                "list[1].name: expected a string, found a list",
                "list[2]: missing key `name`",
                "other: unknown key `other`",
                "size: expected a whole number, found `big`",
            ]
        );
        let list = &reading.value.as_ref().unwrap().list;
        let list: Vec<(&str, u32)> = list.iter().map(|item| (item.name.as_str(), item.size)).collect();
        assert_eq!(list, [("a", 0), ("d", 0)]);
        let path = Path::default().key("list");
        assert_eq!(reading.item(&path, 1), path.item(3));
    }

    #[test]
    fn what_is_missing_because_it_was_struck_is_not_reported() {
        let reading = read("list: [{name: 3, size: 1}]");
        assert_eq!(reading.flaws.len(), 1);
        let list = Path::default().key("list");
        assert!(!reading.is_intact(&list), "an item is gone");
        assert!(!reading.is_intact(&list.item(0).key("size")), "what is around it is gone");
        assert!(reading.is_intact(&Path::default().key("size")));
    }

    #[test]
    fn a_required_key_that_is_misspelt_is_not_missing_as_well() {
        let reading = read("list: [{nam: a}]");
        assert_eq!(messages(&reading), ["list[0].nam: unknown key `nam`"]);
    }

    #[test]
    fn a_root_that_is_not_a_map_is_one_fault() {
        let reading = read("- a\n- b");
        assert_eq!(reading.flaws.len(), 1);
        assert!(reading.value.is_none());
    }

    #[test]
    fn reading_ends_however_many_faults_there_are() {
        let text: String = (0..1_000).map(|n| format!("key{n}: 1\n")).collect();
        assert_eq!(read(&text).flaws.len(), MOST_FLAWS);
    }
}
