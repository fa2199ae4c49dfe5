//! Plimsoll: a programmable load balancer for LLM inference servers, on Pingora.
//!
//! A request is **routed, priced, ranked, charged, streamed and settled**:
//!
//! ```text
//!  client ──> listener ──> route ──> price ──> rank ──> charge ──> stream ──> settle
//!                          proxy/    prompt/   policy/  balance/   proxy/     balance/
//!                          route.rs            via balance/mod.rs  tap.rs     ledger.rs
//! ```
//!
//! The body is read and digested once, a backend is chosen by what each GPU still owes and by what it has
//! already cached, its tokens are charged to that backend until the first byte arrives, the stream passes
//! through untouched, and the charge is settled exactly once, whatever happens. Follow one request in
//! [`proxy`], from top to bottom.
//!
//! The rooms, each of which imports only those before it. Up to [`sim`] they are pure: no I/O, no clock, no
//! global randomness, so that the simulator and the proxy run the same decisions.

pub mod clock;

pub mod engine;
pub mod prompt;

pub mod policy;

pub mod balance;

pub mod sim;

pub mod config;

mod fetch;

pub mod observe;

pub mod upstream;

pub mod proxy;

pub mod ingress;

pub mod admin;
pub mod server;

pub mod demo;

pub mod control;
pub mod simulate;

pub mod top;

pub mod cli;
