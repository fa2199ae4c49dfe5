//! From what is known to a screen of text, whatever its size: no clock, no terminal.
//!
//! A column has a rank; where the screen is too narrow for all, those of the highest rank are left out, so that state,
//! load and share are seen on the smallest. Everything passes through ratatui's buffer, which drops control characters:
//! names of models are written by clients.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use super::seen::{Backend, Choice, Done, MINUTE};
use super::view::{Mode, View};

/// Seconds without an answer after which what is shown is called old.
const STALE: f64 = 5.0;
/// A full bar of pending tokens stands for at least so many.
const BAR_TOKENS: u64 = 2000;
/// Rows of choices, heading included, if there is room.
const CHOICES: u16 = 9;

/// The keys, for the last line and the help.
const KEYS: &str = "q quit  arrows select  d drain  u undrain  s sort  p pause  ? help";

const HELP: [&str; 14] = [
    "q, Ctrl-C      quit",
    "up, down, k, j select a backend; also PageUp, PageDown, Home, End",
    "d              drain the selected backend: no further requests (asks)",
    "u              undrain it (asks)",
    "s              sort the backends by another column",
    "p, space       pause, go on",
    "",
    "pending   prompt tokens that were sent and are not answered yet",
    "context   tokens in the contexts of the requests under way",
    "share     part of the recent requests",
    "req/s     requests ended, TTFT mean time to first token: last 10 s",
    "fail      part that failed, cached part of the prompt tokens: last minute",
    "run, wait, KV, age   what the engine says of itself, and how old that is",
    "any key goes back",
];

/// A column: its title, its width, its rank.
struct Column {
    title: &'static str,
    width: u16,
    rank: u8,
    cell: fn(&Row<'_>) -> String,
}

/// What the cells of a backend are made of.
struct Row<'a> {
    backend: &'a Backend,
    lately: Option<Done>,
    minute: Option<Done>,
    /// What full bars stand for.
    most_pending: u64,
}

const COLUMNS: [Column; 15] = [
    Column { title: "state", width: 8, rank: 0, cell: |row| state(row.backend).to_owned() },
    Column { title: "", width: 8, rank: 4, cell: |row| bar(part_of(row), 8) },
    Column { title: "pending", width: 7, rank: 0, cell: |row| maybe(row.backend.pending_tokens, tokens) },
    Column { title: "active", width: 6, rank: 1, cell: |row| maybe(row.backend.active_requests, tokens) },
    Column { title: "context", width: 7, rank: 7, cell: |row| maybe(row.backend.context_tokens, tokens) },
    Column { title: "", width: 8, rank: 5, cell: |row| bar(row.backend.share.unwrap_or(0.0), 8) },
    Column { title: "share", width: 6, rank: 0, cell: |row| maybe(row.backend.share, percent) },
    Column { title: "req/s", width: 6, rank: 1, cell: |row| maybe(row.lately.map(|d| d.rate()), rate) },
    Column { title: "TTFT", width: 7, rank: 0, cell: |row| maybe(row.lately.and_then(|d| d.wait()), wait) },
    Column {
        title: "fail",
        width: 6,
        rank: 3,
        cell: |row| maybe(row.minute.and_then(|d| d.failed()), percent),
    },
    Column {
        title: "cached",
        width: 6,
        rank: 6,
        cell: |row| maybe(row.minute.and_then(|d| d.cached()), percent),
    },
    Column { title: "run", width: 4, rank: 2, cell: |row| maybe(engine(row).running, tokens) },
    Column { title: "wait", width: 4, rank: 2, cell: |row| maybe(engine(row).waiting, tokens) },
    Column { title: "KV", width: 5, rank: 2, cell: |row| maybe(engine(row).kv_usage, percent) },
    Column { title: "age", width: 6, rank: 8, cell: |row| maybe(engine(row).age_seconds, age) },
];

/// Draws the whole screen.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let area = frame.area();
    let choices = if area.height >= 18 { CHOICES.min(area.height / 3) } else { 0 };
    let parts =
        [Constraint::Length(1), Constraint::Min(0), Constraint::Length(choices), Constraint::Length(1)];
    let [head, middle, below, foot] = Layout::vertical(parts).areas(area);
    frame.render_widget(Paragraph::new(head_line(view, head.width)), head);
    let (lines, selected) = table(view, middle.width);
    let most = u16::try_from(lines.len()).unwrap_or(u16::MAX).saturating_sub(middle.height);
    // The selected row is kept off the edges, so that one sees where one goes.
    let skipped = u16::try_from(selected).unwrap_or(u16::MAX).saturating_sub(middle.height / 2).min(most);
    frame.render_widget(Paragraph::new(lines).scroll((skipped, 0)), middle);
    frame.render_widget(Paragraph::new(choice_lines(view, below)), below);
    frame.render_widget(Paragraph::new(foot_line(view)), foot);
    if view.mode == Mode::Help {
        let lines: Vec<Line<'_>> = HELP.into_iter().map(Line::from).collect();
        popup(frame, " help ", lines);
    }
}

