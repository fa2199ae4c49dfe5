//! A client that goes, in every way in which one can.

use super::row::{Stage, Way};
use super::run::Run;
use crate::support::client::{Answer as Reply, Client, Line, Request};
use crate::support::http1::Framing;
use crate::support::http2::Http2;
use crate::support::raw::Raw;
use crate::support::{wait_until, within};
use bytes::Bytes;
use std::io::Write;
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// GOAWAY with NO_ERROR: a frame of kind 7 and eight bytes on stream 0.
const GO_AWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A client whose connection is at hand.
enum Leaver {
    One(Raw),
    /// Frames of our own are written past the client, while it has nothing to say.
    Two(Client, std::net::TcpStream),
}

/// Plays the scene: one client comes as far as `stage` and goes.
pub(super) async fn go(run: &Run<'_>, stage: Stage, way: Way) -> Option<Reply> {
    let holder = match stage {
        Stage::Queued => Some(hold(run).await),
        _ => None,
    };
    let mut leaver = Leaver::connect(run.proxy.address(run.line), run.line).await;
    leaver.send(&request(run, stage)).await;
    arrive(run, stage, &mut leaver).await;
    run.look(run.row.charged, u32::from(holder.is_some())).await;
    let reply = leaver.leave(run, way).await;
    let engine = run.engine(0);
    if matches!(stage, Stage::Waiting | Stage::Opened | Stage::Streaming) && reply.is_none() {
        engine.abandoned(1).await;
    }
    if let Some(mut holder) = holder {
        run.proxy.counts("plimsoll_queued_requests", &[("upstream", run.name)], 0.0).await;
        run.gate.open();
        run.gate.reached(2).await;
        run.gate.open();
        assert_eq!(holder.head().await.status, 200);
        assert!(holder.rest().await.1);
    }
    reply
}

fn request(run: &Run<'_>, stage: Stage) -> Request {
    let request = run.request(0);
    match stage {
        Stage::Uploading => request.missing_bytes(100_000),
        Stage::Opened => request.with("x-opened", "1"),
        _ => request,
    }
}

/// A request that holds the only place of the engine.
async fn hold(run: &Run<'_>) -> Client {
    let mut holder = run.proxy.client(Line::Http1).await;
    holder.send(&run.addressed(Request::streamed("tiny", "hello"), "holder")).await;
    run.gate.reached(1).await;
    run.extra_answer();
    holder
}

/// Waits until the request is as far as that.
async fn arrive(run: &Run<'_>, stage: Stage, leaver: &mut Leaver) {
    match stage {
        Stage::Uploading => {
            wait_until("a part of the body", async || {
                run.proxy.metrics().await.sum("plimsoll_buffered_body_bytes", &[]) > 0.0
            })
            .await;
        }
        Stage::Queued => {
            run.proxy.counts("plimsoll_queued_requests", &[("upstream", run.name)], 1.0).await;
        }
        Stage::Waiting | Stage::Opened => run.gate.reached(1).await,
        Stage::Streaming => {
            run.gate.reached(1).await;
            run.gate.open();
            leaver.first_event().await;
            run.gate.reached(2).await;
        }
    }
}

impl Leaver {
    async fn connect(address: SocketAddr, line: Line) -> Self {
        if line == Line::Http1 {
            return Self::One(Raw::connect(address).await);
        }
        let stream = within("a connection", TcpStream::connect(address)).await.expect("a listener");
        let stream = stream.into_std().expect("a socket");
        let beside = stream.try_clone().expect("a descriptor");
        let stream = TcpStream::from_std(stream).expect("a socket");
        Self::Two(Client::Two(Http2::connect(stream, "http").await), beside)
    }

    async fn send(&mut self, request: &Request) {
        match self {
            Self::One(raw) => raw.send(request.http1()).await.expect("a peer that reads"),
            Self::Two(client, _) => client.send(request).await,
        }
    }

    async fn first_event(&mut self) {
        let event: Bytes = match self {
            Self::One(raw) => {
                let head = raw.head().await;
                let mut framing: Framing = head.response_framing().expect("one framing");
                raw.piece(&mut framing).await.expect("a stream").expect("an event")
            }
            Self::Two(client, _) => {
                assert_eq!(client.head().await.status, 200);
                client.piece().await.expect("a stream").expect("an event")
            }
        };
        assert!(event.starts_with(b"data: "), "{event:?}");
    }

    /// Goes; what the client still gets, if it stays to hear it.
    async fn leave(self, run: &Run<'_>, way: Way) -> Option<Reply> {
        match (self, way) {
            (Self::One(raw), Way::Fin) => drop(raw),
            (Self::One(raw), Way::Rst) => raw.reset(),
            (Self::One(mut raw), Way::HalfClose) => {
                raw.half_close().await;
                let rest = raw.until_closed().await;
                assert!(rest.is_empty(), "{rest:?} for a client that closed its side");
            }
            (Self::Two(client, _), Way::RstStream) => {
                let mut client = client.cancel().expect("HTTP/2 keeps its connection");
                if run.row.upstream.is_empty() {
                    let well = run.addressed(Request::chat("tiny", "hello"), "well").with("x-well", "1");
                    assert_eq!(client.ask(&well).await.status, 200, "the connection has to live on");
                    run.extra_answer();
                }
            }
            (Self::Two(client, mut beside), Way::GoAway) => {
                beside.write_all(&GO_AWAY).expect("room for a frame");
                drop(client);
            }
            (Self::Two(mut client, mut beside), Way::GoAwayAndStays) => {
                beside.write_all(&GO_AWAY).expect("room for a frame");
                run.gate.open();
                let (body, complete) = client.rest().await;
                return Some(Reply { status: 200, headers: Vec::new(), body, complete });
            }
            _ => panic!("{way:?} is not for {:?}", run.line),
        }
        None
    }
}
