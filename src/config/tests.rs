//! The files in `conf/` mean what they say, and no text makes the reader panic or lose its place.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path as FsPath;
use std::time::Duration;

use super::decode::What;
use super::tree::Path;
use super::*;
use crate::policy::{Policies, PolicyConfig};

const MINIMAL: &str = include_str!("../../conf/minimal.yaml");
const REFERENCE: &str = include_str!("../../conf/reference.yaml");

fn read(text: &str) -> Config {
    match built_in(text, FsPath::new("/etc/plimsoll")) {
        Ok(config) => config,
        Err(report) => panic!("{report}"),
    }
}

/// As a binary reads it that knows the built-in policies.
fn built_in(text: &str, folder: &FsPath) -> Result<Config, Report> {
    parse("test.yaml", text, folder, &Policies::default())
}

fn messages(text: &str) -> Vec<String> {
    let report = built_in(text, FsPath::new("/nowhere")).unwrap_err();
    report.problems().iter().map(|problem| problem.message().to_owned()).collect()
}

/// The reference with its examples switched on: `#key` and `#  key` are examples, `# Word` is prose.
fn reference_with_examples() -> String {
    let switch_on = |line: &str| {
        let indent = line.len() - line.trim_start().len();
        match line.trim_start().strip_prefix('#') {
            Some(rest) if !rest.is_empty() && (!rest.starts_with(' ') || rest.starts_with("  ")) => {
                format!("{}{rest}\n", &line[..indent])
            }
            _ => format!("{line}\n"),
        }
    };
    REFERENCE.lines().map(switch_on).collect()
}

#[test]
fn the_reference_states_the_defaults() {
    let defaults = "listeners: [{address: '0.0.0.0:8080'}]\n\
                    upstreams: {llama: {backends: ['127.0.0.1:8000', '127.0.0.1:8001']}}";
    assert_eq!(read(REFERENCE), read(defaults));
}

#[test]
fn every_key_there_is_stands_in_the_reference() {
    let text = reference_with_examples();
    let tree = Tree::parse(&text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    assert!(Reading::<Config>::of(tree.clone()).flaws.is_empty());
    let mut maps_of_known_keys = 0;
    for (path, map) in maps(&tree, &Path::default()) {
        if let Some(known) = known_keys(&tree, &path) {
            maps_of_known_keys += 1;
            // A secret or key is in one place or another; `qwen` and `phi` show only what `llama` does not.
            let partial = ["api_key", "token"].iter().any(|key| path.to_string().ends_with(key))
                || path.to_string().starts_with("keys.")
                || ["upstreams.qwen", "upstreams.phi"].contains(&path.to_string().as_str());
            let written: BTreeSet<&str> = map.iter().map(String::as_str).collect();
            assert!(
                partial || written == known,
                "{path}: there are {known:?}, the reference has {written:?}"
            );
        }
    }
    assert!(maps_of_known_keys >= 20, "only {maps_of_known_keys} maps were looked at");
}

/// The keys of every map in `tree`, with its path.
fn maps(tree: &Tree, path: &Path) -> Vec<(Path, Vec<String>)> {
    match tree {
        Tree::Map(entries) => {
            let inner = entries.iter().flat_map(|(key, value)| maps(value, &path.key(key)));
            std::iter::once((path.clone(), entries.keys().cloned().collect())).chain(inner).collect()
        }
        Tree::List(items) => {
            items.iter().flatten().enumerate().flat_map(|(n, item)| maps(item, &path.item(n))).collect()
        }
        _ => Vec::new(),
    }
}

/// What may stand in the map at `path`: an unknown key makes serde tell.
fn known_keys(tree: &Tree, path: &Path) -> Option<BTreeSet<&'static str>> {
    let mut tree = tree.clone();
    let intruder = "~intruder".to_owned();
    match tree.at_mut(&path.0) {
        Some(Tree::Map(entries)) => entries.insert(intruder, Tree::Null),
        _ => unreachable!("a map was found at {path}"),
    };
    let (what, at, _) = serde::Deserialize::deserialize(&tree).map(|_: Config| ()).err()?.into_parts();
    match what {
        What::UnknownKey { known } if at == path.key("~intruder") => Some(known.iter().copied().collect()),
        _ => None,
    }
}

