//! What goes wrong, and when: decided by the seed, done to the real thing.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_postgres::NoTls;
use walferry::demo::server::{StopMode, ThrowawayServer};

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

/// How often something was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub server_crashes: u64,
    /// Those of them that were the source's.
    pub source_crashes: u64,
    pub server_restarts: u64,
    pub terminated: u64,
    pub connection_faults: u64,
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
}

/// Makes faults until the time is over, then leaves everything healed and running.
pub struct Faults<'a> {
    pub sides: &'a mut [Side; 2],
    pub walferry: &'a mut Walferry,
    pub random: Random,
    pub log: Log,
    pub counts: Counts,
    /// The longest pause between two faults. Some pauses are short, so that faults meet each other's consequences.
    pub pause_ms_max: u64,
}

impl Faults<'_> {
    pub async fn run(&mut self, time: Duration) -> Result<(), String> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let pause = if self.random.chance(40) { 400 } else { self.pause_ms_max };
            let pause = Duration::from_millis(self.random.between(0, pause));
            sleep(pause.min(end.saturating_duration_since(Instant::now()))).await;
            self.look()?;
            if self.walferry.done {
                break;
            }
            let fault = self.random.weighted(&[
                (22, Fault::Kill),
                (4, Fault::Stop),
                (5, Fault::Crash),
                (3, Fault::Restart),
                (14, Fault::Terminate),
                (8, Fault::CutAll),
                (12, Fault::CutSome),
                (6, Fault::ServerToldOnly),
                (6, Fault::ClientToldOnly),
                (5, Fault::Freeze),
                (4, Fault::FreezeOneWay),
                (5, Fault::FreezeSome),
                (3, Fault::Slow),
                (3, Fault::Refuse),
            ]);
            self.make(fault).await?;
        }
        self.heal();
        self.look()
    }

    /// As it should be: what is half open is closed, or it would break off later.
    pub fn heal(&self) {
        for side in self.sides.iter() {
            side.proxy.heal();
        }
    }

    /// Starts what has ended by itself again; it notes that.
    pub fn look(&mut self) -> Result<(), String> {
        if !self.walferry.look() && !self.walferry.done {
            if let Some(last) = self.walferry.unasked.last() {
                self.log.add(format!("walferry is started again; before: {last}"));
            }
            self.walferry.start().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    async fn make(&mut self, fault: Fault) -> Result<(), String> {
        let random = &mut self.random;
        let place = random.between(0, 1) as usize;
        let side = &mut self.sides[place];
        let doing = |what: &str| format!("{what} ({})", side.name);
        match fault {
            Fault::Kill => {
                self.log.add("kill -9 of walferry");
                self.walferry.kill().await;
                if random.chance(30) {
                    sleep(Duration::from_millis(random.between(0, 1500))).await;
                }
                self.walferry.start().map_err(|error| error.to_string())?;
                return Ok(());
            }
            Fault::Stop => {
                self.log.add("SIGTERM to walferry");
                self.walferry.stop().await?;
                self.walferry.start().map_err(|error| error.to_string())?;
                return Ok(());
            }
            Fault::Crash | Fault::Restart => {
                let mode = if matches!(fault, Fault::Crash) { StopMode::Immediate } else { StopMode::Fast };
                self.log.add(doing(&format!("{mode:?} stop and start")));
                side.server.stop(mode).await.map_err(|error| format!("the test cannot stop a server: {error}"))?;
                if random.chance(40) {
                    sleep(Duration::from_millis(random.between(0, 2500))).await;
                }
                side.server.restart().await.map_err(|error| format!("the test cannot start a server: {error}"))?;
                match mode {
                    StopMode::Immediate => {
                        self.counts.server_crashes += 1;
                        self.counts.source_crashes += u64::from(place == 0);
                    }
                    StopMode::Fast => self.counts.server_restarts += 1,
                }
                self.log.add(format!("{} is back", side.name));
                return Ok(());
            }
            Fault::Terminate => {
                let count = terminate(&side.server, random.next()).await;
                self.counts.terminated += count;
                self.log.add(doing(&format!("pg_terminate_backend of {count} sessions")));
                return Ok(());
            }
            Fault::CutAll => {
                let count = side.proxy.end(End::Cut, 1, |_| true);
                self.log.add(doing(&format!("all {count} connections cut")));
            }
            Fault::CutSome => {
                let count = side.proxy.end(End::Cut, 3, |one_in| random.next().is_multiple_of(one_in));
                self.log.add(doing(&format!("{count} connections cut")));
            }
            Fault::ServerToldOnly | Fault::ClientToldOnly => {
                let time = Duration::from_millis(random.between(500, 8000));
                let (end, what) = match fault {
                    Fault::ServerToldOnly => (End::ServerToldOnly(time), "half open, walferry not told"),
                    _ => (End::ClientToldOnly(time), "half open, server not told"),
                };
                let one_in = random.between(1, 3);
                let count = side.proxy.end(end, one_in, |one_in| random.next().is_multiple_of(one_in));
                self.log.add(doing(&format!("{count} connections {what} for {time:?}")));
            }
            Fault::Freeze | Fault::FreezeOneWay => {
                let both = matches!(fault, Fault::Freeze);
                let to_server = both || random.chance(50);
                side.proxy.freeze(to_server, both || !to_server);
                let time = random.between(200, 5000);
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
                let time = random.between(500, 6000);
                self.log.add(doing(&format!("{count} connections frozen for {time} ms, others may come")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.freeze_present(false, || true);
            }
            Fault::Slow => {
                side.proxy.slow(true);
                let time = random.between(500, 4000);
                self.log.add(doing(&format!("slow for {time} ms")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.slow(false);
            }
            Fault::Refuse => {
                side.proxy.refuse(true);
                side.proxy.end(End::Cut, 1, |_| true);
                let time = random.between(200, 3000);
                self.log.add(doing(&format!("cut, and no new connections for {time} ms")));
                sleep(Duration::from_millis(time)).await;
                side.proxy.refuse(false);
            }
        }
        self.counts.connection_faults += 1;
        Ok(())
    }
}

/// Ends about half of walferry's sessions. Answers how many.
async fn terminate(server: &ThrowawayServer, seed: u64) -> u64 {
    let ended = async {
        let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await?;
        tokio::spawn(async move { drop(connection.await) });
        client
            .query_one(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE application_name LIKE 'walferry%' AND hashint8extended(pid, $1) % 2 = 0",
                &[&seed.cast_signed()],
            )
            .await
            .map(|row| row.get::<_, i64>(0))
    };
    ended.await.unwrap_or(0).cast_unsigned()
}
