//! Clients that ask for one JSON document at a time: in a closed loop, at a fixed rate, or on a new connection each.
//!
//! A closed loop shows what a request costs; what a user waits for shows only an open one, which asks whether or not
//! the last answer has come, and counts a wait from the moment at which it wanted to ask.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use plimsoll::clock::{Clock, Time};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::engine;
use super::http::{Connection, broken};
use super::prompt::{Plan, Prompts};

/// Requests that may be unanswered at a time in an open loop; who has more is too slow for its rate.
const UNANSWERED_MAX: usize = 1000;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What all clients of a measurement share.
pub struct Tally {
    /// By which everything is timed.
    pub clock: Clock,
    /// Answers that were right.
    pub done: AtomicU64,
    /// Those that were not, or none.
    pub errors: AtomicU64,
    /// What was wrong first.
    pub first_error: Mutex<Option<String>>,
    /// Clients stop when this is set.
    pub is_over: AtomicBool,
    /// Waits are written down while this is set.
    pub is_recording: AtomicBool,
    /// Waits for answers, in nanoseconds.
    pub waits: Mutex<Vec<u64>>,
    nonce: AtomicU64,
}

impl Tally {
    /// Of nothing yet.
    pub fn new(clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            clock,
            done: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            first_error: Mutex::default(),
            is_over: AtomicBool::new(false),
            is_recording: AtomicBool::new(false),
            waits: Mutex::default(),
            // Other numbers than those of the last process, whose requests a log may still show.
            nonce: AtomicU64::new(clock.unix_time().as_secs() << 28),
        })
    }

    /// A number that no other request has.
    pub fn nonce(&self) -> u64 {
        self.nonce.fetch_add(1, Ordering::Relaxed)
    }

    /// Answers that were right, so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether clients are to stop.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Whether waits count now.
    pub fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Relaxed)
    }

    /// Writes down that a request that was to be sent at `asked` was answered, or not.
    pub fn settle(&self, asked: Time, answer: &io::Result<()>) {
        match answer {
            Ok(()) => {
                self.done.fetch_add(1, Ordering::Relaxed);
                if self.is_recording() {
                    self.waits.lock().push(self.clock.now().as_nanos() - asked.as_nanos());
                }
            }
            Err(error) => self.fail(error),
        }
    }

    /// Writes down a failure.
    pub fn fail(&self, error: &io::Error) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        self.first_error.lock().get_or_insert_with(|| error.to_string());
    }
}

/// Asks for one document on an open connection; whether that stays open.
pub async fn ask(
    connection: &mut Connection,
    prompts: &Prompts,
    nonce: u64,
    keeps: bool,
) -> io::Result<bool> {
    let request = prompts.request(&Plan { nonce, ..Plan::default() }, keeps);
    connection.write(request).await?;
    let length = prompts.length(nonce);
    let answer = async {
        let head = connection.head(true).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let body = connection.whole().await?;
        check(head.status(), &body, nonce, length).map(|()| head.keeps)
    };
    tokio::time::timeout(PATIENCE, answer).await?
}

/// Whether this is the answer to the request `nonce` with a text of `length` bytes.
pub fn check(status: u16, body: &[u8], nonce: u64, length: usize) -> io::Result<()> {
    if status != 200 {
        let said = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        return Err(io::Error::other(format!("status {status}: {said}")));
    }
    if body == engine::answer(nonce, length).as_bytes() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(body);
    Err(io::Error::other(format!("not the answer to {nonce:x} of {length} bytes: {said}")))
}

/// `count` clients, each of which asks again as soon as it has its answer. Those of `keeps` keep their connections.
pub fn closed(
    addresses: &[SocketAddr],
    prompts: &Arc<Prompts>,
    count: usize,
    keeps: bool,
    tally: &Arc<Tally>,
) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for number in 0..count {
        let (address, prompts, tally) = (addresses[number % addresses.len()], prompts.clone(), tally.clone());
        clients.spawn(async move {
            let mut connection = None;
            while !tally.is_over() {
                let asked = tally.clock.now();
                let answer = again(&mut connection, address, &prompts, &tally, keeps).await;
                tally.settle(asked, &answer);
                if answer.is_err() {
                    connection = None;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        });
    }
    clients
}

/// Asks on a connection that is open, or on a new one.
async fn again(
    connection: &mut Option<Connection>,
    address: SocketAddr,
    prompts: &Prompts,
    tally: &Tally,
    keeps: bool,
) -> io::Result<()> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => Connection::new(TcpStream::connect(address).await?)?,
    };
    if ask(&mut open, prompts, tally.nonce(), keeps).await? && keeps {
        *connection = Some(open);
    }
    Ok(())
}

/// Asks `rate` times a second until the tally is over, and waits for the answers. Whether it could keep that up.
///
/// A timer is good for a millisecond only, so it spins; whoever else has something to do on this CPU goes first.
pub async fn open(addresses: Vec<SocketAddr>, prompts: Arc<Prompts>, rate: f64, tally: Arc<Tally>) -> bool {
    let idle: Arc<Mutex<VecDeque<Connection>>> = Arc::default();
    let (start, mut asks) = (tally.clock.now(), JoinSet::new());
    let mut keeps_up = true;
    for number in 0_u64.. {
        let due = start + Duration::from_secs_f64(number as f64 / rate);
        while tally.clock.now() < due {
            while asks.try_join_next().is_some() {}
            tokio::task::yield_now().await;
        }
        if tally.is_over() {
            break;
        }
        if asks.len() >= UNANSWERED_MAX {
            keeps_up = false;
            asks.join_next().await;
        }
        let (idle, prompts, tally) = (idle.clone(), prompts.clone(), tally.clone());
        let address = addresses[number as usize % addresses.len()];
        asks.spawn(async move {
            // Without a proxy each engine is asked in turn: the connection that rests longest is of the next one.
            let mut connection = idle.lock().pop_front();
            let answer = again(&mut connection, address, &prompts, &tally, true).await;
            tally.settle(due, &answer);
            idle.lock().extend(connection);
        });
    }
    while asks.join_next().await.is_some() {}
    keeps_up
}

/// Asks once, on a connection of its own; an error unless the answer is right.
pub async fn once(address: SocketAddr, prompts: &Prompts, tally: &Tally) -> io::Result<()> {
    let asked = async {
        let mut connection = Connection::new(TcpStream::connect(address).await?)?;
        ask(&mut connection, prompts, tally.nonce(), false).await
    };
    let limit = tokio::time::timeout(Duration::from_secs(5), asked);
    limit.await.map_err(|_| broken("no answer within 5 s"))?.map(drop)
}
