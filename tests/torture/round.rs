//! One round: a whole migration under fire, from an empty target to the comparison after the cutover.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_postgres::{Client, NoTls};
use walferry::demo::server::{ServerPrograms, ThrowawayServer};

use super::compare;
use super::disk::FaultyDisk;
use super::faults::{Counts, Faults, Log, Side};
use super::process::{Walferry, tail};
use super::proxy::Proxy;
use super::random::Random;
use super::schema::Schema;
use super::writers::{Control, Writer};

/// How long walferry may take, without any fault, until it follows.
const CATCH_UP_MAX: Duration = Duration::from_secs(600);
/// How long the cutover may be tried.
const CUTOVER_MAX: Duration = Duration::from_secs(240);
/// How long writers rest after each transaction when there is to be a cutover.
const CALM_MS: u64 = 60;
const DATABASE: &str = "der Laden";
/// Who migrates, and whose everything is, where it is no superuser.
const ROLE: &str = "ferryman";

/// Its sequences skip values then.
fn crashes_of_the_side_that_is_left(turned_back: bool) -> &'static str {
    if turned_back { "target crashes" } else { "source crashes" }
}

/// What the check asks for.
fn rights() -> String {
    format!(
        "ALTER DATABASE \"{DATABASE}\" OWNER TO {ROLE}; GRANT pg_signal_backend TO {ROLE}; GRANT CREATE ON SCHEMA public TO {ROLE}; \
         GRANT SET ON PARAMETER session_replication_role TO {ROLE}"
    )
}

/// What a round did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub seed: u64,
    pub seconds: f64,
    pub faults: Counts,
    pub kills: u64,
    pub stops: u64,
    pub disk_hits: u64,
    /// How often walferry could not open its queue, for the disk.
    pub refused: u64,
    /// Whether walferry's roles are no superusers.
    pub ordinary_role: bool,
    pub huge: u64,
    pub huge_rows: u64,
    pub committed: u64,
    pub aborted: u64,
    pub prepared: u64,
    pub truncated: u64,
    pub unasked: Vec<String>,
    pub cutovers: u64,
    pub ways_back: u64,
    pub tables: usize,
    pub replays: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {:.0} s, {} tables, {}, {} kills, {} SIGTERMs, {}, {} disk calls spoilt, {} starts refused by the disk, \
             {} committed ({} of {} rows), {} aborted, {} prepared, {} truncated, {} cutovers tried, {} ways back, {} replays, {} ends by itself",
            self.seed,
            self.seconds,
            self.tables,
            if self.ordinary_role { "ordinary roles" } else { "superusers" },
            self.kills,
            self.stops,
            self.faults,
            self.disk_hits,
            self.refused,
            self.committed,
            self.huge,
            self.huge_rows,
            self.aborted,
            self.prepared,
            self.truncated,
            self.cutovers,
            self.ways_back,
            self.replays,
            self.unasked.len()
        )
    }
}

/// What the seed decides besides the schema.
struct Plan {
    arguments: Vec<String>,
    source_settings: Vec<(&'static str, &'static str)>,
    target_settings: Vec<(&'static str, &'static str)>,
    writers: u64,
    rest_ms: u64,
    huge_rows: u64,
    fault_time: Duration,
    pause_ms_max: u64,
    ordinary_role: bool,
    cutover_under_fire: bool,
    /// The cutover has a way back, which is followed under fire, and switched back.
    way_back: bool,
}

