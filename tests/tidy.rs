//! The rules of ARCHITECTURE.md that no compiler knows, kept by an ordinary test.
//!
//! Rooms import one way, the core is pure, files and functions stay small enough to be read, and the code map names
//! what is there. A rule is a function from a source to faults, each `src/x.rs:12: what is wrong`; and every rule is
//! shown a made-up source that breaks it, because a rule that cannot fail keeps nothing.

#[path = "tidy/source.rs"]
pub mod source;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use source::{Source, item_end};

/// The rooms in the order in which they may import each other; those in one row know nothing of each other.
const ORDER: [&[&str]; 19] = [
    &["clock"],
    &["engine", "prompt"],
    &["policy"],
    &["balance"],
    &["sim"],
    &["config"],
    &["fetch"],
    &["observe"],
    &["upstream"],
    &["proxy"],
    &["ingress"],
    &["admin"],
    &["server"],
    &["demo"],
    &["control", "simulate"],
    &["top"],
    &["cli"],
    &["lib"],
    &["main"],
];

/// The last pure room, and the room of which only files and environment are known.
const LAST_PURE: &str = "sim";
const CONFIG: &str = "config";

const MOST_COLUMNS: usize = 120;
const MOST_LINES: usize = 600;
const MOST_LINES_OF_A_FUNCTION: usize = 90;

/// Words that mean something else elsewhere, or nothing (DESIGN.md s.2).
const BANNED_WORDS: [&str; 9] =
    ["worker", "node", "cluster", "strategy", "manager", "helper", "helpers", "util", "utils"];

/// Methods of Pingora's traits, which are called what they are called.
const NAMES_OF_PINGORA: [&str; 4] =
    ["get_ssl_digest", "get_timing_digest", "get_proxy_digest", "get_socket_digest"];

// ----------------------------------------------------------------------------- the rules, on this repository

#[test]
fn rooms_import_only_rooms_before_them() {
    keep(&[(import_faults, "src")]);
}

#[test]
fn the_core_is_pure_and_the_configuration_knows_no_network() {
    keep(&[(purity_faults, "src")]);
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    keep(&[(opening_faults, "src"), (opening_faults, "tests"), (opening_faults, "examples")]);
}

#[test]
fn lines_files_and_functions_are_short_enough_to_be_read() {
    keep(&[(size_faults, "src"), (line_faults, "src"), (line_faults, "tests"), (line_faults, "examples")]);
}

#[test]
fn nothing_is_silenced_left_undone_or_locked_with_poison() {
    keep(&[(forbidden_faults, "src"), (forbidden_faults, "tests"), (forbidden_faults, "examples")]);
}

#[test]
fn names_use_the_words_of_the_product() {
    keep(&[(word_faults, "src"), (word_faults, "examples")]);
}

#[test]
fn there_is_no_global_state() {
    keep(&[(static_faults, "src")]);
}

#[test]
fn the_code_map_names_every_file_and_no_other() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let files: Vec<String> = sources("src").into_iter().map(|source| source.path).collect();
    report(&map_faults(&map, &files, |path| root().join(path).exists()));
}

// ----------------------------------------------------------------------------- each rule, broken on purpose

#[test]
fn an_import_of_a_later_room_is_found_in_every_form() {
    let faults = |path: &str, text: &str| import_faults(&Source::new(path, text));
    let later = "src/policy/a.rs:2: `policy` may not import `balance`, which comes after it";
    assert_eq!(faults("src/policy/a.rs", "//! x\nuse crate::balance::Pick;"), [later]);
    assert_eq!(faults("src/policy/a.rs", "//! x\nlet a = crate::/* */balance::f();"), [later]);
    assert_eq!(faults("src/policy/a.rs", "//! x\nuse crate::{clock::Time, balance::{self, Pick}};"), [later]);
    assert_eq!(faults("src/policy/a.rs", "//! x\nuse super::super::balance::Pick;"), [later]);
    assert_eq!(faults("src/policy/mod.rs", "use super::{clock, sim};").len(), 1);
    assert_eq!(faults("src/clock.rs", "use super::prompt;").len(), 1);
    assert_eq!(
        faults("src/prompt/a.rs", "use crate::engine::Engine;"),
        ["src/prompt/a.rs:1: `prompt` and `engine` may not know each other"]
    );
    assert_eq!(
        faults("src/nook/a.rs", "use crate::clock::Time;"),
        ["src/nook/a.rs:1: `nook` has no place in the order of the rooms (tests/tidy.rs)"]
    );
    assert_eq!(faults("src/sim/a.rs", "use crate::nook::Time;").len(), 1);
    assert_eq!(
        faults("src/policy/a.rs", "mod b { use super::super::super::sim; use super::super::sim; }").len(),
        1
    );
    let fine = "// use crate::server;\nuse crate::policy::{server, self};\nuse super::cli;\nlet a = \"crate::server\";";
    assert_eq!(faults("src/balance/a.rs", fine), [""; 0]);
}

