//! Which databases a server has, and what each is.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::scope;

/// Databases in which a managed service keeps its own things, and which no customer may connect to: Amazon's, Azure's and Google's.
const SERVICE_DATABASES: [&str; 6] =
    ["rdsadmin", "azure_maintenance", "azure_sys", "cloudsqladmin", "alloydbadmin", "alloydbmetadata"];

/// A database as `CREATE DATABASE` would make it once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Its owner's.
    pub owner: String,
    /// Such as `UTF8`.
    pub encoding: String,
    /// `libc`, `icu` or `builtin`.
    pub provider: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// The provider's locale, where that is not `libc`.
    pub locale: Option<String>,
    /// Rules beside ICU's locale.
    pub icu_rules: Option<String>,
    /// -1 for none.
    pub connection_limit: i32,
    /// Its comment.
    pub comment: Option<String>,
    /// Bytes on disk; `None` where our role may not connect to it.
    pub bytes: Option<i64>,
}

/// The databases of a server that can be connected to and are no templates, by name: those that a pattern includes (or all), without
/// those that one excludes. Not those of a managed service's own.
///
/// # Errors
/// `Usage` for a pattern that is none, or names nothing; else whatever the server says.
pub async fn databases(client: &Client, include: &[String], exclude: &[String]) -> Result<Vec<Database>> {
    let all = all(client).await?;
    let names: Vec<&str> = all.iter().map(|database| database.name.as_str()).collect();
    let included = matching(client, include, &names).await?;
    let excluded = matching(client, exclude, &names).await?;
    let unmatched: Vec<&str> = [(include, &included), (exclude, &excluded)]
        .into_iter()
        .flat_map(|(patterns, matched)| patterns.iter().zip(matched))
        .filter(|(_, matched)| matched.is_empty())
        .map(|(pattern, _)| pattern.as_str())
        .collect();
    if !unmatched.is_empty() {
        let text = format!("no database of the source's server is named by {}", unmatched.join(", "));
        return Err(Error::new(ErrorKind::Usage, text).hint(format!(
            "Upper case and dots need double quotes, and * stands for any letters. There are: {}.",
            names.join(", ")
        )));
    }
    let names_it = |matched: &[Vec<String>], name: &String| matched.iter().any(|names| names.contains(name));
    Ok(all
        .into_iter()
        .filter(|database| include.is_empty() || names_it(&included, &database.name))
        .filter(|database| !names_it(&excluded, &database.name))
        .collect())
}

/// The names that each pattern names.
async fn matching(client: &Client, patterns: &[String], names: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut matching = Vec::new();
    for pattern in patterns {
        let expression = scope::database_pattern(pattern)?;
        let rows = client
            .query_typed(
                "SELECT n FROM unnest($1) n WHERE n COLLATE pg_catalog.\"default\" OPERATOR(pg_catalog.~) $2",
                &[(&names, Type::TEXT_ARRAY), (&expression, Type::TEXT)],
            )
            .await
            .context(|| format!("matching the pattern {pattern}"))?;
        matching.push(rows.iter().map(|row| row.get(0)).collect());
    }
    Ok(matching)
}

async fn all(client: &Client) -> Result<Vec<Database>> {
    // Columns that not every version has are reached through JSON. A connection limit of -2 is a database whose removal was cut off.
    let rows = client
        .query_typed(
            "SELECT d.datname::text, pg_catalog.pg_get_userbyid(d.datdba)::text, pg_catalog.pg_encoding_to_char(d.encoding)::text, \
                    CASE to_jsonb(d)->>'datlocprovider' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END, \
                    d.datcollate::text, d.datctype::text, coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale'), \
                    to_jsonb(d)->>'daticurules', d.datconnlimit, pg_catalog.shobj_description(d.oid, 'pg_database'), \
                    CASE WHEN pg_catalog.has_database_privilege(d.oid, 'CONNECT') THEN pg_catalog.pg_database_size(d.oid) END \
             FROM pg_catalog.pg_database d \
             WHERE d.datallowconn AND NOT d.datistemplate AND d.datconnlimit <> -2 AND d.datname <> ALL ($1) ORDER BY d.datname COLLATE \"C\"",
            &[(&SERVICE_DATABASES.as_slice(), Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "listing the databases of the server".into())?;
    let database = |row: &tokio_postgres::Row| Database {
        name: row.get(0),
        owner: row.get(1),
        encoding: row.get(2),
        provider: row.get(3),
        collate: row.get(4),
        ctype: row.get(5),
        locale: row.get(6),
        icu_rules: row.get(7),
        connection_limit: row.get(8),
        comment: row.get(9),
        bytes: row.get(10),
    };
    Ok(rows.iter().map(database).collect())
}
