//! What of a backfill is done, in tables of the target's schema `walferry` (I2): a piece's row is written in the transaction of its rows.
//!
//! | table | one row is |
//! |---|---|
//! | `backfill` | the backfill: who it is, its range, and whether it is complete |
//! | `backfill_piece` | a chunk, a range of a table or a whole table |
//! | `backfill_job` | a policy of the target that was taken off its schedule; noted before that is done |

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::timescale::{chunks, policies};

/// The version of these tables (H18).
const FORMAT: i32 = 1;

const TABLES: &str = "
CREATE SCHEMA IF NOT EXISTS walferry;
COMMENT ON SCHEMA walferry IS 'walferry: the ledger of a backfill; `walferry clean` removes it';
CREATE TABLE walferry.backfill (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    format integer NOT NULL,
    id text NOT NULL,
    wanted text NOT NULL,
    complete boolean NOT NULL DEFAULT false,
    started_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);
CREATE TABLE walferry.backfill_piece (
    relation text NOT NULL,
    place text NOT NULL,
    range_from bigint NOT NULL,
    range_to bigint NOT NULL,
    bytes bigint NOT NULL,
    copied boolean NOT NULL DEFAULT false,
    how text,
    rows bigint NOT NULL DEFAULT 0,
    hash text,
    copied_at timestamptz,
    PRIMARY KEY (relation, place)
);
CREATE TABLE walferry.backfill_job (job integer PRIMARY KEY);
";

/// What the ledger says of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recorded {
    /// `"schema"."name"`.
    pub(super) relation: String,
    /// Which piece of it.
    pub(super) place: String,
    /// Its range.
    pub(super) range: (i64, i64),
    /// Its size on the source when it was planned.
    pub(super) bytes: i64,
    /// Whether it is there.
    pub(super) copied: bool,
    /// How many rows it had.
    pub(super) rows: i64,
}

/// Whether the target has a backfill's ledger.
///
/// # Errors
/// Whatever the server says.
pub async fn exists(target: &Client) -> Result<bool> {
    let row = target.query_typed_one("SELECT pg_catalog.to_regclass('walferry.backfill') IS NOT NULL", &[]).await;
    Ok(row.context(|| "looking for a backfill's ledger on the target".into())?.get(0))
}

/// Whether the target's ledger is that of a backfill.
pub(super) async fn is_of(target: &Client, id: &str) -> Result<bool> {
    if !exists(target).await? {
        return Ok(false);
    }
    let row = target.query_typed_one("SELECT id FROM walferry.backfill", &[]).await;
    Ok(row.context(|| "asking whose ledger the target has".into())?.get::<_, &str>(0) == id)
}

/// Begins a backfill, or goes on with it; one that is complete makes way for another.
///
/// # Errors
/// `Blocked` when another backfill is not complete, or this one was begun with other options.
pub(super) async fn begin(target: &mut Client, id: &str, wanted: &str) -> Result<()> {
    let doing = || "beginning the backfill's ledger (schema walferry) on the target".to_owned();
    if exists(target).await? {
        let row = target.query_typed_one("SELECT format, id, wanted, complete FROM walferry.backfill", &[]).await;
        let row = row.context(doing)?;
        let (format, known, options, complete): (i32, &str, &str, bool) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        if format > FORMAT {
            let text =
                format!("the backfill's ledger has format {format}, and this walferry knows only up to {FORMAT}");
            return Err(Error::new(ErrorKind::Blocked, text).hint("Go on with the newer walferry that began it."));
        }
        if known == id && options == wanted {
            return Ok(());
        }
        if !complete {
            let text = if known == id {
                format!("this backfill was begun with other options: {options}")
            } else {
                "another backfill into this database is not complete".to_owned()
            };
            return Err(Error::new(ErrorKind::Blocked, text).hint(
                "Go on with that one: its --dir and its options. Or give it up with `walferry clean`, which leaves the rows that it has copied.",
            ));
        }
        restore_jobs(target).await?;
        let gone = "DROP TABLE walferry.backfill, walferry.backfill_piece, walferry.backfill_job";
        target.batch_execute(gone).await.context(doing)?;
    }
    let transaction = target.transaction().await?;
    transaction.batch_execute(TABLES).await.context(doing)?;
    transaction
        .execute_typed(
            "INSERT INTO walferry.backfill (format, id, wanted) VALUES ($1, $2, $3)",
            &[(&FORMAT, Type::INT4), (&id, Type::TEXT), (&wanted, Type::TEXT)],
        )
        .await
        .context(doing)?;
    transaction.commit().await.context(doing)
}

/// All pieces that are known.
pub(super) async fn pieces(target: &Client) -> Result<Vec<Recorded>> {
    let rows = target
        .query_typed(
            "SELECT relation, place, range_from, range_to, bytes, copied, rows FROM walferry.backfill_piece ORDER BY relation, range_from, place",
            &[],
        )
        .await
        .context(|| "reading the pieces of the backfill".into())?;
    let recorded = |row: &tokio_postgres::Row| Recorded {
        relation: row.get(0),
        place: row.get(1),
        range: (row.get(2), row.get(3)),
        bytes: row.get(4),
        copied: row.get(5),
        rows: row.get(6),
    };
    Ok(rows.iter().map(recorded).collect())
}

