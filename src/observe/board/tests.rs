use super::*;
use crate::error::ErrorKind;
use crate::observe::status::TableState;

const SECOND: i64 = 1_000_000;

pub fn batch(transactions: u64, changes: u64, end_lsn: u64) -> AppliedBatch {
    let commit_time = end_lsn as i64 * SECOND;
    AppliedBatch { transactions, changes, end_lsn: Lsn(end_lsn), commit_time, elapsed: Duration::from_millis(5) }
}

fn following() -> StatusBoard {
    let board = StatusBoard::new();
    board.set_phase(Phase::Following);
    board.set_connected(true);
    board.source_clock(0);
    board
}

#[test]
fn a_migration_is_ready_exactly_when_nothing_blocks() {
    let board = following();
    let blockers = |board: &StatusBoard| {
        let status = board.snapshot();
        assert_eq!(status.ready_to_cutover, status.blockers.is_empty());
        status.blockers.len()
    };
    assert_eq!(blockers(&board), 0);
    board.set_apply_paused(true);
    board.set_connected(false);
    board.set_queue(Queue { full: true, ..Queue::default() });
    board.set_blockers(vec!["a table came: \"public\".\"new\"".to_string()]);
    assert_eq!(blockers(&board), 4);
    for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Following) {
        let board = following();
        board.set_phase(phase);
        assert_eq!(blockers(&board), 1, "{phase:?}");
    }
}

#[test]
fn a_target_of_which_nobody_knows_how_far_it_is_behind_is_not_ready() {
    let board = StatusBoard::new();
    board.set_phase(Phase::Following);
    board.set_connected(true);
    let status = board.snapshot();
    assert!(status.lag.seconds.is_none() && !status.ready_to_cutover, "{status:?}");
    board.source_clock(0);
    assert!(board.snapshot().ready_to_cutover);
}

#[test]
fn what_is_tried_again_is_to_be_looked_after_until_something_goes_on() {
    let board = following();
    board.try_again(&Error::new(ErrorKind::Transient, "cannot reach db1"));
    assert_eq!(board.snapshot().attention, ["it waits, and tries again: cannot reach db1"]);
    board.goes_on();
    assert_eq!(board.snapshot().attention, Vec::<String>::new());
}

#[test]
fn lag_in_bytes_is_from_the_newest_known_position_to_what_is_applied() {
    let board = following();
    assert_eq!(board.snapshot().lag.bytes, None, "nothing is known yet");
    board.resume_stream(Lsn(100), Lsn(100));
    board.received_transaction(1, Lsn(200), 200 * SECOND);
    board.heard_from_source(Lsn(900), 900 * SECOND);
    assert_eq!(board.snapshot().lag.bytes, Some(800));
    board.applied(batch(1, 1, 200));
    assert_eq!(board.snapshot().lag.bytes, Some(0), "WAL that holds nothing for us is no lag");
    board.source_position(Lsn(1500), 4096);
    let status = board.snapshot();
    assert_eq!((status.lag.bytes, status.source.retained_wal_bytes), (Some(600), Some(4096)));
}

#[test]
fn lag_in_seconds_is_the_age_of_the_oldest_unapplied_transaction_by_the_sources_clock() {
    let board = following();
    board.resume_stream(Lsn(100), Lsn(100));
    assert_eq!(board.snapshot().lag.seconds, None, "the source's clock is not known yet");
    board.heard_from_source(Lsn(100), 1000 * SECOND);
    assert_eq!(board.snapshot().lag.seconds, Some(0.0));
    board.received_transaction(1, Lsn(200), 1500 * SECOND);
    board.heard_from_source(Lsn(200), 1600 * SECOND);
    let seconds = board.snapshot().lag.seconds.unwrap();
    // Our own clock runs on since the source was heard: only the lower bound is exact.
    assert!(seconds >= 100.0, "{seconds}");
    board.applied(AppliedBatch { commit_time: 1500 * SECOND, ..batch(1, 1, 200) });
    assert_eq!(board.snapshot().lag.seconds, Some(0.0));
}

