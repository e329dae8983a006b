//! The source's physical standbys: while one of them is too far behind, the copy rests (`--max-standby-lag`).
//!
//! A copy competes with a standby for the source's disk and network, and with its replay where the standby holds back what a query
//! needs. How far behind one is, is measured in two ways, of which the larger counts:
//!
//! - `replay_lag` of `pg_stat_replication`. It is null after a while without WAL, but also on a standby that has not replayed
//!   anything since it connected; and one that is shown still when all is replayed says nothing about now.
//! - Our own: when did the source's WAL pass the position that the standby has replayed? That holds too for a standby that was away
//!   for hours, whose `replay_lag` begins at its reconnect, and for one that does not answer.
//!
//! A standby that has replayed all there is does not lag, whatever it shows. A standby without a replay position replays nothing
//! (`pg_receivewal`, a base backup), and a logical walsender is nobody's standby.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::pace::Pace;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::StatusBoard;
use crate::observe::format::duration;
use crate::observe::status::Level;

/// How often the source is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the source may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How many positions of the source are remembered.
const POSITIONS_MAX: usize = 4096;

/// Every standby that the source sends to, beside the position of its WAL; one row without a standby where there is none. The
/// fields of a walsender that the role may not look at are null.
const STANDBYS: &str = "SELECT w.flushed, r.pid IS NOT NULL, r.state IS NOT NULL, \
        concat_ws(' at ', coalesce(nullif(r.application_name, ''), 'unnamed'), host(r.client_addr)), \
        r.replay_lsn, extract(epoch FROM r.replay_lag)::float8 \
    FROM (SELECT pg_catalog.pg_current_wal_flush_lsn() AS flushed) w \
    LEFT JOIN pg_catalog.pg_stat_replication r ON r.application_name IS DISTINCT FROM $1 \
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')";

/// Watches until it is dropped, and lets the copy rest and go on again.
///
/// Without the right to see the standbys, or while the source does not answer, nothing rests.
pub async fn watch(
    source: &ConnectionSpec,
    application_name: &str,
    max_lag: &watch::Receiver<Option<Duration>>,
    pace: &Pace,
    board: &StatusBoard,
) -> Infallible {
    let mut watch = Watch { rest: Rest { pace, board, since: None }, positions: Positions::default(), blind: false };
    let mut max_lag = max_lag.clone();
    loop {
        if let Err(error) = watch.while_connected(source, application_name, &mut max_lag).await {
            tracing::debug!(%error, "watching the source's standbys waits for a connection");
            watch.rest.end("they cannot be asked for now");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

struct Watch<'a> {
    rest: Rest<'a>,
    positions: Positions,
    /// That they cannot be seen was said.
    blind: bool,
}

impl Watch<'_> {
    async fn while_connected(
        &mut self,
        source: &ConnectionSpec,
        application_name: &str,
        max_lag: &mut watch::Receiver<Option<Duration>>,
    ) -> Result<()> {
        let client = source.connect(application_name).await?;
        loop {
            let max = *max_lag.borrow_and_update();
            match max {
                None => self.rest.end("--max-standby-lag is off"),
                Some(max) => {
                    let seen = tokio::time::timeout(ANSWER_MAX, look(&client, application_name)).await;
                    let seen = seen.unwrap_or_else(|_| Err(Error::new(ErrorKind::Transient, "no answer")))?;
                    self.judge(&seen, max, Instant::now());
                }
            }
            // Whoever changes the limit outlives this.
            let _ = tokio::time::timeout(INTERVAL, max_lag.changed()).await;
        }
    }

    fn judge(&mut self, seen: &Seen, max: Duration, now: Instant) {
        if seen.hidden && !self.blind {
            self.blind = true;
            let text = "the role may not see the lag of the source's standbys, so the copy does not wait for them; \
                        GRANT pg_monitor TO it, or give --max-standby-lag off";
            self.rest.board.event(Level::Warn, text);
        }
        self.positions.note(now, seen.flushed, max);
        let lags = seen.standbys.iter().map(|standby| (self.positions.lag(now, seen.flushed, standby), &standby.name));
        let worst = lags.max();
        match (self.rest.since, worst) {
            (None, Some((lag, name))) if lag > max => self.rest.begin(name, lag, max),
            (Some(_), Some((lag, name))) if lag >= max / 2 => self.rest.goes_on(name, lag),
            (Some(_), Some((lag, name))) => {
                self.rest.end(&format!("{name} is {} behind", duration(lag.as_secs_f64())));
            }
            (Some(_), None) => self.rest.end("the one that lagged is gone"),
            (None, _) => {}
        }
    }
}

/// A rest of the copy, said when it begins and when it ends. It ends with this, at the latest.
struct Rest<'a> {
    pace: &'a Pace,
    board: &'a StatusBoard,
    since: Option<Instant>,
}

