//! The oracle: a dispatcher that knows what nobody can, so that the distance to it is a number.
//!
//! It clones every engine with all that is in it (the lengths of the answers to come, what is really cached),
//! sends the request to each clone and lets it run until every request in it has its first token. The request
//! goes where that costs least:
//!
//! ```text
//! cost_i = TTFT of the request on i + what it adds to the TTFT of those that wait there
//! ```
//!
//! It is greedy, knows nothing of arrivals to come, and is therefore no bound: a policy may beat it by a
//! little (research/routing.md s.4). It looks at some 100 times as many engine steps as the replay itself.

use super::fleet::{Arrival, Dispatcher, job};
use super::replica::{Emission, Kind, Replica};
use crate::clock::Time;

/// The clairvoyant greedy dispatcher.
#[derive(Debug, Default)]
pub struct Oracle {
    emissions: Vec<Emission>,
}

impl Dispatcher for Oracle {
    fn dispatch(&mut self, arrival: &Arrival<'_>, replicas: &[Replica]) -> Option<usize> {
        let mut best = None;
        for (number, replica) in replicas.iter().enumerate() {
            let mut with = replica.clone();
            if with.submit(arrival.now, job(arrival)).is_err() {
                continue;
            }
            let cost = self.waits(with, arrival.now) - self.waits(replica.clone(), arrival.now);
            if best.is_none_or(|(_, least)| cost < least) {
                best = Some((number, cost));
            }
        }
        best.map(|(number, _)| number)
    }
}

impl Oracle {
    /// The sum of the times, in seconds, that the requests without a first token still have to wait for it.
    fn waits(&mut self, mut replica: Replica, now: Time) -> f64 {
        let mut unanswered = replica.unanswered();
        let mut sum = 0.0;
        while unanswered > 0
            && let Some(end) = replica.next_step()
        {
            replica.advance(end, &mut self.emissions);
            for emission in self.emissions.drain(..) {
                if matches!(emission.kind, Kind::First { .. }) {
                    sum += emission.at.since(now).as_secs_f64();
                    unanswered -= 1;
                }
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::tests::PLAIN;
    use super::super::fleet::{Scenario, replay};
    use super::super::report::Slo;
    use super::super::trace::Trace;
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_sends_a_prompt_to_its_cache_unless_a_longer_one_stands_before_it() {
        // The third finds its prefix behind what is left of the second: little, or more than computing it anew.
        let trace = |third: u64| {
            let text = format!(
                "{{\"block_tokens\":10}}\n{{\"t\":0,\"in\":200,\"out\":1,\"h\":[1,2,3,4,5,6,7,8,9,10]}}\n\
                 {{\"t\":1000,\"in\":{third},\"out\":1,\"h\":[1,2,3,4,5,6,7,8,9,10]}}\n\
                 {{\"t\":1001,\"in\":110,\"out\":1,\"h\":[1,2,3,4,5,6,7,8,9,10]}}\n"
            );
            Trace::parse(text.as_bytes()).unwrap()
        };
        let run = |trace: &Trace| {
            let hardware = PLAIN;
            let slo = Slo { first_token: Duration::MAX, per_token: Duration::MAX, share: 1.0 };
            let scenario = Scenario { trace, speedup: 1.0, hardware, speeds: &[1.0; 2], scrape: None, slo };
            replay(&scenario, &mut Oracle::default(), |_| ()).largest_share
        };
        assert_eq!(run(&trace(110)), 1.0);
        assert_eq!(run(&trace(5_000)), 2.0 / 3.0);
    }
}
