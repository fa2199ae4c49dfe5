//! `conf/alerts.yaml`, by the program that will read it: it means something, it fires when it should, and only then.

use super::found;
use super::names::assert_known;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of `conf/`.
pub(super) fn conf(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conf").join(name)
}

fn promtool(words: &[&str], file: &str) {
    if !found("promtool") {
        return;
    }
    let output = Command::new("promtool").args(words).arg(conf(file)).output().expect("promtool starts");
    let [said, complained] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "promtool {words:?} {file}:\n{said}{complained}");
}

#[test]
fn the_rules_are_rules() {
    promtool(&["check", "rules", "--lint-fatal"], "alerts.yaml");
}

#[test]
fn each_alert_fires_when_it_should_and_only_then() {
    promtool(&["test", "rules"], "alerts.test.yaml");
}

#[test]
fn each_alert_is_seen_firing_and_says_what_to_do_about_metrics_that_exist() {
    let read = |name| std::fs::read_to_string(conf(name)).expect("a file of conf/");
    let (rules, tests) = (read("alerts.yaml"), read("alerts.test.yaml"));
    let parsed: serde_yaml::Value = serde_yaml::from_str(&rules).expect("YAML");
    let alerts = parsed["groups"][0]["rules"].as_sequence().expect("rules");
    for rule in alerts {
        let name = rule["alert"].as_str().expect("a name");
        assert!(
            tests.contains(&format!("alertname=\"{name}\"")),
            "{name} is not seen firing in alerts.test.yaml"
        );
        assert!(["critical", "warning"].contains(&rule["labels"]["severity"].as_str().expect("a severity")));
        for words in ["summary", "description"] {
            assert!(
                rule["annotations"][words].as_str().is_some_and(|text| text.len() > 20),
                "{name}: {words}"
            );
        }
        assert_known(rule["expr"].as_str().expect("an expression"));
    }
    assert!(alerts.len() >= 16, "{}", alerts.len());
}
