//! The reference of the configuration, made of its schema: a section per map, a row per key.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

const HEAD: &str = "\
# Configuration

Every key of the configuration file, made from the types that read it: `PLIMSOLL_WRITE=1 cargo test --test schema`
writes this page. [`conf/reference.yaml`](../conf/reference.yaml) is the same as one file with every default in it,
[`conf/minimal.yaml`](../conf/minimal.yaml) the least that works.

A key that is left out has its default. A duration is a whole number and its unit (`250ms`, `30s`, `5m`, `1h`),
above zero; a size is one of `B`, `KiB`, `MiB`, `GiB` or, in thousands, `KB`, `MB`, `GB` (`64KiB`); an address is a
host and its port (`10.0.0.1:8000`, `gpu-7:8000`, `[::1]:8000`). Relative paths are below the folder of the file.
`NAME` is a name of yours, made of letters, digits, `-`, `_` and `.`; `[]` is each item of a list. An unknown key is
an error.

An editor that knows the schema completes keys and marks mistakes. With a YAML language server the first line of the
file says where it is: `# yaml-language-server: $schema=/usr/share/plimsoll/plimsoll.schema.json`. What only the
whole file shows (files, references, clashes) `plimsoll check FILE` tells.
";

/// The page for `schema`.
pub fn page(schema: &Value) -> String {
    let mut page = Page { text: HEAD.to_owned(), seen: BTreeMap::new() };
    page.section("", schema, "");
    page.text
}

struct Page {
    text: String,
    /// The path of each map that has its section, by what it holds.
    seen: BTreeMap<String, String>,
}

impl Page {
    /// The map at `path`, and those in it.
    fn section(&mut self, path: &str, schema: &Value, description: &str) {
        let Some(keys) = schema["properties"].as_object() else { return };
        let heading = if path.is_empty() { "The file".to_owned() } else { format!("`{path}`") };
        write!(self.text, "\n## {heading}\n").expect("a string");
        if !description.is_empty() {
            write!(self.text, "\n{description}\n").expect("a string");
        }
        let what = schema["properties"].to_string();
        if let Some(first) = self.seen.get(&what) {
            write!(self.text, "\nThe keys are those of {}.\n", link(first)).expect("a string");
            return;
        }
        self.seen.insert(what, path.to_owned());
        self.text += "\n| key | value | default | |\n|---|---|---|---|\n";
        for (key, value) in keys {
            self.row(path, key, value, schema);
        }
        for (key, value) in keys {
            self.values(key, value);
        }
        for (key, value) in keys {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            for (path, map) in maps(&path, value) {
                self.section(&path, map, value["description"].as_str().unwrap_or_default());
            }
        }
    }

    fn row(&mut self, path: &str, key: &str, value: &Value, schema: &Value) {
        let at = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        let required = schema["required"].as_array().is_some_and(|keys| keys.iter().any(|one| one == key));
        let default = match &value["default"] {
            _ if required => "required".to_owned(),
            Value::Null => String::new(),
            Value::String(text) => format!("`{text}`"),
            Value::Array(items) => items.iter().map(code).collect::<Vec<_>>().join(" "),
            // `3.0` is written `3`.
            Value::Number(number) => format!("`{}`", number.to_string().trim_end_matches(".0")),
            other => format!("`{other}`"),
        };
        let mut description = value["description"].as_str().unwrap_or_default().replace(" Required.", "");
        for stated in
            [&format!(" Default {}.", default.replace('`', "")), " Default: none.", " Default none."]
        {
            description = description.replace(stated, "");
        }
        let cells = [format!("`{key}`"), kind(&at, value), default, description];
        writeln!(self.text, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
            .expect("a string");
    }

    /// What each value of `key` means, if only a few are allowed.
    fn values(&mut self, key: &str, value: &Value) {
        let of_item = value.get("items").unwrap_or(value);
        let Some(values) = of_item["oneOf"].as_array() else { return };
        if values.iter().any(|one| one["const"].is_null()) {
            return;
        }
        write!(self.text, "\n`{key}` is {}:\n\n", if of_item == value { "one of" } else { "a list of" })
            .expect("a string");
        for one in values {
            let meaning = one["description"].as_str().unwrap_or_default().trim_end_matches('.');
            writeln!(self.text, "- {}: {meaning}", code(&one["const"])).expect("a string");
        }
    }
}

/// The maps of known keys that the value at `path` may hold, with their paths.
fn maps<'a>(path: &str, value: &'a Value) -> Vec<(String, &'a Value)> {
    let mut found = Vec::new();
    if value["properties"].is_object() {
        found.push((path.to_owned(), value));
    }
    if value["items"].is_object() {
        found.extend(maps(&format!("{path}[]"), &value["items"]));
    }
    if value["additionalProperties"].is_object() {
        found.extend(maps(&format!("{path}.NAME"), &value["additionalProperties"]));
    }
    found.extend(value["anyOf"].as_array().into_iter().flatten().flat_map(|one| maps(path, one)));
    found
}

/// What may stand at `path`, in a few words.
fn kind(path: &str, value: &Value) -> String {
    if let Some(title) = value["title"].as_str() {
        return title.to_owned();
    }
    if let Some(forms) = value["anyOf"].as_array() {
        return forms.iter().map(|one| kind(path, one)).collect::<Vec<_>>().join(" or ");
    }
    if let Some(values) = value["enum"].as_array() {
        // `false` is `off` in the words of some writers of YAML.
        let names = values.iter().filter(|value| value.is_string());
        return names.map(code).collect::<Vec<_>>().join(" ");
    }
    if value["oneOf"][0]["const"].is_string() {
        return "one of those below".to_owned();
    }
    let range = || {
        let bound = |key: &str| value[key].as_f64();
        match (bound("minimum"), bound("maximum"), bound("exclusiveMinimum")) {
            (Some(least), Some(most), _) => format!("{least} to {most}"),
            (Some(least), ..) => format!("{least} or more"),
            (.., Some(above)) => format!("above {above}"),
            _ => "number".to_owned(),
        }
    };
    let kinds = super::validator::kinds(&value["type"]);
    match kinds[0] {
        "boolean" => "`true` `false`".to_owned(),
        "string" => "text".to_owned(),
        "integer" | "number" => range(),
        "array" => match kind(&format!("{path}[]"), &value["items"]) {
            below if below == "one of those below" => "list of those below".to_owned(),
            other => format!("list of {other}"),
        },
        "object" if value["properties"].as_object().is_some_and(|keys| !keys.is_empty()) => link(path),
        "object" if value["maxProperties"] == 0 => "no options".to_owned(),
        "object" if value["additionalProperties"]["type"] == "string" => "map of texts".to_owned(),
        "object" => format!("by name, {}", kind(&format!("{path}.NAME"), &value["additionalProperties"])),
        other => panic!("{path}: {other}"),
    }
}

fn link(path: &str) -> String {
    let anchor: String =
        path.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    format!("[`{path}`](#{anchor})")
}

fn code(value: &Value) -> String {
    value.as_str().map_or_else(|| format!("`{value}`"), |text| format!("`{text}`"))
}
