//! The balancer as its callers use it: charges, tiers, caches, readings and returns.

use super::*;
use crate::policy::PolicyConfig;

const SETTINGS: Settings = Settings {
    ejection: ejection::Rule { max_fails: 3, fail_timeout: Duration::from_secs(30) },
    max_requests: None,
    slow_start: Duration::from_secs(10),
    stall_timeout: Duration::from_secs(60),
};

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

fn balancer(backends: u8, settings: Settings) -> Balancer {
    let mut balancer = Balancer::new(settings, PolicyConfig::default().build(), 1);
    balancer.set_members((0..backends).map(|n| (address(n), 1)), Time::ZERO);
    balancer
}

fn request(blocks: &[u64]) -> Request<'_> {
    Request { prompt_tokens: 1_000, blocks, block_tokens: 128.0, session: None }
}

fn observe(balancer: &mut Balancer, reading: Reading) {
    let before = balancer.account(&address(0));
    balancer.observe_reading(&address(0), reading, &before, 128.0, Time::ZERO);
}

fn slot(balancer: &Balancer, n: u8) -> Slot {
    balancer.ledger.slot(&address(n)).unwrap()
}

#[test]
fn a_shared_prefix_lands_where_it_was_computed() {
    let mut b = balancer(4, SETTINGS);
    let blocks: Vec<u64> = (1..=7).collect();
    let first = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    assert_eq!((first.matched_tokens, first.charge.uncached_tokens()), (0, 1_000));
    b.settle(first.charge);
    let second = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    assert_eq!((second.address, second.reason, second.matched_tokens), (first.address, Reason::Cache, 896));
    b.settle(second.charge);
    b.observe_health(&first.address, false, Time::ZERO);
    b.observe_health(&first.address, true, Time::ZERO);
    let third = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    assert_eq!(third.matched_tokens, 0, "a backend that was down has lost its cache");
    b.settle(third.charge);
}

#[test]
fn a_burst_is_spread_because_each_pick_is_charged_at_once() {
    let mut b = balancer(4, SETTINGS);
    let picks: Vec<_> = (0..8).map(|_| b.pick(&request(&[]), &[], Time::ZERO).unwrap()).collect();
    for n in 0..4 {
        assert_eq!(picks.iter().filter(|p| p.address == address(n)).count(), 2);
    }
    for pick in picks {
        b.settle(pick.charge);
    }
}

#[test]
fn tried_down_ejected_and_cooling_backends_are_left_out_until_nothing_else_remains() {
    let now = Time::ZERO + Duration::from_secs(1);
    let mut b = balancer(4, SETTINGS);
    b.observe_health(&address(0), false, now);
    let ejected = slot(&b, 1);
    assert!((0..3).any(|_| b.fail(ejected, Failure::Connect, false, now).is_some()));
    let cooling = slot(&b, 2);
    b.cool(cooling, Failure::Status(429), Duration::from_secs(5), now);
    for _ in 0..20 {
        let pick = b.pick(&request(&[]), &[], now).unwrap();
        assert_eq!((pick.address, pick.reason), (address(3), Reason::Only));
        b.settle(pick.charge);
    }
    let mut tried = vec![slot(&b, 3)];
    for _ in 0..3 {
        let pick = b.pick(&request(&[]), &tried, now).unwrap();
        assert_eq!(pick.reason, Reason::LastResort);
        assert!(!tried.contains(&pick.charge.slot()));
        tried.push(pick.charge.slot());
        b.settle(pick.charge);
    }
    assert_eq!(b.pick(&request(&[]), &tried, now).unwrap_err(), NoPick::Exhausted);
}

#[test]
fn a_full_fleet_says_so_and_takes_requests_again_after_a_settlement() {
    let mut b = balancer(2, Settings { max_requests: Some(1), ..SETTINGS });
    assert_eq!(b.tier(&[], Time::ZERO), Ok(Tier::Available));
    let one = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
    let two = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
    assert_eq!(b.pick(&request(&[]), &[], Time::ZERO).unwrap_err(), NoPick::Full);
    assert_eq!(b.tier(&[], Time::ZERO), Err(NoPick::Full));
    b.observe_health(&one.address, false, Time::ZERO);
    assert_eq!(b.pick(&request(&[]), &[], Time::ZERO).unwrap_err(), NoPick::Full, "one is full, one is down");
    b.observe_health(&one.address, true, Time::ZERO);
    b.settle(one.charge);
    let three = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
    assert_eq!(three.address, one.address);
    b.settle(two.charge);
    b.settle(three.charge);
}

