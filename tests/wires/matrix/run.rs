//! The play of a row: three times in a row on each protocol, and every word of the row checked each time.
//!
//! Each run has an upstream of its own in the one proxy of the row, found by a header, and engines of its own:
//! what one run leaves behind (an ejection, a connection) is nothing to the next.

use super::backend::Backend;
use super::leaver;
use super::row::{Charged, End, Ill, Next, Row, Scene};
use crate::support::client::{Answer as Reply, Client, Line, Request};
use crate::support::engine::{Engine, Gate};
use crate::support::metrics::Metrics;
use crate::support::proxy::Proxy;
use crate::support::stage::reply;
use crate::support::{upstream, wait_until};
use std::cell::Cell;

/// How often each row is played on each protocol.
pub(super) const TIMES: usize = 3;

/// Every `outcome` of `plimsoll_requests_total`.
const OUTCOMES: [&str; 8] =
    ["ok", "client_error", "engine_error", "cut", "client_gone", "unreachable", "refused", "local"];

/// The upstream of one run: its name, its keys, its gate and backends.
struct Set {
    name: String,
    keys: String,
    gate: Gate,
    backends: Vec<Backend>,
}

/// One run of a row.
pub(super) struct Run<'a> {
    pub(super) proxy: &'a Proxy,
    pub(super) row: &'a Row,
    /// The name of its upstream, and the beginning of its requests' ids.
    pub(super) name: &'a str,
    pub(super) line: Line,
    pub(super) gate: &'a Gate,
    backends: &'a [Backend],
    /// Good answers to requests that are not the row's own.
    extra: Cell<u32>,
}

impl Set {
    async fn new(name: String, row: &Row, more: &str) -> Self {
        let gate = Gate::new();
        let backends = Backend::of(&row.scene, &gate).await;
        // Where one of two is ill it is asked first, for as long as it may be.
        let weights = if matches!(row.scene, Scene::Play(..)) { [2, 1, 1] } else { [1000, 1, 1] };
        let addresses: Vec<String> = backends
            .iter()
            .zip(weights)
            .map(|(backend, weight)| format!("{{ address: '{}', weight: {weight} }}", backend.address()))
            .collect();
        let given = [row.upstream, row.beside, more].into_iter().filter(|keys| !keys.is_empty());
        let mut keys = given.fold("models: any".to_owned(), |keys, more| format!("{keys}, {more}"));
        for (key, value) in [("policy:", "least_connections"), ("max_fails:", "1"), ("fail_timeout:", "60s")]
        {
            if !keys.contains(key) {
                keys = format!("{key} {value}, {keys}");
            }
        }
        Self { keys: upstream(&addresses, &keys), name, gate, backends }
    }

    fn run<'a>(&'a self, proxy: &'a Proxy, row: &'a Row, line: Line) -> Run<'a> {
        let Self { name, gate, backends, .. } = self;
        Run { proxy, row, name, line, gate, backends, extra: Cell::new(0) }
    }
}

/// A proxy with an upstream for each set, found by a header.
async fn before(sets: &[Set], limits: &str) -> Proxy {
    let routes =
        sets.iter().map(|Set { name, .. }| format!("{{ headers: {{ x-run: {name} }}, upstream: {name} }}"));
    let upstreams = sets.iter().map(|Set { name, keys, .. }| format!("{name}: {keys}"));
    let (routes, upstreams): (Vec<_>, Vec<_>) = (routes.collect(), upstreams.collect());
    let all = format!("routes: [{}]\nupstreams: {{ {} }}\n", routes.join(", "), upstreams.join(", "));
    Proxy::start(&format!("{limits}\n{all}")).await
}

/// Plays the row and checks it.
pub(super) async fn keep(row: Row) {
    let mut sets = Vec::new();
    for line in row.lines {
        for number in 1..=TIMES {
            let name = format!("{line:?}-{number}").to_lowercase();
            sets.push((*line, Set::new(name, &row, "").await));
        }
    }
    let (lines, sets): (Vec<Line>, Vec<Set>) = sets.into_iter().unzip();
    let proxy = before(&sets, row.limits).await;
    for (line, set) in lines.into_iter().zip(&sets) {
        eprintln!("run {}", set.name);
        set.run(&proxy, &row, line).check().await;
    }
}

