//! Reads serde types from a [`Tree`], with errors that know where they arose and what was found.
//!
//! A fault is handed up from the value that was refused, and every list and map on the way adds its step; so
//! the path is exact whatever visitor sits in between. `deny_unknown_fields`, missing keys and wrong names
//! arrive as data ([`What`]), not as sentences to be taken apart again.
//!
//! An empty value (`limits:` with nothing below it) reads as an empty map where a map of known keys is
//! wanted, so that a section whose keys are all commented out means its defaults. Elsewhere nothing is
//! nothing, and refused.

use std::collections::btree_map;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};

use super::tree::{Path, Step, Tree};

/// Why a tree is not the wanted value.
#[derive(Debug)]
pub(super) struct Fault {
    what: What,
    /// From the refused value up to the root.
    steps: Vec<Step>,
    on_key: bool,
}

/// What was wrong.
#[derive(Debug)]
pub(super) enum What {
    /// The last step of the path is a key that nobody reads.
    UnknownKey { known: &'static [&'static str] },
    /// A name that is not one of a fixed few.
    UnknownName { found: String, known: &'static [&'static str] },
    /// A key that has no default is not in the map at the path.
    MissingKey(&'static str),
    /// Neither the wanted type nor, perhaps, the wanted form.
    Unexpected { found: String, expected: String },
    /// Anything else, in the words of whoever refused it.
    Other(String),
}

impl Fault {
    fn new(what: What) -> Self {
        Self { what, steps: Vec::new(), on_key: false }
    }

    fn under(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Takes the fault apart: what was wrong, where, and whether the key is to blame, not its value.
    pub(super) fn into_parts(self) -> (What, Path, bool) {
        let mut steps = self.steps;
        steps.reverse();
        (self.what, Path(steps), self.on_key)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.what)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(What::Other(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(What::Unexpected { found: described(found), expected: expected.to_string() })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(found: &str, known: &'static [&'static str]) -> Self {
        Self::new(What::UnknownName { found: found.to_owned(), known })
    }

    fn unknown_field(_found: &str, known: &'static [&'static str]) -> Self {
        Self::new(What::UnknownKey { known })
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(What::MissingKey(field))
    }
}

/// What was found, in the words of someone who writes YAML.
fn described(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => format!("`{value}`"),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Float(value) => format!("the number {value}"),
        Unexpected::Str("") => "an empty string".to_owned(),
        Unexpected::Str(value) => format!("`{value}`"),
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map".to_owned(),
        other => other.to_string(),
    }
}

/// `a`, `b`, `c`
pub(super) fn listed<S: AsRef<str>>(names: &[S]) -> String {
    names.iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

impl Tree {
    fn unexpected(&self) -> Unexpected<'_> {
        match self {
            Self::Null => Unexpected::Unit,
            Self::Bool(value) => Unexpected::Bool(*value),
            Self::Unsigned(value) => Unexpected::Unsigned(*value),
            Self::Signed(value) => Unexpected::Signed(*value),
            Self::Float(value) => Unexpected::Float(*value),
            Self::Text(value) => Unexpected::Str(value),
            Self::List(_) => Unexpected::Seq,
            Self::Map(_) => Unexpected::Map,
        }
    }

    fn is_not(&self, expected: &str) -> Fault {
        de::Error::invalid_type(self.unexpected(), &expected)
    }
}

