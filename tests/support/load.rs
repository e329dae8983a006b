//! An application: its schema, its first rows, and sessions that write all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls};

use super::until;

/// What a migration has to carry over, small enough for many migrations.
pub const SCHEMA: &str = include_str!("application.sql");

/// Makes the schema with so many rows in its largest table, `app.big`.
pub async fn fill(client: &Client, rows: u32) {
    fill_schema(client, SCHEMA, rows).await;
}

/// The same with a schema that an older server understands.
pub async fn fill_schema(client: &Client, schema: &str, rows: u32) {
    client.batch_execute(schema).await.unwrap();
    let script = format!(
        "SET synchronous_commit = off;
         INSERT INTO app.big (mood, amount, body, tags)
             SELECT (enum_range(NULL::app.mood))[1 + i % 3], i / 7.0, repeat(md5(i::text), 6), ARRAY['a', NULL, 'it''s \"' || i]
             FROM generate_series(1, {rows}) i;
         INSERT INTO app.note (big_id, body, document)
             SELECT 1 + i % {rows}, E'tab\\t\\\\ and\\nline', jsonb_build_object('i', i, 'null', NULL) FROM generate_series(1, 2000) i;
         INSERT INTO app.event (at, kind) SELECT date '2024-06-01' + i % 1000, 'kind ' || i % 5 FROM generate_series(1, 2000) i;
         INSERT INTO app.keyless SELECT i, 'line ' || i FROM generate_series(1, 500) i;
         INSERT INTO app.heavy SELECT i, 0, repeat(md5(i::text), 400) FROM generate_series(1, 100) i;
         INSERT INTO app.\"Weird \"\"Name\" SELECT i, 'u' || i FROM generate_series(1, 500) i;
         REFRESH MATERIALIZED VIEW app.moods;
         ANALYZE"
    );
    client.batch_execute(&script).await.unwrap();
}

/// Sessions that write until they are stopped, whatever happens to their connections.
pub struct Application {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: JoinSet<()>,
}

impl Application {
    /// Starts so many sessions.
    pub fn start(url: &str, sessions: u64) -> Application {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for session in 0..sessions {
            writers.spawn(write(url.to_owned(), session, Arc::clone(&stop), Arc::clone(&acknowledged)));
        }
        Application { stop, acknowledged, writers }
    }

    /// How many transactions were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more transactions have been acknowledged.
    pub async fn goes_on(&self, transactions: u64) {
        let goal = self.acknowledged() + transactions;
        until("the application goes on writing", || async { (self.acknowledged() >= goal).then_some(()) }).await;
    }

    pub async fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while self.writers.join_next().await.is_some() {}
        self.acknowledged()
    }
}

async fn write(url: String, session: u64, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) {
    let mut number = session;
    while !stop.load(Ordering::Relaxed) {
        let Ok((client, connection)) = tokio_postgres::connect(&url, NoTls).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        tokio::spawn(async move { drop(connection.await) });
        while !stop.load(Ordering::Relaxed) {
            number += 97;
            match client.batch_execute(&transaction(number)).await {
                Ok(()) => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
                Err(error) if error.is_closed() => break,
                // A read-only database, or a deadlock with another session: a person's application tries again.
                Err(_) => {
                    drop(client.batch_execute("ROLLBACK").await);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    if client.is_closed() {
                        break;
                    }
                }
            }
            // The application is not what is measured; the servers have other things to do.
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
    }
}

/// One transaction of many kinds of changes, some of which meet each other's rows.
fn transaction(number: u64) -> String {
    let (row, heavy) = (1 + number * 7919 % 2000, 1 + number % 100);
    let mut statements = vec![
        format!("INSERT INTO app.big (mood, amount, body) VALUES ('happy', {number}, 'written by {number}')"),
        format!("UPDATE app.big SET amount = amount + 1, mood = 'sad' WHERE id = {row}"),
        "INSERT INTO app.note (big_id, body) VALUES (currval('app.big_id_seq'), nextval('app.counter')::text)"
            .to_owned(),
        format!("INSERT INTO app.event (at, kind) VALUES (date '2024-06-01' + {}, 'live')", number % 1000),
    ];
    match number % 6 {
        0 => statements.push(format!("UPDATE app.heavy SET n = n + 1 WHERE id = {heavy}")),
        1 => statements.push(format!("DELETE FROM app.note WHERE id = {row}")),
        2 => statements.push(format!("INSERT INTO app.keyless VALUES ({number}, NULL)")),
        3 => statements.push(format!(
            "UPDATE app.\"Weird \"\"Name\" SET \"the key\" = \"the key\" + 100000 WHERE \"the key\" = {}",
            number % 500
        )),
        4 => statements.push(format!("UPDATE app.event SET at = at + 1 WHERE id = {row} AND at < '2025-12-30'")),
        _ => statements.push(format!("UPDATE app.heavy SET body = repeat(md5('{number}'), 300) WHERE id = {heavy}")),
    }
    // An aborted part and a savepoint, as applications have them.
    statements.push("SAVEPOINT s; DELETE FROM app.note WHERE id < 50; ROLLBACK TO SAVEPOINT s".to_owned());
    format!("BEGIN; {}; COMMIT", statements.join("; "))
}
