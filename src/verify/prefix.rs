//! Whether what a snapshot of the source shows is a beginning of the stream (H35).
//!
//! The apply follows the order of the commit records. A snapshot shows a transaction once it has left the server's list of running
//! ones, which is some time after its record was written: while the record is flushed, and for as long as a synchronous standby
//! does not answer. So a snapshot can show a transaction and not one that committed before it, and then the target, which applies
//! one after the other, never holds what the snapshot shows.

use crate::lsn::Lsn;
use crate::source::snapshot::SnapshotData;

/// A transaction of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Streamed {
    /// The lower 32 bits of the top-level transaction's id.
    pub(super) xid: u32,
    /// Where its commit record begins.
    pub(super) commit_lsn: Lsn,
    /// Where it ends: what the ledger speaks of.
    pub(super) end_lsn: Lsn,
}

/// Up to where the stream has to be applied for the target to hold exactly what the snapshot shows; or else a transaction that stands
/// in the way, because the snapshot does not show it and it is applied, or comes before one that is shown.
///
/// `streamed` has, in the order of the stream, every transaction whose visibility is in question: those that were applied, up to
/// `applied`, and those that are not.
pub(super) fn prefix(streamed: &[Streamed], snapshot: &SnapshotData, applied: Lsn) -> Result<Lsn, Streamed> {
    let is_shown = |transaction: &&Streamed| snapshot.sees(transaction.xid, transaction.commit_lsn);
    let shown_up_to = streamed.iter().rev().find(is_shown).map_or(Lsn::ZERO, |last| last.end_lsn);
    let end = shown_up_to.max(applied);
    match streamed.iter().take_while(|transaction| transaction.end_lsn <= end).find(|one| !is_shown(one)) {
        Some(hidden) => Err(*hidden),
        None => Ok(end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Transactions by xid and end LSN; a commit record takes 5 bytes.
    fn stream(transactions: &[(u32, u64)]) -> Vec<Streamed> {
        let one = |&(xid, end): &(u32, u64)| Streamed { xid, commit_lsn: Lsn(end - 5), end_lsn: Lsn(end) };
        transactions.iter().map(one).collect()
    }

    fn snapshot(text: &str) -> SnapshotData {
        SnapshotData::parse(text, Lsn(1000)).unwrap()
    }

    #[test]
    fn the_target_is_brought_to_the_last_transaction_that_is_shown() {
        let stream = stream(&[(10, 100), (12, 110), (11, 120), (13, 130)]);
        assert_eq!(prefix(&stream, &snapshot("13:13:"), Lsn(110)), Ok(Lsn(120)));
        assert_eq!(prefix(&stream, &snapshot("14:14:"), Lsn(110)), Ok(Lsn(130)));
        assert_eq!(prefix(&stream, &snapshot("10:14:13"), Lsn(120)), Ok(Lsn(120)), "it is there already");
        assert_eq!(prefix(&[], &snapshot("10:10:"), Lsn(50)), Ok(Lsn(50)));
    }

    #[test]
    fn h35_a_transaction_that_is_hidden_before_one_that_is_shown_stands_in_the_way() {
        let stream = stream(&[(10, 100), (11, 110), (12, 120)]);
        assert_eq!(prefix(&stream, &snapshot("11:13:11"), Lsn(100)), Err(stream[1]));
    }

    #[test]
    fn h35_a_transaction_that_is_applied_and_hidden_stands_in_the_way() {
        let stream = stream(&[(10, 100), (11, 110)]);
        assert_eq!(prefix(&stream, &snapshot("11:12:11"), Lsn(110)), Err(stream[1]));
        assert_eq!(prefix(&stream, &snapshot("11:12:11"), Lsn(100)), Ok(Lsn(100)), "it is only not to be applied");
    }

    #[test]
    fn what_commits_past_the_snapshots_insert_position_comes_after_it_whatever_its_xid() {
        let stream = stream(&[(10, 100), (11, 2000)]);
        assert_eq!(prefix(&stream, &snapshot("20:20:"), Lsn(90)), Ok(Lsn(100)));
    }
}
