//! What reading costs: the digest of a request body, and what is learned of each event of an answer.
//!
//! The figure that counts is 1.5 GB/s on a body of 256 KiB, so that no body costs more than its way through the
//! kernel. What a text costs depends on its escapes, so there are five kinds of it: English as people write it (a
//! line end or a quote every 70 bytes or so), heavily escaped source code (every 7 bytes), Chinese in UTF-8, the same
//! Chinese as Python's `json.dumps` writes it (nothing but `\u` escapes), and a picture in base64 between two short
//! texts. That no body is copied is shown by tests/allocations.rs.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};

use plimsoll::prompt::{BytesPerToken, Endpoint, Kind, Sse, Usage, digest};

const KIB: usize = 1_024;
const SIZES: [usize; 4] = [KIB, 32 * KIB, 256 * KIB, 4 * KIB * KIB];

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(50)
        .configure_from_args();
    digests(&mut criterion);
    events(&mut criterion);
    criterion.final_summary();
}

fn digests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("digest");
    for (name, text) in
        [("english", english as Text), ("code", code), ("chinese", chinese), ("chinese_ascii", chinese_ascii)]
    {
        for size in SIZES {
            let body = conversation(size, text);
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function(BenchmarkId::new(name, size / KIB), |bencher| {
                bencher.iter(|| digest(Endpoint::ChatCompletions, black_box(&body)));
            });
        }
    }
    for size in SIZES {
        let body = picture(size);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(BenchmarkId::new("picture", size / KIB), |bencher| {
            bencher.iter(|| digest(Endpoint::ChatCompletions, black_box(&body)));
        });
    }
    group.finish();
}

fn events(criterion: &mut Criterion) {
    let event = concat!(
        r#"data: {"id":"chatcmpl-9f0c1b2e","object":"chat.completion.chunk","created":1795400000,"model":"llama-8b","#,
        r#""choices":[{"index":0,"delta":{"content":" the"},"logprobs":null,"finish_reason":null}]}"#,
        "\n\n"
    );
    let last = concat!(
        r#"data: {"id":"chatcmpl-9f0c1b2e","object":"chat.completion.chunk","created":1795400000,"model":"llama-8b","#,
        r#""choices":[],"usage":{"prompt_tokens":775,"total_tokens":777,"completion_tokens":2,"#,
        r#""prompt_tokens_details":{"cached_tokens":640}}}"#,
        "\n\ndata: [DONE]\n\n"
    );
    let mut group = criterion.benchmark_group("event");
    group.throughput(Throughput::Elements(1));
    let mut sse = Sse::new();
    group.bench_function("split and classified", |bencher| {
        bencher.iter(|| {
            let mut contents = 0;
            sse.push(black_box(event.as_bytes()), &mut |event| {
                contents += u32::from(event.kind() == Kind::Content);
            });
            contents
        });
    });
    let tail = event.repeat(20) + last;
    let tail = &tail.as_bytes()[tail.len() - 4 * KIB..];
    let mut price = BytesPerToken::new();
    group.bench_function("usage from the last 4 KiB", |bencher| {
        bencher.iter(|| {
            let usage = Usage::from_tail(black_box(tail));
            price.learn(3_100, usage.map_or(0, |usage| usage.prompt_tokens));
            price.ratio()
        });
    });
    group.finish();
}

/// Appends at least `length` bytes of text, as it stands between the quotes of a JSON string.
type Text = fn(&mut String, &mut fastrand::Rng, usize);

/// A body of `size` bytes, give or take a sentence: a system prompt and turns of 0.5 to 4 KiB, the members in the
/// order of the `openai` client, which puts the model after the messages.
fn conversation(size: usize, text: Text) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(size as u64);
    let mut body = String::from(r#"{"messages":[{"role":"system","content":""#);
    text(&mut body, &mut rng, size / 5);
    for role in ["user", "assistant"].iter().cycle() {
        body.push_str(&format!(r#""}},{{"role":"{role}","content":""#));
        let turn = rng.usize(KIB / 2..4 * KIB);
        let left = size.saturating_sub(body.len() + 100);
        text(&mut body, &mut rng, turn.min(left));
        if left <= turn {
            break;
        }
    }
    body.push_str(r#""}],"model":"llama-8b","max_tokens":512,"stream":true,"temperature":0.7}"#);
    body.into_bytes()
}

/// A body of `size` bytes, most of which is a picture.
fn picture(size: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(size as u64);
    let mut body = String::from(r#"{"messages":[{"role":"user","content":[{"type":"text","text":""#);
    english(&mut body, &mut rng, 200);
    body.push_str(r#""},{"type":"image_url","image_url":{"url":"data:image/png;base64,"#);
    while body.len() + 340 < size {
        body.push(rng.alphanumeric());
    }
    body.push_str(r#""}},{"type":"text","text":""#);
    english(&mut body, &mut rng, 100);
    body.push_str(r#""}]}],"model":"llama-8b","max_tokens":512,"stream":true}"#);
    body.into_bytes()
}

/// Appends what `piece` appends until `length` bytes have come.
fn fill(body: &mut String, length: usize, mut piece: impl FnMut(&mut String)) {
    let end = body.len() + length;
    while body.len() < end {
        piece(body);
    }
}

fn english(body: &mut String, rng: &mut fastrand::Rng, length: usize) {
    fill(body, length, |body| {
        for _ in 0..rng.usize(3..13) {
            (0..rng.usize(1..10)).for_each(|_| body.push(rng.lowercase()));
            body.push(' ');
        }
        body.push_str(rng.choice([", ", ", ", "\\n", "\\n", "\\\"", ".\\n\\n", "'s ", ": "]).unwrap_or(""));
    });
}

fn code(body: &mut String, rng: &mut fastrand::Rng, length: usize) {
    fill(body, length, |body| {
        (0..rng.usize(0..3)).for_each(|_| body.push_str("\\t"));
        (0..rng.usize(3..15)).for_each(|_| body.push(rng.lowercase()));
        body.push_str(rng.choice([" = \\\"x\\\";", "(a, b);", " {", " += 1;"]).unwrap_or(""));
        body.push_str("\\n");
    });
}

fn chinese(body: &mut String, rng: &mut fastrand::Rng, length: usize) {
    fill(body, length, |body| {
        (0..rng.usize(5..25)).for_each(|_| body.push(rng.char('\u{4e00}'..'\u{9fa5}')));
        body.push_str(rng.choice(["，", "。", "，", "。\\n", "：\\\""]).unwrap_or(""));
    });
}

fn chinese_ascii(body: &mut String, rng: &mut fastrand::Rng, length: usize) {
    fill(body, length, |body| body.push_str(&format!("\\u{:04x}", rng.u32(0x4e00..0x9fa5))));
}
