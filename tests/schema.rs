//! `conf/plimsoll.schema.json` is what the types say, and it and `plimsoll check` do not contradict each other; nor
//! does `docs/configuration.md`, which is made from it.
//!
//! Where the schema refuses a file, so must `check`; an editor that marks what is right is worse than none. The other
//! way round it may not be: references, clashes and files are beyond a schema. When the types were changed on purpose,
//! `PLIMSOLL_WRITE=1 cargo test --test schema` writes both files anew.

#[path = "schema/reference.rs"]
pub mod reference;
#[path = "schema/validator.rs"]
pub mod validator;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use plimsoll::config;
use plimsoll::policy::Policies;
use plimsoll::policy::round_robin::RoundRobin;
use serde_json::{Value, json};
use validator::faults;

/// Broken files of `tests/config` in which a schema can find nothing: no YAML, or a mistake that is in no single value.
const BEYOND_A_SCHEMA: [&str; 7] =
    ["admin", "clashes", "dangling_upstream", "duplicate_key", "indentation", "tab", "unclosed"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn schema() -> Value {
    config::schema(&Policies::default())
}

fn yaml(text: &str) -> Option<Value> {
    serde_yaml::from_str(text).ok()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The YAML files of `folder`, sorted.
fn yaml_files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(folder)).expect("the folder is there");
    let paths = entries.map(|entry| entry.expect("it can be read").path());
    let mut yaml: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")).collect();
    yaml.sort();
    yaml
}

/// Compares the file with `made`, or writes it if that is asked for.
fn is_up_to_date(file: &str, made: &str) {
    let path = root().join(file);
    if std::env::var_os("PLIMSOLL_WRITE").is_some() {
        std::fs::write(&path, made).expect("it can be written");
    }
    let stands = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(stands == made, "{file} is stale: PLIMSOLL_WRITE=1 cargo test --test schema");
}

#[test]
fn the_schema_in_conf_is_that_of_the_types() {
    is_up_to_date("conf/plimsoll.schema.json", &format!("{:#}\n", schema()));
}

#[test]
fn every_file_in_conf_fits_the_schema() {
    let schema = schema();
    for path in yaml_files("conf") {
        let file = yaml(&read(&path)).unwrap_or_else(|| panic!("{} is no YAML", path.display()));
        // Rules for Prometheus lie here too.
        if file.get("listeners").is_some() {
            assert_eq!(faults(&schema, &file), [""; 0], "{}", path.display());
        }
    }
}

#[test]
fn broken_files_do_not_fit_unless_it_takes_more_than_a_schema() {
    let schema = schema();
    let mut missed = Vec::new();
    for path in yaml_files("tests/config") {
        let name = path.file_stem().and_then(|name| name.to_str()).expect("ASCII").to_owned();
        if yaml(&read(&path)).is_none_or(|file| faults(&schema, &file).is_empty()) {
            missed.push(name);
        }
    }
    assert_eq!(missed, BEYOND_A_SCHEMA);
}

#[test]
fn the_reference_is_that_of_the_types() {
    is_up_to_date("docs/configuration.md", &reference::page(&schema()));
}

#[test]
fn a_default_in_the_schema_is_the_default() {
    let minimal = json!({
        "listeners": [{"address": "127.0.0.1:8080"}],
        "upstreams": {"u": {"backends": [{"address": "127.0.0.1:8000"}], "retry": {}, "probe": {}, "poll": {}}},
    });
    let mut spelled = minimal.clone();
    let added = spell_out(&schema(), &mut spelled);
    assert!(added > 40, "{added} defaults");
    let scratch = std::env::temp_dir();
    let read = |file: &Value| {
        config::parse("test", &file.to_string(), &scratch, &Policies::default())
            .unwrap_or_else(|report| panic!("{report}"))
    };
    assert_eq!(read(&spelled), read(&minimal));
}

