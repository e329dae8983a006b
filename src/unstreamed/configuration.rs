//! The rows that users have in the configuration tables of extensions ("Extension Configuration Tables" in the manual).
//!
//! The tables come with `CREATE EXTENSION`, and `pg_dump` takes their rows for data, not for schema. They are few, and in no
//! publication of ours (an extension's tables are its own): so they are compared as a whole, by a hash that each server makes, and
//! replaced where they differ.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, pin_mut};
use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::sql;

/// Their rows are at work wherever they stand: a job would run on the target before the cutover, and twice. `check` says so.
pub(crate) const LEFT_OUT: &str = "'pg_cron', 'timescaledb'";

/// A table (or sequence) that an extension has marked as configuration.
struct Configured {
    extension: String,
    /// Ready for SQL.
    name: String,
    is_sequence: bool,
    /// `WHERE …`, or nothing: which rows are the user's.
    condition: String,
    /// Ready for SQL, without generated ones.
    columns: String,
}

/// Makes the target's rows those of the source. Answers how many tables and sequences differed.
///
/// # Errors
/// Whatever the servers say; an extension whose rows cannot be written is as it was.
pub async fn sync(source: &Client, target: &Client) -> Result<usize> {
    let configured = list(source).await?;
    let mut differing = 0;
    for of_extension in configured.chunk_by(|a, b| a.extension == b.extension) {
        differing += sync_extension(source, target, of_extension)
            .await
            .context(|| format!("copying the configuration of the extension {}", of_extension[0].extension))?;
    }
    Ok(differing)
}

/// In the order in which each extension has named them, which is the order of their foreign keys. What our role may not read is left
/// out, and named by `check`.
async fn list(source: &Client) -> Result<Vec<Configured>> {
    let rows = source
        .query_typed(
            &format!(
                "SELECT e.extname::text, n.nspname, c.relname, c.relkind = 'S', coalesce(e.extcondition[u.o], ''), \
                        (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum) \
                         FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                           AND coalesce(pg_catalog.to_jsonb(a)->>'attgenerated', '') = '') \
                 FROM pg_catalog.pg_extension e, pg_catalog.unnest(e.extconfig) WITH ORDINALITY u(relid, o), pg_catalog.pg_class c, \
                      pg_catalog.pg_namespace n \
                 WHERE c.oid = u.relid AND n.oid = c.relnamespace AND c.relkind IN ('r', 'p', 'S') AND e.extname NOT IN ({LEFT_OUT}) \
                   AND pg_catalog.has_table_privilege(c.oid, 'SELECT') \
                 ORDER BY e.extname, u.o"
            ),
            &[],
        )
        .await
        .context(|| "listing the configuration tables of extensions".into())?;
    Ok(rows
        .iter()
        .map(|row| Configured {
            extension: row.get(0),
            name: sql::qualified(row.get(1), row.get(2)),
            is_sequence: row.get(3),
            condition: row.get(4),
            columns: row.get::<_, Option<String>>(5).unwrap_or_default(),
        })
        .collect())
}

