//! One point at which both sides can be compared while writes go on: a snapshot of the source, and one of the target taken while
//! it holds exactly what the first one shows. In the process of the migration, because that is who applies.
//!
//! ```text
//!  source   ── marker C ── X0 ───────── snapshot S ── marker ─►                  what S shows, in the order of commits:
//!  queue    ─── C ── every transaction behind C ─────────────►  read up to it ─► a beginning of it, up to P? (H35)
//!  apply    ─── C applied ────────── rests at E ─────────────────────────► goes to P, rests ──────► goes on
//!  target                                                                                snapshot T
//! ```
//!
//! The apply rests at E, wherever it is past C, while S is taken; so nothing past E is applied that S might not show. What S shows is
//! decided as for a copied table, by xid and commit LSN (I3), for every transaction behind C. Of those before C, which are all
//! applied, S might not show one that still waits within its commit, such as for a synchronous standby that never answers. It has an
//! xid below X0, which was assigned after C had committed, and S still lists it as running: so each such xid that was not seen to
//! commit behind C is looked for among the sessions (`Lingering`).
//!
//! When what S shows is not a beginning of the stream, another snapshot is taken at once, and after `REST_MAX` the apply goes on for a
//! while before that. Usually it rests for some ten milliseconds, and never longer than `HOLD_MAX`; the hold is an object of this
//! process ([`Hold`]), so nothing that dies can leave it behind.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::history::{CaughtUp, History, Stream, marker};
use super::prefix::prefix;
use crate::apply::gate::{Gate, Hold};
use crate::connection::ConnectionSpec;
use crate::control::{Answer, PointRequest};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::StatusBoard;
use crate::observe::status::Phase;
use crate::pause::Paused;
use crate::queue::Queue;
use crate::source::slot::ServerIdentity;
use crate::source::snapshot::{HeldSnapshot, SnapshotData};
use crate::timescale::compress::HOLD_COMPRESSION;

/// What our sessions call themselves here: not as the migration's others do, so that a cutover ends them like anybody's.
pub const APPLICATION_NAME: &str = "walferry verify";

/// How long the apply may rest for one try.
const HOLD_MAX: Duration = Duration::from_secs(5);
/// How long a unit that was begun may take to end; the apply does not rest meanwhile.
const UNIT_MAX: Duration = Duration::from_secs(120);
/// For how long new snapshots are taken while the apply rests. Where some commits wait for the disk and others do not, most snapshots
/// show one of these and not one of those before it; each costs a few milliseconds.
const REST_MAX: Duration = Duration::from_millis(400);
/// How often the apply is held before it is given up.
const RESTS: u32 = 30;
/// How long one transaction may stand in the way while the apply rests: no longer than a commit that waits for the disk.
const HIDDEN_MAX: Duration = Duration::from_millis(50);
/// How long the apply goes on in between; a little longer each time.
const GO_ON: Duration = Duration::from_millis(30);
/// How long a commit takes at most that waits for no standby. What has been seen running for longer, and waits for none, has not begun to commit.
const COMMIT_MAX: Duration = Duration::from_millis(500);
/// Connections that have to be left on each side, below the most that there may be: two for us on the source, and one for what comes now and then.
const ROOM_MIN: usize = 3;
/// How often the snapshots' sessions are used, so that nothing in between takes them for idle.
const PING: Duration = Duration::from_secs(10);

/// One point on both sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommonPoint {
    /// What `SET TRANSACTION SNAPSHOT` takes on the source.
    pub source_snapshot: String,
    /// The same on the target.
    pub target_snapshot: String,
    /// Everything of the source's stream that ends here or before is in both, and nothing after it.
    pub source_lsn: Lsn,
    /// How many snapshots it took.
    pub tries: u32,
    /// How long the apply rested, in milliseconds, over all tries.
    pub rested_ms: f64,
}

