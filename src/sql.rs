//! The only place where a name or a value becomes SQL text.
//!
//! Every statement that walferry builds from a name goes through these functions; a name is always quoted, so
//! keywords, quotes, newlines and upper case need no special care elsewhere.

use std::fmt::Write;

/// A name as a quoted identifier: `a"b` becomes `"a""b"`.
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A relation, function or type as `"schema"."name"`.
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}

/// Column names as a list of quoted identifiers, separated by commas.
pub fn identifiers<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut list = String::new();
    for name in names {
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.push_str(&identifier(name));
    }
    list
}

/// A value as a string constant that reads the same whatever `standard_conforming_strings` says.
///
/// A NUL byte cannot be in a PostgreSQL string; it is left in place, and the server refuses the statement.
pub fn literal(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 3);
    if value.contains('\\') {
        quoted.push_str(" E");
    }
    let _ = write!(quoted, "'{}'", value.replace('\\', "\\\\").replace('\'', "''"));
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_one_identifier() {
        assert_eq!(identifier("a"), "\"a\"");
        assert_eq!(identifier("a\"; DROP TABLE t; --"), "\"a\"\"; DROP TABLE t; --\"");
        assert_eq!(qualified("Order", "x\ny"), "\"Order\".\"x\ny\"");
        assert_eq!(identifiers(["a", "b c"]), "\"a\", \"b c\"");
    }

    #[test]
    fn hostile_values_stay_one_constant() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("back\\slash'"), " E'back\\\\slash'''");
    }
}
