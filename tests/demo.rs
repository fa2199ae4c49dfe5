//! `plimsoll demo`, as a newcomer runs it: simulated engines, the real balancer, both policies, nobody fails.

use std::process::Command;

#[test]
fn the_demo_answers_every_request_under_both_policies_and_compares_them() {
    let output = Command::new(env!("CARGO_BIN_EXE_plimsoll"))
        .args(["demo", "--seconds", "4", "--rate", "20"])
        .output()
        .expect("the binary starts");
    let shown = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}\n{complaints}");
    for policy in ["round_robin: done", "least_pending_tokens: done"] {
        assert!(shown.contains(policy), "no table for {policy}\n{shown}\n{complaints}");
    }
    let row = |name: &str| {
        let line = shown.lines().rfind(|line| line.trim_start().starts_with(name));
        line.unwrap_or_else(|| panic!("no row `{name}` in\n{shown}"))[name.len() + 2..].trim().to_owned()
    };
    assert_eq!(row("requests failed").split_whitespace().collect::<Vec<_>>(), ["0", "0"], "{shown}");
    let answered: Vec<u32> =
        row("requests answered").split_whitespace().map(|n| n.replace(',', "").parse().unwrap()).collect();
    assert!(answered.len() == 2 && answered[0] == answered[1] && answered[0] > 20, "{shown}");
}