impl Plan {
    fn random(random: &mut Random, size: Size) -> Plan {
        let quota = *random.pick(&["2MiB", "16MiB", "1GiB"]);
        let split = *random.pick(&["256KiB", "1MiB", "1GiB"]);
        let arguments = [
            ("--copy-jobs", random.between(1, 4).to_string()),
            ("--index-jobs", random.between(1, 3).to_string()),
            ("--apply-workers", random.between(1, 5).to_string()),
            ("--split-above", split.to_owned()),
            ("--queue-max-bytes", quota.to_owned()),
            ("--queue-keep", (*random.pick(&["0s", "5s", "1h"])).to_owned()),
            ("--http-addr", "off".to_owned()),
        ];
        let mut source_settings = vec![
            ("wal_level", "logical"),
            ("max_prepared_transactions", "50"),
            ("max_wal_senders", "20"),
            ("max_replication_slots", "20"),
            ("fsync", "off"),
            ("log_min_messages", "warning"),
            ("log_min_error_statement", "panic"),
        ];
        if random.chance(50) {
            source_settings.push(("logical_decoding_work_mem", "64kB"));
        }
        if random.chance(30) {
            source_settings.push(("wal_sender_timeout", "5s"));
        }
        let mut target_settings = vec![
            ("fsync", "off"),
            ("log_min_messages", "warning"),
            ("max_prepared_transactions", "0"),
            ("wal_level", "logical"),
            ("max_wal_senders", "20"),
        ];
        if random.chance(50) {
            // The newest asynchronous commits are lost in a crash for longer.
            target_settings.push(("wal_writer_delay", "10s"));
        }
        let huge = size.huge_rows > 0 && random.chance(50);
        let huge_rows =
            if random.chance(50) { size.huge_rows } else { random.between(size.huge_rows / 4, size.huge_rows) };
        Plan {
            arguments: arguments.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect(),
            source_settings,
            target_settings,
            writers: random.between(2, 6),
            rest_ms: *random.pick(&[5, 20, 60]),
            huge_rows: if huge { huge_rows } else { 0 },
            fault_time: size.fault_time,
            pause_ms_max: *random.pick(&[500, 1000, 2500]),
            ordinary_role: random.chance(40),
            cutover_under_fire: random.chance(50),
            way_back: random.chance(40),
        }
    }
}

/// How much a round does.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub fault_time: Duration,
    pub huge_rows: u64,
}

/// Runs a round. The error is everything that is needed to find out why.
pub async fn run(seed: u64, size: Size) -> Result<Summary, String> {
    let mut random = Random::for_purpose(seed, "plan");
    let plan = Plan::random(&mut random, size);
    let schema = Arc::new(Schema::random(&mut Random::for_purpose(seed, "schema")));
    let log = Log::new();
    log.add(format!("seed {seed}: {}", plan.arguments.join(" ")));
    let programs = ServerPrograms::find(None).map_err(|error| error.to_string())?;
    let names = (format!("torture-source-{seed}"), format!("torture-target-{seed}"));
    let (source, target) = tokio::try_join!(
        ThrowawayServer::start(&programs, &names.0, &plan.source_settings),
        ThrowawayServer::start(&programs, &names.1, &plan.target_settings)
    )
    .map_err(|error| error.to_string())?;
    let state = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut sides = [
        Side {
            name: "source",
            proxy: Proxy::to(source.port()).await.map_err(|error| error.to_string())?,
            server: source,
        },
        Side {
            name: "target",
            proxy: Proxy::to(target.port()).await.map_err(|error| error.to_string())?,
            server: target,
        },
    ];
    let mut arguments = vec!["migrate".to_owned()];
    let role = if plan.ordinary_role { ROLE } else { "postgres" };
    for (option, side) in [("--source", &sides[0]), ("--target", &sides[1])] {
        arguments.push(option.to_owned());
        arguments.push(format!("postgres://{role}@127.0.0.1:{}/{}", side.proxy.port, DATABASE.replace(' ', "%20")));
    }
    let directory = state.path().join("state");
    arguments.extend(["--dir".to_owned(), directory.to_string_lossy().into_owned()]);
    arguments.extend(plan.arguments.clone());
    let disk = FaultyDisk::build(state.path(), &directory.join("queue"));
    let mut walferry = Walferry::new(arguments, directory, state.path().join("walferry.log"));
    walferry.environment = disk.as_ref().map_or_else(Vec::new, |disk| disk.environment().to_vec());
    let control = Arc::new(Control::default());
    let mut summary = Summary {
        seed,
        tables: schema.tables.len(),
        ordinary_role: plan.ordinary_role,
        huge_rows: plan.huge_rows,
        ..Summary::default()
    };
    let begun = Instant::now();
    let outcome =
        migrate(seed, &plan, &schema, &mut sides, &mut walferry, disk.as_ref(), &control, &log, &mut summary).await;
    control.stop.store(true, Ordering::Relaxed);
    walferry.kill().await;
    summary.disk_hits = disk.as_ref().map_or(0, FaultyDisk::hits);
    summary.refused = walferry.refused;
    summary.huge = control.huge.load(Ordering::Relaxed);
    summary.seconds = begun.elapsed().as_secs_f64();
    summary.unasked.clone_from(&walferry.unasked);
    summary.stops = walferry.stops;
    summary.committed = control.committed.load(Ordering::Relaxed);
    summary.aborted = control.aborted.load(Ordering::Relaxed);
    summary.prepared = control.prepared.load(Ordering::Relaxed);
    summary.truncated = control.truncated.load(Ordering::Relaxed);
    summary.replays = walferry.logged("replaying it row by row");
    outcome.map(|()| summary.clone()).map_err(|error| {
        format!(
            "{error}\n\n=== repeat with: make torture SEED={seed} ROUNDS=1\n{summary}\n=== command\nwalferry {}\n=== schema\n{};\n=== faults\n{}\n\
             === walferry\n{}\n=== source's log\n{}\n=== target's log\n{}",
            walferry.arguments.join(" "),
            schema.statements().join(";\n"),
            log.text(),
            walferry.tail(120),
            tail(&sides[0].server.log(), 25),
            tail(&sides[1].server.log(), 25),
        )
    })
}

