//! What goes wrong, and when: decided by the seed, done to the real thing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, NoTls};
use walferry::demo::server::{StopMode, ThrowawayServer};

use super::damage::{self, Damage, Kept};
use super::disk::{DiskFault, FaultyDisk};
use super::process::Walferry;
use super::proxy::{End, Proxy};
use super::random::Random;

/// What happened, with the time since the beginning.
#[derive(Clone)]
pub struct Log {
    begun: Instant,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Log {
    pub fn new() -> Log {
        Log { begun: Instant::now(), lines: Arc::default() }
    }

    pub fn add(&self, what: impl Into<String>) {
        let line = format!("{:7.3} s  {}", self.begun.elapsed().as_secs_f64(), what.into());
        self.lines.lock().unwrap().push(line);
    }

    pub fn text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }
}

/// One side: the server, and the network before it.
pub struct Side {
    pub name: &'static str,
    pub server: ThrowawayServer,
    pub proxy: Proxy,
}

/// How often each thing was done. What met nothing, such as a cut without a connection, does not count.
#[derive(Clone, Debug, Default)]
pub struct Counts(BTreeMap<&'static str, u64>);

/// Those that are faults of connections.
const CONNECTION_FAULTS: [&str; 9] = [
    "all connections cut",
    "some connections cut",
    "half open, walferry not told",
    "half open, server not told",
    "all stalled",
    "stalled one way",
    "some stalled",
    "slow network",
    "refused",
];

impl Counts {
    pub fn add(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }

    pub fn connection_faults(&self) -> u64 {
        CONNECTION_FAULTS.iter().map(|what| self.of(what)).sum()
    }

    pub fn merge(&mut self, other: &Counts) {
        for (what, times) in &other.0 {
            self.add(what, *times);
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} connection faults", self.connection_faults())?;
        self.0.iter().try_for_each(|(what, times)| write!(f, ", {times} {what}"))
    }
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Stop,
    Crash,
    Restart,
    Terminate,
    CutAll,
    CutSome,
    ServerToldOnly,
    ClientToldOnly,
    Freeze,
    FreezeOneWay,
    FreezeSome,
    Slow,
    Refuse,
    Disk,
    Tear,
    Corrupt,
    Lose,
}

/// Makes faults until the time is over, then leaves everything healed and running.
pub struct Faults<'a> {
    pub sides: &'a mut [Side; 2],
    pub walferry: &'a mut Walferry,
    pub disk: Option<&'a FaultyDisk>,
    /// The database that is moved, for looking at the ledger.
    pub database: &'static str,
    pub random: Random,
    pub log: Log,
    pub counts: Counts,
    /// The longest pause between two faults. Some pauses are short, so that faults meet each other's consequences.
    pub pause_ms_max: u64,
    /// Until when the disk fails.
    pub disk_until: Option<Instant>,
    /// Damage to the queue that walferry has to stop at is made so often at most: it takes long.
    pub corruptions_left: u64,
    /// The same for the slot or the state directory.
    pub losses_left: u64,
    /// On the way back the stream comes from the target, and the ledger is on the source.
    pub turned_back: bool,
}

/// How long walferry may take to meet damage, which may be only when the copy is done.
const DAMAGE_MET_MAX: Duration = Duration::from_secs(300);

/// How long a new slot may take: it waits for the transactions that are open.
const RESYNC_MAX: Duration = Duration::from_secs(240);

