//! T2: changed rows of hypertables, drained from the queue, beside the same changes of a plain table by the same walferry.
//!
//! Each backlog is written while the apply rests. What its wall time is worth on a busy machine, the processor time of walferry and of the
//! target's sessions says.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;
use walferry::demo::server::ThrowawayServer;
use walferry::error::{Context, Error, ErrorKind, Result};

use crate::engine::{Engine, PATIENCE};
use crate::ingesting::{Processes, with_servers};
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

const DATABASE: &str = "changing";

/// The same rows in a hypertable, in a plain table, and in a hypertable without a key; and an aggregate.
const SCHEMA: [&str; 6] = [
    "SET TimeZone = 'UTC'; CREATE EXTENSION timescaledb; CREATE TABLE sentinel (id bigint PRIMARY KEY);
     CREATE TABLE hyper (time timestamptz NOT NULL, device integer NOT NULL, usage float8, note text, PRIMARY KEY (time, device));
     SELECT create_hypertable('hyper', 'time', chunk_time_interval => interval '1 hour');
     CREATE TABLE plain (LIKE hyper INCLUDING ALL);
     CREATE TABLE keyless (LIKE hyper);
     SELECT create_hypertable('keyless', 'time', chunk_time_interval => interval '1 hour');
     ALTER TABLE keyless REPLICA IDENTITY FULL;",
    "INSERT INTO hyper SELECT '2025-01-01 00:00Z'::timestamptz + i * interval '15 s', d, i, NULL
     FROM generate_series(0, 960 - 1) i, generate_series(1, 250) d",
    "INSERT INTO plain SELECT * FROM hyper; INSERT INTO keyless SELECT * FROM hyper",
    "CREATE MATERIALIZED VIEW aggregate WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 min', time) AS bucket, device, avg(usage) AS usage, min(note) AS note FROM hyper GROUP BY 1, 2 WITH NO DATA",
    "CALL refresh_continuous_aggregate('aggregate', NULL, NULL)",
    "VACUUM ANALYZE",
];

/// Names of tables, what is done to them `$1` times over, and how many rows each time.
struct Case {
    name: &'static str,
    table: &'static str,
    peer: Option<&'static str>,
    statement: &'static str,
    transactions: u64,
    rows: u64,
}

/// Rows are scattered by a step that has no factor in common with their number.
fn cases(quick: bool) -> Vec<Case> {
    let size = |full: u64| if quick { full / 10 } else { full };
    let update = "UPDATE {table} SET usage = usage + 1, note = 'n' || $1 FROM generate_series($1 * 100, $1 * 100 + 99) n \
                  WHERE time = '2025-01-01 00:00Z'::timestamptz + (n * 7 % 960) * interval '15 s' AND device = 1 + n % 250";
    let delete = "DELETE FROM {table} USING generate_series($1 * 100, $1 * 100 + 99) n \
                  WHERE time = '2025-01-01 00:00Z'::timestamptz + (n / 250 % 960) * interval '15 s' AND device = 1 + n % 250";
    vec![
        Case {
            name: "updates",
            table: "hyper",
            peer: Some("plain"),
            statement: update,
            transactions: size(1000),
            rows: 100,
        },
        Case {
            name: "updates without a key",
            table: "keyless",
            peer: None,
            statement: update,
            transactions: size(200),
            rows: 100,
        },
        Case {
            name: "refreshes of an aggregate, rows deleted and inserted",
            table: "aggregate",
            peer: None,
            statement: "CALL refresh_continuous_aggregate('{table}', '2025-01-01 00:00Z', '2025-01-01 04:00Z', force => true)",
            transactions: 1,
            rows: 2 * 240 * 250,
        },
        Case {
            name: "deletes",
            table: "hyper",
            peer: Some("plain"),
            statement: delete,
            transactions: size(500),
            rows: 100,
        },
    ]
}

pub async fn changes(setting: &Setting, results: &mut Results) -> Result<()> {
    with_servers(setting, async |source, target| run(setting, results, (source, target)).await).await
}

