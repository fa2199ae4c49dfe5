//! Instructions per request and per event, counted by callgrind: figures that a busy machine cannot bend.
//!
//! A proxy runs under valgrind and answers 200 requests, one at a time on one connection, and in another run of the
//! same length 1,200; the difference of what callgrind counted, by 1,000, is what one takes, without start, end, and
//! what is done at all times. The same for the events of a stream. `instructions.txt` is the baseline; `--bless` writes
//! it anew. What the kernel does is not in it.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use plimsoll::clock::Clock;
use tokio::net::TcpStream;

use super::engine::Engines;
use super::http::Connection;
use super::load::{self, Tally};
use super::process::{self, PLAIN, Proxy};
use super::prompt::{Plan, Prompts};
use super::report::Circumstances;
use super::say;
use super::stream::{Reading, Streams};

/// What it is asked for by, and in a sentence.
pub const NAME: &str = "instructions";
/// See `NAME`.
pub const WHAT: &str = "instructions per request and event, beside the baseline (valgrind, 4 minutes)";

const PEERS: [&str; 2] = ["pingora", "plimsoll"];
const COUNTS: [u64; 2] = [200, 1200];
/// More than this above the baseline is too much.
const TOLERANCE: f64 = 1.03;
/// How long each run lasts. The same for both, so that what a proxy does in the background cancels out; and long enough
/// that one that runs fifty times slower is done with each event before the next.
const TIME: Duration = Duration::from_secs(12);

const SHAPES: [(&str, usize); 3] = [("request-1k", 1 << 10), ("request-32k", 32 << 10), ("event", 0)];

/// Counts, and compares with the baseline or becomes it; whether nothing has become dearer.
pub async fn run(circumstances: &Circumstances, blesses: bool) -> io::Result<bool> {
    let old = fs::read_to_string(baseline()).unwrap_or_default();
    let mut new = String::from(
        "# Instructions per request and per event: what callgrind counts for 1,200 less what it counts for 200, by\n\
         # 1,000, in the same time. One connection, one request at a time.\n\
         # Made by `cargo bench --bench wire -- instructions --bless`.\n",
    );
    for line in circumstances
        .lines()
        .iter()
        .filter(|line| !line.starts_with("command") && !line.starts_with("rounds"))
    {
        let _ = writeln!(new, "# {line}");
    }
    say(&format!(
        "\n### {NAME}: {WHAT}\n\n| | now | baseline | now / baseline | x pingora |\n|---|---:|---:|---:|---:|"
    ));
    let mut is_within = true;
    for (shape, size) in SHAPES {
        let mut of_pingora = 0.0;
        for peer in PEERS {
            let [few, many] = [count(peer, size, COUNTS[0]).await?, count(peer, size, COUNTS[1]).await?];
            let each = (many.saturating_sub(few)) as f64 / (COUNTS[1] - COUNTS[0]) as f64;
            if peer == PEERS[0] {
                of_pingora = each;
            }
            let name = format!("{peer} {shape}");
            let known = old.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse::<f64>().ok());
            let ratio = known.map(|known| each / known);
            is_within &= peer != "plimsoll" || ratio.is_none_or(|ratio| ratio <= TOLERANCE);
            let [known, ratio] = [known.map(|n| format!("{n:.0}")), ratio.map(|r| format!("{r:.3}"))];
            let [known, ratio] = [known, ratio].map(|cell| cell.unwrap_or_else(|| "-".to_owned()));
            say(&format!("| {name} | {each:.0} | {known} | {ratio} | {:.2} |", each / of_pingora));
            let _ = writeln!(new, "{name} {each:.0}");
        }
    }
    if blesses {
        fs::write(baseline(), new)?;
        return Ok(true);
    }
    Ok(is_within)
}

fn baseline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/wire/instructions.txt")
}

/// Instructions that a proxy takes from its start to its end, for so many requests, or events if `size` is 0.
async fn count(peer: &str, size: usize, count: u64) -> io::Result<u64> {
    let clock = Clock::start();
    let engines = Engines::start(clock).await?;
    let tally = Tally::new(clock);
    let prompts = Arc::new(Prompts::new(size.max(1 << 10), 7));
    // Kept for `callgrind_annotate`: the difference of two such files is where the instructions of a request go.
    let file = process::folder().join(format!("callgrind.{peer}.{size}.{count}"));
    // What was counted last time must not be taken for this.
    let _ = fs::remove_file(&file);
    let prefix = format!("valgrind --quiet --tool=callgrind --callgrind-out-file={}", file.display());
    let proxy = Proxy::start_below(&prefix, peer, &prompts, &tally).await?;
    if size == 0 {
        let streams = Arc::<Streams>::default();
        let plan = Plan { events: count, pace: TIME.div_f64(count as f64), nonce: 0 };
        let reading = Reading { addresses: vec![PLAIN], prompts, plan, tally: tally.clone(), streams };
        let mut clients = reading.begin(1, Duration::ZERO).await;
        while clients.join_next().await.is_some() {}
    } else {
        let mut connection = Connection::new(TcpStream::connect(PLAIN).await?)?;
        let start = clock.now();
        for number in 0..count {
            let due = start + TIME.mul_f64(number as f64 / count as f64);
            tokio::time::sleep(due.since(clock.now())).await;
            load::ask(&mut connection, &prompts, tally.nonce(), true).await?;
        }
    }
    if let Some(error) = tally.first_error.lock().take() {
        return Err(io::Error::other(format!("{peer} below valgrind: {error}")));
    }
    proxy.interrupt().await?;
    drop(engines);
    let counted = fs::read_to_string(&file)?;
    let total = counted
        .lines()
        .find_map(|line| line.strip_prefix("totals: ").or_else(|| line.strip_prefix("summary: ")));
    let total = total.and_then(|total| total.trim().parse().ok());
    total.ok_or_else(|| io::Error::other(format!("callgrind has counted nothing: {}", file.display())))
}
