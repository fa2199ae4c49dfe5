//! A picture of what a simulation found, as an SVG of its own: no scripts, no fonts, nothing to fetch.
//!
//! For runs, the distribution of the times to the first token: each curve shows which share of the requests
//! had theirs by then, so the one further up and to the left is better. For `--capacity`, the share of good
//! requests at each speed-up that was tried. The x axis is logarithmic, since both span decades. Colours
//! follow the viewer's preference for light or dark, and the oracle is dashed.

use std::fmt::Write as _;

use super::table::{Limit, ORACLE, Run};
use crate::sim::report::{Samples, Slo};

/// The distribution of the times to the first token, all seeds of a policy together.
pub(super) fn runs(runs: &[Run], slo: &Slo, title: &str, promise: &str) -> String {
    let mut curves: Vec<Curve> = Vec::new();
    for name in names(runs.iter().map(|run| run.policy.as_str())) {
        let mut samples = Samples::default();
        runs.iter().filter(|run| run.policy == name).for_each(|run| samples.merge(&run.figures.first_token));
        let rank = |n: usize| n as f64 / STEPS as f64;
        let times = samples.quantiles::<{ STEPS + 1 }>(std::array::from_fn(rank));
        let points: Vec<_> =
            times.iter().flatten().enumerate().map(|(n, time)| (time.as_secs_f64(), rank(n))).collect();
        let at = |n: usize| points.get(n).map_or_else(|| "-".to_owned(), |(time, _)| about(*time));
        let note = format!("p50 {}, p99 {}", at(STEPS / 2), at(STEPS * 99 / 100));
        curves.push(Curve { name, note, lines: vec![points], dots: false });
    }
    let promised = slo.first_token.as_secs_f64();
    Chart {
        title,
        subtitle: promise,
        x: ("time to first token", seconds),
        y: "requests answered by then",
        curves,
        rule: Rule::At(promised, format!("SLO {}", seconds(promised))),
    }
    .svg()
}

/// The share of good requests at each speed-up that was tried, one line per seed.
pub(super) fn limits(limits: &[Limit], share: f64, title: &str, promise: &str) -> String {
    let mut curves: Vec<Curve> = Vec::new();
    for name in names(limits.iter().map(|limit| limit.policy.as_str())) {
        let mine = || limits.iter().filter(|limit| limit.policy == name);
        let lines = mine().map(|limit| {
            let mut tried = limit.tried.clone();
            tried.sort_by(|a, b| a.0.total_cmp(&b.0));
            tried
        });
        let found = mine().filter_map(|limit| limit.speedup).reduce(f64::min);
        let note = found.map_or_else(|| "never".to_owned(), |speedup| format!("up to {speedup:.2}×"));
        curves.push(Curve { name: name.clone(), note, lines: lines.collect(), dots: true });
    }
    let rule = Rule::Across(share, format!("SLO {:.0} %", share * 100.0));
    let (x, y): (Axis, _) = (("speed-up", factor), "requests within the SLO");
    Chart { title, subtitle: promise, x, y, curves, rule }.svg()
}

/// How finely a distribution is drawn.
const STEPS: usize = 400;

/// Each name once, in the order in which they come first.
fn names<'a>(all: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in all {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

struct Chart<'a> {
    title: &'a str,
    subtitle: &'a str,
    x: Axis,
    /// What the shares are of.
    y: &'static str,
    curves: Vec<Curve>,
    rule: Rule,
}

