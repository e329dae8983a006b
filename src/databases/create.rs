//! Databases that the target lacks, made there as the source has them.
//!
//! `CREATE DATABASE` cannot be part of a transaction, so what follows it (settings, comment, privileges, owner) can be cut off: all of it
//! may run again, and the caller notes beforehand that it is under way ([`super::overview::Member::creating`]).

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::list::Database;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::version::Version;
use crate::sql;
use crate::target::roles::LISTS;
use crate::unstreamed::large_object::Owners;

/// Makes a database, if it is not there, and gives it what the source's has by ALTER DATABASE, COMMENT and GRANT. Answers what the target
/// refused and can do without, a sentence each.
///
/// # Errors
/// `Blocked` when the target cannot make it, with its statement; else whatever the servers say.
pub async fn create(source: &Client, target: &Client, database: &Database, owners: &Owners) -> Result<Vec<String>> {
    let there: bool = target
        .query_typed_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = $1)",
            &[(&database.name, Type::TEXT)],
        )
        .await?
        .get(0);
    if !there {
        let statement = statement(database, Version::of(target).await?);
        target.batch_execute(&statement).await.map_err(|error| {
            let error = Error::from(error).context(format!("creating the database {:?} on the target", database.name));
            match error.is_transient() {
                true => error,
                false => error.with_kind(ErrorKind::Blocked).hint(format!(
                    "Create it by hand, such as it can be there, and run the same command again. What was tried: {statement}"
                )),
            }
        })?;
    }
    let mut said = Vec::new();
    for statement in beside(source, database, owners).await? {
        match target.batch_execute(&statement).await {
            Ok(()) => {}
            Err(error) if error.as_db_error().is_some() => {
                said.push(format!("the target refuses `{statement}`: {}", Error::from(error)));
            }
            Err(error) => return Err(error).context(|| statement),
        }
    }
    Ok(said)
}

/// `CREATE DATABASE`, in the words of the target's version. An older target than the source is refused by the check, so it knows every
/// provider of locales that the source has.
fn statement(database: &Database, target: Version) -> String {
    let value = |value: &str| sql::literal(value).trim_start().to_owned();
    let mut statement = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        sql::identifier(&database.name),
        value(&database.encoding),
        value(&database.collate),
        value(&database.ctype)
    );
    if target.0 >= 15 {
        statement.push_str(&format!(" LOCALE_PROVIDER {}", database.provider));
        let option = if database.provider == "builtin" { "BUILTIN_LOCALE" } else { "ICU_LOCALE" };
        if let Some(locale) = database.locale.as_deref().filter(|_| database.provider != "libc") {
            statement.push_str(&format!(" {option} {}", value(locale)));
        }
        if let Some(rules) = &database.icu_rules {
            statement.push_str(&format!(" ICU_RULES {}", value(rules)));
        }
    }
    if database.connection_limit >= 0 {
        statement.push_str(&format!(" CONNECTION LIMIT {}", database.connection_limit));
    }
    statement
}

/// What the source has for the database besides, as statements. The owner comes last: before, it is ours to grant and to set.
async fn beside(source: &Client, database: &Database, owners: &Owners) -> Result<Vec<String>> {
    let name = sql::identifier(&database.name);
    let role = |role: &str| sql::identifier(owners.role(role));
    let rows = source
        .query_typed(
            // The fence of a migration sets the one that is left out.
            "SELECT 'setting', coalesce(pg_catalog.pg_get_userbyid(nullif(s.setrole, 0))::text, ''), \
                    split_part(c, '=', 1), substr(c, strpos(c, '=') + 1), at \
             FROM pg_catalog.pg_database d JOIN pg_catalog.pg_db_role_setting s ON s.setdatabase = d.oid, unnest(s.setconfig) WITH ORDINALITY c(c, at) \
             WHERE d.datname = $1 AND NOT (s.setrole = 0 AND c LIKE 'default\\_transaction\\_read\\_only=%') \
             UNION ALL \
             SELECT 'grant', CASE WHEN a.grantee = 0 THEN '' ELSE pg_catalog.pg_get_userbyid(a.grantee)::text END, a.privilege_type, \
                    CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END, 0 \
             FROM pg_catalog.pg_database d, pg_catalog.aclexplode(d.datacl) a WHERE d.datname = $1 AND a.grantee <> d.datdba \
             UNION ALL \
             SELECT 'revoke', '', p, '', 0 FROM pg_catalog.pg_database d, unnest(ARRAY['CONNECT', 'TEMPORARY']) p \
             WHERE d.datname = $1 AND d.datacl IS NOT NULL \
               AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(d.datacl) a WHERE a.grantee = 0 AND a.privilege_type = p) \
             ORDER BY 1, 2, 5, 3",
            &[(&database.name, Type::TEXT)],
        )
        .await
        .context(|| format!("reading settings and privileges of the database {:?}", database.name))?;
    let mut statements = Vec::new();
    for row in rows {
        let (kind, whom, what, value): (&str, &str, &str, &str) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let grantee = if whom.is_empty() { "PUBLIC".to_owned() } else { role(whom) };
        match kind {
            "setting" => {
                let value = if LISTS.contains(&what) { value.to_owned() } else { sql::literal(value) };
                let of = match whom {
                    "" => format!("ALTER DATABASE {name}"),
                    whom => format!("ALTER ROLE {} IN DATABASE {name}", role(whom)),
                };
                statements.push(format!("{of} SET {} = {value}", sql::identifier(what)));
            }
            _ if owners.no_privileges => {}
            "grant" => statements.push(format!("GRANT {what} ON DATABASE {name} TO {grantee}{value}")),
            _ => statements.push(format!("REVOKE {what} ON DATABASE {name} FROM PUBLIC")),
        }
    }
    if let Some(comment) = &database.comment {
        statements.push(format!("COMMENT ON DATABASE {name} IS {}", sql::literal(comment)));
    }
    if !owners.no_owner {
        statements.push(format!("ALTER DATABASE {name} OWNER TO {}", role(&database.owner)));
    }
    Ok(statements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_made_in_the_words_of_the_targets_version() {
        let mut database = Database {
            name: "a\"b".into(),
            owner: "o".into(),
            encoding: "UTF8".into(),
            provider: "libc".into(),
            collate: "de_DE.utf8".into(),
            ctype: "C".into(),
            locale: None,
            icu_rules: None,
            connection_limit: -1,
            comment: None,
            bytes: None,
        };
        let common =
            "CREATE DATABASE \"a\"\"b\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'de_DE.utf8' LC_CTYPE 'C'";
        assert_eq!(statement(&database, Version(14)), common);
        assert_eq!(statement(&database, Version(15)), format!("{common} LOCALE_PROVIDER libc"));
        (database.provider, database.locale, database.connection_limit) = ("icu".into(), Some("de".into()), 3);
        let expected = format!("{common} LOCALE_PROVIDER icu ICU_LOCALE 'de' CONNECTION LIMIT 3");
        assert_eq!(statement(&database, Version(16)), expected);
        (database.provider, database.locale) = ("builtin".into(), Some("C.UTF-8".into()));
        assert!(statement(&database, Version(17)).contains("LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"));
    }
}