#[allow(clippy::too_many_arguments)] // One place calls it; a struct of them would say no more.
async fn migrate(
    seed: u64,
    plan: &Plan,
    schema: &Arc<Schema>,
    sides: &mut [Side; 2],
    walferry: &mut Walferry,
    disk: Option<&FaultyDisk>,
    control: &Arc<Control>,
    log: &Log,
    summary: &mut Summary,
) -> Result<(), String> {
    let sql = |error: tokio_postgres::Error| format!("the test's own SQL failed: {error:?}");
    for side in sides.iter() {
        let client = connect(&side.server, "postgres").await.map_err(sql)?;
        client.batch_execute(&format!("CREATE DATABASE \"{DATABASE}\"")).await.map_err(sql)?;
        if plan.ordinary_role {
            client.batch_execute(&format!("CREATE ROLE {ROLE} LOGIN REPLICATION")).await.map_err(sql)?;
            let client = connect(&side.server, DATABASE).await.map_err(sql)?;
            client.batch_execute(&rights()).await.map_err(sql)?;
        }
    }
    let url = |side: &Side| match plan.ordinary_role {
        true => side.server.url_for(DATABASE).replace("//postgres@", &format!("//{ROLE}@")),
        false => side.server.url_for(DATABASE),
    };
    let (source_url, target_url) = (url(&sides[0]), url(&sides[1]));
    // What the application makes belongs to its role.
    let (source, connection) = tokio_postgres::connect(&source_url, NoTls).await.map_err(sql)?;
    tokio::spawn(async move { drop(connection.await) });
    let mut filling = Random::for_purpose(seed, "rows");
    for statement in schema.statements().iter().chain(&schema.fill(&mut filling)) {
        source.batch_execute(statement).await.map_err(|error| format!("{statement}: {error:?}"))?;
    }
    source.batch_execute("ANALYZE").await.map_err(sql)?;
    drop(source);

    let begin_writing = |url: &str, purpose: &str, huge_rows: u64| {
        let mut writers = tokio::task::JoinSet::new();
        for number in 0..plan.writers {
            let writer = Writer {
                number,
                url: url.to_owned(),
                schema: Arc::clone(schema),
                control: Arc::clone(control),
                random: Random::for_purpose(seed, &format!("{purpose} {number}")),
                rest_ms: plan.rest_ms,
                huge_rows,
                huge_left: if number == 0 && huge_rows > 0 { 2 } else { 0 },
            };
            writers.spawn(writer.run());
        }
        writers
    };
    let mut writers = begin_writing(&source_url, "writer", plan.huge_rows);
    sleep(Duration::from_millis(300)).await;
    log.add("walferry begins");
    walferry.start().map_err(|error| error.to_string())?;

    let mut faults = Faults {
        sides,
        walferry,
        disk,
        database: DATABASE,
        random: Random::for_purpose(seed, "faults"),
        log: log.clone(),
        counts: Counts::default(),
        pause_ms_max: plan.pause_ms_max,
        disk_until: None,
        corruptions_left: 2,
        losses_left: 1,
        turned_back: false,
    };
    let mut outcome = under_fire(plan, &mut faults, control, summary).await;
    if plan.way_back && outcome.is_ok() {
        control.stop.store(true, Ordering::Relaxed);
        while writers.join_next().await.is_some() {}
        faults.log.add("the application has moved to the new primary");
        control.stop.store(false, Ordering::Relaxed);
        writers = begin_writing(&target_url, "writer on the new primary", 0);
        faults.turned_back = true;
        (faults.corruptions_left, faults.losses_left) = (1, 1);
        summary.ways_back += 1;
        outcome = under_fire(plan, &mut faults, control, summary).await;
    }
    summary.faults = faults.counts.clone();
    summary.kills = faults.walferry.kills;
    let exact_sequences = match outcome {
        Ok(crashes) => crashes == faults.counts.of(crashes_of_the_side_that_is_left(faults.turned_back)),
        Err(error) => {
            // What is different by then, once nobody writes, tells much about why.
            control.stop.store(true, Ordering::Relaxed);
            while writers.join_next().await.is_some() {}
            sleep(Duration::from_secs(5)).await;
            let different = async {
                let (left, right) =
                    tokio::try_join!(connect(&sides[0].server, DATABASE), connect(&sides[1].server, DATABASE))?;
                compare::differences(&left, &right, false).await
            };
            let different = match different.await {
                Ok(different) => different.join("\n"),
                Err(unknown) => format!("unknown: {unknown:?}"),
            };
            return Err(format!("{error}\nby then, the target differed from the source:\n{different}"));
        }
    };

    control.stop.store(true, Ordering::Relaxed);
    while writers.join_next().await.is_some() {}
    log.add("the writers have ended");
    let (left, right) =
        tokio::try_join!(connect(&sides[0].server, DATABASE), connect(&sides[1].server, DATABASE)).map_err(sql)?;
    let different = compare::differences(&left, &right, exact_sequences).await.map_err(sql)?;
    if !different.is_empty() {
        return Err(format!("the target differs from the source:\n{}", different.join("\n")));
    }
    log.add("both sides are equal");
    if let Some(end) = walferry.unasked.first() {
        return Err(format!("walferry gave up by itself {} times; first: {end}", walferry.unasked.len()));
    }
    let servers: Vec<&str> = walferry.arguments[1..5].iter().map(String::as_str).collect();
    let (code, said) = walferry.command(&[&["clean"], servers.as_slice()].concat()).await;
    if code != Some(0) {
        return Err(format!("`walferry clean` ended with {code:?}: {said}"));
    }
    // `clean` ends the sessions that began behind the fence, ours among them.
    for side in sides.iter() {
        nothing_is_left(&connect(&side.server, DATABASE).await.map_err(sql)?).await?;
    }
    Ok(())
}

