//! A request of the trace as the bytes a client sends: prompts that share blocks in the trace share text.
//!
//! The trace says of each block of 512 tokens which prefix it completes, as a chained hash. The text of a
//! block is letters drawn from that hash, so equal prefixes are equal bytes and nothing else is; what follows
//! the last whole block is drawn from the number of the request and belongs to nobody else. Engine and
//! balancer are told nothing of blocks: both have to find them in the text again.

use plimsoll::sim::trace::Trace;

use super::process::MODEL;

/// What the simulated engine takes for a token.
const TOKEN_BYTES: usize = 4;
/// What the engine lays around the one message of a chat, `<user>\n` and `\n`, in bytes.
const FRAME: usize = 8;

/// The answer is streamed, is as long as `max_tokens` says, and ends with the engine's count.
const OPTIONS: &str = r#""ignore_eos":true,"stream":true,"stream_options":{"include_usage":true}"#;

/// The body of request `number`: a chat of one message, an answer of exactly the recorded length, streamed.
pub fn body(trace: &Trace, number: usize) -> String {
    let request = &trace.requests[number];
    let length = (request.prompt_tokens as usize * TOKEN_BYTES).saturating_sub(FRAME);
    let block = trace.block_tokens as usize * TOKEN_BYTES;
    let mut text = String::with_capacity(length + block);
    for hash in &request.blocks {
        write(&mut text, *hash, block);
    }
    // Drawn from the complement, so that no number is taken for a hash.
    let rest = length.saturating_sub(text.len());
    write(&mut text, !(number as u64), rest);
    text.truncate(length);
    let message = format!(r#"{{"role":"user","content":"{text}"}}"#);
    let most = request.output_tokens;
    format!(r#"{{"model":"{MODEL}","messages":[{message}],"max_tokens":{most},{OPTIONS}}}"#)
}

/// Appends `length` letters that are a function of `seed`.
fn write(text: &mut String, seed: u64, length: usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let end = text.len() + length;
    while text.len() < end {
        let left = end - text.len();
        let bits = rng.u64(..).to_le_bytes();
        text.extend(bits.iter().take(left).map(|byte| char::from(b'a' + byte % 16)));
    }
}
