//! Which statement it was: what the client sent can be several, or a call of what ran it. Only what is certain is taken.

use std::ops::Range;

use crate::source::ddl::Told;

/// A statement of what a client sent, or a function ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Statement<'a> {
    pub(crate) text: &'a str,
    /// Words, and single characters of what is neither a word nor in quotes; quoted names and strings count as one, in their quotes.
    pub(crate) tokens: Vec<(Range<usize>, String)>,
}

/// The statement to run on the target: exactly what was run on the source, but for CONCURRENTLY, which no transaction can hold.
///
/// # Errors
/// Why it is not known.
pub fn of(told: &Told) -> Result<String, String> {
    // CREATE TABLE AS: its rows are in the stream.
    if let Some(made) = &told.statement {
        return Ok(made.clone());
    }
    if told.caller.settings.get("standard_conforming_strings").is_some_and(|value| value != "on") {
        return Err("it was run with standard_conforming_strings = off".into());
    }
    let is_nested = !told.context.is_empty();
    let source = if is_nested {
        run_by_plpgsql(&told.context).ok_or("it was run by a function which does not show its text")?
    } else {
        &told.query
    };
    let statements = split(source).ok_or("what was sent cannot be split into statements")?;
    let mut with_tag = statements.iter().filter(|statement| statement.has_tag(&told.tag));
    let found = match (is_nested, statements.len()) {
        (true, 1) => with_tag.next(),
        (true, _) => None,
        (false, _) => with_tag.nth(told.nth.saturating_sub(1)),
    };
    let found = found.ok_or_else(|| format!("what was sent has no such {}", told.tag))?;
    Ok(found.without_concurrently())
}

/// Whether an ALTER of a column's type has a USING clause that can give anything else than a cast of that column.
pub fn has_using(statement: &str) -> bool {
    let Some(tokens) = split(statement).and_then(|mut all| all.pop()).map(|statement| statement.tokens) else {
        return true;
    };
    let words: Vec<&str> = tokens.iter().map(|(_, token)| token.as_str()).collect();
    let is_name =
        |token: &str| token.starts_with(|letter: char| letter.is_alphabetic() || letter == '_' || letter == '"');
    words.iter().enumerate().filter(|(_, word)| **word == "USING").any(|(at, _)| {
        let rest: Vec<&str> = words[at + 1..].iter().copied().take_while(|word| *word != ",").collect();
        let cast = matches!(rest.as_slice(), [name, ":", ":", of, more @ ..]
            if is_name(name) && is_name(of) && more.iter().all(|token| is_name(token) || "()[].".contains(token)
                || token.bytes().all(|byte| byte.is_ascii_digit())));
        // What a text is read as can be the time of the reading: 'now'.
        let of_time = rest.iter().any(|word| ["DATE", "TIME", "TIMETZ", "TIMESTAMP", "TIMESTAMPTZ"].contains(word));
        !cast || of_time
    })
}

/// The text of the statement that PL/pgSQL ran, out of its lines of context. Something that only looks like their end makes a text
/// that is no statement, and is found by that.
fn run_by_plpgsql(context: &str) -> Option<&str> {
    let text = context.strip_prefix("SQL statement \"")?;
    let end = text.find("\"\nPL/pgSQL function ")?;
    Some(&text[..end])
}

impl Statement<'_> {
    /// Whether a statement that begins so has this command tag.
    fn has_tag(&self, tag: &str) -> bool {
        const BETWEEN: [&str; 14] = [
            "OR",
            "REPLACE",
            "UNIQUE",
            "UNLOGGED",
            "CONSTRAINT",
            "RECURSIVE",
            "GLOBAL",
            "LOCAL",
            "TRUSTED",
            "PROCEDURAL",
            "DEFAULT",
            "TEMP",
            "TEMPORARY",
            "CONCURRENTLY",
        ];
        let mut tokens = self.tokens.iter().map(|(_, token)| token.as_str());
        let mut is_first = true;
        tag.split(' ').all(|wanted| {
            let found = loop {
                match tokens.next() {
                    Some(token) if token != wanted && !is_first && BETWEEN.contains(&token) => {}
                    token => break token,
                }
            };
            is_first = false;
            found == Some(wanted)
        })
    }

    fn without_concurrently(&self) -> String {
        let words: Vec<&str> = self.tokens.iter().map(|(_, token)| token.as_str()).collect();
        let is_of_index = |at: usize| at > 1 && words[at - 1] == "INDEX" && matches!(words[0], "CREATE" | "DROP");
        let at = (0..words.len()).find(|&at| words[at] == "CONCURRENTLY" && is_of_index(at));
        match at {
            Some(at) => {
                let place = &self.tokens[at].0;
                format!("{}{}", &self.text[..place.start], &self.text[place.end..])
            }
            None => self.text.to_owned(),
        }
    }
}

