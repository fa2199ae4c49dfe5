//! The configuration as a JSON schema: what an editor completes and checks a file with.
//!
//! The types derive theirs (`schemars`): keys, descriptions and defaults come from the doc comments and the
//! `impl Default` that the reader uses. What a visitor of [`units`](super::units) reads stands here as a function
//! of the same name, because no derive can see into a visitor. A schema never refuses what `check` accepts; what
//! no schema can say (files, references, clashes) is left to `check`.
//!
//! Everything is written out where it is used, without `$ref`, and in draft 7: there is no editor that cannot
//! read that.

use std::time::Duration;

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform as _};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use super::file::Config;
use crate::policy::{Policies, PolicyConfig, blend, least_pending_tokens, prefix_hash};

/// The JSON schema of a configuration that may name any of `policies`.
pub fn schema(policies: &Policies) -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Config>();
    RecursiveTransform(plain).transform(&mut schema);
    let mut schema = schema.to_value();
    head(&mut schema);
    // It depends on the machine.
    if let Some(threads) = schema.pointer_mut("/properties/server/properties/threads") {
        threads.as_object_mut().map(|threads| threads.remove("default"));
    }
    let policy = "/properties/upstreams/additionalProperties/properties/policy/anyOf";
    if let Some(forms) = schema.pointer_mut(policy) {
        for name in policies.names().filter(|name| !PolicyConfig::NAMES.contains(name)) {
            if let Some(Value::Array(names)) = forms.pointer_mut("/0/enum") {
                names.push(json!(name));
            }
            forms[1]["properties"][name] = json!({"type": ["object", "null"], "maxProperties": 0});
        }
    }
    schema
}

/// Puts first what says what this is.
fn head(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    let described = ["$schema", "description"].map(|key| map.remove(key).unwrap_or_default());
    let [draft, description] = described;
    let keys = std::mem::take(map);
    map.insert("$schema".to_owned(), draft);
    map.insert("title".to_owned(), json!("Plimsoll"));
    map.insert("description".to_owned(), description);
    map.extend(keys.into_iter().filter(|(key, _)| key != "title"));
}

const DURATION: &str = "0*[1-9][0-9]*(ms|s|m|h)";
const SIZE: &str = "^0*[1-9][0-9]*(B|KB|MB|GB|KiB|MiB|GiB)$";
const ADDRESS: &str = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*):0*[1-9][0-9]{0,4}";

pub(super) fn duration(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "duration", "type": "string", "pattern": format!("^{DURATION}$")})
}

pub(super) fn duration_or_off(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "duration, or off", "type": "string", "pattern": format!("^(off|{DURATION})$")})
}

pub(super) fn size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "size", "type": "string", "pattern": SIZE})
}

pub(super) fn address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "address", "type": "string", "pattern": format!("^{ADDRESS}$")})
}

pub(super) fn service(_: &mut SchemaGenerator) -> Schema {
    let pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.*$";
    json_schema!({"title": "name of SRV records", "type": "string", "pattern": pattern})
}

pub(super) fn name_servers(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {"title": "address of a name server", "type": "string", "pattern": r"^[0-9A-Fa-f:.\[\]]+$"},
    })
}

pub(super) fn admin_address(_: &mut SchemaGenerator) -> Schema {
    let pattern = format!("^(unix:.+|{ADDRESS})$");
    json_schema!({"title": "address, or unix:PATH", "type": "string", "pattern": pattern})
}

pub(super) fn url_path(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "path of a URL", "type": "string", "pattern": r#"^/[!"$-~]*$"#})
}

pub(super) fn collector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "URL", "type": "string", "pattern": r#"^[Hh][Tt][Tt][Pp][Ss]?://[^/?#@\s]+(/[!"$->@-~]*)?$"#})
}

pub(super) fn share(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "number", "minimum": 0, "maximum": 1})
}

pub(super) fn credential(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"title": "name of a credential", "type": "string", "pattern": "^[^/]+$"})
}

pub(super) fn between<const MIN: u32, const MAX: u32>(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "minimum": MIN, "maximum": MAX})
}

pub(super) fn off_or<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let map = generator.subschema_for::<T>();
    // Some YAML writers turn `off` into `false`.
    json_schema!({"anyOf": [{"enum": ["off", false]}, map]})
}

