//! What must hold of any bytes: one file per fuzz target, each with one function `holds` that panics if it does not.
//!
//! The fuzzer calls it with bytes of its own, `tests/corpora.rs` with those of `tests/fuzz/corpus`, so that what the
//! fuzzer found once is tried again by every `cargo test`. A property is more than "does not panic": what is read must
//! not depend on where the network cut it, and must be what another, simpler reader reads.

pub mod config;
pub mod digest;
pub mod metrics;
pub mod preface;
pub mod request;
pub mod stream;

/// The pieces into which the network may cut `data`: whole, byte by byte, in small and larger ones of one size, and in
/// two at a place that depends on the data.
pub fn cuttings(data: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let sum = data.iter().fold(7_usize, |sum, &byte| sum.wrapping_mul(31).wrapping_add(usize::from(byte)));
    let (head, tail) = data.split_at(sum % (data.len() + 1));
    let sizes = [1, 2 + sum % 7, 64].into_iter().map(|size| data.chunks(size).collect());
    [vec![data], vec![head, tail], vec![head, &[], tail]].into_iter().chain(sizes)
}
