//! `plimsoll top` in a terminal: a pseudo-terminal of our own, whose screen a small emulator keeps.
//!
//! The binary is the real one, between scripted engines; what is typed goes in as keys, and what is asserted stands on
//! the screen. The rule for every way out: the terminal is as it was.

#![expect(clippy::print_stderr, reason = "a test that failed shows the screen")]

#[path = "wires/support/mod.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the wire tests use the rest of their stage, and share it as it is"
)]
mod support;

use parking_lot::Mutex;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use support::client::Request;
use support::engine::Engine;
use support::port::Port;
use support::proxy::{Keys, Proxy, binary, folder};
use support::{one_upstream, tls, wait_until};

const COLUMNS: u16 = 110;
const ROWS: u16 = 30;

/// The program in a terminal.
struct Terminal {
    child: Child,
    /// Our end; what is written to it are keys.
    keys: File,
    /// Its end, kept to see in which state it leaves the terminal.
    line: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    fn start(file: &Path, no_colour: bool) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&keys).and_then(|()| unlockpt(&keys)).expect("a pseudo-terminal of ours");
        let name = ptsname(&keys, Vec::new()).expect("its name");
        let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let line = OpenOptions::new().read(true).write(true).open(path).expect("its other end");
        let own = || line.try_clone().expect("a descriptor");
        let mut command = Command::new(binary());
        command.args(["top", "--config"]).arg(file).env("TERM", "xterm-256color").env_remove("NO_COLOR");
        if no_colour {
            command.env("NO_COLOR", "1");
        }
        resize(&line, COLUMNS, ROWS);
        let child = command.stdin(own()).stdout(own()).stderr(own()).spawn().expect("the binary starts");
        let screen = Arc::new(Mutex::new(vt100::Parser::new(some(ROWS), some(COLUMNS), 0)));
        let (keys, emulator) = (File::from(keys), screen.clone());
        let mut written = keys.try_clone().expect("a descriptor");
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = written.read(&mut bytes) {
                emulator.lock().process(&bytes[..count]);
            }
        });
        Self { child, keys, line, screen }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("somebody reads keys");
    }

    fn text(&self) -> String {
        self.screen.lock().screen().contents()
    }

    async fn shows(&self, text: &str) {
        let shown = async || self.text().contains(text);
        wait_until(&format!("`{text}` on the screen"), shown).await;
    }

    /// Waits until it has ended well, and has left the terminal as it was.
    async fn left(mut self) -> String {
        let mut status = None;
        wait_until("the program to end", async || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        })
        .await;
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        wait_until("the screen to be as before", async || !self.screen.lock().screen().alternate_screen())
            .await;
        assert!(!self.screen.lock().screen().hide_cursor());
        let modes = tcgetattr(&self.line).expect("a terminal").local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO), "{modes:?}");
        self.text()
    }

    fn signal(&self, name: &str) {
        let killed = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(killed.expect("kill").success());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the screen:\n{}", self.text());
        }
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn some(size: u16) -> NonZeroU16 {
    NonZeroU16::new(size).expect("a terminal has a size")
}

fn resize(line: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(line, size).expect("a terminal");
}

