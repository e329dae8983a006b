//! What the apply knows of each table: how its rows look in the stream, where they go, and what its copy has seen.

use std::collections::{BTreeMap, HashMap};

use super::change::{Adoption, View};
use super::ddl::Ddl;
use crate::decode::{Relation, ReplicaIdentity as WireIdentity, Tuple};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::source::slot;
use crate::source::snapshot::SnapshotData;
use crate::target::ledger::LedgerTable;
use crate::target::route::Routing;
use crate::target::writer::{SINGLE_ROWS_MAX, Tables};
use crate::timescale::live;

/// Every migrated table, by its place in `tables`.
#[derive(Clone, Debug)]
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
    /// How DDL is replicated, where it is.
    pub ddl: Option<Ddl>,
    /// Whether the source has hypertables: then chunks that nobody knows come in the stream.
    pub has_hypertables: bool,
    /// Up to so many changed rows of a table go by a statement each; [`SINGLE_ROWS_MAX`] but for tests.
    pub single_rows_max: usize,
}

/// One table.
#[derive(Clone, Debug)]
pub struct TableLayout {
    /// As the ledger has it, and as what was adopted since makes it; its columns are the stream's.
    pub table: Table,
    /// How its changes are spread.
    pub routing: Routing,
    /// How its rows are written, where the target has the shape already that the stream announces later in the transaction
    /// that is being replayed.
    pub view: Option<View>,
    snapshot: SnapshotData,
}

impl Tables for Layout {
    fn table(&self, place: usize) -> &Table {
        &self.tables[place].table
    }

    fn is_binary(&self) -> bool {
        self.binary
    }
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
            layouts.push(TableLayout {
                routing: entry.routing,
                snapshot: snapshot.clone(),
                table: entry.table,
                view: None,
            });
        }
        let by_relid = layouts.iter().enumerate().map(|(at, layout)| (layout.table.relid, at)).collect();
        let snapshots_end = layouts.iter().map(|layout| layout.snapshot.insert_lsn).max().unwrap_or(Lsn::ZERO);
        let single_rows_max = SINGLE_ROWS_MAX;
        Ok(Layout {
            tables: layouts,
            by_relid,
            snapshots_end,
            binary,
            workers,
            ddl: None,
            has_hypertables: false,
            single_rows_max,
        })
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

    /// Whether messages with this prefix tell of DDL that is to be replicated.
    pub fn is_ddl(&self, prefix: &str) -> bool {
        self.ddl.as_ref().is_some_and(|ddl| ddl.prefix == prefix)
    }

    /// The place of a table, if it is one of the migration's.
    pub fn find(&self, relid: u32) -> Option<usize> {
        self.by_relid.get(&relid).copied()
    }

    /// From here on, a table is what a replicated statement has made of it.
    pub fn redefine(&mut self, place: usize, table: &Table) {
        let entry = &mut self.tables[place];
        entry.routing = Routing::of(table);
        entry.table = table.clone();
        entry.view = None;
    }

    /// A table that was made on the way. All of its rows are in the stream: no copy has seen any.
    pub fn add(&mut self, table: &Table) {
        let snapshot = SnapshotData { xmin: 0, xmax: 0, running: Default::default(), insert_lsn: Lsn::ZERO };
        self.by_relid.insert(table.relid, self.tables.len());
        self.tables.push(TableLayout { routing: Routing::of(table), snapshot, table: table.clone(), view: None });
    }

    /// Forgets a table that was dropped; whether there was one. The others keep their places.
    pub fn remove(&mut self, relid: u32) -> bool {
        self.by_relid.remove(&relid).is_some()
    }

    /// Whether the rows of a table hold already what a transaction did (I3).
    pub fn copy_has_seen(&self, place: usize, xid: u32, commit_lsn: Lsn) -> bool {
        commit_lsn < self.snapshots_end && self.tables[place].snapshot.sees(xid, commit_lsn)
    }

    /// A row of the stream must have the columns that were announced: what stands in another column's place would be written there.
    ///
    /// # Errors
    /// `SchemaChanged` naming the table.
    pub fn check_row(&self, place: usize, row: Tuple<'_>) -> Result<()> {
        let table = &self.tables[place].table;
        if row.len() == table.columns.len() {
            return Ok(());
        }
        let text = format!(
            "a row of {} has {} columns in the stream, which announced {} before it",
            table.qualified(),
            row.len(),
            table.columns.len()
        );
        Err(Error::new(ErrorKind::SchemaChanged, text).hint(slot::RESYNC))
    }

    /// Compares what the stream announces with what the table is (I11). What the table's copy has seen is history: the table
    /// is since then what it was when it was copied, and the copy made sure that this is what the ledger has.
    ///
    /// # Errors
    /// `SchemaChanged` naming the table and what is different.
    pub fn check_relation(&self, relation: &Relation<'_>, xid: u32, commit_lsn: Lsn) -> Result<()> {
        let Some(&place) = self.by_relid.get(&relation.relid) else { return live::known_or_new(self, relation) };
        if live::is_gone(&self.tables[place].table) {
            return Ok(());
        }
        if self.copy_has_seen(place, xid, commit_lsn) {
            return Ok(());
        }
        match difference(&self.tables[place].table, relation) {
            None => Ok(()),
            Some(what) => Err(Error::new(ErrorKind::SchemaChanged, what).hint(
                "Nothing of this transaction has been applied. Make the same change on the target, then run the same command again.",
            )),
        }
    }

    /// From here on, a table is what was adopted.
    pub fn adopt(&mut self, adoption: &Adoption) {
        let relid = adoption.change.announced.relid;
        if let Some(&place) = self.by_relid.get(&relid) {
            let entry = &mut self.tables[place];
            entry.table = adoption.table.clone();
            entry.routing = adoption.routing;
            entry.view = None;
        }
    }

    /// The target has the shape already that a table gets in this transaction.
    pub fn foresee(&mut self, adoption: &Adoption) {
        if let Some(&place) = self.by_relid.get(&adoption.change.announced.relid) {
            let entry = &mut self.tables[place];
            entry.view = Some(View::new(&entry.table, adoption));
        }
    }
}

