//! A peer that says nothing any more, on a connection that looks alive: behind a proxy that lost the other half, no probe of TCP
//! finds it. A statement may take hours, so no timeout on its answer can tell either. What tells is that both ends wait for each
//! other: there is work and none of it moves, and on both servers every session of ours waits for us.
//!
//! The stream from the source has a watchdog of its own, since there the peer can be asked to answer (`source/receive.rs`).

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Running;
use crate::connection::ConnectionSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::status::{Phase, Status};

const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long nothing may move while everybody waits. An error of judgement costs a reconnect, and nothing else.
const STALL_MAX: Duration = Duration::from_secs(30);
/// How long a server may take to say what our sessions do.
const ANSWER_MAX: Duration = Duration::from_secs(10);

impl Running {
    /// Waits for a stall, and answers with the transient error to begin the phases again with.
    pub(super) async fn stall(&self) -> Error {
        let mut moved = Instant::now();
        let mut progress = None;
        let mut looks_stalled = false;
        loop {
            sleep(LOOK_INTERVAL).await;
            let status = self.board.snapshot();
            let now = Progress::of(&status);
            let waits_for_others = self.waits_for_snapshot.load(Ordering::Relaxed) || self.tune.pace().holds_somebody();
            if progress.replace(now) != Some(now) || !has_work(self.board.phase(), &status) || waits_for_others {
                moved = Instant::now();
            }
            if moved.elapsed() < STALL_MAX {
                looks_stalled = false;
                continue;
            }
            // Twice: between two statements every session waits for us.
            let stalled = self.everybody_waits().await;
            if Progress::of(&self.board.snapshot()) != now {
                continue;
            }
            if stalled && looks_stalled {
                let text = format!(
                    "for {} seconds nothing has moved, and every session on both servers waits for us: a connection is dead",
                    moved.elapsed().as_secs()
                );
                return Error::new(ErrorKind::Transient, text);
            }
            looks_stalled = stalled;
        }
    }

    /// Whether no session of ours does anything, on either server. One that cannot be asked is for others to miss.
    async fn everybody_waits(&self) -> bool {
        let both = async {
            let mut busy = 0;
            for standby in self.config.standbys.all() {
                busy += self.busy_sessions(standby).await?;
            }
            let (source, target) =
                tokio::try_join!(self.busy_sessions(&self.config.source), self.busy_sessions(&self.config.target))?;
            Result::<i64>::Ok(busy + source + target)
        };
        matches!(timeout(ANSWER_MAX, both).await, Ok(Ok(0)))
    }

    async fn busy_sessions(&self, server: &ConnectionSpec) -> Result<i64> {
        let session = server.connect(&self.application_name).await?;
        let row = session
            .query_one(
                "SELECT count(*) FROM pg_catalog.pg_stat_activity \
                 WHERE application_name = $1 AND pid <> pg_catalog.pg_backend_pid() AND backend_type = 'client backend' \
                 AND state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'",
                &[&self.application_name],
            )
            .await?;
        Ok(row.get(0))
    }
}

/// What moves when anything does.
#[derive(Clone, Copy, PartialEq)]
struct Progress {
    phase: Phase,
    copied: (u64, u64, u64),
    indexes: u64,
    applied: (u64, u64, Lsn),
}

impl Progress {
    fn of(status: &Status) -> Progress {
        Progress {
            phase: status.phase,
            copied: (status.copy.tables_done, status.copy.rows_done, status.copy.bytes_done),
            indexes: status.indexes.done,
            applied: (status.apply.batches, status.apply.changes, status.apply.applied_lsn),
        }
    }
}

/// Whether anything should be moving. A cutover has timeouts of its own.
fn has_work(phase: Phase, status: &Status) -> bool {
    match phase {
        Phase::Copying | Phase::Indexing => !status.copy.paused,
        Phase::CatchingUp => !status.apply.paused,
        Phase::Following => !status.apply.paused && status.stream.received_lsn > status.apply.applied_lsn,
        _ => false,
    }
}
