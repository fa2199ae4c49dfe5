//! The rows as the table of `docs/failures.md`: written by this, compared by this.

use super::row::{Charged, End, Gets, Next, Row};
use super::{clients, engines, kinds, statuses};
use std::fmt::Write;
use std::path::Path;

const BEGIN: &str = "<!-- matrix:begin -->\n";
const END: &str = "<!-- matrix:end -->\n";

const HEADER: &str = "\
| what happens | the client gets | engines see it | charged meanwhile | `outcome` | retried | ejects | log | \
next request |
|---|---|---|---|---|---|---|---|---|
";

/// How to write it.
const HOW: &str = "PLIMSOLL_WRITE=1 cargo test --test wires matrix::table";

#[test]
fn the_table_in_the_docs_says_what_the_rows_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/failures.md");
    let file = std::fs::read_to_string(&path).expect("docs/failures.md");
    let (before, rest) = file.split_once(BEGIN).expect("the beginning of the matrix");
    let (_, after) = rest.split_once(END).expect("the end of the matrix");
    let wanted = format!("{before}{BEGIN}\n{}{END}{after}", tables());
    if std::env::var_os("PLIMSOLL_WRITE").is_some() {
        std::fs::write(&path, wanted).expect("docs/ is writable");
        return;
    }
    let differs = file.lines().zip(wanted.lines()).find(|(is, should)| is != should);
    assert!(file == wanted, "docs/failures.md is not what the rows say; write it: {HOW}\n{differs:#?}");
}

fn tables() -> String {
    let groups = [
        ("An engine fails", engines::rows()),
        ("An engine answers with an error", statuses::rows()),
        ("Engines of a kind", kinds::rows()),
        ("A client goes", clients::rows()),
    ];
    let mut text = String::new();
    for (title, rows) in groups {
        write!(text, "### {title}\n\n{HEADER}").expect("a string");
        for (name, row) in rows {
            text += &line(name, &row);
        }
        text.push('\n');
    }
    text
}

fn line(name: &str, row: &Row) -> String {
    let cells = [
        sentence(name, row),
        in_turn(&row.ends, |end| gets(end.gets)),
        times(row.seen),
        charged(row.charged).to_owned(),
        in_turn(&row.ends, |end| format!("`{}`", end.outcome)),
        row.retried.map_or_else(String::new, |(reason, times)| match times {
            1 => format!("`{reason}`"),
            _ => format!("{times} x `{reason}`"),
        }),
        row.ejected.map_or_else(String::new, |reason| format!("`{reason}`")),
        in_turn(&row.ends, log),
        next(row).to_owned(),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// The name of the test as words, and what of the configuration is not as in the other rows.
fn sentence(name: &str, row: &Row) -> String {
    let mut words = name.replace('_', " ");
    for (plain, written) in [
        ("vllm", "vLLM"),
        ("sglang", "SGLang"),
        ("dynamo", "Dynamo"),
        ("llama cpp", "llama.cpp"),
        ("goaway", "GOAWAY"),
        ("http2", "HTTP/2"),
        ("retry after", "Retry-After"),
    ] {
        words = words.replace(plain, written);
    }
    for keys in [row.limits, row.upstream].into_iter().filter(|keys| !keys.is_empty()) {
        write!(words, " (`{keys}`)").expect("a string");
    }
    words
}

/// What each request shows, in order; the same several times in a row is said once.
fn in_turn(ends: &[End], show: impl Fn(&End) -> String) -> String {
    let mut shown: Vec<(String, usize)> = Vec::new();
    for end in ends {
        let text = show(end);
        match shown.last_mut() {
            Some((last, count)) if *last == text => *count += 1,
            _ => shown.push((text, 1)),
        }
    }
    let texts = shown.into_iter().map(|(text, count)| match count {
        1 => text,
        _ => format!("{count} x {text}"),
    });
    texts.collect::<Vec<_>>().join("; ")
}

fn gets(gets: Gets) -> String {
    match gets {
        Gets::Good => "200, whole".to_owned(),
        Gets::Passed(status, None) => format!("the engine's {status}"),
        Gets::Passed(status, Some(_)) => format!("the engine's {status} and its `Retry-After`"),
        Gets::Own(status, code) => format!("{status} `{code}`"),
        Gets::Cut => "200, what came, a `stream_cut` event, a clean end".to_owned(),
        Gets::Truncated => "200, what came, no end".to_owned(),
        Gets::StreamError => "200, the engine's error event".to_owned(),
        Gets::Gone => String::new(),
        Gets::Closed => "its connection closed".to_owned(),
    }
}

fn times(seen: usize) -> String {
    match seen {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        _ => format!("{seen} times"),
    }
}

const fn charged(charged: Charged) -> &'static str {
    match charged {
        Charged::Unseen => "",
        Charged::Nothing => "nothing",
        Charged::Prompt => "prompt",
        Charged::Place => "place",
    }
}

fn log(end: &End) -> String {
    let attempts = end.attempts.map(|attempts| format!("`attempts={attempts}`"));
    let error = end.error.map(|error| format!("`error={error}`"));
    [attempts, error].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn next(row: &Row) -> &'static str {
    match row.next {
        Next::Unasked => "",
        Next::Same => "same",
        Next::Other => "other",
    }
}
