//! A physical standby of the source that the reading is done on: rows, the stream, or both. Everything that is written stays the
//! primary's.
//!
//! **Snapshots of a standby (H5).** There the list of running transactions that `pg_current_snapshot()` prints is always empty: a
//! standby keeps them elsewhere in the snapshot. So what it prints is exact only when nothing was running (`xmin = xmax`), which on a
//! busy primary never comes. But a standby makes commits visible in the order of the WAL, one record after the other, so its snapshot
//! shows exactly those whose commit record was replayed. Where that ended is known when the replay rested while the snapshot was taken:
//!
//! ```text
//!   replayed up to R ──► snapshot ──► received up to R, by the same walreceiver
//! ```
//!
//! A standby that streams replays nothing that its walreceiver has not flushed, so from the first reading to the last no record was
//! being replayed. Every commit before R is in the snapshot and none from R on: to whoever takes changes from the stream that is all
//! there is to know (I3), and no long transaction has to be waited for.
//!
//! **H1 on a standby.** The snapshot must show all that committed before the stream begins. A marker that is sent to the primary first,
//! and waited for here, lies behind that; and `xmin` is what it says on a standby too.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::PgLsn;

use super::marker;
use super::replication::ReplicationSession;
use super::slot::{RESYNC, ServerIdentity};
use super::snapshot::SnapshotData;
use super::version::Version;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::sql;

/// How often the standby is asked whether it may be taken from.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How long nothing may be replayed of what the primary has written before it is said.
const REPLAY_MAX: Duration = Duration::from_secs(600);
/// How often the primary is asked to log which transactions are running, while a slot is made on a standby.
const LOG_INTERVAL: Duration = Duration::from_millis(500);

/// Standbys of the source that do the reading.
#[derive(Clone, Default)]
pub struct Standbys {
    /// Where rows are read.
    pub copy: Option<ConnectionSpec>,
    /// Where the slot is, and the stream comes from.
    pub stream: Option<ConnectionSpec>,
    /// Where the slot of the way there is, on the way back.
    pub left: Option<ConnectionSpec>,
}

impl Standbys {
    /// The same servers, by another database.
    #[must_use]
    pub fn with_database(&self, database: &str) -> Standbys {
        let of = |spec: &Option<ConnectionSpec>| spec.as_ref().map(|spec| spec.with_database(database));
        Standbys { copy: of(&self.copy), stream: of(&self.stream), left: of(&self.left) }
    }

    /// On the way back, whose source has no standby that we know of.
    #[must_use]
    pub fn reversed(self) -> Standbys {
        Standbys { copy: None, stream: None, left: self.stream }
    }

    /// All that are named.
    pub fn all(&self) -> impl Iterator<Item = &ConnectionSpec> {
        self.copy.iter().chain(&self.stream)
    }
}

/// A snapshot of a standby that was exported, and what it shows.
pub(super) struct Taken {
    pub(super) name: String,
    pub(super) data: SnapshotData,
    pub(super) session: Client,
}

