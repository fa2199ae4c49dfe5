//! Plain Ketama on the first 256 characters of the prompt: what a hash balancer does without knowing better.
//!
//! ```text
//! the place of hash(first 256 characters) on a ring of 160 points per replica
//! ```
//!
//! Pingora's own ring. The first 256 characters lie within the first block of the trace, so its id stands
//! for them; a prompt shorter than a block, or of a trace without blocks, has nobody's beginning but its own.

use std::net::{Ipv4Addr, SocketAddr};

use pingora_ketama::{Bucket, Continuum};
use plimsoll::clock::Time;
use plimsoll::sim::fleet::{Arrival, Dispatcher};
use plimsoll::sim::replica::Replica;

use super::Site;

/// The rule.
pub struct Ketama {
    ring: Continuum,
    addresses: Vec<SocketAddr>,
}

impl Ketama {
    /// A ring with a place for every replica.
    pub fn new(site: &Site) -> Self {
        let address = |index: usize| SocketAddr::from((Ipv4Addr::LOCALHOST, 8_000 + index as u16));
        let addresses: Vec<_> = (0..site.replicas).map(address).collect();
        let buckets: Vec<_> = addresses.iter().map(|address| Bucket::new(*address, 1)).collect();
        Self { ring: Continuum::new(&buckets), addresses }
    }
}

impl Dispatcher for Ketama {
    fn dispatch(&mut self, arrival: &Arrival<'_>, _replicas: &[Replica]) -> Option<usize> {
        let key = arrival.request.blocks.first().copied().unwrap_or(arrival.id as u64);
        let home = self.ring.node(&key.to_be_bytes())?;
        self.addresses.iter().position(|address| *address == home)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll::sim::trace::Request;
    use std::time::Duration;

    #[test]
    fn one_beginning_has_one_home_and_many_beginnings_have_all() {
        let mut rule = Ketama::new(&Site { replicas: 4, kv_tokens: 1, block_tokens: 512 });
        let mut home = |id: usize, blocks: &[u64]| {
            let request =
                Request { at: Duration::ZERO, prompt_tokens: 600, output_tokens: 1, blocks: blocks.to_vec() };
            rule.dispatch(&Arrival { id, request: &request, block_tokens: 512, now: Time::ZERO }, &[])
                .unwrap()
        };
        assert_eq!(home(0, &[5, 1]), home(1, &[5, 2]));
        let mut counts = [0; 4];
        for id in 0..2_000 {
            counts[home(id, &[])] += 1;
        }
        assert!(counts.iter().all(|count| (300..700).contains(count)), "{counts:?}");
    }
}
