//! Yardsticks: the published formulas of other projects, re-implemented, to hold our policies against.
//!
//! They are no part of the product, and no measure of those projects: their gateways do more than their
//! default formula (filters, admission, events from the engines), and are run on engines we only model. Say
//! "policy of X, re-implemented from its published formula", never "X". Each file names the commit and the
//! file that its formula was read in, and what was left out.
//!
//! What they all know of prefixes are the trace's block ids, remembered when a request is sent
//! ([`prefixes`]); sizes that the originals count in blocks of their own are scaled to the trace's.

pub mod aibrix;
pub mod dynamo;
pub mod flights;
pub mod gie;
pub mod ketama;
pub mod prefixes;
pub mod smg;
pub mod token_load;

use plimsoll::sim::fleet::Dispatcher;

/// What is known of the replicas before the first request.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// How many there are, at least 1.
    pub replicas: usize,
    /// Tokens in the KV cache of each.
    pub kv_tokens: u64,
    /// Tokens per block of the trace, at least 1.
    pub block_tokens: u64,
}

/// A rule somebody else chooses backends by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rival {
    /// See [`gie`].
    Gie,
    /// See [`token_load`].
    TokenLoad,
    /// See [`smg`].
    Smg,
    /// See [`aibrix`].
    Aibrix,
    /// See [`dynamo`].
    Dynamo,
    /// See [`ketama`].
    Ketama,
}

impl Rival {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Gie, Self::TokenLoad, Self::Smg, Self::Aibrix, Self::Dynamo, Self::Ketama];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gie => "gie",
            Self::TokenLoad => "llm-d-token-load",
            Self::Smg => "smg-cache-aware",
            Self::Aibrix => "aibrix-prefix-cache",
            Self::Dynamo => "dynamo-kv",
            Self::Ketama => "ketama-256",
        }
    }

    /// What a table calls it.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Gie => "policy of GIE / llm-d (default profile), re-implemented",
            Self::TokenLoad => "policy of llm-d 0.10 (token-load), re-implemented",
            Self::Smg => "policy of SMG (cache_aware), re-implemented",
            Self::Aibrix => "policy of AIBrix (prefix-cache), re-implemented",
            Self::Dynamo => "policy of Dynamo (KV router), re-implemented",
            Self::Ketama => "plain Ketama on the first 256 characters",
        }
    }

    /// A dispatcher by this rule; everything random is drawn from `seed`.
    pub fn build(self, site: &Site, seed: u64) -> Box<dyn Dispatcher> {
        match self {
            Self::Gie => Box::new(gie::Gie::new(site, seed)),
            Self::TokenLoad => Box::new(token_load::TokenLoad::new(site, seed)),
            Self::Smg => Box::new(smg::Smg::new(site, seed)),
            Self::Aibrix => Box::new(aibrix::Aibrix::new(site, seed)),
            Self::Dynamo => Box::new(dynamo::Dynamo::new(site, seed)),
            Self::Ketama => Box::new(ketama::Ketama::new(site)),
        }
    }
}

/// The index of the least of `costs`, at random among equals; nothing if there are none.
pub fn least(costs: impl IntoIterator<Item = f64>, rng: &mut fastrand::Rng) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    let mut ties = 0;
    for (index, cost) in costs.into_iter().enumerate() {
        match best {
            Some((_, least)) if cost > least => continue,
            Some((_, least)) if cost == least => ties += 1,
            _ => ties = 1,
        }
        if rng.u32(..ties) == 0 {
            best = Some((index, cost));
        }
    }
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_is_chosen_and_equals_share_alike() {
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(least([3.0, 1.0, 2.0], &mut rng), Some(1));
        assert_eq!(least([], &mut rng), None);
        let mut counts = [0; 4];
        for _ in 0..3_000 {
            counts[least([1.0, 0.5, 0.5, 0.5], &mut rng).unwrap()] += 1;
        }
        assert_eq!(counts[0], 0);
        assert!(counts[1..].iter().all(|count| (900..1_100).contains(count)), "{counts:?}");
    }

    #[test]
    fn no_rival_is_named_without_saying_whose_formula_it_is() {
        for rival in Rival::ALL {
            let title = rival.title();
            assert!(title.starts_with("plain ") || title.ends_with(", re-implemented"), "{title}");
        }
    }
}