/// How many lines show everything there is.
pub(super) fn height(view: &View) -> u16 {
    let lines = table(view, u16::MAX).0.len() + usize::from(CHOICES) + 2;
    u16::try_from(lines).unwrap_or(u16::MAX).clamp(27, 1000)
}

fn head_line(view: &View, width: u16) -> Line<'static> {
    let status = &view.seen.status;
    let soft = soft();
    let mut spans = vec![Span::styled(format!("plimsoll {}", status.version), bold())];
    let mut fact = |name: &str, value: String, style: Style| {
        spans.push(Span::styled(format!("  {name} "), soft));
        spans.push(Span::styled(value, style));
    };
    let lost = view.trouble.as_ref().filter(|_| view.age.is_none_or(|age| age > STALE));
    if let Some(why) = lost {
        let since =
            view.age.map_or_else(|| "never an answer".to_owned(), |s| format!("no answer for {}", age(s)));
        fact(&format!("{since} from {}:", view.whom), why.clone(), colour(view, Color::Red).patch(bold()));
        return Line::from(spans);
    }
    if view.age.is_none() {
        fact("asking", view.whom.clone(), Style::default());
        return Line::from(spans);
    }
    fact("up for", maybe(status.uptime_seconds, age), Style::default());
    fact("in flight", maybe(status.in_flight, tokens), Style::default());
    if let Some(reload) = &status.reload {
        let style = if reload.ok { Style::default() } else { colour(view, Color::Red) };
        let said = reload.said.lines().next().unwrap_or_default();
        let ok = if reload.ok { "ok" } else { "failed" };
        fact("reload", format!("{ok} {} ago: {said}", age(reload.ago_seconds)), style);
    }
    let state = if view.paused { "paused" } else { "" };
    let used: usize = spans.iter().map(Span::width).sum();
    let gap = usize::from(width).saturating_sub(used + state.len());
    spans.push(Span::raw(" ".repeat(gap)));
    spans.push(Span::styled(state, colour(view, Color::Yellow).patch(bold())));
    Line::from(spans)
}

/// The lines of all upstreams, and which of them is the selected one.
fn table(view: &View, width: u16) -> (Vec<Line<'static>>, usize) {
    let rows = view.rows();
    let addresses = rows.iter().flat_map(|(_, backends)| backends).map(|b| b.address.chars().count());
    let address_width = addresses.max().unwrap_or(0).max(7);
    let columns = columns(width, address_width);
    let stale = view.age.is_none_or(|age| age > STALE) && view.trouble.is_some();
    let dim = if stale { Style::default().add_modifier(Modifier::DIM) } else { Style::default() };
    let (mut lines, mut selected) = (Vec::new(), 0);
    for (name, backends) in rows {
        lines.push(Line::default());
        lines.push(upstream_line(view, name, &backends).patch_style(dim));
        let titles = columns.iter().fold(format!("  {:<address_width$}", "backend"), |line, column| {
            line + &cell(column, column.title)
        });
        lines.push(Line::styled(titles, soft()));
        let pending = backends.iter().filter_map(|b| b.pending_tokens).max().unwrap_or(0);
        for backend in backends {
            let row = Row {
                backend,
                lately: view.seen.lately(name, &backend.address),
                minute: view.seen.done(name, &backend.address, MINUTE),
                most_pending: pending.max(BAR_TOKENS),
            };
            let is_selected = view.is_selected(name, &backend.address);
            if is_selected {
                selected = lines.len();
            }
            let line = backend_line(view, &row, &columns, address_width, is_selected);
            lines.push(line.patch_style(dim));
            lines.extend(
                reason(backend).map(|why| Line::styled(format!("    {why}"), soft()).patch_style(dim)),
            );
        }
    }
    (lines, selected)
}

/// The columns for which there is room beside the address.
fn columns(width: u16, address_width: usize) -> Vec<&'static Column> {
    let mut columns: Vec<&Column> = COLUMNS.iter().collect();
    let used = |columns: &[&Column]| {
        columns.iter().map(|column| usize::from(column.width) + 1).sum::<usize>() + address_width + 2
    };
    while used(&columns) > usize::from(width) {
        let Some(most) = columns.iter().map(|column| column.rank).max().filter(|rank| *rank > 0) else {
            break;
        };
        columns.retain(|column| column.rank < most);
    }
    columns
}

