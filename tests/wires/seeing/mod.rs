//! What an operator sees of a running proxy: the table of metrics, the alerts, the dashboard, the traces.

mod alerts;
mod dashboard;
mod names;
mod prometheus;
mod table;
mod traces;

use std::process::{Command, Stdio};

/// Whether that program is here. CI has to have it; elsewhere its tests are left out, and say so.
fn found(program: &str) -> bool {
    let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = version.is_ok_and(|status| status.success());
    let is_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(found || !is_ci, "{program} is not installed (Debian package prometheus)");
    if !found {
        eprintln!("SKIPPED: {program} is not installed (Debian package prometheus)");
    }
    found
}
