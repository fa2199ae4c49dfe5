//! A file of constants: how fast an engine is that the simulator has no row for.
//!
//! ```yaml
//! like: llama-8b-h100     # optional: an engine whose constants hold where none is written
//! base_ms: 6.4            # of any step
//! token_ms: 0.0171        # per prompt token computed
//! attention_ms: 9.8e-7    # per pair of a prompt token and a token it attends to
//! sequence_ms: 0.010      # per decoding sequence
//! context_ms: 4.22e-5     # per token of context of the decoding sequences
//! kv_tokens: 400000       # capacity of the KV cache
//! batch_tokens: 8192      # most tokens computed in one step, if not as usual
//! max_sequences: 1024     # most sequences running at once, if not as usual
//! ```
//!
//! The formula that they belong to is in [`crate::sim::hardware`].

use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::decode::listed;
use super::report::Flaw;
use super::strike::Reading;
use super::tree::Path;
use super::units;
use crate::sim::hardware::Hardware;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Constants {
    #[serde(deserialize_with = "row")]
    like: Option<Hardware>,
    base_ms: Option<f64>,
    token_ms: Option<f64>,
    attention_ms: Option<f64>,
    sequence_ms: Option<f64>,
    context_ms: Option<f64>,
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000_000>")]
    kv_tokens: Option<u32>,
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000_000>")]
    batch_tokens: Option<u32>,
    #[serde(deserialize_with = "units::some_between::<_, 1, 1_000_000>")]
    max_sequences: Option<u32>,
}

/// What the constants say, or what is wrong with them.
pub(super) fn complete(constants: Constants, reading: &Reading<Constants>) -> (Option<Hardware>, Vec<Flaw>) {
    let root = Path::default();
    let usual = constants.like.unwrap_or_default();
    let hardware = Hardware {
        name: "its own",
        base_ms: constants.base_ms.unwrap_or(usual.base_ms),
        token_ms: constants.token_ms.unwrap_or(usual.token_ms),
        attention_ms: constants.attention_ms.unwrap_or(usual.attention_ms),
        sequence_ms: constants.sequence_ms.unwrap_or(usual.sequence_ms),
        context_ms: constants.context_ms.unwrap_or(usual.context_ms),
        kv_tokens: constants.kv_tokens.map_or(usual.kv_tokens, u64::from),
        batch_tokens: constants.batch_tokens.map_or(usual.batch_tokens, u64::from),
        max_sequences: constants.max_sequences.map_or(usual.max_sequences, |most| most as usize),
        ..usual
    };
    let costs = [
        ("base_ms", constants.base_ms),
        ("token_ms", constants.token_ms),
        ("attention_ms", constants.attention_ms),
        ("sequence_ms", constants.sequence_ms),
        ("context_ms", constants.context_ms),
    ];
    let mut flaws = Vec::new();
    let missing: Vec<&str> = costs
        .iter()
        .map(|(key, ms)| (*key, ms.is_some()))
        .chain([("kv_tokens", constants.kv_tokens.is_some())])
        .filter(|(key, given)| !given && reading.is_intact(&root.key(key)))
        .map(|(key, _)| key)
        .collect();
    if !missing.is_empty() && constants.like.is_none() && reading.is_intact(&root.key("like")) {
        let message = format!("missing key{} {}", if missing.len() > 1 { "s" } else { "" }, listed(&missing));
        let hint = "or say which engine it is, such as `like: llama-8b-h100`".to_owned();
        flaws.push(Flaw { path: root.clone(), on_key: true, message, hint });
    }
    for (key, ms) in costs {
        // A step that takes no time at all would never let time go on.
        let least = if key == "base_ms" { SHORTEST_STEP } else { 0.0 };
        if let Some(ms) = ms.filter(|ms| !(least..=LONGEST_STEP).contains(ms)) {
            let message = format!("expected milliseconds from {least} to {LONGEST_STEP}, found {ms}");
            flaws.push(Flaw { path: root.key(key), on_key: false, message, hint: String::new() });
        }
    }
    (Some(hardware), flaws)
}

/// No engine is faster, nor does any cost come near the other, in milliseconds.
const SHORTEST_STEP: f64 = 0.001;
const LONGEST_STEP: f64 = 1_000_000.0;

/// A row of the table, by its name.
fn row<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Hardware>, D::Error> {
    let name = String::deserialize(deserializer)?;
    let row = Hardware::named(&name).ok_or_else(|| Error::unknown_variant(&name, &Hardware::NAMES))?;
    Ok(Some(row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::decode;

    fn read(text: &str) -> Result<Hardware, String> {
        decode("own.yaml", text, complete).map_err(|report| report.to_string())
    }

    #[test]
    fn what_is_not_written_is_like_the_engine_that_is_named() {
        let h200 = Hardware::named("llama-8b-h200").unwrap();
        let smaller = Hardware { name: "its own", kv_tokens: 50_000, base_ms: 7.0, ..h200 };
        assert_eq!(read("like: llama-8b-h200\nkv_tokens: 50000\nbase_ms: 7"), Ok(smaller));
    }

    #[test]
    fn a_file_that_is_like_nothing_says_what_a_step_costs_and_what_fits() {
        let whole = "base_ms: 6.4\ntoken_ms: 0.0171\nattention_ms: 9.8e-7\nsequence_ms: 0.010\n\
                     context_ms: 4.22e-5\nkv_tokens: 400000\n";
        assert_eq!(read(whole), Ok(Hardware { name: "its own", ..Hardware::default() }));
        let said = read(&whole.replace("context_ms: 4.22e-5\n", "")).unwrap_err();
        assert!(said.starts_with("error: missing key `context_ms`\n  --> own.yaml:1:1"), "{said}");
        assert!(said.contains("`like: llama-8b-h100`"), "{said}");
        assert!(read("").unwrap_err().contains("missing keys `base_ms`, `token_ms`, "));
    }

    #[test]
    fn what_is_wrong_is_said_at_its_place_and_only_once() {
        for (text, place, why) in [
            ("like: llama-8b-h10", "1:7 (like)", "did you mean `llama-8b-h100`?"),
            ("base_m: 3\nlike: llama-8b-h100", "1:1", "did you mean `base_ms`?"),
            ("base_m: 3", "1:1", "did you mean `base_ms`?"),
            ("like: llama-8b-a100\nbase_ms: 0", "2:10 (base_ms)", "from 0.001 to 1000000, found 0"),
            ("like: llama-8b-a100\ntoken_ms: -1", "2:11 (token_ms)", "from 0 to 1000000, found -1"),
            ("like: llama-8b-a100\ntoken_ms: .nan", "2:11 (token_ms)", "found NaN"),
            ("like: llama-8b-a100\nkv_tokens: 4e5", "2:12 (kv_tokens)", "a whole number from 1 to"),
            ("like: llama-8b-a100\nmax_sequences: 0", "2:16 (max_sequences)", "a whole number from 1 to"),
        ] {
            let said = read(text).unwrap_err();
            let known = said.contains(&format!("--> own.yaml:{place}")) && said.contains(why);
            assert!(known, "{text}: {said}");
        }
    }
}