fn upstream_line(view: &View, name: &str, backends: &[&Backend]) -> Line<'static> {
    let upstream = view.seen.status.upstreams.get(name);
    let (policy, queued) = upstream.map_or(("", None), |u| (u.policy.as_str(), u.queued));
    let up = backends.iter().filter(|backend| backend.state == "up").count();
    let (lately, minute) = (view.seen.together_lately(name), view.seen.together(name, MINUTE));
    let mut spans = vec![
        Span::styled(name.to_owned(), bold()),
        Span::styled(format!("  {policy}"), soft()),
        Span::raw(format!("  {up} of {} up", backends.len())),
    ];
    let queue = if queued > Some(0) { colour(view, Color::Yellow).patch(bold()) } else { Style::default() };
    for (name, value, style) in [
        ("req/s", maybe(lately.map(|done| done.rate()), rate), Style::default()),
        ("TTFT", maybe(lately.and_then(|done| done.wait()), wait), Style::default()),
        ("queued", maybe(queued, tokens), queue),
        ("cached", maybe(minute.and_then(|done| done.cached()), percent), Style::default()),
    ] {
        spans.push(Span::styled(format!("  {name} "), soft()));
        spans.push(Span::styled(value, style));
    }
    Line::from(spans)
}

fn backend_line(
    view: &View,
    row: &Row<'_>,
    columns: &[&Column],
    address_width: usize,
    is_selected: bool,
) -> Line<'static> {
    let mark = if is_selected { "> " } else { "  " };
    let mut spans = vec![Span::raw(format!("{mark}{:<address_width$}", row.backend.address))];
    for column in columns {
        let style = match column.title {
            "state" => state_style(view, &row.backend.state),
            "" => colour(view, Color::Blue),
            "fail" if row.minute.and_then(|done| done.failed()) > Some(0.0) => colour(view, Color::Yellow),
            _ => Style::default(),
        };
        spans.push(Span::styled(cell(column, &(column.cell)(row)), style));
    }
    let line = Line::from(spans);
    if is_selected { line.patch_style(Style::default().add_modifier(Modifier::BOLD)) } else { line }
}

/// A cell with the space before it: words and bars to the left, numbers to the right.
fn cell(column: &Column, text: &str) -> String {
    let width = usize::from(column.width);
    if matches!(column.title, "state" | "") { format!(" {text:<width$}") } else { format!(" {text:>width$}") }
}

fn choice_lines(view: &View, area: Rect) -> Vec<Line<'static>> {
    if area.height == 0 {
        return Vec::new();
    }
    let titles =
        format!("  {:>6}  {:<21} {:<11} {:>7} {:>7}  model", "ago", "backend", "reason", "prompt", "matched");
    let mut lines = vec![Line::styled("recent choices", bold()), Line::styled(titles, soft())];
    let line = |choice: &Choice| {
        Line::from(format!(
            "  {:>6}  {:<21} {:<11} {:>7} {:>7}  {}",
            age(choice.ago_seconds),
            choice.backend,
            choice.reason,
            maybe(choice.prompt_tokens, tokens),
            maybe(choice.matched_tokens, tokens),
            choice.model.as_deref().unwrap_or("-"),
        ))
    };
    lines.extend(view.seen.choices.iter().take(usize::from(area.height).saturating_sub(2)).map(line));
    if view.seen.choices.is_empty() {
        lines.push(Line::styled("  none", soft()));
    }
    lines
}

fn foot_line(view: &View) -> Line<'static> {
    let strong = Style::default().add_modifier(Modifier::REVERSED);
    match (&view.mode, &view.said) {
        (Mode::Sure(change), _) => {
            let (verb, then) = if change.drain {
                ("Drain", "it gets no further requests")
            } else {
                ("Undrain", "it gets requests again")
            };
            Line::styled(
                format!(
                    " {verb} {} of {}: {then}. y yes, any other key no ",
                    change.backend, change.upstream
                ),
                strong,
            )
        }
        (_, Some(said)) => Line::styled(format!(" {said} "), strong),
        _ => Line::styled(format!("{KEYS}  (sorted: {})", view.sort.name()), soft()),
    }
}