#[test]
fn a_test_may_look_sideways_but_not_ahead() {
    let text =
        |room| format!("fn a() {{}}\n#[cfg(test)]\nmod tests {{\n    use crate::{room}::x;\n}}\nfn b() {{}}");
    let faults = |room| import_faults(&Source::new("src/prompt/a.rs", &text(room)));
    assert_eq!(faults("engine"), [""; 0]);
    assert_eq!(
        faults("policy"),
        ["src/prompt/a.rs:4: `prompt` may not import `policy`, which comes after it"]
    );
}

#[test]
fn an_impure_core_is_found() {
    let faults = |path: &str, text: &str| purity_faults(&Source::new(path, text));
    for impure in [
        "use tokio::sync::Notify;",
        "use pingora::http::RequestHeader;",
        "use pingora_proxy::Session;",
        "use std::{cmp::min, net::{SocketAddr, TcpStream}};",
        "let address = \"a:1\".to_socket_addrs()?;",
        "std::fs::read(path)",
        "use std::{collections::HashMap, env};",
        "use std::thread;",
        "std::process::exit(1)",
        "log::info!(\"x\")",
        "use prometheus::IntGauge;",
        "let now = std::time::Instant::now();",
        "use std::time::{Duration, SystemTime};",
        "fastrand::u64(..)",
        "use fastrand::{Rng, u64};",
        "println!(\"x\")",
    ] {
        assert_eq!(faults("src/sim/a.rs", impure).len(), 1, "{impure}");
        assert_eq!(faults("src/demo/a.rs", impure), [""; 0], "{impure}");
    }
    assert_eq!(
        faults("src/engine/a.rs", "//! x\n\nuse tokio::net;"),
        ["src/engine/a.rs:3: `tokio` in a pure room: time, randomness and data are arguments"]
    );
    let pure = "use std::net::SocketAddr; use fastrand::Rng; use pingora_ketama::Continuum; // tokio\n\
                #[cfg(test)]\nmod tests { use std::env; }";
    assert_eq!(faults("src/policy/a.rs", pure), [""; 0]);
    assert_eq!(faults("src/clock.rs", "use std::time::Instant;"), [""; 0]);
    assert_eq!(faults("src/clock.rs", "use tokio::time::Instant;").len(), 1);
    assert_eq!(faults("src/config/a.rs", "use std::{env, fs};"), [""; 0]);
    assert_eq!(faults("src/config/a.rs", "use pingora::Error; use tokio::fs;").len(), 2);
}

#[test]
fn a_file_without_an_opening_is_found() {
    let faults = |text: &str| opening_faults(&Source::new("tests/a.rs", text));
    assert_eq!(faults("//! An idea.\n"), [""; 0]);
    assert_eq!(faults("// An idea.\n"), ["tests/a.rs:1: does not open with `//!`"]);
    assert_eq!(faults("\n//! An idea.\n").len(), 1);
}

#[test]
fn long_lines_files_and_functions_are_found() {
    let wide = format!("//! x\n{}\n{}", "é".repeat(MOST_COLUMNS), "x".repeat(MOST_COLUMNS + 1));
    assert_eq!(line_faults(&Source::new("src/a.rs", &wide)), ["src/a.rs:3: 121 columns, at most 120"]);

    let long = Source::new("src/a.rs", &"\n".repeat(MOST_LINES + 1));
    assert_eq!(size_faults(&long), ["src/a.rs:601: 601 lines, at most 600"]);

    let function = |lines: usize| {
        let body = "    if x { \"}\"; }\n".repeat(lines - 2);
        format!("trait T {{ fn f(&self) -> [u8; 2]; }}\nfn g(a: [u8; 3])\nwhere A: B {{\n{body}}}\n")
    };
    assert_eq!(size_faults(&Source::new("src/a.rs", &function(MOST_LINES_OF_A_FUNCTION - 1))), [""; 0]);
    let faults = size_faults(&Source::new("src/a.rs", &function(MOST_LINES_OF_A_FUNCTION)));
    assert_eq!(faults, ["src/a.rs:2: `g` has 91 lines, at most 90"]);
}