/// Notes pieces that are to be copied; those that are known stay as they are.
pub(super) async fn plan(target: &Client, pieces: &[Recorded]) -> Result<()> {
    let relations: Vec<&str> = pieces.iter().map(|piece| piece.relation.as_str()).collect();
    let places: Vec<&str> = pieces.iter().map(|piece| piece.place.as_str()).collect();
    let from: Vec<i64> = pieces.iter().map(|piece| piece.range.0).collect();
    let to: Vec<i64> = pieces.iter().map(|piece| piece.range.1).collect();
    let bytes: Vec<i64> = pieces.iter().map(|piece| piece.bytes).collect();
    target
        .execute_typed(
            "INSERT INTO walferry.backfill_piece (relation, place, range_from, range_to, bytes) \
             SELECT * FROM unnest($1::text[], $2::text[], $3::int8[], $4::int8[], $5::int8[]) ON CONFLICT DO NOTHING",
            &[
                (&relations, Type::TEXT_ARRAY),
                (&places, Type::TEXT_ARRAY),
                (&from, Type::INT8_ARRAY),
                (&to, Type::INT8_ARRAY),
                (&bytes, Type::INT8_ARRAY),
            ],
        )
        .await
        .context(|| "noting the pieces of the backfill".into())?;
    Ok(())
}

/// Notes in the transaction of its rows that a piece is there.
pub(super) async fn copied(
    target: &Client,
    relation: &str,
    place: &str,
    how: &str,
    rows: i64,
    hash: Option<&str>,
) -> Result<()> {
    let noted = target
        .execute_typed(
            "UPDATE walferry.backfill_piece SET copied = true, how = $3, rows = $4, hash = $5, copied_at = pg_catalog.now() \
             WHERE relation = $1 AND place = $2 AND NOT copied",
            &[(&relation, Type::TEXT), (&place, Type::TEXT), (&how, Type::TEXT), (&rows, Type::INT8), (&hash, Type::TEXT)],
        )
        .await
        .context(|| format!("noting that {relation} {place} is copied"))?;
    if noted == 1 {
        return Ok(());
    }
    // As by a session of ours whose connection broke with its commit on the way. Whoever tries again asks first whether it is there.
    let text = format!("the piece {place} of {relation} has been copied meanwhile by another session");
    Err(Error::new(ErrorKind::Transient, text))
}

/// Notes that pieces are to be copied again.
pub(super) async fn forget(target: &Client, pieces: &[Recorded]) -> Result<()> {
    let relations: Vec<&str> = pieces.iter().map(|piece| piece.relation.as_str()).collect();
    let places: Vec<&str> = pieces.iter().map(|piece| piece.place.as_str()).collect();
    target
        .execute_typed(
            "UPDATE walferry.backfill_piece SET copied = false, how = NULL, rows = 0, hash = NULL, copied_at = NULL \
             WHERE (relation, place) IN (SELECT * FROM unnest($1::text[], $2::text[]))",
            &[(&relations, Type::TEXT_ARRAY), (&places, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "noting which pieces are copied again".into())?;
    Ok(())
}

/// All is copied, and durable: this commit flushes those before it.
pub(super) async fn complete(target: &Client) -> Result<()> {
    let statement = "BEGIN; SET LOCAL synchronous_commit = on; UPDATE walferry.backfill SET complete = true; COMMIT";
    target.batch_execute(statement).await.context(|| "noting that the backfill is complete".into())
}

/// Notes a job, durably, before it is taken off its schedule.
pub(super) async fn note_jobs(target: &Client, jobs: &[i32]) -> Result<()> {
    target
        .execute_typed(
            "INSERT INTO walferry.backfill_job SELECT * FROM unnest($1::int4[]) ON CONFLICT DO NOTHING",
            &[(&jobs, Type::INT4_ARRAY)],
        )
        .await
        .context(|| "noting the policies that rest".into())?;
    Ok(())
}

/// Puts the jobs that were taken off their schedule back on it; answers their numbers.
///
/// # Errors
/// Whatever the server says; those that are left are noted still.
pub(super) async fn restore_jobs(target: &Client) -> Result<Vec<i32>> {
    let rows = target.query_typed("SELECT job FROM walferry.backfill_job ORDER BY 1", &[]).await;
    let jobs: Vec<i32> = rows.context(|| "reading which policies rest".into())?.iter().map(|row| row.get(0)).collect();
    let extension = if jobs.is_empty() { None } else { chunks::extension(target).await? };
    for job in &jobs {
        if let Some((_, schema)) = &extension {
            policies::schedule(target, schema, *job, true).await?;
        }
        let gone = format!("DELETE FROM walferry.backfill_job WHERE job = {job}");
        target.batch_execute(&gone).await.context(|| "noting that a policy is on its schedule again".into())?;
    }
    Ok(jobs)
}

/// Removes the ledger of a backfill, with its schema where nothing else is in it. Policies that rest go on. Answers what was removed.
///
/// # Errors
/// Whatever the server says.
pub async fn remove(target: &Client) -> Result<Vec<String>> {
    if !exists(target).await? {
        return Ok(Vec::new());
    }
    let mut removed: Vec<String> = restore_jobs(target)
        .await?
        .iter()
        .map(|job| format!("the rest of job {job} on the target: it is on its schedule again"))
        .collect();
    target
        .batch_execute("DROP SCHEMA walferry CASCADE")
        .await
        .context(|| "removing the ledger of a backfill".into())?;
    removed.push("schema walferry (the ledger of a backfill) on the target".into());
    Ok(removed)
}