fn popup(frame: &mut Frame<'_>, title: &'static str, lines: Vec<Line<'static>>) {
    let width = lines.iter().map(Line::width).max().unwrap_or(0) + 4;
    let height = lines.len() + 2;
    let area = frame.area();
    let width = u16::try_from(width).unwrap_or(u16::MAX).min(area.width);
    let height = u16::try_from(height).unwrap_or(u16::MAX).min(area.height);
    let place = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), place);
}

fn state(backend: &Backend) -> &str {
    match backend.state.as_str() {
        "on_trial" => "on trial",
        "" => "-",
        state => state,
    }
}

/// Why a backend is not up, if anything is known of it.
fn reason(backend: &Backend) -> Option<String> {
    if backend.state == "up" {
        return None;
    }
    let since = backend.since_seconds.map(|seconds| format!("for {}", age(seconds)));
    let parts: Vec<String> = backend.reason.clone().into_iter().chain(since).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn state_style(view: &View, state: &str) -> Style {
    match state {
        "up" => colour(view, Color::Green),
        "down" | "ejected" => colour(view, Color::Red).patch(bold()),
        "on_trial" | "draining" => colour(view, Color::Cyan).patch(bold()),
        _ => colour(view, Color::Yellow).patch(bold()),
    }
}

fn colour(view: &View, colour: Color) -> Style {
    if view.colour { Style::default().fg(colour) } else { Style::default() }
}

fn bold() -> Style {
    Style::default().add_modifier(Modifier::BOLD)
}

fn soft() -> Style {
    Style::default().add_modifier(Modifier::DIM)
}

fn engine(row: &Row<'_>) -> super::seen::Engine {
    row.backend.engine.unwrap_or_default()
}

fn part_of(row: &Row<'_>) -> f64 {
    row.backend.pending_tokens.unwrap_or(0) as f64 / row.most_pending as f64
}

/// A bar of eighths of a cell.
fn bar(part: f64, cells: usize) -> String {
    let eighths = (part.clamp(0.0, 1.0) * 8.0 * cells as f64).round() as usize;
    let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    "█".repeat(eighths / 8) + rest
}

fn maybe<T>(value: Option<T>, text: fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

/// A count, short from ten thousand on.
fn tokens(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{:.1}k", count as f64 / 1e3),
        _ => format!("{:.1}M", count as f64 / 1e6),
    }
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

fn rate(per_second: f64) -> String {
    format!("{per_second:.1}")
}

fn wait(seconds: f64) -> String {
    if seconds < 0.9995 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

fn age(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{:.1} s", seconds.max(0.0)),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} m {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} m", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::view::{Change, Sort};
    use super::*;

    fn view(ok: u64, uptime: u32, backends: u32) -> String {
        let backend = |number: u32| {
            let state = match number {
                2 => r#""state":"ejected","reason":"5 failures: connect_refused","since_seconds":42"#,
                3 => r#""state":"on_trial""#,
                _ => r#""state":"up","since_seconds":100"#,
            };
            format!(
                r#"{{"address":"10.0.0.{number}:8000",{state},"pending_tokens":{},"active_requests":{number},
                "context_tokens":12345,"share":0.25,"requests":{{"ok":{ok}}},
                "ttft_seconds":{{"count":{ok},"sum":{}}},"tokens":{{"prompt":{ok},"cached":{}}},
                "engine":{{"running":3,"waiting":1,"kv_usage":0.41,"age_seconds":1.25}}}}"#,
                number * 1000,
                ok as f64 * 0.123,
                ok / 2
            )
        };
        let backends: Vec<String> = (1..=backends).map(backend).collect();
        format!(
            r#"{{"version":"0.1.0","uptime_seconds":{uptime},"pid":7,"in_flight":9,
            "reload":{{"ok":true,"said":"2 upstreams","ago_seconds":61}},
            "upstreams":{{"llama":{{"policy":"least_pending_tokens","queued":2,"backends":[{}]}}}}}}"#,
            backends.join(",")
        )
    }

    fn seen(backends: u32) -> View {
        let mut seen = View { age: Some(0.2), whom: "127.0.0.1:9090".to_owned(), ..View::default() };
        let choice = Choice {
            ago_seconds: 0.5,
            backend: "10.0.0.1:8000".to_owned(),
            reason: "cache".to_owned(),
            model: Some("\u{1b}[31m<img>\u{1b}]0;x\u{7}".to_owned()),
            prompt_tokens: Some(20_480),
            ..Choice::default()
        };
        for (ok, uptime) in [(100, 7200), (150, 7210)] {
            let status = serde_json::from_str(&view(ok, uptime, backends)).unwrap();
            seen.seen.look(status, vec![choice.clone()], 0.0);
        }
        seen
    }

    fn screen(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content.chunks(usize::from(width.max(1)));
        rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned())
            .collect()
    }

    #[test]
    fn a_wide_screen_shows_all_there_is() {
        let lines = screen(&seen(3), 132, 27);
        assert_eq!(
            lines[0],
            "plimsoll 0.1.0  up for 2 h 0 m  in flight 9  reload ok 1 m 1 s ago: 2 upstreams"
        );
        assert_eq!(
            lines[2],
            "llama  least_pending_tokens  1 of 3 up  req/s 15.0  TTFT 123 ms  queued 2  cached 50 %"
        );
        assert_eq!(
            lines[3],
            "  backend       state             pending active context           share  req/s    TTFT   fail cached  \
             run wait    KV    age"
        );
        assert_eq!(
            lines[4],
            "> 10.0.0.1:8000 up       ██▋         1000      1   12.3k ██         25 %    5.0  123 ms    0 %   50 %    \
             3    1  41 %  1.2 s"
        );
        assert!(lines[5].starts_with("  10.0.0.2:8000 ejected  █████▍"), "{}", lines[5]);
        assert_eq!(lines[6], "    5 failures: connect_refused, for 42 s");
        assert!(lines[7].starts_with("  10.0.0.3:8000 on trial ████████"), "{}", lines[7]);
        assert_eq!(lines[17], "recent choices");
        assert_eq!(lines[19], "   0.5 s  10.0.0.1:8000         cache         20.5k       -  [31m<img>]0;x");
        assert!(lines[26].starts_with("q quit"), "{}", lines[26]);
    }

    #[test]
    fn a_narrow_screen_keeps_what_matters_and_the_smallest_is_no_fault() {
        let lines = screen(&seen(3), 80, 24);
        let words: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(
            words,
            ["backend", "state", "pending", "active", "share", "req/s", "TTFT", "run", "wait", "KV"]
        );
        let words = |width| screen(&seen(3), width, 24)[3].split_whitespace().count();
        assert_eq!((words(50), words(20)), (5, 2));
        for (width, height) in [(0, 0), (1, 1), (3, 2), (20, 3), (300, 100)] {
            let mut view = seen(64);
            screen(&view, width, height);
            view.mode = Mode::Help;
            screen(&view, width, height);
        }
    }

    #[test]
    fn the_selected_row_is_in_sight() {
        let mut view = seen(64);
        for number in [1, 30, 64] {
            let address = format!("10.0.0.{number}:8000");
            view.selected = Some(("llama".to_owned(), address.clone()));
            let lines = screen(&view, 100, 20);
            assert!(lines.iter().any(|line| line.starts_with(&format!("> {address}"))), "{lines:#?}");
        }
        assert!(usize::from(height(&view)) >= 64);
    }

    #[test]
    fn a_process_that_does_not_answer_is_said_to() {
        let mut view = seen(1);
        (view.trouble, view.age) = (Some("connection refused".to_owned()), Some(2.0));
        assert!(screen(&view, 120, 24)[0].contains("up for"), "one answer that is missing is none yet");
        view.age = Some(75.0);
        let lines = screen(&view, 120, 24);
        assert_eq!(
            lines[0],
            "plimsoll 0.1.0  no answer for 1 m 15 s from 127.0.0.1:9090: connection refused"
        );
        assert!(lines[4].contains("10.0.0.1:8000 up"), "what was known stays");
        let never = View { trouble: view.trouble, whom: "unix:a".to_owned(), ..View::default() };
        assert_eq!(screen(&never, 80, 24)[0], "plimsoll   never an answer from unix:a: connection refused");
    }

    #[test]
    fn a_question_takes_the_last_line_and_colour_is_used_only_where_it_is_wanted() {
        let mut view = seen(3);
        let change =
            Change { drain: true, upstream: "llama".to_owned(), backend: "10.0.0.1:8000".to_owned() };
        (view.mode, view.paused, view.sort) = (Mode::Sure(change), true, Sort::Wait);
        let lines = screen(&view, 120, 24);
        assert!(lines[23].starts_with(" Drain 10.0.0.1:8000 of llama: it gets no further requests. y yes"));
        assert!(lines[0].ends_with("paused"));
        for colour in [false, true] {
            view.colour = colour;
            let mut terminal = Terminal::new(TestBackend::new(120, 24)).unwrap();
            terminal.draw(|frame| draw(frame, &view)).unwrap();
            let coloured = terminal.backend().buffer().content.iter().any(|cell| cell.fg != Color::Reset);
            assert_eq!(coloured, colour);
        }
    }
}
