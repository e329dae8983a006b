//! B1 and B2: a full clone, up to following, beside raw COPY, `pg_dump` with `pg_restore`, and pgcopydb where it is.

use std::time::Duration;

use walferry::error::Result;

use crate::engine::{Engine, Spent};
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// The bars: at most 1.10 times the raw pipe, at most 0.80 times the best of the others.
const RAW: f64 = 1.0 / 1.10;
const TOOLS: f64 = 1.0 / 0.80;

/// A database to clone.
struct Original<'a> {
    id: &'static str,
    case: String,
    database: &'a str,
    /// What is piped, in this order.
    tables: &'a [&'a str],
}

pub async fn pgbench(setting: &Setting, results: &mut Results) -> Result<()> {
    let scale = setting.options.size(50, 10);
    setting.new_database(&setting.source, "clone").await?;
    setting.shell(&format!("pgbench -q -i -s {scale} -d {} 2>&1", setting.source.url_for("clone"))).await?;
    let original = Original {
        id: "B1",
        case: format!("full clone, pgbench scale {scale}"),
        database: "clone",
        tables: &["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"],
    };
    compare(setting, &original, results).await
}

/// B2: one table of 5 GB with two secondary indexes.
pub async fn large_table(setting: &Setting, results: &mut Results) -> Result<()> {
    let rows = setting.options.size(40_000_000, 4_000_000);
    setting.new_database(&setting.source, "large").await?;
    let client = setting.source.connect("large").await?;
    client
        .batch_execute(&format!(
            "SET maintenance_work_mem = '512MB';
             CREATE TABLE events (id bigint, device integer, at timestamptz, note text);
             INSERT INTO events SELECT n, n * 7919 % 100003, '2024-01-01'::timestamptz + n * interval '1 second', \
                 md5(n::text) || md5((n + 1)::text) FROM generate_series(1, {rows}::bigint) n;
             ALTER TABLE events ADD PRIMARY KEY (id);
             CREATE INDEX ON events (device); CREATE INDEX ON events (at); ANALYZE"
        ))
        .await?;
    let gigabytes: f64 = client.query_one("SELECT pg_table_size('events')::float8 / 1e9", &[]).await?.get(0);
    let case = format!("full clone, one table of {gigabytes:.1} GB with two secondary indexes");
    compare(setting, &Original { id: "B2", case, database: "large", tables: &["events"] }, results).await
}

async fn compare(setting: &Setting, original: &Original<'_>, results: &mut Results) -> Result<()> {
    let has_pgcopydb = setting.shell("command -v pgcopydb").await.is_ok();
    let mut ours = Sample::default();
    let mut raw = Sample::default();
    let mut tools = vec![("pg_dump + pg_restore -j2", Sample::default())];
    if has_pgcopydb {
        tools.push(("pgcopydb, 2 + 2 jobs", Sample::default()));
    } else {
        results.note(format!("{}: pgcopydb is not installed here.", original.id));
    }
    let mut peak_bytes = 0;
    let mut cpu = 0.0f64;
    for round in 0..setting.options.rounds() {
        // Whoever is first finds colder caches, so it is not always the same one.
        for turn in 0..2 + tools.len() {
            fresh(setting, original).await?;
            match (turn + round) % (2 + tools.len()) {
                0 => {
                    let (spent, peak) = walferry(setting, original).await?;
                    ours.0.push(spent.elapsed.as_secs_f64());
                    cpu = cpu.max(spent.cpu_seconds);
                    peak_bytes = peak_bytes.max(peak);
                }
                1 => raw.0.push(raw_pipe(setting, original).await?.as_secs_f64()),
                2 => tools[0].1.0.push(dump_and_restore(setting, original).await?.as_secs_f64()),
                _ => tools[1].1.0.push(pgcopydb(setting, original).await?.as_secs_f64()),
            }
        }
    }
    setting.footprint(&original.case, peak_bytes);
    let Original { id, case, .. } = original;
    results.add(Row::of_times(id, case, &ours, ("raw COPY pipes, keys, ANALYZE", &raw), Bar::Speed(RAW)));
    tools.sort_by(|one, other| one.1.median().total_cmp(&other.1.median()));
    for (place, (name, sample)) in tools.iter().enumerate() {
        let bar = if place == 0 { Bar::Speed(TOOLS) } else { Bar::Reported };
        results.add(Row::of_times(id, case, &ours, (name, sample), bar));
    }
    results.add(Row::of_value("B10", &format!("CPU of our process, {case}"), "s", Sample(vec![cpu]), Bar::Reported));
    setting.drop_database(&setting.source, original.database).await?;
    setting.drop_database(&setting.target, original.database).await
}

async fn fresh(setting: &Setting, original: &Original<'_>) -> Result<()> {
    setting.new_database(&setting.target, original.database).await?;
    setting.settle().await
}

/// From the start of the process until it follows.
async fn walferry(setting: &Setting, original: &Original<'_>) -> Result<(Spent, u64)> {
    let target = setting.target.url_for(original.database);
    let mut engine = Engine::new(setting, original.database, setting.source.url_for(original.database), target)?;
    let begun = std::time::Instant::now();
    engine.start()?;
    let window = engine.watch().await?;
    engine.following().await?;
    let elapsed = begun.elapsed();
    let spent = engine.spent(window).await?;
    let peak = engine.peak_bytes();
    engine.clean().await?;
    Ok((Spent { elapsed, ..spent }, peak))
}

/// Table after table, in binary; then keys and indexes, and ANALYZE. The empty tables are there before.
async fn raw_pipe(setting: &Setting, original: &Original<'_>) -> Result<Duration> {
    let (from, to) = (setting.source.url_for(original.database), setting.target.url_for(original.database));
    setting.copy_schema(&from, &to, "--section=pre-data").await?;
    let keys = setting.scratch().join("keys.sql");
    setting.shell(&format!("pg_dump --schema-only --section=post-data {from} > {}", keys.display())).await?;
    let pipes: Vec<String> = original
        .tables
        .iter()
        .map(|table| {
            format!(
                "psql -qX -d {from} -c 'COPY {table} TO STDOUT (FORMAT binary)' | psql -qX -d {to} -c 'COPY {table} FROM STDIN (FORMAT binary)'"
            )
        })
        .collect();
    let keys = format!("psql -qX -v ON_ERROR_STOP=1 -d {to} -f {} -c ANALYZE >/dev/null", keys.display());
    setting.shell(&format!("{}\n{keys}", pipes.join("\n"))).await
}

async fn dump_and_restore(setting: &Setting, original: &Original<'_>) -> Result<Duration> {
    let (from, to) = (setting.source.url_for(original.database), setting.target.url_for(original.database));
    let files = setting.directory("dump")?;
    let files = files.display();
    // Uncompressed, since both servers are near: the faster way of it.
    let script =
        format!("pg_dump -Fd -j2 -Z0 -f {files} {from}; pg_restore -j2 -d {to} {files}; psql -qX -d {to} -c ANALYZE");
    let elapsed = setting.shell(&script).await?;
    setting.directory("dump")?;
    Ok(elapsed)
}

async fn pgcopydb(setting: &Setting, original: &Original<'_>) -> Result<Duration> {
    let (from, to) = (setting.source.url_for(original.database), setting.target.url_for(original.database));
    let files = setting.directory("pgcopydb")?;
    let script = format!(
        "pgcopydb clone --table-jobs 2 --index-jobs 2 --no-acl --no-owner --source '{from}' --target '{to}' --dir {}",
        files.display()
    );
    let elapsed = setting.shell(&script).await?;
    setting.directory("pgcopydb")?;
    Ok(elapsed)
}