#[test]
fn suspected_faults_never_eject_more_than_the_limit() {
    let mut b = balancer(8, SETTINGS);
    let mut ejected = 0;
    for n in 0..8 {
        let slot = slot(&b, n);
        ejected += (0..10).filter(|_| b.fail(slot, Failure::Closed, true, Time::ZERO).is_some()).count();
    }
    assert_eq!(ejected, 2);
}

#[test]
fn a_restart_of_the_engine_clears_its_prefixes_and_its_cache_size_bounds_them() {
    let mut b = balancer(1, SETTINGS);
    let blocks: Vec<u64> = (1..=50).collect();
    let reading = Reading { process_start: Some(1.0), kv_capacity_tokens: Some(1_280), ..Reading::default() };
    observe(&mut b, reading);
    let pick = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    b.settle(pick.charge);
    assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 10);
    for silent in [Reading::default(), Reading { process_start: None, ..reading }, reading] {
        observe(&mut b, silent);
        assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 10, "{silent:?} is no restart");
    }
    observe(&mut b, Reading { process_start: None, ..reading });
    observe(&mut b, Reading { process_start: Some(2.0), ..reading });
    assert_eq!(b.states(Time::ZERO)[0].prefix_blocks, 0);
}

#[test]
fn counters_survive_a_change_of_members_and_weights() {
    let mut b = balancer(2, SETTINGS);
    let pick = b.pick(&request(&[]), &[], Time::ZERO).unwrap();
    b.set_members([(address(5), 1)], Time::ZERO);
    b.set_members([(pick.address, 7), (address(5), 1)], Time::ZERO);
    let states = b.states(Time::ZERO);
    assert_eq!((states[0].weight, states[0].account.active_requests), (7, 1));
    b.settle(pick.charge);
    assert!(b.states(Time::ZERO).iter().all(|s| s.account == Account::default()));
}

/// Picks `n` times without an end and counts by backend.
fn spread(b: &mut Balancer, n: usize, blocks: &[u64], now: Time) -> Vec<u32> {
    for _ in 0..n {
        let pick = b.pick(&request(blocks), &[], now).unwrap();
        let _never_settled = pick.charge;
    }
    b.states(now).iter().map(|s| s.account.active_requests).collect()
}

#[test]
fn a_backend_that_joins_or_returns_gets_little_at_first() {
    let later = Time::ZERO + Duration::from_secs(100);
    let mut joined = balancer(2, SETTINGS);
    joined.set_members((0..3).map(|n| (address(n), 1)), later);
    let got = spread(&mut joined, 42, &[], later);
    assert!(got[2] <= 3, "{got:?} as it joins");
    let mut returned = balancer(3, SETTINGS);
    returned.observe_health(&address(2), false, later);
    returned.observe_health(&address(2), true, later);
    let got = spread(&mut returned, 42, &[], later);
    assert!(got[2] <= 3, "{got:?} as it returns");
    let warm = later + SETTINGS.slow_start;
    assert_eq!(spread(&mut balancer(3, SETTINGS), 42, &[], warm), [14, 14, 14], "as the fleet starts");
}

#[test]
fn a_strained_engine_is_passed_over_while_another_can_serve() {
    let mut b = balancer(2, SETTINGS);
    let full = Reading { kv_usage: Some(0.99), waiting: Some(4), ..Reading::default() };
    observe(&mut b, full);
    assert!(b.states(Time::ZERO)[0].strained);
    assert_eq!(spread(&mut b, 10, &[], Time::ZERO), [0, 10]);
    let other = slot(&b, 1);
    let last = b.pick(&request(&[]), &[other], Time::ZERO).unwrap();
    assert_eq!((last.address, last.reason), (address(0), Reason::Only));
    b.settle(last.charge);
    let stale = Time::ZERO + Duration::from_secs(2);
    assert_eq!(spread(&mut b, 10, &[], stale), [10, 10]);
}

#[test]
fn what_others_send_to_an_engine_is_added_to_what_we_do() {
    let mut b = balancer(2, SETTINGS);
    assert_eq!(spread(&mut b, 2, &[], Time::ZERO), [1, 1]);
    observe(&mut b, Reading { running: Some(1), waiting: Some(6), ..Reading::default() });
    assert_eq!(spread(&mut b, 6, &[], Time::ZERO), [1, 7]);
    assert_eq!(spread(&mut b, 2, &[], Time::ZERO), [2, 8], "six of theirs and ours weigh the same");
}

