//! The command from its words to its output: on a small trace of our own.

use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use serde_json::json;

use super::options::Interval;
use super::*;
use crate::policy::PolicyConfig;
use crate::sim::fleet::Scrape;
use crate::sim::hardware::Hardware;
use crate::sim::report::Slo;
use crate::sim::sessions::Kind;

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
    simulate(&options(words).unwrap(), &Policies::default()).unwrap()
}

fn json(words: &str) -> serde_json::Value {
    serde_json::from_str(&output(&format!("{words} --json"))).unwrap()
}

fn refused(words: &str) -> String {
    simulate(&options(words).unwrap(), &Policies::default()).unwrap_err().to_string()
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
    assert_eq!((&json["trace"], &json["seconds"]), (&json!("tiny"), &json!(2.0)));
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
    let missing = refused("--trace /no/such/file");
    assert!(missing.starts_with("/no/such/file: No such file"), "{missing}");
    let broken = format!("{TINY}{{\"t\":1,\"in\":2}}\n");
    let file = Temporary::new("broken.jsonl", broken.as_bytes());
    let said = refused(&file.words(""));
    assert_eq!(said, format!("{}:5: missing field `out`", file.0.display()));
    let said = refused("--trace x --replicas 2 --slow 3=0.5");
    assert_eq!(said, "--slow 3=0.5: the engines are numbered 1 to 2");
    let said = refused("--scrape-interval off --stale 1s");
    assert!(said.starts_with("--stale: metrics are not read at all"), "{said}");
    let said = refused("--requests 1 --plot /no/such/folder/a.svg");
    assert!(said.starts_with("/no/such/folder/a.svg: No such file"), "{said}");
}

#[test]
fn words_that_make_no_sense_are_refused_with_those_that_would() {
    for (words, why) in [
        ("--trace x --replicas 0", "1..=1024"),
        ("--trace x --engine abacus", "known are llama-8b-h100"),
        ("--workload tennis", "known are chat, agents, documents, mixed"),
        ("--trace x --workload chat", "cannot be used with"),
        ("--trace x --rate 5", "cannot be used with"),
        ("--trace x --requests 5", "cannot be used with"),
        ("--rate 0", "from 0.001 to 100000"),
        ("--requests 0", "1..=1000000"),
        ("--config x --replicas 2", "cannot be used with"),
        ("--upstream x", "--config <FILE>"),
        ("--weighted", "--slow <N=SPEED,..>"),
        ("--proxies 0", "1..=64"),
        ("--scrape-interval never", "nor `off`"),
        ("--stale 5", "`5` is not a duration"),
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
    let read = options("--scrape-interval off").unwrap();
    assert_eq!((read.trace, read.workload, read.scrape_interval), (None, Kind::Mixed, Some(Interval(None))));
}

#[test]
fn the_help_names_every_engine_workload_and_default() {
    let help = Words::command().render_long_help().to_string();
    for name in Hardware::NAMES.into_iter().chain(Kind::ALL.map(Kind::name)) {
        assert!(help.contains(name), "{name}: {help}");
    }
    for heading in ["Traffic:", "Fleet:", "Comparison:", "Output:", "Engines:", "Traces:", "Examples:"] {
        assert!(help.contains(&format!("\n{heading}\n")), "{heading}: {help}");
    }
    let [chat, agents, documents, mixed] = Kind::ALL.map(Kind::rate_per_engine);
    let rates =
        format!("{chat} for chat, {agents} for agents, {documents} for documents, {mixed} for mixed]");
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains(&rates), "{help}");
    let constants = help.split("    like: ").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
    let file = Temporary::new("help.yaml", format!("like: {constants}").replace("\n    ", "\n").as_bytes());
    let read = config::load_hardware(&file.0).unwrap();
    assert_eq!(Hardware { name: Hardware::default().name, ..read }, Hardware::default());
}

#[test]
fn every_workload_runs_without_a_file_and_differs_by_seed() {
    for kind in Kind::ALL.map(Kind::name) {
        let words = format!("--workload {kind} --requests 200 --replicas 2 --policy lmetric --seeds 2");
        let json = json(&words);
        assert_eq!((&json["workload"], &json["requests"]), (&json!(kind), &json!(200)));
        assert_ne!(json["runs"][0]["ttft_ms"], json["runs"][1]["ttft_ms"], "{kind}");
    }
    let text = output("--requests 300 --rate 7.5 --replicas 3");
    assert!(
        text.starts_with("mixed, made up: 300 requests at 7.5/s on 3 x llama-8b-h100; speed-up 1\n"),
        "{text}"
    );
}