/// What an axis shows, and how a value on it is written.
type Axis = (&'static str, fn(f64) -> String);

struct Curve {
    name: String,
    /// What is to be said of it, in a few words.
    note: String,
    /// Places on the x axis, above 0, and shares, 0..=1.
    lines: Vec<Vec<(f64, f64)>>,
    /// Whether each place is marked.
    dots: bool,
}

/// A line that something is measured by.
enum Rule {
    /// At that place of the x axis.
    At(f64, String),
    /// At that share.
    Across(f64, String),
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = HEIGHT - 58.0;
/// Between the picture and its legend, and from there to the edge.
const GAP: f64 = 22.0;
/// The width of a letter of the legend, about; and of one of the title, as a part of its size.
const LETTER: f64 = 7.4;
const WIDE_LETTER: f64 = 0.62;

/// Ink, paper and lines for both tastes; one colour per curve.
const STYLE: &str = "\
text{font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}\
.title{font-weight:600}.quiet{fill:#59636e}.paper{fill:#ffffff}\
.grid{stroke:#d8dee4;stroke-width:1}.frame{stroke:#818b98;stroke-width:1;fill:none}\
.rule{stroke:#1f2328;stroke-width:1.2;stroke-dasharray:2 4}\
.curve{fill:none;stroke-width:2.2;stroke-linejoin:round}.dash{stroke-dasharray:7 5}\
.dots{stroke-width:6;stroke-linecap:round}\
.c0{stroke:#8a6100}.c1{stroke:#0969da}.c2{stroke:#1a7f37}.c3{stroke:#cf222e}\
.c4{stroke:#8250df}.c5{stroke:#0b8a95}.c6{stroke:#bf3989}.c7{stroke:#57606a}.c8{stroke:#1f2328}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.quiet{fill:#9198a1}.paper{fill:#0d1117}\
.grid{stroke:#2a313c}.frame{stroke:#656c76}.rule{stroke:#e6edf3}\
.c0{stroke:#e3b341}.c1{stroke:#58a6ff}.c2{stroke:#56d364}.c3{stroke:#ff7b72}\
.c4{stroke:#bc8cff}.c5{stroke:#39c5cf}.c6{stroke:#f778ba}.c7{stroke:#b1bac4}.c8{stroke:#e6edf3}}";
/// The colours of policies; the one after them is the oracle's.
const COLOURS: usize = 8;

impl Chart<'_> {
    fn svg(&self) -> String {
        let width = |curve: &Curve| curve.name.chars().count().max(curve.note.chars().count());
        let letters = self.curves.iter().map(width).max().unwrap_or(0) as f64;
        let right = WIDTH - (letters * LETTER + 2.0 * GAP + 34.0).clamp(160.0, WIDTH / 2.0);
        let scale = Scale::over(&self.places(), right);
        let mut svg = String::new();
        let (title, subtitle) = (escaped(self.title), escaped(self.subtitle));
        // As large as fits.
        let size = (WIDTH - 2.0 * LEFT) / (self.title.chars().count().max(1) as f64 * WIDE_LETTER);
        let size = size.clamp(9.0, 16.0);
        let _ = writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
             <text class=\"title\" x=\"{LEFT}\" y=\"32\" style=\"font-size:{size:.1}px\">{title}</text>\n\
             <text class=\"quiet\" x=\"{LEFT}\" y=\"54\">{subtitle}</text>"
        );
        self.grid(&mut svg, &scale);
        self.rule(&mut svg, &scale);
        for (number, curve) in self.curves.iter().enumerate() {
            draw(&mut svg, number, curve, &scale);
            legend(&mut svg, number, curve, right + GAP);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Every place on the x axis that is drawn.
    fn places(&self) -> Vec<f64> {
        let ruled = match self.rule {
            Rule::At(place, _) => Some(place),
            Rule::Across(..) => None,
        };
        self.curves
            .iter()
            .flat_map(|curve| &curve.lines)
            .flatten()
            .map(|(place, _)| *place)
            .chain(ruled)
            .collect()
    }

    fn grid(&self, svg: &mut String, scale: &Scale) {
        let (name, write) = self.x;
        let ticks = scale.ticks();
        // All of 1, 2 and 5, or only the decades if that is too many.
        let crowded = ticks.len() > MOST_TICKS;
        for (place, is_decade) in ticks {
            let x = scale.x(place);
            let _ = writeln!(svg, "<path class=\"grid\" d=\"M{x:.1} {TOP}V{BOTTOM}\"/>");
            if is_decade || !crowded {
                let below = BOTTOM + 20.0;
                let text = write(place);
                let _ =
                    writeln!(svg, "<text x=\"{x:.1}\" y=\"{below}\" text-anchor=\"middle\">{text}</text>");
            }
        }
        let (right, middle) = (scale.right, LEFT.midpoint(scale.right));
        for percent in [0, 20, 40, 60, 80, 100] {
            let y = height(f64::from(percent) / 100.0);
            let (beside, lower) = (LEFT - 8.0, y + 4.5);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right:.1}\"/>\n\
                 <text x=\"{beside}\" y=\"{lower:.1}\" text-anchor=\"end\">{percent} %</text>"
            );
        }
        let (foot, centre) = (BOTTOM + 44.0, TOP.midpoint(BOTTOM));
        let _ = writeln!(
            svg,
            "<path class=\"frame\" d=\"M{LEFT} {TOP}V{BOTTOM}H{right:.1}\"/>\n\
             <text class=\"quiet\" x=\"{middle:.1}\" y=\"{foot}\" text-anchor=\"middle\">{name}</text>\n\
             <text class=\"quiet\" transform=\"translate(18 {centre}) rotate(-90)\" \
             text-anchor=\"middle\">{}</text>",
            self.y
        );
    }

    fn rule(&self, svg: &mut String, scale: &Scale) {
        let (path, x, y, anchor, text) = match &self.rule {
            Rule::At(place, text) => {
                let x = scale.x(*place);
                (format!("M{x:.1} {TOP}V{BOTTOM}"), x, TOP - 5.0, "middle", text)
            }
            Rule::Across(share, text) => {
                let y = height(*share);
                let path = format!("M{LEFT} {y:.1}H{:.1}", scale.right);
                // Where a curve seldom is: the share falls from left to right.
                (path, scale.right - 4.0, y - 6.0, "end", text)
            }
        };
        let _ = writeln!(
            svg,
            "<path class=\"rule\" d=\"{path}\"/>\n\
             <text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escaped(text)
        );
    }
}

