//! `plimsoll demo`: four simulated engines, the real balancer, and the same traffic under two policies, side
//! by side.
//!
//! A newcomer should see within a minute what the product is for. The engines run in this process behind real
//! sockets, the balancer is a child process of this same binary, and everything shown is measured from
//! outside: over HTTP by the clients, and on the balancer's own page of metrics. Both policies get the same
//! requests, from the same seed, on empty caches.

mod answer;
mod balancer;
pub mod client;
mod endpoint;
pub mod engine;
mod exposition;
mod table;
mod traffic;
mod vllm;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::balancer::{Balancer, Directory};
use self::engine::{Engine, EngineOptions};
use self::table::{Board, Screen, comparison};
use crate::clock::Clock;
use crate::sim::hardware::Hardware;
use crate::sim::workload::{Mix, Request, Workload};

/// How many engines.
const ENGINES: usize = 4;
const MODEL: &str = "sim-8b";
const SEED: u64 = 1;
/// The two policies, in the order they are shown.
const POLICIES: [&str; 2] = ["round_robin", "least_pending_tokens"];
/// How often the table is redrawn.
const REDRAW: Duration = Duration::from_millis(250);
/// How long after the last request the last answers may take.
const LAST_ANSWERS: Duration = Duration::from_secs(60);

/// What the demo may be told.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoOptions {
    /// Leave engines and balancer running at the end, and say how to talk to them.
    #[arg(long)]
    pub keep: bool,
    /// Seconds of traffic for each policy.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Requests per second.
    #[arg(long, value_name = "R", default_value_t = Mix::default().rate, value_parser = rate)]
    pub rate: f64,
}

/// Shows the demo; returns when it is over or interrupted.
///
/// # Errors
/// If a socket, a file or the balancer cannot be had.
pub fn run_demo(options: &DemoOptions) -> io::Result<()> {
    let (engines, listeners) = engines()?;
    let (stop, stopped) = watch::channel(false);
    // A thread of their own: the engines' clock must not wait for the clients'.
    let serving =
        std::thread::Builder::new().name("engines".to_owned()).spawn(move || serve(listeners, stopped))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let shown = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            shown = show(options, &engines) => shown,
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminate.recv() => Ok(()),
        }
    });
    // The engines listen to nothing else.
    let _ = stop.send(true);
    let served = serving.join().unwrap_or_else(|_| Err(io::Error::other("an engine panicked")));
    shown.and(served)
}

/// The engines' addresses, and what to serve them with.
fn engines() -> io::Result<(Vec<SocketAddr>, Vec<TcpListener>)> {
    let listeners: Vec<_> =
        (0..ENGINES).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<io::Result<_>>()?;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
    Ok((addresses, listeners))
}

/// Serves one engine on each listener until `stopped` turns true.
fn serve(listeners: Vec<TcpListener>, mut stopped: watch::Receiver<bool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for (seed, listener) in (0..).zip(listeners) {
            let options = EngineOptions {
                listen: listener.local_addr()?,
                model: MODEL.to_owned(),
                hardware: Hardware::default(),
                speed: 1.0,
                kv_tokens: None,
                seed: seed << 32,
            };
            let engine = Arc::new(Engine::new(options));
            tokio::spawn(engine::serve(engine, listener, stopped.clone()));
        }
        // An error means that the demo is gone, which is as good a reason to stop.
        let _ = stopped.wait_for(|stopped| *stopped).await;
        Ok(())
    })
}

async fn show(options: &DemoOptions, engines: &[SocketAddr]) -> io::Result<()> {
    let mut screen = Screen::new();
    screen.say(&introduction(options))?;
    let directory = Directory::create()?;
    let mut boards = Vec::new();
    let mut last = None;
    for policy in POLICIES {
        // The balancer before goes first: it must not probe engines that are being measured under another.
        drop(last.take());
        let balancer = Balancer::start(&directory, policy, engines, MODEL).await?;
        screen.say(&format!("{policy}, in a browser while it runs: http://{}/", balancer.admin()))?;
        for engine in engines {
            client::send(*engine, "POST", "/reset_prefix_cache", "").await?;
        }
        let board = phase(options, policy, &balancer, engines, &mut screen).await?;
        if let Some(problem) = board.failure() {
            screen.say(&format!("  a failed request: {problem}\n"))?;
        }
        boards.push(board);
        last = Some(balancer);
    }
    if let [before, after] = &boards[..] {
        screen.say(&conclusion(before, after))?;
    }
    if let (true, Some(balancer)) = (options.keep, last) {
        screen.say(&invitation(&balancer, engines))?;
        std::future::pending::<()>().await;
    }
    Ok(())
}

