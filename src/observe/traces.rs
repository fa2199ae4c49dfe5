//! Where the spans of requests are told: a collector that speaks OTLP over HTTP.
//!
//! Whoever has a span hands it over and goes on: it waits in a bounded queue of OpenTelemetry's SDK, whose own thread
//! sends batches. A collector that is slow or away costs spans, never requests; it is counted, and the log says when
//! that begins and ends. Nothing here decides what a span holds.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http::Uri;
use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _,
};
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;
use tokio::runtime::{Builder, Runtime};

use super::metrics::ExportMetrics;
use crate::config;
use crate::fetch::Fetcher;

/// Spans that may wait for the collector; some kilobytes each.
const QUEUE_SPANS: usize = 8_192;

/// Spans that are sent at once, at the latest after [`INTERVAL`].
const BATCH_SPANS: usize = 512;
const INTERVAL: Duration = Duration::from_secs(1);

/// For one batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// For the last batches of a process that ends.
const LAST_TIMEOUT: Duration = Duration::from_millis(500);

/// What has happened, from when to when.
#[derive(Debug)]
pub struct Span {
    /// The trace that it is a part of; not zero.
    pub trace: u128,
    /// What it goes by; not zero.
    pub id: u64,
    /// The span that it is a part of.
    pub parent: Option<u64>,
    /// Whether that was another process's.
    pub parent_is_remote: bool,
    /// Whether we were asked, or asked.
    pub kind: SpanKind,
    /// Few of them: names are what spans are grouped by.
    pub name: String,
    /// When it began.
    pub began: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
    /// What is known of it, in the names of OpenTelemetry's semantic conventions where there are any.
    pub attributes: Vec<KeyValue>,
    /// What happened meanwhile.
    pub events: Vec<(&'static str, SystemTime)>,
    /// Whether it came to nothing.
    pub failed: bool,
}

/// Tells spans to a collector.
#[derive(Debug)]
pub struct Traces {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    sample: f64,
}

impl Traces {
    /// Starts the thread that tells them.
    ///
    /// # Errors
    /// No thread, or what the environment says of OTLP cannot be.
    pub fn new(config: &config::Traces, metrics: ExportMetrics) -> Result<Self, String> {
        let collector = Collector::new(metrics).map_err(|e| e.to_string())?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(collector)
            // What is worth keeping waits in the queue; a batch that waited here would hold all others up.
            .with_retry_policy(RetryPolicy::disabled())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(config.endpoint.to_string())
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|e| e.to_string())?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS)
            .with_max_export_batch_size(BATCH_SPANS)
            .with_scheduled_delay(INTERVAL)
            .build();
        let mut processor = BatchSpanProcessor::new(exporter, batches);
        processor.set_resource(&resource());
        let scope = InstrumentationScope::builder("plimsoll").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { processor, scope, sample: config.sample })
    }

    /// Whether a request that comes without a trace is told of, where `roll` is one of equally likely numbers from 0
    /// to below 1.
    pub fn samples(&self, roll: f64) -> bool {
        roll < self.sample
    }

    /// Hands over `span`; it is lost if too many wait already.
    pub fn tell(&self, span: Span) {
        let context = SpanContext::new(
            TraceId::from(span.trace),
            SpanId::from(span.id),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        let at = |(name, time): (&'static str, SystemTime)| Event::new(name, time, Vec::new(), 0);
        let mut events = SpanEvents::default();
        events.events = span.events.into_iter().map(at).collect();
        self.processor.on_end(SpanData {
            span_context: context,
            parent_span_id: span.parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: span.parent_is_remote,
            span_kind: span.kind,
            name: span.name.into(),
            start_time: span.began,
            end_time: span.ended,
            attributes: span.attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status: if span.failed { Status::error("") } else { Status::Unset },
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Tells what still waits, as far as that is possible in half a second. Blocks.
    pub fn finish(&self) {
        if let Err(e) = self.processor.shutdown_with_timeout(LAST_TIMEOUT) {
            log::warn!("the last spans may not have been told error={e}");
        }
    }
}

/// Who we are: `plimsoll`, if `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` do not say more.
fn resource() -> Resource {
    let named = std::env::var_os("OTEL_SERVICE_NAME").is_some();
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    if named { resource.build() } else { resource.with_service_name("plimsoll").build() }
}

/// The collector, asked by Pingora's own connector. It is the thread of the SDK that waits for it.
struct Collector {
    fetcher: Fetcher,
    runtime: Runtime,
    metrics: ExportMetrics,
    /// The last batch did not arrive.
    is_away: AtomicBool,
}

impl Collector {
    fn new(metrics: ExportMetrics) -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { fetcher: Fetcher::default(), runtime, metrics, is_away: AtomicBool::new(false) })
    }

    async fn post(&self, request: Request<Bytes>) -> Result<(u16, Bytes), HttpError> {
        let (head, body) = request.into_parts();
        let uri = head.uri;
        let host = uri.host().ok_or("the endpoint has no host")?;
        let is_tls = uri.scheme_str() == Some("https");
        let peer = HttpPeer::new(address(&uri, host, is_tls).await?, is_tls, host.to_owned());
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut header = RequestHeader::build("POST", path.as_bytes(), Some(head.headers.len() + 4))?;
        for (name, value) in &head.headers {
            header.insert_header(name.clone(), value)?;
        }
        header.insert_header("host", uri.authority().map_or(host, |authority| authority.as_str()))?;
        Ok(self.fetcher.fetch(peer, header, body).await?)
    }

    /// Counts the batch; the log tells when the collector goes and comes, not each time.
    fn note(&self, answer: &Result<(u16, Bytes), HttpError>) {
        let trouble = match answer {
            Ok((200..300, _)) => None,
            Ok((status, _)) => Some(format!("status {status}")),
            Err(e) => Some(e.to_string()),
        };
        self.metrics.count(trouble.is_none());
        let was_away = self.is_away.swap(trouble.is_some(), Ordering::Relaxed);
        match trouble {
            Some(why) if !was_away => {
                log::warn!("traces are lost: the collector does not take them error={why}")
            }
            None if was_away => log::info!("the collector takes traces again"),
            _ => {}
        }
    }
}

/// The first address of the host of `uri`.
async fn address(uri: &Uri, host: &str, is_tls: bool) -> Result<SocketAddr, HttpError> {
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses = tokio::net::lookup_host((bare, port)).await?;
    addresses.next().ok_or_else(|| format!("`{host}` has no address").into())
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.runtime.block_on(async {
            let answer = tokio::time::timeout(EXPORT_TIMEOUT, self.post(request)).await;
            answer.unwrap_or_else(|_| Err("no answer in time".into()))
        });
        self.note(&answer);
        let (status, body) = answer?;
        Ok(Response::builder().status(status).body(body)?)
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Collector")
    }
}