#[test]
fn a_byte_order_mark_changes_nothing() {
    assert_eq!(read(&format!("\u{feff}{REFERENCE}")), read(REFERENCE));
    let refused = |text: &str| built_in(text, FsPath::new("/nowhere")).unwrap_err();
    let places = |report: Report| report.problems().iter().map(Problem::place).collect::<Vec<_>>();
    for text in ["listeners:\n", "listeners: [\n", "a: 1\nb: 2\n"] {
        assert_eq!(places(refused(&format!("\u{feff}{text}"))), places(refused(text)), "{text}");
    }
}

#[test]
fn the_minimal_file_needs_five_lines() {
    let config = read(MINIMAL);
    assert_eq!(
        MINIMAL.lines().filter(|line| !line.starts_with('#')).count(),
        6,
        "five, and the name of the upstream"
    );
    assert_eq!(
        config.upstreams["llama"].backends[0],
        Backend { address: "127.0.0.1:8000".to_owned(), weight: 1 }
    );
}

#[test]
fn both_forms_of_a_policy_are_read() {
    let policy = |text: &str| {
        let text = format!(
            "listeners: [{{address: 'a:1'}}]\nupstreams: {{u: {{backends: ['b:1'], policy: {text}}}}}"
        );
        read(&text).upstreams["u"].policy.clone()
    };
    for name in PolicyConfig::NAMES {
        assert_eq!(Some(policy(name)), PolicyConfig::by_name(name));
        assert_eq!(Some(policy(&format!("{{ {name}: {{}} }}"))), PolicyConfig::by_name(name));
    }
    assert_ne!(Some(policy("{ prefix_hash: { load_factor: 2 } }")), PolicyConfig::by_name("prefix_hash"));
}

#[test]
fn a_policy_of_ones_own_is_read_by_the_binary_that_knows_it_and_refused_by_others() {
    let policies = Policies::default().with("mine", || crate::policy::lmetric::Lmetric).unwrap();
    let text = |policy: &str| {
        format!("listeners: [{{address: 'a:1'}}]\nupstreams: {{u: {{backends: ['b:1'], policy: {policy}}}}}")
    };
    let read = |policy: &str, policies: &Policies| {
        let read = parse("test.yaml", &text(policy), FsPath::new("/nowhere"), policies);
        read.map(|mut config| config.upstreams.remove("u").unwrap().policy).map_err(|r| r.to_string())
    };
    for form in ["mine", "{ mine: {} }", "{ mine: }"] {
        let policy = read(form, &policies).unwrap();
        assert_eq!(policy.name(), "mine");
        assert!(policy.build().uses_prefix_index(), "{form}: it stands for the default still");
        let said = read(form, &Policies::default()).unwrap_err();
        assert!(said.starts_with("error: unknown policy `mine`\n"), "{said}");
        assert!(said.contains("known: `least_pending_tokens`, ") && said.contains("of your own"), "{said}");
    }
    let said = read("{ mine: { factor: 2 } }", &policies).unwrap_err();
    assert!(said.starts_with("error: policy `mine` has no options\n"), "{said}");
    assert!(read("mines", &policies).unwrap_err().contains("did you mean `mine`?"));
}

#[test]
fn http2_follows_tls_unless_it_is_written() {
    let listener = |text: &str| {
        let tree = Tree::parse(&format!("listeners: [{{address: 'a:1', {text}}}]")).unwrap();
        Reading::<Config>::of(tree).value.unwrap().listeners.remove(0).http2
    };
    assert!(listener("tls: {certificate: c, key: k}"));
    assert!(!listener(""));
    assert!(listener("http2: true"));
    assert!(!listener("http2: false, tls: {certificate: c, key: k}"));
}

#[test]
fn paths_are_below_the_folder_of_the_file() {
    let config = read(&format!("{MINIMAL}server: {{pid_file: a.pid}}"));
    assert_eq!(config.server.pid_file.as_deref(), Some(FsPath::new("/etc/plimsoll/a.pid")));
}

#[test]
fn the_path_of_a_socket_is_below_the_folder_too_and_not_too_long() {
    let address = |path: &str| {
        let text = format!("{MINIMAL}admin: {{address: 'unix:{path}'}}");
        built_in(&text, FsPath::new("/etc/plimsoll")).map(|config| config.admin.unwrap().address)
    };
    assert_eq!(address("a.sock").unwrap(), AdminAddress::Unix("/etc/plimsoll/a.sock".into()));
    assert_eq!(address("/run/a.sock").unwrap(), AdminAddress::Unix("/run/a.sock".into()));
    let longest = "a".repeat(107 - "/etc/plimsoll/".len());
    assert!(address(&longest).is_ok());
    let said = address(&format!("{longest}a")).unwrap_err().to_string();
    assert!(said.contains("too long for a socket") && said.contains("at most 107 bytes"), "{said}");
}