/// Splits at the semicolons that end statements; `None` where a quote or a comment does not end.
pub(crate) fn split(source: &str) -> Option<Vec<Statement<'_>>> {
    let mut statements = Vec::new();
    let (mut begin, mut tokens, mut at) = (0, Vec::new(), 0);
    // Within parentheses, and within BEGIN ATOMIC … END, a semicolon ends no statement.
    let (mut parentheses, mut bodies) = (0_usize, 0_usize);
    while at < source.len() {
        let rest = &source[at..];
        let first = rest.chars().next()?;
        let length = if rest.starts_with("--") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        } else if rest.starts_with("/*") {
            at += comment(rest)?;
            continue;
        } else if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        } else if first == '\'' {
            quoted(rest, '\'', false)?
        } else if first == '"' {
            quoted(rest, '"', false)?
        } else if rest.len() > 1 && rest.is_char_boundary(2) && rest[..2].eq_ignore_ascii_case("e'") {
            1 + quoted(&rest[1..], '\'', true)?
        } else if first == '$' && dollar(rest).is_some() {
            let tag = dollar(rest)?;
            tag.len() * 2 + rest[tag.len()..].find(tag)?
        } else if first.is_alphanumeric() || first == '_' {
            rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != '$').unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let token = &rest[..length];
        if token == ";" && parentheses == 0 && bodies == 0 {
            if !tokens.is_empty() {
                statements.push(Statement { text: &source[begin..at], tokens: std::mem::take(&mut tokens) });
            }
            at += length;
            begin = at;
            continue;
        }
        let is_quoted = first == '"' || first == '\'' || first == '$';
        let token = if is_quoted { token.to_owned() } else { token.to_uppercase() };
        match token.as_str() {
            "(" => parentheses += 1,
            ")" => parentheses = parentheses.checked_sub(1)?,
            "ATOMIC" if tokens.last().is_some_and(|(_, last): &(Range<usize>, String)| last == "BEGIN") => bodies += 1,
            "CASE" if bodies > 0 => bodies += 1,
            "END" if bodies > 0 => bodies -= 1,
            _ => {}
        }
        if tokens.is_empty() {
            begin = at;
        }
        tokens.push((at - begin..at - begin + length, token));
        at += length;
    }
    if parentheses > 0 || bodies > 0 {
        return None;
    }
    if !tokens.is_empty() {
        statements.push(Statement { text: &source[begin..], tokens });
    }
    Some(statements)
}

/// The length of what begins with a quote.
fn quoted(rest: &str, quote: char, escapes: bool) -> Option<usize> {
    let mut letters = rest.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        if letter == '\\' && escapes {
            letters.next();
        } else if letter == quote && letters.next_if(|(_, next)| *next == quote).is_none() {
            return Some(at + 1);
        }
    }
    None
}

/// The length of a comment; comments nest.
fn comment(rest: &str) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += rest[at..].chars().next()?.len_utf8();
        }
    }
    None
}