#[test]
fn the_output_is_the_same_on_any_number_of_threads() {
    let plot = Temporary::new("threads.svg", b"");
    let path = plot.0.display();
    for more in ["--oracle", "--oracle --json", "--capacity", "--capacity --json"] {
        let words =
            format!("--requests 60 --replicas 2 --policy random_two,lmetric --seeds 3 {more} --plot {path}");
        let on = |threads| {
            let text = simulate_on(&options(&words).unwrap(), &Policies::default(), threads).unwrap();
            (text, std::fs::read_to_string(&plot.0).unwrap())
        };
        let alone = on(1);
        assert!(alone.1.contains("lmetric") && alone.1.ends_with("</svg>\n"), "{more}");
        for threads in [2, 5, 16] {
            assert_eq!(on(threads), alone, "{more} on {threads} threads");
        }
    }
}

/// Three backends, two of them alike; and another upstream.
const CONFIG: &str = "\
listeners: [{ address: 127.0.0.1:8080 }]
routes: [{ path: /b, upstream: other }, { path: /, upstream: llama }]
upstreams:
  llama:
    engine: vllm
    backends: [10.0.0.1:8000, { address: 10.0.0.2:8000, weight: 3 }, 10.0.0.3:8000]
    policy: { least_pending_tokens: { request_tokens: 100 } }
    poll: { interval: 5s }
  other:
    backends: [10.0.0.9:8000]
";

#[test]
fn a_balancers_configuration_gives_backends_weights_policy_and_how_often_metrics_are_read() {
    let file = Temporary::new("two.yaml", CONFIG.as_bytes());
    let setup = |more: &str| {
        let words = format!("--config {} --requests 10 {more}", file.0.display());
        Setup::new(&options(&words).unwrap(), &Policies::default())
    };
    let found = setup("--upstream llama").unwrap();
    assert_eq!((found.weights, found.speeds.len()), (vec![1, 3, 1], 3));
    assert_eq!(found.scrape.map(|scrape| scrape.interval), Some(Duration::from_secs(5)));
    let names: Vec<&str> = found.contestants.iter().map(Contestant::name).collect();
    assert_eq!(names, ["round_robin", "least_connections", "least_pending_tokens"]);
    let usual = PolicyConfig::by_name("least_pending_tokens").unwrap();
    assert_ne!(found.contestants[2], Contestant::Policy(usual.clone()), "the options of the file");
    let found = setup("--upstream llama --policy lmetric,least_pending_tokens,lmetric").unwrap();
    assert_eq!(found.contestants.len(), 2);
    assert_ne!(found.contestants[1], Contestant::Policy(usual.clone()));
    let other = setup("--upstream other").unwrap();
    assert_eq!(other.contestants[2], Contestant::Policy(usual));
    assert_eq!(other.scrape, None, "an engine of which no metrics are known");
    let forced = setup("--upstream other --scrape-interval 50ms --stale 200ms").unwrap();
    let delay = Duration::from_millis(200);
    assert_eq!(forced.scrape, Some(Scrape { interval: Duration::from_millis(50), delay }));
    let weighted = setup("--upstream llama --slow 2=0.5 --weighted").unwrap();
    assert_eq!(weighted.weights, [2, 3, 2]);
    let which = setup("").unwrap_err().to_string();
    assert!(which.ends_with("two.yaml: which --upstream of llama, other?"), "{which}");
    let none = setup("--upstream qwen").unwrap_err().to_string();
    assert!(none.ends_with("two.yaml: no upstream qwen, there are llama, other"), "{none}");
}

#[test]
fn a_policy_of_ones_own_is_compared_like_any_other() {
    let policies = Policies::default().with("mine", || crate::policy::lmetric::Lmetric).unwrap();
    let command = with_policies(Words::command(), &policies);
    let matches = command.try_get_matches_from(["simulate", "--policy", "mine,lmetric", "--requests", "50"]);
    let options = Words::from_arg_matches(&matches.unwrap()).unwrap().options;
    let text = simulate(&options, &policies).unwrap();
    let cells = |line: &str| line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<&str> = text.lines().skip(5).collect();
    assert!(lines[0].starts_with("mine ") && cells(lines[0]) == cells(lines[1]), "{text}");
}

