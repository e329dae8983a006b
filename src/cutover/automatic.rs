//! A cutover that begins by itself, when the target is close and the time has come.

use std::time::Duration;

use tokio::sync::mpsc;

use super::{FenceMode, Options, SOURCE_BLOCKER};
use crate::control::{Answer, CutoverRequest};
use crate::observe::board::StatusBoard;
use crate::observe::status::{Level, Phase, Status};
use crate::observe::wall_clock;

/// How often it is looked whether the time has come.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// When to cut over without being asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Automatic {
    /// How.
    pub options: Options,
    /// Not while the target is further behind than this.
    pub max_lag: Duration,
    /// Not before, in milliseconds since 1970.
    pub not_before: Option<i64>,
    /// Not after, likewise.
    pub not_after: Option<i64>,
    /// How long to wait after a try that was given up.
    pub pause: Duration,
}

/// What to do at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Now {
    Wait,
    Begin,
    TooLate,
}

impl Automatic {
    fn judge(&self, status: &Status, now: i64) -> Now {
        if self.not_after.is_some_and(|not_after| now > not_after) {
            return Now::TooLate;
        }
        let close = status.lag.seconds.is_some_and(|seconds| seconds <= self.max_lag.as_secs_f64());
        let time = self.not_before.is_none_or(|not_before| now >= not_before);
        // What it looks at itself it may find waived, or not in the way of its fence.
        let looks_itself = !self.options.waive.is_empty() || self.options.fence != FenceMode::default();
        let only_on_source = || status.blockers.iter().all(|blocker| blocker.starts_with(SOURCE_BLOCKER));
        let ready = status.phase == Phase::Following && (status.ready_to_cutover || looks_itself && only_on_source());
        if close && time && ready { Now::Begin } else { Now::Wait }
    }

    /// Asks for a cutover, again and again, until one goes through or the time is over. Ends with the migration.
    pub(crate) async fn run(self, board: StatusBoard, cutovers: mpsc::Sender<CutoverRequest>) {
        loop {
            let status = board.snapshot();
            if status.phase == Phase::CutOver {
                return;
            }
            match self.judge(&status, wall_clock::now_milliseconds()) {
                Now::Wait => tokio::time::sleep(LOOK_INTERVAL).await,
                Now::TooLate => {
                    board.event(
                        Level::Warn,
                        "--not-after has passed without a cutover: it is asked for by hand from now on",
                    );
                    return;
                }
                Now::Begin => {
                    board.event(Level::Info, "ready: the cutover begins by itself (--cutover auto)");
                    if self.ask(&cutovers).await {
                        return;
                    }
                    board.event(
                        Level::Info,
                        format!("the next try begins in {} s at the earliest", self.pause.as_secs()),
                    );
                    tokio::time::sleep(self.pause).await;
                }
            }
        }
    }

    /// Whether it went through. Why it did not stands among the events already.
    async fn ask(&self, cutovers: &mpsc::Sender<CutoverRequest>) -> bool {
        let (answers, mut received) = mpsc::unbounded_channel();
        let request = CutoverRequest { options: self.options.clone(), dry_run: false, answers };
        if cutovers.send(request).await.is_err() {
            return false;
        }
        while let Some(answer) = received.recv().await {
            match answer {
                Answer::Step(step) => tracing::info!(step = step.name, ms = step.ms, "cutover"),
                Answer::CutOver(_) => return true,
                _ => return false,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_only_when_ready_close_and_in_time() {
        let options: Options =
            serde_json::from_str(r#"{"timeout_seconds": 30, "max_write_stall_seconds": 5, "waive": []}"#).unwrap();
        let automatic = Automatic {
            options,
            max_lag: Duration::from_secs(5),
            not_before: Some(1000),
            not_after: Some(2000),
            pause: Duration::from_secs(1),
        };
        let mut status = Status::not_running(Phase::Following);
        (status.ready_to_cutover, status.lag.seconds) = (true, Some(1.0));
        assert_eq!(automatic.judge(&status, 1500), Now::Begin);
        assert_eq!(automatic.judge(&status, 999), Now::Wait);
        assert_eq!(automatic.judge(&status, 2001), Now::TooLate);
        let but = |change: fn(&mut Status)| {
            let mut other = status.clone();
            change(&mut other);
            automatic.judge(&other, 1500)
        };
        assert_eq!(but(|status| status.lag.seconds = Some(5.1)), Now::Wait);
        assert_eq!(but(|status| status.lag.seconds = None), Now::Wait, "nobody knows how far it is");
        assert_eq!(but(|status| status.ready_to_cutover = false), Now::Wait);
        assert_eq!(but(|status| status.phase = Phase::CatchingUp), Now::Wait);
    }
}
