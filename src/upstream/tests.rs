//! An upstream as requests see it: admitted, charged, waiting, under one configuration and the next.

use futures::FutureExt;

use super::*;
use crate::balance::ledger::Account;
use crate::policy::{PolicyConfig, Reason};

fn upstream(backends: u8, configure: impl FnOnce(&mut config::Upstream)) -> Arc<Upstream> {
    let mut config = config::Upstream::default();
    configure(&mut config);
    let (metrics, mut probes) = (Arc::new(Metrics::new().unwrap()), Probes::default());
    Upstream::new("llama", config, fixed(backends), None, Clock::start(), &metrics, &mut probes)
}

fn members(backends: u8) -> Vec<Member> {
    let member =
        |n| Member { address: SocketAddr::from(([10, 0, 0, n], 8000)), weight: 1, host: String::new() };
    (1..=backends).map(member).collect()
}

fn fixed(backends: u8) -> Origin {
    Origin { members: members(backends), source: None }
}

fn request() -> Request<'static> {
    Request { prompt_tokens: 100, blocks: &[], block_tokens: 128.0, session: None }
}

fn at_rest(upstream: &Upstream) -> bool {
    upstream.states().iter().all(|state| state.account == Account::default())
}

fn succeed(before: &Upstream, backends: u8, configure: impl FnOnce(&mut config::Upstream)) -> Arc<Upstream> {
    let mut config = before.config.clone();
    configure(&mut config);
    let (metrics, mut probes) = (Arc::new(Metrics::new().unwrap()), Probes::default());
    Upstream::new("llama", config, fixed(backends), Some(before), Clock::start(), &metrics, &mut probes)
}

#[test]
fn a_new_configuration_finds_what_its_backends_owe_and_the_old_one_settles_it() {
    let before = upstream(2, |_| {});
    let held = before.assign(&Request { blocks: &[1, 2], ..request() }, &[]).unwrap();
    let after = succeed(&before, 3, |config| config.policy = PolicyConfig::LeastConnections);
    let owed = |address| after.states().iter().find(|s| s.address == address).map(|s| s.account);
    assert_eq!(owed(held.address).unwrap().active_requests, 1);
    assert_eq!(after.states().len(), 3);
    let cached: usize = after.states().iter().map(|state| state.prefix_blocks).sum();
    assert_eq!(cached, 2, "what it has cached is not forgotten");
    let next = after.assign(&request(), &[]).unwrap();
    assert_ne!(next.address, held.address, "the new policy counts what the old one sent");
    drop((held, next));
    assert!(at_rest(&after) && at_rest(&before));
}

#[tokio::test]
async fn more_room_in_a_new_configuration_lets_the_first_in_line_go() {
    let before = upstream(1, |config| config.max_requests = Some(1));
    let held = before.assign(&request(), &[]).unwrap();
    let request = request();
    let mut waiting = std::pin::pin!(before.admit(&request));
    assert!((&mut waiting).now_or_never().is_none());
    succeed(&before, 1, |config| config.max_requests = Some(2)).adopt_health();
    assert!(waiting.await.unwrap().is_some());
    drop(held);
    assert!(at_rest(&before));
}

#[test]
fn what_an_earlier_configuration_still_discovers_comes_too_late() {
    let before = upstream(1, |_| {});
    before.replace(members(3));
    assert_eq!(before.states().len(), 3);
    // Nothing is planned: those that were found stay.
    let (metrics, mut probes) = (Arc::new(Metrics::new().unwrap()), Probes::default());
    let (config, clock) = (before.config.clone(), Clock::start());
    let after = Upstream::new("llama", config, fixed(0), Some(&before), clock, &metrics, &mut probes);
    assert_eq!(after.states().len(), 3);
    before.replace(members(1));
    assert_eq!(after.states().len(), 3);
    after.replace(members(2));
    assert_eq!((before.states().len(), before.view().live.len()), (2, 2));
}

#[test]
fn a_backend_that_leaves_keeps_what_was_sent_to_it_and_finds_it_when_it_returns() {
    let upstream = upstream(1, |_| {});
    let held = upstream.assign(&request(), &[]).unwrap();
    upstream.replace(members(2).split_off(1));
    let next = upstream.assign(&request(), &[]).unwrap();
    assert_ne!(next.address, held.address);
    upstream.replace(members(2));
    assert!(Arc::ptr_eq(&next.live.clone().unwrap(), &upstream.view().live[&next.address]));
    let owes: Vec<u32> = upstream.states().iter().map(|state| state.account.active_requests).collect();
    assert_eq!(owes, [1, 1]);
    drop((held, next));
    assert!(at_rest(&upstream));
}

