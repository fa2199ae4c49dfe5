//! The unit of `systemd/` is one that systemd understands, and lets the service do little more than it must.
//!
//! systemd 252 or newer says so, without a running systemd. Its verdicts are compared, not the lines of the unit.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Of 10; below 2.0 systemd calls it OK.
const MOST_EXPOSED: f64 = 2.0;

fn analyze(words: &[&str]) -> Option<Output> {
    let asked = Command::new("systemd-analyze").args(words).env("LC_ALL", "C.UTF-8").output();
    if asked.is_err() {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "systemd-analyze is missing");
        skipped("what needs systemd-analyze");
    }
    asked.ok()
}

#[expect(clippy::print_stderr, reason = "for whoever reads the log of the tests")]
fn skipped(what: &str) {
    eprintln!("SKIPPED: {what}");
}

fn unit() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/plimsoll.service");
    std::fs::read_to_string(path).expect("the unit")
}

/// The unit, with this build's program and `more` under `[Service]`.
fn copy(folder: &str, more: &str) -> (PathBuf, String) {
    let folder = std::env::temp_dir().join(format!("plimsoll-{folder}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a scratch folder");
    let text = unit().replace("/usr/local/bin/plimsoll", env!("CARGO_BIN_EXE_plimsoll"));
    let text = text.replace("[Service]\n", &format!("[Service]\n{more}\n"));
    let path = folder.join("plimsoll.service");
    std::fs::write(&path, text).expect("it can be written");
    (folder, path.display().to_string())
}

#[test]
fn systemd_understands_every_line() {
    let (folder, path) = copy("verify", "");
    let Some(said) = analyze(&["verify", "--recursive-errors=no", "--man=no", &path]) else { return };
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    std::fs::remove_dir_all(folder).expect("the folder goes");
}

#[test]
fn a_line_that_systemd_does_not_understand_is_told() {
    let (folder, path) = copy("misspelt", "ProtectEverything=yes");
    let Some(said) = analyze(&["verify", "--recursive-errors=no", "--man=no", &path]) else { return };
    assert!(String::from_utf8_lossy(&said.stderr).contains("ProtectEverything"), "{said:?}");
    std::fs::remove_dir_all(folder).expect("the folder goes");
}

#[test]
fn the_service_is_hardly_exposed() {
    let (folder, path) = copy("security", "");
    let Some(said) = analyze(&["security", "--offline=yes", "--no-pager", &path]) else { return };
    let table = String::from_utf8_lossy(&said.stdout);
    let verdict = table.lines().last().unwrap_or_default();
    let level = verdict.split_whitespace().find_map(|word| word.parse::<f64>().ok());
    let level = level.unwrap_or_else(|| panic!("no level in {verdict:?}: {said:?}"));
    assert!(level <= MOST_EXPOSED, "{table}");
    std::fs::remove_dir_all(folder).expect("the folder goes");
}

/// The example of a credential, switched on, is one that systemd takes.
#[test]
fn the_example_of_a_credential_holds() {
    let text = unit();
    let example = text.lines().find_map(|line| line.strip_prefix("#LoadCredential="));
    let example = example.expect("an example of LoadCredential in the unit");
    assert!(example.split_once(':').is_some_and(|(name, path)| !name.contains('/') && path.starts_with('/')));
    let (folder, path) = copy("credential", &format!("LoadCredential={example}"));
    let Some(said) = analyze(&["verify", "--recursive-errors=no", "--man=no", &path]) else { return };
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    std::fs::remove_dir_all(folder).expect("the folder goes");
}
