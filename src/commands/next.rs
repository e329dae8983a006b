//! What `migrate` says while it runs: what happens next, how to look at it, and how to go on after it was stopped.

use std::path::Path;
use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::info;

use crate::observe::board::StatusBoard;
use crate::observe::status::{Direction, Phase, Status, WayBack};

/// How soon a change is noticed.
const LOOK: Duration = Duration::from_millis(500);

/// Says it; ends when it is dropped.
pub(super) struct NextSteps(JoinHandle<()>);

impl Drop for NextSteps {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Says what comes next at the beginning, when a cutover can begin for the first time, and when it is done.
pub(super) fn say(board: StatusBoard, directory: &Path, by_itself: bool) -> NextSteps {
    let directory = directory.display().to_string();
    info!(
        "Ctrl-C stops it at any time, and the same command goes on where it was; to look at it: walferry status --dir {directory} --watch"
    );
    NextSteps(tokio::spawn(async move {
        let mut said = Said::default();
        loop {
            if let Some(text) = said.next(&board.snapshot(), &directory, by_itself) {
                info!("{text}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }))
}

/// What was said already: each once.
#[derive(Default)]
struct Said {
    ready: bool,
    switched: bool,
}

impl Said {
    fn next(&mut self, status: &Status, directory: &str, by_itself: bool) -> Option<String> {
        let back = status.direction == Direction::Back;
        // What makes the way back ready comes a moment after the rest, and belongs to a cutover.
        let ready = status.ready_to_cutover && status.way_back != WayBack::Preparing;
        if !back && status.phase == Phase::Following && ready && !self.ready && !by_itself {
            self.ready = true;
            return Some(format!(
                "next: walferry verify --dir {directory} compares all rows while it follows; walferry cutover --dir {directory} --dry-run rehearses \
                 the switch, and without --dry-run does it. There is no hurry: it follows until then"
            ));
        }
        if back && status.phase == Phase::CutOver && !self.switched {
            self.switched = true;
            return Some(format!(
                "next: keep this running, it keeps the old primary current; walferry switchback --dir {directory} leads back, walferry finish --dir \
                 {directory} ends it when all is well"
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_next_step_is_said_once_and_in_its_time() {
        let mut said = Said::default();
        let mut status = Status::not_running(Phase::Copying);
        assert_eq!(said.next(&status, "d", false), None);
        (status.phase, status.ready_to_cutover, status.way_back) = (Phase::Following, true, WayBack::Preparing);
        assert_eq!(said.next(&status, "d", false), None);
        status.way_back = WayBack::Ready;
        assert_eq!(said.next(&status, "d", true), None, "it cuts over by itself");
        let text = said.next(&status, "d", false).unwrap();
        assert!(
            text.contains("walferry cutover --dir d --dry-run") && text.contains("walferry verify --dir d"),
            "{text}"
        );
        assert_eq!(said.next(&status, "d", false), None);
        (status.phase, status.direction) = (Phase::CutOver, Direction::Back);
        let text = said.next(&status, "d", false).unwrap();
        assert!(text.contains("walferry switchback --dir d") && text.contains("walferry finish --dir d"), "{text}");
        assert_eq!(said.next(&status, "d", false), None);
    }
}