/// Takes common points in the process of a migration.
pub struct PointTaker {
    /// The server whose snapshot is followed.
    pub source: ConnectionSpec,
    /// The server that is written to.
    pub target: ConnectionSpec,
    /// Who the source has to be (H5, H15).
    pub server: ServerIdentity,
    /// Where the transactions pass.
    pub queue: Queue,
    /// Where the apply can be held.
    pub gate: Gate,
    /// Whether the operator holds it.
    pub paused: watch::Receiver<Paused>,
    /// What the migration is doing.
    pub board: StatusBoard,
}

/// A common point whose snapshots live as long as this.
pub struct HeldPoint {
    /// The point.
    pub point: CommonPoint,
    source: HeldSnapshot,
    target: Client,
}

impl HeldPoint {
    /// Keeps both snapshots open; answers when one of them is gone.
    pub async fn keep(&mut self) -> Error {
        loop {
            tokio::time::sleep(PING).await;
            let target = async {
                self.target.batch_execute("SELECT 1").await.context(|| "keeping the target's snapshot open".into())
            };
            if let Err(error) = tokio::try_join!(self.source.ping(), target) {
                return error;
            }
        }
    }
}

impl PointTaker {
    /// Takes one point after the other, and keeps each until whoever asked for it is gone.
    pub async fn serve(&self, requested: &mut mpsc::Receiver<PointRequest>) -> std::convert::Infallible {
        let mut kept = JoinSet::new();
        loop {
            let Some(PointRequest { answers }) = requested.recv().await else { return std::future::pending().await };
            // The ended ones are taken out, so that they do not pile up.
            while kept.try_join_next().is_some() {}
            let tell = |text: String| drop(answers.send(Answer::Waits(text)));
            let taken = tokio::select! {
                taken = self.take(&tell) => taken,
                // With it goes the hold.
                () = answers.closed() => continue,
            };
            match taken {
                Err(error) => drop(answers.send(Answer::from(&error))),
                Ok(mut held) => {
                    drop(answers.send(Answer::Point(held.point.clone())));
                    kept.spawn(async move {
                        tokio::select! {
                            error = held.keep() => drop(answers.send(Answer::from(&error))),
                            () = answers.closed() => {}
                        }
                    });
                }
            }
        }
    }

    /// Takes one. `tell` gets what is waited for.
    ///
    /// # Errors
    /// `Blocked` when the migration does not follow, its apply is paused, or no snapshot of the source was a beginning of the stream;
    /// else what a server or the queue says. The apply goes on in any case.
    pub async fn take(&self, tell: &(dyn Fn(String) + Sync)) -> Result<HeldPoint> {
        self.look_whether_it_follows()?;
        self.look_for_room()?;
        let source = self.source.connect(APPLICATION_NAME).await?;
        // `local`: a dead standby must not hold up the marker (H34).
        source.batch_execute("SET synchronous_commit = local").await?;
        let mut snapshot = HeldSnapshot::take(&self.source, APPLICATION_NAME, &self.server, 0).await?;
        let target = self.target.connect(APPLICATION_NAME).await?;
        // For as long as this session is there.
        target.batch_execute(HOLD_COMPRESSION).await.context(|| "holding the compression of chunks".into())?;
        // The second time there is little to catch up with, and so little in the history.
        self.catch_up(&source, tell).await?;
        let caught_up = self.catch_up(&source, tell).await?;

        let history = History::begin(&source, caught_up).await?;
        let mut taking = Taking {
            taker: self,
            source: &source,
            target: &target,
            history,
            tries: 0,
            rested: Duration::ZERO,
            target_has_begun: false,
        };
        let mut hindered = String::new();
        for rests in 1..=RESTS {
            self.look_whether_it_follows()?;
            match taking.at_one_rest(&mut snapshot).await? {
                Attempt::Taken { target_snapshot, source_lsn } => {
                    let (tries, rested_ms) = (taking.tries, taking.rested.as_secs_f64() * 1000.0);
                    let source_snapshot = snapshot.name.clone();
                    let point = CommonPoint { source_snapshot, target_snapshot, source_lsn, tries, rested_ms };
                    return Ok(HeldPoint { point, source: snapshot, target });
                }
                Attempt::Hindered { why, .. } => hindered = why,
            }
            if rests % 5 == 3 {
                tell(format!("taking more snapshots of the source: {hindered}"));
            }
            tokio::time::sleep(GO_ON * rests).await;
        }
        let text = format!(
            "none of {} snapshots of the source is a point that the target can be brought to: {hindered}",
            taking.tries
        );
        Err(Error::new(ErrorKind::Blocked, text).hint(
            "Nothing was compared, and the apply goes on. Look on the source for sessions that wait for SyncRep in pg_stat_activity \
             (a synchronous standby that is gone), then try again.",
        ))
    }

