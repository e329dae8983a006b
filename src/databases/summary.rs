//! How several migrations are, together: what `walferry status --dir D --json` and `/status` print, and the table for people.

use serde::Serialize;

use super::overview::{Member, Overview};
use crate::observe::format::{count, duration, percent, printable, size};
use crate::observe::status::{Direction, Phase, Status};
use crate::observe::wall_clock;

/// The version of the layout below.
const VERSION: u32 = 1;

/// The most that a line of the table says of what stands in the way of a cutover.
const WHY_MAX: usize = 48;

/// Several migrations at one moment. Fields are added, never renamed or removed, without a new version.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Version of this layout.
    pub version: u32,
    /// Always true: this is not the status of one migration.
    pub all_databases: bool,
    /// `failed` when one has failed; else the phase of the one that is least far.
    pub phase: Phase,
    /// Whether a cutover of all can start now: each that is not cut over is ready.
    pub ready_to_cutover: bool,
    /// What stands in the way of it, with the database in front.
    pub blockers: Vec<String>,
    /// What somebody should look after, likewise.
    pub attention: Vec<String>,
    /// Whether all of them run.
    pub process_alive: bool,
    /// When this was taken: RFC 3339, UTC.
    pub updated_at: String,
    /// Each of them, by the database's name.
    pub databases: Vec<OfDatabase>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct OfDatabase {
    /// The database's name.
    pub database: String,
    /// The name of its state directory, below that of all.
    pub directory: String,
    /// As `walferry status --json` gives it for that directory.
    pub status: Status,
}

/// Whether a migration is over: switched, and the process need not run.
pub fn is_switched(status: &Status) -> bool {
    matches!(status.phase, Phase::CutOver | Phase::Reversed)
}

/// What stands in the way of a cutover of all because of databases that are not moved, and how it is waived.
pub fn of_unmoved(database: &str) -> String {
    format!(
        "the database {database:?} is not moved: start migrate again, or cut over with --waive 'database {database}'"
    )
}

impl Summary {
    /// Of the status of each.
    pub fn of(overview: &Overview, statuses: Vec<(Member, Status)>) -> Summary {
        let named = |what: fn(&Status) -> &[String]| -> Vec<String> {
            let each = |(member, status): &(Member, Status)| {
                what(status).iter().map(|text| format!("{}: {text}", member.database)).collect::<Vec<_>>()
            };
            statuses.iter().filter(|(_, status)| !is_switched(status)).flat_map(each).collect()
        };
        let mut blockers = named(|status| &status.blockers);
        blockers.extend(overview.unmoved.iter().map(|database| of_unmoved(database)));
        let mut attention: Vec<String> = Vec::new();
        for (member, status) in &statuses {
            attention.extend(status.attention.iter().map(|text| format!("{}: {text}", member.database)));
        }
        let failed = statuses.iter().any(|(_, status)| status.phase == Phase::Failed);
        let least = statuses.iter().map(|(_, status)| status.phase).min().unwrap_or(Phase::Preparing);
        let left = statuses.iter().any(|(_, status)| !is_switched(status));
        Summary {
            version: VERSION,
            all_databases: true,
            phase: if failed { Phase::Failed } else { least },
            ready_to_cutover: left && blockers.is_empty(),
            blockers,
            attention,
            process_alive: !statuses.is_empty() && statuses.iter().all(|(_, status)| status.process_alive),
            updated_at: wall_clock::now_rfc3339(),
            databases: statuses
                .into_iter()
                .map(|(Member { database, directory, .. }, status)| OfDatabase { database, directory, status })
                .collect(),
        }
    }

    /// Whether each runs, or is over, and none has failed.
    pub fn is_healthy(&self) -> bool {
        self.databases
            .iter()
            .all(|one| is_switched(&one.status) || one.status.process_alive && one.status.phase != Phase::Failed)
    }

