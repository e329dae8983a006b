//! T3: every step of a live migration of a hypertable with 500 chunks and with 5,000: none may cost a chunk more because there are others.
//!
//! A tenth of the chunks is compressed. The steps are timed by themselves: `check`; each phase until it follows; a chunk that is new on the
//! source until its row is on the target; changes of rows in 100 chunks; the cutover with what `walferry cutover --json` says of its steps.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use walferry::demo::server::ThrowawayServer;
use walferry::error::{Context, Error, ErrorKind, Result};
use walferry::observe::status::Phase;

use crate::engine::{Engine, PATIENCE};
use crate::ingesting::with_servers;
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// How often it is looked for what a step is timed by.
const LOOK: Duration = Duration::from_millis(10);
/// Steps shorter than this say nothing about how they grow.
const TOO_SHORT: f64 = 0.3;

fn schema(chunks: u32) -> String {
    format!(
        "SET TimeZone = 'UTC'; CREATE EXTENSION timescaledb;
         CREATE TABLE readings (time timestamptz NOT NULL, device int NOT NULL, value float8, PRIMARY KEY (time, device));
         SELECT create_hypertable('readings', 'time', chunk_time_interval => interval '1 hour');
         ALTER TABLE readings SET (timescaledb.compress, timescaledb.compress_segmentby = 'device');
         INSERT INTO readings SELECT '2025-01-01 00:00Z'::timestamptz + i * interval '1 hour' + j * interval '1 min', j, i
         FROM generate_series(0, {chunks} - 1) i, generate_series(1, 20) j;
         SELECT compress_chunk(c) FROM show_chunks('readings', older_than => '2025-01-01 00:00Z'::timestamptz + {chunks} / 10 * interval '1 hour') c"
    )
}

pub async fn steps(setting: &Setting, results: &mut Results) -> Result<()> {
    let (few, many) = setting.options.size((500, 5_000), (100, 1_000));
    let measured = with_servers(setting, async |source, target| {
        Ok((measure(setting, (source, target), few).await?, measure(setting, (source, target), many).await?))
    });
    let (of_few, of_many) = measured.await?;
    for ((step, short), (_, long)) in of_few.into_iter().zip(of_many) {
        let case = format!("{step}: {many} chunks {long:.2} s, {few} chunks {short:.2} s");
        if long < TOO_SHORT {
            results.note(format!("T3, {case}"));
            continue;
        }
        let ratio = Sample(vec![long / short]);
        results.add(Row::of_value("T3", &case, "× the time", ratio, Bar::AtMost(f64::from(many / few) * 1.25)));
    }
    Ok(())
}

