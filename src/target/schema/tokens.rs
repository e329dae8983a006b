//! SQL as `pg_dump` writes it, token by token.

/// Something of a statement that is no white space and no comment.
pub struct Token {
    /// Its first byte.
    pub start: usize,
    /// The byte behind it.
    pub end: usize,
    /// A word that is not quoted, in lower case, or a punctuation mark; empty for anything else.
    pub word: String,
    /// The name that it is, if it can be one.
    pub name: Option<String>,
    /// How many parentheses are open.
    pub depth: usize,
}

/// Reads SQL as the server does with `standard_conforming_strings` on, which `pg_dump` sets ("Lexical Structure" in the manual).
pub fn tokens(text: &str) -> Vec<Token> {
    let bytes = text.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || !byte.is_ascii();
    let mut tokens = Vec::new();
    let (mut at, mut depth) = (0, 0_usize);
    while at < bytes.len() {
        let start = at;
        let rest = &text[at..];
        let (mut word, mut name) = (String::new(), None);
        if bytes[at].is_ascii_whitespace() {
            at += 1;
            continue;
        } else if rest.starts_with("--") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        } else if rest.starts_with("/*") {
            at += comment(rest);
            continue;
        } else if bytes[at] == b'"' {
            at += quoted(rest, b'"', false);
            name = Some(text[start + 1..at.max(start + 2) - 1].replace("\"\"", "\""));
        } else if bytes[at] == b'\'' {
            at += quoted(rest, b'\'', false);
        } else if matches!(bytes[at], b'e' | b'E') && bytes.get(at + 1) == Some(&b'\'') {
            at += 1 + quoted(&rest[1..], b'\'', true);
        } else if let Some(delimiter) = dollar_quote(rest) {
            let body = &rest[delimiter.len()..];
            at += delimiter.len() + body.find(delimiter).map_or(body.len(), |end| end + delimiter.len());
        } else if is_word(bytes[at]) {
            while at < bytes.len() && is_word(bytes[at]) {
                at += 1;
            }
            word = text[start..at].to_ascii_lowercase();
            name = Some(word.clone());
        } else {
            at += 1;
            word = text[start..at].to_owned();
            match bytes[start] {
                b'(' => depth += 1,
                b')' => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        tokens.push(Token { start, end: at, word, name, depth });
    }
    tokens
}

/// How long a quoted text is, with its quotes.
fn quoted(text: &str, quote: u8, with_backslashes: bool) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        let doubled = bytes[at] == quote && bytes.get(at + 1) == Some(&quote);
        if doubled || with_backslashes && bytes[at] == b'\\' {
            at += 2;
        } else if bytes[at] == quote {
            return at + 1;
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// How long a comment is that others may stand in.
fn comment(text: &str) -> usize {
    let (mut at, mut open) = (0, 0_usize);
    while at < text.len() {
        match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => (at, open) = (at + 2, open + 1),
            [b'*', b'/', ..] => (at, open) = (at + 2, open - 1),
            _ => at += 1,
        }
        if open == 0 {
            return at;
        }
    }
    text.len()
}

/// `$$` or `$tag$`, if a text begins with it.
fn dollar_quote(text: &str) -> Option<&str> {
    let tag = text.strip_prefix('$')?;
    let end = tag.find('$')?;
    let is_tag = |character: char| character.is_alphanumeric() || character == '_';
    let begins = tag.chars().next().is_none_or(|first| !first.is_ascii_digit());
    (begins && tag[..end].chars().all(is_tag)).then(|| &text[..end + 2])
}
