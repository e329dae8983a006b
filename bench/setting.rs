//! What all cases share: options, two servers, a scratch directory, and the programs that are run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::process::Command;
use walferry::demo::server::{ServerPrograms, StopMode, ThrowawayServer};
use walferry::error::{Context, Error, ErrorKind, Result};

/// How the benchmark was called.
pub struct Options {
    /// Smaller sizes.
    pub quick: bool,
    /// Bars; empty for all.
    pub only: Vec<String>,
    /// Workloads of B6 by their names; empty for all.
    pub cases: Vec<String>,
    /// How often each case is repeated, when that was said.
    pub rounds: Option<usize>,
    /// Where the results go.
    pub out: PathBuf,
    /// Record walferry with perf.
    pub profile: bool,
}

impl Options {
    pub fn wants(&self, bar: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == bar)
    }

    /// How often a case is repeated.
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 1 } else { 3 })
    }

    /// One of two sizes.
    pub fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// The file of a result.
    pub fn file(&self, extension: &str) -> PathBuf {
        self.out.join(format!("{}.{extension}", self.size("results", "results-quick")))
    }
}

/// What walferry's process used in one case, besides time.
#[derive(Clone, Debug)]
pub struct Footprint {
    pub case: String,
    /// The most memory it ever had (`VmHWM`), in bytes.
    pub peak_bytes: u64,
}

/// Two servers and what is needed to work with them.
pub struct Setting {
    pub options: Options,
    pub programs: ServerPrograms,
    pub source: ThrowawayServer,
    pub target: ThrowawayServer,
    /// The binary that is measured.
    pub walferry: PathBuf,
    /// The settings of both servers that are not the default.
    pub settings: Vec<(&'static str, String)>,
    pub footprints: Mutex<Vec<Footprint>>,
    scratch: PathBuf,
}

impl Setting {
    pub async fn make(options: Options) -> Result<Setting> {
        let programs = ServerPrograms::find(None)?;
        let walferry = beside_us("walferry")?;
        let scratch = std::env::temp_dir().join(format!("walferry-bench-{}", std::process::id()));
        std::fs::create_dir(&scratch).context(|| format!("making {}", scratch.display()))?;
        std::fs::create_dir_all(&options.out)?;
        // An eighth of the memory each, and no more than the peers were measured with.
        let buffers = (memory_bytes()? / 8).clamp(128 << 20, 1 << 30) >> 20;
        let settings = vec![
            ("shared_buffers", format!("{buffers}MB")),
            ("max_wal_size", "8GB".into()),
            ("min_wal_size", "2GB".into()),
            // A checkpoint in the middle of one of two timings would favour the other; each begins after one.
            ("checkpoint_timeout", "1h".into()),
            ("fsync", "on".into()),
        ];
        let mut of_source: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut of_target = of_source.clone();
        // A subscription that was disabled a moment ago would else wait up to five seconds before it begins again.
        of_target.push(("wal_retrieve_retry_interval", "10ms"));
        of_source.extend([("wal_level", "logical"), ("max_replication_slots", "20"), ("max_wal_senders", "20")]);
        let source = ThrowawayServer::start(&programs, "benchsource", &of_source).await?;
        let target = ThrowawayServer::start(&programs, "benchtarget", &of_target).await?;
        Ok(Setting { options, programs, source, target, walferry, settings, footprints: Mutex::default(), scratch })
    }

    pub async fn stop(&mut self) -> Result<()> {
        self.source.stop(StopMode::Immediate).await?;
        self.target.stop(StopMode::Immediate).await
    }

    /// The servers' version and settings, for the report.
    pub async fn describe(&self) -> Result<String> {
        let client = self.source.connect("postgres").await?;
        let version: String = client.query_one("SELECT pg_catalog.version()", &[]).await?.get(0);
        let settings: Vec<String> = self.settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Ok(format!("{version}; {}", settings.join(" ")))
    }

    /// A directory of this name, empty.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.join(name);
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        Ok(path)
    }

    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// An empty database of this name in the place of whatever had it.
    pub async fn new_database(&self, server: &ThrowawayServer, name: &str) -> Result<()> {
        let client = server.connect("postgres").await?;
        client.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.context(|| format!("making the database {name}"))
    }

    pub async fn drop_database(&self, server: &ThrowawayServer, name: &str) -> Result<()> {
        let client = server.connect("postgres").await?;
        client.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await.map_err(Error::from)
    }

    /// Nothing of what was before is left to be written while the next thing is timed.
    pub async fn settle(&self) -> Result<()> {
        for server in [&self.source, &self.target] {
            server.connect("postgres").await?.batch_execute("CHECKPOINT").await?;
        }
        Ok(())
    }

    /// Runs a shell script to its end, with the server's programs first on the path; answers how long it took.
    pub async fn shell(&self, script: &str) -> Result<Duration> {
        let bin = self.programs.bin("psql");
        let bin = bin.parent().unwrap_or(Path::new("/"));
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let begun = Instant::now();
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .env("PATH", path)
            .env("PGOPTIONS", "-c client_min_messages=warning")
            .stdin(Stdio::null())
            .output()
            .await
            .context(|| "running a shell".into())?;
        let elapsed = begun.elapsed();
        if output.status.success() {
            return Ok(elapsed);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(ErrorKind::Other, format!("{script}\nended with {}: {said}", output.status)))
    }

    /// Copies a database's schema.
    pub async fn copy_schema(&self, from: &str, to: &str, section: &str) -> Result<Duration> {
        self.shell(&format!("pg_dump --schema-only {section} --no-publications --no-subscriptions {from} | psql -qX -v ON_ERROR_STOP=1 -d {to}")).await
    }

    pub fn footprint(&self, case: &str, peak_bytes: u64) {
        let mut footprints = self.footprints.lock().unwrap_or_else(PoisonError::into_inner);
        footprints.push(Footprint { case: case.to_owned(), peak_bytes });
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure.
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

/// A binary of the same build: this one is `examples/bench` beside it.
fn beside_us(name: &str) -> Result<PathBuf> {
    let us = std::env::current_exe()?;
    let path = us.parent().and_then(Path::parent).map(|directory| directory.join(name)).unwrap_or_default();
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::new(ErrorKind::Blocked, format!("{} is not there", path.display()))
        .hint("use `make bench`, which builds it"))
}

fn memory_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context(|| "reading how much memory there is".into())?;
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    Ok(kilobytes.and_then(|number| number.parse::<u64>().ok()).unwrap_or(4 << 20) << 10)
}
