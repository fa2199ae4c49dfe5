//! Where in the text a value stands.
//!
//! The YAML parser tells places only in its errors. So the text is read once more for every problem, along
//! the path of the problem, by a reader that fails on purpose when it has arrived: the place of that error is
//! the answer. What is not on the way is skipped without being looked at.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::tree::{Path, Step};

/// A place in the text: line and column, in characters, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    /// The first character of a text.
    pub(super) const START: Self = Self { line: 1, column: 1 };

    /// After the last character of `text`.
    pub(super) fn end_of(text: &str) -> Self {
        let (index, last) = lines(text).enumerate().last().unwrap_or((0, ""));
        Self { line: index + 1, column: last.chars().count() + 1 }
    }

    /// Where the YAML parser says that it failed; the start of the text if it does not say.
    pub(super) fn of_error(error: &serde_yaml::Error) -> Self {
        error.location().map_or(Self::START, |at| Self { line: at.line(), column: at.column() })
    }

    /// Where the value at `path` begins, or the key that leads to it. A path that goes on where the text does
    /// not (into a backend written as a plain address) ends at the last value on the way.
    pub(super) fn of_path(text: &str, path: &Path, on_key: bool) -> Self {
        let search = Search { steps: &path.0, on_key };
        match search.deserialize(serde_yaml::Deserializer::from_str(text)) {
            Ok(()) => Self::START,
            Err(error) => Self::of_error(&error),
        }
    }
}

/// The lines of `text`, cut where YAML cuts them.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let all = rest?;
        let Some(end) = all.find(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']) else { return rest.take() };
        let after = &all[end..];
        let width =
            if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        rest = Some(&after[width..]);
        Some(&all[..end])
    })
}

/// Reads towards the end of `steps`, and fails there.
#[derive(Clone, Copy)]
struct Search<'a> {
    steps: &'a [Step],
    on_key: bool,
}

const ARRIVED: &str = "arrived";

impl<'de> DeserializeSeed<'de> for Search<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Search<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ARRIVED)
    }

    // Scalars are the end of any path: the provided methods fail, which is what is wanted.

    fn visit_enum<A: EnumAccess<'de>>(self, _tagged: A) -> Result<(), A::Error> {
        Err(A::Error::custom(ARRIVED))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if let Some((Step::Item(index), steps)) = self.steps.split_first() {
            let passed = (0..*index).all(|_| matches!(list.next_element::<IgnoredAny>(), Ok(Some(_))));
            if passed {
                list.next_element_seed(Search { steps, ..self })?;
            }
        }
        Err(A::Error::custom(ARRIVED))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((Step::Key(wanted), steps)) = self.steps.split_first() {
            let stop = self.on_key && steps.is_empty();
            while let Some(found) = map.next_key_seed(IsKey { wanted, stop })? {
                if found {
                    map.next_value_seed(Search { steps, ..self })?;
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Err(A::Error::custom(ARRIVED))
    }
}

/// Whether a key is the wanted one; fails at it if it is the goal itself.
#[derive(Clone, Copy)]
struct IsKey<'a> {
    wanted: &'a str,
    stop: bool,
}

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        if key == self.wanted && self.stop { Err(E::custom(ARRIVED)) } else { Ok(key == self.wanted) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a: 1\nlist:\n  - x\n  - { k: v, é: w }\nmap:\n  inner:\n    deep: [1, 2]\n";

    fn at(path: &Path, on_key: bool) -> (usize, usize) {
        let place = Place::of_path(TEXT, path, on_key);
        (place.line, place.column)
    }

    #[test]
    fn keys_and_values_have_places_of_their_own() {
        let root = Path::default();
        assert_eq!(at(&root.key("a"), true), (1, 1));
        assert_eq!(at(&root.key("a"), false), (1, 4));
        assert_eq!(at(&root.key("list").item(0), false), (3, 5));
        assert_eq!(at(&root.key("list").item(1).key("é"), true), (4, 13));
        assert_eq!(at(&root.key("list").item(1).key("é"), false), (4, 16));
        assert_eq!(at(&root.key("map").key("inner").key("deep").item(1), false), (7, 15));
    }

    #[test]
    fn a_path_that_goes_on_too_far_ends_at_the_last_value_on_it() {
        let root = Path::default();
        assert_eq!(at(&root.key("list").item(0).key("address"), false), (3, 5));
        assert_eq!(at(&root.key("list").item(7), false).0, 3, "the list");
        assert_eq!(at(&root.key("nothing"), false), (1, 1));
    }

    #[test]
    fn a_value_behind_an_alias_stands_where_it_is_written() {
        let text = "a: &x { t: 30 }\nb: *x\n";
        let place = Place::of_path(text, &Path::default().key("b").key("t"), false);
        assert_eq!(place, Place { line: 1, column: 12 });
    }

    #[test]
    fn lines_are_counted_as_yaml_counts_them() {
        assert_eq!(lines("a\r\nb\rc\u{2028}d\n").collect::<Vec<_>>(), ["a", "b", "c", "d", ""]);
        assert_eq!(lines("").collect::<Vec<_>>(), [""]);
    }
}
