//! The progress of the initial copy of a table, counted by its copiers without locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use crate::observe::status::{Table, TableState};

/// What is copied of a table.
#[derive(Debug)]
pub struct TableProgress {
    schema: String,
    name: String,
    bytes_estimated: AtomicU64,
    bytes_done: AtomicU64,
    /// Those of them that an earlier process copied.
    bytes_recorded: AtomicU64,
    rows_done: AtomicU64,
    state: AtomicU8,
}

impl TableProgress {
    pub(super) fn new(schema: &str, name: &str, bytes_estimated: u64) -> TableProgress {
        TableProgress {
            schema: schema.to_string(),
            name: name.to_string(),
            bytes_estimated: AtomicU64::new(bytes_estimated),
            bytes_done: AtomicU64::new(0),
            bytes_recorded: AtomicU64::new(0),
            rows_done: AtomicU64::new(0),
            state: AtomicU8::new(TableState::Waiting as u8),
        }
    }

    /// Begins to count a part of the table that is copied now, and says that the table is being copied.
    pub fn begin_part(self: &Arc<Self>) -> PartProgress {
        self.set_state(TableState::Copying);
        PartProgress { table: Arc::clone(self), bytes: 0, rows: 0, committed: false }
    }

    /// Counts what an earlier process copied and recorded.
    pub fn add_recorded(&self, bytes: u64, rows: u64) {
        self.bytes_recorded.fetch_add(bytes, Relaxed);
        self.add(bytes, rows);
    }

    fn add(&self, bytes: u64, rows: u64) {
        self.bytes_done.fetch_add(bytes, Relaxed);
        self.rows_done.fetch_add(rows, Relaxed);
    }

    /// The bytes that this process has copied.
    pub(super) fn copied_bytes(&self) -> u64 {
        self.bytes_done.load(Relaxed).saturating_sub(self.bytes_recorded.load(Relaxed))
    }

    /// Says how far the table is.
    pub fn set_state(&self, state: TableState) {
        self.state.store(state as u8, Relaxed);
    }

    /// Starts at nothing again: the table's rows were thrown away on the target.
    pub fn restart(&self) {
        self.bytes_done.store(0, Relaxed);
        self.bytes_recorded.store(0, Relaxed);
        self.rows_done.store(0, Relaxed);
        self.set_state(TableState::Waiting);
    }

    /// How far the table is.
    pub fn state(&self) -> TableState {
        match self.state.load(Relaxed) {
            0 => TableState::Waiting,
            1 => TableState::Copying,
            2 => TableState::Indexing,
            _ => TableState::Done,
        }
    }

    pub(super) fn snapshot(&self) -> Table {
        let (state, bytes_done) = (self.state(), self.bytes_done.load(Relaxed));
        // The estimate is the size on disk; what COPY sends can be more or less. Once all is copied it is known.
        let bytes_total = match state {
            TableState::Waiting | TableState::Copying => self.bytes_estimated.load(Relaxed).max(bytes_done),
            TableState::Indexing | TableState::Done => bytes_done,
        };
        Table {
            schema: self.schema.clone(),
            name: self.name.clone(),
            bytes_total,
            bytes_done,
            rows_done: self.rows_done.load(Relaxed),
            state,
        }
    }
}

/// What is copied of a part that is not committed yet. Dropped without [`PartProgress::committed`], it is taken back.
#[derive(Debug)]
pub struct PartProgress {
    table: Arc<TableProgress>,
    bytes: u64,
    rows: u64,
    committed: bool,
}

impl PartProgress {
    /// Counts what was sent to the target.
    pub fn add(&mut self, bytes: u64, rows: u64) {
        self.bytes += bytes;
        self.rows += rows;
        self.table.add(bytes, rows);
    }

    /// Says that the part is committed on the target.
    pub fn committed(mut self) {
        self.committed = true;
    }
}

impl Drop for PartProgress {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // A restart in between has already forgotten what this part counted.
        let take_back = |counter: &AtomicU64, amount: u64| {
            let _ = counter.fetch_update(Relaxed, Relaxed, |value| Some(value.saturating_sub(amount)));
        };
        take_back(&self.table.bytes_done, self.bytes);
        take_back(&self.table.rows_done, self.rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_not_committed_is_taken_back() {
        let table = Arc::new(TableProgress::new("public", "orders", 1000));
        let mut first = table.begin_part();
        first.add(300, 3);
        first.committed();
        let mut second = table.begin_part();
        second.add(200, 2);
        assert_eq!((table.snapshot().bytes_done, table.snapshot().rows_done), (500, 5));
        drop(second);
        assert_eq!((table.snapshot().bytes_done, table.snapshot().rows_done), (300, 3));
        assert_eq!(table.state(), TableState::Copying);
    }

    #[test]
    fn the_estimate_gives_way_to_what_was_copied() {
        let table = Arc::new(TableProgress::new("public", "orders", 1000));
        let mut part = table.begin_part();
        part.add(1200, 1);
        assert_eq!(table.snapshot().bytes_total, 1200, "never less than what is done");
        part.committed();
        table.set_state(TableState::Indexing);
        assert_eq!(table.snapshot().bytes_total, 1200);

        let small = Arc::new(TableProgress::new("public", "bloated", 1000));
        small.add_recorded(10, 1);
        assert_eq!(small.snapshot().bytes_total, 1000);
        small.set_state(TableState::Done);
        assert_eq!(small.snapshot().bytes_total, 10);
    }
}