/// Each source of backends of the reference in an upstream of its own: it shows what may not stand together.
fn part_sources(reference: &mut Value) {
    let upstreams = reference["upstreams"].as_object_mut().expect("it has upstreams");
    let shown = upstreams.values_mut().find_map(|upstream| upstream.as_object_mut()?.remove("discover"));
    for kind in ["dns", "srv", "file"] {
        let mut one = shown.clone().expect("it shows `discover`");
        let keys = one.as_object_mut().expect("it is a map");
        keys.retain(|key, _| key == kind || !["dns", "srv", "file"].contains(&key.as_str()));
        if kind == "file" {
            keys.remove("servers");
        }
        upstreams.insert(kind.to_owned(), json!({ "discover": one }));
    }
}

/// Gives every key of `value` that has a default this default; says how many.
fn spell_out(schema: &Value, value: &mut Value) -> usize {
    let branches = schema["anyOf"].as_array().into_iter().flatten();
    let mut added = branches.filter(|one| one["type"] != "string").map(|one| spell_out(one, value)).sum();
    if let Some(items) = value.as_array_mut() {
        return items.iter_mut().map(|item| spell_out(&schema["items"], item)).sum();
    }
    let Some(map) = value.as_object_mut() else { return added };
    for (key, of_key) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(default) = of_key.get("default") {
            map.insert(key.clone(), default.clone());
            added += 1;
            continue;
        }
        // A section that means something by being there says what its absence means.
        let says = of_key["description"].as_str().unwrap_or_default();
        if of_key["properties"].is_object() && !says.contains("Absent:") {
            map.entry(key).or_insert_with(|| json!({}));
        }
        if let Some(inner) = map.get_mut(key) {
            added += spell_out(of_key, inner);
        }
    }
    if schema["additionalProperties"].is_object() {
        added += map.values_mut().map(|one| spell_out(&schema["additionalProperties"], one)).sum::<usize>();
    }
    added
}

#[test]
fn what_the_schema_refuses_is_refused_and_numbers_to_the_last_one() {
    let schema = schema();
    let scratch = Scratch::new();
    let mut file = yaml(&everything()).expect("the reference is YAML");
    part_sources(&mut file);
    assert_eq!(faults(&schema, &file), [""; 0]);
    assert_eq!(scratch.check(&file), Ok(()));

    let odd = [
        json!(null),
        json!(true),
        json!(false),
        json!(1.5),
        json!(""),
        json!("off"),
        json!("x"),
        json!("0s"),
        json!("5"),
        json!("10 s"),
        json!("a:b:1"),
        json!("*a*"),
        json!("/#"),
        json!([]),
        json!(["x"]),
        json!([1]),
        json!({}),
        json!({"x": 1}),
    ];
    let numbers = numbers_around_bounds(&schema);
    let (mut refused, mut compared) = (0, 0);
    for place in places(&file, "") {
        let is_number = file.pointer(&place).expect("it is there").is_number();
        for value in odd.iter().chain(if is_number { &numbers[..] } else { &numbers[..2] }) {
            let mut changed = file.clone();
            *changed.pointer_mut(&place).expect("it is there") = value.clone();
            let by_schema = faults(&schema, &changed);
            let exact = is_number && value.is_number();
            if by_schema.is_empty() && !exact {
                continue;
            }
            let by_check = scratch.check(&changed);
            assert_eq!(
                by_check.is_err(),
                !by_schema.is_empty(),
                "{place} {value}: {by_schema:?} {by_check:?}"
            );
            refused += usize::from(by_check.is_err());
            compared += usize::from(exact);
        }
        if file.pointer(&place).is_some_and(Value::is_object) {
            let mut changed = file.clone();
            changed.pointer_mut(&place).expect("it is there")["no such key"] = json!(1);
            assert!(!faults(&schema, &changed).is_empty() && scratch.check(&changed).is_err(), "{place}");
        }
    }
    assert!(refused > 1_000 && compared > 300, "{refused} {compared}");
}

