//! Hypertables compared: compressed or not, with other chunks on the other side, or against a plain table.

use walferry::source::catalog;
use walferry::verify::{self, Options};

use crate::support::Servers;
use crate::support::timescale::{TIMESCALE, timescale_available};

const TABLES: &str = "
SET TimeZone = 'UTC';
CREATE TABLE same (time timestamptz NOT NULL, device int NOT NULL, value numeric, PRIMARY KEY (time, device));
CREATE TABLE plain (at date, n bigint, body text);
";

const ROWS: &str = "
INSERT INTO same SELECT t, d, d / 7.0 FROM generate_series('2026-01-01 00:00Z'::timestamptz, '2026-01-09 23:00Z', '1 hour') t, generate_series(1, 20) d;
INSERT INTO plain SELECT date '2026-01-01' + i % 30, i, 'body ' || i FROM generate_series(1, 3000) i;
";

#[tokio::test]
async fn hypertables_are_compared_by_time_whatever_their_chunks_and_each_difference_is_named() {
    if !timescale_available("comparing hypertables") {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("compare").await;
    let (source, target) = (migration.source().await, migration.target().await);
    for client in [&source, &target] {
        client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
        client.batch_execute(TABLES).await.unwrap();
    }
    for (client, days) in [(&source, 1), (&target, 4)] {
        let make = format!("SELECT create_hypertable('same', 'time', chunk_time_interval => interval '{days} days')");
        client.batch_execute(&make).await.unwrap();
    }
    target
        .batch_execute("SELECT create_hypertable('plain', 'at', chunk_time_interval => interval '7 days')")
        .await
        .unwrap();
    for (client, order) in [(&source, "device"), (&target, "value")] {
        client.batch_execute(ROWS).await.unwrap();
        let settings =
            format!("ALTER TABLE same SET (timescaledb.compress, timescaledb.compress_segmentby = '{order}')");
        client.batch_execute(&settings).await.unwrap();
    }
    target
        .batch_execute(
            "SELECT compress_chunk(c) FROM show_chunks('same', older_than => '2026-01-07 00:00Z'::timestamptz) c",
        )
        .await
        .unwrap();
    source
        .batch_execute(
            "SELECT compress_chunk(c) FROM show_chunks('same', older_than => '2026-01-03 00:00Z'::timestamptz) c",
        )
        .await
        .unwrap();

    let equal = migration.with_servers("verify", &["--json"]).await;
    assert_eq!(equal.code, Some(0), "{}\n{}", equal.stdout, equal.stderr);
    let report = equal.json();
    let names: Vec<&str> =
        report["tables"].as_array().unwrap().iter().map(|table| table["table"].as_str().unwrap()).collect();
    assert_eq!(names, ["\"public\".\"plain\"", "\"public\".\"same\""], "chunks are no tables of their own");
    assert_eq!(report["tables"][1]["rows_source"], 9 * 24 * 20);

    // In small ranges, whose bounds are those of the source's chunks, or of the target's where only it has some.
    let tables = catalog::tables(&source).await.unwrap();
    let options = Options { range_rows: 100, ..Options::default() };
    let (one, two) = (migration.source_url.clone(), migration.target_url.clone());
    let open = |url: String| async move { walferry::connection::ConnectionSpec::parse(&url)?.connect("test").await };
    let compare = || verify::compare(&tables, || open(one.clone()), || open(two.clone()), &options, &|_| {});
    let report = compare().await.unwrap();
    assert!(report.equal && report.tables[0].ranges > 2 && report.tables[1].ranges > 5, "{report}");

    // A row of a compressed chunk is another, one is missing, one is too many in a chunk that the source does not have.
    let differ = "SET TimeZone = 'UTC'; UPDATE same SET value = 9 WHERE time = '2026-01-02 05:00Z' AND device = 3;
        DELETE FROM same WHERE time = '2026-01-08 05:00Z' AND device = 4;
        INSERT INTO same VALUES ('2027-01-01 00:00Z', 5, 1);
        UPDATE plain SET body = 'x' WHERE n = 77;";
    target.batch_execute(differ).await.unwrap();
    for report in [
        compare().await.unwrap(),
        verify::compare(&tables, || open(one.clone()), || open(two.clone()), &Options::default(), &|_| {})
            .await
            .unwrap(),
    ] {
        let text = report.to_string();
        for named in [
            "(time, device)=(2026-01-02 05:00:00+00, 3): different in value",
            "(time, device)=(2026-01-08 05:00:00+00, 4): missing on the target",
            "(time, device)=(2027-01-01 00:00:00+00, 5): only on the target",
            "2 of 2 tables differ",
        ] {
            assert!(text.contains(named), "{named}:\n{text}");
        }
        assert_eq!((report.tables[1].rows_source, report.tables[1].rows_target), (4320, 4320));
    }
    assert_eq!(migration.with_servers("verify", &[]).await.code, Some(4));
}