/// Plays those rows with retries switched off, and checks that no engine that failed was followed by another.
pub(super) async fn keep_without_retries(rows: Vec<(&'static str, Row)>) {
    let mut sets = Vec::new();
    for (number, (_, row)) in rows.iter().enumerate() {
        sets.push(Set::new(format!("row-{number}"), row, "retry: { on: [] }").await);
    }
    let proxy = before(&sets, "").await;
    let runs = rows.iter().zip(&sets).map(async |((name, row), set)| {
        let run = set.run(&proxy, row, Line::Http1);
        let mut client = run.sent(0).await;
        run.gate.reached(1).await;
        run.gate.open();
        let _answer = reply(&mut client).await;
        run.settled(0).await;
        let counts: Vec<usize> = set.backends.iter().filter_map(Backend::engine).map(Engine::count).collect();
        assert_eq!(counts, [1, 0], "{name}");
    });
    futures::future::join_all(runs).await;
    proxy.counts("plimsoll_retries_total", &[], 0.0).await;
    proxy.assert_at_rest().await;
}

impl Run<'_> {
    /// The row's request of that number, from 0.
    pub(super) fn request(&self, number: usize) -> Request {
        let request = match self.row.streamed {
            true => Request::streamed("tiny", "hello"),
            false => Request::chat("tiny", "hello"),
        };
        self.addressed(request, &number.to_string())
    }

    /// The request, sent to this run's upstream under an id of this run's.
    pub(super) fn addressed(&self, request: Request, id: &str) -> Request {
        request.with("x-run", self.name).with("x-request-id", &format!("{}-{id}", self.name))
    }

    /// The row's request of that number, under way.
    pub(super) async fn sent(&self, number: usize) -> Client {
        let mut client = self.proxy.client(self.line).await;
        client.send(&self.request(number)).await;
        client
    }

    /// The whole answer to the row's request of that number.
    pub(super) async fn ask(&self, number: usize) -> Option<Reply> {
        Some(self.proxy.client(self.line).await.ask(&self.request(number)).await)
    }

    /// The engine of that number, from 0.
    pub(super) fn engine(&self, number: usize) -> &Engine {
        self.backends[number].engine().expect("a backend with an engine")
    }

    /// Waits until the row's request of that number has its line in the access log.
    pub(super) async fn settled(&self, number: usize) -> String {
        let mark = format!(" request id={}-{number} ", self.name);
        let mut line = String::new();
        wait_until("the line in the access log", async || {
            let log = self.proxy.log();
            line = log.split_inclusive('\n').find(|line| line.contains(&mark)).unwrap_or_default().to_owned();
            line.ends_with('\n')
        })
        .await;
        line
    }

    /// A request that is not the row's own has been answered well.
    pub(super) fn extra_answer(&self) {
        self.extra.set(self.extra.get() + 1);
    }

    /// Checks what is charged at this moment beside that many other requests.
    pub(super) async fn look(&self, charged: Charged, others: u32) {
        let labels = [("upstream", self.name)];
        let requests = f64::from(others + u32::from(charged != Charged::Nothing));
        wait_until(&format!("{charged:?} to be charged"), async || {
            let metrics = self.proxy.metrics().await;
            let pending = metrics.sum("plimsoll_pending_tokens", &labels) > 0.0;
            let place = metrics.sum("plimsoll_active_requests", &labels) == requests;
            charged == Charged::Unseen || place && pending == (others > 0 || charged == Charged::Prompt)
        })
        .await;
    }

    async fn check(&self) {
        let before = self.proxy.metrics().await;
        let replies = self.play().await;
        assert_eq!(replies.len(), self.row.ends.len());
        for (number, (end, reply)) in self.row.ends.iter().zip(&replies).enumerate() {
            end.gets.check(reply.as_ref());
            self.check_log(number, end).await;
        }
        self.check_seen();
        self.check_counts(&before).await;
        self.proxy.assert_at_rest().await;
        self.check_next().await;
    }

    async fn play(&self) -> Vec<Option<Reply>> {
        match &self.row.scene {
            Scene::Play(_, play) => play(self).await,
            Scene::Goes(stage, way) => vec![leaver::go(self, *stage, *way).await],
            Scene::One(ill) | Scene::Both(ill) => {
                let mut client = self.sent(0).await;
                // Every engine that has the request waits before it does what it does.
                for (number, arrived) in (1..).zip(0..self.row.seen) {
                    let fails = matches!(ill, Ill::Does(_)) && arrived == 0;
                    self.gate.reached(number).await;
                    self.look(if fails { self.row.charged } else { Charged::Prompt }, 0).await;
                    self.gate.open();
                }
                vec![Some(reply(&mut client).await)]
            }
        }
    }

    async fn check_log(&self, number: usize, end: &End) {
        let line = self.settled(number).await;
        let field = |key: &str| {
            let found = line.trim_end().split(' ').find_map(|word| word.strip_prefix(key));
            found.map(str::to_owned)
        };
        assert_eq!(field("outcome=").as_deref(), Some(end.outcome), "{line}");
        assert_eq!(field("attempts=").and_then(|n| n.parse().ok()), end.attempts, "{line}");
        assert_eq!(field("error=").as_deref(), end.error, "{line}");
    }

    /// How often the engines saw the row's own requests, and none of them twice unless the row plays with that.
    fn check_seen(&self) {
        let of_ours = |engine: &Engine| {
            let seen = engine.seen();
            let ids = seen.iter().filter_map(|seen| seen.head.header("x-request-id").map(str::to_owned));
            ids.filter(|id| !id.ends_with("-holder") && !id.ends_with("-well")).count()
        };
        let counts: Vec<usize> = self.backends.iter().filter_map(Backend::engine).map(of_ours).collect();
        assert_eq!(counts.iter().sum::<usize>(), self.row.seen, "{counts:?}");
        if !matches!(self.row.scene, Scene::Play(..)) {
            assert!(counts.iter().all(|&count| count <= 1), "one backend twice: {counts:?}");
        }
    }

    async fn check_counts(&self, before: &Metrics) {
        for outcome in OUTCOMES {
            let ends = self.row.ends.iter().filter(|end| end.outcome == outcome).count();
            let wanted = f64::from(u32::try_from(ends).expect("few"))
                + f64::from(if outcome == "ok" { self.extra.get() } else { 0 });
            self.grows("plimsoll_requests_total", "outcome", outcome, before, wanted).await;
        }
        let ejected = self.row.ejected.map(|reason| (reason, 1));
        for (name, counted) in
            [("plimsoll_retries_total", self.row.retried), ("plimsoll_ejections_total", ejected)]
        {
            let all = before.sum(name, &[]) + f64::from(counted.map_or(0, |(_, count)| count));
            self.proxy.counts(name, &[], all).await;
            if let Some((reason, count)) = counted {
                self.grows(name, "reason", reason, before, f64::from(count)).await;
            }
        }
    }

    async fn grows(&self, name: &str, label: &str, value: &str, before: &Metrics, by: f64) {
        let labels = [(label, value)];
        self.proxy.counts(name, &labels, before.sum(name, &labels) + by).await;
    }

    async fn check_next(&self) {
        let expected = match self.row.next {
            Next::Unasked => return,
            Next::Same => &self.backends[0],
            Next::Other => &self.backends[1],
        };
        let attempts = [("upstream", self.name)];
        let before = self.proxy.metrics().await.sum("plimsoll_attempts_total", &attempts);
        let well = self.addressed(Request::chat("tiny", "hello"), "well").with("x-well", "1");
        let reply = self.proxy.client(self.line).await.ask(&well).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("x-plimsoll-backend"), Some(&*expected.address()));
        self.proxy.counts("plimsoll_attempts_total", &attempts, before + 1.0).await;
        self.proxy.assert_at_rest().await;
    }
}
