//! A source file as a row of tokens, so that comments and strings do not count and a path broken over two lines does.
//!
//! Not a parser: rules about paths, names, brackets and attributes need no more than this, and it depends on nothing.

use std::ops::Range;

/// One file.
pub struct Source {
    /// Relative to the repository, with `/`.
    pub path: String,
    /// As it is written.
    pub text: String,
    /// As it is meant.
    pub tokens: Vec<Token>,
}

/// A word, a lifetime, `::`, a literal (shown as `""`) or one other character; comments are none.
#[derive(Clone, Debug)]
pub struct Token {
    /// From 1.
    pub line: usize,
    /// Itself.
    pub text: String,
    /// It belongs to an item under `#[cfg(test)]`.
    pub test: bool,
}

impl Source {
    /// The file at `path`, which says `text`.
    pub fn new(path: &str, text: &str) -> Self {
        let mut tokens = tokens(text);
        mark_tests(&mut tokens);
        Self { path: path.to_owned(), text: text.to_owned(), tokens }
    }

    /// `what` is wrong at `line`.
    pub fn fault(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }

    /// `src/room.rs` and `src/room/...` are of `room`.
    pub fn room(&self) -> &str {
        let below = self.path.strip_prefix("src/").unwrap_or(&self.path);
        below.split('/').next().unwrap_or_default().trim_end_matches(".rs")
    }

    /// What `super::super::x` names, where the `super`s lead to the root of the crate.
    pub fn children_by_super(&self) -> Vec<Token> {
        let below = self.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
        let depth = below.split('/').count();
        let inline = self.named(&["mod"]).into_iter().map(|(at, _)| at + 2).filter(|at| self.is(*at, "{"));
        let inline: Vec<_> = inline.filter_map(|at| Some(at..closing(&self.tokens, at)?)).collect();
        let starts = self.find(&["super", "::"]).into_iter().filter(|at| *at == 0 || !self.is(at - 1, "::"));
        let rooms = starts.flat_map(|at| {
            let supers = (at..).step_by(2).take_while(|next| self.is(*next, "super")).count();
            let at_root = supers == depth + inline.iter().filter(|module| module.contains(&at)).count();
            if at_root { self.below(at + 2 * supers) } else { Vec::new() }
        });
        rooms.map(|at| self.tokens[at].clone()).collect()
    }

    /// What stands directly below the path `parent`, written as `parent::x` or `parent::{x, y::z}`.
    pub fn children(&self, parent: &str) -> Vec<Token> {
        let pattern: Vec<&str> = parent.split("::").flat_map(|name| [name, "::"]).collect();
        let mut children = Vec::new();
        // Below a group, `std::{sync::Mutex}`, the path is continued within it.
        if let Some((grandparent, name)) = parent.rsplit_once("::") {
            let groups = self.group_members(grandparent);
            let within =
                groups.into_iter().filter(|at| self.tokens[*at].text == name && self.is(at + 1, "::"));
            for at in within {
                children.extend(self.below(at + 2));
            }
        }
        for at in self.find(&pattern) {
            let continued = at > 0 && self.tokens[at - 1].text == "::";
            if !continued {
                children.extend(self.below(at + pattern.len()));
            }
        }
        children.into_iter().map(|at| self.tokens[at].clone()).collect()
    }

    fn group_members(&self, parent: &str) -> Vec<usize> {
        let pattern: Vec<&str> = parent.split("::").flat_map(|name| [name, "::"]).chain(["{"]).collect();
        self.find(&pattern).into_iter().flat_map(|at| self.below(at + pattern.len() - 1)).collect()
    }

    /// The word at `at`, or the first words of the members of the group that begins there.
    fn below(&self, at: usize) -> Vec<usize> {
        if !self.is(at, "{") {
            return if at < self.tokens.len() { vec![at] } else { Vec::new() };
        }
        let mut members = Vec::new();
        let mut depth = 0usize;
        for index in at..self.tokens.len() {
            match self.tokens[index].text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            let begins = depth == 1 && ["{", ","].contains(&self.tokens[index].text.as_str());
            if begins && !self.is(index + 1, "}") && !self.is(index + 1, "self") {
                members.push(index + 1);
            }
        }
        members
    }

    fn is(&self, at: usize, text: &str) -> bool {
        self.tokens.get(at).is_some_and(|token| token.text == text)
    }

    /// Where `pattern` stands.
    pub fn find(&self, pattern: &[&str]) -> Vec<usize> {
        let matches = |window: &[Token]| window.iter().zip(pattern).all(|(token, want)| token.text == *want);
        let windows = self.tokens.windows(pattern.len()).enumerate();
        windows.filter(|(_, window)| matches(window)).map(|(at, _)| at).collect()
    }

