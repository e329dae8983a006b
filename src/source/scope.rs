//! What of a database is moved: the operator's filters, and the relations that they come to.
//!
//! The patterns are those of `pg_dump` and `psql` ("Patterns" in the manual's page of psql): `*` and `?`, letters in lower case
//! unless they are quoted, classes such as `[0-9]`, a dot between schema and table. They are made into regular expressions here, and
//! matched by the server, as `pg_dump` does it.
//!
//! | | rule |
//! |---|---|
//! | included | what a pattern for tables or one for schemas names; everything, where there is neither |
//! | excluded | what a pattern for exclusion names, whatever includes it |
//! | partitions | come and go with their partitioned table; one can be named by itself too |
//! | sequences | come with the tables that own them or take their defaults from them, whatever excludes them |
//! | views | are left out where they read from something that is left out |

mod selection;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::sql;
use crate::timescale::declaration::Hypertable;

pub use selection::{LeftOut, Selection};

/// What is moved, as the operator says it. Fixed when a migration begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scope {
    /// Only tables that one of these patterns names.
    pub include_tables: Vec<String>,
    /// No table that one of these names.
    pub exclude_tables: Vec<String>,
    /// Only schemas that one of these names.
    pub include_schemas: Vec<String>,
    /// No schema that one of these names.
    pub exclude_schemas: Vec<String>,
    /// The target has the tables already, and only rows are moved.
    pub data_only: bool,
    /// Schemas of the source, and what they are called on the target from the cutover on.
    pub map_schemas: Vec<(String, String)>,
    /// Tables that are hypertables on the target.
    pub hypertables: Vec<Hypertable>,
}

/// All of a database with its schema.
pub static WHOLE_DATABASE: Scope = Scope {
    include_tables: Vec::new(),
    exclude_tables: Vec::new(),
    include_schemas: Vec::new(),
    exclude_schemas: Vec::new(),
    data_only: false,
    map_schemas: Vec::new(),
    hypertables: Vec::new(),
};

impl Scope {
    /// Whether something may be left out.
    pub fn is_part(&self) -> bool {
        [&self.include_tables, &self.exclude_tables, &self.include_schemas, &self.exclude_schemas]
            .iter()
            .any(|patterns| !patterns.is_empty())
    }

    /// Whether large objects are moved: they belong to no table, and so to no part.
    pub fn moves_large_objects(&self) -> bool {
        !self.is_part()
    }

    /// Whether the rows of extensions' configuration tables are moved. With --data-only the target has extensions of its own.
    pub fn moves_configuration(&self) -> bool {
        !self.is_part() && !self.data_only
    }

    /// The options that say this, as a person gives them.
    pub fn options(&self) -> String {
        let all = [
            ("--include-table", &self.include_tables),
            ("--exclude-table", &self.exclude_tables),
            ("--include-schema", &self.include_schemas),
            ("--exclude-schema", &self.exclude_schemas),
        ];
        let quoted = |pattern: &String| format!("'{}'", pattern.replace('\'', "'\\''"));
        let mut options: Vec<String> = all
            .into_iter()
            .flat_map(|(option, patterns)| patterns.iter().map(move |pattern| format!("{option} {}", quoted(pattern))))
            .collect();
        if self.data_only {
            options.push("--data-only".to_owned());
        }
        options.extend(
            self.map_schemas.iter().map(|(old, new)| format!("--map-schema {}", quoted(&format!("{old}={new}")))),
        );
        if !self.hypertables.is_empty() {
            let names: Vec<String> = self.hypertables.iter().map(Hypertable::qualified).collect();
            options.push(format!("--hypertables with {}", names.join(", ")));
        }
        options.join(" ")
    }

    /// The statements that give the mapped schemas their names, for the end of a transaction on the target. Views, defaults, constraints
    /// and triggers hold on to what they refer to, whatever it is called.
    pub fn rename_schemas(&self) -> String {
        let rename = |(old, new): &(String, String)| {
            format!("ALTER SCHEMA {} RENAME TO {};", sql::identifier(old), sql::identifier(new))
        };
        self.map_schemas.iter().map(rename).collect::<Vec<_>>().join(" ")
    }

    /// Proves that a later start does not ask for something else. One that says nothing of it goes on with what was recorded.
    ///
    /// # Errors
    /// `Blocked` with both.
    pub fn prove_same(&self, given: &Scope) -> Result<()> {
        if given == self || *given == Scope::default() {
            return Ok(());
        }
        let began = match self.options() {
            options if options.is_empty() => "the whole database".to_owned(),
            options => options,
        };
        let text = format!("this migration began with {began}, and now is given {}", given.options());
        Err(Error::new(ErrorKind::Blocked, text).hint(
            "What is moved is fixed when a migration begins. Leave these options away or give the same; for others begin anew: \
             `walferry clean`, then `walferry migrate`.",
        ))
    }
}

/// A pattern as regular expressions for the server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    /// As it was given.
    text: String,
    /// `None` where it names no schema.
    schema: Option<String>,
    name: String,
}

impl Pattern {
    /// A pattern for tables.
    fn of_table(text: &str, database: &str) -> Result<Pattern> {
        let parts = parts(text);
        match parts.as_slice() {
            [name] => Ok(Pattern { text: text.to_owned(), schema: None, name: anchored(&name.regex) }),
            [schema, name] | [_, schema, name] => {
                same_database(text, parts.len() == 3, &parts[0], database)?;
                Ok(Pattern {
                    text: text.to_owned(),
                    schema: Some(anchored(&schema.regex)),
                    name: anchored(&name.regex),
                })
            }
            _ => Err(too_many_names(text)),
        }
    }