#[test]
fn off_switches_probes_and_polls_off_and_an_empty_section_does_not() {
    let upstream = |text: &str| read(&format!("{MINIMAL}    {text}\n")).upstreams["llama"].clone();
    assert_eq!(upstream("probe: off").probe_path(), None);
    assert_eq!(upstream("poll: false").poll_path(), None);
    assert_eq!(upstream("probe:").probe, Some(Probe::default()));
    assert_eq!(upstream("probe: { interval: 1s }").probe.unwrap().interval, Duration::from_secs(1));
    assert_eq!(upstream("probe: { path: /alive }").probe_path(), Some("/alive"));
}

#[test]
fn an_upstream_that_was_refused_is_not_said_to_be_missing() {
    let text =
        "listeners: [{address: 'a:1'}]\nroutes: [{upstream: u}]\nupstreams: {u: 7, v: {backends: ['b:1']}}";
    assert_eq!(
        messages(text),
        ["expected a map with keys such as `engine`, `policy`, `models`, found the number 7"]
    );
}

#[test]
fn a_list_whose_only_item_was_refused_is_not_said_to_be_empty() {
    let found = messages("listeners: [{address: 'a:1'}]\nupstreams: {u: {backends: ['b']}}");
    assert_eq!(found, ["expected an address such as `10.0.0.1:8000`, found `b`: the port is missing"]);
}

#[test]
fn an_empty_file_lacks_what_is_required() {
    for text in ["", "# nothing\n", "---\n", "{}"] {
        assert_eq!(messages(text), ["missing key `listeners`", "missing key `upstreams`"], "{text:?}");
    }
}

