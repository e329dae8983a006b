//! How long each phase took: from what the record says of when it was entered.

use serde::Serialize;

use crate::observe::wall_clock::parse_rfc3339;
use crate::record::past::Point;
use crate::record::{Entry, What};

/// How an event says that a phase was entered ([`crate::observe::board::StatusBoard::set_phase`]).
const ENTERED: &str = "phase: ";

/// A phase, entered once or several times.
#[derive(Debug, PartialEq, Serialize)]
pub struct PhaseTime {
    /// As `status` names it for people.
    pub phase: String,
    /// When it was entered first.
    pub began_at: String,
    /// How long it was in it, over all processes.
    pub seconds: f64,
    /// How often it was entered.
    pub times: u64,
}

/// In the order in which they were entered first. Time in which no process ran is none's.
pub(super) fn of(entries: &[Entry], points: &[Point]) -> Vec<PhaseTime> {
    let mut phases: Vec<PhaseTime> = Vec::new();
    let mut now: Option<(String, String)> = None;
    let mut runs = None;
    let mut last_seen = None;
    for entry in entries {
        match &entry.what {
            What::Command { command, .. } if command == "migrate" || command == "resync" => {
                // The process before may have been killed: it was there for as long as it took points.
                let killed_at = last_point_before(points, &entry.at).max(last_seen);
                close(&mut phases, now.take(), killed_at);
                enter(&mut phases, &mut now, "preparing", &entry.at);
                runs = Some(entry.id.clone());
            }
            What::Outcome { of, .. } if runs.as_ref() == Some(of) => {
                close(&mut phases, now.take(), parse_rfc3339(&entry.at));
                runs = None;
            }
            What::Event { event } => {
                if let Some(phase) = event.text.strip_prefix(ENTERED) {
                    let since = now.take();
                    let same = since.as_ref().is_some_and(|(phase_now, _)| phase_now == phase);
                    match same {
                        true => now = since,
                        false => {
                            close(&mut phases, since, parse_rfc3339(&event.time));
                            enter(&mut phases, &mut now, phase, &event.time);
                        }
                    }
                }
            }
            _ => {}
        }
        if runs.is_some() {
            last_seen = parse_rfc3339(&entry.at);
        }
    }
    // It is in this one still, or was when it was killed.
    close(&mut phases, now, points.last().map(|point| point.measured.time).max(last_seen));
    phases.retain(|phase| phase.seconds > 0.0 || phase.phase != "preparing");
    phases
}

fn last_point_before(points: &[Point], at: &str) -> Option<i64> {
    let at = parse_rfc3339(at)?;
    points.iter().rev().map(|point| point.measured.time).find(|time| *time <= at)
}

fn enter(phases: &mut Vec<PhaseTime>, now: &mut Option<(String, String)>, phase: &str, at: &str) {
    match phases.iter_mut().find(|known| known.phase == phase) {
        Some(known) => known.times += 1,
        None => phases.push(PhaseTime { phase: phase.to_owned(), began_at: at.to_owned(), seconds: 0.0, times: 1 }),
    }
    *now = Some((phase.to_owned(), at.to_owned()));
}

fn close(phases: &mut [PhaseTime], now: Option<(String, String)>, end: Option<i64>) {
    let (Some((phase, since)), Some(end)) = (now, end) else { return };
    let Some(since) = parse_rfc3339(&since) else { return };
    if let Some(known) = phases.iter_mut().find(|known| known.phase == phase) {
        known.seconds += (end - since).max(0) as f64 / 1000.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::{Event, Level};
    use crate::observe::wall_clock::rfc3339;

    #[test]
    fn time_without_a_process_is_no_phases() {
        let at = |second: i64| rfc3339(second * 1000);
        let command = |id: &str, second| Entry {
            id: id.into(),
            at: at(second),
            what: What::Command {
                command: "migrate".into(),
                arguments: vec![],
                user: "x".into(),
                host: "y".into(),
                pid: 1,
            },
        };
        let phase = |name: &str, second| {
            let event = Event { time: at(second), level: Level::Info, text: format!("phase: {name}") };
            Entry { id: format!("{name}{second}"), at: at(second), what: What::Event { event } }
        };
        let entries = [
            command("a", 0),
            phase("copying", 10),
            // Killed at 30 or so, begun again at 1000.
            phase("indexing", 30),
            command("b", 1000),
            phase("copying", 1002),
            phase("following", 1010),
            Entry { id: "z".into(), at: at(1100), what: What::Outcome { of: "b".into(), exit: 0, error: None } },
        ];
        let found: Vec<(String, f64, u64)> =
            of(&entries, &[]).into_iter().map(|phase| (phase.phase, phase.seconds, phase.times)).collect();
        let expected = [("preparing", 12.0, 2), ("copying", 28.0, 2), ("indexing", 0.0, 1), ("following", 90.0, 1)];
        assert_eq!(found, expected.map(|(phase, seconds, times)| (phase.to_owned(), seconds, times)));
    }
}