pub(super) fn one_or_many<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let one = generator.subschema_for::<T>();
    json_schema!({"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]})
}

pub(super) fn policy(generator: &mut SchemaGenerator) -> Schema {
    let mut options = Map::new();
    for name in PolicyConfig::NAMES {
        let of_this = match PolicyConfig::by_name(name) {
            Some(PolicyConfig::LeastPendingTokens(_)) => {
                generator.subschema_for::<least_pending_tokens::Options>()
            }
            Some(PolicyConfig::PrefixHash(_)) => generator.subschema_for::<prefix_hash::Options>(),
            Some(PolicyConfig::Blend(_)) => generator.subschema_for::<blend::Options>(),
            _ => json_schema!({"type": ["object", "null"], "maxProperties": 0}),
        };
        options.insert((*name).to_owned(), of_this.to_value());
    }
    let map = json!({
        "type": "object", "properties": options, "additionalProperties": false,
        "minProperties": 1, "maxProperties": 1,
    });
    let default = PolicyConfig::default();
    json_schema!({"default": default.name(), "anyOf": [{"enum": PolicyConfig::NAMES}, map]})
}

pub(super) fn models(_: &mut SchemaGenerator) -> Schema {
    let names = json!({"type": "array", "items": {"type": "string"}, "minItems": 1});
    json_schema!({"default": "discover", "anyOf": [{"enum": ["discover", "any"]}, names]})
}

/// A map whose keys are names that the user gives.
pub(super) fn named<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let value = generator.subschema_for::<T>();
    let names = json!({"pattern": "^[A-Za-z0-9_.-]+$"});
    json_schema!({"type": "object", "propertyNames": names, "additionalProperties": value})
}

/// [`named`], with at least one.
pub(super) fn some_named<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = named::<T>(generator);
    schema.insert("minProperties".to_owned(), json!(1));
    schema
}

/// A map of headers to their values.
pub(super) fn headers<Name: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let name = generator.subschema_for::<Name>();
    json_schema!({"type": "object", "propertyNames": name, "additionalProperties": {"type": "string"}})
}

/// For a map of an address and more: the address alone is enough.
pub(super) fn or_address(schema: &mut Schema) {
    let map = std::mem::take(schema);
    let address = json!({"title": "address", "type": "string", "pattern": format!("^{ADDRESS}$")});
    *schema = json_schema!({"anyOf": [address, map]});
}

/// What is derived, in the words of the file: descriptions in one line, defaults as they are written, no `null`
/// but for a section with nothing in it, which has its defaults.
fn plain(schema: &mut Schema) {
    without_null(schema);
    let Some(map) = schema.as_object_mut() else { return };
    map.remove("format");
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    if let Some(default) = map.remove("default") {
        let is_text = map.get("type") == Some(&json!("string"));
        let off = map.get("pattern").and_then(Value::as_str).is_some_and(|p| p.contains("off|"));
        if let Some(written) = as_written(default, is_text, off) {
            map.insert("default".to_owned(), written);
        }
    }
    let has_own_keys = map.contains_key("properties") && map.get("type") == Some(&json!("object"));
    let may_be_empty = !["required", "oneOf", "minProperties"].iter().any(|key| map.contains_key(*key));
    if has_own_keys && may_be_empty {
        map.insert("type".to_owned(), json!(["object", "null"]));
    }
}

/// Takes out what an `Option` adds: a key that may be left out still needs its value where it stands.
fn without_null(schema: &mut Schema) {
    let Some(map) = schema.as_object_mut() else { return };
    if let Some(Value::Array(types)) = map.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [only] = &types[..] {
            let only = only.clone();
            map.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(forms)) = map.get_mut("anyOf") {
        forms.retain(|form| form.get("type") != Some(&json!("null")));
        if let [Value::Object(only)] = &forms[..] {
            let only = only.clone();
            map.remove("anyOf");
            only.into_iter().for_each(|(key, value)| {
                map.entry(key).or_insert(value);
            });
        }
    }
}

/// A default as it would stand in the file; `None` if there is none.
fn as_written(default: Value, is_text: bool, may_be_off: bool) -> Option<Value> {
    match default {
        Value::Null => None,
        Value::Number(bytes) if is_text => bytes.as_u64().map(|bytes| json!(written_size(bytes))),
        Value::Object(map) if map.contains_key("nanos") => {
            let duration: Duration = serde_json::from_value(Value::Object(map)).ok()?;
            let off = may_be_off && duration.is_zero();
            Some(if off { json!("off") } else { json!(written_duration(duration)) })
        }
        other => Some(other),
    }
}

/// `15m`, but `600s`: whoever compares timeouts compares seconds.
fn written_duration(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (seconds, 0) if seconds > 600 && seconds.is_multiple_of(3_600) => format!("{}h", seconds / 3_600),
        (seconds, 0) if seconds > 600 && seconds.is_multiple_of(60) => format!("{}m", seconds / 60),
        (seconds, 0) => format!("{seconds}s"),
        _ => format!("{}ms", duration.as_millis()),
    }
}

fn written_size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, shift)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{bytes}B"), |(name, shift)| format!("{}{name}", bytes >> shift))
}
