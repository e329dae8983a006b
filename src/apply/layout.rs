//! What the apply knows of each table: how its rows look in the stream, where they go, and what its copy has seen.

use std::collections::{BTreeMap, HashMap};

use super::route::Routing;
use crate::decode::{Relation, ReplicaIdentity as WireIdentity, Tuple};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::source::snapshot::SnapshotData;
use crate::target::ledger::LedgerTable;

/// Every migrated table, by its place in `tables`.
#[derive(Debug)]
pub struct Layout {
    /// The tables.
    pub tables: Vec<TableLayout>,
    by_relid: HashMap<u32, usize>,
    /// Past every snapshot's insert LSN: a transaction that commits here or later is seen by no copy (H6).
    snapshots_end: Lsn,
    /// Whether columns come in binary.
    pub binary: bool,
    /// How many sessions apply.
    pub workers: usize,
}

/// One table.
#[derive(Debug)]
pub struct TableLayout {
    /// As the catalog had it; its columns are the stream's.
    pub table: Table,
    /// How its changes are spread.
    pub routing: Routing,
    snapshot: SnapshotData,
}

impl Layout {
    /// Puts together what the ledger says.
    ///
    /// # Errors
    /// `Other` when a table has no snapshot: its copy is not complete, and nothing may be applied.
    pub fn new(
        tables: Vec<LedgerTable>,
        snapshots: &BTreeMap<i32, SnapshotData>,
        binary: bool,
        workers: usize,
    ) -> Result<Layout> {
        let mut layouts = Vec::with_capacity(tables.len());
        for entry in tables {
            let snapshot = entry.snapshot.filter(|_| entry.copied).and_then(|id| snapshots.get(&id));
            let Some(snapshot) = snapshot else {
                let text = format!("{} is not copied yet, and cannot be applied to", entry.table.qualified());
                return Err(Error::new(ErrorKind::Other, text));
            };
            layouts.push(TableLayout { routing: entry.routing, snapshot: snapshot.clone(), table: entry.table });
        }
        let by_relid = layouts.iter().enumerate().map(|(at, layout)| (layout.table.relid, at)).collect();
        let snapshots_end = layouts.iter().map(|layout| layout.snapshot.insert_lsn).max().unwrap_or(Lsn::ZERO);
        Ok(Layout { tables: layouts, by_relid, snapshots_end, binary, workers })
    }

    /// The position from which on every change is applied, whatever any copy saw (H24).
    pub fn snapshots_end(&self) -> Lsn {
        self.snapshots_end
    }

    /// The place of a table that the stream names.
    ///
    /// # Errors
    /// `SchemaChanged` for one that the catalog did not have.
    pub fn place(&self, relid: u32) -> Result<usize> {
        self.by_relid.get(&relid).copied().ok_or_else(|| {
            Error::new(
                ErrorKind::SchemaChanged,
                format!("the stream has a change of a table (OID {relid}) that was not there when the migration began"),
            )
            .hint("Only the tables that were there at the start are migrated: `walferry clean`, then `walferry migrate` takes all.")
        })
    }

    /// Whether the rows of a table hold already what a transaction did (I3).
    pub fn copy_has_seen(&self, place: usize, xid: u32, commit_lsn: Lsn) -> bool {
        commit_lsn < self.snapshots_end && self.tables[place].snapshot.sees(xid, commit_lsn)
    }

    /// A row of the stream must have the catalog's columns: what stands in another column's place would be written there.
    ///
    /// # Errors
    /// `SchemaChanged` naming the table.
    pub fn check_row(&self, place: usize, row: Tuple<'_>) -> Result<()> {
        let table = &self.tables[place].table;
        if row.len() == table.columns.len() {
            return Ok(());
        }
        let text = format!(
            "a row of {} has {} columns in the stream, and the table had {} when the migration began",
            table.qualified(),
            row.len(),
            table.columns.len()
        );
        Err(Error::new(ErrorKind::SchemaChanged, text).hint("Start anew with `walferry clean` and `walferry migrate`."))
    }

    /// Compares what the stream announces with the catalog (I11).
    ///
    /// # Errors
    /// `SchemaChanged` naming the table and what is different.
    pub fn check_relation(&self, relation: &Relation<'_>) -> Result<()> {
        let Some(&place) = self.by_relid.get(&relation.relid) else { return Ok(()) };
        let table = &self.tables[place].table;
        let name = table.qualified();
        let changed = |what: String, hint: String| Err(Error::new(ErrorKind::SchemaChanged, what).hint(hint));
        if (relation.schema, relation.name) != (table.schema.as_str(), table.name.as_str()) {
            return changed(
                format!(
                    "the table {name} is now {} on the source",
                    crate::sql::qualified(relation.schema, relation.name)
                ),
                "Rename it back on the source.".into(),
            );
        }
        let start_over =
            "Nothing after this change has been applied. Start anew with `walferry clean` and `walferry migrate`.";
        let mut announced = relation.columns();
        for (at, column) in table.columns.iter().enumerate() {
            match announced.next() {
                Some(now) if now.name != column.name => {
                    return changed(
                        format!("where column {} of {name} was, the source has {} now", column.name, now.name),
                        start_over.into(),
                    );
                }
                Some(now) if now.type_oid != column.type_oid || now.type_modifier != column.type_modifier => {
                    return changed(
                        format!(
                            "column {} of {name} was of type {} and has another type on the source now",
                            column.name, column.type_name
                        ),
                        start_over.into(),
                    );
                }
                // Without it an update that changes this column would not say which row it was.
                Some(now) if table.key.contains(&at) && !now.is_key => {
                    return changed(
                        format!(
                            "{name} has another replica identity on the source now: column {} is no longer in it, and \
                             changed rows could not be found by it",
                            column.name
                        ),
                        format!(
                            "Give it back the replica identity that it had. If changes have been made meanwhile: {start_over}"
                        ),
                    );
                }
                Some(_) => {}
                None => {
                    return changed(
                        format!("column {} of {name} was dropped on the source", column.name),
                        start_over.into(),
                    );
                }
            }
        }
        if let Some(added) = announced.next() {
            return changed(format!("column {} was added to {name} on the source", added.name), start_over.into());
        }
        if relation.identity == WireIdentity::Nothing && table.has_usable_identity() {
            return changed(
                format!(
                    "{name} no longer has a replica identity on the source: its updates and deletes would not be in the stream"
                ),
                format!("ALTER TABLE {name} REPLICA IDENTITY DEFAULT"),
            );
        }
        Ok(())
    }
}
