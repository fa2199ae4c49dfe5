//! `conf/plimsoll.schema.json` is what the types say, and it and `plimsoll check` do not contradict each other; nor
//! does `docs/configuration.md`, which is made from it.
//!
//! Where the schema refuses a file, so must `check`; an editor that marks what is right is worse than none. The other
//! way round it may not be: references, clashes and files are beyond a schema. When the types were changed on purpose,
//! `PLIMSOLL_WRITE=1 cargo test --test schema` writes both files anew.

#[path = "schema/validator.rs"]
pub mod validator;

use std::path::{Path, PathBuf};

use plimsoll::config;
use plimsoll::policy::Policies;
use serde_json::Value;
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
