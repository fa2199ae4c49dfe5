//! A hundred reloads and ten upgrades under load: nothing fails, nothing is refused, cut, or closed without a word; and
//! how soon a process ends that is told to.
//!
//! Requests on connections of their own come at a steady rate, streams of half a minute run all the time, and clients
//! that keep their connections ask again and again, half of each over HTTP/2. Meanwhile the file is reloaded and the
//! process replaced, and in between there is a binary that does not start, a file with mistakes, and a stray SIGQUIT.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use plimsoll::clock::{Clock, Time};
use plimsoll::demo::client;
use serde_json::Value;
use tokio::task::JoinSet;

use super::client::Client;
use super::engine::{Ending, Fleet, Plan};
use super::proxy::{Proxy, binary};
use super::verdict::{self, Sort};
use super::{Findings, say, scrape};

const UPGRADES: u32 = 10;
const RELOADS_EACH: u32 = 10;
/// Between two reloads; so the whole takes a little more than a minute.
const PACE: Duration = Duration::from_millis(550);
/// Between two requests on connections of their own.
const REQUEST_PACE: Duration = Duration::from_millis(5);
const STREAMS: u64 = 100;
const STREAM_EVENTS: u32 = 150;
const STREAM_PAUSE: Duration = Duration::from_millis(200);
const KEPT: u64 = 50;
const KEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the stream of the process that is stopped takes.
const LAST_STREAM: Duration = Duration::from_secs(20);
/// How soon a process has to end when nothing is left.
const END_MAX: Duration = Duration::from_secs(1);
const REST: Duration = Duration::from_secs(60);

/// What clients have seen.
#[derive(Default)]
struct Seen {
    over: AtomicBool,
    ids: AtomicU64,
    requests: AtomicU64,
    streams: AtomicU64,
    kept: AtomicU64,
    /// Connections that were kept, and of which clients were told before they closed.
    told: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().push(what);
    }

    fn plan(&self, events: u32, pause: Duration) -> (Plan, Bytes) {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let pause_us = pause.as_micros() as u64;
        let plan = Plan { id, stream: true, events, pause_us, ending: Ending::Whole, tries: 0 };
        let body = serde_json::json!({ "model": "m", "stream": true, "plan": plan });
        (plan, Bytes::from(body.to_string()))
    }
}

/// Runs it and says what was found.
pub async fn run(folder: &Path, findings: &mut Findings) -> io::Result<()> {
    let (reloads, rate) = (UPGRADES * RELOADS_EACH, 1.0 / REQUEST_PACE.as_secs_f64());
    say(&format!(
        "\n## handovers: {reloads} reloads, {UPGRADES} upgrades under {rate} requests/s, {STREAMS} streams, {KEPT} kept\n"
    ));
    let fleet = Fleet::start(4, true).await?;
    let installed = folder.join("installed");
    fs::copy(binary(), &installed)?;
    let proxy = Proxy::start_from(&installed, folder, &upstream(&fleet, 0)).await?;
    let seen = Arc::new(Seen::default());
    let mut clients = JoinSet::new();
    clients.spawn(ask(proxy.address, seen.clone()));
    for number in 0..STREAMS {
        clients.spawn(stream(proxy.address, number, seen.clone()));
    }
    for number in 0..KEPT {
        clients.spawn(keep(proxy.address, number, fleet.clone(), seen.clone()));
    }
    let operated = operate(&proxy, &fleet, &installed, findings).await;
    seen.over.store(true, Ordering::Relaxed);
    while clients.join_next().await.is_some() {}
    let processes = operated?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let wrong = seen.wrong.lock().clone();
    wrong.iter().take(10).for_each(|what| say(&format!("  {what}")));
    findings.check(
        wrong.is_empty(),
        format!(
            "{} failed, refused, cut or closed unannounced, of {} requests on connections of their own, {} streams \
             of {} s, {} requests on kept connections, {} of which were told to close",
            wrong.len(),
            count(&seen.requests),
            count(&seen.streams),
            (STREAM_PAUSE * STREAM_EVENTS).as_secs(),
            count(&seen.kept),
            count(&seen.told),
        ),
    );
    let old = &processes[..processes.len() - 1];
    let clock = Clock::start();
    let mut owed = scrape::owed(&proxy.page().await?);
    while !owed.is_empty() || old.iter().any(|pid| is_alive(*pid)) {
        if clock.now().since(Time::ZERO) > REST {
            break;
        }
        tokio::time::sleep(PACE).await;
        owed = scrape::owed(&proxy.page().await?);
    }
    let left = old.iter().filter(|pid| is_alive(**pid)).count();
    findings.check(left == 0, format!("{left} of {} old processes are left", old.len()));
    findings.check(owed.is_empty(), format!("{} gauges are not back at zero {owed:?}", owed.len()));
    let panics = proxy.log().panics;
    findings.check(panics.is_empty(), format!("{} panics in the log {panics:?}", panics.len()));
    drop(proxy);
    stops(folder, &fleet, findings).await
}