    fn look_whether_it_follows(&self) -> Result<()> {
        let phase = self.board.phase();
        if phase != Phase::Following {
            let text =
                format!("the migration is {}: only one that follows can be compared while writes go on", phase.title());
            return Err(Error::new(ErrorKind::Blocked, text).hint("`walferry status` says what it waits for."));
        }
        if self.paused.borrow().apply {
            return Err(Error::new(
                ErrorKind::Blocked,
                "the apply is paused, so the target comes to no point of the source",
            )
            .hint("Let it go on first: `walferry resume`."));
        }
        Ok(())
    }

    /// H28: more connections than there may be are not worth a comparison.
    fn look_for_room(&self) -> Result<()> {
        for (side, spec) in [("source", &self.source), ("target", &self.target)] {
            if spec.connections().room() < ROOM_MIN {
                let text = format!("a comparison needs {ROOM_MIN} more connections to the {side} than there may be");
                return Err(Error::new(ErrorKind::Blocked, text).hint(format!(
                    "Give `migrate` a larger --max-{side}-connections, or wait for what else goes on."
                )));
            }
        }
        Ok(())
    }

    /// Waits until a marker is applied. So the apply is past every snapshot that tables were copied under, and not far behind.
    async fn catch_up(&self, source: &Client, tell: &(dyn Fn(String) + Sync)) -> Result<CaughtUp> {
        let stream = Stream::open(&self.queue)?;
        let content = marker(source).await?;
        let end = {
            let reached = async {
                let end = stream.read_up_to(&content).await?;
                self.gate.is_reached(end).await;
                Result::<Lsn>::Ok(end)
            };
            let mut reached = std::pin::pin!(reached);
            loop {
                if let Ok(reached) = timeout(Duration::from_secs(2), &mut reached).await {
                    break reached?;
                }
                self.look_whether_it_follows()?;
                let lag = self.board.snapshot().lag.seconds;
                let lag = lag.map_or(String::new(), |lag| format!(": {lag:.0} s behind"));
                tell(format!("waiting until the target has caught up{lag}"));
            }
        };
        Ok(CaughtUp { stream, end })
    }
}

/// Shows that the apply is held, until it is dropped.
struct ShownAsHeld<'a>(&'a StatusBoard);

impl<'a> ShownAsHeld<'a> {
    fn on(board: &'a StatusBoard) -> ShownAsHeld<'a> {
        board.set_apply_held(true);
        ShownAsHeld(board)
    }
}

impl Drop for ShownAsHeld<'_> {
    fn drop(&mut self) {
        self.0.set_apply_held(false);
    }
}

enum Attempt {
    Taken {
        target_snapshot: String,
        source_lsn: Lsn,
    },
    /// What the snapshot shows is not on the target.
    Hindered {
        /// Why.
        why: String,
        /// The transaction that stands in the way, when it may be out of it at once.
        by: Option<u32>,
    },
}

impl Attempt {
    fn hindered(why: impl Into<String>) -> Attempt {
        Attempt::Hindered { why: why.into(), by: None }
    }
}

/// What the tries share.
struct Taking<'a> {
    taker: &'a PointTaker,
    source: &'a Client,
    target: &'a Client,
    history: History,
    tries: u32,
    rested: Duration,
    /// Whether a transaction was begun on the target.
    target_has_begun: bool,
}