#[test]
fn files_that_are_no_text_are_refused_with_their_name() {
    let folder = std::env::temp_dir().join(format!("plimsoll-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("latin1.yaml"), b"# ok\na: \xe9\n").unwrap();
    let shown = |name: &str| load(&folder.join(name), &Policies::default()).unwrap_err().to_string();
    assert!(shown("absent.yaml").contains("absent.yaml") && shown("absent.yaml").contains("No such file"));
    assert!(shown("").contains("directory"), "{}", shown(""));
    assert!(shown("latin1.yaml").contains("latin1.yaml:2:4"), "{}", shown("latin1.yaml"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_key_and_a_certificate_are_told_apart_and_a_key_is_not_public() {
    let folder = std::env::temp_dir().join(format!("plimsoll-pem-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let pem = |kind: &str| format!("-----BEGIN {kind}-----\nAA==\n-----END {kind}-----\n");
    std::fs::write(folder.join("cert.pem"), pem("CERTIFICATE")).unwrap();
    std::fs::write(folder.join("key.pem"), pem("EC PRIVATE KEY")).unwrap();
    std::fs::write(folder.join("locked.pem"), pem("ENCRYPTED PRIVATE KEY")).unwrap();
    let mode = |name: &str, mode| std::fs::set_permissions(folder.join(name), Permissions::from_mode(mode));
    mode("cert.pem", 0o644).unwrap();
    mode("key.pem", 0o640).unwrap();
    let check = |certificate: &str, key: &str| {
        let tls = format!("{{certificate: {certificate}, key: {key}}}");
        let text =
            format!("listeners: [{{address: 'a:1', tls: {tls}}}]\nupstreams: {{u: {{backends: ['b:1']}}}}");
        built_in(&text, &folder).map_err(|report| report.to_string())
    };
    assert_eq!(
        check("cert.pem", "key.pem").unwrap().listeners[0].tls.as_ref().unwrap().key,
        folder.join("key.pem")
    );
    let swapped = check("key.pem", "cert.pem").unwrap_err();
    assert!(swapped.contains("is not a certificate: it holds a ec private key"), "{swapped}");
    assert!(swapped.contains("is not a private key: it holds a certificate"), "{swapped}");
    assert!(check("cert.pem", "locked.pem").unwrap_err().contains("passphrase"));
    mode("key.pem", 0o644).unwrap();
    let public = check("cert.pem", "key.pem").unwrap_err();
    assert!(public.contains("key.pem` (mode 644): `chmod o-rwx ") && public.contains(".tls.key"), "{public}");
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Seeded: a failure prints the seed and the text it came from.
#[test]
fn no_mutilated_file_makes_the_reader_panic_or_lose_its_place() {
    let whole = reference_with_examples();
    let mut refused = 0;
    for seed in 0..ROUNDS {
        let text = mutilated(&whole, &mut fastrand::Rng::with_seed(seed));
        let read = std::panic::catch_unwind(|| built_in(&text, FsPath::new("/nowhere")));
        let Ok(result) = read else { panic!("seed {seed} panics on:\n{text}") };
        let Err(report) = result else { continue };
        refused += 1;
        assert!(!report.problems().is_empty(), "seed {seed}: refused without a problem:\n{text}");
        for problem in report.problems() {
            let Some((line, column)) = problem.place() else {
                panic!("seed {seed}: no place: {problem:?}\n{text}")
            };
            let source = place::lines(&text).nth(line - 1);
            let inside = source.is_some_and(|source| column <= source.chars().count() + 1);
            assert!(inside, "seed {seed}: {line}:{column} is outside of the text: {problem:?}\n{text}");
        }
        assert!(report.to_string().starts_with("error: "), "seed {seed}");
    }
    assert!(refused > ROUNDS / 2, "only {refused} of {ROUNDS} texts were refused");
}

const ROUNDS: u64 = 400;

fn mutilated(whole: &str, rng: &mut fastrand::Rng) -> String {
    const INSTEAD: [&str; 14] = [
        "- x",
        "  a: b",
        "\tx: y",
        "]: [",
        "&a *a",
        "'",
        "key: |",
        "!tag x",
        "- - -",
        "? x",
        "é\u{2028}: \r",
        "...",
        "---",
        "\u{1}",
    ];
    let mut lines: Vec<String> = whole.lines().map(str::to_owned).collect();
    for _ in 0..rng.usize(1..6) {
        let at = rng.usize(..lines.len());
        match rng.u32(..7) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(rng.usize(..lines.len()), lines[at].clone()),
            2 => lines[at] = rng.choice(INSTEAD).unwrap_or_default().to_owned(),
            3 => lines.insert(at, rng.choice(INSTEAD).unwrap_or_default().to_owned()),
            4 => lines[at] = lines[at].replacen(": ", ": 7", 1),
            5 => lines[at].insert(0, ' '),
            _ => lines.truncate(at + 1),
        }
    }
    let mut text = lines.join("\n");
    if rng.bool() {
        let end = rng.usize(..=text.len());
        text.truncate(text.floor_char_boundary(end));
    }
    text
}

#[test]
fn what_is_shown_reads_back_as_the_same_configuration() {
    let text = reference_with_examples();
    for text in [REFERENCE, text.as_str(), MINIMAL] {
        let tree = Tree::parse(text).unwrap();
        let written: Config = Reading::of(tree).value.unwrap();
        let shown = show(&written);
        // The hash of a key is not shown, and that of no key is as good.
        let shown = shown.replace(show::REDACTED, &"a".repeat(64));
        let tree = Tree::parse(&shown).unwrap_or_else(|error| panic!("{error:?}\n{shown}"));
        let reading = Reading::<Config>::of(tree);
        assert!(reading.flaws.is_empty(), "{shown}");
        let again = show(&reading.value.unwrap()).replace(show::REDACTED, &"a".repeat(64));
        assert_eq!(again, shown);
    }
    assert_eq!(read(&show(&read(REFERENCE))), read(REFERENCE));
}

#[test]
fn every_key_of_the_reference_is_shown() {
    let text = reference_with_examples();
    let tree = Tree::parse(&text).unwrap();
    let config: Config = Reading::of(tree.clone()).value.unwrap();
    let shown = Tree::parse(&show(&config)).unwrap();
    let in_shown: std::collections::HashMap<String, Vec<String>> =
        maps(&shown, &Path::default()).into_iter().map(|(path, keys)| (path.to_string(), keys)).collect();
    for (path, keys) in maps(&tree, &Path::default()) {
        let path = path.to_string();
        let shown = in_shown.get(&path).unwrap_or_else(|| panic!("{path} is not shown"));
        // Where a key or secret is kept is a matter of its own.
        let place = |key: &String| ["env", "file", "credential", "sha256"].contains(&key.as_str());
        for key in keys.iter().filter(|key| !place(key)) {
            assert!(shown.contains(key), "{path}: {key} is not shown");
        }
    }
}
