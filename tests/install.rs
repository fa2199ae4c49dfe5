//! `make install` puts everything where it belongs, `make uninstall` takes all of it back but the configuration; and
//! what is installed works: completions in their shells, the manual in `man`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder to install into.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a scratch folder");
        Self(folder)
    }

    fn make(&self, goal: &str, prefix: &str) {
        let made = Command::new("make")
            .args(["--no-print-directory", goal])
            .arg(format!("DESTDIR={}", self.0.display()))
            .arg(format!("PREFIX={prefix}"))
            .arg(format!("BINARY={}", env!("CARGO_BIN_EXE_plimsoll")))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("make is there: it runs these tests");
        assert!(made.status.success(), "make {goal}: {made:?}");
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// The files that were installed.
    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![self.0.clone()];
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(&folder).expect("a folder") {
                let path = entry.expect("it can be read").path();
                if path.is_dir() {
                    open.push(path);
                } else {
                    let inside = path.strip_prefix(&self.0).expect("it is inside");
                    found.insert(inside.display().to_string());
                }
            }
        }
        found
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            assert!(std::thread::panicking(), "{error}");
        }
    }
}

/// The output of a program; `None` if this machine does not have it, which CI must.
fn run(program: &str, words: &[&str]) -> Option<Output> {
    match Command::new(program).args(words).env("LC_ALL", "C.UTF-8").env("MANWIDTH", "100").output() {
        Ok(output) => Some(output),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{program}: {error}");
            skipped(&format!("what needs {program}: {error}"));
            None
        }
    }
}

#[expect(clippy::print_stderr, reason = "for whoever reads the log of the tests")]
fn skipped(what: &str) {
    eprintln!("SKIPPED: {what}");
}

fn plimsoll(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_plimsoll")).args(words).output().expect("the binary runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The commands, as `--help` lists them.
fn commands() -> Vec<String> {
    let help = plimsoll(&["--help"]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = listed.take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn everything_is_installed_where_it_belongs_and_only_the_configuration_stays() {
    let scratch = Scratch::new("install");
    scratch.make("install", "/usr");
    let files = scratch.files();
    let wanted = [
        "usr/bin/plimsoll",
        "usr/lib/systemd/system/plimsoll.service",
        "usr/lib/sysusers.d/plimsoll.conf",
        "usr/share/bash-completion/completions/plimsoll",
        "usr/share/zsh/site-functions/_plimsoll",
        "usr/share/fish/vendor_completions.d/plimsoll.fish",
        "usr/share/man/man1/plimsoll.1",
        "usr/share/man/man1/plimsoll-run.1",
        "usr/share/plimsoll/plimsoll.schema.json",
        "usr/share/plimsoll/reference.yaml",
        "usr/share/plimsoll/plimsoll.env",
        "usr/share/plimsoll/plimsoll.socket",
        "etc/plimsoll/plimsoll.yaml",
    ];
    for file in wanted {
        assert!(files.contains(file), "{file} is not among {files:#?}");
    }
    let unit = scratch.read("usr/lib/systemd/system/plimsoll.service");
    assert!(unit.contains("ExecStart=/usr/bin/plimsoll ") && !unit.contains("/usr/local"), "{unit}");

    let config = "etc/plimsoll/plimsoll.yaml";
    let schema = "# yaml-language-server: $schema=/usr/share/plimsoll/plimsoll.schema.json\n";
    assert!(scratch.read(config).starts_with(schema));
    assert!(plimsoll(&["check", &scratch.0.join(config).display().to_string()]).contains(": ok"));

    std::fs::write(scratch.0.join(config), "# mine").expect("it can be written");
    scratch.make("install", "/usr");
    assert_eq!(scratch.read(config), "# mine", "an update leaves it as it is");
    scratch.make("uninstall", "/usr");
    assert_eq!(scratch.files(), BTreeSet::from([config.to_owned()]));
}

#[test]
fn without_a_prefix_it_is_that_of_the_unit() {
    let scratch = Scratch::new("local");
    scratch.make("install", "/usr/local");
    let unit =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/plimsoll.service"));
    assert_eq!(scratch.read("usr/local/lib/systemd/system/plimsoll.service"), unit.expect("the unit"));
}

#[test]
fn every_shell_reads_its_completions_and_bash_completes() {
    let commands = commands();
    assert!(commands.len() > 8, "{commands:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = plimsoll(&["completions", shell]);
        for command in &commands {
            assert!(script.contains(command.as_str()), "{command} is missing for {shell}");
        }
        let scratch = Scratch::new(shell);
        let file = scratch.0.join("completions").display().to_string();
        std::fs::write(&file, script).expect("it can be written");
        // What is no shell of this machine is tried by whoever has it; bash is there where make is.
        let found = Command::new(shell).args(["-n", &file]).output();
        if let Ok(read) = found {
            assert!(read.status.success() && read.stderr.is_empty(), "{shell}: {read:?}");
        } else {
            assert_ne!(shell, "bash");
            skipped(&format!("whether {shell} reads its completions"));
        }
        if shell == "bash" {
            let ask = format!(
                "source {file}; COMP_WORDS=(plimsoll che); COMP_CWORD=1; _plimsoll plimsoll che plimsoll; \
                 echo \"${{COMPREPLY[@]}}\""
            );
            let reply = run("bash", &["-c", &ask]).expect("bash");
            assert_eq!(String::from_utf8_lossy(&reply.stdout).trim(), "check", "{reply:?}");
        }
    }
}

#[test]
fn there_is_a_page_of_the_manual_for_every_command_and_man_shows_it() {
    let scratch = Scratch::new("man");
    plimsoll(&["man", "--into", &scratch.0.display().to_string()]);
    let pages = scratch.files();
    for command in commands().iter().filter(|command| *command != "help") {
        assert!(pages.contains(&format!("plimsoll-{command}.1")), "{command} is not among {pages:?}");
    }
    assert_eq!(scratch.read("plimsoll.1").trim_end(), plimsoll(&["man"]).trim_end());
    for page in &pages {
        let file = scratch.0.join(page).display().to_string();
        let Some(shown) = run("man", &["--warnings", "-E", "UTF-8", "-l", &file]) else { return };
        assert!(shown.status.success() && shown.stderr.is_empty(), "{page}: {shown:?}");
        let text = String::from_utf8_lossy(&shown.stdout);
        assert!(text.contains("NAME") && text.contains("SYNOPSIS"), "{page}:\n{text}");
    }
}
