//! A model of an inference engine in virtual time, with the traffic to drive it and the figures to judge it
//! by.
//!
//! A policy for GPUs can be developed, compared and regression-tested without one: what matters to a balancer
//! is when tokens come out and what the cache already holds, and both follow from a short model. Everything
//! here is pure: time and randomness are arguments, so a run is a function of its seed. The same
//! [`replica::Replica`] runs behind a real socket in the demo and in the tests; [`fleet`] replays a recorded
//! [`trace`] through several of them, dispatched by the production code in [`proxies`] or, for comparison, by
//! an [`oracle`].

mod blocks;
pub mod capacity;
pub mod fleet;
pub mod hardware;
pub mod oracle;
pub mod proxies;
pub mod replica;
pub mod report;
pub mod sessions;
pub mod trace;
pub mod workload;
