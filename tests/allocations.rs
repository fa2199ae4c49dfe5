//! A body is never copied: what its digest allocates does not grow with it, but for the hashes of its blocks.
//!
//! The types say it too: the digest holds slices of the body and gives out numbers. But a buffer would not show in a
//! type, so the allocator of this one test counts.

use plimsoll::prompt::{BLOCK_BYTES, Endpoint, MAX_BLOCKS, digest};

/// Bytes for the model's name and the growth of small things.
const ALLOWANCE: u64 = 256;

/// A chat body around `text`, which stands in it as it is.
fn body(text: &str) -> Vec<u8> {
    let turns = format!(r#"{{"role":"system","content":"be brief"}},{{"role":"user","content":"{text}"}}"#);
    let body = format!(r#"{{"messages":[{turns}],"model":"llama-8b","stream":true,"max_tokens":16}}"#);
    body.into_bytes()
}

#[test]
fn a_digest_allocates_its_blocks_and_nothing_that_grows_with_the_body() {
    for piece in ["plain text ", "a line\\n", "\\\"", "\\u4e2d\\u6587", "\\\\", "中文"] {
        for size in [1 << 10, 1 << 15, 1 << 18, 1 << 22] {
            let body = body(&piece.repeat(size / piece.len()));
            let mut blocks = 0;
            let counted = allocation_counter::measure(|| {
                blocks = digest(Endpoint::ChatCompletions, &body).blocks.len();
            });
            assert!(
                blocks >= (size / 6 / BLOCK_BYTES).min(MAX_BLOCKS) / 2,
                "{size} bytes of {piece} were read"
            );
            // A vector that doubles holds at most twice what it needs, while the half of it is still there.
            let most = 3 * 8 * blocks as u64 + ALLOWANCE;
            assert!(counted.bytes_max <= most, "{counted:?} for {size} bytes of {piece}");
        }
    }
}

#[test]
fn a_picture_is_hashed_where_it_stands() {
    let parts = format!(r#"[{{"type":"image_url","image_url":{{"url":"{}"}}}}]"#, "QUJD".repeat(1 << 20));
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":{parts}}}]}}"#).into_bytes();
    let counted = allocation_counter::measure(|| drop(digest(Endpoint::ChatCompletions, &body)));
    assert!(counted.bytes_total <= ALLOWANCE, "{counted:?}");
}