/// The faults, the way to following, and the cutover. Answers how often the source had crashed when the last one began.
async fn under_fire(
    plan: &Plan,
    faults: &mut Faults<'_>,
    control: &Control,
    summary: &mut Summary,
) -> Result<u64, String> {
    // Half of them from the first moment on, the other half while it follows.
    for _ in 0..2 {
        faults.run(plan.fault_time / if faults.turned_back { 4 } else { 2 }).await?;
        faults.log.add("no more faults");
        until_following(faults).await?;
    }
    control.no_prepared.store(true, Ordering::Relaxed);
    control.calm_ms.store(CALM_MS, Ordering::Relaxed);
    let mut crashes = 0;
    if plan.cutover_under_fire {
        faults.log.add("a cutover under fire");
        faults.pause_ms_max = faults.pause_ms_max.min(1500);
        for _ in 0..3 {
            // The asking process does not outlive its answer by much, so the faults may meet it anywhere.
            crashes = faults.counts.of(crashes_of_the_side_that_is_left(faults.turned_back));
            let asked = ask_for_cutover(plan, faults);
            faults.run(Duration::from_secs(3)).await?;
            summary.cutovers += 1;
            if let Ok(Ok((code, said))) = tokio::time::timeout(Duration::from_secs(60), asked).await {
                faults.log.add(format!("the cutover under fire ended with {code:?}: {}", last_line(&said)));
            }
            if faults.walferry.done || has_turned(plan, faults).await {
                break;
            }
        }
        faults.heal();
    }
    let deadline = Instant::now() + CUTOVER_MAX;
    let mut last = String::new();
    loop {
        faults.look()?;
        if faults.walferry.done {
            faults.log.add("walferry has ended: cut over");
            return Ok(crashes);
        }
        if has_turned(plan, faults).await {
            faults.log.add("cut over, and the way back is open");
            return Ok(crashes);
        }
        if Instant::now() > deadline {
            return Err(format!("no cutover within {CUTOVER_MAX:?}; last: {last}"));
        }
        until_following(faults).await?;
        if faults.walferry.done {
            continue;
        }
        summary.cutovers += 1;
        crashes = faults.counts.of(crashes_of_the_side_that_is_left(faults.turned_back));
        let (code, said) = ask_for_cutover(plan, faults).await.map_err(|error| error.to_string())?;
        last = format!("{code:?}: {}", last_line(&said));
        faults.log.add(format!("the cutover ended with {last}"));
        match code {
            Some(0) if plan.way_back && !faults.turned_back => {}
            Some(0) => {
                let ended = Instant::now() + Duration::from_secs(60);
                while faults.walferry.look() {
                    if Instant::now() > ended {
                        return Err("60 s after the cutover `walferry migrate` is still there".into());
                    }
                    sleep(Duration::from_millis(50)).await;
                }
                if !faults.walferry.done {
                    return Err("after the cutover `walferry migrate` did not end with 0".into());
                }
            }
            Some(5) => {
                // Where it never gets ready because the machine has other work too, ever less is written.
                control.calm_ms.fetch_add(CALM_MS / 4, Ordering::Relaxed);
                sleep(Duration::from_millis(500)).await;
            }
            // It had not come back yet, or is just ending because the one before went through.
            Some(1) if said.contains("no migration is running") => sleep(Duration::from_millis(500)).await,
            _ => return Err(format!("without any fault, the cutover ended with {code:?}: {said}")),
        }
    }
}