impl Faults<'_> {
    /// The server whose slot is read, and the one that has the ledger of that.
    fn stream_and_ledger(&self) -> (&ThrowawayServer, &ThrowawayServer) {
        let [source, target] = &*self.sides;
        match self.turned_back {
            false => (&source.server, &target.server),
            true => (&target.server, &source.server),
        }
    }

    pub async fn run(&mut self, time: Duration) -> Result<(), String> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let pause = if self.random.chance(40) { 300 } else { self.pause_ms_max };
            let pause = Duration::from_millis(self.random.between(0, pause));
            sleep(pause.min(end.saturating_duration_since(Instant::now()))).await;
            self.look()?;
            if self.walferry.done {
                break;
            }
            let fault = self.random.weighted(&[
                (24, Fault::Kill),
                (4, Fault::Stop),
                (5, Fault::Crash),
                (3, Fault::Restart),
                (14, Fault::Terminate),
                (10, Fault::CutAll),
                (40, Fault::CutSome),
                (12, Fault::ServerToldOnly),
                (12, Fault::ClientToldOnly),
                (5, Fault::Freeze),
                (4, Fault::FreezeOneWay),
                (7, Fault::FreezeSome),
                (3, Fault::Slow),
                (3, Fault::Refuse),
                (14, Fault::Disk),
                (8, Fault::Tear),
                (6, Fault::Corrupt),
                (3, Fault::Lose),
            ]);
            self.make(fault).await?;
        }
        self.heal();
        self.look()
    }

    /// As it should be: what is half open is closed, or it would break off later.
    pub fn heal(&mut self) {
        for side in self.sides.iter() {
            side.proxy.heal();
        }
        self.disk_until = None;
        self.heal_disk();
    }

    fn heal_disk(&mut self) {
        if let Some(disk) = self.disk
            && self.disk_until.is_none_or(|until| until < Instant::now())
        {
            disk.set(None);
            self.disk_until = None;
        }
    }

    /// Starts what has ended by itself again; it notes that.
    pub fn look(&mut self) -> Result<(), String> {
        self.heal_disk();
        if !self.walferry.look() && !self.walferry.done {
            if let Some(last) = self.walferry.unasked.last() {
                // Nothing comes of going on, and now its files are as they were.
                return Err(format!("walferry gave up by itself: {last}"));
            }
            self.start()?;
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), String> {
        // What the process before met is forgiven; what this one may meet is not over yet.
        self.walferry.disk_refuses = self.disk_until.is_some();
        self.walferry.start().map_err(|error| error.to_string())
    }

    async fn make(&mut self, fault: Fault) -> Result<(), String> {
        match fault {
            Fault::Kill => return self.kill().await,
            Fault::Stop => {
                self.log.add("SIGTERM to walferry");
                self.walferry.stop().await?;
                return self.start();
            }
            Fault::Disk => return self.spoil_disk(),
            Fault::Tear => return self.damage_queue(false).await,
            Fault::Corrupt => return self.damage_queue(true).await,
            Fault::Lose => return self.lose().await,
            _ => {}
        }
        let random = &mut self.random;
        let place = random.between(0, 1) as usize;
        let side = &mut self.sides[place];
        let doing = |what: &str| format!("{what} ({})", side.name);
        match fault {
            Fault::Crash | Fault::Restart => {
                let mode = if matches!(fault, Fault::Crash) { StopMode::Immediate } else { StopMode::Fast };
                self.log.add(doing(&format!("{mode:?} stop and start")));
                side.server.stop(mode).await.map_err(|error| format!("the test cannot stop a server: {error}"))?;
                if random.chance(40) {
                    sleep(Duration::from_millis(random.between(0, 2500))).await;
                }
                side.server.restart().await.map_err(|error| format!("the test cannot start a server: {error}"))?;
                let what = match (mode, place) {
                    (StopMode::Immediate, 0) => "source crashes",
                    (StopMode::Immediate, _) => "target crashes",
                    (StopMode::Fast, 0) => "source restarts",
                    (StopMode::Fast, _) => "target restarts",
                };
                self.counts.add(what, 1);
                self.log.add(format!("{} is back", side.name));
            }
            Fault::Terminate => {
                let (mut walsenders, mut others) = (0, 0);
                // There may be none at the moment.
                for _ in 0..10 {
                    (walsenders, others) = terminate(&side.server, random.next()).await;
                    if walsenders + others > 0 {
                        break;
                    }
                    sleep(Duration::from_millis(100)).await;
                }
                self.counts.add("walsenders terminated", walsenders);
                self.counts.add("other backends terminated", others);
                self.log.add(doing(&format!("pg_terminate_backend of {others} sessions and {walsenders} walsenders")));
            }
            Fault::CutAll => {
                for _ in 0..random.between(1, 3) {
                    let count = side.proxy.end(End::Cut, 1, |_| true);
                    self.counts.add("all connections cut", count.min(1) as u64);
                    self.log.add(doing(&format!("all {count} connections cut")));
                    sleep(Duration::from_millis(random.between(0, 1000))).await;
                }
            }
            Fault::CutSome => {
                // Again and again, while it comes back.
                for _ in 0..random.between(2, 8) {
                    let count = side.proxy.end(End::Cut, 3, |one_in| random.next().is_multiple_of(one_in));
                    self.counts.add("some connections cut", count.min(1) as u64);
                    self.log.add(doing(&format!("{count} connections cut")));
                    sleep(Duration::from_millis(random.between(20, 500))).await;
                }
            }
            Fault::ServerToldOnly | Fault::ClientToldOnly => {
                let time = Duration::from_millis(random.between(500, 8000));
                let (end, what) = match fault {
                    Fault::ServerToldOnly => (End::ServerToldOnly(time), "half open, walferry not told"),
                    _ => (End::ClientToldOnly(time), "half open, server not told"),
                };
                for _ in 0..random.between(1, 3) {
                    let one_in = random.between(1, 3);
                    let count = side.proxy.end(end, one_in, |one_in| random.next().is_multiple_of(one_in));
                    self.counts.add(what, count.min(1) as u64);
                    self.log.add(doing(&format!("{count} connections {what} for {time:?}")));
                    sleep(Duration::from_millis(random.between(0, 800))).await;
                }
            }
            Fault::Freeze | Fault::FreezeOneWay => {
                let both = matches!(fault, Fault::Freeze);
                let to_server = both || random.chance(50);
                side.proxy.freeze(to_server, both || !to_server);
                let met = side.proxy.connections().min(1) as u64;
                self.counts.add(if both { "all stalled" } else { "stalled one way" }, met);
                let time = random.between(200, 2500);
                self.log.add(doing(&format!(
                    "frozen for {time} ms, to server {to_server}, to walferry {}",
                    both || !to_server
                )));
                sleep(Duration::from_millis(time)).await;
                side.proxy.freeze(false, false);
                if random.chance(30) {
                    side.proxy.end(End::Cut, 1, |_| true);
                    self.log.add(doing("and cut"));
                }
            }
            Fault::FreezeSome => {
                let count = side.proxy.freeze_present(true, || random.chance(40));
                let time = random.between(500, 3500);
                self.counts.add("some stalled", count.min(1) as u64);
                self.log.add(doing(&format!("{count} connections frozen for {time} ms, others may come")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.freeze_present(false, || true);
            }
            Fault::Slow => {
                side.proxy.slow(true);
                let time = random.between(500, 4000);
                self.counts.add("slow network", side.proxy.connections().min(1) as u64);
                self.log.add(doing(&format!("slow for {time} ms")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.slow(false);
            }
            Fault::Refuse => {
                side.proxy.refuse(true);
                side.proxy.end(End::Cut, 1, |_| true);
                let time = random.between(200, 3000);
                self.counts.add("refused", 1);
                self.log.add(doing(&format!("cut, and no new connections for {time} ms")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.refuse(false);
            }
            Fault::Kill | Fault::Stop | Fault::Disk | Fault::Tear | Fault::Corrupt | Fault::Lose => {}
        }
        Ok(())
    }

    /// Kills it, and what comes after it, at any moment of their first second and a half.
    async fn kill(&mut self) -> Result<(), String> {
        let times = self.random.weighted(&[(3, 1), (3, 4), (3, 8), (1, 14)]);
        self.log.add(format!("kill -9 of walferry, {times} times"));
        for time in 0..times {
            if time > 0 {
                let longest = *self.random.pick(&[200, 600, 1500]);
                sleep(Duration::from_millis(self.random.between(50, longest))).await;
            }
            self.walferry.kill().await;
            if self.walferry.done {
                return Ok(());
            }
            if self.random.chance(15) {
                sleep(Duration::from_millis(self.random.between(0, 1200))).await;
            }
            self.start()?;
        }
        Ok(())
    }

    /// The disk fails for a while; other faults come meanwhile.
    fn spoil_disk(&mut self) -> Result<(), String> {
        let (Some(disk), None) = (self.disk, self.disk_until) else { return Ok(()) };
        let fault = *self.random.pick(&DiskFault::ALL);
        let time = Duration::from_millis(self.random.between(300, 5000));
        self.log.add(format!("{} for {time:?}", fault.name()));
        self.counts.add(fault.name(), 1);
        self.disk_until = Some(Instant::now() + time);
        self.walferry.disk_refuses |= fault.refuses();
        disk.set(Some(fault));
        Ok(())
    }

    /// Kills it and damages the queue's files; what was acknowledged only where asked.
    async fn damage_queue(&mut self, acknowledged: bool) -> Result<(), String> {
        if acknowledged && self.corruptions_left == 0 {
            return Ok(());
        }
        self.walferry.kill().await;
        if self.walferry.done {
            return Ok(());
        }
        let Some((confirmed, applied)) = self.positions().await else { return self.start() };
        let Some(queue) = self.queue().await.filter(|queue| queue.exists()) else { return self.start() };
        let kept = Kept::of(&queue);
        let damage = match acknowledged {
            true => damage::corrupt(&queue, confirmed, applied, &mut self.random),
            false => damage::tear(&queue, confirmed, &mut self.random),
        };
        let Some(damage) = damage else { return self.start() };
        self.log.add(format!("killed, and {}", damage.text));
        if damage.stops_at.is_none() {
            self.counts.add(if acknowledged { "damaged labels" } else { "torn tails" }, 1);
            return self.start();
        }
        self.corruptions_left -= 1;
        self.counts.add("damaged segments", 1);
        self.heal();
        self.start()?;
        let what = damage.text.clone();
        let said = self.stops_at(damage).await.map_err(|error| format!("{what}: {error}"))?;
        self.log.add("it has stopped there");
        self.heal_queue(&queue, &kept, &said).await
    }

    /// The directory that the ledger names.
    async fn queue(&self) -> Option<PathBuf> {
        let target = connect(self.stream_and_ledger().1, self.database).await.ok()?;
        let row = target.query_opt("SELECT queue FROM walferry.migration", &[]).await.ok()??;
        Some(self.walferry.directory.join(row.get::<_, &str>(0)))
    }

    /// What the source was told to forget, and the most that the target has; `None` before the apply can begin.
    async fn positions(&self) -> Option<(walferry::lsn::Lsn, walferry::lsn::Lsn)> {
        let (stream, ledger) = self.stream_and_ledger();
        let source = connect(stream, self.database).await.ok()?;
        let target = connect(ledger, self.database).await.ok()?;
        // What the servers still have from walferry may be a confirmation, or a commit.
        let gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE 'walferry/%'";
        for _ in 0..100 {
            let mut all_gone = true;
            for server in [&source, &target] {
                all_gone &= server.query_one(gone, &[]).await.ok()?.get::<_, bool>(0);
            }
            if all_gone {
                let applied = "SELECT max(applied) FROM walferry.apply_progress";
                let applied: PgLsn = target.query_one(applied, &[]).await.ok()?.try_get(0).ok()?;
                let slot = "SELECT confirmed_flush_lsn FROM pg_replication_slots";
                let confirmed: PgLsn = source.query_opt(slot, &[]).await.ok()??.try_get(0).ok()?;
                return Some((confirmed.into(), applied.into()));
            }
            sleep(Duration::from_millis(50)).await;
        }
        None
    }

    /// walferry meets the damage: it says where, ends with 1, and has applied nothing past it.
    async fn stops_at(&mut self, damage: Damage) -> Result<String, String> {
        let Some(block) = damage.stops_at else { return Ok(String::new()) };
        let Some((code, said)) = self.walferry.wait_for_end(DAMAGE_MET_MAX).await else {
            return Err(format!("walferry did not stop within {DAMAGE_MET_MAX:?}"));
        };
        if code != Some(1) {
            return Err(format!("walferry ended with {code:?}: {said}"));
        }
        let name = block.segment.file_name().unwrap().to_string_lossy().into_owned();
        // A last block cannot be told from a torn one; then the slot shows that it was acknowledged.
        let named = said.contains("is corrupt at offset") && said.contains("in danger are the transactions");
        let gap = said.contains("has been moved on to") && said.contains("torn tail");
        if !(named || gap) || !said.contains(&name) {
            return Err(format!("walferry did not say where: {said}"));
        }
        let target = connect(self.stream_and_ledger().1, self.database).await.map_err(|error| error.to_string())?;
        let row = target
            .query_one("SELECT max(applied) FROM walferry.apply_progress", &[])
            .await
            .map_err(|error| error.to_string())?;
        let applied: walferry::lsn::Lsn = row.get::<_, PgLsn>(0).into();
        if applied > block.first_lsn {
            return Err(format!("applied up to {applied}, past the damage after {}", block.first_lsn));
        }
        Ok(said)
    }

    /// What an operator does about it: puts a copy back, or has the tables that walferry names compared again, or all.
    async fn heal_queue(&mut self, queue: &Path, kept: &Kept, said: &str) -> Result<(), String> {
        if self.random.chance(40) {
            self.counts.add("segments put back", 1);
            self.log.add("the file is put back");
            kept.put_back(queue);
            return self.start();
        }
        let named = tables_to_recopy(said);
        if !named.is_empty() && self.random.chance(70) {
            self.counts.add("recopies", 1);
            self.log.add(format!("walferry migrate --recopy {}", named.join(" ")));
            self.walferry.more = [vec!["--recopy".to_owned()], named].concat();
            return self.until_another_queue(queue).await;
        }
        self.resync(queue).await
    }

    /// Somebody drops the slot, or the state directory is gone: said at once, and `walferry resync` goes on.
    async fn lose(&mut self) -> Result<(), String> {
        if self.losses_left == 0 {
            return Ok(());
        }
        self.walferry.kill().await;
        if self.walferry.done {
            return Ok(());
        }
        // Known only once the preparation is recorded: before that, all of it is made anew.
        let (Some(_), Some(queue)) = (self.positions().await, self.queue().await) else { return self.start() };
        self.losses_left -= 1;
        self.heal();
        let (what, code, words) = if self.random.chance(50) {
            let source = connect(self.stream_and_ledger().0, self.database).await.map_err(|error| error.to_string())?;
            let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
            source.batch_execute(drop).await.map_err(|error| format!("{drop}: {error:?}"))?;
            ("lost slots", 1, "is gone from the source")
        } else {
            std::fs::remove_dir_all(&self.walferry.directory).map_err(|error| error.to_string())?;
            ("lost state directories", 3, "whose state directory is not")
        };
        self.counts.add(what, 1);
        self.log.add(what);
        self.start()?;
        match self.walferry.wait_for_end(DAMAGE_MET_MAX).await {
            Some((Some(ended), said)) if ended == code && said.contains(words) && said.contains("walferry resync") => {}
            ended => return Err(format!("{what}: `walferry migrate` ended with {ended:?}")),
        }
        self.resync(&queue).await
    }

    /// Until the ledger names another queue than this one.
    async fn resync(&mut self, queue: &Path) -> Result<(), String> {
        self.counts.add("resyncs", 1);
        self.log.add("walferry resync");
        self.walferry.verb = "resync";
        self.until_another_queue(queue).await
    }

    async fn until_another_queue(&mut self, queue: &Path) -> Result<(), String> {
        self.start()?;
        let deadline = Instant::now() + RESYNC_MAX;
        let mut kills = self.random.between(0, 3);
        // Until it is recorded, the same command has to be given again.
        while self.queue().await.is_none_or(|now| now == queue) {
            if Instant::now() > deadline {
                return Err(format!(
                    "{RESYNC_MAX:?} after the damage `walferry resync` or `--recopy` has recorded nothing"
                ));
            }
            if kills > 0 && self.random.chance(20) {
                kills -= 1;
                self.log.add("kill -9 of it");
                self.walferry.kill().await;
                self.start()?;
            }
            sleep(Duration::from_millis(100)).await;
            self.look()?;
        }
        self.walferry.verb = "migrate";
        self.walferry.more.clear();
        self.log.add("it is recorded");
        Ok(())
    }
}

/// The names in `--recopy 'schema.table' 'schema.table'`, as a shell would read them.
fn tables_to_recopy(said: &str) -> Vec<String> {
    let Some((_, quoted)) = said.rsplit_once("`--recopy '") else { return Vec::new() };
    let quoted = quoted.split_once("'`").map_or(quoted, |(names, _)| names);
    quoted.split("' '").map(|name| name.replace("'\\''", "'")).collect()
}

async fn connect(server: &ThrowawayServer, database: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(&server.url_for(database), NoTls).await?;
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

/// Ends about half of walferry's sessions. Answers how many walsenders and how many others.
async fn terminate(server: &ThrowawayServer, seed: u64) -> (u64, u64) {
    let ended = async {
        let client = connect(server, "postgres").await?;
        client
            .query_one(
                "SELECT count(*) FILTER (WHERE backend_type = 'walsender'), count(*) FILTER (WHERE backend_type <> 'walsender') \
                 FROM pg_stat_activity \
                 WHERE application_name LIKE 'walferry%' AND hashint8extended(pid, $1) % 2 = 0 AND pid <> pg_backend_pid() AND pg_terminate_backend(pid)",
                &[&seed.cast_signed()],
            )
            .await
    };
    let count = |row: &tokio_postgres::Row, column| row.get::<_, i64>(column).cast_unsigned();
    ended.await.map_or((0, 0), |row| (count(&row, 0), count(&row, 1)))
}