impl Rest<'_> {
    fn begin(&mut self, name: &str, lag: Duration, max: Duration) {
        self.since = Some(Instant::now());
        self.pace.set_rests(true);
        let (lag, max) = (lag.as_secs_f64(), max.as_secs_f64());
        let text = format!(
            "the source's standby {name} is {} behind, more than --max-standby-lag {}: the copy waits. If it is behind on purpose: \
             `walferry tune --max-standby-lag off --dir …`",
            duration(lag),
            duration(max)
        );
        self.board.event(Level::Warn, text);
        self.show(name, lag);
    }

    fn goes_on(&self, name: &str, lag: Duration) {
        self.show(name, lag.as_secs_f64());
    }

    fn show(&self, name: &str, lag: f64) {
        self.board.set_copy_waits_for(Some(format!("the source's standby {name}, which is {} behind", duration(lag))));
    }

    fn end(&mut self, why: &str) {
        let Some(since) = self.since.take() else { return };
        self.pace.set_rests(false);
        self.board.set_copy_waits_for(None);
        let waited = duration(since.elapsed().as_secs_f64());
        let text = format!("the copy goes on after {waited} of waiting for the source's standbys: {why}");
        self.board.event(Level::Info, text);
    }
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.end("the copy ends");
    }
}

/// What the source says of its standbys.
#[derive(Debug)]
struct Seen {
    /// Up to here its WAL is on its disk, and can be sent.
    flushed: Lsn,
    standbys: Vec<Standby>,
    /// There are some that the role may not look at.
    hidden: bool,
}

#[derive(Debug)]
struct Standby {
    name: String,
    replayed: Lsn,
    replay_lag: Option<f64>,
}

async fn look(client: &Client, application_name: &str) -> Result<Seen> {
    let rows =
        client.query(STANDBYS, &[&application_name]).await.context(|| "looking at the source's standbys".into())?;
    let mut seen = Seen { flushed: Lsn::ZERO, standbys: Vec::new(), hidden: false };
    for row in rows {
        seen.flushed = row.get::<_, PgLsn>(0).into();
        let (there, visible): (bool, bool) = (row.get(1), row.get(2));
        seen.hidden |= there && !visible;
        if let Some(replayed) = row.get::<_, Option<PgLsn>>(4) {
            seen.standbys.push(Standby { name: row.get(3), replayed: replayed.into(), replay_lag: row.get(5) });
        }
    }
    Ok(seen)
}

/// Where the source's WAL was when, the oldest first; long enough to tell twice the greatest lag that may be.
#[derive(Debug, Default)]
struct Positions(VecDeque<(Instant, Lsn)>);

impl Positions {
    fn note(&mut self, now: Instant, flushed: Lsn, max_lag: Duration) {
        let keep = max_lag.saturating_mul(2) + INTERVAL;
        while self.0.get(1).is_some_and(|(at, _)| now.duration_since(*at) > keep) {
            self.0.pop_front();
        }
        // Nothing is lost by one that is left out but a little of the lag.
        let apart = keep / u32::try_from(POSITIONS_MAX).unwrap_or(u32::MAX);
        if self.0.back().is_none_or(|(at, lsn)| *lsn < flushed && now.duration_since(*at) >= apart) {
            self.0.push_back((now, flushed));
        }
    }