/// Those that hold something of the users', and that our role may not make the same on the target: each with the SQL that lets it.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn unwritable(source: &Client, target: &Client, role: &str) -> Result<Vec<(String, String)>> {
    let mut unwritable = Vec::new();
    for this in list(source).await? {
        let Configured { extension, name, condition, .. } = &this;
        let doing = || format!("looking whether {name} may be written on the target");
        let is_used = match this.is_sequence {
            true => format!("SELECT is_called FROM {name}"),
            false => format!("SELECT EXISTS (SELECT FROM {name} {condition})"),
        };
        if !source.query_typed_one(&is_used, &[]).await.context(doing)?.get::<_, bool>(0) {
            continue;
        }
        let row = target
            .query_typed_one(
                &format!(
                    // What a trusted extension brings belongs to the superuser whose rights it was made with.
                    "SELECT relid IS NOT NULL, CASE WHEN relid IS NULL \
                         THEN (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) \
                              OR NOT EXISTS (SELECT FROM pg_catalog.pg_available_extension_versions v \
                                             WHERE v.name = {} AND v.superuser AND v.trusted) \
                         WHEN {} THEN pg_catalog.has_sequence_privilege(relid, 'SELECT') AND pg_catalog.has_sequence_privilege(relid, 'UPDATE') \
                         ELSE (SELECT bool_and(pg_catalog.has_table_privilege(relid, p)) FROM unnest('{{SELECT,INSERT,DELETE}}'::text[]) p) END \
                     FROM (SELECT pg_catalog.to_regclass({})::oid AS relid) r",
                    sql::literal(extension),
                    this.is_sequence,
                    sql::literal(name)
                ),
                &[],
            )
            .await
            .context(doing)?;
        let (is_there, is_writable): (bool, bool) = (row.get(0), row.get(1));
        if is_writable {
            continue;
        }
        let create = match is_there {
            true => String::new(),
            false => format!("CREATE EXTENSION {}; ", sql::identifier(extension)),
        };
        let grant = if this.is_sequence { "SELECT, UPDATE ON SEQUENCE" } else { "SELECT, INSERT, DELETE ON" };
        let grant = format!("{create}GRANT {grant} {name} TO {};  -- as its owner", sql::identifier(role));
        unwritable.push((format!("{name} of extension {extension}"), grant));
    }
    Ok(unwritable)
}

async fn sync_extension(source: &Client, target: &Client, configured: &[Configured]) -> Result<usize> {
    let mut differing = Vec::new();
    for this in configured {
        if !same(source, target, this).await? {
            differing.push(this);
        }
    }
    if differing.is_empty() {
        return Ok(0);
    }
    target.batch_execute("BEGIN").await?;
    let replaced = replace(source, target, &differing).await;
    target.batch_execute(if replaced.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
    replaced.map(|()| differing.len())
}

async fn same(source: &Client, target: &Client, this: &Configured) -> Result<bool> {
    let Configured { name, condition, columns, .. } = this;
    let query = if this.is_sequence {
        format!("SELECT last_value || '/' || is_called FROM {name}")
    } else {
        format!(
            "SELECT pg_catalog.count(*) || '/' || coalesce(pg_catalog.sum(('x' || pg_catalog.left(pg_catalog.md5(r::text), 15))::bit(60)::int8), 0) \
             FROM (SELECT {columns} FROM {name} {condition}) r"
        )
    };
    let doing = || format!("comparing {name}");
    let (here, there) =
        tokio::try_join!(source.query_typed_one(&query, &[]), target.query_typed_one(&query, &[])).context(doing)?;
    Ok(here.get::<_, String>(0) == there.get::<_, String>(0))
}

async fn replace(source: &Client, target: &Client, differing: &[&Configured]) -> Result<()> {
    for this in differing.iter().rev().filter(|this| !this.is_sequence) {
        let delete = format!("DELETE FROM {} {}", this.name, this.condition);
        target.batch_execute(&delete).await.context(|| format!("emptying {}", this.name))?;
    }
    for this in differing {
        let Configured { name, condition, columns, .. } = this;
        let doing = || format!("copying {name}");
        if this.is_sequence {
            let row = source
                .query_typed_one(&format!("SELECT last_value, is_called FROM {name}"), &[])
                .await
                .context(doing)?;
            let (value, is_called): (i64, bool) = (row.get(0), row.get(1));
            let set = format!("SELECT pg_catalog.setval({}, {value}, {is_called})", sql::literal(name));
            target.batch_execute(&set).await.context(doing)?;
            continue;
        }
        let rows = source
            .copy_out(&format!("COPY (SELECT {columns} FROM {name} {condition}) TO STDOUT"))
            .await
            .context(doing)?;
        let sink = target.copy_in::<_, Bytes>(&format!("COPY {name} ({columns}) FROM STDIN")).await.context(doing)?;
        pin_mut!(rows, sink);
        while let Some(row) = rows.next().await {
            sink.send(row.context(doing)?).await.context(doing)?;
        }
        sink.finish().await.context(doing)?;
    }
    Ok(())
}
