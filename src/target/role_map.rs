//! `--role-map`: a role of the source has another name on the target.
//!
//! `pg_dump` writes a role's name in few places, and each can be told by the words before it; everything else that may look like one (a
//! table, a column, a text, a function's body) stands elsewhere. So a statement is read token by token, as the server would, and only
//! a name in one of these places is replaced:
//!
//! | in | where |
//! |---|---|
//! | every item | `ALTER … OWNER TO role` |
//! | `ACL`, `DEFAULT ACL` | behind `TO`, `FROM`, `FOR ROLE` and `SET SESSION AUTHORIZATION`, outside of parentheses |
//! | `POLICY` | the list behind `TO`, outside of parentheses |
//! | `USER MAPPING` | behind `FOR` |
//!
//! These words are reserved (`TO`, `FROM`, `FOR`) or stand before one that is: `pg_dump` quotes an object that is called like them.

use super::schema::tokens::tokens;
use crate::sql;

/// An item's statements with the roles of the target. `kind` is what `pg_dump` calls it.
pub fn rename(statement: &str, kind: &str, role_map: &[(String, String)]) -> String {
    let tokens = tokens(statement);
    let mut renamed = String::with_capacity(statement.len());
    let mut copied = 0;
    let mut in_list = false;
    for (at, token) in tokens.iter().enumerate() {
        let before = |back: usize| at.checked_sub(back).map_or("", |at| tokens[at].word.as_str());
        let outside = token.depth == 0;
        let is_role = match kind {
            _ if before(1) == "to" && before(2) == "owner" => true,
            "ACL" | "DEFAULT ACL" => {
                outside
                    && (matches!(before(1), "to" | "from" | "authorization")
                        || before(1) == "role" && before(2) == "for")
            }
            "POLICY" => outside && (before(1) == "to" || in_list && before(1) == ","),
            "USER MAPPING" => before(1) == "for" && before(2) == "mapping",
            _ => false,
        };
        in_list = outside && (is_role || in_list && token.word == ",");
        let mapped = token
            .name
            .as_ref()
            .filter(|_| is_role)
            .and_then(|name| role_map.iter().find(|(source, _)| source == name).map(|(_, target)| target));
        if let Some(target) = mapped {
            renamed.push_str(&statement[copied..token.start]);
            renamed.push_str(&sql::identifier(target));
            copied = token.end;
        }
    }
    renamed.push_str(&statement[copied..]);
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_renamed_where_it_is_one_and_nowhere_else() {
        let map = [("old".to_owned(), "new".to_owned()), ("Old \"Role\"".to_owned(), "it".to_owned())];
        for (kind, before, after) in [
            (
                "TABLE",
                "CREATE TABLE old.old (old text DEFAULT 'OWNER TO old');\n\nALTER TABLE old.old OWNER TO old;",
                "CREATE TABLE old.old (old text DEFAULT 'OWNER TO old');\n\nALTER TABLE old.old OWNER TO \"new\";",
            ),
            ("SCHEMA", "ALTER SCHEMA s OWNER TO \"Old \"\"Role\"\"\";", "ALTER SCHEMA s OWNER TO \"it\";"),
            (
                "FUNCTION",
                "CREATE FUNCTION f() AS $a$ ALTER TABLE t OWNER TO old; $b$ $a$; ALTER FUNCTION f() OWNER TO older;",
                "CREATE FUNCTION f() AS $a$ ALTER TABLE t OWNER TO old; $b$ $a$; ALTER FUNCTION f() OWNER TO older;",
            ),
            (
                "ACL",
                "SET SESSION AUTHORIZATION old;\nGRANT SELECT(old) ON TABLE old.\"to\" TO old WITH GRANT OPTION;\nREVOKE ALL ON FUNCTION f(old) FROM old;",
                "SET SESSION AUTHORIZATION \"new\";\nGRANT SELECT(old) ON TABLE old.\"to\" TO \"new\" WITH GRANT OPTION;\nREVOKE ALL ON FUNCTION f(old) FROM \"new\";",
            ),
            (
                "DEFAULT ACL",
                "ALTER DEFAULT PRIVILEGES FOR ROLE old IN SCHEMA old GRANT SELECT ON TABLES TO old;",
                "ALTER DEFAULT PRIVILEGES FOR ROLE \"new\" IN SCHEMA old GRANT SELECT ON TABLES TO \"new\";",
            ),
            (
                "POLICY",
                "CREATE POLICY old ON old FOR UPDATE TO other, old, \"Old \"\"Role\"\"\" USING ((a SIMILAR TO old) OR (f(a, old)));",
                "CREATE POLICY old ON old FOR UPDATE TO other, \"new\", \"it\" USING ((a SIMILAR TO old) OR (f(a, old)));",
            ),
            (
                "USER MAPPING",
                "CREATE USER MAPPING FOR old SERVER old OPTIONS (\"user\" 'old');",
                "CREATE USER MAPPING FOR \"new\" SERVER old OPTIONS (\"user\" 'old');",
            ),
            (
                "COMMENT",
                "COMMENT ON TABLE t IS E'\\' OWNER TO old'; -- OWNER TO old\n/* OWNER /* */ TO old */",
                "COMMENT ON TABLE t IS E'\\' OWNER TO old'; -- OWNER TO old\n/* OWNER /* */ TO old */",
            ),
        ] {
            assert_eq!(rename(before, kind, &map), after);
        }
    }
}
