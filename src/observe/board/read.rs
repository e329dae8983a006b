//! What is read from the board.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use super::{Side, StatusBoard, Text, lock};
use crate::connection::ConnectionCount;
use crate::lsn::Lsn;
use crate::observe::rates::Rates;
use crate::observe::status::{
    Apply, ConflictKind, ConnectionNumbers, Connections, Copy, Direction, Indexes, Lag, Phase, Queue, STATUS_VERSION,
    Source, Status, Stream, Table, TableConflicts, TableState, Target,
};
use crate::observe::wall_clock;

impl StatusBoard {
    /// Everything, as it is now.
    pub fn snapshot(&self) -> Status {
        let rates = lock(&self.shared.rates).rates();
        let tables = self.tables();
        let copy = self.copy(&rates, &tables);
        let lag = self.lag();
        let (stream, apply) = (self.stream(&rates), self.apply(&rates));
        let queue = lock(&self.shared.queue).clone();
        let text = lock(&self.shared.text);
        let blockers = blockers(&text, &stream, &apply, &queue, &lag);
        let eta_seconds = eta_seconds(text.phase, &copy, &lag, &rates);
        let wal_lsn = Lsn(self.shared.source_wal_lsn.load(Relaxed));
        let source = Source { wal_lsn, ..text.source.clone() };
        let reconnects = self.shared.reconnects[Side::Target as usize].load(Relaxed);
        Status {
            version: STATUS_VERSION,
            phase: text.shown_phase(),
            way_back: text.way_back,
            direction: if text.turned_back { Direction::Back } else { Direction::There },
            ready_to_cutover: blockers.is_empty(),
            blockers,
            attention: attention(&source, &copy, &text),
            process_alive: true,
            updated_at: wall_clock::now_rfc3339(),
            lag,
            copy,
            tables,
            indexes: Indexes {
                total: self.shared.indexes_total.load(Relaxed),
                done: self.shared.indexes_done.load(Relaxed),
            },
            queue,
            stream,
            apply,
            source,
            target: Target { reconnects, ..text.target.clone() },
            connections: self.connections(),
            cutover: text.cutover.clone(),
            verification: text.verification.clone(),
            events: text.events.iter().cloned().collect(),
            error: text.error.clone(),
            eta_seconds,
        }
    }

    fn tables(&self) -> Vec<Table> {
        lock(&self.shared.tables).in_order.iter().map(|table| table.snapshot()).collect()
    }

    fn copy(&self, rates: &Rates, tables: &[Table]) -> Copy {
        let limits = lock(&self.shared.copy_limits).clone();
        let copied = |state: TableState| matches!(state, TableState::Indexing | TableState::Done);
        Copy {
            tables_total: tables.len() as u64,
            tables_done: tables.iter().filter(|table| copied(table.state)).count() as u64,
            bytes_total: tables.iter().map(|table| table.bytes_total).sum(),
            bytes_done: tables.iter().map(|table| table.bytes_done).sum(),
            rows_done: tables.iter().map(|table| table.rows_done).sum(),
            bytes_per_second: rates.copied_bytes,
            paused: self.shared.copy_paused.load(Relaxed),
            jobs: self.shared.copy_jobs.load(Relaxed),
            jobs_max: limits.jobs as u64,
            rate_max_bytes_per_second: limits.rate,
            waits_for: limits.waits_for,
        }
    }

    fn connections(&self) -> Connections {
        let numbers = |count: &ConnectionCount| ConnectionNumbers {
            now: count.now() as u64,
            peak: count.peak() as u64,
            max: count.max().map(|max| max as u64),
        };
        let counts = lock(&self.shared.connections);
        counts.as_ref().map_or_else(Connections::default, |[source, target]| Connections {
            source: numbers(source),
            target: numbers(target),
        })
    }

    fn stream(&self, rates: &Rates) -> Stream {
        Stream {
            connected: self.shared.connected.load(Relaxed),
            received_lsn: lock(&self.shared.pending).received_lsn(),
            reconnects: self.shared.reconnects[Side::Source as usize].load(Relaxed),
            bytes: self.shared.received_bytes.load(Relaxed),
            transactions: self.shared.received_transactions.load(Relaxed),
            changes: self.shared.received_changes.load(Relaxed),
            bytes_per_second: rates.received_bytes,
        }
    }

