//! The stage itself: a tool that cannot fail proves nothing, so client and engine are first let loose on each
//! other.

use crate::support::client::{Client, Framing, Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::metrics::Metrics;
use crate::support::port::Port;
use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn an_engine_receives_declared_and_chunked_bodies_whole() {
    let engine = Engine::good();
    let body: Vec<u8> = std::iter::repeat_with(|| b'x').take(100_000).collect();
    let mut client = Client::connect(engine.socket(), Line::Http1).await;
    for framing in [Framing::Declared, Framing::Open] {
        let answer = client.ask(&Request::post("/v1/x", body.clone()).framed(framing)).await;
        assert_eq!((answer.status, answer.complete), (200, true));
    }
    let seen = engine.seen();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|seen| seen.body == body));
    assert_eq!((seen[1].connection, seen[1].nth), (0, 1));
}

#[tokio::test]
async fn an_event_behind_a_gate_comes_only_when_it_is_opened() {
    let gate = Gate::new();
    let scripted = gate.clone();
    let engine = Engine::start(move |_| {
        Answer::stream().event(&delta("a")).wait(&scripted).event(&delta("b")).event("[DONE]").end()
    });
    let mut client = Client::connect(engine.socket(), Line::Http1).await;
    client.send(&Request::streamed("tiny", "hello")).await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.piece().await.unwrap().unwrap(), format!("data: {}\n\n", delta("a")));
    gate.reached(1).await;
    let reads = client.reads();
    gate.open();
    let (rest, complete) = client.rest().await;
    assert!(complete && client.reads() > reads);
    assert_eq!(rest, format!("data: {}\n\ndata: [DONE]\n\n", delta("b")));
}

#[tokio::test]
async fn an_http2_client_counts_frames_and_tells_an_end_from_a_cut() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let mut connection = h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap();
        while let Some(Ok((request, mut responder))) = connection.accept().await {
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut received = 0;
                while let Some(Ok(data)) = body.data().await {
                    received += data.len();
                    body.flow_control().release_capacity(data.len()).unwrap();
                }
                let mut stream = responder.send_response(http::Response::new(()), false).unwrap();
                stream.send_data(Bytes::from(format!("{received} bytes")), received == 100_000).unwrap();
                std::future::poll_fn(|cx| stream.poll_reset(cx)).await.ok();
            });
        }
    });
    let mut client = Client::connect(address, Line::Http2).await;
    for framing in [Framing::Declared, Framing::Open] {
        let reads = client.reads();
        let answer = client.ask(&Request::post("/", vec![0; 100_000]).framed(framing)).await;
        assert_eq!((answer.text().as_str(), answer.complete), ("100000 bytes", true));
        assert_eq!(client.reads() - reads, 1);
    }
    client.send(&Request::post("/", "short")).await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.piece().await.unwrap().unwrap(), "5 bytes");
    server.abort();
    assert!(client.piece().await.is_err(), "a cut answer passed for a complete one");
}

#[tokio::test]
async fn an_engine_notices_a_client_that_leaves_in_the_middle_of_an_answer() {
    let engine = Engine::start(|_| Answer::silence());
    let mut client = Client::connect(engine.socket(), Line::Http1).await;
    client.send(&Request::chat("tiny", "hello")).await;
    engine.received(1).await;
    drop(client);
    engine.abandoned(1).await;
}

#[tokio::test]
async fn a_cut_or_reset_answer_is_not_complete() {
    let cuts = [Answer::stream().event("x").close(), Answer::stream().event("x").reset()];
    for cut in cuts {
        let engine = Engine::start(move |_| cut.clone());
        let mut client = Client::connect(engine.socket(), Line::Http1).await;
        client.send(&Request::chat("tiny", "hello")).await;
        client.head().await;
        let (body, complete) = client.rest().await;
        assert!(!complete, "a cut answer passed for a complete one");
        assert!(body.is_empty() || body == "data: x\n\n");
    }
}

#[tokio::test]
async fn a_port_refuses_until_somebody_listens_and_again_after_a_kill() {
    let port = Port::take();
    assert!(TcpStream::connect(port.address()).await.is_err());
    let engine = Engine::good();
    assert!(TcpStream::connect(engine.socket()).await.is_ok());
    engine.kill().await;
    assert!(TcpStream::connect(engine.socket()).await.is_err());
    engine.revive();
    let answer = Client::connect(engine.socket(), Line::Http1).await.ask(&Request::get("/health")).await;
    assert_eq!((answer.status, engine.count()), (200, 0));
}

#[test]
fn samples_are_summed_over_the_labels_that_are_not_asked_for() {
    let metrics = Metrics::parse(
        "# TYPE a counter\na{x=\"1\",y=\"u,v\"} 2\na{x=\"1\",y=\"w\"} 3e0\na{x=\"2\"} 4\nb 5\n",
    );
    assert_eq!(metrics.sum("a", &[("x", "1")]), 5.0);
    assert_eq!(metrics.sum("a", &[("y", "u,v")]), 2.0);
    assert_eq!(metrics.sum("b", &[]), 5.0);
    assert!(!metrics.has("c", &[]));
}