/// The height at which a share is drawn.
fn height(share: f64) -> f64 {
    BOTTOM - share * (BOTTOM - TOP)
}

/// The classes of a curve: its colour, and dashes for the oracle and where the colours have run out.
fn classes(number: usize, curve: &Curve) -> String {
    match (curve.name == ORACLE, number < COLOURS) {
        (true, _) => format!("curve dash c{COLOURS}"),
        (false, true) => format!("curve c{number}"),
        (false, false) => format!("curve dash c{}", number % COLOURS),
    }
}

fn draw(svg: &mut String, number: usize, curve: &Curve, scale: &Scale) {
    let class = classes(number, curve);
    for line in &curve.lines {
        let (mut path, mut dots) = (String::new(), String::new());
        for (place, share) in line {
            let (x, y) = (scale.x(*place), height(*share));
            let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { "M" } else { "L" });
            // A dot is a line of no length with round ends.
            let _ = write!(dots, "M{x:.1} {y:.1}h0");
        }
        let _ = writeln!(svg, "<path class=\"{class}\" d=\"{path}\"/>");
        if curve.dots {
            let colour = class.split(' ').next_back().unwrap_or_default();
            let _ = writeln!(svg, "<path class=\"dots {colour}\" d=\"{dots}\"/>");
        }
    }
}

fn legend(svg: &mut String, number: usize, curve: &Curve, left: f64) {
    let y = TOP + 14.0 + 42.0 * number as f64;
    let (end, text, below, class) = (left + 24.0, left + 32.0, y + 17.0, classes(number, curve));
    let (name, note) = (escaped(&curve.name), escaped(&curve.note));
    let _ = writeln!(
        svg,
        "<path class=\"{class}\" d=\"M{left:.1} {:.1}H{end:.1}\"/>\n\
         <text x=\"{text:.1}\" y=\"{y:.1}\">{name}</text>\n\
         <text class=\"quiet\" x=\"{text:.1}\" y=\"{below:.1}\">{note}</text>",
        y - 4.0
    );
}

