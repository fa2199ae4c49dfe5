//! The model engine against arithmetic done by hand.

use super::*;

/// Room for 64 tokens in blocks of 4, steps of 10 ms whatever the batch.
const SMALL: Hardware = Hardware {
    name: "small",
    base_ms: 10.0,
    token_ms: 0.0,
    attention_ms: 0.0,
    sequence_ms: 0.0,
    context_ms: 0.0,
    kv_tokens: 64,
    batch_tokens: 32,
    max_sequences: 8,
    block_tokens: 4,
};

fn job(id: u64, prompt_tokens: u64, blocks: impl IntoIterator<Item = u64>, output_tokens: u64) -> Job {
    Job { id, prompt_tokens, blocks: blocks.into_iter().collect(), output_tokens }
}

fn millis(ms: u64) -> Time {
    Time::from_nanos(ms * 1_000_000)
}

/// Runs until nothing is left, returning what came out as (id, milliseconds, kind).
fn drain(replica: &mut Replica) -> Vec<(u64, u64, Kind)> {
    let mut out = Vec::new();
    while let Some(end) = replica.next_step() {
        replica.advance(end, &mut out);
    }
    out.iter().map(|it| (it.id, it.at.as_nanos() / 1_000_000, it.kind)).collect()
}

fn first_token(prompt_tokens: u64) -> f64 {
    let mut replica = Replica::new(Hardware::default());
    replica.submit(Time::ZERO, job(1, prompt_tokens, [], 1)).unwrap();
    let mut out = Vec::new();
    replica.advance(Time::from_nanos(u64::MAX), &mut out);
    assert_eq!(out[0].kind, Kind::First { cached_tokens: 0 });
    out[0].at.as_nanos() as f64 / 1e6
}

#[test]
fn a_job_alone_takes_the_time_the_formula_says() {
    let mut replica = Replica::new(Hardware::default());
    replica.submit(Time::ZERO, job(7, 100, [], 3)).unwrap();
    let mut out = Vec::new();
    replica.advance(Time::from_nanos(u64::MAX), &mut out);
    // 6.4 + 1.71 + 0.0049 ms; then twice 6.4 + 0.01 + 4.22e-5 times 101 and 102 tokens of context.
    let moments: Vec<_> = out.iter().map(|it| it.at.as_nanos()).collect();
    assert_eq!(moments, [8_114_900, 14_529_162, 20_943_466, 20_943_466]);
    assert_eq!(out[3].kind, Kind::Finished);
    assert_eq!(replica.next_step(), None);
}