fn last_line(text: &str) -> &str {
    text.trim().lines().last().unwrap_or_default()
}

/// Asks in a process of its own.
fn ask_for_cutover(plan: &Plan, faults: &Faults<'_>) -> tokio::task::JoinHandle<(Option<i32>, String)> {
    let asking = Walferry::new(Vec::new(), faults.walferry.directory.clone(), Default::default());
    let how: &[&str] = match (faults.turned_back, plan.way_back) {
        (true, _) => &["switchback"],
        (false, true) => &["cutover"],
        (false, false) => &["cutover", "--no-reverse"],
    };
    let arguments = [how, &["--yes", "--timeout", "20s", "--max-write-stall", "15s"]].concat();
    tokio::spawn(async move { asking.command(&arguments).await })
}

/// Whether the cutover has gone through that this round has to follow the other way.
async fn has_turned(plan: &Plan, faults: &Faults<'_>) -> bool {
    plan.way_back && !faults.turned_back && faults.walferry.phase().await.1
}

async fn until_following(faults: &mut Faults<'_>) -> Result<(), String> {
    let deadline = Instant::now() + CATCH_UP_MAX;
    loop {
        faults.look()?;
        if faults.walferry.done {
            return Ok(());
        }
        let (phase, back) = faults.walferry.phase().await;
        if phase == "following" || back && phase == "cut_over" {
            faults.log.add("following");
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{CATCH_UP_MAX:?} after the last fault walferry does not follow, it is {phase}"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn nothing_is_left(source: &Client) -> Result<(), String> {
    let row = source
        .query_one(
            "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_publication), \
                    (SELECT count(*) FROM pg_namespace WHERE nspname = 'walferry')",
            &[],
        )
        .await
        .map_err(|error| error.to_string())?;
    match (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)) {
        (0, 0, 0) => Ok(()),
        left => Err(format!("`walferry clean` left on a server (slots, publications, schemas): {left:?}")),
    }
}

async fn connect(server: &ThrowawayServer, database: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(&server.url_for(database), NoTls).await?;
    tokio::spawn(async move { drop(connection.await) });
    // After the cutover the source is closed to writers; the test only reads there.
    Ok(client)
}
