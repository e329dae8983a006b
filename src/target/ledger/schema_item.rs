//! The schema's statements in the ledger, each marked in the transaction that runs it (H12).

use tokio_postgres::Client;

use crate::error::{Context, Result};

/// A section of the schema, as `pg_restore --section` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Before the rows: types, tables, functions, views.
    PreData,
    /// After the rows: indexes, constraints, triggers, rules.
    PostData,
    /// Of those, what waits for the cutover because it would fire, where rows are written in the origin role (H23).
    AtCutover,
    /// What the cutover leaves to be done while applications are at work again; its name is that of an object in the fingerprint.
    AfterCutover,
}

impl Section {
    /// In the ledger; the first two are as `pg_restore` spells them.
    pub fn name(self) -> &'static str {
        match self {
            Section::PreData => "pre-data",
            Section::PostData => "post-data",
            Section::AtCutover => "at-cutover",
            Section::AfterCutover => "after-cutover",
        }
    }
}

/// A statement (or a few that belong together) of the schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaItem {
    /// Before or after the rows.
    pub section: Section,
    /// What `pg_dump` calls it: `INDEX`, `FK CONSTRAINT`, `TRIGGER` …
    pub kind: String,
    /// Its name, for people.
    pub name: String,
    /// The source's table that it belongs to.
    pub relid: Option<u32>,
    /// The SQL.
    pub statement: String,
}

/// The items of a section that have not been run, in order, with their position.
///
/// # Errors
/// Whatever the server says.
pub async fn pending_items(client: &Client, section: Section) -> Result<Vec<(i32, SchemaItem)>> {
    let rows = client
        .query(
            "SELECT position, kind, name, relid, statement FROM walferry.schema_item WHERE section = $1 AND NOT done ORDER BY position",
            &[&section.name()],
        )
        .await
        .context(|| "reading the ledger's schema".into())?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let relid = row.get::<_, Option<i64>>(3).and_then(|relid| u32::try_from(relid).ok());
            let item = SchemaItem { section, kind: row.get(1), name: row.get(2), relid, statement: row.get(4) };
            (row.get(0), item)
        })
        .collect())
}

/// The statement that marks an item as run, for the transaction that runs it.
pub fn mark_done(position: i32) -> String {
    format!("UPDATE walferry.schema_item SET done = true WHERE position = {position}")
}
