use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use super::*;
use crate::observe::status::{Copy, CutoverOutlook, Event, Failure, Indexes, Lag, Level, Queue, Table, WayBack};
use crate::verify::Verification;

const BEAUTIFUL: Look = Look { colour: true, unicode: true };

fn drawn(shown: &Shown, width: u16, height: u16, look: Look) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, shown, look)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let row = |y| (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|y| row(y).trim_end().to_owned()).collect()
}

fn text(shown: &Shown, width: u16, height: u16) -> String {
    lines(&drawn(shown, width, height, BEAUTIFUL)).join("\n")
}

fn shown(status: Status) -> Shown {
    let mut shown = Shown::new("./shop");
    shown.take(status);
    shown
}

fn base(phase: Phase) -> Status {
    let mut status = Status::not_running(phase);
    status.process_alive = true;
    status.blockers.clear();
    status.updated_at = "2026-11-20T10:16:16.000Z".into();
    status.source.description = "db1.example.org:5432/shop, PostgreSQL 15.18".into();
    status.target.description = "db2.example.org:5432/shop, PostgreSQL 18.1".into();
    status.source.retained_wal_bytes = Some(48 << 20);
    status.lag = Lag { bytes: Some(12 << 20), seconds: Some(75.0) };
    status.stream.connected = true;
    status.queue = Queue { bytes: 12 << 20, limit_bytes: 20 << 30, ..Queue::default() };
    status.events = (0..20)
        .map(|number| Event {
            time: format!("2026-11-20T10:15:{number:02}.000Z"),
            level: Level::Info,
            text: format!("event {number}"),
        })
        .collect();
    status
}

fn copying() -> Status {
    let mut status = base(Phase::Copying);
    status.eta_seconds = Some(185.0);
    status.copy = Copy {
        tables_total: 30,
        tables_done: 1,
        bytes_total: 10 << 30,
        bytes_done: 4 << 30,
        bytes_per_second: 9e7,
        ..Copy::default()
    };
    status.indexes = Indexes { total: 7, done: 2 };
    let table = |name: String, bytes_done: u64, state| Table {
        schema: "public".into(),
        name,
        bytes_total: 6 << 30,
        bytes_done,
        rows_done: 1,
        state,
    };
    status.tables = (0..28).map(|n| table(format!("waiting_{n}"), 0, TableState::Waiting)).collect();
    status.tables.push(table("customers".into(), 6 << 30, TableState::Done));
    status.tables.push(table("orders".into(), 3 << 30, TableState::Copying));
    status
}

fn following() -> Status {
    let mut status = base(Phase::Following);
    status.lag.seconds = Some(0.012);
    status.ready_to_cutover = true;
    status.way_back = WayBack::Ready;
    status.cutover = CutoverOutlook { expected_downtime_ms: Some(45.0), ..CutoverOutlook::default() };
    status.apply.changes_per_second = 12_345.4;
    status.verification =
        Some(Verification { equal: true, complete: true, age_seconds: 130.0, ..Verification::default() });
    status
}

#[test]
fn a_copy_shows_its_tables_and_when_it_will_be_done() {
    for (width, height) in [(120, 40), (80, 24), (60, 30)] {
        let text = text(&shown(copying()), width, height);
        for said in [
            "copying",
            "about 3m 05s left",
            "40%",
            "public.orders",
            "50%",
            "1m 15s",
            "db1.exa",
            "of 20.0 GiB",
            "q quits",
        ] {
            assert!(text.contains(said), "{said:?} at {width}x{height}:\n{text}");
        }
        assert!(!text.contains("public.customers"), "what is done needs no row:\n{text}");
        assert!(text.contains(" more"), "not all fit:\n{text}");
    }
}

#[test]
fn following_shows_that_it_is_ready_and_what_to_do() {
    for (width, height) in [(120, 40), (80, 24), (60, 30)] {
        let text = text(&shown(following()), width, height);
        for said in [
            "Ready to cut over",
            "walferry cutover",
            "12 ms",
            "ready",
            "~45 ms wait",
            "12,345/s",
            "equal",
            "2m 10s ago",
            "Behind",
            "╭ Applied",
        ] {
            assert!(text.contains(said), "{said:?} at {width}x{height}:\n{text}");
        }
        assert!(!text.contains("╭ Copy"), "the copy is over:\n{text}");
    }
}

#[test]
fn what_is_in_the_way_is_shown_whole() {
    let mut status = following();
    status.ready_to_cutover = false;
    status.blockers = vec![
        "the table public.parts has a new column that the target does not have yet, and the apply rests until it has"
            .into(),
    ];
    status.attention = vec!["the way back cannot be: wal_level".into()];
    for (width, height) in [(100, 30), (60, 24)] {
        let text = text(&shown(status.clone()), width, height);
        let joined = text.replace(['│', '\n'], " ").split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(joined.contains(&status.blockers[0]), "{text}");
        assert!(joined.contains(&status.attention[0]) && text.contains("In the way of a cutover"), "{text}");
    }
}