/// Drives the traffic through the balancer and draws what happens.
async fn phase(
    options: &DemoOptions,
    policy: &'static str,
    balancer: &Balancer,
    engines: &[SocketAddr],
    screen: &mut Screen,
) -> io::Result<Board> {
    let length = Duration::from_secs(options.seconds);
    let mut board = Board::new(policy, engines.iter().map(ToString::to_string));
    let (seen, mut sightings) = mpsc::unbounded_channel();
    let requests = requests(options);
    let clock = Clock::start();
    let driver = tokio::spawn(traffic::drive(balancer.address, MODEL, requests, seen));
    loop {
        // The channel closes when the last request has been answered.
        let elapsed = || Duration::from_nanos(clock.now().as_nanos());
        let over = tokio::time::timeout(REDRAW, async {
            while let Some(sighting) = sightings.recv().await {
                board.see(sighting, elapsed());
            }
        })
        .await
        .is_ok();
        // A page that cannot be read leaves the last reading standing.
        for (backend, owed) in balancer.owed().await.unwrap_or_default() {
            board.read(&backend, owed);
        }
        if over || elapsed() > length + LAST_ANSWERS {
            driver.abort();
            screen.finish(&board.text(elapsed().max(length), length))?;
            return Ok(board);
        }
        screen.draw(&board.text(elapsed(), length))?;
    }
}

fn requests(options: &DemoOptions) -> Vec<Request> {
    let mix = Mix { rate: options.rate, ..Mix::default() };
    let length = Duration::from_secs(options.seconds);
    Workload::new(mix, SEED).take_while(|request| request.at < length).collect()
}

fn introduction(options: &DemoOptions) -> String {
    let DemoOptions { seconds, rate, .. } = options;
    format!(
        "{ENGINES} simulated GPU engines, one balancer, {rate} requests per second: short chats, long documents, and \
         groups that share a\nlong system prompt. First {seconds} s with round_robin, then the same requests with \
         least_pending_tokens.\n\
         pending = prompt tokens the engine still owes an answer to; hits = prompt tokens it had cached;\n\
         TTFT = time to first token, as a client sees it.\n"
    )
}

fn conclusion(before: &Board, after: &Board) -> String {
    format!(
        "{}\nThe engines are simulated: steps as long as Llama-3.1-8B's on an H100, from a published fit. The \
         balancer, the sockets and\nthe HTTP are real. What your traffic gains depends on your traffic: this one \
         mixes short and long prompts.",
        comparison(before, after)
    )
}

fn invitation(balancer: &Balancer, engines: &[SocketAddr]) -> String {
    let (proxy, admin, engine) = (balancer.address, balancer.admin(), engines[0]);
    let json = "-H 'content-type: application/json'";
    let body = |rest: &str| {
        format!(
            r#"'{{"model":"{MODEL}","messages":[{{"role":"user","content":"How deep may she lie?"}}]{rest}}}'"#
        )
    };
    format!(
        "\nStill running; Ctrl-C ends it. To try:\n\n\
         curl -i http://{proxy}/v1/chat/completions {json} -d {}\n\
         curl -N http://{proxy}/v1/chat/completions {json} -d {}\n\
         curl http://{proxy}/v1/models\n\
         curl http://{admin}/metrics     # and http://{admin}/ in a browser\n\
         curl http://{engine}/metrics\n",
        body(""),
        body(r#","stream":true"#)
    )
}

fn rate(text: &str) -> Result<f64, String> {
    let usable = |rate: &f64| (0.1..=1000.0).contains(rate);
    text.parse().ok().filter(usable).ok_or_else(|| "not a number from 0.1 to 1000".to_owned())
}