/// The logarithmic x axis.
struct Scale {
    /// Its ends, each 1, 2 or 5 times a power of ten: mantissa's index and exponent.
    low: (usize, i32),
    high: (usize, i32),
    /// Where it ends in the picture.
    right: f64,
}

const MANTISSAS: [f64; 3] = [1.0, 2.0, 5.0];
const MOST_TICKS: usize = 9;

impl Scale {
    /// The shortest that holds all `places`.
    fn over(places: &[f64], right: f64) -> Self {
        let usable = || places.iter().copied().filter(|place| place.is_finite() && *place > 0.0);
        let (least, most) = (usable().fold(f64::INFINITY, f64::min), usable().fold(0.0, f64::max));
        let (least, most) = if least <= most { (least, most) } else { (1.0, 1.0) };
        let (mut low, mut high) = ((0, least.log10().floor() as i32), (0, least.log10().floor() as i32));
        while value(next(low)) <= least {
            low = next(low);
        }
        while value(high) < most || high == low {
            high = next(high);
        }
        Self { low, high, right }
    }

    fn x(&self, place: f64) -> f64 {
        let (low, high) = (value(self.low).ln(), value(self.high).ln());
        let part = (place.max(f64::MIN_POSITIVE).ln() - low) / (high - low);
        LEFT + part.clamp(0.0, 1.0) * (self.right - LEFT)
    }

    /// Each 1, 2 and 5 from end to end, and whether it is a 1.
    fn ticks(&self) -> Vec<(f64, bool)> {
        let all = std::iter::successors(Some(self.low), |tick| Some(next(*tick)));
        let mut ticks: Vec<_> =
            all.take_while(|tick| *tick != self.high).map(|tick| (value(tick), tick.0 == 0)).collect();
        ticks.push((value(self.high), self.high.0 == 0));
        ticks
    }
}

fn value((mantissa, exponent): (usize, i32)) -> f64 {
    MANTISSAS[mantissa] * 10_f64.powi(exponent)
}

fn next((mantissa, exponent): (usize, i32)) -> (usize, i32) {
    if mantissa + 1 < MANTISSAS.len() { (mantissa + 1, exponent) } else { (0, exponent + 1) }
}

/// A round number of seconds, with its unit.
fn seconds(value: f64) -> String {
    let rounded = |value: f64| (value * 1e6).round() / 1e6;
    if value < 1.0 { format!("{} ms", rounded(value * 1e3)) } else { format!("{} s", rounded(value)) }
}

/// A measured number of seconds, in the digits that matter.
fn about(value: f64) -> String {
    match value {
        ..0.01 => format!("{:.1} ms", value * 1e3),
        ..1.0 => format!("{:.0} ms", value * 1e3),
        ..10.0 => format!("{value:.2} s"),
        _ => format!("{value:.0} s"),
    }
}

fn factor(value: f64) -> String {
    format!("{}×", (value * 1e6).round() / 1e6)
}

