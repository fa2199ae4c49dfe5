//! The catalog: which models an upstream serves.
//!
//! Either the configuration names them, or they are learned from the backends' `/v1/models` and kept when a
//! backend dies, so that a known model without a backend (503) can be told from one that nobody ever served
//! (404). Before anything is learned, nothing is unknown.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config;

/// The models of one upstream.
pub struct Catalog {
    configured: config::Models,
    learned: RwLock<BTreeMap<SocketAddr, Vec<Model>>>,
}

/// A model as a backend describes it.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its id.
    pub id: String,
    /// The whole entry, as the engine wrote it.
    pub json: String,
}

/// Whether an upstream serves a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// It does, or takes any.
    Yes,
    /// It does not.
    No,
    /// No backend has said yet.
    Unknown,
}

impl Catalog {
    /// The catalog that the configuration describes; what was learned `before` is known.
    pub fn new(models: &config::Models, before: Option<&Self>) -> Self {
        let learned = before.map_or_else(BTreeMap::new, |before| before.learned.read().clone());
        Self { configured: models.clone(), learned: RwLock::new(learned) }
    }

    /// Forgets what backends said that are members no longer; but not the last word of all: when every backend has been
    /// replaced by another, it holds until one of the new ones has spoken.
    pub(super) fn keep(&self, is_member: impl Fn(&SocketAddr) -> bool) {
        let mut learned = self.learned.write();
        if learned.keys().any(&is_member) {
            learned.retain(|address, _| is_member(address));
        }
    }

    /// Whether backends have to be asked.
    pub fn is_discovered(&self) -> bool {
        !matches!(self.configured, config::Models::List(_))
    }

    /// Whether the upstream serves `model`.
    pub fn serves(&self, model: &str) -> Serves {
        match &self.configured {
            config::Models::Any => Serves::Yes,
            config::Models::List(names) if names.iter().any(|name| name == model) => Serves::Yes,
            config::Models::List(_) => Serves::No,
            config::Models::Discover => {
                let learned = self.learned.read();
                if learned.values().flatten().any(|m| m.id == model) {
                    Serves::Yes
                } else if learned.is_empty() {
                    Serves::Unknown
                } else {
                    Serves::No
                }
            }
        }
    }

    /// Every model known, one entry per id.
    pub fn models(&self) -> Vec<Model> {
        if let config::Models::List(names) = &self.configured {
            return names.iter().map(|id| Model { id: id.clone(), json: minimal_entry(id) }).collect();
        }
        let learned = self.learned.read();
        let by_id: BTreeMap<&str, &Model> = learned.values().flatten().map(|m| (m.id.as_str(), m)).collect();
        by_id.into_values().cloned().collect()
    }

    /// Whether the backend at `address` has told its models.
    pub fn knows(&self, address: &SocketAddr) -> bool {
        self.learned.read().contains_key(address)
    }

    /// Takes in a backend's answer to `GET /v1/models`; false if it is none.
    pub fn learn(&self, address: SocketAddr, answer: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct List<'a> {
            #[serde(borrow)]
            data: Vec<&'a RawValue>,
        }
        #[derive(Deserialize)]
        struct Entry {
            id: String,
        }
        let Ok(list) = serde_json::from_slice::<List<'_>>(answer) else { return false };
        let models: Vec<_> = list
            .data
            .iter()
            .filter_map(|raw| {
                let entry: Entry = serde_json::from_str(raw.get()).ok()?;
                Some(Model { id: entry.id, json: raw.get().to_owned() })
            })
            .collect();
        // An engine that lists nothing is still loading, or waits for its own engines.
        if models.is_empty() {
            return false;
        }
        self.learned.write().insert(address, models);
        true
    }
}

/// The entry of a model of which only the name is known.
fn minimal_entry(id: &str) -> String {
    let id = serde_json::Value::from(id);
    format!(r#"{{"id":{id},"object":"model","created":0,"owned_by":"plimsoll"}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    #[test]
    fn a_model_is_unknown_until_a_backend_has_spoken_and_known_after_it_died() {
        let catalog = Catalog::new(&config::Models::Discover, None);
        assert_eq!(catalog.serves("a"), Serves::Unknown);
        assert!(catalog.learn(address(1), br#"{"object":"list","data":[{"id":"a","x":1},{"id":"b"}]}"#));
        assert_eq!((catalog.serves("a"), catalog.serves("c")), (Serves::Yes, Serves::No));
        assert!(catalog.learn(address(2), br#"{"data":[{"id":"b"},{"id":"c"},{"no":"id"}]}"#));
        let ids: Vec<_> = catalog.models().into_iter().map(|m| m.id).collect();
        assert_eq!(ids, ["a", "b", "c"]);
        assert!(!catalog.learn(address(1), b"<html>"));
        assert!(!catalog.learn(address(1), br#"{"data":[]}"#));
        assert_eq!(catalog.serves("a"), Serves::Yes);
    }

    #[test]
    fn what_the_backends_said_holds_until_one_of_those_in_their_place_has_spoken() {
        let catalog = Catalog::new(&config::Models::Discover, None);
        let says = |n: u8, model: &str| {
            assert!(catalog.learn(address(n), format!(r#"{{"data":[{{"id":"{model}"}}]}}"#).as_bytes()));
        };
        says(1, "a");
        says(2, "b");
        catalog.keep(|known| *known == address(2));
        assert_eq!((catalog.serves("a"), catalog.serves("b")), (Serves::No, Serves::Yes));
        let replaced = |known: &SocketAddr| *known == address(3);
        catalog.keep(replaced);
        assert_eq!(catalog.serves("b"), Serves::Yes, "nobody has said otherwise");
        says(3, "c");
        catalog.keep(replaced);
        assert_eq!((catalog.serves("b"), catalog.serves("c")), (Serves::No, Serves::Yes));
    }

    #[test]
    fn configured_models_are_taken_at_their_word() {
        let list = Catalog::new(&config::Models::List(vec!["a\"b".to_owned()]), None);
        assert_eq!((list.serves("a\"b"), list.serves("x")), (Serves::Yes, Serves::No));
        let entry: serde_json::Value = serde_json::from_str(&list.models()[0].json).unwrap();
        assert_eq!(entry["id"], "a\"b");
        assert_eq!(Catalog::new(&config::Models::Any, None).serves("x"), Serves::Yes);
    }
}