/// The reloads and upgrades, and what is done wrong on purpose; the processes that have served.
async fn operate(
    proxy: &Proxy,
    fleet: &Fleet,
    installed: &Path,
    findings: &mut Findings,
) -> io::Result<Vec<u32>> {
    let mut processes = vec![pid(proxy).await?];
    let (mut reloaded, mut upgraded) = (0, 0);
    for turn in 0..UPGRADES {
        for number in 0..RELOADS_EACH {
            tokio::time::sleep(PACE).await;
            proxy.rewrite(&upstream(fleet, turn * RELOADS_EACH + number))?;
            reloaded += u32::from(post(proxy, "/reload").await? == 200);
        }
        match turn {
            2 => {
                let unharmed = harm(proxy, installed).await?;
                findings.check(unharmed, "a binary that does not start changes nothing");
            }
            5 => {
                proxy.rewrite("  nonsense: 7\n")?;
                let refused = [post(proxy, "/reload").await?, post(proxy, "/upgrade").await?];
                let same = pid(proxy).await? == processes[processes.len() - 1];
                findings.check(refused == [422, 422] && same, "a file with mistakes changes nothing");
                proxy.rewrite(&upstream(fleet, turn))?;
            }
            8 => {
                signal("QUIT", pid(proxy).await?)?;
                tokio::time::sleep(PACE).await;
                let same = pid(proxy).await? == processes[processes.len() - 1];
                findings.check(same, "a stray SIGQUIT changes nothing");
            }
            _ => {}
        }
        let status = post(proxy, "/upgrade").await?;
        let now = pid(proxy).await?;
        proxy.adopt(now);
        upgraded += u32::from(status == 200 && now != processes[processes.len() - 1]);
        processes.push(now);
    }
    findings.check(reloaded == UPGRADES * RELOADS_EACH, format!("{reloaded} reloads"));
    findings.check(upgraded == UPGRADES, format!("{upgraded} upgrades"));
    Ok(processes)
}

/// Installs a binary that does not start, and the right one again; whether that was refused and nothing has changed.
async fn harm(proxy: &Proxy, installed: &Path) -> io::Result<bool> {
    let before = pid(proxy).await?;
    let aside = installed.with_extension("new");
    fs::write(&aside, "#!/bin/sh\nexit 3\n")?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o755))?;
    fs::rename(&aside, installed)?;
    let refused = post(proxy, "/upgrade").await? == 422;
    fs::copy(binary(), &aside)?;
    fs::rename(&aside, installed)?;
    Ok(refused && pid(proxy).await? == before)
}

/// How soon a process ends that has nothing to do, and one that has a stream.
async fn stops(folder: &Path, fleet: &Fleet, findings: &mut Findings) -> io::Result<()> {
    let clock = Clock::start();
    let mut proxy = Proxy::start(folder, &upstream(fleet, 0)).await?;
    let before = clock.now();
    signal("TERM", pid(&proxy).await?)?;
    proxy.exit().await?;
    let took = clock.now().since(before);
    findings.check(took < END_MAX, format!("an idle process ends {:.2} s after SIGTERM", took.as_secs_f64()));

    let mut proxy = Proxy::start(folder, &upstream(fleet, 0)).await?;
    let seen = Seen::default();
    let (plan, body) = seen.plan(LAST_STREAM.as_secs() as u32 * 5, STREAM_PAUSE);
    let mut client = Client::connect(proxy.address, false).await?;
    client.send(&body, body.len()).await?;
    let head = client.head().await?;
    signal("TERM", pid(&proxy).await?)?;
    let reply = client.rest(head).await;
    let ended = clock.now();
    let whole = verdict::judge(&plan, &reply) == Ok(Sort::Whole);
    proxy.exit().await?;
    let took = clock.now().since(ended);
    findings.check(
        whole && took < END_MAX,
        format!(
            "with a stream of {} s, which is whole: {whole}, it ends {:.2} s after that",
            LAST_STREAM.as_secs(),
            took.as_secs_f64()
        ),
    );
    Ok(())
}

