//! YAML in, checked values out; or everything that is wrong with it, at once.
//!
//! ```text
//! text --tree--> Tree --strike(decode)--> Config --check--> Config
//!                  \________ flaws ______/______ flaws _____/
//!                                   \--place--> Report
//! ```
//!
//! A value of the file is read by a serde type ([`mod@file`], [`upstream`], [`route`]) whose forms are in
//! `units`. Serde stops at the first error, so `strike` takes out what was refused and reads again; `check`
//! then looks at what no single value shows; `place` finds where each flaw stands; [`report`] shows it.

mod check;
mod decode;
pub mod discover;
pub mod file;
mod fixed;
mod hardware;
pub mod key;
pub mod network;
mod place;
pub mod report;
pub mod route;
mod schema;
pub mod secret;
mod show;
mod strike;
mod tree;
mod units;
pub mod upstream;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

pub use discover::{Discover, NameServer};
pub use file::{
    Admin, AdminAddress, Config, Identity, Limits, Listener, ListenerTls, Observe, Server, Traces,
};
pub use key::{Key, KeyHash};
pub use network::Network;
pub use report::{Problem, Report};
pub use route::{HostPattern, ModelPattern, Route};
pub use schema::schema;
pub use secret::Secret;
pub use show::show;
pub use upstream::{Backend, BackendTls, Keepalive, Models, Poll, Probe, Queue, Retry, Timeouts, Upstream};

pub(crate) use report::nearest;
pub(crate) use units::parse_duration;

use crate::policy::Policies;
use crate::sim::hardware::Hardware;
use place::Place;
use report::Flaw;
use strike::Reading;
use tree::{NotATree, Tree};

/// Reads, completes and checks the file at `path`, which may name any of `policies`. Relative paths in it are
/// below its folder.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path, policies: &Policies) -> Result<Config, Report> {
    let name = path.display().to_string();
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    parse(&name, &read_text(path, &name, "configuration")?, folder, policies)
}

/// Completes and checks `text`, called `name` in the report, which may name any of `policies`. Relative paths
/// in it are below `folder`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(name: &str, text: &str, folder: &Path, policies: &Policies) -> Result<Config, Report> {
    decode(name, text, |mut config, reading| {
        let flaws = check::complete(&mut config, reading, folder, policies);
        (Some(config), flaws)
    })
}

/// Reads the constants of an engine for the simulator from the file at `path`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load_hardware(path: &Path) -> Result<Hardware, Report> {
    let name = path.display().to_string();
    decode(&name, &read_text(path, &name, "constants of an engine")?, hardware::complete)
}

/// The text of a file that lists backends, for [`parse_backends`].
///
/// # Errors
/// Why it cannot be read.
pub fn read_backends(path: &Path) -> Result<String, Report> {
    read_text(path, &path.display().to_string(), "list of backends")
}

/// Reads a list of backends, written like those of an upstream, from the `text` of the file at `path`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse_backends(path: &Path, text: &str) -> Result<Vec<Backend>, Report> {
    decode(&path.display().to_string(), text, |backends: Vec<Backend>, reading| {
        let flaws = check::listed_twice(&backends, reading, &tree::Path::default());
        (Some(backends), flaws)
    })
}

/// The text of the file at `path`, called `name`, which holds `what`.
fn read_text(path: &Path, name: &str, what: &str) -> Result<String, Report> {
    let bytes = read_file(path).map_err(|error| {
        Report::new(name, "", vec![Problem::of_file(format!("cannot read the {what}: {error}"))])
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let text = String::from_utf8_lossy(error.as_bytes());
        let sound = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let place = Place::end_of(&String::from_utf8_lossy(sound));
        let message = "not UTF-8 from here on".to_owned();
        Report::new(name, &text, vec![Problem::of_text(message, String::new(), place)])
    })
}