    /// A pattern for schemas.
    fn of_schema(text: &str, database: &str) -> Result<Pattern> {
        let parts = parts(text);
        match parts.as_slice() {
            [name] | [_, name] => {
                same_database(text, parts.len() == 2, &parts[0], database)?;
                Ok(Pattern { text: text.to_owned(), schema: None, name: anchored(&name.regex) })
            }
            _ => Err(too_many_names(text)),
        }
    }
}

/// A pattern for databases, as `pg_dumpall --exclude-database` has them: a regular expression for the server.
///
/// # Errors
/// `Usage` for a pattern with a dot that is not in double quotes.
pub(crate) fn database_pattern(text: &str) -> Result<String> {
    match parts(text).as_slice() {
        [name] => Ok(anchored(&name.regex)),
        _ => Err(Error::new(ErrorKind::Usage, format!("{text} is no pattern for a database"))
            .hint("A dot in a name stands in double quotes: '\"a.b\"'.")),
    }
}

fn too_many_names(text: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("improper qualified name (too many dotted names): {text}"))
        .hint("A pattern is schema.table, or either of them. A dot in a name stands in double quotes.")
}

fn same_database(text: &str, names_one: bool, part: &Part, database: &str) -> Result<()> {
    if !names_one || part.literal == database {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, format!("the pattern {text} names another database than {database}"))
        .hint("A pattern is schema.table. A dot in a name stands in double quotes."))
}

fn anchored(regex: &str) -> String {
    format!("^({regex})$")
}

/// What stands between two dots of a pattern.
#[derive(Default)]
struct Part {
    regex: String,
    /// Without quotes, and folded.
    literal: String,
}

/// Cuts a pattern as `patternToSQLRegex` of PostgreSQL's `fe_utils/string_utils.c` does.
fn parts(pattern: &str) -> Vec<Part> {
    const SPECIAL: &str = "|*+?()[]{}.^$\\";
    let mut parts = vec![Part::default()];
    let mut quoted = false;
    let mut letters = pattern.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == '.' && !quoted {
            parts.push(Part::default());
            continue;
        }
        let last = parts.len() - 1;
        let part = &mut parts[last];
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                // A doubled quote within quotes is one.
                letters.next();
                part.regex.push('"');
                part.literal.push('"');
            }
            '"' => quoted = !quoted,
            '*' if !quoted => {
                part.regex.push_str(".*");
                part.literal.push('*');
            }
            '?' if !quoted => {
                part.regex.push('.');
                part.literal.push('?');
            }
            // A name may have one, and none ends in the middle of a name.
            '$' => {
                part.regex.push_str("\\$");
                part.literal.push('$');
            }
            _ => {
                // `[]` is no class, but part of the name of an array type.
                if quoted && SPECIAL.contains(letter) || !quoted && letter == '[' && letters.peek() == Some(&']') {
                    part.regex.push('\\');
                }
                let folded = if quoted { letter } else { letter.to_ascii_lowercase() };
                part.regex.push(folded);
                part.literal.push(folded);
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> (Option<String>, String) {
        let pattern = Pattern::of_table(text, "shop").unwrap();
        (pattern.schema, pattern.name)
    }

    #[test]
    fn a_pattern_becomes_the_regular_expression_that_psql_makes_of_it() {
        assert_eq!(table("Orders"), (None, "^(orders)$".into()));
        assert_eq!(table("app.log_*"), (Some("^(app)$".into()), "^(log_.*)$".into()));
        assert_eq!(table("a?c"), (None, "^(a.c)$".into()));
        assert_eq!(table("\"Weird.\"\"Name\"\"*\""), (None, "^(Weird\\.\"Name\"\\*)$".into()));
        assert_eq!(table("p20[0-9][0-9]"), (None, "^(p20[0-9][0-9])$".into()));
        assert_eq!(table("a$b"), (None, "^(a\\$b)$".into()));
        assert_eq!(table("a|b.c"), (Some("^(a|b)$".into()), "^(c)$".into()));
        assert_eq!(table("\"a\"B.\"C\"d"), (Some("^(ab)$".into()), "^(Cd)$".into()));
        assert_eq!(table("shop.app.t"), (Some("^(app)$".into()), "^(t)$".into()));
        assert_eq!(table("x[]"), (None, "^(x\\[])$".into()));
    }

    #[test]
    fn another_database_and_too_many_dots_are_refused() {
        assert_eq!(Pattern::of_table("other.app.t", "shop").unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(Pattern::of_table("a.b.c.d", "shop").unwrap_err().kind(), ErrorKind::Usage);
        assert!(Pattern::of_schema("shop.app", "shop").is_ok());
        assert_eq!(Pattern::of_schema("a.b.c", "shop").unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_later_start_may_say_the_same_or_nothing_and_nothing_else() {
        let began = Scope { include_tables: vec!["a.*".into()], ..Scope::default() };
        assert!(began.prove_same(&began.clone()).is_ok());
        assert!(began.prove_same(&Scope::default()).is_ok());
        let other = Scope { exclude_tables: vec!["it's".into()], ..Scope::default() };
        let error = began.prove_same(&other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Blocked);
        assert!(error.to_string().contains("--include-table 'a.*'"), "{error}");
        assert!(Scope::default().prove_same(&other).unwrap_err().to_string().contains("the whole database"));
    }
}
