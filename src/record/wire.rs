//! Finds the statements in what a session sends, and has those that change a server written down before they are sent.
//!
//! The messages are as in "Message Formats" of the manual: after the start-up message, a byte that says what it is, four of its
//! length (which counts itself), and the rest. Only `Query` and `Parse` carry a statement; all others are passed over by their length.

use super::{Recorded, STATEMENT_BYTES_MAX};
use crate::apply::ddl::statement::{Statement, split};
use crate::record::plan::{self, REPLICATED, SCHEMA};

/// Stands before what the target repeats of the source's DDL, so that it is known for that.
pub(crate) const REPLICATED_MARK: &str = "/* replicated DDL */ ";

/// As much of a statement is looked at.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// What a session is in the middle of sending.
pub(crate) struct Scanner {
    recorded: Recorded,
    state: State,
    /// Bytes that were looked at and not sent: the transport took fewer than it was given.
    ahead: usize,
}

enum State {
    /// The start-up message has no first byte.
    Length(Header),
    Header(Header),
    /// Bytes to pass over.
    Skip(usize),
    /// A statement: bytes to come, and whether it is a `Parse`.
    Text {
        left: usize,
        text: Vec<u8>,
        is_parse: bool,
    },
}

/// The beginning of a message, as far as it is there.
#[derive(Default)]
struct Header {
    bytes: [u8; 5],
    filled: usize,
}

impl Header {
    /// Takes what it lacks; answers how much that was, and the whole once it is there.
    fn fill(&mut self, bytes: &[u8], wanted: usize) -> (usize, Option<[u8; 5]>) {
        let taken = bytes.len().min(wanted - self.filled);
        self.bytes[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        (taken, (self.filled == wanted).then_some(self.bytes))
    }
}

impl Scanner {
    /// At the beginning of a session.
    pub(crate) fn new(recorded: Recorded) -> Scanner {
        Scanner { recorded, state: State::Length(Header::default()), ahead: 0 }
    }

    /// Before bytes are given to the transport.
    pub(crate) fn before(&mut self, buffer: &[u8]) {
        let fresh = buffer.get(self.ahead..).unwrap_or_default();
        self.ahead = self.ahead.max(buffer.len());
        self.look(fresh);
    }

    /// The transport took so many of them.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.ahead = self.ahead.saturating_sub(bytes);
    }

    fn look(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Skip(left) => {
                    let taken = bytes.len().min(*left);
                    *left -= taken;
                    bytes = &bytes[taken..];
                    if *left == 0 {
                        self.state = State::Header(Header::default());
                    }
                }
                State::Length(header) => {
                    let (taken, whole) = header.fill(bytes, 4);
                    bytes = &bytes[taken..];
                    if let Some([a, b, c, d, _]) = whole {
                        self.skip(u32::from_be_bytes([a, b, c, d]));
                    }
                }
                State::Header(header) => {
                    let (taken, whole) = header.fill(bytes, 5);
                    bytes = &bytes[taken..];
                    if let Some([tag, a, b, c, d]) = whole {
                        let length = u32::from_be_bytes([a, b, c, d]);
                        match tag {
                            b'Q' | b'P' if length > 4 => {
                                let left = length as usize - 4;
                                self.state = State::Text { left, text: Vec::new(), is_parse: tag == b'P' };
                            }
                            _ => self.skip(length),
                        }
                    }
                }
                State::Text { left, text, is_parse } => {
                    let taken = bytes.len().min(*left);
                    let room = TEXT_BYTES_MAX.saturating_sub(text.len());
                    text.extend_from_slice(&bytes[..taken.min(room)]);
                    *left -= taken;
                    bytes = &bytes[taken..];
                    if *left == 0 {
                        let (text, is_parse) = (std::mem::take(text), *is_parse);
                        self.state = State::Header(Header::default());
                        self.message(&text, is_parse);
                    }
                }
            }
        }
    }

    fn skip(&mut self, length: u32) {
        let left = (length as usize).saturating_sub(4);
        self.state = if left == 0 { State::Header(Header::default()) } else { State::Skip(left) };
    }

    fn message(&self, payload: &[u8], is_parse: bool) {
        let mut texts = payload.split(|&byte| byte == 0);
        let text = if is_parse { texts.nth(1) } else { texts.next() };
        let text = String::from_utf8_lossy(text.unwrap_or_default());
        if let Some(replicated) = text.strip_prefix(REPLICATED_MARK) {
            return self.recorded.statement(&REPLICATED, || shown(replicated, &[], true));
        }
        let Some(statements) = split(&text) else {
            // Cut off at its end, or hostile: by its beginning it is told all the same.
            return self.unsplit(&text);
        };
        let mut is_schema_item = false;
        for statement in &statements {
            let tokens: Vec<&str> = statement.tokens.iter().map(|(_, token)| token.as_str()).collect();
            is_schema_item |= tokens.starts_with(&["SET", "LOCAL", "CHECK_FUNCTION_BODIES"]);
            let Some(kind) = plan::classify(self.recorded.server, &tokens, is_schema_item) else { continue };
            self.recorded.statement(kind, || of(statement, kind.redact));
        }
    }

    fn unsplit(&self, text: &str) {
        let words: Vec<String> = text.split_whitespace().take(8).map(str::to_uppercase).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if let Some(kind) = plan::classify(self.recorded.server, &words, false) {
            let kind = if text.contains("check_function_bodies") { &SCHEMA } else { kind };
            self.recorded.statement(kind, || format!("{} …", words.get(..3).unwrap_or(&words).join(" ")));
        }
    }
}