    fn apply(&self, rates: &Rates) -> Apply {
        let mut conflicts_by_kind: BTreeMap<String, u64> =
            ConflictKind::ALL.iter().map(|kind| (kind.name().to_string(), 0)).collect();
        let mut conflicts_by_table = Vec::new();
        for ((schema, name, kind), &changes) in lock(&self.shared.conflicts).iter() {
            let (schema, name, kind) = (schema.clone(), name.clone(), kind.name().to_string());
            *conflicts_by_kind.entry(kind.clone()).or_insert(0) += changes;
            conflicts_by_table.push(TableConflicts { schema, name, kind, changes });
        }
        Apply {
            transactions: self.shared.applied_transactions.load(Relaxed),
            changes: self.shared.applied_changes.load(Relaxed),
            batches: self.shared.applied_batches.load(Relaxed),
            transactions_per_second: rates.applied_transactions,
            changes_per_second: rates.applied_changes,
            applied_lsn: lock(&self.shared.pending).applied_lsn(),
            serial_replays: self.shared.serial_replays.load(Relaxed),
            ddl_replayed: self.shared.ddl_replayed.load(Relaxed),
            conflicts: conflicts_by_kind.values().sum(),
            conflicts_by_kind,
            conflicts_by_table,
            paused: self.shared.apply_paused.load(Relaxed),
            held: self.shared.apply_held.load(Relaxed),
        }
    }

    pub(super) fn lag(&self) -> Lag {
        // Read first: what is heard in between can then only make the lag larger.
        let streamed = Lsn(self.shared.streamed_lsn.load(Relaxed));
        let (applied, all_applied, oldest) = {
            let pending = lock(&self.shared.pending);
            (pending.applied_lsn(), pending.is_empty(), pending.oldest_commit_time())
        };
        let newest = Lsn(self.shared.source_wal_lsn.load(Relaxed));
        // Where all that was received is applied, the source has nothing for us up to the position it has sent.
        let applied = if all_applied { applied.max(streamed) } else { applied };
        let bytes = (newest > Lsn::ZERO && applied > Lsn::ZERO).then(|| newest.bytes_since(applied));

        let offset = self.shared.source_clock_offset.load(Relaxed);
        let heard_at = (offset != i64::MIN).then(|| self.shared.source_heard_at.load(Relaxed));
        let seconds = heard_at.and_then(|heard_at| {
            let since = |time: i64| (self.our_clock() + offset - time).max(0) as f64 / 1e6;
            match (self.shared.connected.load(Relaxed), all_applied) {
                (true, true) => Some(0.0),
                // Nobody knows what was committed since the source was last heard.
                (false, true) => Some(since(heard_at)),
                (_, false) => oldest.map(since),
            }
        });
        Lag { bytes, seconds }
    }

    /// Microseconds since the board was made.
    pub(super) fn our_clock(&self) -> i64 {
        i64::try_from(self.shared.started.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

/// Said of a migration that follows and has not measured its lag. A cutover that is asked for then measures it itself, and waits.
pub(crate) const LAG_UNKNOWN: &str = "how far the target is behind is not known yet";

/// What stands in the way of a cutover. A migration is ready exactly when this is empty.
fn blockers(text: &Text, stream: &Stream, apply: &Apply, queue: &Queue, lag: &Lag) -> Vec<String> {
    let mut blockers = Vec::new();
    match text.phase {
        Phase::Following => {}
        Phase::CuttingOver => blockers.push("a cutover is running".to_string()),
        Phase::CutOver if text.turned_back => blockers.push("the migration was switched back".to_string()),
        Phase::CutOver => blockers.push("the cutover is done".to_string()),
        Phase::Reversed => blockers.push("the migration was switched back".to_string()),
        Phase::Failed => blockers.push("the migration failed".to_string()),
        phase => blockers.push(format!("the target does not follow yet: {}", phase.title())),
    }
    if text.phase == Phase::Following {
        if !stream.connected {
            blockers.push("the source is not connected".to_string());
        } else if lag.seconds.is_none() {
            blockers.push(LAG_UNKNOWN.to_string());
        }
        if apply.paused {
            blockers.push("the apply is paused; walferry resume lets it go on".to_string());
        }
        if queue.full {
            blockers.push("the queue is full: the apply has to make room, or start `walferry migrate` again with a larger --queue-max-bytes".to_string());
        }
    }
    blockers.extend(text.blockers.iter().cloned());
    blockers
}

/// What does not stop a cutover, but somebody should look after.
fn attention(source: &Source, copy: &Copy, text: &Text) -> Vec<String> {
    let waits = copy.waits_for.as_ref().map(|whom| format!("the copy waits for {whom}"));
    let way_back = text.way_back_lacks.as_ref().map(|why| format!("a cutover has no way back: {why}"));
    let texts = [waits, way_back, text.waits.clone(), text.left_by_cutover.clone(), text.not_served.clone()];
    source.too_much_wal().into_iter().chain(texts.into_iter().flatten()).collect()
}

/// Seconds until the copy or the catch-up is done; `None` where nothing moves, or nobody knows.
fn eta_seconds(phase: Phase, copy: &Copy, lag: &Lag, rates: &Rates) -> Option<f64> {
    let (left, rate) = match phase {
        Phase::Copying => (copy.bytes_total.saturating_sub(copy.bytes_done), rates.copied_bytes),
        Phase::CatchingUp => (lag.bytes?, rates.lag_bytes_shrinking),
        _ => return None,
    };
    (rate > 0.0).then(|| left as f64 / rate)
}
