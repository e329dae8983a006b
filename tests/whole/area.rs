//! A migration of one area.

use std::fmt::Write;

use tokio::process::Command;

use crate::support::process::Running;
use crate::support::{Migration, Servers, hold_pg_dump, programs};

/// Some part of what a database can hold.
pub struct Area<'a> {
    /// The database's name.
    pub database: &'a str,
    /// What there is at the start.
    pub schema: &'a str,
    /// What is written meanwhile, in rounds: `:round` is its number, from 1 on.
    pub changes: &'a str,
    /// Options of `migrate`.
    pub options: &'a [&'a str],
    /// Lines of `pg_dump` that only one side has, as [`different_lines`] gives them.
    pub explained: &'a [&'a str],
}

/// How many rounds of changes: one before the first row is copied, the others while it follows.
const ROUNDS: usize = 3;

impl Area<'_> {
    /// Runs one round of changes on the source, each statement by itself.
    pub async fn change(&self, migration: &Migration, round: usize) {
        let source = migration.source().await;
        let changes = self.changes.replace(":round", &round.to_string());
        source.batch_execute(&changes).await.unwrap_or_else(|error| panic!("{}, round {round}: {error:?}", self.database));
    }

    /// Makes the schema and migrates until it follows, with changes that are in the stream and not in what is copied.
    pub async fn begin(&self, servers: &Servers) -> (Migration, Running, String) {
        let mut migration = servers.migration(self.database).await;
        migration.source().await.batch_execute(self.schema).await.unwrap_or_else(|error| panic!("{}: {error:?}", self.database));
        let before = dump(&migration.source_url).await;
        let held = hold_pg_dump(&mut migration);
        let mut running = migration.migrate(self.options);
        // The slot and its snapshot are there.
        held.is_reached().await;
        self.change(&migration, 1).await;
        held.release();
        migration.wait_for_phase(&mut running, "following").await;
        (migration, running, before)
    }

    /// Migrates all of it, cuts over, compares, and cleans up.
    pub async fn migrate(&self, servers: &Servers) -> Migration {
        let (migration, running, before) = self.begin(servers).await;
        for round in 2..=ROUNDS {
            self.change(&migration, round).await;
        }
        migration.cut_over(running).await;
        self.assert_whole(&migration, &before).await;
        migration
    }

    /// After the cutover: both sides are the same, and nothing of walferry is left on either.
    pub async fn assert_whole(&self, migration: &Migration, before: &str) {
        migration.assert_equal().await;
        let verified = migration.with_directory("verify", &["--json"]).await;
        assert_eq!(verified.code, Some(0), "{}\n{}", verified.stderr, verified.stdout);
        let cleaned = migration.with_directory("clean", &[]).await;
        assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
        let (source, target) = tokio::join!(dump(&migration.source_url), dump(&migration.target_url));
        assert_eq!(different_lines(before, &source), [""; 0], "the source is as it was");
        assert_eq!(different_lines(&source, &target), self.explained, "pg_dump of source and target");
    }
}

/// What `pg_dump` says of a database's schema.
pub async fn dump(url: &str) -> String {
    let mut command = Command::new(programs().bin("pg_dump"));
    let output = command.args(["--schema-only", "--exclude-schema=walferry", "--dbname", url]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    // Lines with a key that is another for each dump.
    text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict")).fold(
        String::new(),
        |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        },
    )
}

/// The lines of which one side has more than the other: `< ` where the first has.
pub fn different_lines(one: &str, other: &str) -> Vec<String> {
    let mut counts = std::collections::BTreeMap::<&str, i64>::new();
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