#[test]
fn a_broken_configuration_or_file_of_constants_is_shown_with_its_place() {
    let file = Temporary::new("broken.yaml", CONFIG.replace("request_tokens", "request_token").as_bytes());
    let said = refused(&format!("--config {} --upstream llama", file.0.display()));
    assert!(said.contains("broken.yaml:7:") && said.contains("did you mean `request_tokens`?"), "{said}");
    let file = Temporary::new("engine.yaml", b"like: llama-8b-h100\nkv_token: 1000\n");
    let said = refused(&format!("--engine {}", file.0.display()));
    assert!(said.contains("engine.yaml:2:1") && said.contains("did you mean `kv_tokens`?"), "{said}");
    assert!(matches!(
        simulate(&options("--engine /no/such.yaml").unwrap(), &Policies::default()),
        Err(Failure::Invalid(report)) if report.to_string().contains("cannot read the constants")
    ));
}

#[test]
fn constants_of_ones_own_are_those_that_are_used() {
    let file = Temporary::new("engine.yml", b"like: llama-8b-h100\nkv_tokens: 20000\n");
    let trace = Temporary::new("own.jsonl", TINY.as_bytes());
    let own = json(&trace.words(&format!("--replicas 1 --policy lmetric --engine {}", file.0.display())));
    assert_eq!(own["engine"], json!(file.0.display().to_string()));
    assert_eq!(own["runs"][0]["refused"], json!(1), "30,000 tokens do not fit");
    assert_eq!(json(&trace.words("--replicas 1 --policy lmetric"))["runs"][0]["refused"], json!(0));
}

#[test]
fn several_balancers_know_less_and_the_output_says_how_many_there_are() {
    let words = "--workload agents --requests 2000 --replicas 4 --policy least_pending_tokens";
    let hits = |more: &str| json(&format!("{words} {more}"))["runs"][0]["hit_ratio"].as_f64().unwrap();
    assert!(
        hits("--proxies 4") < hits("--proxies 1") - 0.01,
        "{} {}",
        hits("--proxies 4"),
        hits("--proxies 1")
    );
    let text = output("--requests 10 --proxies 3 --scrape-interval 500ms --stale 20ms");
    assert!(text.contains("h100, 3 balancers, metrics every 500ms, 20ms old; speed-up"), "{text}");
    assert!(output("--requests 10 --scrape-interval off").contains("h100, metrics not read; speed-up"));
}

#[test]
fn weights_help_where_half_of_the_engines_are_slow() {
    let words = "--workload chat --replicas 4 --rate 40 --slow 3=0.3,4=0.3 --policy round_robin";
    let mean = |more: &str| json(&format!("{words} {more}"))["runs"][0]["ttft_ms"]["mean"].as_f64().unwrap();
    let (blind, weighted) = (mean("--requests 3000"), mean("--requests 3000 --weighted"));
    assert!(weighted < 0.9 * blind, "{weighted} {blind}");
    let text = output(&format!("{words} --weighted --requests 10"));
    assert!(text.contains(", slow: 3=0.3 4=0.3, weights: 10 10 3 3; speed-up"), "{text}");
}

#[test]
fn an_oracle_is_beside_the_policies_and_each_shows_how_far_from_it_it_is() {
    let text = output("--requests 300 --replicas 2 --policy round_robin,lmetric --oracle");
    let lines: Vec<Vec<&str>> = text.lines().skip(4).map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<&str> = lines.iter().map(|cells| cells[0]).collect();
    assert_eq!(names, ["policy", "round_robin", "lmetric", "oracle"]);
    assert!(text.lines().nth(4).unwrap().ends_with("to oracle"));
    assert_eq!(lines[3].last(), Some(&"+0.0%"));
    let capacity = json("--requests 100 --replicas 2 --policy lmetric --oracle --capacity");
    assert_eq!(capacity["capacities"][1]["policy"], json!("oracle"));
    assert!(capacity["capacities"][0]["tried"].as_array().unwrap().len() > 7);
}
