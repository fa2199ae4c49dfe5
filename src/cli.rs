//! The command line: what can be asked of the program, and what it exits with.
//!
//! A binary with policies of its own has the same commands: its `main` hands them to [`main_with`].

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::Shell;
use clap_mangen::Man;
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::observe::verbosity::Verbosity;
use crate::policy::Policies;
use crate::{config, control, demo, server, simulate, top};

/// The configuration is invalid (`EX_CONFIG` of sysexits.h).
const EXIT_CONFIG: u8 = 78;

/// A programmable load balancer for LLM inference servers.
///
/// Try it without a GPU:   plimsoll demo
/// Run it:                 plimsoll run --config plimsoll.yaml
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage, 78 invalid configuration.
#[derive(Parser)]
#[command(name = "plimsoll", version, verbatim_doc_comment, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the balancer until SIGTERM.
    Run {
        /// The configuration file.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Take the place of the process at the other end of standard input, which has started us for that.
        #[arg(long, hide = true)]
        successor: bool,
    },
    /// Check a configuration file: every problem, with its place.
    Check {
        /// The configuration file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Let the running balancer read its configuration again; a file with mistakes changes nothing.
    ///
    /// Asks it over its admin listener, waits, and says what came of it. `kill -HUP` does the same unseen.
    Reload {
        /// The configuration file that it runs with.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Let the binary that is installed now take the place of the running one; nothing is cut or refused.
    ///
    /// Asks the running one over its admin listener, waits, and says what came of it. A binary or a configuration that
    /// is not fit to serve changes nothing. `kill -USR2` does the same unseen.
    Upgrade {
        /// The configuration file that it runs with, and will.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show how the backends of the running balancer are.
    Status {
        /// The configuration file that it runs with.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// As JSON, with all there is.
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON schema of the configuration, for editors.
    Schema,
    /// Let a backend get no new request; what is in flight goes on. Undone by `undrain` or a restart.
    Drain {
        #[command(flatten)]
        backend: BackendOf,
        /// Come back when it has no request in flight.
        #[arg(long)]
        wait: bool,
    },
    /// Let a drained backend get requests again.
    Undrain {
        #[command(flatten)]
        backend: BackendOf,
    },
    /// Give a backend another weight, until its weight in the configuration changes or the process restarts.
    Weight {
        #[command(flatten)]
        backend: BackendOf,
        /// From 1 to 1000.
        #[arg(value_name = "WEIGHT")]
        weight: u32,
    },
    /// Print what a shell completes our words with; packages install it.
    ///
    /// For this shell alone: `source <(plimsoll completions bash)`.
    Completions {
        /// Which shell.
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// Print the manual page: `plimsoll man | man -l -`.
    Man {
        /// Write it into this folder instead, and a page for each command.
        #[arg(long, value_name = "FOLDER")]
        into: Option<PathBuf>,
    },
    /// Watch the running balancer in the terminal: backends, load, waits, choices; drain and undrain.
    Top(top::TopOptions),
    /// Make an API key for a client, and what to write of it under `keys`.
    Key {
        /// The client's name in the configuration, in logs and metrics.
        #[arg(value_name = "NAME", default_value = "client")]
        name: String,
    },
    /// Show what the balancer is for: four simulated GPU engines under mixed traffic, in a minute.
    Demo(demo::DemoOptions),
    /// Run one simulated engine that speaks vLLM's dialect.
    Engine(demo::engine::EngineOptions),
    /// Replay recorded or made-up traffic in virtual time: which policy serves it best, and how much of it.
    Simulate(simulate::SimulateOptions),
}

/// A backend of the running balancer.
#[derive(clap::Args)]
struct BackendOf {
    /// The configuration file that it runs with.
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Only in this upstream, and not in every one that has the backend.
    #[arg(long, value_name = "NAME")]
    upstream: Option<String>,
    /// Address and port, as `plimsoll status` shows them.
    #[arg(value_name = "ADDRESS")]
    address: String,
}

/// Does what the command line says, with the built-in policies.
pub fn main() -> ExitCode {
    main_with(&Policies::default())
}

/// Does what the command line says: `run`, `check` and `simulate` know `policies`.
pub fn main_with(policies: &Policies) -> ExitCode {
    let cli = Cli::from_arg_matches(&commands(policies).get_matches()).unwrap_or_else(|error| error.exit());
    let verbosity = Verbosity::start();
    match cli.command {
        Command::Run { config, successor: false } => run(&config, policies, None, verbosity),
        Command::Run { config, successor: true } => match server::Predecessor::at_stdin() {
            Ok(predecessor) => run(&config, policies, Some(predecessor), verbosity),
            Err(e) => exit(Err(format!("nobody to take the place of: {e}"))),
        },
        Command::Check { file } => match config::load(&file, policies) {
            Ok(config) => match server::check(&config) {
                Ok(()) => say(&format!("{}: ok, {}", file.display(), summary(&config))),
                Err(e) => {
                    complain(&format!("error: {e}\n"));
                    ExitCode::from(EXIT_CONFIG)
                }
            },
            Err(report) => invalid(&report),
        },
        Command::Reload { config } => match admin(&config, policies) {
            Ok(admin) => answer(control::reload(&admin)),
            Err(code) => code,
        },
        Command::Upgrade { config } => match admin(&config, policies) {
            Ok(admin) => answer(control::upgrade(&admin)),
            Err(code) => code,
        },
        Command::Status { config, json } => match admin(&config, policies) {
            Ok(admin) => {
                let status = control::status(&admin);
                answer(if json { status } else { status.map(|status| control::status_table(&status)) })
            }
            Err(code) => code,
        },
        Command::Schema => say(&format!("{:#}", config::schema(policies))),
        Command::Drain { backend, wait } => tell(&backend, policies, |admin, named| {
            let said = control::drain(admin, named)?;
            if wait { control::drained(admin, named) } else { Ok(said) }
        }),
        Command::Undrain { backend } => tell(&backend, policies, control::undrain),
        Command::Weight { backend, weight } => {
            tell(&backend, policies, |admin, named| control::weigh(admin, named, weight))
        }
        Command::Completions { shell } => say(completions(shell, policies).trim_end()),
        Command::Man { into } => answer(manual(commands(policies), into.as_deref())),
        Command::Top(options) => {
            match admin(&options.config, policies).map(|a| top::show(&a, options.once)) {
                Ok(Ok(Some(text))) => say(&text),
                Ok(Ok(None)) => ExitCode::SUCCESS,
                Ok(Err(why)) => exit(Err(why)),
                Err(code) => code,
            }
        }
        Command::Key { name } => match new_key() {
            Ok(key) => {
                let hash = config::KeyHash::of(key.as_bytes());
                say(&format!(
                    "# For the client. It is shown once and kept nowhere: {key}\nkeys:\n  {name}: {{ sha256: {hash} }}"
                ))
            }
            Err(e) => exit(Err(e)),
        },
        Command::Demo(options) => exit(demo::run_demo(&options)),
        Command::Engine(options) => exit(demo::engine::run_engine(options)),
        Command::Simulate(options) => match simulate::simulate(&options, policies) {
            Ok(found) => say(found.trim_end()),
            Err(simulate::Failure::Invalid(report)) => invalid(&report),
            Err(why) => exit(Err(why)),
        },
    }
}

/// Runs the balancer, in the place of `predecessor` if there is one.
fn run(
    file: &Path,
    policies: &Policies,
    predecessor: Option<server::Predecessor>,
    verbosity: Verbosity,
) -> ExitCode {
    match config::load(file, policies) {
        Ok(config) => exit(server::run(file, config, policies, predecessor, verbosity)),
        Err(report) => {
            predecessor.iter().for_each(|waiting| waiting.disappoint(&report.to_string()));
            invalid(&report)
        }
    }
}

/// Every command and option there is.
fn commands(policies: &Policies) -> clap::Command {
    Cli::command().mut_subcommand("simulate", |c| simulate::with_policies(c, policies))
}

/// What we were called as: a binary with policies of its own has a name of its own.
fn program() -> String {
    let called = std::env::args_os().next().map(PathBuf::from);
    let name = called.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    name.unwrap_or("plimsoll").to_owned()
}

fn completions(shell: Shell, policies: &Policies) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut commands(policies), program(), &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The manual page; into `folder`, it and one for each command.
fn manual(command: clap::Command, folder: Option<&Path>) -> Result<String, String> {
    let command = command.disable_help_subcommand(true);
    if let Some(folder) = folder {
        let written = clap_mangen::generate_to(command, folder);
        let shown = folder.display();
        return written
            .map(|()| format!("the pages are in {shown}"))
            .map_err(|error| format!("cannot write to `{shown}`: {error}"));
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&page).trim_end().to_owned())
}

/// Where the balancer that runs with this configuration can be asked.
fn admin(file: &Path, policies: &Policies) -> Result<config::Admin, ExitCode> {
    let config = config::load(file, policies).map_err(|report| invalid(&report))?;
    config
        .admin
        .ok_or_else(|| exit(Err(format!("without `admin` in {} nobody can be asked", file.display()))))
}

/// Tells the running balancer something about a backend.
fn tell(
    backend: &BackendOf,
    policies: &Policies,
    tell: impl FnOnce(&config::Admin, &control::Named<'_>) -> Result<String, String>,
) -> ExitCode {
    let BackendOf { config, upstream, address } = backend;
    match admin(config, policies) {
        Ok(admin) => answer(tell(&admin, &control::Named { address, upstream: upstream.as_deref() })),
        Err(code) => code,
    }
}

fn answer(result: Result<String, String>) -> ExitCode {
    match result {
        Ok(said) => say(&said),
        Err(why) => exit(Err(why)),
    }
}

/// A key of 256 random bits.
fn new_key() -> Result<String, &'static str> {
    let mut bits = [0; 32];
    SystemRandom::new().fill(&mut bits).map_err(|_| "the system gives no random numbers")?;
    Ok(bits.iter().fold("sk-".to_owned(), |key, byte| key + &format!("{byte:02x}")))
}

fn summary(config: &config::Config) -> String {
    let backends: usize = config.upstreams.values().map(|u| u.backends.len()).sum();
    let count = |n: usize, noun: &str| format!("{n} {noun}{}", if n == 1 { "" } else { "s" });
    let (listeners, upstreams) = (config.listeners.len(), config.upstreams.len());
    format!(
        "{}, {}, {}",
        count(listeners, "listener"),
        count(upstreams, "upstream"),
        count(backends, "backend")
    )
}

fn invalid(report: &config::Report) -> ExitCode {
    complain(&report.to_string());
    ExitCode::from(EXIT_CONFIG)
}

fn exit<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("error: {e}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Prints the answer of a command; a reader that has seen enough of it (`| head`) is no failure.
fn say(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => exit(Err(e)),
        _ => ExitCode::SUCCESS,
    }
}

#[expect(clippy::print_stderr, reason = "the answer of a command")]
fn complain(text: &str) {
    eprint!("{text}");
}
