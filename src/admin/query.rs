//! The query of a request: what was asked for, and nothing that we do not know.

use std::collections::BTreeMap;

/// What stands behind the `?`, decoded.
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// Reads a query in which only `known` keys may stand, each once.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(query: Option<&str>, known: &[&str]) -> Result<Self, String> {
        let mut found = BTreeMap::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (key, value) = (decode(key)?, decode(value)?);
            if !known.contains(&key.as_str()) {
                let known = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
                return Err(format!("`{key}` is not known here; there is {known}"));
            }
            if found.insert(key.clone(), value).is_some() {
                return Err(format!("`{key}` is given twice"));
            }
        }
        Ok(Self(found))
    }

    /// The value of a key, if it is there.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// The value of a key that has to be there.
    pub(super) fn required(&self, key: &str) -> Result<&str, String> {
        self.value(key).ok_or_else(|| format!("`{key}` is missing"))
    }

    /// The number that a key has, if it is there.
    pub(super) fn number(&self, key: &str) -> Result<Option<u32>, String> {
        let number = |value: &str| {
            value.parse().map_err(|_| format!("`{key}` is a whole number, and `{value}` is none"))
        };
        self.value(key).map(number).transpose()
    }
}

/// The text that `%XX` and `+` stand for.
fn decode(text: &str) -> Result<String, String> {
    let flawed = || "the query is not well-formed".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
                let (high, low) = (digit().ok_or_else(flawed)?, digit().ok_or_else(flawed)?);
                (high * 16 + low) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| flawed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_and_what_is_not_known_is_said() {
        let query =
            Query::parse(Some("backend=%5B%3a%3A1%5D:80&upstream=a+b&&n=7"), &["backend", "upstream", "n"]);
        let query = query.unwrap();
        assert_eq!((query.value("backend"), query.required("upstream")), (Some("[::1]:80"), Ok("a b")));
        assert_eq!((query.number("n"), query.number("m")), (Ok(Some(7)), Ok(None)));
        assert!(query.number("backend").is_err() && query.required("m").is_err());
        for flawed in ["a=1&a=2", "b=1", "a=%", "a=%4", "a=%zz", "a=%ff"] {
            assert!(Query::parse(Some(flawed), &["a"]).is_err(), "{flawed}");
        }
        assert!(Query::parse(None, &[]).unwrap().value("a").is_none());
    }
}
