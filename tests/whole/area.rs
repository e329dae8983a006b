//! A migration of one area.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::process::Running;
use crate::support::{Migration, Servers, hold_pg_dump, programs};

/// Some part of what a database can hold: a file with its schema and first rows, and one with what is written meanwhile, in which
/// `:round` is the number of the round, from 1 on.
pub struct Area {
    pub name: &'static str,
    pub database: String,
    /// Options of `migrate`.
    pub options: &'static [&'static str],
    /// More to do in each round.
    pub more_changes: &'static str,
}

/// How many rounds of changes: one before the first row is copied, the others while it follows.
pub const ROUNDS: usize = 3;

impl Area {
    /// That of a name, in a database of the same name.
    pub fn new(name: &'static str) -> Area {
        Area { name, database: name.to_owned(), options: &[], more_changes: "" }
    }

    /// In a database of this name.
    pub fn in_database(mut self, database: &str) -> Area {
        database.clone_into(&mut self.database);
        self
    }

    fn read(&self, kind: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/whole/{}{kind}.sql", self.name));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Writes one round of changes to a database: in few large transactions, or in every other round each statement by itself.
    pub async fn change(&self, url: &str, round: usize) {
        let changes = (self.read("_changes") + self.more_changes).replace(":round", &round.to_string());
        if round % 2 == 1 {
            let outcome = crate::support::connect(url).await.batch_execute(&changes).await;
            outcome.unwrap_or_else(|error| panic!("{}, round {round}: {error:?}", self.name));
            return;
        }
        let mut command = Command::new(programs().bin("psql"));
        command.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=-", "--dbname", url]);
        let mut psql = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        psql.stdin.take().unwrap().write_all(changes.as_bytes()).await.unwrap();
        let output = psql.wait_with_output().await.unwrap();
        assert!(output.status.success(), "{}, round {round}: {}", self.name, String::from_utf8_lossy(&output.stderr));
    }

    /// Both databases, and the first rows on the source.
    pub async fn make(&self, servers: &Servers) -> Migration {
        let migration = servers.migration(&self.database).await;
        let made = migration.source().await.batch_execute(&self.read("")).await;
        made.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        migration
    }

    /// Makes the schema and migrates until it follows, with changes that are in the stream and not in what is copied. Answers what
    /// `pg_dump` said of the source before.
    pub async fn begin(&self, servers: &Servers) -> (Migration, Running, String) {
        let mut migration = self.make(servers).await;
        let before = dump(&migration.source_url).await;
        let held = hold_pg_dump(&mut migration);
        let mut running = migration.migrate(self.options);
        // The slot and its snapshot are there.
        held.is_reached().await;
        self.change(&migration.source_url, 1).await;
        held.release();
        migration.wait_for_phase(&mut running, "following").await;
        (migration, running, before)
    }

    /// Migrates all of it, cuts over, compares, and cleans up.
    pub async fn migrate(&self, servers: &Servers) -> Migration {
        let (migration, running, before) = self.begin(servers).await;
        for round in 2..=ROUNDS {
            self.change(&migration.source_url, round).await;
        }
        migration.cut_over(running).await;
        assert_whole(&migration, &before).await;
        migration
    }
}

/// After the cutover: both sides are the same, and once it is cleaned up, as the source was.
pub async fn assert_whole(migration: &Migration, before: &str) {
    migration.assert_equal().await;
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}\n{}", verified.stderr, verified.stdout);
    assert_cleans_up(migration, before).await;
}

/// `clean` puts back what was for the time of the migration, on both sides.
pub async fn assert_cleans_up(migration: &Migration, before: &str) {
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    let (source, target) = tokio::join!(dump(&migration.source_url), dump(&migration.target_url));
    assert_eq!(different_lines(before, &source), [""; 0], "pg_dump of the source, before and after");
    assert_eq!(different_lines(&source, &target), [""; 0], "pg_dump of source and target");
    assert_eq!(migration.left_over().await, [""; 0]);
}

/// What `pg_dump` says of a database's schema.
pub async fn dump(url: &str) -> String {
    let mut command = Command::new(programs().bin("pg_dump"));
    let output = command.args(["--schema-only", "--exclude-schema=walferry", "--dbname", url]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Lines with a key that is another for each dump are left out.
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The lines of which one side has more than the other: `< ` where the first has.
pub fn different_lines(one: &str, other: &str) -> Vec<String> {
    let mut counts = BTreeMap::<&str, i64>::new();
    one.lines().for_each(|line| *counts.entry(line).or_default() += 1);
    other.lines().for_each(|line| *counts.entry(line).or_default() -= 1);
    let shown = |(line, count): (&str, i64)| match count {
        0 => None,
        1.. => Some(format!("< {line}")),
        _ => Some(format!("> {line}")),
    };
    let different: Vec<String> = counts.into_iter().filter_map(shown).collect();
    // The same lines in another order are another schema too.
    if different.is_empty() && one != other { vec!["another order".to_owned()] } else { different }
}
