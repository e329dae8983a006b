//! Values of hundreds of megabytes.

use crate::support::{Servers, until_true};

/// A value is held as a whole, a few times over: as a row from the source, in the queue's block, as a row for the target.
const MEMORY_MAX: u64 = 3 << 29;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_of_200_mb_arrives_by_copy_and_by_stream_in_bounded_memory() {
    let servers = Servers::start().await;
    let migration = servers.migration("large").await;
    let source = migration.source().await;
    let schema = "CREATE TABLE large (id int PRIMARY KEY, n int, t text);
        INSERT INTO large VALUES (1, 0, repeat('0123456789', 20000000))";
    source.batch_execute(schema).await.unwrap();
    let mut running = migration.migrate(&["--no-reverse"]);
    let memory = running.watch_memory();
    migration.wait_for_phase(&mut running, "following").await;
    // The first sends the value again, the second does not.
    let changes = [
        "UPDATE large SET t = reverse(t), n = 1",
        "UPDATE large SET n = 2",
        "INSERT INTO large VALUES (2, 0, 'the last')",
    ];
    for change in changes {
        source.batch_execute(change).await.unwrap();
    }
    until_true(&migration.target().await, "SELECT EXISTS (SELECT FROM large WHERE id = 2)").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
    let peak = memory.await.unwrap();
    assert!(peak < MEMORY_MAX, "{} MiB at the most", peak >> 20);
}
