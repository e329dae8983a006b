//! An apply that is held stops at an exact position, whatever way it applies (`apply/gate.rs`).

use std::time::Duration;

use walferry::lsn::Lsn;
use walferry::queue::Entry;

use super::bed::Bed;

/// Where each of so many transactions in the queue ends.
fn transaction_ends(bed: &Bed, count: usize) -> Vec<Lsn> {
    let mut reader = bed.queue.reader(bed.start).unwrap();
    let mut ends = Vec::new();
    while ends.len() < count {
        match reader.next(Duration::from_secs(5)).unwrap() {
            Some(Entry::Commit { end_lsn }) => ends.push(end_lsn),
            Some(_) => {}
            None => panic!("the queue has only {} transactions", ends.len()),
        }
    }
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_apply_stops_exactly_where_it_may_go_also_amid_what_is_replayed() {
    let schema = "CREATE TABLE log (n int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY)";
    let mut bed = Bed::new(schema, "INSERT INTO t VALUES (1)", 3).await;
    for n in 1..=12 {
        bed.on_source(&match n % 4 {
            // Cannot be merged.
            3 => format!("BEGIN; TRUNCATE t; INSERT INTO t VALUES ({n}); INSERT INTO log VALUES ({n}); COMMIT"),
            _ => format!("INSERT INTO log VALUES ({n})"),
        })
        .await;
    }
    let until = bed.capture().await;
    let ends = transaction_ends(&bed, 12);
    let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
    let gate = apply.gate.clone();
    let hold = gate.hold();
    let observer = bed.server.connect(&bed.target_database).await.unwrap();
    let logged = async || -> i64 { observer.query_one("SELECT count(*) FROM log", &[]).await.unwrap().get(0) };
    let steering = async {
        let begins = hold.rests(Lsn::ZERO).await;
        assert_eq!((begins, logged().await), (bed.start, 0));
        // One by one, then several at once. With the last the run ends, and rests no more.
        for count in [1, 2, 3, 4, 5, 8, 11] {
            hold.up_to(ends[count - 1]);
            assert_eq!(hold.rests(ends[count - 1]).await, ends[count - 1]);
            assert_eq!(logged().await, count as i64, "the transactions up to {}", ends[count - 1]);
        }
        drop(hold);
    };
    let (outcome, ()) = tokio::join!(apply.run(Some(until)), steering);
    outcome.unwrap();
    assert!(bed.serial_replays() >= 3, "a TRUNCATE is replayed");
    bed.assert_equal("a held apply").await;
}
