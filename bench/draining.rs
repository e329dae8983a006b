//! B3 to B6: a backlog, drained by walferry from its queue or straight from the slot, and by a native subscription.
//!
//! ```text
//!               ┌── slot ──► walferry's queue, the apply paused        resume ──► database A ──┐
//!   backlog ────┤   slot (walferry stopped)                            start ───► database A ──┼──► the sentinel is there
//!               └── slot of a disabled subscription                    ENABLE ──► database B ──┘
//! ```
//!
//! Both drain the same transactions, one after the other, and take turns in who is first. What ends a timing is a row that was
//! written last.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;
use walferry::error::{Error, ErrorKind, Result};

use crate::backlog::{self, Workload};
use crate::engine::{Engine, PATIENCE, Spent};
use crate::native::Native;
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

const SENTINEL: &str = "CREATE TABLE bench_sentinel (id bigint PRIMARY KEY)";

/// Where walferry's part of the backlog is when the clock starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// In the queue on disk; the apply was paused.
    Queue,
    /// In the source's WAL; walferry did not run.
    Slot,
}

impl From {
    fn text(self) -> &'static str {
        match self {
            From::Queue => "from the queue",
            From::Slot => "from the slot",
        }
    }
}

/// What the rounds of one kind gave, in seconds.
#[derive(Default)]
pub struct Drained {
    pub ours: Sample,
    pub native: Sample,
    cpu_seconds: f64,
    changes: u64,
}

pub async fn inserts(setting: &Setting, results: &mut Results) -> Result<()> {
    let workload = backlog::inserts(setting.options.size(20_000, 4_000));
    both(setting, &workload, ("B3", 4.0), results).await
}

pub async fn tpcb(setting: &Setting, results: &mut Results) -> Result<()> {
    let workload = backlog::tpcb(setting.options.size(50, 10), setting.options.size(240_000, 40_000));
    both(setting, &workload, ("B4", 3.0), results).await
}

