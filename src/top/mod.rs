//! `plimsoll top`: a live view of the running balancer in the terminal, over the same endpoints as everybody's.
//!
//! One thread asks, because an answer may not come; this one draws and reads keys, and so goes on while the process is
//! away. What is shown is a [`View`], drawn by a pure function. The terminal is given back on every way out: by a guard
//! when the function ends, by ratatui's hook before a panic speaks, and by a signal, which is a way to leave like `q`.

mod draw;
mod seen;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ratatui::{DefaultTerminal, Terminal};
use tokio::signal::unix::{SignalKind, signal};

use crate::clock::Clock;
use crate::config::{Admin, AdminAddress};
use crate::control;
use seen::{Choice, Choices, Status};
use view::{Change, View, Wish};

/// How often the process is asked.
const PACE: Duration = Duration::from_secs(1);
/// How long a key is waited for before ages are drawn anew.
const REDRAW: Duration = Duration::from_millis(200);
/// How many choices are asked for.
const CHOICES: usize = 20;
/// How long `--once` waits for its two answers.
const ONCE_PATIENCE: Duration = Duration::from_secs(10);
/// Columns of `--once`.
const ONCE_WIDTH: u16 = 132;

/// What `plimsoll top` may be told.
#[derive(Clone, Debug, clap::Args)]
pub struct TopOptions {
    /// The configuration file that the balancer runs with.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Print one screen as text, of what a second shows, and end.
    #[arg(long)]
    pub once: bool,
}

/// What the asking thread has to tell.
enum News {
    Looked(Box<Status>, Vec<Choice>),
    Trouble(String),
    /// What came of a change.
    Said(String),
    /// A signal: time to leave.
    Leave,
}

/// Shows the process behind `admin` until `q` or a signal; with `once`, returns a single screen as text.
///
/// # Errors
/// If there is no terminal, or, with `once`, no answer.
pub fn show(admin: &Admin, once: bool) -> Result<Option<String>, String> {
    let (news, heard) = mpsc::channel();
    let (wishes, wished) = mpsc::channel();
    let mut view = View { whom: whom(admin), ..View::default() };
    let is_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if !(once || is_terminal) {
        return Err("this is no terminal; `plimsoll top --once` prints a single screen".to_owned());
    }
    let (own, asked) = (news.clone(), admin.clone());
    start("asking", move || keep_asking(&asked, &own, &wished))?;
    if once {
        return look_once(&mut view, &heard).map(Some);
    }
    start("signals", move || watch_signals(&news))?;
    view.colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let given_back = GivenBack;
    let screen = ratatui::try_init().map_err(|e| format!("the terminal cannot be drawn on: {e}"))?;
    let shown = run(screen, &mut view, &heard, &wishes);
    drop(given_back);
    shown.map(|()| None).map_err(|e| e.to_string())
}

/// Gives the terminal back when dropped.
struct GivenBack;

