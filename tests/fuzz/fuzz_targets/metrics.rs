//! Any bytes against the property of `metrics`.
#![no_main]

#[path = "../properties/mod.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::metrics::holds(bytes));