impl<'de> Deserializer<'de> for &'de Tree {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Tree::Null => visitor.visit_unit(),
            Tree::Bool(value) => visitor.visit_bool(*value),
            Tree::Unsigned(value) => visitor.visit_u64(*value),
            Tree::Signed(value) => visitor.visit_i64(*value),
            Tree::Float(value) => visitor.visit_f64(*value),
            Tree::Text(value) => visitor.visit_borrowed_str(value),
            Tree::List(items) => visitor.visit_seq(Items { left: items.iter().enumerate() }),
            Tree::Map(entries) => visitor.visit_map(Entries { left: entries.iter(), open: None }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Tree::Bool(value) => visitor.visit_bool(*value),
            other => Err(other.is_not("`true` or `false`")),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Tree::Text(value) => visitor.visit_borrowed_str(value),
            Tree::Unsigned(_) | Tree::Signed(_) | Tree::Float(_) | Tree::Bool(_) => {
                Err(self.is_not("a string (put it in quotes if it is meant as one)"))
            }
            other => Err(other.is_not("a string")),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Tree::List(_) => self.deserialize_any(visitor),
            other => Err(other.is_not("a list")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Tree::Map(_) => self.deserialize_any(visitor),
            other => Err(other.is_not("a map")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self {
            Tree::Map(_) => self.deserialize_any(visitor),
            Tree::Null => visitor.visit_map(Entries { left: btree_map::Iter::default(), open: None }),
            other => {
                let some = if fields.len() > 3 { "such as " } else { "" };
                Err(other
                    .is_not(&format!("a map with keys {some}{}", listed(&fields[..fields.len().min(3)]))))
            }
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self {
            Tree::Text(value) => visitor.visit_enum(value.as_str().into_deserializer()),
            other => Err(other.is_not(&format!("one of {}", listed(variants)))),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf
        unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct Items<'de> {
    left: std::iter::Enumerate<std::slice::Iter<'de, Option<Tree>>>,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let next = self.left.find_map(|(index, item)| item.as_ref().map(|tree| (index, tree)));
        let Some((index, tree)) = next else { return Ok(None) };
        seed.deserialize(tree).map(Some).map_err(|fault| fault.under(Step::Item(index)))
    }
}

struct Entries<'de> {
    left: btree_map::Iter<'de, String, Tree>,
    /// The entry whose key has been read.
    open: Option<(&'de str, &'de Tree)>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, tree)) = self.left.next() else { return Ok(None) };
        self.open = Some((key, tree));
        let reader: StrDeserializer<'_, Fault> = key.as_str().into_deserializer();
        seed.deserialize(reader).map(Some).map_err(|fault| {
            let mut fault = fault.under(Step::Key(key.clone()));
            fault.on_key = true;
            fault
        })
    }

    fn next_value_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some((key, tree)) = self.open.take() else {
            return Err(de::Error::custom("a value before its key"));
        };
        seed.deserialize(tree).map_err(|fault| fault.under(Step::Key(key.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        size: u32,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[serde(default)]
        list: Vec<Inner>,
        inner: Option<Inner>,
        name: String,
    }

    fn fault(text: &str) -> (What, String, bool) {
        let tree = Tree::parse(text).unwrap();
        let (what, path, on_key) = Outer::deserialize(&tree).unwrap_err().into_parts();
        (what, path.to_string(), on_key)
    }

    #[test]
    fn an_unknown_key_is_found_on_the_key_however_deep_it_is() {
        let (what, path, on_key) = fault("list: [{}, {seize: 1}]");
        assert!(matches!(what, What::UnknownKey { known: ["size"] }), "{what:?}");
        assert_eq!((path.as_str(), on_key), ("list[1].seize", true));
    }

    #[test]
    fn a_wrong_type_is_found_on_the_value() {
        let (what, path, on_key) = fault("inner: {size: big}");
        assert!(matches!(&what, What::Unexpected { found, .. } if found == "`big`"), "{what:?}");
        assert_eq!((path.as_str(), on_key), ("inner.size", false));
    }

    #[test]
    fn a_missing_key_is_found_on_the_map_that_lacks_it() {
        let (what, path, _) = fault("list: []");
        assert!(matches!(what, What::MissingKey("name")), "{what:?}");
        assert_eq!(path, "");
    }

    #[test]
    fn a_section_with_nothing_in_it_has_its_defaults() {
        let tree = Tree::parse("inner:\nname: x").unwrap();
        let outer = Outer::deserialize(&tree).unwrap();
        assert_eq!((outer.name.as_str(), outer.list.len(), outer.inner.unwrap().size), ("x", 0, 0));
    }

    #[test]
    fn a_value_that_is_nothing_is_refused() {
        let (what, path, _) = fault("name:");
        assert!(matches!(&what, What::Unexpected { found, .. } if found == "nothing"), "{what:?}");
        assert_eq!(path, "name");
    }
}
