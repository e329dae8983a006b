//! Snapshots of the source: which transactions a copied table has seen.
//!
//! A table's rows come from one snapshot, and the stream brings every transaction that commits after the slot's
//! consistent point. [`SnapshotData::sees`] decides which of those the rows already hold (invariant I3):
//!
//! ```text
//!   commit LSN ≥ insert LSN read after the snapshot   → not seen   (exact, and safe when 32-bit xids wrap: H6)
//!   otherwise  xid < xmin                             → seen
//!              xid ≥ xmax, or xid among the running   → not seen
//!              else                                   → seen
//! ```
//!
//! A comparison of LSNs alone would be wrong below the insert LSN: a commit record is in the WAL some time before its
//! transaction becomes visible. An xid alone would be wrong after 2³¹ transactions.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::Client;

use super::replication::ReplicationSession;
use super::slot::ServerIdentity;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::sql;

/// `pg_current_snapshot()`, and the WAL insert position read after it was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotData {
    /// Every transaction below it had ended. 64 bits: the epoch is in the upper half.
    pub xmin: u64,
    /// No transaction at or above it had begun to be visible.
    pub xmax: u64,
    /// Those between that were still running.
    pub running: BTreeSet<u64>,
    /// `pg_current_wal_insert_lsn()`, read after the snapshot: a commit at or past it is not visible.
    pub insert_lsn: Lsn,
}

impl SnapshotData {
    /// Reads `xmin:xmax:xip,…` as PostgreSQL prints it ("Transaction ID and Snapshot Information Functions").
    ///
    /// # Errors
    /// `Other` for any other text.
    pub fn parse(text: &str, insert_lsn: Lsn) -> Result<SnapshotData> {
        let malformed =
            || Error::new(ErrorKind::Other, format!("the server sent a snapshot that cannot be read: {text}"));
        let mut fields = text.split(':');
        let (Some(xmin), Some(xmax), Some(running), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(malformed());
        };
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| malformed());
        let running = running.split(',').filter(|xid| !xid.is_empty()).map(number).collect::<Result<_>>()?;
        Ok(SnapshotData { xmin: number(xmin)?, xmax: number(xmax)?, running, insert_lsn })
    }

    /// Whether rows copied under this snapshot hold what a transaction of the stream did (invariant I3).
    ///
    /// `xid` is the stream's: the lower 32 bits of the top-level transaction's.
    pub fn sees(&self, xid: u32, commit_lsn: Lsn) -> bool {
        if commit_lsn >= self.insert_lsn {
            return false;
        }
        // Below the insert LSN the transaction is less than 2³¹ away from the snapshot's xmax.
        let distance = i64::from(xid.wrapping_sub(self.xmax as u32).cast_signed());
        let xid = self.xmax.wrapping_add_signed(distance);
        xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid))
    }
}

/// A snapshot that this process keeps open on the source, so that copy sessions can import it.
pub struct HeldSnapshot {
    /// The name that `SET TRANSACTION SNAPSHOT` takes.
    pub name: String,
    /// What it sees.
    pub data: SnapshotData,
    session: Session,
    /// Whether it is one of a standby's, which the primary does not know.
    of_standby: bool,
}

/// Who holds the snapshot open: an ordinary session, or the replication session that made the slot.
enum Session {
    Ordinary(Client),
    Replication(ReplicationSession),
}

impl HeldSnapshot {
    /// The slot's own snapshot, held by the replication session that made the slot.
    pub fn of_replication_session(name: String, data: SnapshotData, session: ReplicationSession) -> HeldSnapshot {
        HeldSnapshot { name, data, session: Session::Replication(session), of_standby: false }
    }

