//! A name server that says what a test tells it, or nothing.

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// What is said to a question.
#[derive(Clone)]
pub enum Reply {
    /// These records, for so many seconds; none is an answer without records.
    Records(u32, Vec<RData>),
    /// There is no such name.
    NoSuchName,
    /// The server has failed.
    Failure,
    /// Nothing at all.
    Silence,
}

impl Reply {
    /// Addresses, for so many seconds.
    pub fn addresses(ttl: u32, addresses: &[IpAddr]) -> Self {
        let record = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => RData::A(A(*ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
        };
        Self::Records(ttl, addresses.iter().map(record).collect())
    }

    /// Services: priority, weight, port and target of each.
    pub fn services(ttl: u32, services: &[(u16, u16, u16, &str)]) -> Self {
        let record = |&(priority, weight, port, target): &(u16, u16, u16, &str)| {
            RData::SRV(SRV::new(priority, weight, port, Name::from_ascii(target).expect("a name")))
        };
        Self::Records(ttl, services.iter().map(record).collect())
    }
}

#[derive(Default)]
struct Zone {
    replies: Mutex<HashMap<(String, RecordType), Reply>>,
    asked: AtomicU64,
}

/// A name server on a UDP port of its own.
pub struct NameServer {
    address: SocketAddr,
    zone: Arc<Zone>,
    serving: JoinHandle<()>,
}

impl NameServer {
    /// Starts one that knows no name.
    pub async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        let zone = Arc::<Zone>::default();
        let serving = tokio::spawn(serve(socket, zone.clone()));
        Self { address, zone, serving }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it says from now on when it is asked for the `kind` of records of `name`.
    pub fn say(&self, name: &str, kind: RecordType, reply: Reply) {
        self.zone.replies.lock().insert((format!("{name}."), kind), reply);
    }

    /// How many questions it has been asked.
    pub fn asked(&self) -> u64 {
        self.zone.asked.load(SeqCst)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(socket: UdpSocket, zone: Arc<Zone>) {
    let mut buffer = [0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
        let question = Message::from_vec(&buffer[..length]).expect("a DNS message");
        zone.asked.fetch_add(1, SeqCst);
        if let Some(answer) = answer(&zone, &question) {
            let _gone = socket.send_to(&answer.to_vec().expect("a short answer"), client).await;
        }
    }
}

fn answer(zone: &Zone, question: &Message) -> Option<Message> {
    let query = question.queries.first().expect("a question").clone();
    let name = query.name().to_ascii().to_ascii_lowercase();
    let replies = zone.replies.lock();
    let reply = replies.get(&(name.clone(), query.query_type())).cloned();
    let known = replies.keys().any(|(known, _)| *known == name);
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.metadata.recursion_available = true;
    match reply {
        Some(Reply::Silence) => return None,
        Some(Reply::Failure) => answer.metadata.response_code = ResponseCode::ServFail,
        Some(Reply::Records(ttl, records)) => {
            let records = records.into_iter().map(|data| Record::from_rdata(query.name().clone(), ttl, data));
            answer.add_answers(records);
        }
        None if known => {}
        Some(Reply::NoSuchName) | None => answer.metadata.response_code = ResponseCode::NXDomain,
    }
    answer.add_query(query);
    Some(answer)
}