/// What is different in an announcement, in words.
fn difference(table: &Table, relation: &Relation<'_>) -> Option<String> {
    let name = table.qualified();
    if (relation.schema, relation.name) != (table.schema.as_str(), table.name.as_str()) {
        let now = crate::sql::qualified(relation.schema, relation.name);
        return Some(format!("the table {name} is now {now} on the source"));
    }
    let mut announced = relation.columns();
    for column in &table.columns {
        match announced.next() {
            Some(now) if now.name != column.name => {
                return Some(format!("where column {} of {name} was, the source has {} now", column.name, now.name));
            }
            Some(now) if now.type_oid != column.type_oid || now.type_modifier != column.type_modifier => {
                return Some(format!(
                    "column {} of {name} was of type {} and has another type on the source now",
                    column.name, column.type_name
                ));
            }
            Some(_) => {}
            None => return Some(format!("column {} of {name} was dropped on the source", column.name)),
        }
    }
    if let Some(added) = announced.next() {
        return Some(format!("column {} was added to {name} on the source", added.name));
    }
    difference_of_identity(table, relation)
}

/// Without its key's columns a changed row could not be found; by other columns than those of the identity it could be the wrong one.
fn difference_of_identity(table: &Table, relation: &Relation<'_>) -> Option<String> {
    let name = table.qualified();
    if relation.identity == WireIdentity::Nothing {
        return table.has_usable_identity().then(|| {
            format!("{name} no longer has a replica identity on the source: its updates and deletes would not be in the stream")
        });
    }
    for (at, (column, now)) in table.columns.iter().zip(relation.columns()).enumerate() {
        let was_key = table.key.contains(&at);
        if was_key && !now.is_key {
            return Some(format!(
                "{name} has another replica identity on the source now: column {} is no longer in it, and changed rows \
                 could not be found by it",
                column.name
            ));
        }
        // Under FULL every column is.
        if now.is_key && !was_key && relation.identity != WireIdentity::Full {
            return Some(format!(
                "{name} has another replica identity on the source now: column {} has come into it",
                column.name
            ));
        }
    }
    None
}
