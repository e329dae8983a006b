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
    let target = migration.target().await;
    // The first sends the value again, the second does not. Waited for one by one: on a busy machine each takes its time.
    source.batch_execute("UPDATE large SET t = reverse(t), n = 1").await.unwrap();
    until_true(&target, "SELECT n = 1 FROM large").await;
    source.batch_execute("UPDATE large SET n = 2").await.unwrap();
    until_true(&target, "SELECT n = 2 FROM large").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
    let peak = memory.await.unwrap();
    assert!(peak < MEMORY_MAX, "{} MiB at the most", peak >> 20);
}
