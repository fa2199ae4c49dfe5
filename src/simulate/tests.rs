//! The command from its words to its output, on a small trace of our own.

use std::time::Duration;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    options: SimulateOptions,
}

fn options(words: &str) -> Result<SimulateOptions, String> {
    let words = std::iter::once("simulate").chain(words.split_whitespace());
    Words::try_parse_from(words).map(|words| words.options).map_err(|error| error.to_string())
}

fn output(words: &str) -> String {
    simulate(&options(words).unwrap()).unwrap()
}

/// Two prompts that share all but their end, and a long one between them.
const TINY: &str = "{\"trace\":\"tiny\",\"block_tokens\":512}\n\
                    {\"t\":0,\"in\":1100,\"out\":3,\"h\":[1,2]}\n\
                    {\"t\":10,\"in\":30000,\"out\":2}\n\
                    {\"t\":2000,\"in\":1100,\"out\":3,\"h\":[1,2]}\n";

/// A file that is gone when it is dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    fn words(&self, more: &str) -> String {
        format!("--trace {} {more}", self.0.display())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn the_table_has_a_line_per_policy_and_seed_and_is_the_same_every_time() {
    let file = Temporary::new("table.jsonl", TINY.as_bytes());
    let words = file.words("--replicas 2 --policy round_robin,lmetric --seeds 2 --slow 2=0.5");
    let text = output(&words);
    assert!(text.starts_with(
        "tiny: 3 requests in 2 s on 2 x llama-8b-h100, slow: 2=0.5; speed-up 1\n\
         SLO: first token within 2s, then 50ms per token\n"
    ));
    let starts: Vec<String> = text
        .lines()
        .skip(5)
        .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(starts, ["round_robin 1", "round_robin 2", "lmetric 1", "lmetric 2"]);
    assert_eq!(text, output(&words));
}

#[test]
fn the_json_holds_the_figures_that_the_arithmetic_gives() {
    let file = Temporary::new("figures.json", TINY.as_bytes());
    let words = file.words("--replicas 2 --policy least_pending_tokens --json");
    let json: serde_json::Value = serde_json::from_str(&output(&words)).unwrap();
    let run = &json["runs"][0];
    assert_eq!((&run["policy"], &run["requests"]), (&json!("least_pending_tokens"), &json!(3)));
    // The third prompt finds two blocks of 512 cached.
    let hits = 1024.0 / (1100.0 + 30_000.0 + 1100.0);
    assert!((run["hit_ratio"].as_f64().unwrap() - hits).abs() < 1e-9, "{run}");
    // 6.4 + 0.0171 * 76 + 9.8e-7 * (76 * 1024 + 76^2 / 2) ms, the least of the three.
    let least = run["ttft_ms"]["p50"].as_f64().unwrap();
    let first = 6.4 + 0.0171 * 1100.0 + 9.8e-7 * 1100.0 * 1100.0 / 2.0;
    assert!((least - first).abs() < 1e-3, "the median is the first request's: {least}, {first}");
    assert_eq!(run["good_share"], json!(1.0));
}

#[test]
fn the_capacity_is_lower_for_a_stricter_promise() {
    let lines: String = (0..60).map(|n| format!("{{\"t\":{},\"in\":4000,\"out\":5}}\n", n * 100)).collect();
    let file = Temporary::new("capacity.jsonl", format!("{{\"block_tokens\":16}}\n{lines}").as_bytes());
    let capacity = |slo: &str| {
        let words = file.words(&format!("--replicas 2 --policy round_robin --capacity --json --slo {slo}"));
        let json: serde_json::Value = serde_json::from_str(&output(&words)).unwrap();
        json["capacities"][0]["speedup"].as_f64()
    };
    let (strict, lenient) = (capacity("ttft=150ms,tpot=1s"), capacity("ttft=2s,tpot=1s"));
    assert!(strict > Some(0.5) && lenient > strict, "{strict:?} {lenient:?}");
    assert_eq!(capacity("ttft=1ms,tpot=1s"), None, "a prefill takes longer");
    let table = output(&file.words("--replicas 2 --policy round_robin --capacity"));
    assert!(table.contains("the largest speed-up at which 90 % of the requests keep it"), "{table}");
}

#[test]
fn a_trace_compressed_in_several_frames_is_read() {
    let frame = |text: &str| {
        ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
    };
    let (head, tail) = TINY.split_at(60);
    let bytes = [frame(head), frame(tail)].concat();
    let file = Temporary::new("frames.zst", &bytes);
    assert_eq!(file::read(&file.0), Ok(Trace::parse(TINY.as_bytes()).unwrap()));
    let cut = Temporary::new("cut.zst", &bytes[..bytes.len() - 9]);
    let said = file::read(&cut.0).unwrap_err();
    assert!(said.contains("cut.zst: broken zstd: "), "{said}");
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let missing = simulate(&options("--trace /no/such/file").unwrap()).unwrap_err();
    assert!(missing.starts_with("/no/such/file: No such file"), "{missing}");
    let broken = format!("{TINY}{{\"t\":1,\"in\":2}}\n");
    let file = Temporary::new("broken.jsonl", broken.as_bytes());
    let said = simulate(&options(&file.words("")).unwrap()).unwrap_err();
    assert_eq!(said, format!("{}:5: missing field `out`", file.0.display()));
    let said = simulate(&options("--trace x --replicas 2 --slow 3=0.5").unwrap()).unwrap_err();
    assert_eq!(said, "--slow 3=0.5: the engines are numbered 1 to 2");
}

#[test]
fn words_that_make_no_sense_are_refused_with_those_that_would() {
    for (words, why) in [
        ("", "--trace <FILE>"),
        ("--trace x --replicas 0", "1..=1024"),
        ("--trace x --engine abacus", "known are llama-8b-h100"),
        ("--trace x --policy round_robin,fastest", "known are least_pending_tokens"),
        ("--trace x --speedup 0", "from 0.01 to 1000"),
        ("--trace x --slo ttft=2s", "both ttft and tpot"),
        ("--trace x --slo ttft=2,tpot=1s", "`2` is not a duration"),
        ("--trace x --slo fast", "not of the form key=value"),
        ("--trace x --slo ttft=2s,tpot=1s,share=0", "from 0.01 to 1"),
        ("--trace x --slo ttft=2s,tpot=1s,p99=1s", "none of ttft, tpot, share"),
        ("--trace x --slow 3", "such as 3=0.5"),
        ("--trace x --capacity --speedup 2", "cannot be used with"),
    ] {
        let said = options(words).unwrap_err();
        assert!(said.contains(why), "{words}: {said}");
    }
    let read = options("--trace x --slo ttft=250ms,tpot=1s,share=0.95 --slow 1=0.5,4=2").unwrap();
    let slo = Slo { first_token: Duration::from_millis(250), per_token: Duration::from_secs(1), share: 0.95 };
    assert_eq!((read.slo, read.slow), (slo, vec![(1, 0.5), (4, 2.0)]));
}
