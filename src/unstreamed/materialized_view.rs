//! Materialized views: refreshed on the target when they were on the source, and from rows that are at least as new.
//!
//! A view's marker is its file and the counters of its rows: `REFRESH` gives it another file, `REFRESH … CONCURRENTLY` writes rows.
//! Both can change for another reason too (`VACUUM FULL`, a reset of the statistics); then it is refreshed once more than was needed.
//!
//! The order: read the markers on the source; let the apply pass that moment; refresh; write the markers into the ledger. So what the
//! target shows is what the source showed when its marker was read, or newer.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::USER_RELATION;
use crate::source::scope::{Scope, Selection};
use crate::sql;

/// A materialized view of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    schema: String,
    relation: String,
    /// Ready for SQL.
    name: String,
    /// Whether it has rows on the source.
    pub is_populated: bool,
    /// As the catalog's fingerprint names it: `materialized view s.v`, for `--waive`.
    pub object: String,
    marker: String,
}

impl View {
    /// As it is called once schemas have their other names (`--map-schema`).
    #[must_use]
    pub fn renamed(mut self, scope: &Scope) -> View {
        if let Some((_, new)) = scope.map_schemas.iter().find(|(old, _)| *old == self.schema) {
            self.name = sql::qualified(new, &self.relation);
            self.schema.clone_from(new);
        }
        self
    }
}

/// The source's materialized views as they are now, those of a part or all, the older first.
///
/// # Errors
/// Whatever the server says.
pub async fn list(source: &Client, selection: Option<&Selection>) -> Result<Vec<View>> {
    let rows = source
        .query_typed(
            &format!(
                "SELECT n.nspname, c.relname, format('materialized view %I.%I', n.nspname, c.relname), c.relispopulated, \
                        concat_ws('/', c.relispopulated, pg_catalog.pg_relation_filenode(c.oid), pg_catalog.pg_stat_get_tuples_inserted(c.oid), \
                            pg_catalog.pg_stat_get_tuples_updated(c.oid), pg_catalog.pg_stat_get_tuples_deleted(c.oid)), c.oid \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'm' AND {USER_RELATION} ORDER BY c.oid"
            ),
            &[],
        )
        .await
        .context(|| "listing the source's materialized views".into())?;
    let is_moved = |row: &&tokio_postgres::Row| {
        selection.is_none_or(|selection| selection.relations.contains(&row.get::<_, u32>(5)))
    };
    Ok(rows
        .iter()
        .filter(is_moved)
        .map(|row| View {
            schema: row.get(0),
            relation: row.get(1),
            name: sql::qualified(row.get(0), row.get(1)),
            object: row.get(2),
            is_populated: row.get(3),
            marker: row.get(4),
        })
        .collect())
}

