//! The spans of requests, as a collector gets them.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, addresses};
use crate::support::proxy::Proxy;
use crate::support::stage::{BOTH, chat};
use crate::support::{one_upstream, wait_until};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A proxy before `engines` that tells `collector` of its requests.
async fn traced(engines: &[Engine], collector: &Engine, sample: &str, more: &str) -> Proxy {
    let upstream = one_upstream(&addresses(&engines.iter().collect::<Vec<_>>()), more);
    let endpoint = format!("http://{}", collector.address());
    Proxy::start(&format!(
        "observe: {{ traces: {{ endpoint: '{endpoint}', sample: {sample} }} }}\n{upstream}"
    ))
    .await
}

/// Every span that has come so far.
fn spans(collector: &Engine) -> Vec<Span> {
    let batches = collector.seen().into_iter().map(|seen| {
        assert_eq!(seen.head.start, "POST /v1/traces HTTP/1.1");
        assert_eq!(seen.head.header("content-type"), Some("application/x-protobuf"));
        let batch = ExportTraceServiceRequest::decode(seen.body).expect("a batch of spans");
        let resource = batch.resource_spans[0].resource.as_ref().expect("a resource");
        assert_eq!(texts(&resource.attributes)["service.name"], "plimsoll");
        batch
    });
    let of_a_batch = batches.flat_map(|batch| batch.resource_spans);
    of_a_batch.flat_map(|of| of.scope_spans).flat_map(|of| of.spans).collect()
}

async fn so_many_spans(collector: &Engine, count: usize) -> Vec<Span> {
    wait_until("the spans", async || spans(collector).len() >= count).await;
    let spans = spans(collector);
    assert_eq!(spans.len(), count, "{spans:#?}");
    spans
}

/// Attributes as texts, whatever they are.
fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{}: {other:?}", pair.key),
    };
    attributes.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parent_seen_by(engine: &Engine) -> String {
    engine.seen().last().expect("a request").head.header("traceparent").unwrap_or("-").to_owned()
}

#[tokio::test]
async fn a_request_is_told_as_a_span_of_its_clients_trace_and_each_attempt_as_a_span_of_the_requests() {
    let engines = [Engine::start(|_| Answer::json(503, "{}")), Engine::good()];
    for line in BOTH {
        let collector = Engine::good();
        let proxy = traced(&engines, &collector, "0", "policy: round_robin, max_fails: 0").await;
        let request =
            chat().with("traceparent", PARENT).with("tracestate", "a=1").with("x-request-id", "r-1");
        // Two in turn, so that one of them is tried on both.
        for _ in 0..2 {
            assert_eq!(proxy.client(line).await.ask(&request).await.status, 200, "{line:?}");
        }
        let spans = so_many_spans(&collector, 5).await;
        assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE), "{spans:#?}");
        let (requests, attempts): (Vec<_>, Vec<_>) =
            spans.into_iter().partition(|span| span.kind == SpanKind::Server as i32);
        assert_eq!((requests.len(), attempts.len()), (2, 3));
        for request in &requests {
            assert_eq!(hex(&request.parent_span_id), "00f067aa0ba902b7");
            assert_eq!(request.name, "POST /v1/chat/completions");
            assert!(request.start_time_unix_nano < request.end_time_unix_nano);
            let events: Vec<_> = request.events.iter().map(|event| event.name.as_str()).collect();
            assert_eq!(events, ["admitted", "first token"]);
            let known = texts(&request.attributes);
            for (key, value) in [
                ("http.request.method", "POST"),
                ("url.path", "/v1/chat/completions"),
                ("http.response.status_code", "200"),
                ("client.address", "127.0.0.1"),
                ("plimsoll.request_id", "r-1"),
                ("plimsoll.outcome", "ok"),
                ("plimsoll.upstream", "llm"),
                ("gen_ai.request.model", "tiny"),
            ] {
                assert_eq!(known.get(key).map(String::as_str), Some(value), "{key} in {known:?}");
            }
        }
        let failed: Vec<_> =
            attempts.iter().filter(|span| texts(&span.attributes).contains_key("error.type")).collect();
        assert_eq!(failed.len(), 1, "{attempts:#?}");
        let known = texts(&failed[0].attributes);
        assert_eq!(known["http.response.status_code"], "503");
        assert_eq!(known["server.address"], engines[0].address().to_string());
        for attempt in &attempts {
            assert_eq!(attempt.kind, SpanKind::Client as i32);
            assert!(requests.iter().any(|request| request.span_id == attempt.parent_span_id), "{attempt:#?}");
        }
        // What an engine records is part of the attempt that it saw.
        let seen = parent_seen_by(&engines[1]);
        let theirs = attempts.iter().map(|span| format!("00-{TRACE}-{}-01", hex(&span.span_id)));
        assert!(theirs.collect::<Vec<_>>().contains(&seen), "{seen}");
    }
}

#[tokio::test]
async fn whoever_begins_a_trace_decides_whether_it_is_recorded() {
    let engine = [Engine::good()];
    let collector = Engine::good();
    let proxy = traced(&engine, &collector, "0", "").await;
    let unrecorded = PARENT.replace("-01", "-00");
    assert_eq!(proxy.ask(&chat().with("traceparent", &unrecorded)).await.status, 200);
    assert_eq!(parent_seen_by(&engine[0]), unrecorded, "as it came");
    assert_eq!(proxy.ask(&chat().with("tracestate", "a=1")).await.status, 200);
    let begun = parent_seen_by(&engine[0]);
    assert!(begun.starts_with("00-") && begun.ends_with("-00"), "{begun}");
    // Told after the others would have been.
    assert_eq!(proxy.ask(&chat().with("traceparent", PARENT)).await.status, 200);
    so_many_spans(&collector, 2).await;
    let all = traced(&engine, &collector, "1.0", "").await;
    assert_eq!(all.ask(&chat()).await.status, 200);
    let spans = so_many_spans(&collector, 4).await;
    let begun = parent_seen_by(&engine[0]);
    let roots: Vec<_> = spans.iter().filter(|span| span.parent_span_id.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{spans:#?}");
    assert!(
        begun.starts_with(&format!("00-{}-", hex(&roots[0].trace_id))) && begun.ends_with("-01"),
        "{begun}"
    );
    wait_until("its line", async || all.log().contains(&format!(" trace={} ", hex(&roots[0].trace_id))))
        .await;
}

#[tokio::test]
async fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    let engine = [Engine::good()];
    let collector = Engine::start(|_| Answer::json(503, "{}"));
    let proxy = traced(&engine, &collector, "1", "").await;
    for batch in 1..=2 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
        let failed = "plimsoll_trace_exports_total{result=\"failed\"}";
        wait_until("a lost batch", async || {
            let page = proxy.admin(&Request::get("/metrics")).await.text();
            page.contains(&format!("{failed} {batch}\n"))
        })
        .await;
    }
    assert_eq!(proxy.log().matches("traces are lost").count(), 1, "{}", proxy.log());
}

#[tokio::test]
async fn the_spans_of_the_last_requests_are_told_before_the_process_ends() {
    let engine = [Engine::good()];
    let collector = Engine::good();
    let mut proxy = traced(&engine, &collector, "1", "").await;
    assert_eq!(proxy.client(Line::Http1).await.ask(&chat()).await.status, 200);
    proxy.signal("TERM");
    assert!(proxy.exit().await.success());
    assert_eq!(spans(&collector).len(), 2);
}