    /// Takes a snapshot that may serve any table whose changes are all streamed since a snapshot with this xmax
    /// (H1): it waits until every transaction that could be missing from stream and snapshot alike has ended.
    ///
    /// # Errors
    /// `Gap` when this is not the server that has the slot; `Transient` when it is a standby (H5); else whatever the server says.
    pub async fn take(
        source: &ConnectionSpec,
        application_name: &str,
        server: &ServerIdentity,
        xmin_at_least: u64,
    ) -> Result<HeldSnapshot> {
        let client = source.connect(application_name).await?;
        let standby: bool = client.query_typed_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?.get(0);
        if standby {
            // H5: its snapshots show transactions that still run on the primary as finished.
            return Err(Error::new(ErrorKind::Transient, "the source is a standby, whose snapshots cannot be trusted")
                .hint("Walferry waits until --source leads to the primary again."));
        }
        // The control file shows a new timeline only after a checkpoint; the name of a WAL file shows it at once.
        let found = client
            .query_typed_one(
                "SELECT system_identifier::text, \
                        ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int4 \
                 FROM pg_catalog.pg_control_system()",
                &[],
            )
            .await
            .context(|| "asking the source who it is".into())?;
        let timeline = found.get::<_, i32>(1).cast_unsigned();
        server.prove(&ServerIdentity { system: found.get(0), timeline })?;
        loop {
            let (name, data) = export(&client).await?;
            if data.xmin >= xmin_at_least {
                return Ok(HeldSnapshot { name, data, session: Session::Ordinary(client), of_standby: false });
            }
            client.batch_execute("ROLLBACK").await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The same on a standby of the source, for tables that are read there (H5).
    ///
    /// # Errors
    /// `Gap` when it is no standby of this server; `Transient` when it does not replay what the source writes.
    pub async fn take_on_standby(
        source: &ConnectionSpec,
        standby: &ConnectionSpec,
        application_name: &str,
        server: &ServerIdentity,
        xmin_at_least: u64,
    ) -> Result<HeldSnapshot> {
        let taken = super::standby::take(source, standby, application_name, server, xmin_at_least).await?;
        let session = Session::Ordinary(taken.session);
        Ok(HeldSnapshot { name: taken.name, data: taken.data, session, of_standby: true })
    }

    /// Whether it can be imported on a standby, and nowhere else.
    pub fn is_of_standby(&self) -> bool {
        self.of_standby
    }

    /// Takes a newer one in its place, in the same session: the old one is gone then, for all who have not imported it.
    ///
    /// # Errors
    /// `Transient` when its session is gone; `Other` for the slot's own snapshot.
    pub async fn renew(&mut self) -> Result<()> {
        let Session::Ordinary(client) = &self.session else {
            return Err(Error::new(ErrorKind::Other, "the snapshot of a slot cannot be taken again"));
        };
        client.batch_execute("ROLLBACK").await.context(|| "giving a snapshot of the source back".into())?;
        (self.name, self.data) = export(client).await?;
        Ok(())
    }

    /// Makes sure that the snapshot can still be imported.
    ///
    /// # Errors
    /// `Transient` when its session is gone.
    pub async fn ping(&mut self) -> Result<()> {
        let answer = match &mut self.session {
            Session::Ordinary(client) => client.batch_execute("SELECT 1").await.map_err(Error::from),
            Session::Replication(session) => session.simple_query("SELECT 1").await.map(|_| ()),
        };
        answer.context(|| "keeping the source's snapshot open".into())
    }
}

/// Begins a transaction, and exports its snapshot.
async fn export(client: &Client) -> Result<(String, SnapshotData)> {
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let row = client
        .query_typed_one("SELECT pg_catalog.txid_current_snapshot()::text, pg_catalog.pg_export_snapshot()", &[])
        .await
        .context(|| "taking a snapshot of the source".into())?;
    // Its own statement, so that it is read after the snapshot (H6).
    let insert: tokio_postgres::types::PgLsn =
        client.query_typed_one("SELECT pg_catalog.pg_current_wal_insert_lsn()", &[]).await?.get(0);
    Ok((row.get(1), SnapshotData::parse(row.get(0), insert.into())?))
}

/// Opens a transaction on a copy session that sees a held snapshot.
///
/// # Errors
/// Whatever the server says: most likely that the snapshot is gone.
pub async fn import(client: &Client, name: &str) -> Result<()> {
    client.batch_execute(&import_statement(name)).await.map_err(|error| not_imported(error.into()))
}

/// What [`import`] runs, for a session of another kind.
pub fn import_statement(name: &str) -> String {
    format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}", sql::literal(name))
}

/// Why it failed: the session that exported the snapshot is gone, and the table can be copied under another.
pub fn not_imported(error: Error) -> Error {
    error.with_kind(ErrorKind::Transient).context("importing the snapshot")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str, insert_lsn: u64) -> SnapshotData {
        SnapshotData::parse(text, Lsn(insert_lsn)).unwrap()
    }

    #[test]
    fn a_snapshot_reads_as_the_server_prints_it() {
        let read = snapshot("10:20:12,15", 7);
        assert_eq!((read.xmin, read.xmax, read.insert_lsn), (10, 20, Lsn(7)));
        assert_eq!(read.running, BTreeSet::from([12, 15]));
        assert!(snapshot("10:10:", 7).running.is_empty());
        for text in ["", "1:2", "1:2:3:4", "a:2:", "1:2:x", "-1:2:"] {
            assert!(SnapshotData::parse(text, Lsn(0)).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_table_has_seen_what_was_visible_and_nothing_else() {
        let taken = snapshot("10:20:12,15", 1000);
        for (xid, seen) in
            [(9, true), (10, true), (12, false), (14, true), (15, false), (19, true), (20, false), (21, false)]
        {
            assert_eq!(taken.sees(xid, Lsn(999)), seen, "xid {xid}");
        }
    }

    #[test]
    fn h06_a_commit_past_the_insert_lsn_is_applied_whatever_its_xid() {
        let taken = snapshot("10:20:12,15", 1000);
        assert!(!taken.sees(9, Lsn(1000)), "2³¹ transactions later the same 32 bits come again");
        assert!(taken.sees(9, Lsn(999)));
    }

    #[test]
    fn h06_an_xid_is_read_relative_to_the_snapshots_xmax() {
        let epoch = 3u64 << 32;
        let taken = snapshot(&format!("{}:{}:{}", epoch + 5, epoch + 20, epoch + 12), 1000);
        assert!(taken.sees(u32::MAX, Lsn(1)), "the last transaction of the epoch before");
        assert!(taken.sees(3, Lsn(1)));
        assert!(!taken.sees(12, Lsn(1)));
        assert!(!taken.sees(20, Lsn(1)));
        let at_the_turn = snapshot(&format!("{}:{}:", epoch - 2, epoch - 1), 1000);
        assert!(!at_the_turn.sees(3, Lsn(1)), "the next epoch's transaction is later");
    }
}
