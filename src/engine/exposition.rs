//! Prometheus' text format, read without copying: one [`Sample`] per line that is one.
//!
//! The grammar is that of the exposition formats document (`name{label="value",...} value timestamp`, where
//! the escapes in a label value are `\\`, `\"` and `\n`), which version 1.0.0 and OpenMetrics extend by
//! exemplars after a `#`; those are ignored, as are comments and every line that is not a sample. A last line
//! without its LF is none: every scrape ends in one, so this one was cut, perhaps within a number.

use std::borrow::Cow;

/// One sample of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample<'a> {
    /// The name, with its suffix (`_total`, `_bucket`) if it has one.
    pub name: &'a str,
    /// The labels.
    pub labels: Labels<'a>,
    /// The value; may be infinite or not a number.
    pub value: f64,
}

/// The labels of a sample, as they stand between the braces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Labels<'a>(&'a str);

/// The samples of a scrape, in order; those of whole lines.
pub fn samples(exposition: &str) -> impl Iterator<Item = Sample<'_>> {
    exposition.split_inclusive('\n').filter_map(|line| sample(line.strip_suffix('\n')?))
}

impl<'a> Labels<'a> {
    /// Each label with its value, up to the first that has no name.
    pub fn iter(self) -> impl Iterator<Item = (&'a str, Cow<'a, str>)> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (name, value) = rest.split_once('=')?;
            let quoted = value.trim_ascii_start().strip_prefix('"')?;
            let end = value_end(quoted)?;
            rest = &quoted[end + 1..];
            let name = name.trim_matches([' ', '\t', ',']);
            name.bytes().all(is_name).then(|| (name, unescape(&quoted[..end])))
        })
    }

    /// The value of the label `name`.
    pub fn value(self, name: &str) -> Option<Cow<'a, str>> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim_ascii_start();
    let length = line.bytes().position(|byte| !is_name(byte)).unwrap_or(line.len());
    let (name, rest) = line.split_at(length);
    if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let (labels, rest) = match rest.trim_ascii_start().strip_prefix('{') {
        Some(inside) => {
            let end = labels_end(inside)?;
            (Labels(&inside[..end]), &inside[end + 1..])
        }
        None => (Labels::default(), rest.strip_prefix([' ', '\t'])?),
    };
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample { name, labels, value })
}

const fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':'
}

/// Where the closing brace is, which may also stand inside a label's value.
fn labels_end(inside: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += inside.as_bytes()[at..].iter().position(|byte| matches!(byte, b'"' | b'}'))?;
        if inside.as_bytes()[at] == b'}' {
            return Some(at);
        }
        at += 1;
        at += value_end(&inside[at..])? + 1;
    }
}

/// Where the quote is that ends a label's value.
fn value_end(quoted: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += quoted.as_bytes().get(at..)?.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
        if quoted.as_bytes()[at] == b'"' {
            return Some(at);
        }
        at += 1 + quoted[at + 1..].chars().next()?.len_utf8();
    }
}

fn unescape(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return Cow::Borrowed(value);
    }
    let mut plain = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(char) = chars.next() {
        match (char, chars.clone().next()) {
            ('\\', Some('n')) => plain.push('\n'),
            ('\\', Some(escaped @ ('\\' | '"'))) => plain.push(escaped),
            _ => {
                plain.push(char);
                continue;
            }
        }
        chars.next();
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Parts<'a> = (&'a str, Vec<(&'a str, String)>, f64);

    fn one(line: &str) -> Option<Parts<'_>> {
        let read = sample(line)?;
        let labels = read.labels.iter().map(|(name, value)| (name, value.into_owned())).collect();
        Some((read.name, labels, read.value))
    }

    #[test]
    fn samples_in_every_spelling_are_read() {
        let label = |name, value: &str| (name, value.to_owned());
        for (line, want) in [
            ("up 1", ("up", vec![], 1.0)),
            ("up\t1.5e+03 1700000000000", ("up", vec![], 1500.0)),
            ("  a:b_c{} -2", ("a:b_c", vec![], -2.0)),
            (r#"a{x="1"} 2"#, ("a", vec![label("x", "1")], 2.0)),
            (r#"a {x="1", y = "",} 2"#, ("a", vec![label("x", "1"), label("y", "")], 2.0)),
            (
                r#"a{x="1",y="}, z=\"q\" \\ \n \t"}2 # {t="u"} 3"#,
                ("a", vec![label("x", "1"), label("y", "}, z=\"q\" \\ \n \\t")], 2.0),
            ),
            ("a +Inf", ("a", vec![], f64::INFINITY)),
            ("a -Inf", ("a", vec![], f64::NEG_INFINITY)),
        ] {
            assert_eq!(one(line), Some(want), "{line}");
        }
        assert!(one("a NaN").unwrap().2.is_nan());
    }

    #[test]
    fn lines_that_are_no_samples_are_passed_over() {
        for line in [
            "",
            "# HELP a b",
            "# TYPE a gauge",
            "# EOF",
            "a",
            "a ",
            "a{",
            "a{x",
            "a{x=\"1",
            "a{x=\"1\\",
            "a{x=\"1\"}",
            "a{} b",
            "{x=\"1\"} 1",
            "1a 1",
            "a-b 1",
            "é 1",
            "a{x=\"\\é",
        ] {
            assert_eq!(one(line), None, "{line:?}");
        }
        assert_eq!(samples("# x\r\na 1\r\n\r\nb 2\r\n").count(), 2);
    }

    #[test]
    fn every_line_of_the_captures_that_is_no_comment_is_a_sample() {
        let mut scrapes = 0;
        let folder: std::path::PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "captures"].iter().collect();
        for engine in std::fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
            for file in std::fs::read_dir(engine.path()).unwrap().flatten() {
                let name = file.file_name().into_string().unwrap();
                if name.starts_with("metrics-") && name.ends_with(".txt") {
                    scrapes += 1;
                    let text = std::fs::read_to_string(file.path()).unwrap();
                    let lines =
                        text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count();
                    assert_eq!(samples(&text).count(), lines, "{}", file.path().display());
                }
            }
        }
        assert!(scrapes >= 13, "only {scrapes} scrapes among the captures");
    }

    #[test]
    fn a_label_without_a_name_ends_the_labels() {
        let read = samples("a{x=\"1\",y\"z=\"2\"\",engine=\"3\"} 4\n").next().unwrap();
        assert_eq!(read.labels.value("x").as_deref(), Some("1"));
        assert_eq!(read.labels.iter().count(), 1, "what a quote hides is no label");
    }

    #[test]
    fn a_line_that_was_cut_says_nothing() {
        let text = "a 12\nb 345\n";
        for cut in 0..text.len() {
            let read: Vec<f64> = samples(&text[..cut]).map(|sample| sample.value).collect();
            assert_eq!(read, &[12.0][..usize::from(cut > 4)], "cut at {cut}");
        }
    }

    #[test]
    fn damaged_lines_never_panic() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut read = 0;
        for _ in 0..20_000 {
            let mut line: Vec<char> = r#"a{x="1\n",y="2"} 3"#.chars().collect();
            for _ in 0..rng.usize(0..6) {
                let at = rng.usize(0..line.len());
                line[at] = *rng.choice(&['a', '{', '}', '"', '\\', '=', ',', ' ', '1', '\n', 'é']).unwrap();
            }
            line.truncate(rng.usize(5..40));
            let line: String = line.into_iter().chain(['\n']).collect();
            read += samples(&line).flat_map(|sample| sample.labels.iter()).count();
        }
        assert!(read > 1_000, "too little of the noise was read: {read}");
    }
}