/// Takes a snapshot on a standby that may serve any table whose changes are all streamed since a snapshot of the primary with this xmax.
///
/// # Errors
/// `Gap` when it is no standby of this primary, or on another timeline; `Transient` when it does not replay what the primary writes.
pub(super) async fn take(
    primary: &ConnectionSpec,
    standby: &ConnectionSpec,
    application_name: &str,
    server: &ServerIdentity,
    xmin_at_least: u64,
) -> Result<Taken> {
    prove(standby, application_name, server).await?;
    let on_primary = primary.connect(application_name).await?;
    // `local`: a dead standby must not hold up the marker (H34).
    on_primary.batch_execute("SET synchronous_commit = local").await?;
    let begun = marker::send(&on_primary, "standby").await?.lsn;
    let session = standby.connect(application_name).await?;
    let (mut replayed, mut moved) = (Lsn::ZERO, Instant::now());
    loop {
        let look = Look::take(&session).await?;
        if !look.in_recovery {
            return Err(promoted(&standby.describe()));
        }
        if look.replayed > replayed {
            (replayed, moved) = (look.replayed, Instant::now());
        }
        if look.replayed >= begun && look.shown.xmin >= xmin_at_least {
            let shown = &look.shown;
            let data = if look.rested() {
                Some(SnapshotData { xmin: shown.xmax, insert_lsn: look.replayed, ..shown.clone() })
            } else if shown.xmin == shown.xmax {
                // Whatever was replayed by then, the primary had written before now (H6).
                let insert: PgLsn =
                    on_primary.query_typed_one("SELECT pg_catalog.pg_current_wal_insert_lsn()", &[]).await?.get(0);
                Some(SnapshotData { insert_lsn: insert.into(), ..shown.clone() })
            } else {
                None
            };
            if let Some(data) = data {
                return Ok(Taken { name: look.name, data, session });
            }
        }
        if look.replayed < begun && moved.elapsed() > REPLAY_MAX {
            let text = format!("the standby {} has replayed up to {replayed} and no further", standby.describe());
            return Err(Error::new(ErrorKind::Transient, text).hint(
                "Look at its log, at pg_stat_wal_receiver there, and whether its replay is paused (SELECT pg_wal_replay_resume()).",
            ));
        }
        session.batch_execute("ROLLBACK").await?;
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// A snapshot, and where the replay was around it.
struct Look {
    name: String,
    shown: SnapshotData,
    in_recovery: bool,
    /// Before the snapshot.
    replayed: Lsn,
    receiver: Option<i32>,
    /// After it.
    received: Option<Lsn>,
    receiver_after: Option<i32>,
}

impl Look {
    /// Sends all at once, so that little time lies between; the session is then in the snapshot's transaction.
    async fn take(session: &Client) -> Result<Look> {
        let (before, (), after) = tokio::try_join!(
            session.query_typed_one(
                "SELECT coalesce(pg_catalog.pg_last_wal_replay_lsn(), '0/0'), (SELECT pid FROM pg_catalog.pg_stat_wal_receiver)",
                &[],
            ),
            session.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            // The snapshot is taken before any of these is called.
            session.query_typed_one(
                "SELECT pg_catalog.txid_current_snapshot()::text, pg_catalog.pg_export_snapshot(), pg_catalog.pg_is_in_recovery(), \
                        pg_catalog.pg_last_wal_receive_lsn(), (SELECT pid FROM pg_catalog.pg_stat_wal_receiver)",
                &[],
            ),
        )
        .context(|| "taking a snapshot of the standby".into())?;
        let replayed = Lsn::from(before.get::<_, PgLsn>(0));
        Ok(Look {
            name: after.get(1),
            shown: SnapshotData::parse(after.get(0), replayed)?,
            in_recovery: after.get(2),
            replayed,
            receiver: before.get(1),
            received: after.get::<_, Option<PgLsn>>(3).map(Lsn::from),
            receiver_after: after.get(4),
        })
    }

    /// Whether no record can have been in replay while the snapshot was taken (H5).
    fn rested(&self) -> bool {
        self.receiver.is_some() && self.receiver == self.receiver_after && self.received == Some(self.replayed)
    }
}

/// Proves that it is a standby of this very server, on its timeline.
///
/// # Errors
/// `Gap` when it is not.
pub async fn prove(standby: &ConnectionSpec, application_name: &str, server: &ServerIdentity) -> Result<()> {
    let mut session = ReplicationSession::connect(standby, application_name).await?;
    let proven = prove_session(&mut session, server).await;
    session.close().await;
    proven.context(|| format!("looking at the standby {}", standby.describe()))
}

async fn prove_session(session: &mut ReplicationSession, server: &ServerIdentity) -> Result<()> {
    let found = session.identify_system().await?;
    let proven = server.prove(&ServerIdentity { system: found.system_id, timeline: found.timeline });
    proven.map_err(|error| match found.timeline == server.timeline {
        true => error,
        // What it has become matters more than which number it has.
        false => error.hint(after_promotion()),
    })
}

fn promoted(name: &str) -> Error {
    Error::new(ErrorKind::Gap, format!("{name} is a standby no more: it was promoted, or has never been one"))
        .hint(after_promotion())
}

fn after_promotion() -> String {
    format!(
        "If that server is the primary now, applications write there: give it as --source, without the option that named it as a \
         standby. If it is not, name another standby, or none. {RESYNC}"
    )
}

/// Watches the standby that the stream comes from, until it is no standby of this primary any more. A stream goes on over a promotion
/// without a word, and from then on carries what is written there (H16): the migration has to end then, and the next start is refused
/// by the timeline. A cutover cannot go through meanwhile: its marker is sent to the primary, and never arrives.
///
/// # Errors
/// `Gap` when it was promoted, or follows another timeline.
pub async fn watch(standby: &ConnectionSpec, application_name: &str, server: &ServerIdentity) -> Result<()> {
    const INTERVAL: Duration = Duration::from_secs(1);
    loop {
        let outcome = async {
            let mut session = ReplicationSession::connect(standby, application_name).await?;
            loop {
                prove_session(&mut session, server).await?;
                tokio::time::sleep(INTERVAL).await;
            }
        };
        let outcome: Result<()> = outcome.await;
        match outcome {
            Err(error) if error.kind() == ErrorKind::Gap => {
                return Err(error.context(format!("the stream comes from the standby {}", standby.describe())));
            }
            Err(error) => tracing::debug!(%error, "watching the standby waits for a connection"),
            Ok(()) => {}
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Makes a slot on a standby, without a snapshot; answers its consistent point. `tell` hears what it waits for.
///
/// The standby can only tell from a record of the primary which transactions are running (`xl_running_xacts`): the primary is asked
/// to write it where our role may ask for that, and otherwise writes one every 15 seconds when there is anything to write.
pub(super) async fn create_slot(
    primary: &ConnectionSpec,
    standby: &ConnectionSpec,
    application_name: &str,
    slot: &str,
) -> Result<Lsn> {
    let mut session = ReplicationSession::connect(standby, application_name).await?;
    let version = Version(session.server_version().unwrap_or_default());
    let how = version.no_snapshot();
    let command = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput {how}", sql::identifier(slot));
    let on_primary = primary.connect(application_name).await?;
    on_primary.batch_execute("SET synchronous_commit = local").await?;
    let made = tokio::select! {
        made = session.simple_query(&command) => {
            made.context(|| format!("creating the slot {slot} on the standby {}", standby.describe()))?
        }
        error = log_running_transactions(&on_primary) => return Err(error),
    };
    let point = made.first().and_then(|row| row.get(1)).and_then(Option::as_deref).and_then(|text| text.parse().ok());
    session.close().await;
    point.ok_or_else(|| Error::new(ErrorKind::Other, "the standby's answer to CREATE_REPLICATION_SLOT cannot be read"))
}

/// Until it is dropped; answers when the primary cannot be asked at all.
async fn log_running_transactions(primary: &Client) -> Error {
    let mut may = true;
    loop {
        let outcome = async {
            if may {
                match primary.query_typed("SELECT pg_catalog.pg_log_standby_snapshot()", &[]).await {
                    Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => may = false,
                    outcome => {
                        return outcome.map(|_| ()).context(|| "asking the primary which transactions run".into());
                    }
                }
            }
            // Anything in the WAL makes its background writer write one by itself.
            marker::send(primary, "standby").await.map(|_| ())
        };
        if let Err(error) = outcome.await {
            return error;
        }
        tokio::time::sleep(LOG_INTERVAL).await;
    }
}

/// Why a slot can be read from no more, by a row of `pg_replication_slots` as JSON (`conflicting` since 16, `invalidation_reason` since
/// 17); SQL.
pub(super) const INVALIDATED: &str = "coalesce(pg_catalog.to_jsonb(s)->>'invalidation_reason', \
    CASE WHEN pg_catalog.to_jsonb(s)->>'conflicting' = 'true' THEN 'conflict with recovery' END)";

#[cfg(test)]
mod tests {
    use super::*;

    fn look(replayed: u64, received: Option<u64>, receivers: (Option<i32>, Option<i32>)) -> Look {
        Look {
            name: String::new(),
            shown: SnapshotData::parse("10:20:", Lsn(replayed)).unwrap(),
            in_recovery: true,
            replayed: Lsn(replayed),
            receiver: receivers.0,
            received: received.map(Lsn),
            receiver_after: receivers.1,
        }
    }

    #[test]
    fn h05_a_replay_rested_only_when_all_that_one_walreceiver_had_received_was_replayed_before() {
        assert!(look(7, Some(7), (Some(1), Some(1))).rested());
        assert!(!look(7, Some(8), (Some(1), Some(1))).rested(), "the next record may have been in replay");
        assert!(!look(7, Some(7), (Some(1), Some(2))).rested(), "something else may have been replayed in between");
        assert!(!look(7, Some(7), (None, None)).rested(), "it comes from an archive");
        assert!(!look(7, None, (Some(1), Some(1))).rested());
    }
}
