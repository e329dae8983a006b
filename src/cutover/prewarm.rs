//! Before the fence, what the source's applications read most is read into the target's shared buffers, so that their first minutes on
//! the target are not spent waiting for its disk.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::format::size;
use crate::sql;

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Prewarmed {
    /// Tables and indexes.
    pub(super) relations: usize,
    pub(super) bytes: u64,
}

/// Reads tables and indexes of the target, those first whose blocks the source's statistics have counted most, until three quarters of
/// the target's shared buffers are full or the time is over.
///
/// It takes the extension `pg_prewarm`. Where the target does not have it, it is made in our own schema, with which it goes.
///
/// # Errors
/// `Blocked` when there is no such extension and it cannot be made; else what the servers say.
pub(super) async fn prewarm(source: &Client, target: &Client, time: Duration) -> Result<Prewarmed> {
    let began = Instant::now();
    let schema = extension(target).await?;
    let hottest = source
        .query_typed(
            "SELECT format('%I.%I', schemaname, relname) FROM ( \
                 SELECT schemaname, relname, heap_blks_read + heap_blks_hit AS blocks FROM pg_catalog.pg_statio_user_tables \
                 UNION ALL \
                 SELECT schemaname, indexrelname, idx_blks_read + idx_blks_hit FROM pg_catalog.pg_statio_user_indexes) relations \
             WHERE schemaname <> 'walferry' AND blocks > 0 ORDER BY blocks DESC",
            &[],
        )
        .await
        .context(|| "reading what the source's applications read most".into())?;
    let room: i64 = target
        .query_typed_one(
            "SELECT setting::int8 * pg_catalog.current_setting('block_size')::int8 * 3 / 4 \
             FROM pg_catalog.pg_settings WHERE name = 'shared_buffers'",
            &[],
        )
        .await
        .context(|| "reading the size of the target's shared buffers".into())?
        .get(0);
    let mut room = room.max(0).cast_unsigned();
    let read = format!(
        "SELECT {}.pg_prewarm(relation) FROM pg_catalog.to_regclass($1) relation WHERE relation IS NOT NULL",
        sql::identifier(&schema)
    );
    let mut prewarmed = Prewarmed::default();
    for row in &hottest {
        let name: &str = row.get(0);
        let bytes = target
            .query_typed_one("SELECT pg_catalog.pg_relation_size(pg_catalog.to_regclass($1))", &[(&name, Type::TEXT)])
            .await?
            .get::<_, Option<i64>>(0);
        let Some(bytes) = bytes.map(|bytes| bytes.max(0).cast_unsigned()).filter(|bytes| *bytes <= room) else {
            continue;
        };
        let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&name, Type::TEXT)];
        let reading = target.query_typed(&read, &parameters);
        match tokio::time::timeout(time.saturating_sub(began.elapsed()), reading).await {
            Ok(done) => drop(done.context(|| format!("reading {name} of the target"))?),
            // What was read is worth having.
            Err(_) => break,
        }
        room -= bytes;
        prewarmed.relations += 1;
        prewarmed.bytes += bytes;
    }
    tracing::info!("prewarmed {} tables and indexes of the target, {}", prewarmed.relations, size(prewarmed.bytes));
    Ok(prewarmed)
}

/// The schema that the extension is in.
async fn extension(target: &Client) -> Result<String> {
    let schema = "SELECT n.nspname::text FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace \
                  WHERE e.extname = 'pg_prewarm'";
    if let Some(row) = target.query_typed_opt(schema, &[]).await? {
        return Ok(row.get(0));
    }
    match target.batch_execute("CREATE EXTENSION pg_prewarm SCHEMA walferry").await {
        Ok(()) => Ok("walferry".to_owned()),
        Err(error) => Err(Error::from(error)
            .with_kind(ErrorKind::Blocked)
            .context("--prewarm needs the extension pg_prewarm on the target")
            .hint("A superuser's `CREATE EXTENSION pg_prewarm` on the target makes it; or leave --prewarm out.")),
    }
}