impl Taking<'_> {
    async fn at_one_rest(&mut self, snapshot: &mut HeldSnapshot) -> Result<Attempt> {
        let hold = self.taker.gate.hold();
        let Ok(applied) = timeout(UNIT_MAX, hold.rests(Lsn::ZERO)).await else {
            return Ok(Attempt::hindered("the apply did not come to rest"));
        };
        if applied < self.history.start {
            // The target has crashed since, and what is to be applied again is not in the history.
            return Ok(Attempt::hindered("the apply has gone back"));
        }
        let (began, _shown) = (Instant::now(), ShownAsHeld::on(&self.taker.board));
        let outcome = timeout(HOLD_MAX, async {
            let mut hidden = (0, Instant::now());
            loop {
                let attempt = self.attempt(&hold, applied, snapshot).await?;
                let Attempt::Hindered { by: Some(xid), .. } = attempt else { return Ok(attempt) };
                if xid != hidden.0 {
                    hidden = (xid, Instant::now());
                }
                if began.elapsed() > REST_MAX || hidden.1.elapsed() > HIDDEN_MAX {
                    return Ok(attempt);
                }
            }
        });
        let outcome = outcome.await;
        drop(hold);
        self.rested += began.elapsed();
        outcome.unwrap_or_else(|_| {
            let text = format!("it took longer than the {} seconds that the apply may rest", HOLD_MAX.as_secs());
            Ok(Attempt::hindered(text))
        })
    }

    async fn attempt(&mut self, hold: &Hold, applied: Lsn, snapshot: &mut HeldSnapshot) -> Result<Attempt> {
        self.tries += 1;
        // A cutover that has begun meanwhile needs the apply more.
        self.taker.look_whether_it_follows()?;
        snapshot.renew().await?;
        let content = marker(self.source).await?;
        self.history.stream.read_up_to(&content).await?;
        let end = match prefix(&self.history.streamed(), &snapshot.data, applied) {
            Ok(end) => end,
            Err(hidden) => {
                let xid = hidden.xid;
                let why = format!("transaction {xid} has committed at {} and is not visible yet", hidden.commit_lsn);
                return Ok(Attempt::Hindered { why, by: Some(xid) });
            }
        };
        if let Some(why) = self.lingering(&snapshot.data).await? {
            return Ok(Attempt::hindered(why));
        }
        hold.up_to(end);
        let source_lsn = hold.rests(end).await;
        if source_lsn != end {
            return Ok(Attempt::hindered(format!("the apply has gone past {end}")));
        }
        let doing = || "taking a snapshot of the target".to_owned();
        if std::mem::replace(&mut self.target_has_begun, true) {
            // By a try that took too long: its snapshot is too old.
            self.target.batch_execute("ROLLBACK").await.context(doing)?;
        }
        self.target.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.context(doing)?;
        let exported = self.target.query_typed_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await;
        Ok(Attempt::Taken { target_snapshot: exported.context(doing)?.get(0), source_lsn })
    }

    /// Why one of the transactions that the snapshot shows as running may have committed before the history begins, if one may have.
    async fn lingering(&self, snapshot: &SnapshotData) -> Result<Option<String>> {
        let in_question: Vec<String> =
            self.history.in_question(snapshot).into_iter().map(|xid| (xid as u32).to_string()).collect();
        if in_question.is_empty() {
            return Ok(None);
        }
        let rows = self
            .source
            .query_typed(SESSIONS_OF, &[(&in_question, Type::TEXT_ARRAY)])
            .await
            .context(|| "looking for the source's long transactions".into())?;
        let waits_for_standbys = !rows.first().is_none_or(|row| row.get::<_, bool>(5));
        for row in rows {
            let session =
                Session { is_there: row.get(1), is_prepared: row.get(2), state: row.get(3), wait_event: row.get(4) };
            let one_commits_prepared = row.get(6);
            let lingering = session.lingers(waits_for_standbys, one_commits_prepared, self.history.begun.elapsed());
            if let Some(why) = lingering {
                return Ok(Some(format!("transaction {} {}", row.get::<_, String>(0), why.text())));
            }
        }
        Ok(None)
    }
}