/// Those that the target has.
///
/// # Errors
/// Whatever the server says.
pub async fn present(target: &Client, views: Vec<View>) -> Result<Vec<View>> {
    if views.is_empty() {
        return Ok(views);
    }
    let names: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
    let there = target
        .query_typed(
            "SELECT n FROM pg_catalog.unnest($1) n WHERE pg_catalog.to_regclass(n) IN (SELECT oid FROM pg_catalog.pg_class WHERE relkind = 'm')",
            &[(&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "looking for the target's materialized views".into())?;
    let there: Vec<String> = there.iter().map(|row| row.get(0)).collect();
    Ok(views.into_iter().filter(|view| there.contains(&view.name)).collect())
}

/// Those that the target has, but not as the ledger says. That one is missing there is a change of the schema (I11).
///
/// # Errors
/// Whatever the server says.
pub async fn changed(target: &Client, views: Vec<View>) -> Result<Vec<View>> {
    let views = present(target, views).await?;
    if views.is_empty() {
        return Ok(views);
    }
    let known: bool = target
        .query_typed_one("SELECT pg_catalog.to_regclass('walferry.materialized_view') IS NOT NULL", &[])
        .await
        .context(|| "looking for the ledger's materialized views".into())?
        .get(0);
    if !known {
        return Ok(views);
    }
    let rows = target
        .query_typed("SELECT name, marker FROM walferry.materialized_view", &[])
        .await
        .context(|| "reading the ledger's materialized views".into())?;
    let is_known =
        |view: &View| rows.iter().any(|row| row.get::<_, &str>(0) == view.name && row.get::<_, &str>(1) == view.marker);
    Ok(views.into_iter().filter(|view| !is_known(view)).collect())
}

/// Writes into the ledger that the target shows what the views showed when they were listed, or newer.
///
/// # Errors
/// Whatever the server says.
pub async fn remember(target: &Client, views: &[View]) -> Result<()> {
    if views.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
    let markers: Vec<&str> = views.iter().map(|view| view.marker.as_str()).collect();
    let doing = || "writing the materialized views into the ledger".to_owned();
    target
        .batch_execute(
            "SET client_min_messages = warning; \
             CREATE TABLE IF NOT EXISTS walferry.materialized_view (name text PRIMARY KEY, marker text NOT NULL)",
        )
        .await
        .context(doing)?;
    target
        .execute_typed(
            "INSERT INTO walferry.materialized_view \
             SELECT * FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) u(n, m) \
             ON CONFLICT (name) DO UPDATE SET marker = excluded.marker",
            &[(&names, Type::TEXT_ARRAY), (&markers, Type::TEXT_ARRAY)],
        )
        .await
        .context(doing)?;
    Ok(())
}

/// Takes views out of the ledger: they are refreshed as soon as that works.
///
/// # Errors
/// Whatever the server says.
pub async fn forget<'a>(target: &Client, views: impl IntoIterator<Item = &'a View>) -> Result<()> {
    let names: Vec<&str> = views.into_iter().map(|view| view.name.as_str()).collect();
    let known = "SELECT pg_catalog.to_regclass('walferry.materialized_view') IS NOT NULL";
    if names.is_empty() || !target.query_typed_one(known, &[]).await?.get::<_, bool>(0) {
        return Ok(());
    }
    target
        .execute_typed("DELETE FROM walferry.materialized_view WHERE name = ANY ($1)", &[(&names, Type::TEXT_ARRAY)])
        .await
        .context(|| "taking materialized views out of the ledger".into())?;
    Ok(())
}

/// A view that could not be refreshed, and why.
#[derive(Debug)]
pub struct Refused {
    /// The view.
    pub view: View,
    /// What the server said.
    pub error: Error,
}

impl Refused {
    /// Says it, with what to do.
    #[must_use]
    pub fn into_error(self) -> Error {
        let Refused { view, error } = self;
        let hint = format!(
            "Mend it, so that `REFRESH MATERIALIZED VIEW {};` works on the target; or cut over with --waive '{}', and refresh it yourself.",
            view.name, view.object
        );
        error.context(format!("refreshing the {}", view.object)).hint(hint)
    }
}

/// Refreshes views on the target, or empties those that are not populated on the source. One that reads from another that is not
/// populated yet is refused by the server, and comes after it. Answers those that cannot be refreshed.
///
/// # Errors
/// What can be mended by trying again.
pub async fn refresh(target: &Client, views: &[View]) -> Result<Vec<Refused>> {
    let mut waiting: Vec<&View> = views.iter().collect();
    let mut refused = Vec::new();
    while !waiting.is_empty() {
        let mut too_early = Vec::new();
        for view in &waiting {
            let data = if view.is_populated { "" } else { " WITH NO DATA" };
            match target.batch_execute(&format!("REFRESH MATERIALIZED VIEW {}{data}", view.name)).await {
                Ok(()) => {}
                Err(error) => {
                    let waits = error.code() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
                    let error = Error::from(error);
                    if error.kind() != ErrorKind::Server {
                        return Err(error.context(format!("refreshing the {}", view.object)));
                    }
                    let refusal = Refused { view: (*view).clone(), error };
                    if waits { too_early.push((*view, refusal)) } else { refused.push(refusal) }
                }
            }
        }
        if too_early.len() == waiting.len() {
            refused.extend(too_early.into_iter().map(|(_, refusal)| refusal));
            return Ok(refused);
        }
        waiting = too_early.into_iter().map(|(view, _)| view).collect();
    }
    Ok(refused)
}