#[tokio::test]
async fn the_screen_shows_backends_and_choices_and_q_gives_the_terminal_back() {
    let mut engines = [Engine::good(), Engine::good()];
    // As the balancer has them.
    engines.sort_by_key(Engine::socket);
    let addresses = [engines[0].address(), engines[1].address()];
    let proxy = Proxy::start(&one_upstream(&addresses, "policy: round_robin")).await;
    for _ in 0..6 {
        assert_eq!(proxy.ask(&Request::chat("the-model", "hello")).await.status, 200);
    }
    let mut terminal = Terminal::start(&proxy.file(), false);
    for text in
        [&addresses[0], &addresses[1], "round_robin", "2 of 2 up", "recent choices", "the-model", "q quit"]
    {
        terminal.shows(text).await;
    }
    assert!(terminal.screen.lock().screen().alternate_screen());
    terminal.press("?");
    terminal.shows("any key goes back").await;
    terminal.press(" ");
    // The second one, by an arrow; a question; no.
    terminal.press("\x1b[B");
    terminal.shows(&format!("> {}", addresses[1])).await;
    terminal.press("d");
    terminal.shows(&format!("Drain {} of llm", addresses[1])).await;
    terminal.press("n");
    terminal.shows("q quit").await;
    terminal.press("dy");
    terminal.shows("draining").await;
    terminal.shows("1 of 2 up").await;
    for _ in 0..4 {
        assert_eq!(proxy.ask(&Request::chat("the-model", "hello")).await.status, 200);
    }
    assert_eq!((engines[0].count(), engines[1].count()), (7, 3));
    terminal.press("uy");
    terminal.shows("2 of 2 up").await;
    // Smaller: told by SIGWINCH, as a terminal does.
    terminal.screen.lock().screen_mut().set_size(some(12), some(60));
    resize(&terminal.line, 60, 12);
    terminal.signal("WINCH");
    wait_until("a narrower table", async || {
        let text = terminal.text();
        text.contains("pending") && !text.contains("context") && text.contains(&addresses[0])
    })
    .await;
    terminal.press("q");
    assert!(!terminal.left().await.contains("pending"));
}

#[tokio::test]
async fn a_signal_gives_the_terminal_back_and_without_colour_there_is_none() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    for (no_colour, signal) in [(true, "TERM"), (false, "INT")] {
        let terminal = Terminal::start(&proxy.file(), no_colour);
        terminal.shows("1 of 1 up").await;
        let coloured = {
            let parser = terminal.screen.lock();
            let cells = (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| (row, column)));
            let mut colours =
                cells.filter_map(|(row, column)| Some(parser.screen().cell(row, column)?.fgcolor()));
            colours.any(|colour| colour != vt100::Color::Default)
        };
        assert_eq!(coloured, !no_colour);
        terminal.signal(signal);
        terminal.left().await;
    }
}

#[tokio::test]
async fn a_process_that_is_away_is_said_to_be_and_seen_again_when_it_is_back() {
    let (engine, admin) = (Engine::good(), Port::take());
    let address = format!("address: {}", admin.address());
    let keys = Keys { admin: &address, ..Keys::default() };
    let upstreams = one_upstream(&[engine.address()], "");
    let first = Proxy::spawn_keyed(keys, &upstreams, &[]);
    // Its folder goes with it.
    let own = folder();
    tls::write_pem(&own);
    let file = own.join("plimsoll.yaml");
    std::fs::copy(first.file(), &file).expect("a copy");
    let mut terminal = Terminal::start(&file, false);
    terminal.shows("1 of 1 up").await;
    drop(first);
    terminal.shows("no answer for").await;
    assert!(terminal.text().contains(&engine.address()), "what was known stays");
    let _second = Proxy::spawn_keyed(keys, &upstreams, &[]);
    terminal.shows("up for").await;
    terminal.press("\x03");
    terminal.left().await;
}

#[tokio::test]
async fn one_screen_is_printed_for_a_script_and_a_pipe_is_no_terminal() {
    let engine = Engine::good();
    let proxy = Proxy::start(&one_upstream(&[engine.address()], "")).await;
    assert_eq!(proxy.ask(&Request::chat("the\u{1b}[31m-model", "hello")).await.status, 200);
    let file = proxy.file();
    let top = |arguments: &'static [&'static str]| {
        let mut command = Command::new(binary());
        command.arg("top").args(arguments).arg("--config").arg(&file).stdin(std::process::Stdio::null());
        tokio::task::spawn_blocking(move || command.output().expect("the binary starts"))
    };
    let once = top(&["--once"]).await.expect("no panic");
    let text = String::from_utf8(once.stdout).expect("UTF-8");
    assert!(once.status.success(), "{text}");
    for part in [engine.address().as_str(), "1 of 1 up", "recent choices", "the[31m-model", "100 %"] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "{text:?}");
    let piped = top(&[]).await.expect("no panic");
    assert_eq!(piped.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&piped.stderr).contains("--once"));
}