#[test]
fn a_failure_is_shown_with_the_next_step_and_where_it_was() {
    let mut shown = shown(copying());
    let mut status = base(Phase::Failed);
    status.process_alive = false;
    status.error =
        Some(Failure { kind: "gap".into(), message: "the slot is lost".into(), hint: Some("walferry resync".into()) });
    shown.take(status);
    for (width, height) in [(120, 40), (60, 20)] {
        let text = text(&shown, width, height);
        for said in [
            "It has stopped",
            "the slot is lost",
            "next: walferry resync",
            "copying: failed",
            "not running since 10:16:16",
        ] {
            assert!(text.contains(said), "{said:?} at {width}x{height}:\n{text}");
        }
    }
}

#[test]
fn a_cutover_that_is_done_says_how_to_go_on() {
    let mut status = base(Phase::CutOver);
    status.direction = Direction::Back;
    status.way_back = WayBack::Open;
    let said = text(&shown(status.clone()), 100, 30);
    assert!(
        said.contains("The target is the primary")
            && said.contains("walferry switchback")
            && said.contains("walferry finish"),
        "{said}"
    );
    status.direction = Direction::There;
    status.process_alive = false;
    let said = text(&shown(status), 100, 30);
    assert!(
        said.contains("Done") && said.contains("walferry clean") && !said.contains("No migration is running"),
        "{said}"
    );
}

#[test]
fn a_process_that_went_away_is_noticed_and_one_that_comes_back_too() {
    let mut shown = shown(following());
    let mut gone = following();
    gone.process_alive = false;
    shown.take(gone);
    assert!(text(&shown, 100, 30).contains("No migration is running"));
    shown.take_silence("no migration is running in ./shop");
    let silent = text(&shown, 100, 30);
    assert!(silent.contains("no migration is running in ./sh") && silent.contains("db1.example.org"), "{silent}");
    shown.take(following());
    assert!(text(&shown, 100, 30).contains("Ready to cut over"));
    assert!(text(&Shown::new("x"), 60, 20).contains("waiting"));
}

#[test]
fn every_size_can_be_drawn_and_no_line_is_torn() {
    for status in [copying(), following(), base(Phase::Preparing), base(Phase::Reversed), base(Phase::CuttingOver)] {
        let shown = shown(status);
        for width in (1..200).step_by(7) {
            for height in (1..60).step_by(5) {
                let lines = lines(&drawn(&shown, width, height, BEAUTIFUL));
                if width >= WIDTH_MIN && height >= HEIGHT_MIN {
                    for line in &lines {
                        let (begin, end) = (line.matches('╭').count(), line.matches('╮').count());
                        assert_eq!(begin, end, "{width}x{height}: {lines:#?}");
                    }
                    assert!(lines.last().unwrap().contains("q quits"), "{width}x{height}: {lines:#?}");
                }
            }
        }
    }
}

#[test]
fn a_small_terminal_gets_lines() {
    let text = text(&shown(following()), 45, 12);
    assert!(text.contains("phase     following") && text.contains("lag"), "{text}");
}

#[test]
fn without_colours_there_are_none_and_without_utf8_only_ascii() {
    let buffer = drawn(&shown(copying()), 100, 30, Look { colour: false, unicode: false });
    assert!(buffer.content.iter().all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset));
    let text = lines(&buffer).join("\n");
    assert!(text.is_ascii() && !text.contains('?'), "{text}");
    assert!(text.contains("public.orders") && text.contains("+ Copy"), "{text}");
    let coloured = drawn(&shown(copying()), 100, 30, BEAUTIFUL);
    assert!(coloured.content.iter().any(|cell| cell.fg != Color::Reset));
}

#[test]
fn a_name_from_a_database_cannot_steer_the_terminal() {
    let mut status = copying();
    status.tables[29].name = "a\x1b[2Jb\n".into();
    status.events.push(Event {
        time: "2026-11-20T10:15:59.000Z".into(),
        level: Level::Warn,
        text: "x\x1b[31my".into(),
    });
    let buffer = drawn(&shown(status), 120, 40, BEAUTIFUL);
    assert!(buffer.content.iter().all(|cell| !cell.symbol().contains(char::is_control)));
}

#[test]
fn the_plots_grow_with_time() {
    let mut shown = shown(following());
    for second in 0..50 {
        let mut status = following();
        status.lag.seconds = Some(if second == 25 { 8.0 } else { 0.1 });
        shown.take(status);
    }
    let text = text(&shown, 120, 40);
    assert!(text.contains("most 8.0 s in 51.0 s"), "{text}");
    assert!(text.contains('█') && text.contains('▁'), "a peak over what is low:\n{text}");
}

#[test]
fn the_most_important_stays_when_there_is_no_room() {
    assert_eq!(share_out(6, 2, 30, 10), Heights { notice: 4, copy: 0, plots: 0, events: 0 }.filled(6));
    let tall = share_out(40, 2, 10, 50);
    assert_eq!((tall.notice, tall.copy, tall.notice + tall.copy + tall.plots + tall.events), (4, 12, 40));
    assert!(tall.plots >= 5 && tall.events >= 6, "{tall:?}");
}

impl Heights {
    /// With what is left over given to the copy.
    fn filled(mut self, total: u16) -> Heights {
        self.copy += total - self.notice - self.copy - self.plots - self.events;
        self
    }
}