#[test]
fn a_crowd_that_its_cache_attracts_is_spread() {
    let mut b = balancer(3, SETTINGS);
    let now = Time::ZERO + Duration::from_secs(1);
    let blocks: Vec<u64> = (1..=150).collect();
    let document = Request { prompt_tokens: 20_000, ..request(&blocks) };
    let reasons: Vec<Reason> = (0..20)
        .map(|_| {
            let mut pick = b.pick(&document, &[], now).unwrap();
            b.answer(&mut pick.charge);
            pick.reason
        })
        .collect();
    assert_eq!(reasons[0], Reason::Load);
    assert!(reasons[1..8].iter().all(|reason| *reason == Reason::Cache), "{reasons:?}");
    assert_eq!(reasons[8], Reason::Spread, "eight in flight on one of three, none elsewhere");
    assert!(b.states(now).iter().all(|s| s.account.active_requests > 1), "{:?}", b.states(now));
}

#[test]
fn a_backend_that_returns_from_ejection_gets_one_request_until_that_is_answered() {
    let now = Time::ZERO + Duration::from_secs(1);
    let mut b = balancer(2, SETTINGS);
    let ill = slot(&b, 0);
    let span = (0..3).find_map(|_| b.fail(ill, Failure::Closed, true, now)).unwrap();
    let back = now + span;
    let sent = |b: &mut Balancer, at: Time| {
        let picks: Vec<_> = (0..40).map(|_| b.pick(&request(&[]), &[], at).unwrap()).collect();
        let to_it = picks.iter().filter(|pick| pick.address == address(0)).count();
        picks.into_iter().for_each(|pick| b.settle(pick.charge));
        to_it
    };
    assert_eq!(sent(&mut b, back), 1);
    assert_eq!(sent(&mut b, back), 0);
    b.succeed(ill, back);
    assert!(sent(&mut b, back + SETTINGS.slow_start) > 10);
}

#[test]
fn a_backend_that_owes_answers_and_says_nothing_is_stalled_until_it_does() {
    let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
    let mut b = balancer(2, SETTINGS);
    let pulse = b.pulse(address(0));
    let silent = slot(&b, 0);
    let other = slot(&b, 1);
    let old = b.pick(&request(&[]), &[other], at(100)).unwrap();
    assert_eq!(old.charge.slot(), silent);
    let stalled = |b: &mut Balancer, now| b.states(now)[0].stalled;
    assert!(!stalled(&mut b, at(159)), "it has had its request for less than a minute");
    assert!(stalled(&mut b, at(160)));
    for _ in 0..8 {
        let pick = b.pick(&request(&[]), &[], at(160)).unwrap();
        assert_eq!((pick.address, pick.reason), (address(1), Reason::Only));
        b.settle(pick.charge);
    }
    let last = b.pick(&request(&[]), &[other], at(161)).unwrap();
    assert_eq!(last.reason, Reason::LastResort);
    pulse.beat(at(161));
    assert!(!stalled(&mut b, at(162)), "one stream goes on, so the engine lives");
    b.settle(last.charge);
    assert!(stalled(&mut b, at(221)));
    b.settle(old.charge);
    assert!(!stalled(&mut b, at(500)), "nothing is owed");
}

fn every_policy(backends: u8) -> impl Iterator<Item = (&'static str, Balancer)> {
    PolicyConfig::NAMES.iter().map(move |name| {
        let mut balancer = Balancer::new(SETTINGS, PolicyConfig::by_name(name).unwrap().build(), 1);
        balancer.set_members((0..backends).map(|n| (address(n), 1)), Time::ZERO);
        (*name, balancer)
    })
}

#[test]
fn no_policy_picks_who_was_tried_or_is_ejected_while_another_is_left() {
    let now = Time::ZERO + Duration::from_secs(1);
    for (name, mut b) in every_policy(4) {
        let (ejected, tried) = (slot(&b, 1), slot(&b, 2));
        assert!((0..3).any(|_| b.fail(ejected, Failure::Connect, false, now).is_some()));
        for n in 0..200 {
            let blocks = [n, n + 1_000];
            let pick = b.pick(&request(&blocks), &[tried], now).unwrap();
            assert!(![ejected, tried].contains(&pick.charge.slot()), "{name}");
            b.settle(pick.charge);
        }
        let all: Vec<Slot> = (0..4).map(|n| slot(&b, n)).collect();
        assert_eq!(b.pick(&request(&[]), &all, now).unwrap_err(), NoPick::Exhausted, "{name}");
    }
    for (name, mut b) in every_policy(0) {
        assert_eq!(b.pick(&request(&[]), &[], now).unwrap_err(), NoPick::Exhausted, "{name}");
    }
}

