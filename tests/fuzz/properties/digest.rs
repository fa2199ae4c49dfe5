//! The digest of a request body: what serde_json reads of it, the same blocks for the same prompt, and a price that the
//! bytes can have.

use std::collections::BTreeMap;

use plimsoll::prompt::{BLOCK_BYTES, BytesPerToken, Digest, Endpoint, MAX_BLOCKS, digest};
use serde_json::value::RawValue;

const ENDPOINTS: [Endpoint; 6] = [
    Endpoint::ChatCompletions,
    Endpoint::Completions,
    Endpoint::Embeddings,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::Other,
];

/// The price of anything that is no text, the dearest that few bytes can be.
const MEDIA_BYTES: u64 = 4_096;

/// The members of a body, as they stand in it; of those that occur twice, the last.
type Members<'a> = BTreeMap<String, &'a RawValue>;

/// Holds of any body.
pub fn holds(body: &[u8]) {
    let members = serde_json::from_slice::<Members<'_>>(body).ok();
    for endpoint in ENDPOINTS {
        let read = digest(endpoint, body);
        assert_eq!(digest(endpoint, body), read, "the same bytes, another digest");
        is_priced(&read, body.len() as u64);
        if let Some(members) = &members {
            agrees(&read, members);
            is_the_same_in_another_order(endpoint, &read, body, members);
            keeps_its_beginning(endpoint, &read, members);
            is_opaque_if_cut(endpoint, body);
        }
    }
}

fn is_priced(read: &Digest, length: u64) {
    assert!(read.prompt_bytes <= MEDIA_BYTES * length, "{} of {length}", read.prompt_bytes);
    assert!(read.choices >= 1);
    // A mark for each piece and a hash for each picture come on top of the text.
    let fed = 8 * length + BLOCK_BYTES as u64;
    assert!(read.blocks.len() <= MAX_BLOCKS && (read.blocks.len() * BLOCK_BYTES) as u64 <= fed);
    let tokens = BytesPerToken::new().tokens(read.prompt_bytes);
    assert!((1..=read.prompt_bytes.max(1)).contains(&tokens), "{tokens} tokens");
}

/// What serde_json says of the members that are numbers and names.
fn agrees(read: &Digest, members: &Members<'_>) {
    let raw = |name: &str| members.get(name).map(|value| value.get());
    let text = |name: &str| raw(name).filter(|raw| raw.starts_with('"')).map(serde_json::from_str::<String>);
    match text("model") {
        None => assert_eq!(read.model, None),
        Some(Ok(model)) => assert_eq!(read.model, Some(model)),
        // Half of a surrogate pair: serde_json refuses it, an engine may not.
        Some(Err(_)) => assert!(read.model.as_ref().is_some_and(|model| model.contains('\u{fffd}'))),
    }
    match text("prompt_cache_key") {
        None => assert_eq!(read.session, None),
        Some(Ok(key)) => assert_eq!(read.session.is_some(), !key.is_empty()),
        Some(Err(_)) => assert!(read.session.is_some()),
    }
    assert_eq!(read.stream, raw("stream") == Some("true"));
    let whole = |name: &str| raw(name).and_then(whole);
    let limits = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
    assert_eq!(read.max_tokens, limits.into_iter().find_map(whole));
    let choices = whole("n").max(whole("best_of")).unwrap_or(1).max(1);
    assert_eq!(u64::from(read.choices), choices.min(u64::from(u32::MAX)));
}

/// The number, if it is whole, not negative and no larger than 64 bits hold.
fn whole(raw: &str) -> Option<u64> {
    if !raw.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
        return None;
    }
    if let Ok(number) = raw.parse::<u64>() {
        return Some(number);
    }
    let number: f64 = raw.parse().ok()?;
    let fits = (0.0..18_446_744_073_709_551_616.0).contains(&number);
    (fits && number.trunc() == number).then_some(number as u64)
}

/// The order of the members, the blanks between them and who came twice do not matter.
fn is_the_same_in_another_order(endpoint: Endpoint, read: &Digest, body: &[u8], members: &Members<'_>) {
    let sorted = serde_json::to_vec(members).expect("it was read");
    let mut other = digest(endpoint, &sorted);
    if other.blocks.is_empty() && other.prompt_bytes == sorted.len() as u64 {
        // Opaque, so priced by its length.
        assert!(read.blocks.is_empty());
        assert_eq!(read.prompt_bytes, body.len() as u64);
        other.prompt_bytes = read.prompt_bytes;
    }
    assert_eq!(other, *read, "sorted: {}", String::from_utf8_lossy(&sorted));
}

/// A prompt that goes on keeps its blocks.
fn keeps_its_beginning(endpoint: Endpoint, read: &Digest, members: &Members<'_>) {
    let more = "and so on ".repeat(80);
    for name in ["messages", "prompt", "input"] {
        let Some(raw) = members.get(name).map(|value| value.get()) else { continue };
        let longer = if let Some(text) = raw.strip_suffix('"') {
            format!("{text}{more}\"")
        } else if let Some(list) = raw.strip_suffix(']').map(str::trim_end) {
            let comma = if list == "[" { "" } else { "," };
            format!("{list}{comma}{{\"role\":\"user\",\"content\":\"{more}\"}}]")
        } else {
            continue;
        };
        let longer = RawValue::from_string(longer).expect("as sound as it was");
        let mut members = members.clone();
        members.insert(name.to_owned(), &longer);
        let body = serde_json::to_vec(&members).expect("it was read");
        let after = digest(endpoint, &body);
        assert!(after.blocks.starts_with(&read.blocks), "{name} goes on, its beginning does not");
    }
}

/// Of a body that ends early nothing is certain but what was read of it.
fn is_opaque_if_cut(endpoint: Endpoint, body: &[u8]) {
    let whole = body.trim_ascii_end().len();
    for cut in [whole - 1, whole / 2] {
        let read = digest(endpoint, &body[..cut]);
        assert!(read.blocks.is_empty() && read.prompt_bytes == cut as u64, "cut at {cut}");
    }
}