    /// How long the standby has been behind for.
    fn lag(&self, now: Instant, flushed: Lsn, standby: &Standby) -> Duration {
        if standby.replayed >= flushed {
            return Duration::ZERO;
        }
        let first = self.0.iter().find(|(_, lsn)| *lsn > standby.replayed);
        let ours = first.map_or(Duration::ZERO, |(at, _)| now.duration_since(*at));
        let theirs = standby.replay_lag.and_then(|lag| Duration::try_from_secs_f64(lag).ok());
        ours.max(theirs.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};
    use crate::source::replication::ReplicationSession;

    const MAX: Duration = Duration::from_secs(10);

    fn standby(replayed: u64, replay_lag: Option<f64>) -> Standby {
        Standby { name: "second".into(), replayed: Lsn(replayed), replay_lag }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_standby_that_has_replayed_everything_does_not_lag_whatever_it_shows() {
        let (positions, now) = (Positions::default(), Instant::now());
        assert_eq!(positions.lag(now, Lsn(100), &standby(100, None)), Duration::ZERO);
        assert_eq!(positions.lag(now, Lsn(100), &standby(100, Some(3600.0))), Duration::ZERO);
    }

    #[test]
    fn without_a_replay_lag_it_counts_when_the_source_was_where_the_standby_is() {
        let (mut positions, begun) = (Positions::default(), Instant::now());
        for second in 0..8 {
            positions.note(begun + seconds(second), Lsn(100 + second), MAX);
        }
        let now = begun + seconds(8);
        let lag = |standby| positions.lag(now, Lsn(107), &standby);
        assert_eq!(lag(standby(103, None)), seconds(4), "the source passed 103 at the fourth second");
        assert_eq!(lag(standby(103, Some(1.5))), seconds(4));
        assert_eq!(lag(standby(103, Some(77.0))), seconds(77));
        assert_eq!(lag(standby(5, None)), seconds(8), "it has been away for longer than is known");
    }

    #[test]
    fn an_idle_source_makes_nobody_lag_and_no_memory_grow() {
        let (mut positions, begun) = (Positions::default(), Instant::now());
        for second in 0..100_000 {
            positions.note(begun + seconds(second), Lsn(100), seconds(86_400));
        }
        assert_eq!(positions.0.len(), 1);
        for second in 0..1_000_000 {
            positions.note(begun + seconds(100_000 + second), Lsn(100 + second), seconds(86_400));
        }
        assert!(positions.0.len() <= POSITIONS_MAX + 2, "{}", positions.0.len());
        let now = begun + seconds(1_100_000);
        assert!(positions.lag(now, Lsn(2_000_000), &standby(1, None)) >= seconds(86_400), "enough of it is kept");
    }

    #[test]
    fn the_copy_rests_above_the_limit_and_goes_on_below_half_of_it() {
        let (pace, board) = (Pace::new(), StatusBoard::new());
        let mut watch = Watch {
            rest: Rest { pace: &pace, board: &board, since: None },
            positions: Positions::default(),
            blind: false,
        };
        let mut rests = |lags: &[f64]| {
            let standbys = lags.iter().map(|lag| standby(1, Some(*lag))).collect();
            watch.judge(&Seen { flushed: Lsn(2), standbys, hidden: false }, MAX, Instant::now());
            board.snapshot().copy.waits_for
        };
        assert_eq!(rests(&[]), None);
        assert_eq!(rests(&[10.0]), None);
        assert!(rests(&[0.1, 11.0]).unwrap().contains("standby second, which is 11"));
        assert!(rests(&[7.0, 0.1]).unwrap().contains("7.0 s"), "the newest lag is shown");
        assert!(rests(&[5.1]).is_some());
        assert_eq!(rests(&[4.9]), None);
        assert_eq!(rests(&[6.0]), None);
        assert!(rests(&[60.0]).is_some());
        assert_eq!(rests(&[]), None, "one that is gone is waited for no more");
        let events = board.snapshot().events;
        assert_eq!(events.len(), 4, "two beginnings and two ends: {events:?}");
        assert!(rests(&[60.0]).is_some());
        drop(watch);
        assert_eq!(board.snapshot().copy.waits_for, None, "with the watch, the rest ends");
    }

    #[tokio::test]
    async fn a_role_that_may_not_see_the_standbys_is_told_so_once_and_the_copy_goes_on() {
        let server = ThrowawayServer::start(&ServerPrograms::find(None).unwrap(), "standbys", &[("fsync", "off")])
            .await
            .unwrap();
        let administrator = server.connect("postgres").await.unwrap();
        administrator.batch_execute("CREATE ROLE mover LOGIN").await.unwrap();
        let spec = ConnectionSpec::parse(&server.url()).unwrap();
        // A walsender of somebody else's, and one of ours.
        let _other = ReplicationSession::connect(&spec, "other").await.unwrap();
        let _ours = ReplicationSession::connect(&spec, "ours").await.unwrap();
        let mover = server.url().replace("postgres@", "mover@");
        let seen = look(&ConnectionSpec::parse(&mover).unwrap().connect("ours").await.unwrap(), "ours").await.unwrap();
        assert!(seen.hidden && seen.standbys.is_empty() && seen.flushed > Lsn::ZERO, "{seen:?}");
        let (pace, board) = (Pace::new(), StatusBoard::new());
        let mut watch = Watch {
            rest: Rest { pace: &pace, board: &board, since: None },
            positions: Positions::default(),
            blind: false,
        };
        watch.judge(&seen, MAX, Instant::now());
        watch.judge(&seen, MAX, Instant::now());
        let events = board.snapshot().events;
        assert!(events.len() == 1 && events[0].text.contains("pg_monitor"), "{events:?}");

        administrator.batch_execute("GRANT pg_monitor TO mover").await.unwrap();
        let seen = look(&ConnectionSpec::parse(&mover).unwrap().connect("ours").await.unwrap(), "ours").await.unwrap();
        assert!(!seen.hidden && seen.standbys.is_empty(), "a walsender that replays nothing is no standby: {seen:?}");
    }
}