    /// The table, and below it what somebody has to know of single databases.
    pub fn render(&self) -> String {
        let heading = ["database", "phase", "copied", "lag", "changes/s", "queue", "cutover"];
        let mut rows: Vec<[String; 7]> = vec![heading.map(str::to_owned)];
        rows.extend(self.databases.iter().map(row));
        let mut widths = [0; 7];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut page = String::new();
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            page.push_str(cells.join("  ").trim_end());
            page.push('\n');
        }
        page.push('\n');
        for one in &self.databases {
            let Some(error) = &one.status.error else { continue };
            page.push_str(&format!("error     {}: {}\n", printable(&one.database), printable(&error.message)));
            if let Some(hint) = &error.hint {
                page.push_str(&format!("next      {}\n", printable(hint)));
            }
        }
        for text in &self.attention {
            page.push_str(&format!("attention {}\n", printable(text)));
        }
        let switched = self.databases.iter().filter(|one| is_switched(&one.status)).count();
        let all = self.databases.len();
        page.push_str(&match (switched == all, self.ready_to_cutover) {
            (true, _) => format!("cutover   all {all} databases are cut over\n"),
            (false, true) => format!("cutover   ready; {switched} of {all} databases are cut over\n"),
            (false, false) => format!("cutover   not yet; {switched} of {all} databases are cut over\n"),
        });
        page.push_str(&format!("as of     {}\n", self.updated_at));
        page
    }
}

fn row(one: &OfDatabase) -> [String; 7] {
    let status = &one.status;
    let mut phase = status.phase.title().to_owned();
    if status.direction == Direction::Back && status.phase == Phase::CutOver {
        phase.push_str(", way back open");
    }
    if !status.process_alive {
        phase.push_str(", not running");
    }
    let lag = match (status.lag.bytes, status.lag.seconds) {
        (Some(bytes), Some(seconds)) => format!("{}, {}", size(bytes), duration(seconds)),
        (Some(bytes), None) => size(bytes),
        (None, _) => "-".to_owned(),
    };
    let copied = match status.copy.tables_total {
        0 => "-".to_owned(),
        _ if status.copy.tables_done == status.copy.tables_total => size(status.copy.bytes_done),
        _ => format!(
            "{}% of {}",
            percent(status.copy.bytes_done, status.copy.bytes_total),
            size(status.copy.bytes_total)
        ),
    };
    let cutover = match status.blockers.first() {
        _ if is_switched(status) => "done".to_owned(),
        None => "ready".to_owned(),
        Some(why) => {
            let cut: String = why.chars().take(WHY_MAX).collect();
            if cut.len() < why.len() { format!("{cut}…") } else { cut }
        }
    };
    [
        printable(&one.database),
        phase,
        copied,
        lag,
        count(status.apply.changes_per_second.round() as u64),
        size(status.queue.bytes),
        printable(&cutover),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(statuses: Vec<(&str, Status)>) -> Summary {
        let overview = Overview::new(String::new(), String::new(), Vec::new(), Vec::new());
        Summary::of(&overview, statuses.into_iter().map(|(name, status)| (Member::new(name), status)).collect())
    }

    fn running(phase: Phase, blockers: &[&str]) -> Status {
        let mut status = Status::not_running(phase);
        (status.process_alive, status.ready_to_cutover) = (true, blockers.is_empty());
        status.blockers = blockers.iter().map(|text| (*text).to_owned()).collect();
        status
    }

    #[test]
    fn all_are_ready_when_each_that_is_left_is_and_the_phase_is_that_of_the_least_far() {
        let both = summary(vec![("a", running(Phase::Following, &[])), ("b", running(Phase::Copying, &["not yet"]))]);
        assert_eq!((both.phase, both.ready_to_cutover), (Phase::Copying, false));
        assert_eq!(both.blockers, ["b: not yet"]);
        let both = summary(vec![("a", running(Phase::Following, &[])), ("b", running(Phase::CutOver, &["over"]))]);
        assert_eq!((both.phase, both.ready_to_cutover, both.blockers.len()), (Phase::Following, true, 0));
        let over = summary(vec![("b", running(Phase::CutOver, &[]))]);
        assert!(!over.ready_to_cutover && over.is_healthy());
        let failed = summary(vec![("a", running(Phase::Failed, &[])), ("b", running(Phase::Copying, &[]))]);
        assert!(failed.phase == Phase::Failed && !failed.is_healthy());
    }

    #[test]
    fn each_database_is_a_line_and_no_name_leaves_it() {
        let text = summary(vec![
            ("shop", running(Phase::Following, &[])),
            ("a\nb\u{1b}[2J", running(Phase::Copying, &["the target does not follow yet: copying, and much more"])),
        ])
        .render();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("database") && lines[0].ends_with("cutover"), "{text}");
        assert!(lines[1].starts_with("shop") && lines[1].ends_with("ready"), "{text}");
        assert!(lines[2].contains("copying") && lines[2].ends_with('…'), "{text}");
        assert!(!text.contains('\u{1b}') && lines[3].is_empty(), "{text}");
        assert!(text.contains("cutover   not yet; 0 of 2 databases are cut over\n"), "{text}");
    }
}