#[test]
fn a_lost_source_is_not_shown_as_no_lag() {
    let board = following();
    board.resume_stream(Lsn(100), Lsn(100));
    board.heard_from_source(Lsn(100), 1000 * SECOND);
    board.set_connected(false);
    let first = board.snapshot().lag.seconds.unwrap();
    std::thread::sleep(Duration::from_millis(2));
    let second = board.snapshot().lag.seconds.unwrap();
    assert!(second > first, "{second} > {first}");
}

#[test]
fn the_newest_fifty_events_are_kept() {
    let board = StatusBoard::new();
    for number in 0..60 {
        board.event(Level::Info, format!("event {number}"));
    }
    let events = board.snapshot().events;
    assert_eq!((events.len(), events[0].text.as_str()), (50, "event 10"));
    assert_eq!(events[49].text, "event 59");
}

#[test]
fn a_failure_is_phase_event_and_error() {
    let board = following();
    board.fail(&Error::new(ErrorKind::Divergence, "no row").context("table t").hint("verify"));
    let status = board.snapshot();
    assert_eq!(status.phase, Phase::Failed);
    let error = status.error.unwrap();
    assert_eq!((error.kind.as_str(), error.message.as_str()), ("divergence", "table t: no row"));
    assert_eq!(error.hint.as_deref(), Some("verify"));
    assert_eq!(status.events[1].level, Level::Error);
}

#[test]
fn a_change_of_phase_is_one_event_and_the_same_phase_again_none() {
    let board = StatusBoard::new();
    board.set_phase(Phase::Copying);
    board.set_phase(Phase::Copying);
    assert_eq!(board.snapshot().events.len(), 1);
}

#[test]
fn the_rest_of_the_copy_at_the_present_pace_is_the_eta() {
    let board = StatusBoard::new();
    board.set_phase(Phase::Copying);
    let table = board.add_table(1, "public", "orders", 10_000);
    assert!(Arc::ptr_eq(&table, &board.add_table(1, "public", "orders", 10_000)));
    let start = Instant::now();
    board.tick(start);
    assert_eq!(board.snapshot().eta_seconds, None, "nothing moves");
    // What an earlier process copied is done, and says nothing of the pace.
    table.add_recorded(1_000, 5);
    let mut part = table.begin_part();
    part.add(2_000, 10);
    part.committed();
    board.tick(start + Duration::from_secs(4));
    let status = board.snapshot();
    assert_eq!((status.copy.bytes_per_second, status.eta_seconds), (500.0, Some(14.0)));
    table.set_state(TableState::Indexing);
    let copy = board.snapshot().copy;
    assert_eq!((copy.tables_done, copy.bytes_total, copy.rows_done), (1, 3_000, 15));
}

#[test]
fn a_catch_up_that_gains_has_an_eta_and_one_that_loses_has_none() {
    let board = following();
    board.set_phase(Phase::CatchingUp);
    board.resume_stream(Lsn(10_000), Lsn(1_000));
    let start = Instant::now();
    board.tick(start);
    board.applied(batch(1, 40, 4_000));
    board.tick(start + Duration::from_secs(3));
    let status = board.snapshot();
    assert_eq!((status.lag.bytes, status.eta_seconds), (Some(6_000), Some(6.0)));
    board.source_position(Lsn(100_000), 0);
    board.tick(start + Duration::from_secs(4));
    assert_eq!(board.snapshot().eta_seconds, None);
}

#[test]
fn counts_from_many_threads_add_up() {
    let board = StatusBoard::new();
    let table = board.add_table(1, "public", "orders", 0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    board.received_bytes(3);
                    board.index_done();
                    table.add_recorded(5, 1);
                }
            });
        }
    });
    let status = board.snapshot();
    assert_eq!((status.stream.bytes, status.indexes.done), (12_000, 4_000));
    assert_eq!((status.copy.bytes_done, status.copy.rows_done), (20_000, 4_000));
}