async fn run(
    setting: &Setting,
    results: &mut Results,
    (source, target): (&ThrowawayServer, &ThrowawayServer),
) -> Result<()> {
    setting.new_database(source, DATABASE).await?;
    setting.new_database(target, DATABASE).await?;
    let client = source.connect(DATABASE).await?;
    for statement in SCHEMA {
        client.batch_execute(statement).await.context(|| statement.into())?;
    }
    let mut engine = Engine::new(setting, DATABASE, source.url_for(DATABASE), target.url_for(DATABASE))?;
    engine.start()?;
    engine.following().await?;
    let mut bench = Bench { client, there: target.connect(DATABASE).await?, engine, target, sentinel: 0 };
    for case in cases(setting.options.quick) {
        let mut samples = Vec::new();
        for table in [Some(case.table), case.peer].into_iter().flatten() {
            samples.push(bench.drain(&case, table, results).await?);
        }
        let ours = samples.remove(0);
        let peer = samples.pop();
        results.add(Row {
            id: "T2",
            case: format!(
                "{} of a hypertable, {} in {} transactions",
                case.name,
                case.transactions * case.rows,
                case.transactions
            ),
            unit: "k changes/s",
            speed: peer.as_ref().map(|peer| ours.over(peer)),
            walferry: ours,
            peer: peer.map(|peer| ("of a plain table".into(), peer)),
            bar: Bar::Reported,
        });
    }
    for table in ["hyper", "plain", "keyless", "aggregate"] {
        let query = format!("SELECT count(*), sum(hashtextextended(r::text, 0)::numeric)::text FROM {table} r");
        let (here, there) = (bench.client.query_one(&query, &[]).await?, bench.there.query_one(&query, &[]).await?);
        if (here.get::<_, i64>(0), here.get::<_, String>(1)) != (there.get(0), there.get(1)) {
            return Err(Error::new(ErrorKind::Different, format!("{table} is not equal on both servers")));
        }
    }
    bench.engine.stop().await
}

struct Bench<'a> {
    client: Client,
    there: Client,
    engine: Engine,
    target: &'a ThrowawayServer,
    sentinel: i64,
}

impl Bench<'_> {
    /// Thousands of changes a second.
    async fn drain(&mut self, case: &Case, table: &str, results: &mut Results) -> Result<Sample> {
        self.engine.pause(true).await?;
        let statement = case.statement.replace("{table}", table);
        for number in 0..case.transactions {
            let statement = statement.replace("$1", &number.to_string());
            self.client.batch_execute(&statement).await.context(|| statement.clone())?;
        }
        self.sentinel += 1;
        self.client.execute("INSERT INTO sentinel VALUES ($1)", &[&self.sentinel]).await?;
        self.everything_is_queued().await?;

        let mut processes = Processes::of(self.target);
        processes.look();
        let before = processes.clone();
        let (began, window) = (Instant::now(), self.engine.watch().await?);
        self.engine.pause(false).await?;
        let deadline = Instant::now() + PATIENCE;
        let arrived = "SELECT FROM sentinel WHERE id = $1";
        while self.there.query(arrived, &[&self.sentinel]).await?.is_empty() {
            self.engine.check(deadline)?;
            processes.look();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let seconds = began.elapsed().as_secs_f64();
        processes.look();
        let spent = self.engine.spent(window).await?;
        let changes = (case.transactions * case.rows) as f64;
        results.note(format!(
            "T2, {} of {table}: processor seconds per million changes: walferry {:.2}; target: {}",
            case.name,
            spent.cpu_seconds / changes * 1e6,
            processes.since(&before, changes / 1e6)
        ));
        Ok(Sample(vec![changes / seconds / 1e3]))
    }

    /// Waits until walferry has acknowledged what is written.
    async fn everything_is_queued(&mut self) -> Result<()> {
        let end: PgLsn = self.client.query_one("SELECT pg_current_wal_insert_lsn()", &[]).await?.get(0);
        let (deadline, slot) = (Instant::now() + PATIENCE, self.engine.slot()?);
        let question = "SELECT confirmed_flush_lsn >= $1 FROM pg_replication_slots WHERE slot_name = $2";
        while !self.client.query_one(question, &[&end, &slot]).await?.get::<_, bool>(0) {
            self.engine.check(deadline)?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}