/// The reference with its examples, all secrets in files.
fn everything() -> String {
    let switch_on = |line: &str| {
        let indent = line.len() - line.trim_start().len();
        match line.trim_start().strip_prefix('#') {
            Some(rest) if !rest.is_empty() && (!rest.starts_with(' ') || rest.starts_with("  ")) => {
                format!("{}{rest}\n", &line[..indent])
            }
            _ => format!("{line}\n"),
        }
    };
    let text: String = read(&root().join("conf/reference.yaml")).lines().map(switch_on).collect();
    // An engine that has metrics, for `poll.path`.
    text.replace("engine: openai", "engine: vllm")
        .replace("env: ", "file: ")
        .replace("credential: ", "file: ")
}

/// Everything in `value`, as JSON pointers.
fn places(value: &Value, at: &str) -> Vec<String> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let mut found = Vec::new();
    for (key, value) in inner {
        let at = format!("{at}/{key}");
        found.extend(places(value, &at));
        found.push(at);
    }
    found
}

/// Every bound of a number in `schema`, one less and one more.
fn numbers_around_bounds(schema: &Value) -> Vec<Value> {
    let mut found = std::collections::BTreeSet::new();
    let mut open = vec![schema];
    while let Some(value) = open.pop() {
        if let Some(map) = value.as_object() {
            let bounds =
                ["minimum", "maximum", "exclusiveMinimum"].map(|key| map.get(key).and_then(Value::as_i64));
            found.extend(bounds.into_iter().flatten().flat_map(|bound| [bound - 1, bound, bound + 1]));
            open.extend(map.values());
        }
        open.extend(value.as_array().into_iter().flatten());
    }
    found.into_iter().map(Value::from).collect()
}

/// A folder with the files that the reference names.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("plimsoll-schema-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a scratch folder");
        let made = rcgen::generate_simple_self_signed(["llm.example.com".to_owned()]).expect("a certificate");
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let pem = [("cert.pem", &certificate), ("b.pem", &certificate), ("clients.pem", &certificate)];
        let keys = [("key.pem", &key), ("b-key.pem", &key)];
        let names =
            ["ADMIN_TOKEN", "TEAM_A_KEY", "team-b.key", "team-d", "ENGINE_KEY", "engine.key", "engine-key"];
        let secrets = names.map(|name| (name, name.to_owned()));
        let all = pem.into_iter().chain(keys).map(|(name, text)| (name, text.clone())).chain(secrets);
        for (name, text) in all {
            std::fs::write(folder.join(name), text).expect("it can be written");
            std::fs::set_permissions(folder.join(name), Permissions::from_mode(0o600)).expect("ours");
        }
        Self(folder)
    }

    fn check(&self, file: &Value) -> Result<(), String> {
        let parsed = config::parse("test", &file.to_string(), &self.0, &Policies::default());
        parsed.map(|_| ()).map_err(|report| report.to_string())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            assert!(std::thread::panicking(), "{error}");
        }
    }
}

#[test]
fn a_policy_of_ones_own_stands_in_the_schema_of_its_binary() {
    let own = Policies::default().with("two_lanes", RoundRobin::default).expect("a name that is free");
    let schema = config::schema(&own);
    let file = |policy: Value| {
        json!({
            "listeners": [{"address": "a:1"}],
            "upstreams": {"u": {"backends": ["b:1"], "policy": policy}},
        })
    };
    for policy in [json!("two_lanes"), json!({"two_lanes": null}), json!("lmetric")] {
        assert_eq!(faults(&schema, &file(policy.clone())), [""; 0]);
        assert_eq!(faults(&self::schema(), &file(policy.clone())).is_empty(), policy == "lmetric");
    }
    for wrong in
        [json!("three_lanes"), json!({"two_lanes": {"x": 1}}), json!({"lmetric": {}, "two_lanes": {}})]
    {
        assert!(!faults(&schema, &file(wrong)).is_empty());
    }
}