#[test]
fn prefill_times_lie_within_twelve_percent_of_the_published_anchors() {
    for (prompt_tokens, anchor_ms) in [(1024, 22.0), (8192, 200.0), (65_536, 3056.0)] {
        let ratio = first_token(prompt_tokens) / anchor_ms;
        assert!((0.88..1.12).contains(&ratio), "{prompt_tokens} tokens: {ratio:.3} of the anchor");
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_and_others_decode_beside_it() {
    let mut replica = Replica::new(SMALL);
    replica.submit(millis(0), job(1, 4, [], 5)).unwrap();
    replica.submit(millis(0), job(2, 40, [], 1)).unwrap();
    let out = drain(&mut replica);
    let of = |id| out.iter().filter(|it| it.0 == id).map(|it| it.1).collect::<Vec<_>>();
    assert_eq!(of(1), [10, 20, 30, 40, 50, 50]);
    // 31 of its 40 tokens fit beside the decoding sequence, the other 9 in the next step.
    assert_eq!(of(2), [30, 30]);
}

#[test]
fn a_known_prefix_is_skipped_in_whole_blocks_and_never_the_whole_prompt() {
    let mut replica = Replica::new(SMALL);
    let mut cached = |id, prompt_tokens, blocks: &[u64]| {
        replica.submit(millis(0), job(id, prompt_tokens, blocks.to_vec(), 1)).unwrap();
        match drain(&mut replica)[0].2 {
            Kind::First { cached_tokens } => cached_tokens,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(cached(1, 10, &[1, 2]), 0);
    assert_eq!(cached(2, 10, &[1, 2]), 8);
    assert_eq!(cached(3, 8, &[1, 2]), 4, "the last token has to be computed");
    assert_eq!(cached(4, 16, &[1, 3, 2]), 4, "a block counts only behind the same prefix");
    assert_eq!(cached(5, 7, &[1, 2]), 4, "half a block is none");
    let stats = replica.stats();
    assert_eq!((stats.queried_tokens, stats.hit_tokens), (51, 20));
}

#[test]
fn the_least_recently_used_prefix_makes_room() {
    let mut replica = Replica::new(SMALL);
    for (id, base) in [(1, 100), (2, 200), (3, 300)] {
        replica.submit(millis(0), job(id, 24, base..base + 6, 1)).unwrap();
        drain(&mut replica);
    }
    // 72 tokens in 64: the last two blocks of the first prompt went.
    replica.submit(millis(0), job(4, 24, 100..106, 1)).unwrap();
    assert_eq!(drain(&mut replica)[0].2, Kind::First { cached_tokens: 16 });
    replica.clear_cache();
    replica.submit(millis(0), job(5, 24, 100..106, 1)).unwrap();
    assert_eq!(drain(&mut replica)[0].2, Kind::First { cached_tokens: 0 });
}

#[test]
fn when_memory_runs_out_the_newest_starts_again_and_loses_nothing() {
    let mut replica = Replica::new(SMALL);
    replica.submit(millis(0), job(1, 28, [], 20)).unwrap();
    replica.submit(millis(0), job(2, 28, [], 20)).unwrap();
    let out = drain(&mut replica);
    let of = |id| out.iter().filter(|it| it.0 == id).map(|it| it.1).collect::<Vec<_>>();
    // 28 + 28 tokens leave 8: the fourth decode of job 2 does not fit beside the fifth of job 1.
    assert_eq!(replica.stats().preemptions, 1);
    assert_eq!(of(1), (1..=20).map(|step| step * 10).chain([200]).collect::<Vec<_>>());
    assert_eq!(of(2).len(), 21);
    assert!(of(2)[3] == 50 && of(2)[4] == 210, "{:?}", of(2));
    let firsts = out.iter().filter(|it| matches!(it.2, Kind::First { .. })).count();
    assert_eq!(firsts, 2, "a recomputed job has one first token");
    assert_eq!(replica.stats().kv_usage, 0.0);
}

#[test]
fn a_job_that_does_not_fit_waits_and_those_behind_it_too() {
    let mut replica = Replica::new(SMALL);
    replica.submit(millis(0), job(1, 30, [], 3)).unwrap();
    replica.submit(millis(0), job(2, 40, [], 1)).unwrap();
    replica.submit(millis(0), job(3, 4, [], 1)).unwrap();
    replica.advance(millis(10), &mut Vec::new());
    assert_eq!((replica.stats().running, replica.stats().waiting), (1, 2));
    assert!(replica.cancel(2));
    let order: Vec<_> = drain(&mut replica).into_iter().filter(|it| it.2 == Kind::Finished).collect();
    assert_eq!(order, [(1, 30, Kind::Finished), (3, 30, Kind::Finished)]);
}

#[test]
fn a_cancelled_job_frees_its_memory_and_says_no_more() {
    let mut replica = Replica::new(SMALL);
    replica.submit(millis(0), job(1, 40, 1..11, 9)).unwrap();
    replica.submit(millis(0), job(2, 40, 21..31, 1)).unwrap();
    replica.advance(millis(20), &mut Vec::new());
    assert_eq!(replica.stats().waiting, 1);
    assert!(replica.cancel(1));
    assert!(!replica.cancel(1));
    assert_eq!(replica.stats().kv_usage, 0.0);
    let out = drain(&mut replica);
    assert_eq!(out, [(2, 50, Kind::First { cached_tokens: 0 }), (2, 50, Kind::Finished)]);
}

#[test]
fn what_can_never_fit_and_what_is_already_there_is_refused() {
    let mut replica = Replica::new(SMALL);
    assert_eq!(replica.submit(millis(0), job(1, 60, [], 5)), Err(Refusal::TooLong));
    assert_eq!(replica.submit(millis(0), job(1, u64::MAX, [], 5)), Err(Refusal::TooLong));
    assert_eq!(replica.submit(millis(0), job(1, 60, [], 4)), Ok(()));
    assert_eq!(replica.submit(millis(0), job(1, 1, [], 1)), Err(Refusal::Duplicate));
}

#[test]
fn no_token_is_lost_or_invented_by_any_schedule() {
    let mut preemptions = 0;
    for seed in 0..200 {
        println!("seed {seed}");
        preemptions += random_schedule(&mut fastrand::Rng::with_seed(seed));
    }
    assert!(preemptions > 0, "the schedules are too easy");
}

/// Submits and cancels at random, checks the books, and says how many preemptions there were.
fn random_schedule(rng: &mut fastrand::Rng) -> u64 {
    let mut replica = Replica::new(Hardware { max_sequences: rng.usize(1..8), ..SMALL });
    let mut expected = HashMap::new();
    let mut out = Vec::new();
    let mut now = Time::ZERO;
    for id in 0..60 {
        now = now + std::time::Duration::from_millis(rng.u64(0..40));
        replica.advance(now, &mut out);
        let prompt_tokens = rng.u64(1..40);
        let chain = rng.u64(0..4) * 100;
        let output_tokens = rng.u64(1..24);
        replica.submit(now, job(id, prompt_tokens, chain..chain + 20, output_tokens)).unwrap();
        expected.insert(id, output_tokens);
        if rng.u8(0..4) == 0 {
            let victim = rng.u64(0..=id);
            if replica.cancel(victim) {
                let emitted = out.iter().filter(|it| it.id == victim && it.kind != Kind::Finished).count();
                expected.insert(victim, emitted as u64);
            }
        }
        let stats = replica.stats();
        assert!(stats.kv_usage <= 1.0 && stats.running <= 8, "{stats:?}");
    }
    replica.advance(Time::from_nanos(u64::MAX), &mut out);
    assert_eq!(replica.next_step(), None);
    let stats = replica.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_usage), (0, 0, 0.0));
    assert_eq!(stats.generated_tokens, expected.values().sum::<u64>());
    assert!(out.is_sorted_by_key(|it| it.at));
    for (id, tokens) in expected {
        let emitted = out.iter().filter(|it| it.id == id && it.kind != Kind::Finished).count();
        assert_eq!(emitted as u64, tokens, "job {id}");
    }
    stats.preemptions
}