/// For each xid: its session, whether it is prepared, what it does; whether there are no synchronous standbys; whether somebody
/// without an xid of his own waits for one, as COMMIT PREPARED does. States are NULL without the right to see them.
const SESSIONS_OF: &str = "SELECT x, a.pid IS NOT NULL, p.transaction IS NOT NULL, a.state, a.wait_event, \
        pg_catalog.current_setting('synchronous_standby_names') = '', \
        EXISTS (SELECT FROM pg_catalog.pg_stat_activity o WHERE o.wait_event = 'SyncRep' AND o.backend_xid IS NULL) \
     FROM pg_catalog.unnest($1) x \
     LEFT JOIN pg_catalog.pg_stat_activity a ON a.backend_xid = x::xid \
     LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = x::xid";

/// The session of a transaction that has been running since before the history began.
struct Session {
    is_there: bool,
    is_prepared: bool,
    state: Option<String>,
    wait_event: Option<String>,
}

/// Why a transaction may have written its commit record already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lingering {
    ForStandby,
    JustEnded,
    Perhaps,
    NotShown,
}

impl Lingering {
    fn text(self) -> &'static str {
        match self {
            Lingering::ForStandby => {
                "waits for a synchronous standby within its commit: the target has it, nobody else sees it"
            }
            Lingering::JustEnded => "has just ended",
            Lingering::Perhaps => "is at work and may be committing",
            Lingering::NotShown => {
                "may wait for a synchronous standby within its commit, which only a role with pg_monitor is shown"
            }
        }
    }
}

impl Session {
    fn lingers(&self, standbys: bool, one_commits_prepared: bool, watched: Duration) -> Option<Lingering> {
        if self.is_prepared {
            return one_commits_prepared.then_some(Lingering::ForStandby);
        }
        if !self.is_there {
            return Some(Lingering::JustEnded);
        }
        if self.wait_event.as_deref() == Some("SyncRep") {
            return Some(Lingering::ForStandby);
        }
        match self.state.as_deref() {
            // It waits for its application between two statements.
            Some(state) if state.starts_with("idle in transaction") => None,
            None if standbys => Some(Lingering::NotShown),
            _ => (watched < COMMIT_MAX).then_some(Lingering::Perhaps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(state: Option<&str>, wait_event: Option<&str>) -> Session {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Session { is_there: true, is_prepared: false, state: owned(state), wait_event: owned(wait_event) }
    }

    #[test]
    fn h35_only_a_session_that_cannot_be_committing_is_taken_for_running() {
        let (soon, late) = (COMMIT_MAX / 2, COMMIT_MAX * 2);
        let idle = session(Some("idle in transaction"), Some("ClientRead"));
        assert_eq!(idle.lingers(true, true, soon), None);
        let waits = session(Some("active"), Some("SyncRep"));
        assert_eq!(waits.lingers(true, false, late), Some(Lingering::ForStandby));
        let works = session(Some("active"), None);
        assert_eq!(works.lingers(true, false, soon), Some(Lingering::Perhaps));
        assert_eq!(works.lingers(true, false, late), None);
        let not_shown = session(None, None);
        assert_eq!(not_shown.lingers(true, false, late), Some(Lingering::NotShown));
        assert_eq!(not_shown.lingers(false, false, late), None);
        let gone = Session { is_there: false, ..session(None, None) };
        assert_eq!(gone.lingers(false, false, late), Some(Lingering::JustEnded));
        let prepared = Session { is_prepared: true, ..gone };
        assert_eq!(prepared.lingers(true, false, soon), None);
        assert_eq!(prepared.lingers(true, true, late), Some(Lingering::ForStandby));
    }
}
