//! The YAML text as a tree from which a part can be struck out.
//!
//! Serde stops at the first error. To report all of them, the part that was refused is struck out and the
//! rest is read again ([`super::strike`]); so the text is parsed once into this tree, and everything else
//! reads the tree. A struck list item leaves a hole, so that the items after it keep their index.
//!
//! Two things YAML allows are refused here, because they are always mistakes in a configuration: a key
//! written twice (the first would be silently lost) and tags such as `!name`. Anchors and aliases are
//! resolved by the parser.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// One value of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tree {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    /// `None` is an item that was struck out.
    List(Vec<Option<Self>>),
    Map(BTreeMap<String, Self>),
}

/// One step from a value to a value inside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Key(String),
    Item(usize),
}

/// The way from the root to a value: `upstreams.llama.backends[2]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Path(pub(super) Vec<Step>);

impl Path {
    /// This path and one more key.
    pub(super) fn key(&self, key: &str) -> Self {
        self.step(Step::Key(key.to_owned()))
    }

    /// This path and one more list item.
    pub(super) fn item(&self, index: usize) -> Self {
        self.step(Step::Item(index))
    }

    /// The path of the value that holds this one; that of the root is itself.
    pub(super) fn parent(&self) -> Self {
        Self(self.0[..self.0.len().saturating_sub(1)].to_vec())
    }

    /// Whether a secret may stand here, if only by mistake.
    pub(super) fn is_secret(&self) -> bool {
        let is = |step: &Step, name: &str| matches!(step, Step::Key(key) if key == name);
        let of_a_key = self.0.first().is_some_and(|step| is(step, KEYS))
            && match &self.0[1..] {
                [_name, .., last] => ["env", "file", "sha256"].iter().any(|place| is(last, place)),
                _ => true,
            };
        of_a_key || self.0.iter().any(|step| matches!(step, Step::Key(key) if names_secret(key)))
    }

    fn step(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }
}

/// Whether a key of `text`, a path or a line of the file, is one under which a secret is named. What stands there is
/// not shown, even if it is no name but the secret itself.
pub(super) fn names_secret(text: &str) -> bool {
    let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.any(|word| word.contains("api_key") || word == "token")
}

/// The section of the clients' keys.
pub(super) const KEYS: &str = "keys";

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if depth == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Item(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// Why a text is not a tree, in our words or the YAML parser's.
#[derive(Debug)]
pub(super) struct NotATree {
    /// What this module has to say; `None` if the parser itself refused the text.
    pub(super) ours: Option<String>,
    /// The parser's error, which also knows the place.
    pub(super) yaml: serde_yaml::Error,
}

impl Tree {
    /// Parses `text`, which is one YAML document or nothing but comments.
    pub(super) fn parse(text: &str) -> Result<Self, NotATree> {
        let said = RefCell::new(None);
        let seed = Seed { said: &said };
        match seed.deserialize(serde_yaml::Deserializer::from_str(text)) {
            Ok(tree) => Ok(tree),
            Err(yaml) => Err(NotATree { ours: said.into_inner(), yaml }),
        }
    }

    /// The value at `path`, unless it was never there or has been struck out.
    pub(super) fn at(&self, path: &Path) -> Option<&Self> {
        path.0.iter().try_fold(self, |tree, step| match (tree, step) {
            (Self::Map(entries), Step::Key(key)) => entries.get(key),
            (Self::List(items), Step::Item(index)) => items.get(*index)?.as_ref(),
            _ => None,
        })
    }

    /// [`Tree::at`], to be changed.
    pub(super) fn at_mut(&mut self, way: &[Step]) -> Option<&mut Self> {
        way.iter().try_fold(self, |tree, step| match (tree, step) {
            (Self::Map(entries), Step::Key(key)) => entries.get_mut(key),
            (Self::List(items), Step::Item(index)) => items.get_mut(*index)?.as_mut(),
            _ => None,
        })
    }

    /// Strikes out what is at `path`; false if nothing is, or if it is the root.
    pub(super) fn strike(&mut self, path: &Path) -> bool {
        let Some((last, way)) = path.0.split_last() else { return false };
        let Some(tree) = self.at_mut(way) else { return false };
        match (tree, last) {
            (Self::Map(entries), Step::Key(key)) => entries.remove(key).is_some(),
            (Self::List(items), Step::Item(index)) => items.get_mut(*index).and_then(Option::take).is_some(),
            _ => false,
        }
    }
}

/// Builds a [`Tree`]; what it has to say goes into `said`, since the parser would put a path of its own
/// before it.
#[derive(Clone, Copy)]
struct Seed<'a> {
    said: &'a RefCell<Option<String>>,
}

