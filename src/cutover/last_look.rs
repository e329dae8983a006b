//! What is looked at before the fence and behind it once more: that nothing came, went or changed past the stream.

use std::collections::BTreeMap;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::changes::{changes, is_waived};
use super::{Cutover, FenceMode, Options, Sessions};
use crate::error::{Error, ErrorKind, Result};
use crate::source::catalog::{self, Table};
use crate::verify;

/// How often the source's catalog is read where that ends in a deadlock.
const CATALOG_ATTEMPTS: u32 = 3;

impl Cutover<'_> {
    /// What table locks do not hold back: prepared transactions (H30), and DDL (I11).
    pub(super) async fn nothing_escaped(
        &self,
        source: &Client,
        before: &BTreeMap<String, String>,
        options: &Options,
    ) -> Result<()> {
        if options.fence != FenceMode::Tables {
            // A prepared transaction that has written to a table holds its lock, and the fence has waited for it.
            self.no_prepared_transactions(source).await?;
        }
        self.same_catalog(source, before, options).await
    }

    pub(super) async fn no_prepared_transactions(&self, source: &Client) -> Result<()> {
        let count: i64 = source
            .query_typed_one(
                "SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()",
                &[],
            )
            .await?
            .get(0);
        if count == 0 {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Blocked,
            format!("{count} prepared transactions are open on the source: committed later, they would be lost"),
        )
        .hint("COMMIT PREPARED or ROLLBACK PREPARED what `SELECT gid FROM pg_prepared_xacts` names."))
    }

    /// I11: nothing that the stream does not show has come, gone or changed.
    pub(super) async fn same_catalog(
        &self,
        source: &Client,
        before: &BTreeMap<String, String>,
        options: &Options,
    ) -> Result<()> {
        let selection = self.scope.select(source).await?;
        let mut attempts = 1..CATALOG_ATTEMPTS;
        let now = loop {
            match catalog::fingerprint_of(source, selection.as_ref()).await {
                // Describing the catalog locks what it describes, in another order than somebody who drops or alters it; or it is gone.
                Err(error) if is_met_by_ddl(&error) && attempts.next().is_some() => {}
                now => break now?,
            }
        };
        let mut changed: Vec<String> = changes(before, &now)
            .into_iter()
            .filter(|change| !options.waive.iter().any(|waived| is_waived(change, waived)))
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        // A new table is not to be lost among its columns and indexes.
        changed.sort_by_key(|change| !change.starts_with("table "));
        let shown = changed.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("; ");
        Err(Error::new(ErrorKind::Blocked, format!("{} objects of the source changed since the migration began: {shown}", changed.len()))
            .hint(
                "Make the same change on the target, then name the object in --waive; or start anew with `walferry clean` and `walferry \
                 migrate`. Triggers and rules only after the cutover where they are ENABLE ALWAYS, or where walferry's role may not set \
                 session_replication_role on the target (foreign keys neither): there they act on every row that is applied. \
                 Where it is the file of a table, `walferry repair --tables` copies what differs.",
            ))
    }

    /// H27: an update or delete of these would not be in the stream.
    pub(super) async fn insert_only_tables_are_equal(
        &self,
        sessions: &Sessions,
        which: impl Fn(&Table) -> bool,
    ) -> Result<()> {
        let of_inserts = self.tables.iter().filter(|(table, insert_only)| *insert_only && !table.unlogged);
        let of_inserts = of_inserts.filter(|(table, _)| table.chunk.is_none() && which(table));
        let tables: Vec<Table> = of_inserts.map(|(table, _)| table.clone()).collect();
        if tables.is_empty() {
            return Ok(());
        }
        let default = verify::Options::default();
        let room = self.source.connections().room().min(self.target.connections().room());
        let jobs = if sessions.is_locked_out { 1 } else { default.jobs.min(room).max(1) };
        let options = verify::Options { jobs, ..default };
        let report = verify::compare(
            &tables,
            || async {
                match sessions.spare() {
                    Some(spare) => Ok(spare),
                    None => self.source.connect(self.application_name).await,
                }
            },
            || self.target.connect(self.application_name),
            &options,
            &|_| {},
        )
        .await?;
        if report.equal {
            return Ok(());
        }
        let different: Vec<&str> =
            report.tables.iter().filter(|table| !table.equal).map(|table| table.table.as_str()).collect();
        Err(Error::new(
            ErrorKind::Different,
            format!(
                "rows of {} were updated or deleted, which the stream cannot tell without a replica identity",
                different.join(", ")
            ),
        )
        .hint(
            "ALTER TABLE … REPLICA IDENTITY FULL on the source, then start anew: `walferry clean`, `walferry migrate`.",
        ))
    }
}

/// Whether reading the catalog failed because of DDL of that moment.
fn is_met_by_ddl(error: &Error) -> bool {
    let of_ddl = [&SqlState::T_R_DEADLOCK_DETECTED, &SqlState::INTERNAL_ERROR];
    error.is_transient() && error.sqlstate().is_some_and(|state| of_ddl.contains(&state))
}
