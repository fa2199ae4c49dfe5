//! Whether an answer is as `docs/openapi.yaml` describes it: keys, types and words, no more and no less.

use serde_json::Value;
use std::path::Path;

/// The description.
pub(super) fn description() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.yaml");
    let text = std::fs::read_to_string(path).expect("docs/openapi.yaml");
    serde_yaml::from_str(&text).expect("YAML")
}

/// Checks the answer to a request with that method and path.
pub(super) fn check(method: &str, path: &str, answer: &Value) {
    let description = description();
    let schema =
        &description["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"];
    assert!(schema.is_object(), "{method} {path} is not described");
    let mut faults = Vec::new();
    compare(&description, schema, answer, path, &mut faults);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn compare(all: &Value, schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
    if let Some(name) = schema["$ref"].as_str() {
        let named = all.pointer(name.trim_start_matches('#')).unwrap_or_else(|| panic!("{name} is missing"));
        return compare(all, named, value, at, faults);
    }
    let types: Vec<_> = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    if !types.iter().any(|kind| is(kind, value)) {
        return faults.push(format!("{at}: {value} is none of {types:?}"));
    }
    if let Some(words) = schema["enum"].as_array().filter(|words| !words.contains(value)) {
        faults.push(format!("{at}: {value} is none of {words:?}"));
    }
    for item in value.as_array().into_iter().flatten() {
        compare(all, &schema["items"], item, &format!("{at}[]"), faults);
    }
    let Some(object) = value.as_object() else { return };
    for key in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !object.contains_key(key) {
            faults.push(format!("{at}: no {key}"));
        }
    }
    for (key, value) in object {
        let known = schema["properties"].get(key).or_else(|| schema.get("additionalProperties"));
        match known {
            Some(known) => compare(all, known, value, &format!("{at}.{key}"), faults),
            None => faults.push(format!("{at}: {key} is not described")),
        }
    }
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[test]
fn an_answer_that_is_not_as_described_is_found() {
    let faults = |answer: Value| {
        let mut faults = Vec::new();
        let all = description();
        compare(&all, &all["components"]["schemas"]["Choice"], &answer, "choice", &mut faults);
        faults.len()
    };
    let good = serde_json::json!({ "ago_seconds": 0.1, "id": "a", "upstream": "u", "backend": "b", "reason": "only",
        "model": null, "prompt_tokens": 1, "matched_tokens": 0 });
    assert_eq!(faults(good.clone()), 0);
    let changed = |key: &str, value: Value| {
        let mut changed = good.clone();
        changed[key] = value;
        changed
    };
    assert_eq!(faults(changed("model", 1.into())), 1);
    assert_eq!(faults(changed("prompt_tokens", 1.5.into())), 1);
    assert_eq!(faults(changed("more", 1.into())), 1);
    assert_eq!(faults(serde_json::json!({})), 8);
    assert_eq!(faults(Value::Null), 1);
}