impl Seed<'_> {
    fn say<E: Error>(&self, message: String) -> E {
        *self.said.borrow_mut() = Some(message);
        E::custom("refused")
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Tree;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    /// A text without any document.
    fn visit_none<E: Error>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Unsigned(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Signed(value))
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Tree, E> {
        Ok(Tree::Float(value as f64))
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Tree, E> {
        Ok(Tree::Float(value as f64))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Text(value.to_owned()))
    }

    fn visit_enum<A: serde::de::EnumAccess<'de>>(self, _tagged: A) -> Result<Tree, A::Error> {
        Err(self.say("tags such as `!name` mean nothing here".to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tree, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element_seed(self)? {
            items.push(Some(item));
        }
        Ok(Tree::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(key) = map.next_key_seed(Key { seed: self, entries: &entries })? {
            let value = map.next_value_seed(self)?;
            entries.insert(key, value);
        }
        Ok(Tree::Map(entries))
    }
}

/// A key that is not among `entries` yet. Refusing it here, not in the map, lets the error stand at the key.
struct Key<'a> {
    seed: Seed<'a>,
    entries: &'a BTreeMap<String, Tree>,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The parser asks this only to refuse a key that is a list or a map.
        *self.seed.said.borrow_mut() = Some("expected a key, which is a name".to_owned());
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<String, E> {
        if self.entries.contains_key(key) {
            return Err(self.seed.say(format!("key `{key}` is written twice")));
        }
        Ok(key.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(steps: &[&str]) -> Path {
        steps.iter().fold(Path::default(), |path, step| match step.parse() {
            Ok(index) => path.item(index),
            Err(_) => path.key(step),
        })
    }

    #[test]
    fn an_alias_stands_for_the_value_of_its_anchor() {
        let tree = Tree::parse("a: &x { b: 1 }\nc: *x").unwrap();
        assert_eq!(tree.at(&path(&["a"])), tree.at(&path(&["c"])));
        assert_eq!(tree.at(&path(&["c", "b"])), Some(&Tree::Unsigned(1)));
    }

    #[test]
    fn a_struck_item_leaves_the_index_of_the_others_alone() {
        let mut tree = Tree::parse("list: [a, b, c]").unwrap();
        assert!(tree.strike(&path(&["list", "1"])));
        assert!(!tree.strike(&path(&["list", "1"])), "already struck");
        assert!(!tree.strike(&path(&["list", "3"])), "never there");
        assert_eq!(tree.at(&path(&["list", "2"])), Some(&Tree::Text("c".to_owned())));
    }

    #[test]
    fn the_root_cannot_be_struck() {
        assert!(!Tree::Null.strike(&Path::default()));
    }

    #[test]
    fn a_key_written_twice_is_found_at_its_second_place() {
        let error = Tree::parse("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!(error.ours.as_deref(), Some("key `a` is written twice"));
        assert_eq!(error.yaml.location().unwrap().line(), 3);
    }

    #[test]
    fn tags_and_keys_that_are_lists_are_refused_in_our_words() {
        assert!(Tree::parse("a: !secret x").unwrap_err().ours.unwrap().contains("!name"));
        assert!(Tree::parse("[a]: 1").unwrap_err().ours.unwrap().contains("a key"));
    }

    #[test]
    fn an_alias_bomb_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let inner = vec![format!("*a{}", n - 1); 9].join(", ");
            text.push_str(&format!("a{n}: &a{n} [{inner}]\n"));
        }
        assert!(Tree::parse(&text).is_err());
    }
}