/// A statement for the record: in one line, cut where it is long, and without constants where they are not ours.
fn of(statement: &Statement<'_>, redact: bool) -> String {
    shown(statement.text, &statement.tokens, redact)
}

fn shown(text: &str, tokens: &[(std::ops::Range<usize>, String)], redact: bool) -> String {
    let split_here;
    let tokens = if tokens.is_empty() {
        split_here = split(text).and_then(|all| all.into_iter().next()).map(|statement| statement.tokens);
        split_here.as_deref().unwrap_or_default()
    } else {
        tokens
    };
    let mut out = String::new();
    let mut last_end = None;
    for (range, token) in tokens {
        if last_end.is_some_and(|end| range.start > end) {
            out.push(' ');
        }
        last_end = Some(range.end);
        let is_constant = token.starts_with('\'') || token.starts_with("E'");
        let body_tag = token.strip_prefix('$').and_then(|rest| rest.split_once('$')).map(|(tag, _)| tag);
        match body_tag {
            Some(tag) => out.push_str(&format!("${tag}$ … ${tag}$")),
            None if is_constant && redact => out.push_str("'…'"),
            None => out.push_str(&text.get(range.clone()).unwrap_or_default().replace(['\n', '\r'], " ")),
        }
        if out.len() > STATEMENT_BYTES_MAX {
            let end = (0..=STATEMENT_BYTES_MAX).rev().find(|&at| out.is_char_boundary(at)).unwrap_or_default();
            out.truncate(end);
            out.push('…');
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Entry, Recorder, Server, What, merged, read};
    use super::*;

    fn message(tag: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32 + 4).to_be_bytes();
        [&[tag][..], &length, payload].concat()
    }

    fn session() -> Vec<u8> {
        [
            // Start-up: its length, then whatever it says.
            &[0, 0, 0, 12, 0, 3, 0, 0, b'Q', 0, 0, 9][..],
            &message(b'p', b"Qsecret\0"),
            &message(b'Q', b"BEGIN; SELECT 1; CREATE PUBLICATION \"p;x\" FOR TABLE a; COMMIT\0"),
            &message(b'd', b"Q\0\0\0\x05DROP TABLE a"),
            &message(b'P', b"name\0SELECT pg_catalog.pg_drop_replication_slot($1)\0\0\0"),
            &message(b'B', b"\0name\0"),
            &message(b'S', b""),
            &message(b'Q', b"SET LOCAL check_function_bodies = false;\nCREATE SERVER s OPTIONS (password 'hunter2');UPDATE walferry.x SET y = 1\0"),
            &message(b'X', b""),
        ]
        .concat()
    }

    fn recorded(entries: &[Entry]) -> Vec<(String, String)> {
        let of = |entry: &Entry| match &entry.what {
            What::Statement { kind, statement, .. } => Some((kind.clone(), statement.clone())),
            _ => None,
        };
        entries.iter().filter_map(of).collect()
    }

    #[test]
    fn statements_are_found_however_the_bytes_are_cut_and_however_few_are_taken() {
        let bytes = session();
        for piece in 1..60 {
            let directory = tempfile::tempdir().unwrap();
            let recorder = Recorder::at(directory.path());
            recorder.open();
            let mut scanner = Scanner::new(recorder.of(Server::Target));
            let mut at = 0;
            while at < bytes.len() {
                let given = &bytes[at..bytes.len().min(at + piece)];
                scanner.before(given);
                // A transport that takes a part, or nothing at all.
                let taken = given.len().div_ceil(2).max(1);
                scanner.before(given);
                scanner.sent(taken);
                at += taken;
            }
            let found = recorded(&merged(read(directory.path()).unwrap()));
            let expected = [
                ("publication", "CREATE PUBLICATION \"p;x\" FOR TABLE a"),
                ("slot", "SELECT pg_catalog.pg_drop_replication_slot($1)"),
                ("schema item", "CREATE SERVER s OPTIONS (password '…')"),
            ];
            assert_eq!(found, expected.map(|(kind, text)| (kind.to_owned(), text.to_owned())), "by {piece}");
        }
    }

    #[test]
    fn what_cannot_be_split_is_recorded_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::at(directory.path());
        recorder.open();
        let mut scanner = Scanner::new(recorder.of(Server::Source));
        scanner.state = State::Header(Header::default());
        scanner.before(&message(b'Q', b"DROP TABLE a 'never ends\0"));
        assert_eq!(recorded(&read(directory.path()).unwrap()), [("unplanned".to_owned(), "DROP TABLE A …".to_owned())]);
    }
}
