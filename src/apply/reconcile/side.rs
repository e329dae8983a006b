//! A table as one of the two servers has it now.

use std::collections::BTreeSet;

use tokio_postgres::{Client, Row};

use super::ask;
use crate::error::Result;
use crate::source::version::Version;
use crate::sql;

/// One server's table.
pub(super) struct Side {
    /// Its columns, in order.
    pub facts: Vec<Fact>,
    /// The columns of each unique index that can name a row.
    pub unique: Vec<BTreeSet<String>>,
}

/// One column.
#[derive(Clone, Debug, Default)]
pub(super) struct Fact {
    pub name: String,
    /// `format_type`, schema and all.
    pub type_name: String,
    pub not_null: bool,
    pub default: Option<String>,
    pub is_identity: bool,
    pub is_generated: bool,
    /// What rows have that were there when the column was added (`attmissingval`), as text.
    pub missing: Option<String>,
}

impl Fact {
    /// Whether the default reads as the constant that is the missing value: `5`, `'five'::text`.
    pub fn is_default_missing(&self) -> bool {
        let (Some(default), Some(missing)) = (&self.default, &self.missing) else { return false };
        let constant = match default.strip_prefix('\'').and_then(|rest| rest.rsplit_once("'::")) {
            Some((quoted, _)) => quoted.replace("''", "'"),
            None => default.clone(),
        };
        let is_true = (constant == "true" && missing == "t") || (constant == "false" && missing == "f");
        constant == *missing || is_true
    }
}

impl Side {
    pub fn fact(&self, name: &str) -> Option<&Fact> {
        self.facts.iter().find(|fact| fact.name == name)
    }
}

fn facts(version: Version) -> String {
    let (generated, (missing_value, has_missing)) = (version.generated(), version.missing_value());
    format!(
        "SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, \
            CASE WHEN {generated} = '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) END, \
            a.attidentity <> '', {generated} <> '', \
            CASE WHEN {has_missing} THEN ({missing_value}::text[])[1] END \
         FROM pg_catalog.pg_attribute a \
         LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
         WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
    )
}

fn unique(version: Version) -> String {
    format!(
        "SELECT (SELECT array_agg(a.attname::text) FROM pg_catalog.pg_attribute a \
              WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:{} - 1])) \
         FROM pg_catalog.pg_index i \
         WHERE i.indrelid = $1 AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL",
        version.key_columns()
    )
}

/// A table by its OID; `None` when it is gone.
pub(super) async fn by_relid(client: &Client, relid: u32) -> Result<Option<Side>> {
    let there = ask(client, "SELECT FROM pg_catalog.pg_class WHERE oid = $1", &[&relid]).await?;
    if there.is_empty() {
        return Ok(None);
    }
    let fact = |row: &Row| Fact {
        name: row.get(0),
        type_name: row.get(1),
        not_null: row.get(2),
        default: row.get(3),
        is_identity: row.get(4),
        is_generated: row.get(5),
        missing: row.get(6),
    };
    let version = Version::of(client).await?;
    let facts = ask(client, &facts(version), &[&relid]).await?.iter().map(fact).collect();
    let columns = |row: &Row| row.get::<_, Option<Vec<String>>>(0).unwrap_or_default().into_iter().collect();
    let unique = ask(client, &unique(version), &[&relid]).await?.iter().map(columns).collect();
    Ok(Some(Side { facts, unique }))
}

/// A table by its name; `None` when there is none.
pub(super) async fn by_name(client: &Client, schema: &str, name: &str) -> Result<Option<Side>> {
    let query = "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind = 'r'";
    match ask(client, query, &[&schema, &name]).await?.first() {
        Some(row) => by_relid(client, row.get(0)).await,
        None => Ok(None),
    }
}

/// The partitioned table that a table is a part of, at the top; a column can be changed only there.
pub(super) async fn root(client: &Client, relid: u32) -> Result<Option<String>> {
    // As pg_partition_root does it from 12 on.
    let query = "WITH RECURSIVE above(oid) AS ( \
           SELECT $1::oid UNION ALL SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN above ON i.inhrelid = above.oid \
           JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition) \
         SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = 'p' AND NOT c.relispartition AND c.oid IN (SELECT oid FROM above)";
    Ok(ask(client, query, &[&relid]).await?.first().map(|row| sql::qualified(row.get(0), row.get(1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_default_is_recognised_as_the_missing_value() {
        let is = |default: &str, missing: &str| {
            Fact { default: Some(default.into()), missing: Some(missing.into()), ..Fact::default() }
                .is_default_missing()
        };
        assert!(is("5", "5"));
        assert!(is("'it''s'::text", "it's"));
        assert!(is("true", "t"));
        assert!(!is("7", "5"), "it was set to another afterwards");
        assert!(!is("now()", "2026-01-01 00:00:00+00"), "the rows that were there have the time of the ALTER");
    }
}