impl Drop for GivenBack {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Draws, and does what keys and news say, until somebody leaves.
fn run(
    mut screen: DefaultTerminal,
    view: &mut View,
    heard: &Receiver<News>,
    wishes: &Sender<Change>,
) -> io::Result<()> {
    let clock = Clock::start();
    let seconds = || clock.now().as_nanos() as f64 / 1e9;
    let mut answered = None;
    loop {
        for news in heard.try_iter() {
            match news {
                News::Leave => return Ok(()),
                News::Said(said) => view.said = Some(said),
                // Paused is paused, also for the age of what stands there.
                _ if view.paused => {}
                News::Looked(status, choices) => {
                    view.seen.look(*status, choices, seconds());
                    (view.trouble, answered) = (None, Some(seconds()));
                }
                News::Trouble(why) => view.trouble = Some(why),
            }
        }
        if !view.paused {
            view.age = answered.map(|at| seconds() - at);
        }
        screen.draw(|frame| draw::draw(frame, view))?;
        if !event::poll(REDRAW)? {
            continue;
        }
        // A resize needs no more than the next drawing.
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        match view.press(key) {
            Some(Wish::Leave) => return Ok(()),
            // Without the asking thread nothing would be shown either.
            Some(Wish::Change(change)) => drop(wishes.send(change)),
            None => {}
        }
    }
}

/// One screen as text, after two looks, so that there are rates.
fn look_once(view: &mut View, heard: &Receiver<News>) -> Result<String, String> {
    let clock = Clock::start();
    for _ in 0..2 {
        match heard.recv_timeout(ONCE_PATIENCE) {
            Ok(News::Looked(status, choices)) => {
                view.seen.look(*status, choices, clock.now().as_nanos() as f64 / 1e9);
            }
            Ok(News::Trouble(why)) => return Err(why),
            Ok(News::Said(_) | News::Leave) | Err(_) => {
                return Err(format!("no answer from {} within {} s", view.whom, ONCE_PATIENCE.as_secs()));
            }
        }
    }
    view.age = Some(0.0);
    let height = draw::height(view);
    let mut screen = Terminal::new(TestBackend::new(ONCE_WIDTH, height)).map_err(|e| e.to_string())?;
    screen.draw(|frame| draw::draw(frame, view)).map_err(|e| e.to_string())?;
    let cells = &screen.backend().buffer().content;
    let lines = cells.chunks(usize::from(ONCE_WIDTH)).map(|row| {
        let line: String = row.iter().map(|cell| cell.symbol()).collect();
        line.trim_end().to_owned() + "\n"
    });
    // All but the keys, which nobody can press, and the room that is left.
    let mut text: Vec<String> = lines.collect();
    text.pop();
    text.dedup_by(|next, line| next == "\n" && line == "\n");
    Ok(text.concat().trim_end().to_owned())
}

/// Asks every second, and at once after a change, until nobody listens.
fn keep_asking(admin: &Admin, news: &Sender<News>, wishes: &Receiver<Change>) {
    loop {
        if news.send(look(admin)).is_err() {
            return;
        }
        match wishes.recv_timeout(PACE) {
            Ok(change) => {
                let said = change_over(admin, &change).unwrap_or_else(|why| format!("not done: {why}"));
                if news.send(News::Said(said)).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            // With `--once` nobody wishes anything, but the pace is kept.
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn look(admin: &Admin) -> News {
    let status = control::told(admin, "GET", "/status")
        .and_then(|json| serde_json::from_str(&json).map_err(|e| format!("its answer cannot be read: {e}")));
    // An older process has no list of choices; its backends are shown all the same.
    let choices = || {
        let json = control::told(admin, "GET", &format!("/choices?limit={CHOICES}")).ok()?;
        serde_json::from_str::<Choices>(&json).ok()
    };
    match status {
        Ok(status) => News::Looked(Box::new(status), choices().unwrap_or_default().choices),
        Err(why) => News::Trouble(why),
    }
}

fn change_over(admin: &Admin, change: &Change) -> Result<String, String> {
    let verb = if change.drain { "drain" } else { "undrain" };
    let path = format!("/{verb}?upstream={}&backend={}", encoded(&change.upstream), encoded(&change.backend));
    control::told(admin, "POST", &path)
}

/// As it may stand in a query.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |out, byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            out + &char::from(byte).to_string()
        }
        _ => out + &format!("%{byte:02X}"),
    })
}

/// Says so when a signal wants us to leave.
fn watch_signals(news: &Sender<News>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let left = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = interrupt.recv() => {}
        }
        io::Result::Ok(())
    });
    if left.is_ok() {
        // Whoever does not listen has left already.
        drop(news.send(News::Leave));
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(work);
    started.map(drop).map_err(|e| format!("no thread: {e}"))
}

fn whom(admin: &Admin) -> String {
    match &admin.address {
        AdminAddress::Tcp(address) => address.clone(),
        AdminAddress::Unix(socket) => format!("unix:{}", socket.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_carries_any_name() {
        assert_eq!(encoded("llama-3.1"), "llama-3.1");
        assert_eq!(encoded("[::1]:80&a=é"), "%5B%3A%3A1%5D%3A80%26a%3D%C3%A9");
    }
}