async fn both(
    setting: &Setting,
    workload: &Workload,
    (id, bar): (&'static str, f64),
    results: &mut Results,
) -> Result<()> {
    let mut ways = Vec::new();
    if setting.options.wants(id) {
        ways.push((id, From::Queue, Bar::Speed(bar)));
    }
    if setting.options.wants("B5") {
        ways.push(("B5", From::Slot, Bar::Speed(1.0)));
    }
    measure(setting, workload, &ways, results).await
}

/// B6, each beside a native subscription; from the slot too in a full run.
pub async fn small_cases(setting: &Setting, results: &mut Results) -> Result<()> {
    let mut ways = vec![("B6", From::Queue, Bar::Speed(1.0))];
    if !setting.options.quick {
        ways.push(("B6", From::Slot, Bar::Speed(1.0)));
    }
    let backlogs = setting.options.rounds() * ways.len();
    let wanted = |workload: &Workload| {
        setting.options.cases.is_empty() || setting.options.cases.iter().any(|case| case == workload.name)
    };
    for workload in backlog::small(setting.options.size(5, 1), backlogs as u64).into_iter().filter(wanted) {
        if let Err(error) = measure(setting, &workload, &ways, results).await {
            // One kind that does not work is a result too; the others are still measured.
            results.note(format!("B6, {}: failed: {error}", workload.case));
        }
    }
    Ok(())
}

async fn measure(
    setting: &Setting,
    workload: &Workload,
    ways: &[(&'static str, From, Bar)],
    results: &mut Results,
) -> Result<()> {
    let mut bench = Drain::begin(setting, workload, None, true).await?;
    let mut outcomes: Vec<Drained> = ways.iter().map(|_| Drained::default()).collect();
    for round in 0..setting.options.rounds() {
        for ((_, from, _), drained) in ways.iter().zip(&mut outcomes) {
            bench.round(*from, round % 2 == 0, drained).await?;
        }
    }
    bench.end().await?;
    for ((id, from, bar), drained) in ways.iter().zip(outcomes) {
        let case = format!("drain {}, {}", from.text(), workload.case);
        results.add(row(id, &case, workload, &drained, *bar));
        results.cpu.push((case, drained.cpu_seconds, drained.changes));
    }
    Ok(())
}

/// Rates in thousands of row changes a second.
fn row(id: &'static str, case: &str, workload: &Workload, drained: &Drained, bar: Bar) -> Row {
    let changes = (workload.transactions() * workload.changes_per_transaction) as f64;
    let rate = |times: &Sample| Sample(times.0.iter().map(|seconds| changes / seconds / 1e3).collect());
    let (ours, native) = (rate(&drained.ours), rate(&drained.native));
    let speed = Some(ours.over(&native));
    Row {
        id,
        case: case.to_owned(),
        unit: "k changes/s",
        walferry: ours,
        peer: Some(("native subscription".into(), native)),
        speed,
        bar,
    }
}

/// A source database, walferry and perhaps a native subscription on it.
pub struct Drain<'a> {
    setting: &'a Setting,
    workload: &'a Workload,
    engine: Engine,
    native: Option<Native>,
    source: Client,
    ours: Client,
    theirs: Option<Client>,
    backlogs: u64,
}

impl<'a> Drain<'a> {
    /// Sets all up to the point where everybody follows. `target_port` is where walferry finds the target, if not directly.
    pub async fn begin(
        setting: &'a Setting,
        workload: &'a Workload,
        target_port: Option<u16>,
        with_native: bool,
    ) -> Result<Drain<'a>> {
        let database = workload.name;
        let (our_database, their_database) = (format!("ours_{database}"), format!("native_{database}"));
        workload.prepare(setting, database).await?;
        let source = setting.source.connect(database).await?;
        source.batch_execute(SENTINEL).await?;
        setting.new_database(&setting.target, &our_database).await?;
        let mut target = setting.target.url_for(&our_database);
        if let Some(port) = target_port {
            target = target.replace(&format!(":{}/", setting.target.port()), &format!(":{port}/"));
        }
        let mut engine = Engine::new(setting, database, setting.source.url_for(database), target)?;
        engine.start()?;
        engine.following().await?;
        let native = match with_native {
            true => Some(Native::begin(setting, database, &their_database).await?),
            false => None,
        };
        let theirs = match with_native {
            true => Some(setting.target.connect(&their_database).await?),
            false => None,
        };
        let ours = setting.target.connect(&our_database).await?;
        Ok(Drain { setting, workload, engine, native, source, ours, theirs, backlogs: 0 })
    }

    /// One backlog, drained by both.
    pub async fn round(&mut self, from: From, walferry_first: bool, drained: &mut Drained) -> Result<()> {
        match from {
            From::Queue => self.engine.pause(true).await?,
            From::Slot => self.engine.stop().await?,
        }
        if let Some(native) = &self.native {
            native.rest().await?;
        }
        self.workload.pile_up(self.setting, self.workload.name, self.backlogs).await?;
        self.backlogs += 1;
        let sentinel = self.backlogs.cast_signed();
        self.source.execute("INSERT INTO bench_sentinel VALUES ($1)", &[&sentinel]).await?;
        self.setting.settle().await?;
        if from == From::Queue {
            self.everything_is_queued().await?;
        }
        for turn in [walferry_first, !walferry_first] {
            if turn {
                let spent = self.drain_ours(from, sentinel).await?;
                drained.ours.0.push(spent.elapsed.as_secs_f64());
                drained.cpu_seconds += spent.cpu_seconds;
                drained.changes += self.workload.transactions() * self.workload.changes_per_transaction;
            } else if let (Some(native), Some(theirs)) = (&self.native, &self.theirs) {
                let begun = Instant::now();
                native.go_on().await?;
                arrived(theirs, sentinel, None).await?;
                drained.native.0.push(begun.elapsed().as_secs_f64());
                native.rest().await?;
            }
            self.setting.settle().await?;
        }
        if let Some(native) = &self.native {
            native.go_on().await?;
        }
        Ok(())
    }

    async fn drain_ours(&mut self, from: From, sentinel: i64) -> Result<Spent> {
        let begun = Instant::now();
        let window = match from {
            From::Queue => {
                let window = self.engine.watch().await?;
                self.engine.pause(false).await?;
                window
            }
            From::Slot => {
                self.engine.start()?;
                self.engine.watch().await?
            }
        };
        arrived(&self.ours, sentinel, Some(&mut self.engine)).await?;
        let spent = self.engine.spent(window).await?;
        self.engine.peak_bytes();
        // The start of the process is part of it; that of perf is not.
        Ok(if from == From::Slot { Spent { elapsed: begun.elapsed(), ..spent } } else { spent })
    }

    /// Waits until walferry has acknowledged what is written, which it does when it is durable in the queue.
    async fn everything_is_queued(&mut self) -> Result<()> {
        let end: PgLsn = self.source.query_one("SELECT pg_current_wal_insert_lsn()", &[]).await?.get(0);
        let deadline = Instant::now() + PATIENCE;
        let slot = self.engine.slot()?;
        let question = "SELECT confirmed_flush_lsn >= $1 FROM pg_replication_slots WHERE slot_name = $2";
        while !self.source.query_one(question, &[&end, &slot]).await?.get::<_, bool>(0) {
            self.engine.check(deadline)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Compares the rows of all sides, and removes everything.
    pub async fn end(mut self) -> Result<()> {
        self.setting.footprint(&format!("{} (copy, queue, drain)", self.workload.case), self.engine.peak_bytes());
        let expected = digest(&self.source).await?;
        let sides = [("walferry", Some(&self.ours)), ("the native subscription", self.theirs.as_ref())];
        for (name, client) in sides.into_iter().filter_map(|(name, client)| Some((name, client?))) {
            let there = digest(client).await?;
            if there != expected {
                let what = format!("{}: {name} has other rows than the source", self.workload.case);
                return Err(Error::new(ErrorKind::Different, format!("{what}: {there:?}, expected {expected:?}")));
            }
        }
        self.engine.clean().await?;
        let database = self.workload.name;
        if let Some(native) = self.native.take() {
            native.end().await?;
            self.setting.drop_database(&self.setting.target, &format!("native_{database}")).await?;
        }
        self.setting.drop_database(&self.setting.target, &format!("ours_{database}")).await?;
        self.setting.drop_database(&self.setting.source, database).await
    }
}

/// Waits for a sentinel.
async fn arrived(client: &Client, sentinel: i64, mut engine: Option<&mut Engine>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let statement = client.prepare("SELECT count(*) FROM bench_sentinel WHERE id = $1").await?;
    while client.query_one(&statement, &[&sentinel]).await?.get::<_, i64>(0) == 0 {
        if let Some(engine) = &mut engine {
            engine.check(deadline)?;
        } else if Instant::now() > deadline {
            return Err(Error::new(ErrorKind::Other, "the native subscription is not done in time"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Each table's number of rows and a sum over hashes of them, which does not depend on their order.
async fn digest(client: &Client) -> Result<Vec<(String, i64, String)>> {
    let tables = client
        .query("SELECT quote_ident(relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1", &[])
        .await?;
    let mut digests = Vec::new();
    for table in tables {
        let name: String = table.get(0);
        let statement =
            format!("SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM {name} t");
        let row = client.query_one(&statement, &[]).await?;
        digests.push((name, row.get(0), row.get(1)));
    }
    Ok(digests)
}
