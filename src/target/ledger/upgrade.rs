//! What an older walferry wrote, brought to the form of this one (H18).

use std::collections::BTreeMap;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::connection::ConnectionSpec;
use crate::error::{Context, Result};
use crate::source::catalog;

/// From format 1, whose snapshots all had to follow that of the slot, number 0, or 2, which knew no way back, or 3, which wrote in the
/// replica role only, or 4, which moved only whole databases. Any number of processes
/// may do it, once.
pub(super) async fn to_newest(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "BEGIN; LOCK TABLE walferry.migration IN ACCESS EXCLUSIVE MODE; \
             ALTER TABLE walferry.migration ADD COLUMN IF NOT EXISTS snapshot_floor bigint NOT NULL DEFAULT 0, \
                 ADD COLUMN IF NOT EXISTS queue text NOT NULL DEFAULT 'queue', \
                 ADD COLUMN IF NOT EXISTS way_back text, \
                 ADD COLUMN IF NOT EXISTS apply_role text NOT NULL DEFAULT 'replica', \
                 ADD COLUMN IF NOT EXISTS scope text; \
             ALTER TABLE walferry.source_table ADD COLUMN IF NOT EXISTS compared boolean NOT NULL DEFAULT false; \
             UPDATE walferry.migration SET snapshot_floor = coalesce((SELECT next FROM walferry.snapshot WHERE id = 0), 0) \
                 WHERE format = 1; \
             CREATE TABLE IF NOT EXISTS walferry.older_fingerprint (object, hash) AS SELECT object, hash FROM walferry.fingerprint \
                 WHERE EXISTS (SELECT FROM walferry.migration WHERE format <= 3); \
             UPDATE walferry.migration SET format = 5 WHERE format < 5; \
             COMMIT",
        )
        .await
        .context(|| "bringing the ledger of an older walferry up to date".into())
}

/// Replaces the fingerprint that a walferry up to format 3 has recorded, which knew less, by what it is now: of each object that the
/// older one finds as it was. What it finds otherwise has changed since, and stays so (I11); what it did not look at is taken as it is.
///
/// `source` is the server that is followed. Nothing is done where no such fingerprint is left.
///
/// # Errors
/// Whatever the servers say; to be called again then.
pub async fn renew_fingerprint(source: &ConnectionSpec, target: &mut Client, application_name: &str) -> Result<()> {
    let older = "SELECT pg_catalog.to_regclass('walferry.older_fingerprint') IS NOT NULL";
    if !target.query_typed_one(older, &[]).await?.get::<_, bool>(0) {
        return Ok(());
    }
    let source = &source.connect(application_name).await?;
    let rows = target.query_typed("SELECT object, hash FROM walferry.older_fingerprint", &[]).await?;
    let recorded: BTreeMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let doing = || "bringing the fingerprint of an older walferry up to date".to_owned();
    let transaction = target.transaction().await?;
    if !recorded.is_empty() {
        let renewed =
            renewed(recorded, &catalog::fingerprint_of_format_3(source).await?, catalog::fingerprint(source).await?);
        let (objects, hashes): (Vec<&str>, Vec<&str>) =
            renewed.iter().map(|(object, hash)| (object.as_str(), hash.as_str())).unzip();
        transaction.batch_execute("DELETE FROM walferry.fingerprint").await.context(doing)?;
        transaction
            .execute_typed(
                "INSERT INTO walferry.fingerprint SELECT * FROM unnest($1, $2)",
                &[(&objects, Type::TEXT_ARRAY), (&hashes, Type::TEXT_ARRAY)],
            )
            .await
            .context(doing)?;
    }
    transaction.batch_execute("DROP TABLE IF EXISTS walferry.older_fingerprint").await.context(doing)?;
    transaction.commit().await.context(doing)
}

/// `older` is what the older version would record at this moment, `now` what this one does.
fn renewed(
    mut recorded: BTreeMap<String, String>,
    older: &BTreeMap<String, String>,
    now: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    for (object, hash) in now {
        match (recorded.get_mut(&object), older.get(&object)) {
            (Some(was), Some(older)) if was == older => *was = hash,
            // It did not look at such objects.
            (None, None) => drop(recorded.insert(object, hash)),
            _ => {}
        }
    }
    recorded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_before_a_newer_version_took_over_counts_as_changed() {
        let map = |entries: &[(&str, &str)]| entries.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let recorded =
            map(&[("table same", "1"), ("table other", "1"), ("table gone", "1"), ("table by the cutover", "")]);
        let older =
            map(&[("table same", "1"), ("table other", "2"), ("table new", "1"), ("table by the cutover", "1")]);
        let now = map(&[
            ("table same", "a"),
            ("table other", "b"),
            ("table new", "c"),
            ("comment on table same", "d"),
            ("table by the cutover", "e"),
        ]);
        let expected = map(&[
            ("table same", "a"),
            ("table other", "1"),
            ("table gone", "1"),
            ("comment on table same", "d"),
            ("table by the cutover", ""),
        ]);
        assert_eq!(renewed(recorded, &older, now), expected);
    }
}