#[test]
fn a_backend_that_was_down_is_down_no_longer_than_somebody_probes_it() {
    let before = upstream(1, |_| {});
    before.shared.observe_health(&members(1)[0].address, false);
    assert!(!before.is_available());
    let after = succeed(&before, 1, |config| config.probe = None);
    after.adopt_health();
    assert!(after.is_available());
}

#[test]
fn an_assignment_is_charged_until_it_is_dropped() {
    let upstream = upstream(2, |_| {});
    let mut first = upstream.assign(&request(), &[]).unwrap();
    let second = upstream.assign(&request(), &[]).unwrap();
    assert_ne!(first.address, second.address);
    let pending =
        |upstream: &Upstream| upstream.states().iter().map(|s| s.account.pending_tokens).sum::<u64>();
    assert_eq!(pending(&upstream), 200);
    first.answer();
    assert_eq!(pending(&upstream), 100);
    drop((first, second));
    assert!(at_rest(&upstream));
}

#[test]
fn a_backend_that_was_tried_is_not_assigned_again() {
    let upstream = upstream(2, |_| {});
    let first = upstream.assign(&request(), &[]).unwrap();
    let second = upstream.assign(&request(), &[first.slot]).unwrap();
    assert_ne!(first.address, second.address);
    assert!(upstream.assign(&request(), &[first.slot, second.slot]).is_none());
    assert_eq!(upstream.tier(&[first.slot]), Some(Tier::Available));
    assert_eq!(upstream.tier(&[first.slot, second.slot]), None);
}

#[test]
fn a_backend_that_is_down_is_assigned_only_as_a_last_resort() {
    let upstream = upstream(2, |_| {});
    let [down, up] = [1, 2].map(|n| SocketAddr::from(([10, 0, 0, n], 8000)));
    upstream.shared.observe_health(&down, false);
    let first = upstream.assign(&request(), &[]).unwrap();
    assert_eq!((first.address, first.reason), (up, Reason::Only));
    let second = upstream.assign(&request(), &[first.slot]).unwrap();
    assert_eq!((second.address, second.reason), (down, Reason::LastResort));
    drop((first, second));
    assert!(at_rest(&upstream));
}

#[tokio::test]
async fn a_request_waits_for_the_backend_that_is_full_and_not_for_the_one_that_is_down() {
    let upstream = upstream(2, |config| config.max_requests = Some(1));
    upstream.shared.observe_health(&SocketAddr::from(([10, 0, 0, 1], 8000)), false);
    let first = upstream.admit(&request()).await.unwrap().unwrap();
    let waiting = upstream.clone();
    let second = tokio::spawn(async move { waiting.admit(&request()).await.unwrap().map(|c| c.address) });
    while upstream.shared.queue.is_empty() {
        tokio::task::yield_now().await;
    }
    let address = first.address;
    drop(first);
    assert_eq!(second.await.unwrap(), Some(address));
}

#[tokio::test]
async fn a_request_waits_for_room_and_is_admitted_when_another_ends() {
    let upstream = upstream(1, |config| config.max_requests = Some(1));
    let first = upstream.admit(&request()).await.unwrap().unwrap();
    let waiting = upstream.clone();
    let second = tokio::spawn(async move { waiting.admit(&request()).await.unwrap().is_some() });
    while upstream.shared.queue.is_empty() {
        tokio::task::yield_now().await;
    }
    drop(first);
    assert!(second.await.unwrap());
    assert!(at_rest(&upstream));
}

#[test]
fn a_price_is_learned_per_model() {
    let upstream = upstream(1, |config| config.models = config::Models::List(vec!["m".to_owned()]));
    let digest = crate::prompt::digest(
        crate::prompt::Endpoint::Completions,
        br#"{"model": "m", "prompt": "0123456789012345678901234567890123456789"}"#,
    );
    assert_eq!(upstream.price(&digest, None).prompt_tokens, 10);
    let long = Digest { prompt_bytes: 8_000, ..digest.clone() };
    for _ in 0..500 {
        upstream.learn(&long, 1_000);
    }
    assert!((5..=6).contains(&upstream.price(&digest, None).prompt_tokens));
}