#[test]
fn every_policy_treats_equals_alike() {
    for (name, mut b) in every_policy(4) {
        let mut got = [0; 4];
        for n in 0..4_000u64 {
            let blocks = [n.wrapping_mul(0x9E37_79B9_7F4A_7C15)];
            let pick = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
            got[pick.charge.slot().0 as usize] += 1;
            b.settle(pick.charge);
        }
        assert!(got.iter().all(|n| (700..1_300).contains(n)), "{name}: {got:?}");
    }
}

#[test]
fn only_the_ratio_of_the_weights_matters() {
    for name in PolicyConfig::NAMES {
        let picks = |scale: u32| -> Vec<SocketAddr> {
            let mut b = Balancer::new(SETTINGS, PolicyConfig::by_name(name).unwrap().build(), 1);
            let weights = [1, 2, 1, 3].map(|weight| weight * scale);
            b.set_members((0..4).zip(weights).map(|(n, weight)| (address(n), weight)), Time::ZERO);
            let blocks: Vec<u64> = (0..40).collect();
            (0..400)
                .map(|n| {
                    let request = Request { prompt_tokens: 5_000, ..request(&blocks[n % 5..10 + n % 30]) };
                    b.pick(&request, &[], Time::ZERO).unwrap().address
                })
                .collect()
        };
        // The ring of prefix_hash has as many points as the weights say, so its keys move a little.
        if *name != "prefix_hash" {
            assert_eq!(picks(1), picks(16), "{name}");
        }
    }
}

#[test]
fn those_who_had_rather_be_left_alone_go_before_those_who_are_down() {
    let now = Time::ZERO + Duration::from_secs(100);
    let mut b = balancer(2, SETTINGS);
    b.observe_health(&address(0), false, now);
    let busy = slot(&b, 1);
    b.cool(busy, Failure::Status(429), Duration::from_secs(5), now);
    assert!(b.any_available(now), "it lives");
    for _ in 0..10 {
        let pick = b.pick(&request(&[]), &[], now).unwrap();
        assert_eq!((pick.address, pick.reason), (address(1), Reason::LastResort));
        b.settle(pick.charge);
    }
    let down = b.pick(&request(&[]), &[busy], now).unwrap();
    assert_eq!(down.address, address(0));
    b.settle(down.charge);
}

#[test]
fn a_backend_that_is_heavy_on_purpose_is_no_crowd() {
    let now = Time::ZERO + Duration::from_secs(1);
    let mut b = balancer(0, SETTINGS);
    b.set_members([(address(0), 20), (address(1), 1), (address(2), 1)], now);
    let reasons: Vec<Reason> = (0..200).map(|_| b.pick(&request(&[]), &[], now).unwrap().reason).collect();
    assert!(!reasons.contains(&Reason::Spread), "{reasons:?}");
}

#[test]
fn numbers_that_no_engine_has_wrap_nothing() {
    let mut b = balancer(2, SETTINGS);
    let absurd = Reading {
        running: Some(u64::MAX),
        waiting: Some(u64::MAX),
        kv_capacity_tokens: Some(u64::MAX),
        ..Reading::default()
    };
    observe(&mut b, absurd);
    observe(&mut b, absurd);
    assert_eq!(spread(&mut b, 10, &[1, 2, 3], Time::ZERO), [0, 10]);
}

#[test]
fn a_backend_that_left_comes_back_without_its_cache() {
    let mut b = balancer(1, SETTINGS);
    let blocks: Vec<u64> = (1..=7).collect();
    let first = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    b.settle(first.charge);
    b.set_members([(address(1), 1)], Time::ZERO);
    b.set_members([(address(0), 1)], Time::ZERO);
    let second = b.pick(&request(&blocks), &[], Time::ZERO).unwrap();
    assert_eq!((second.address, second.matched_tokens), (address(0), 0));
    b.settle(second.charge);
}