#[test]
fn what_is_forbidden_everywhere_is_found() {
    let faults = |text: &str| forbidden_faults(&Source::new("tests/a.rs", text));
    for text in [
        "#[allow(dead_code)]",
        "#![allow(dead_code)]",
        "#[cfg_attr(test, allow(dead_code))]",
        "todo!()",
        "unimplemented!(\"x\")",
        "dbg!(x)",
        "#[ignore]",
        "#[ignore = \"slow\"]",
        "use std::sync::Mutex;",
        "use std::sync::{Arc, RwLock};",
        "use std::{sync::Mutex};",
    ] {
        assert_eq!(faults(text).len(), 1, "{text}");
    }
    let fine = "/* todo!() */ #[expect(dead_code, reason = \"x\")] fn allow() {}\n\
                use parking_lot::Mutex; rules.allow(1);";
    assert_eq!(faults(fine), [""; 0]);
    assert_eq!(faults("\n#[ignore]"), ["tests/a.rs:2: `#[ignore]`: a test that does not run tests nothing"]);
}

#[test]
fn words_that_are_not_ours_are_found_in_names() {
    let faults = |text: &str| word_faults(&Source::new("src/a.rs", text));
    for name in
        ["struct NodeState;", "enum HTTPWorker {}", "trait Strategy {}", "fn get_x() {}", "mod utils;"]
    {
        assert_eq!(faults(name).len(), 1, "{name}");
    }
    assert_eq!(faults("\nfn node_of() {}"), ["src/a.rs:2: `node_of`: `node` is not a word of ours"]);
    assert_eq!(faults("// a worker\nfn utilisation(node: u8) {} struct Networker; fn get() {}"), [""; 0]);
}

#[test]
fn global_state_is_found() {
    let faults = |text: &str| static_faults(&Source::new("src/a.rs", text));
    assert_eq!(faults("static A: u8 = 1;").len(), 1);
    assert_eq!(faults("static ALLOCATOR: u8 = 1;").len(), 1);
    assert_eq!(
        static_faults(&Source::new("src/main.rs", "static ALLOCATOR: A = A; static B: u8 = 1;")).len(),
        1
    );
    assert_eq!(faults("thread_local! { }").len(), 1);
    assert_eq!(faults("\nLazyLock::new(f)"), ["src/a.rs:2: `LazyLock`: state is passed, never found"]);
    assert_eq!(faults("fn a(x: &'static str) {}\n#[cfg(test)]\nstatic A: u8 = 1;"), [""; 0]);
}

#[test]
fn a_code_map_that_lies_is_found() {
    let files = ["src/a.rs", "src/b/mod.rs", "src/b/c.rs"].map(str::to_owned);
    let faults = |map: &str| map_faults(map, &files, |path| path.starts_with("src/") || path == "conf/");
    let sound = "# x\n- `none.rs`: elsewhere\n## Code map\n- `a.rs`: x `y.z`\n\
                 ### `b/`\n- `b/mod.rs`, `b/c.rs`: y\n- `conf/`: z\n## On\n";
    assert_eq!(faults(sound), [""; 0]);
    assert_eq!(
        faults("## Code map\n- `a.rs`: x\n- `b/mod.rs`: y\n"),
        ["ARCHITECTURE.md:1: the code map does not name src/b/c.rs"]
    );
    assert_eq!(
        faults(&sound.replace("`conf/`", "`confs/`")),
        ["ARCHITECTURE.md:7: the code map names `confs/`, which does not exist"]
    );
    assert_eq!(faults("# x\n- `a.rs`: x\n"), ["ARCHITECTURE.md:1: there is no code map"]);
}

// ----------------------------------------------------------------------------- the rules

fn import_faults(source: &Source) -> Vec<String> {
    let room = source.room();
    let Some(own) = place(room) else {
        return vec![
            source.fault(1, &format!("`{room}` has no place in the order of the rooms (tests/tidy.rs)")),
        ];
    };
    let imports = source.children("crate").into_iter().chain(source.children_by_super());
    imports
        .filter_map(|token| {
            let (line, target, test) = (token.line, token.text.as_str(), token.test);
            match place(target) {
                _ if target == room => None,
                None => {
                    Some(source.fault(line, &format!("`{target}` has no place in the order of the rooms")))
                }
                Some(there) if there > own => Some(
                    source.fault(line, &format!("`{room}` may not import `{target}`, which comes after it")),
                ),
                Some(there) if there == own && !test => {
                    Some(source.fault(line, &format!("`{room}` and `{target}` may not know each other")))
                }
                Some(_) => None,
            }
        })
        .collect()
}