/// Requests at a steady rate, each on a connection of its own.
async fn ask(address: std::net::SocketAddr, seen: Arc<Seen>) {
    let mut asking = JoinSet::new();
    let mut tick = tokio::time::interval(REQUEST_PACE);
    for number in 0_u64.. {
        if seen.is_over() {
            break;
        }
        tick.tick().await;
        let seen = seen.clone();
        asking.spawn(async move {
            let (plan, body) = seen.plan(5, Duration::from_millis(2));
            let answer = async { Client::connect(address, number % 2 == 1).await?.ask(&body).await }.await;
            judge(&seen, "own connection", &plan, answer);
            seen.requests.fetch_add(1, Ordering::Relaxed);
        });
        while asking.try_join_next().is_some() {}
    }
    while asking.join_next().await.is_some() {}
}

/// One long stream after the other.
async fn stream(address: std::net::SocketAddr, number: u64, seen: Arc<Seen>) {
    while !seen.is_over() {
        let (plan, body) = seen.plan(STREAM_EVENTS, STREAM_PAUSE);
        let answer = async { Client::connect(address, number % 2 == 1).await?.ask(&body).await }.await;
        judge(&seen, "stream", &plan, answer);
        seen.streams.fetch_add(1, Ordering::Relaxed);
    }
}

/// One request after the other on a connection that is kept until we are told that it closes.
async fn keep(address: std::net::SocketAddr, number: u64, fleet: Arc<Fleet>, seen: Arc<Seen>) {
    let mut kept: Option<Client> = None;
    while !seen.is_over() {
        tokio::time::sleep(KEPT_PAUSE).await;
        let mut client = match kept.take() {
            Some(client) => client,
            None => match Client::connect(address, number % 2 == 1).await {
                Ok(client) => client,
                Err(error) => {
                    seen.wrong(format!("kept connection: not made: {error}"));
                    continue;
                }
            },
        };
        let (plan, body) = seen.plan(3, Duration::from_millis(2));
        if let Err(error) = client.send(&body, body.len()).await {
            // GOAWAY said it before the request began.
            if is_goodbye(&error) {
                seen.told.fetch_add(1, Ordering::Relaxed);
            } else {
                seen.wrong(format!("kept connection: closed unannounced: {error}"));
            }
            continue;
        }
        let answer = async {
            let head = client.head().await?;
            Ok(client.rest(head).await)
        };
        let answer = answer.await;
        // The same a moment later, while the request waited to be sent: it is asked again, as every client does.
        if answer.as_ref().is_err_and(is_goodbye) && fleet.sightings(plan.id).is_empty() {
            seen.told.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        judge(&seen, "kept connection", &plan, answer);
        seen.kept.fetch_add(1, Ordering::Relaxed);
        if client.is_reusable() {
            kept = Some(client);
        } else {
            seen.told.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn judge(seen: &Seen, whose: &str, plan: &Plan, answer: io::Result<super::client::Reply>) {
    match answer.map(|reply| verdict::judge(plan, &reply)) {
        Ok(Ok(Sort::Whole)) => {}
        Ok(Ok(sort)) => seen.wrong(format!("{whose}: {}", sort.names().0)),
        Ok(Err(what)) => seen.wrong(format!("{whose}: {what}")),
        Err(error) => seen.wrong(format!("{whose}: {error}")),
    }
}

/// Whether an HTTP/2 client was told to go elsewhere, in good order.
fn is_goodbye(error: &io::Error) -> bool {
    let h2 = error.get_ref().and_then(|inner| inner.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR))
}

/// The upstream in one of several ways, all of which serve.
fn upstream(fleet: &Fleet, way: u32) -> String {
    let policy = ["least_pending_tokens", "round_robin", "prefix_hash"][way as usize % 3];
    let without = (way as usize / 3) % (fleet.addresses.len() + 1);
    let backends = fleet.addresses.iter().enumerate().filter(|(number, _)| *number != without);
    let backends: Vec<_> = backends.map(|(_, address)| address.to_string()).collect();
    format!(
        "  sim:\n    engine: openai\n    models: [m]\n    policy: {policy}\n    backends: [{}]\n",
        backends.join(", ")
    )
}

async fn post(proxy: &Proxy, path: &str) -> io::Result<u16> {
    Ok(client::send(proxy.admin, "POST", path, "").await?.status)
}

/// The process that serves now.
async fn pid(proxy: &Proxy) -> io::Result<u32> {
    let status = client::send(proxy.admin, "GET", "/status", "").await?.text().await?;
    let pid = serde_json::from_str::<Value>(&status).ok().and_then(|status| status["pid"].as_u64());
    pid.and_then(|pid| u32::try_from(pid).ok()).ok_or_else(|| io::Error::other("no pid in /status"))
}

/// Whether there is a process `pid`, dead ones that nobody has asked for apart.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn signal(name: &str, pid: u32) -> io::Result<()> {
    let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    if sent.success() { Ok(()) } else { Err(io::Error::other(format!("kill -{name} {pid}: {sent}"))) }
}
