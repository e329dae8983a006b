//! Attribute versions, which are one server's own.
//!
//! The minor releases of November 2026 (15.20 and its like) write where in their WAL a column last changed into the column's options,
//! as `pg_attver`. A `pg_dump` of those leaves it out; an older one of any major takes it for an option that somebody has set, and no
//! server takes it back.

use super::tokens::{Token, tokens};

const OPTION: &str = "pg_attver";

/// An item's statements without `pg_attver` among the options of columns; a statement that sets nothing else goes as a whole.
pub(super) fn leave_out(statement: &str) -> String {
    if !statement.contains(OPTION) {
        return statement.to_owned();
    }
    let tokens = tokens(statement);
    let mut kept = String::with_capacity(statement.len());
    let mut copied = 0;
    for (at, token) in tokens.iter().enumerate() {
        if let Some((from, to)) = option(&tokens, at, token) {
            kept.push_str(&statement[copied..from]);
            copied = to;
        }
    }
    kept.push_str(&statement[copied..]);
    kept
}

/// The bytes that go, if a token begins the option in `ALTER … ALTER COLUMN … SET (…)`.
fn option(tokens: &[Token], at: usize, token: &Token) -> Option<(usize, usize)> {
    let word = |at: usize| tokens.get(at).map_or("", |token| token.word.as_str());
    if token.word != OPTION || token.depth != 1 || word(at + 1) != "=" {
        return None;
    }
    let open = (0..at).rev().find(|&before| word(before) == "(")?;
    let begin = (0..open).rev().find(|&before| word(before) == ";").map_or(0, |end| end + 1);
    let is_of_a_column = word(begin) == "alter"
        && word(open.checked_sub(1)?) == "set"
        && tokens[begin..open].windows(2).any(|pair| pair[0].word == "alter" && pair[1].word == "column");
    let (last, close) = (at + 2, at + 3);
    match (word(at - 1), word(close)) {
        _ if !is_of_a_column => None,
        ("(", ")") => {
            let end = tokens.get(close + 1).filter(|token| token.word == ";").unwrap_or(tokens.get(close)?);
            Some((tokens[begin].start, end.end))
        }
        ("(", ",") => Some((token.start, tokens.get(close + 1)?.start)),
        (",", "," | ")") => Some((tokens[at - 1].start, tokens[last].end)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_server_has_noted_of_a_column_is_left_out() {
        let table = "CREATE TABLE public.t (\n    pg_attver integer DEFAULT 'ALTER TABLE t ALTER COLUMN a SET (pg_attver=1);',\n    n integer\n);\n";
        let noted = "ALTER TABLE ONLY public.t ALTER COLUMN pg_attver SET (pg_attver=22158976);\n\
            ALTER TABLE ONLY public.t ALTER COLUMN n SET (pg_attver=22252416, n_distinct=5);\n\
            ALTER TABLE ONLY public.t ALTER COLUMN n SET (n_distinct=5, pg_attver=22252416, n_distinct_inherited=6);\n\
            ALTER TABLE ONLY public.t ALTER COLUMN n SET (n_distinct=5, pg_attver=22252416);\n";
        let kept = "\nALTER TABLE ONLY public.t ALTER COLUMN n SET (n_distinct=5);\n\
            ALTER TABLE ONLY public.t ALTER COLUMN n SET (n_distinct=5, n_distinct_inherited=6);\n\
            ALTER TABLE ONLY public.t ALTER COLUMN n SET (n_distinct=5);\n";
        assert_eq!(leave_out(&format!("{table}{noted}")), format!("{table}{kept}"));
        assert_eq!(leave_out("ALTER TABLE t ALTER COLUMN a SET (pg_attver=1);"), "");
        let check = "ALTER TABLE t ADD CHECK ((pg_attver = 1));\nALTER TABLE t SET (pg_attver=1);\n";
        assert_eq!(leave_out(check), check);
    }
}