    /// The names that follow one of `keywords`, with the place of the keyword.
    pub fn named(&self, keywords: &[&str]) -> Vec<(usize, &str)> {
        let is_name = |text: &str| text.starts_with(|c: char| c.is_alphabetic() || c == '_');
        let pairs = self.tokens.windows(2).enumerate();
        pairs
            .filter(|(_, pair)| keywords.contains(&pair[0].text.as_str()) && is_name(&pair[1].text))
            .map(|(at, pair)| (at, pair[1].text.as_str()))
            .collect()
    }

    /// What is inside the brackets of each attribute.
    pub fn attributes(&self) -> Vec<Range<usize>> {
        let starts = self.find(&["#", "["]).into_iter().map(|at| at + 2);
        let inner = self.find(&["#", "!", "["]).into_iter().map(|at| at + 3);
        let whole = |start| Some(start..closing(&self.tokens, start - 1)?);
        starts.chain(inner).filter_map(whole).filter(|range| !range.is_empty()).collect()
    }
}

/// Where the bracket at `at` is closed.
fn closing(tokens: &[Token], at: usize) -> Option<usize> {
    let mut depth = 0usize;
    (at..tokens.len()).find(|index| {
        match tokens[*index].text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0
    })
}

/// Where the item that begins at `at` ends: at a semicolon outside of brackets, or with its first braces.
pub fn item_end(tokens: &[Token], at: usize) -> Option<usize> {
    let mut index = at;
    loop {
        match tokens.get(index)?.text.as_str() {
            ";" => return Some(index),
            "{" => return closing(tokens, index),
            "(" | "[" => index = closing(tokens, index)? + 1,
            _ => index += 1,
        }
    }
}

fn mark_tests(tokens: &mut [Token]) {
    let attribute = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut at = 0;
    while at + attribute.len() <= tokens.len() {
        let found = tokens[at..].iter().zip(attribute).all(|(token, want)| token.text == want);
        match found.then(|| item_end(tokens, at + attribute.len())).flatten() {
            Some(end) => {
                tokens[at..=end].iter_mut().for_each(|token| token.test = true);
                at = end;
            }
            None => at += 1,
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let (length, kept) = token(rest, first);
        let (taken, after) = rest.split_at(length);
        match kept {
            Kept::Word => tokens.push(Token { line, text: taken.to_owned(), test: false }),
            Kept::Literal => tokens.push(Token { line, text: "\"\"".to_owned(), test: false }),
            Kept::Nothing => {}
        }
        line += taken.matches('\n').count();
        rest = after;
    }
    tokens
}

/// What becomes of a piece of text.
enum Kept {
    Word,
    Literal,
    Nothing,
}

/// The length of the piece at the beginning of `rest`, and what becomes of it.
fn token(rest: &str, first: char) -> (usize, Kept) {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    if first.is_whitespace() {
        return (first.len_utf8(), Kept::Nothing);
    }
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), Kept::Nothing);
    }
    if rest.starts_with("/*") {
        return (block_comment(rest), Kept::Nothing);
    }
    if let Some(length) = literal(rest) {
        return (length, Kept::Literal);
    }
    if rest.starts_with("::") {
        return (2, Kept::Word);
    }
    // A lifetime, since it is no literal.
    let quote = usize::from(first == '\'');
    let word = rest[quote..].find(|c| !is_word(c)).unwrap_or(rest.len() - quote);
    (if word == 0 { first.len_utf8() } else { quote + word }, Kept::Word)
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        match &rest.as_bytes()[at..(at + 2).min(rest.len())] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// The length of the string or character at the beginning of `rest`, if there is one.
fn literal(rest: &str) -> Option<usize> {
    let prefix = rest.find(|c: char| !"bcr".contains(c)).filter(|length| *length <= 2)?;
    let raw = rest[..prefix].contains('r');
    let body = &rest[prefix..];
    if raw {
        let hashes = body.find(|c| c != '#')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let inside = body[hashes..].strip_prefix('"')?;
        return Some(prefix + hashes + 1 + inside.find(&end)? + end.len());
    }
    let quote = body.chars().next().filter(|c| ['"', '\''].contains(c))?;
    let mut escaped = false;
    for (at, c) in body.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return Some(prefix + at + 1),
            // `'a` without a second quote after one character is a lifetime.
            _ if quote == '\''
                && !body[at + c.len_utf8()..].starts_with('\'')
                && !body.starts_with("'\\") =>
            {
                return None;
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::tokens;

    #[test]
    fn tokens_are_told_from_comments_strings_and_lifetimes() {
        let text = "a::b /* x /* y */ z */ 'c' '\\'' '\\u{1F6A2}' &'static str // \"\n\
                    r#\"x \" y\"# b\"\\\"\" br\"\\\" r#type 1_0.5 'é'";
        let words: Vec<String> = tokens(text).into_iter().map(|token| token.text).collect();
        let want = "a :: b \"\" \"\" \"\" & 'static str \"\" \"\" \"\" r # type 1_0 . 5 \"\"";
        assert_eq!(words.join(" "), want);
        assert_eq!(tokens("a\n\"\n\n\" b")[2].line, 4);
    }
}
