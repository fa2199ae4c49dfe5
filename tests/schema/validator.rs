//! A validator for as much of JSON schema as our schema uses; a keyword that it does not know makes it panic, so
//! that none goes unchecked.

use std::cell::RefCell;
use std::collections::HashMap;

use regex::Regex;
use serde_json::{Map, Value};

/// What says nothing of whether a value is valid.
const NOTES: [&str; 4] = ["$schema", "title", "description", "default"];

/// Where and why `value` does not fit `schema`; empty if it does.
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, value, "", &mut found);
    found
}

fn check(schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let schema = match schema {
        Value::Bool(true) => return,
        Value::Object(schema) => schema,
        other => {
            assert_eq!(other, &Value::Bool(false), "no schema");
            return found.push(format!("{at}: not allowed"));
        }
    };
    for (keyword, wanted) in schema {
        let fits = match keyword.as_str() {
            "type" => kinds(wanted).iter().any(|kind| is_a(value, kind)),
            "const" => value == wanted,
            "enum" => list(wanted).contains(value),
            "anyOf" => list(wanted).iter().any(|one| faults(one, value).is_empty()),
            "oneOf" => list(wanted).iter().filter(|one| faults(one, value).is_empty()).count() == 1,
            "pattern" => value.as_str().is_none_or(|found| is_match(text(wanted), found)),
            "minimum" => value.as_f64().is_none_or(|number| number >= bound(wanted)),
            "maximum" => value.as_f64().is_none_or(|number| number <= bound(wanted)),
            "exclusiveMinimum" => value.as_f64().is_none_or(|number| number > bound(wanted)),
            "minItems" => value.as_array().is_none_or(|items| items.len() as f64 >= bound(wanted)),
            "minProperties" => value.as_object().is_none_or(|map| map.len() as f64 >= bound(wanted)),
            "maxProperties" => value.as_object().is_none_or(|map| map.len() as f64 <= bound(wanted)),
            "uniqueItems" => value.as_array().is_none_or(|items| {
                items.iter().enumerate().all(|(index, item)| !items[..index].contains(item))
            }),
            "required" => {
                value.as_object().is_none_or(|map| list(wanted).iter().all(|key| map.contains_key(text(key))))
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(wanted, item, &format!("{at}[{index}]"), found);
                }
                true
            }
            "propertyNames" => {
                for key in value.as_object().into_iter().flat_map(Map::keys) {
                    check(wanted, &Value::from(key.as_str()), &format!("{at}.{key} (the key)"), found);
                }
                true
            }
            "properties" | "additionalProperties" => {
                for (key, value) in value.as_object().into_iter().flatten() {
                    let own = schema.get("properties").and_then(|properties| properties.get(key));
                    let of_this = if keyword == "properties" { own } else { Some(wanted) };
                    if let (Some(of_this), true) = (of_this, own.is_some() == (keyword == "properties")) {
                        check(of_this, value, &format!("{at}.{key}"), found);
                    }
                }
                true
            }
            note => {
                assert!(NOTES.contains(&note), "the validator does not know `{note}`");
                true
            }
        };
        if !fits {
            found.push(format!("{at}: {keyword} {wanted}"));
        }
    }
}

/// The names of the types that `wanted` allows.
pub fn kinds(wanted: &Value) -> Vec<&str> {
    wanted.as_array().map_or_else(|| vec![text(wanted)], |kinds| kinds.iter().map(text).collect())
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("no such type: {other}"),
    }
}

thread_local! {
    /// Patterns that were read before; it takes longer to read one than to apply it.
    static PATTERNS: RefCell<HashMap<String, Regex>> = RefCell::default();
}

fn is_match(pattern: &str, found: &str) -> bool {
    PATTERNS.with_borrow_mut(|patterns| {
        let known = patterns.entry(pattern.to_owned());
        known.or_insert_with(|| Regex::new(pattern).expect("a pattern")).is_match(found)
    })
}

fn list(wanted: &Value) -> &[Value] {
    wanted.as_array().expect("a list")
}

fn text(wanted: &Value) -> &str {
    wanted.as_str().expect("a string")
}

fn bound(wanted: &Value) -> f64 {
    wanted.as_f64().expect("a number")
}