/// `$tag$` at the beginning.
fn dollar(rest: &str) -> Option<&str> {
    let end = rest[1..].find('$')? + 2;
    let tag = &rest[1..end - 1];
    let is_tag = tag.chars().all(|letter| letter.is_alphanumeric() || letter == '_')
        && !tag.starts_with(|letter: char| letter.is_ascii_digit());
    is_tag.then_some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(tag: &str, query: &str, nth: usize, context: &str) -> Told {
        let mut told = Told::default();
        (told.tag, told.query, told.nth, told.context) = (tag.into(), query.into(), nth, context.into());
        told
    }

    fn texts(source: &str) -> Option<Vec<String>> {
        split(source).map(|all| all.iter().map(|statement| statement.text.to_owned()).collect())
    }

    #[test]
    fn statements_end_at_semicolons_that_are_not_in_something() {
        let source = "/* ; /* ; */ */ CREATE TABLE \"a;\"(b text DEFAULT ';''' || E'\\';'); -- ;\n \
             DO $a$ x; $b$; $a$;;\nCREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END; SELECT é$1";
        assert_eq!(
            texts(source).unwrap(),
            [
                "CREATE TABLE \"a;\"(b text DEFAULT ';''' || E'\\';')",
                "DO $a$ x; $b$; $a$",
                "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END",
                "SELECT é$1"
            ]
        );
        for torn in ["SELECT 'a", "SELECT \"a", "/* a", "SELECT $$a", "SELECT (a"] {
            assert_eq!(texts(torn), None, "{torn}");
        }
    }

    #[test]
    fn the_statement_is_the_one_with_its_tag_and_number() {
        let several =
            "alter table a add b int; UPDATE a SET b = 1; CREATE UNIQUE INDEX ON a (b);ALTER TABLE a ADD c int";
        assert_eq!(of(&told("ALTER TABLE", several, 1, "")).unwrap(), "alter table a add b int");
        assert_eq!(of(&told("ALTER TABLE", several, 2, "")).unwrap(), "ALTER TABLE a ADD c int");
        assert_eq!(of(&told("CREATE INDEX", several, 1, "")).unwrap(), "CREATE UNIQUE INDEX ON a (b)");
        assert!(of(&told("ALTER TABLE", several, 3, "")).is_err());
        assert!(of(&told("ALTER TABLE", "SELECT f()", 1, "")).is_err());
        let replace = "CREATE OR REPLACE VIEW v AS SELECT 1";
        assert_eq!(of(&told("CREATE VIEW", replace, 1, "")).unwrap(), replace);
    }

    #[test]
    fn what_plpgsql_runs_is_known_by_its_context_and_nothing_else_of_it() {
        let context = "SQL statement \"ALTER TABLE \"a\" ADD b text DEFAULT '\"'\"\nPL/pgSQL function f() line 3 at SQL statement";
        let statement = of(&told("ALTER TABLE", "SELECT f()", 1, context)).unwrap();
        assert_eq!(statement, "ALTER TABLE \"a\" ADD b text DEFAULT '\"'");
        for other in [
            "SQL function \"f\" statement 1",
            "SQL-Anweisung »ALTER TABLE a«",
            "SQL statement \"ALTER TABLE a ADD b int; ALTER TABLE a ADD c int\"\nPL/pgSQL function f() line 3 at EXECUTE",
            "SQL statement \"ALTER TABLE a ADD b text DEFAULT '\"\nPL/pgSQL function '\"\nPL/pgSQL function f() line 3",
        ] {
            assert!(of(&told("ALTER TABLE", "ALTER TABLE a ADD x int", 1, other)).is_err(), "{other}");
        }
    }

    #[test]
    fn concurrently_is_left_out_where_it_is_that_word() {
        let plain = |tag, text| of(&told(tag, text, 1, "")).unwrap();
        assert_eq!(plain("CREATE INDEX", "create index concurrently i on t (a)"), "create index  i on t (a)");
        assert_eq!(plain("DROP INDEX", "DROP INDEX CONCURRENTLY i"), "DROP INDEX  i");
        // Two transactions of its own, which no statement of one does: the target refuses it, and it stops by name.
        let detached = "ALTER TABLE t DETACH PARTITION p CONCURRENTLY";
        assert_eq!(plain("ALTER TABLE", detached), detached);
        let quoted = "CREATE INDEX \"CONCURRENTLY\" ON t (a)";
        assert_eq!(plain("CREATE INDEX", quoted), quoted);
    }

    #[test]
    fn a_using_clause_is_a_cast_or_anything() {
        let alter = |using: &str| has_using(&format!("ALTER TABLE t ALTER a TYPE int{using}, ADD b int"));
        assert!(!alter("") && !alter(" USING a::int") && !alter(" using \"a\"::numeric(3)"));
        assert!(
            alter(" USING a + 1")
                && alter(" USING f(a)::int")
                && alter(" USING a::timestamptz")
                && alter(" USING random()::int")
        );
    }
}