/// `text` as it may stand in XML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::report::Figures;
    use std::time::Duration;

    fn run(policy: &str, millis: impl IntoIterator<Item = u64>) -> Run {
        let mut first_token = Samples::default();
        millis.into_iter().for_each(|millis| first_token.push(Duration::from_millis(millis)));
        Run { policy: policy.to_owned(), seed: 1, figures: Figures { first_token, ..Figures::default() } }
    }

    const SLO: Slo =
        Slo { first_token: Duration::from_secs(2), per_token: Duration::from_millis(50), share: 0.9 };

    /// The curves of a picture, without its legend: the points of each path of that class.
    fn points(svg: &str, class: &str) -> Vec<Vec<(f64, f64)>> {
        let begin = format!("<path class=\"{class}\" d=\"");
        let paths = svg.lines().filter_map(|line| line.strip_prefix(&begin)?.split('"').next());
        let point = |text: &str| {
            let (x, y) = text.split_once(' ')?;
            Some((x.parse().ok()?, y.parse().ok()?))
        };
        let curves = paths.filter(|path| !path.contains('H'));
        curves.map(|path| path.split(['M', 'L', 'h']).filter_map(point).collect()).collect()
    }

    #[test]
    fn a_distribution_rises_from_its_least_value_to_its_greatest() {
        let svg = runs(&[run("lmetric", 1..=100), run("lmetric", 101..=1000)], &SLO, "title", "promise");
        let curves = points(&svg, "curve c0");
        assert_eq!(curves.len(), 1, "both seeds are one curve");
        let (first, last) = (curves[0][0], curves[0][STEPS]);
        assert_eq!((first, last.1), ((LEFT, BOTTOM), TOP), "1 ms is where the axis begins");
        assert!(curves[0].is_sorted_by(|a, b| a.0 <= b.0 && a.1 > b.1), "{curves:?}");
        assert!(svg.contains(">p50 500 ms, p99 990 ms<") && svg.contains(">SLO 2 s<"), "{svg}");
    }

    #[test]
    fn a_search_shows_every_point_that_was_tried_in_order() {
        let tried = vec![(1.0, 0.99), (2.0, 0.95), (4.0, 0.1), (3.0, 0.9)];
        let limit = Limit { policy: "lmetric".to_owned(), seed: 1, speedup: Some(3.0), rate: None, tried };
        let svg = limits(&[limit], 0.9, "title", "promise");
        let curve = &points(&svg, "curve c0")[0];
        assert_eq!((curve.len(), curve.is_sorted_by(|a, b| a.0 < b.0)), (4, true), "{curve:?}");
        assert_eq!(points(&svg, "dots c0")[0].len(), 4);
        assert!(svg.contains(">SLO 90 %<") && svg.contains(">up to 3.00×<"), "{svg}");
    }

    #[test]
    fn whatever_a_name_holds_the_picture_stays_xml_and_fetches_nothing() {
        let svg = runs(&[run("<&\"\u{1}", [5]), run(ORACLE, [7])], &SLO, "a < b & c", "it's");
        assert!(svg.contains(">&lt;&amp;&quot;\u{fffd}<") && svg.contains("<title>a &lt; b &amp; c</title>"));
        assert_eq!(svg.matches("://").count(), 1, "the name space of SVG");
        assert!(!svg.contains("href") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains("class=\"curve dash c8\""), "the oracle is dashed");
        let empty = runs(&[run("lmetric", [])], &SLO, "nothing", "answered");
        assert!(empty.contains(">p50 -, p99 -<") && !empty.contains("NaN"), "{empty}");
    }

    #[test]
    fn the_axis_ends_at_round_numbers_around_all_that_is_shown() {
        let ends = |places: &[f64]| {
            let scale = Scale::over(places, 500.0);
            (factor(value(scale.low)), factor(value(scale.high)))
        };
        let owned = |low: &str, high: &str| (low.to_owned(), high.to_owned());
        assert_eq!(ends(&[0.013, 3.0]), owned("0.01×", "5×"));
        assert_eq!(ends(&[0.07, 20.0]), owned("0.05×", "20×"));
        assert_eq!(ends(&[1.0]), owned("1×", "2×"));
        assert_eq!(ends(&[0.0, f64::NAN]), owned("1×", "2×"));
        let ticks: Vec<String> =
            Scale::over(&[0.07, 1.5], 500.0).ticks().into_iter().map(|(tick, _)| seconds(tick)).collect();
        assert_eq!(ticks, ["50 ms", "100 ms", "200 ms", "500 ms", "1 s", "2 s"]);
    }
}
