//! The record's copy in the ledger: `walferry.record` on the target. It outlives the state directory, and the machine that it is on.
//!
//! The file is written first; a task carries what is new to the target every few seconds, when there is a ledger. The table is made
//! when it is missing, so the ledger's format stays what it is (H18).

use std::convert::Infallible;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Entry, Recorder, merged, read};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};

const INTERVAL: Duration = Duration::from_secs(5);
/// How long a server may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Lines that are sent at once.
const TOGETHER: usize = 500;
/// Lines that the ledger keeps.
const KEPT: i64 = 20_000;

/// Made with the ledger, so that the users' event triggers, which come later, do not fire for it; a ledger of before gets it when it is
/// first written.
pub(crate) const TABLE: &str =
    "CREATE TABLE IF NOT EXISTS walferry.record (id text PRIMARY KEY, at timestamptz NOT NULL, entry jsonb NOT NULL)";

/// What of a file is in the ledger.
#[derive(Default)]
pub struct Mirror {
    /// How long the file was.
    bytes: u64,
    /// Its lines up to there.
    entries: usize,
}

/// Carries on, for as long as it is polled.
pub async fn keep(recorder: Recorder, target: ConnectionSpec, application_name: &str) -> Infallible {
    let mut mirror = Mirror::default();
    loop {
        tokio::time::sleep(INTERVAL).await;
        recorder.write_counts();
        if let Err(error) = mirror.carry(&recorder, &target, application_name).await {
            tracing::debug!(%error, "the record's copy in the ledger waits");
        }
    }
}

impl Mirror {
    /// Carries what is new, if there is a ledger; a connection more than there may be is not made for it.
    ///
    /// # Errors
    /// Whatever the server or the disk says.
    pub async fn carry(&mut self, recorder: &Recorder, target: &ConnectionSpec, application_name: &str) -> Result<()> {
        let bytes = std::fs::metadata(recorder.path()).map_or(0, |metadata| metadata.len());
        if bytes == self.bytes || target.connections().room() < 3 {
            return Ok(());
        }
        let directory = recorder.path().parent().unwrap_or(recorder.path());
        let all = read(directory)?;
        if all.len() < self.entries {
            *self = Mirror::default();
        }
        let carried = async {
            let client = target.connect(application_name).await?;
            write(&client, all.get(self.entries..).unwrap_or_default()).await
        };
        let late = |_| Err(Error::new(ErrorKind::Transient, "the target does not answer"));
        if tokio::time::timeout(ANSWER_MAX, carried).await.unwrap_or_else(late)? {
            *self = Mirror { bytes, entries: all.len() };
        }
        Ok(())
    }
}

/// Writes lines into the ledger; false where there is none, or none that will stay.
async fn write(target: &Client, entries: &[Entry]) -> Result<bool> {
    let doing = || "copying the record into the ledger".to_owned();
    let there = "SELECT pg_catalog.to_regclass('walferry.migration') IS NOT NULL, pg_catalog.to_regclass('walferry.record') IS NOT NULL";
    let row = target.query_typed_one(there, &[]).await.context(doing)?;
    let (ledger, table): (bool, bool) = (row.get(0), row.get(1));
    if !ledger {
        return Ok(false);
    }
    // A preparation that is cut off takes the whole schema with it, and must not wait for us.
    let prepared = "SELECT EXISTS (SELECT FROM walferry.migration WHERE phase <> 'preparing')";
    if !target.query_typed_one(prepared, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(false);
    }
    if !table {
        target.batch_execute(&format!("SET lock_timeout = '2s'; {TABLE}")).await.context(doing)?;
    }
    for entries in entries.chunks(TOGETHER) {
        // An upsert meets each row once.
        let entries = merged(entries.iter().cloned());
        let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
        let times: Vec<&str> = entries.iter().map(|entry| entry.at.as_str()).collect();
        let texts: Vec<String> = entries
            .iter()
            // jsonb has no NUL.
            .filter_map(|entry| serde_json::to_string(entry).ok().map(|text| text.replace("\\u0000", "")))
            .collect();
        target
            .execute_typed(
                "INSERT INTO walferry.record SELECT i, a::timestamptz, e::jsonb FROM unnest($1, $2, $3) u(i, a, e) \
                 ON CONFLICT (id) DO UPDATE SET at = excluded.at, entry = excluded.entry",
                &[(&ids, Type::TEXT_ARRAY), (&times, Type::TEXT_ARRAY), (&texts, Type::TEXT_ARRAY)],
            )
            .await
            .context(doing)?;
    }
    let old = "DELETE FROM walferry.record WHERE entry->>'what' IN ('statement', 'event') AND id IN \
               (SELECT id FROM walferry.record ORDER BY at DESC OFFSET $1)";
    target.execute_typed(old, &[(&KEPT, Type::INT8)]).await.context(doing)?;
    Ok(true)
}

/// The ledger's lines; none where it has none.
///
/// # Errors
/// Whatever the server says.
pub async fn load(target: &Client) -> Result<Vec<Entry>> {
    let doing = || "reading the record from the ledger".to_owned();
    let there = "SELECT pg_catalog.to_regclass('walferry.record') IS NOT NULL";
    if !target.query_typed_one(there, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = target.query_typed("SELECT entry::text FROM walferry.record ORDER BY at", &[]).await.context(doing)?;
    // Of a newer walferry, perhaps: what is not known is left out.
    Ok(rows.iter().filter_map(|row| serde_json::from_str(row.get(0)).ok()).collect())
}