/// Reads a `T` from `text`, called `name` in the report, and lets `complete` make a `U` of it, or say what is
/// wrong with it.
fn decode<T: for<'de> serde::Deserialize<'de>, U>(
    name: &str,
    text: &str,
    complete: impl FnOnce(T, &Reading<T>) -> (Option<U>, Vec<Flaw>),
) -> Result<U, Report> {
    // To the parser a byte order mark is a column, and the key behind it indented otherwise than the next.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let refused = |problem: Problem| Report::new(name, text, vec![problem]);
    if let Some((before, c)) = text.find(is_forbidden).map(|at| text.split_at(at)) {
        let code = c.chars().next().map_or(0, u32::from);
        let message = format!("control character U+{code:04X}");
        return Err(refused(Problem::of_text(message, String::new(), Place::end_of(before))));
    }
    let tree = Tree::parse(text).map_err(|error| refused(not_yaml(&error, text)))?;
    let mut reading = Reading::of(tree);
    let mut flaws = std::mem::take(&mut reading.flaws);
    let mut whole = None;
    if let Some(read) = reading.value.take() {
        let (completed, more) = complete(read, &reading);
        flaws.extend(more);
        whole = completed;
    }
    match whole {
        Some(whole) if flaws.is_empty() => Ok(whole),
        _ => {
            let problems = flaws.into_iter().map(|flaw| Problem::placed(flaw, text)).collect();
            Err(Report::new(name, text, problems))
        }
    }
}

/// No file that we are pointed to is larger than this, in bytes; a device may be endless.
const LARGEST_FILE: u64 = 16 << 20;

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LARGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 16 MiB"));
    }
    Ok(bytes)
}

/// Complains of a file with a secret in it that everybody on this machine may read. A group may: that is how
/// certificates are shared (`ssl-cert`), and how Kubernetes gives files to a user (`fsGroup`).
fn not_for_everybody(path: &Path) -> Result<(), String> {
    match path.metadata() {
        Ok(file) if file.is_file() && file.permissions().mode() & 0o004 != 0 => {
            let (shown, mode) = (path.display(), file.permissions().mode() & 0o777);
            Err(format!(
                "everybody on this machine may read `{shown}` (mode {mode:o}): `chmod o-rwx {shown}`"
            ))
        }
        _ => Ok(()),
    }
}

/// The YAML parser refuses these too, but does not say where they are.
fn is_forbidden(c: char) -> bool {
    (c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}')) || matches!(c, '\u{fffe}' | '\u{ffff}')
}

/// Why the text is no tree, with the parser's sentence cut down to what helps.
fn not_yaml(error: &NotATree, text: &str) -> Problem {
    let place = Place::of_error(&error.yaml);
    if let Some(ours) = &error.ours {
        return Problem::of_text(ours.clone(), String::new(), place);
    }
    let sentence = error.yaml.to_string();
    if sentence.contains("more than one document") {
        let second = place::lines(text).enumerate().filter(|(_, line)| line.starts_with("---")).last();
        let place = second.map_or(Place::START, |(index, _)| Place { line: index + 1, column: 1 });
        return Problem::of_text("a second YAML document in the file".to_owned(), String::new(), place);
    }
    let what = sentence.split(" at line ").next().unwrap_or_default();
    let source = place::lines(text).nth(place.line - 1).unwrap_or_default();
    let hint = if source.chars().nth(place.column - 1) == Some('\t') {
        "a tab; YAML is indented with spaces".to_owned()
    } else if what.contains("did not find expected") || what.contains("mapping values are not allowed") {
        // The parser names two places: where it gave up, and where the list or map began that it was in.
        let began = sentence.rsplit(" at line ").next().and_then(|rest| rest.split(' ').next());
        let since = match began.map(str::parse::<usize>) {
            Some(Ok(line)) if line < place.line => format!(", from line {line} on"),
            _ => String::new(),
        };
        format!("look at indentation, brackets and quotes{since}")
    } else {
        String::new()
    };
    Problem::of_text(format!("not valid YAML: {what}"), hint, place)
}

#[cfg(test)]
mod tests;