fn purity_faults(source: &Source) -> Vec<String> {
    let room = source.room();
    let (own, last) = (place(room), place(LAST_PURE));
    let pure = own <= last;
    if !pure && room != CONFIG {
        return Vec::new();
    }
    let mut impure: Vec<(usize, String)> = Vec::new();
    for token in source.tokens.iter().filter(|token| !token.test) {
        let word = token.text.as_str();
        let network = word == "tokio" || (word.starts_with("pingora") && word != "pingora_ketama");
        let socket = ["TcpListener", "TcpStream", "UdpSocket", "UnixListener", "UnixStream", "UnixDatagram"];
        let clock = ["Instant", "SystemTime"].contains(&word) && room != "clock";
        let voice = ["println", "eprintln", "print", "eprint", "prometheus"].contains(&word);
        let name = ["ToSocketAddrs", "to_socket_addrs"].contains(&word);
        if network || (pure && (socket.contains(&word) || clock || voice || name)) {
            impure.push((token.line, word.to_owned()));
        }
    }
    if pure {
        for (root, is_impure) in [
            ("std", (|child| ["fs", "env", "thread", "process", "io"].contains(&child)) as fn(&str) -> bool),
            ("log", |_| true),
            ("fastrand", |child| child != "Rng"),
        ] {
            let children = source.children(root).into_iter().filter(|c| !c.test && is_impure(&c.text));
            impure.extend(children.map(|child| (child.line, format!("{root}::{}", child.text))));
        }
    }
    let rule = if pure { "a pure room: time, randomness and data are arguments" } else { "`config`" };
    impure.iter().map(|(line, word)| source.fault(*line, &format!("`{word}` in {rule}"))).collect()
}

fn opening_faults(source: &Source) -> Vec<String> {
    if source.text.starts_with("//!") {
        Vec::new()
    } else {
        vec![source.fault(1, "does not open with `//!`")]
    }
}

fn line_faults(source: &Source) -> Vec<String> {
    let columns = |line: &str| line.chars().count();
    (1..)
        .zip(source.text.lines())
        // JSON as it goes over the wire is easier to read whole.
        .filter(|(_, line)| columns(line) > MOST_COLUMNS && !line.contains("r#\""))
        .map(|(at, line)| source.fault(at, &format!("{} columns, at most {MOST_COLUMNS}", columns(line))))
        .collect()
}

fn size_faults(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = source.text.lines().count();
    if lines > MOST_LINES {
        faults.push(source.fault(lines, &format!("{lines} lines, at most {MOST_LINES}")));
    }
    for (at, name) in source.named(&["fn"]) {
        let Some(body) = item_end(&source.tokens, at) else { continue };
        let (first, last) = (source.tokens[at].line, source.tokens[body].line);
        let lines = last - first + 1;
        if lines > MOST_LINES_OF_A_FUNCTION {
            let fault = format!("`{name}` has {lines} lines, at most {MOST_LINES_OF_A_FUNCTION}");
            faults.push(source.fault(first, &fault));
        }
    }
    faults
}

fn forbidden_faults(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    for macro_name in ["todo", "unimplemented", "dbg"] {
        for at in source.find(&[macro_name, "!"]) {
            faults.push(source.fault(source.tokens[at].line, &format!("`{macro_name}!`: finish it")));
        }
    }
    for attribute in source.attributes() {
        let tokens = &source.tokens[attribute];
        let line = tokens[0].line;
        if tokens.first().is_some_and(|token| token.text == "ignore") {
            faults.push(source.fault(line, "`#[ignore]`: a test that does not run tests nothing"));
        }
        if tokens.windows(2).any(|pair| pair[0].text == "allow" && pair[1].text == "(") {
            faults.push(
                source.fault(line, "`#[allow]`: say `#[expect(.., reason)]`, which ends with its cause"),
            );
        }
    }
    let poisoned =
        source.children("std::sync").into_iter().filter(|c| c.text == "Mutex" || c.text == "RwLock");
    faults.extend(
        poisoned.map(|c| source.fault(c.line, &format!("`std::sync::{}`: use parking_lot's", c.text))),
    );
    faults
}

fn word_faults(source: &Source) -> Vec<String> {
    source
        .named(&["struct", "enum", "trait", "fn", "mod"])
        .into_iter()
        .filter_map(|(at, name)| {
            let words = words(name);
            let is_getter = words.len() > 1 && words[0] == "get" && !NAMES_OF_PINGORA.contains(&name);
            let getter = is_getter.then_some("get");
            let banned =
                words.iter().map(String::as_str).find(|word| BANNED_WORDS.contains(word)).or(getter)?;
            Some(source.fault(source.tokens[at].line, &format!("`{name}`: `{banned}` is not a word of ours")))
        })
        .collect()
}