/// Seconds of each step.
async fn measure(
    setting: &Setting,
    (source, target): (&ThrowawayServer, &ThrowawayServer),
    chunks: u32,
) -> Result<Vec<(String, f64)>> {
    let database = format!("chunks{chunks}");
    setting.new_database(source, &database).await?;
    setting.new_database(target, &database).await?;
    let client = source.connect(&database).await?;
    // Chunks of one statement are in one transaction with all of their locks.
    client.batch_execute(&schema(chunks)).await.context(|| format!("making {chunks} chunks"))?;
    client.batch_execute("VACUUM ANALYZE").await?;
    let mut steps: Vec<(String, f64)> = Vec::new();
    let mut engine = Engine::new(setting, &database, source.url_for(&database), target.url_for(&database))?;
    let began = Instant::now();
    engine.check_servers().await?;
    steps.push(("check".into(), began.elapsed().as_secs_f64()));

    engine.start()?;
    let deadline = Instant::now() + PATIENCE;
    for (phase, name) in [
        (Phase::Copying, "preparation, schema included"),
        (Phase::CatchingUp, "copy and indexes"),
        (Phase::Following, "the rest of the schema"),
    ] {
        let began = Instant::now();
        while !engine.status().await.is_ok_and(|status| rank(status.phase) >= rank(phase)) {
            engine.check(deadline)?;
            tokio::time::sleep(LOOK).await;
        }
        steps.push((name.into(), began.elapsed().as_secs_f64()));
    }

    let there = target.connect(&database).await?;
    let mut number = 0;
    for (name, statement) in [
        (
            "the first change is applied",
            "UPDATE readings SET value = -1 WHERE time = '2025-01-01 00:01Z'::timestamptz + {chunks} / 2 * interval '1 hour'",
        ),
        ("a new chunk is applied", "INSERT INTO readings VALUES ('2024-01-01 00:00Z', 0, 0)"),
        ("another new chunk is applied", "INSERT INTO readings VALUES ('2024-01-02 00:00Z', 0, 0)"),
        (
            "2,000 changes in 100 chunks are applied",
            "UPDATE readings SET value = value + 1 WHERE time >= '2025-01-01 00:00Z'::timestamptz + {chunks} / 2 * interval '1 hour' \
          AND time < '2025-01-01 00:00Z'::timestamptz + ({chunks} / 2 + least(100, {chunks} / 4)) * interval '1 hour'",
        ),
    ] {
        let began = Instant::now();
        number += 1;
        // The probe is in the same transaction, and a column that tells it from the others.
        let probe = "INSERT INTO readings VALUES ('2025-01-01 00:00Z', ".to_owned() + &format!("{}, 0)", 1000 + number);
        let statement = statement.replace("{chunks}", &chunks.to_string());
        client.batch_execute(&format!("BEGIN; {statement}; {probe}; COMMIT")).await.context(|| statement)?;
        is_there(&there, 1000 + number, &mut engine, deadline).await?;
        steps.push((name.into(), began.elapsed().as_secs_f64()));
    }

    let began = Instant::now();
    while !engine.status().await.is_ok_and(|status| status.ready_to_cutover) {
        engine.check(deadline)?;
        tokio::time::sleep(LOOK).await;
    }
    steps.push(("until it is ready to cut over".into(), began.elapsed().as_secs_f64()));
    let said = engine.command(&["cutover", "--yes", "--json", "--timeout", "120s", "--dir"]).await?;
    let downtime = said.get("downtime_ms").and_then(serde_json::Value::as_f64);
    let downtime = downtime.ok_or_else(|| Error::new(ErrorKind::Aborted, format!("the cutover said {said}")))?;
    for step in said.get("steps").and_then(serde_json::Value::as_array).into_iter().flatten() {
        let (name, ms) = (step.get("name").and_then(|name| name.as_str()), step.get("ms").and_then(|ms| ms.as_f64()));
        steps.push((format!("cutover, {}", name.unwrap_or("?")), ms.unwrap_or_default() / 1000.0));
    }
    steps.push(("cutover, writers wait".into(), downtime / 1000.0));
    // The cutover has ended the session of before.
    let client = source.connect(&database).await?;
    let rows = "SELECT count(*), sum(value) FROM readings";
    let (here, there) = (client.query_one(rows, &[]).await?, there.query_one(rows, &[]).await?);
    if (here.get::<_, i64>(0), here.get::<_, f64>(1)) != (there.get(0), there.get(1)) {
        return Err(Error::new(ErrorKind::Different, "the rows are not equal"));
    }
    engine.stop().await?;
    drop((client, there));
    setting.drop_database(source, &database).await?;
    setting.drop_database(target, &database).await?;
    Ok(steps)
}

/// In the order in which they come.
fn rank(phase: Phase) -> u8 {
    match phase {
        Phase::Preparing => 0,
        Phase::Copying => 1,
        Phase::Indexing => 2,
        Phase::CatchingUp => 3,
        _ => 4,
    }
}

async fn is_there(target: &Client, device: i32, engine: &mut Engine, deadline: Instant) -> Result<()> {
    let probe = target.prepare("SELECT FROM readings WHERE time = '2025-01-01 00:00Z' AND device = $1").await?;
    while target.query(&probe, &[&device]).await?.is_empty() {
        engine.check(deadline)?;
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
