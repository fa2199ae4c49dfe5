//! The seam: our policies as a selector of pingora-load-balancing.
//!
//! Pingora's `LoadBalancer` owns which backends there are, discovers them and keeps their health; on each
//! change it builds a new selector, and that is how the [`Balancer`](crate::balance::Balancer) learns of its
//! members. A selection walks the backends in the order the selector yields them. Ours yields what the
//! balancer *picks*: a backend already charged, with the [`Charge`] attached to it ([`charge_of`]), so that
//! choosing and charging are one step; a backend that is not accepted is settled as it is dropped.
//!
//! A selector is shown nothing of a request but a key of bytes, so what a policy needs travels as a typed
//! [`Key`].

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use pingora_load_balancing::Backend;
use pingora_load_balancing::selection::{BackendIter, BackendSelection};

use super::{Charge, Shared};
use crate::policy::{Request, Slot};

/// A [`Request`] and the backends it has already tried, as bytes.
#[derive(Debug)]
pub struct Key(Vec<u8>);

/// The fixed part: prompt tokens, tokens per block, whether there is a session key, that key, how many were
/// tried.
const HEAD: usize = 8 + 8 + 1 + 8 + 4;

impl Key {
    /// The key of `request` when the backends in `tried` are to be left out.
    pub fn new(request: &Request<'_>, tried: &[Slot]) -> Self {
        let mut bytes = Vec::with_capacity(HEAD + 4 * tried.len() + 8 * request.blocks.len());
        bytes.extend(request.prompt_tokens.to_le_bytes());
        bytes.extend(request.block_tokens.to_le_bytes());
        bytes.push(u8::from(request.session.is_some()));
        bytes.extend(request.session.unwrap_or(0).to_le_bytes());
        bytes.extend((tried.len() as u32).to_le_bytes());
        bytes.extend(tried.iter().flat_map(|slot| slot.0.to_le_bytes()));
        bytes.extend(request.blocks.iter().flat_map(|block| block.to_le_bytes()));
        Self(bytes)
    }

    /// The bytes, for `LoadBalancer::select`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What a [`Key`] says.
#[derive(Debug, Default, PartialEq)]
struct Parsed {
    prompt_tokens: u64,
    block_tokens: f64,
    session: Option<u64>,
    tried: Vec<Slot>,
    blocks: Vec<u64>,
}

impl Parsed {
    /// Reads a key; of bytes that are none, as if nothing were known of the request.
    fn from_bytes(bytes: &[u8]) -> Self {
        let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else { return Self::default() };
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let tried = u32::from_le_bytes(std::array::from_fn(|i| head[25 + i])) as usize;
        let (slots, blocks) = rest.split_at(rest.len().min(tried.saturating_mul(4)));
        Self {
            prompt_tokens: word(0),
            block_tokens: f64::from_bits(word(8)),
            session: (head[16] != 0).then(|| word(17)),
            tried: slots.as_chunks().0.iter().map(|b| Slot(u32::from_le_bytes(*b))).collect(),
            blocks: blocks.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect(),
        }
    }
}

/// The charge of a backend that a [`Selector`] yielded and that was accepted; `None` when it was taken before.
pub fn charge_of(backend: &Backend) -> Option<Charge> {
    let mut charge = backend.ext.get::<Attached>().and_then(|attached| attached.0.lock().take())?;
    charge.accepted = true;
    Some(charge)
}

/// Whether a backend is a last resort: it was picked although it is not ready, because nothing else is left.
pub(super) fn is_last_resort(backend: &Backend) -> bool {
    let last_resort = |charge: &Charge| charge.reason == crate::policy::Reason::LastResort;
    backend.ext.get::<Attached>().is_some_and(|attached| attached.0.lock().as_ref().is_some_and(last_resort))
}

/// A charge in the extensions of a backend, which have to be `Clone`.
#[derive(Clone)]
struct Attached(Arc<Mutex<Option<Charge>>>);

/// The selector over one set of backends.
pub struct Selector {
    shared: Option<Arc<Shared>>,
    backends: HashMap<SocketAddr, Backend>,
}

impl BackendSelection for Selector {
    type Iter = Picks;
    type Config = Arc<Shared>;

    /// Without the shared state there is nothing to pick with: such a selector yields nothing.
    fn build(backends: &BTreeSet<Backend>) -> Self {
        Self { shared: None, backends: by_address(backends) }
    }

    fn build_with_config(backends: &BTreeSet<Backend>, shared: &Arc<Shared>) -> Self {
        // In their order, which is that of their addresses: they are shown in it.
        shared.set_members(backends.iter().filter_map(|b| Some((*b.addr.as_inet()?, b.weight as u32))));
        let backends = by_address(backends);
        Self { shared: Some(shared.clone()), backends }
    }

    fn iter(self: &Arc<Self>, key: &[u8]) -> Picks {
        Picks { selector: self.clone(), key: Parsed::from_bytes(key), current: None }
    }
}

fn by_address(backends: &BTreeSet<Backend>) -> HashMap<SocketAddr, Backend> {
    backends.iter().filter_map(|b| Some((*b.addr.as_inet()?, b.clone()))).collect()
}

/// The picks for one request, best first, each charged as it is yielded.
pub struct Picks {
    selector: Arc<Selector>,
    key: Parsed,
    current: Option<Backend>,
}

impl BackendIter for Picks {
    fn next(&mut self) -> Option<&Backend> {
        // The one before was not accepted: settle it before picking again.
        self.current = None;
        let shared = self.selector.shared.as_ref()?;
        let Parsed { prompt_tokens, block_tokens, session, .. } = self.key;
        let request = Request { prompt_tokens, blocks: &self.key.blocks, block_tokens, session };
        // A backend that has just left the set is charged in vain, and settled as it is passed over.
        let (charge, backend) = loop {
            let charge = shared.pick(&request, &self.key.tried)?;
            self.key.tried.push(charge.slot);
            if let Some(backend) = self.selector.backends.get(&charge.address) {
                break (charge, backend);
            }
        };
        let mut backend = backend.clone();
        backend.ext.insert(Attached(Arc::new(Mutex::new(Some(charge)))));
        self.current = Some(backend);
        self.current.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_carries_the_request_unchanged() {
        let blocks = [1, u64::MAX, 3];
        let request =
            Request { prompt_tokens: 12_345, blocks: &blocks, block_tokens: 127.5, session: Some(99) };
        let parsed = Parsed::from_bytes(Key::new(&request, &[Slot(3), Slot(70_000)]).as_bytes());
        let want = Parsed {
            prompt_tokens: 12_345,
            block_tokens: 127.5,
            session: Some(99),
            tried: vec![Slot(3), Slot(70_000)],
            blocks: blocks.to_vec(),
        };
        assert_eq!(parsed, want);
    }

    #[test]
    fn bytes_that_are_no_key_are_read_without_panic() {
        let mut rng = fastrand::Rng::with_seed(1);
        for length in 0..200 {
            let bytes: Vec<u8> = (0..length).map(|_| rng.u8(..)).collect();
            let parsed = Parsed::from_bytes(&bytes);
            assert!(parsed.blocks.len() * 8 + parsed.tried.len() * 4 <= bytes.len());
        }
    }
}