fn static_faults(source: &Source) -> Vec<String> {
    let global = ["static", "thread_local", "LazyLock", "OnceLock"];
    // The allocator of the binary, which Rust wants there.
    let is_allocator = |at: usize| {
        source.path == "src/main.rs" && source.tokens.get(at + 1).is_some_and(|next| next.text == "ALLOCATOR")
    };
    let tokens = source.tokens.iter().enumerate();
    let tokens = tokens.filter(|(at, t)| !t.test && global.contains(&t.text.as_str()) && !is_allocator(*at));
    tokens
        .map(|(_, t)| source.fault(t.line, &format!("`{}`: state is passed, never found", t.text)))
        .collect()
}

/// The code map is the list under `## Code map`; an entry names its files before its first colon, relative to `src/` or
/// to the root.
fn map_faults(map: &str, files: &[String], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let lines: Vec<(usize, &str)> = (1..).zip(map.lines()).collect();
    let Some(start) = lines.iter().position(|(_, line)| *line == "## Code map") else {
        return vec!["ARCHITECTURE.md:1: there is no code map".to_owned()];
    };
    let section = lines[start + 1..].iter().take_while(|(_, line)| !line.starts_with("## "));
    let mut named = BTreeSet::new();
    let mut faults = Vec::new();
    for (at, entry) in section.filter_map(|(at, line)| Some((at, line.strip_prefix("- ")?))) {
        let names = entry.split(':').next().unwrap_or_default();
        for name in names.split('`').skip(1).step_by(2) {
            let below_src = format!("src/{name}");
            if files.contains(&below_src) {
                named.insert(below_src);
            } else if !exists(name) {
                faults
                    .push(format!("ARCHITECTURE.md:{at}: the code map names `{name}`, which does not exist"));
            }
        }
    }
    let missing = files.iter().filter(|file| !named.contains(*file));
    let heading = lines[start].0;
    faults
        .extend(missing.map(|file| format!("ARCHITECTURE.md:{heading}: the code map does not name {file}")));
    faults
}

/// The place of a room in the order.
fn place(room: &str) -> Option<usize> {
    ORDER.iter().position(|row| row.contains(&room))
}

/// `HTTPNode_of` is `http node of`: `_` begins a word, and a capital does after a small letter or before one.
fn words(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words = vec![String::new()];
    for (at, &letter) in letters.iter().enumerate() {
        let after_small = at > 0 && letters[at - 1].is_lowercase();
        let before_small = at > 0 && letters.get(at + 1).is_some_and(|next| next.is_lowercase());
        if letter == '_' || (letter.is_uppercase() && (after_small || before_small)) {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut().filter(|_| letter != '_') {
            word.extend(letter.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

// ----------------------------------------------------------------------------- files

/// The repository; `TIDY_ROOT` names another, to try the rules on.
fn root() -> PathBuf {
    std::env::var_os("TIDY_ROOT").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}

/// Every Rust file below `folder`, with the files that a `#[cfg(test)] mod x;` names marked as tests.
fn sources(folder: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    collect(&root().join(folder), &mut paths);
    paths.sort();
    let mut sources: Vec<Source> = paths
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).expect("a source is text");
            let relative = path.strip_prefix(root()).expect("it is below the root");
            Source::new(&relative.to_string_lossy(), &text)
        })
        .collect();
    let test_files: BTreeSet<String> = sources.iter().flat_map(test_files).collect();
    for source in sources.iter_mut().filter(|source| test_files.contains(&source.path)) {
        source.tokens.iter_mut().for_each(|token| token.test = true);
    }
    assert!(!sources.is_empty(), "no sources below {folder}");
    sources
}

/// The files of the modules that `source` declares for tests only.
fn test_files(source: &Source) -> Vec<String> {
    let folder = source.path.trim_end_matches("mod.rs").trim_end_matches(".rs").trim_end_matches('/');
    let modules = source.named(&["mod"]).into_iter().filter(|(at, _)| source.tokens[*at].test);
    modules.map(|(_, name)| format!("{folder}/{name}.rs")).collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// From a source to what is wrong with it.
type Rule = fn(&Source) -> Vec<String>;

/// Holds the files of each folder to its rule, and reports the faults of all together.
fn keep(rules: &[(Rule, &str)]) {
    let faults =
        rules.iter().flat_map(|(rule, folder)| sources(folder).iter().flat_map(rule).collect::<Vec<_>>());
    report(&faults.collect::<Vec<_>>());
}

fn report(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}
