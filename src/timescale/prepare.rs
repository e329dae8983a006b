//! Before the slot: what is set on the source so that nothing of a hypertable escapes the stream. With the schema: the extension's own
//! catalog, as statements for the target.
//!
//! | set on the source | because |
//! |---|---|
//! | `timescaledb.enable_chunk_auto_publication = on` | a new chunk is published in the statement that makes it ([`super::live`]) |
//! | `timescaledb.enable_compressed_direct_batch_delete = off` | otherwise the deletion of a whole compressed segment is in no stream |
//!
//! Both are settings of the database, for sessions to come; where our role is a superuser also of the server, which reaches those that
//! are there. Sessions that neither reaches are the reason for the chunks that come late, and for the counting of rows at the cutover
//! ([`super::settle`]). What was there before is in the ledger before it is changed, and `clean` puts it back (I9).
//!
//! The target gets the rows of the extension's catalog under the slot's snapshot, in the transaction that makes the schema: so
//! hypertables, chunks, compression and jobs have the ids that they have on the source. Our sessions alone are in restoring mode for
//! that (`timescaledb.restoring`, which `timescaledb_pre_restore()` sets for the whole database): nothing is left behind that would have
//! to be undone, wherever the process dies. Jobs are written as not scheduled, and sleep until the cutover.

use std::collections::BTreeSet;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::source::{self, Extension};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::target::ledger::{SchemaItem, Section};
use crate::unstreamed::large_object::Owners;

/// The settings, with the values that they get.
const SETTINGS: [(&str, &str); 2] =
    [("timescaledb.enable_chunk_auto_publication", "on"), ("timescaledb.enable_compressed_direct_batch_delete", "off")];

/// What a setting was, and of what: the database, or the server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Before {
    of_system: bool,
    name: String,
    value: Option<String>,
}

/// A specification whose sessions are in restoring mode: to them, a target's hypertables are ordinary tables.
pub fn restoring(target: &ConnectionSpec) -> ConnectionSpec {
    target.with_setting("timescaledb.restoring=on")
}

/// Whether the migration of this ledger moves a source that has the extension: it may also be made on the target only.
///
/// # Errors
/// Whatever the target says.
pub async fn is_of_timescaledb(target: &Client) -> Result<bool> {
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_setting') IS NOT NULL";
    Ok(target.query_typed_one(exists, &[]).await.context(|| "looking at the ledger".into())?.get(0))
}

/// Sets on the source what the stream needs, and notes in the target's ledger what was there before. Answers what was set, in words;
/// nothing without the extension.
///
/// # Errors
/// Whatever the servers say.
pub async fn set_up(source: &Client, target: &mut Client) -> Result<Vec<String>> {
    if source::extension(source).await?.is_none() {
        return Ok(Vec::new());
    }
    let before = before(source).await?;
    note(target, &before).await?;
    let mut said = Vec::new();
    for of_system in [false, true] {
        for Before { name, .. } in before.iter().filter(|before| before.of_system == of_system) {
            let value = SETTINGS.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value);
            alter(source, of_system, name, Some(value)).await?;
            said.push(format!("{name} = {value}{}", if of_system { " for the server" } else { "" }));
        }
    }
    if before.iter().any(|before| before.of_system) {
        source.batch_execute("SELECT pg_catalog.pg_reload_conf()").await.context(|| "reloading the settings".into())?;
    }
    Ok(said)
}

/// What the settings are that this server knows; those of the server only where our role may change them.
async fn before(source: &Client) -> Result<Vec<Before>> {
    let names: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
    // The extension's library is there once something of it was used.
    source.batch_execute("SELECT count(*) FROM _timescaledb_catalog.hypertable").await?;
    let rows = source
        .query_typed(
            "WITH of_database AS ( \
                 SELECT split_part(option, '=', 1) AS name, substr(option, strpos(option, '=') + 1) AS value \
                 FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) option \
                 WHERE s.setrole = 0 AND s.setdatabase = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())) \
             SELECT false, s.name, d.value FROM pg_catalog.pg_settings s LEFT JOIN of_database d USING (name) WHERE s.name = ANY ($1) \
             ORDER BY 2",
            &[(&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "reading settings of the source's database".into())?;
    let mut before: Vec<Before> =
        rows.iter().map(|row| Before { of_system: row.get(0), name: row.get(1), value: row.get(2) }).collect();
    let superuser: bool = source
        .query_typed_one("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user", &[])
        .await?
        .get(0);
    if superuser {
        let rows = source
            .query_typed(
                "SELECT s.name, (SELECT f.setting FROM pg_catalog.pg_file_settings f \
                                 WHERE f.name = s.name AND f.sourcefile LIKE '%postgresql.auto.conf' ORDER BY f.seqno DESC LIMIT 1) \
                 FROM pg_catalog.pg_settings s WHERE s.name = ANY ($1) ORDER BY 1",
                &[(&names, Type::TEXT_ARRAY)],
            )
            .await
            .context(|| "reading settings of the source".into())?;
        before.extend(rows.iter().map(|row| Before { of_system: true, name: row.get(0), value: row.get(1) }));
    }
    Ok(before)
}

async fn alter(source: &Client, of_system: bool, name: &str, value: Option<&str>) -> Result<()> {
    let database: String = source.query_typed_one("SELECT pg_catalog.current_database()::text", &[]).await?.get(0);
    let subject =
        if of_system { "ALTER SYSTEM".to_owned() } else { format!("ALTER DATABASE {}", sql::identifier(&database)) };
    // A name with a dot is not quoted as one.
    let statement = match value {
        Some(value) => format!("{subject} SET {name} = {}", sql::literal(value)),
        None => format!("{subject} RESET {name}"),
    };
    source.batch_execute(&statement).await.context(|| statement)
}

/// What was noted first stays: later it would be what walferry has set.
async fn note(target: &mut Client, before: &[Before]) -> Result<()> {
    let doing = || "noting settings of the source in the ledger".to_owned();
    let transaction = target.transaction().await?;
    transaction
        .batch_execute(
            "SET LOCAL synchronous_commit = on; CREATE TABLE IF NOT EXISTS walferry.timescaledb_setting \
             (of_system boolean NOT NULL, name text NOT NULL, value text, PRIMARY KEY (of_system, name))",
        )
        .await
        .context(doing)?;
    for Before { of_system, name, value } in before {
        transaction
            .execute(
                "INSERT INTO walferry.timescaledb_setting VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                &[of_system, name, value],
            )
            .await
            .context(doing)?;
    }
    transaction.commit().await.context(doing)
}

/// Puts back the settings of the source that were noted in the target's ledger. Answers what was put back, in words.
///
/// # Errors
/// Whatever the servers say.
pub async fn put_back(source: &Client, target: &Client) -> Result<Vec<String>> {
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_setting') IS NOT NULL";
    if !target.query_typed_one(exists, &[]).await?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = target
        .query_typed("SELECT of_system, name, value FROM walferry.timescaledb_setting ORDER BY 1, 2", &[])
        .await
        .context(|| "reading the source's settings from the ledger".into())?;
    let mut said = Vec::new();
    let mut reload = false;
    for row in &rows {
        let (of_system, name, value): (bool, &str, Option<&str>) = (row.get(0), row.get(1), row.get(2));
        alter(source, of_system, name, value).await?;
        reload |= of_system;
        said.push(format!("setting {name} on the source{}", if of_system { " (of the server)" } else { "" }));
    }
    if reload {
        source.batch_execute("SELECT pg_catalog.pg_reload_conf()").await?;
    }
    Ok(said)
}

/// Of tables, those that hold the rows of continuous aggregates. Their refresh deletes rows, and no key tells which: they are identified by
/// the whole row for the time of the migration, whatever the operator says of others.
///
/// # Errors
/// Whatever the server says.
pub async fn of_aggregates(source: &Client, tables: &[Table]) -> Result<Vec<Table>> {
    let Some(database) = source::read(source).await? else { return Ok(Vec::new()) };
    let materializations: Vec<u32> =
        database.hypertables.iter().filter(|of| of.materializes.is_some()).map(|of| of.relid).collect();
    let is_one = |table: &&Table| materializations.contains(&table.routed_as());
    Ok(tables.iter().filter(is_one).cloned().collect())
}

/// Makes the extension on the target where it is not, in the schema of the source, and in its version or, where all is made again, the target's
/// own: a session in which it was made cannot use it in restoring mode.
///
/// # Errors
/// Whatever the server says.
pub async fn create_extension(
    target: &ConnectionSpec,
    application_name: &str,
    extension: &Extension,
    same_version: bool,
) -> Result<()> {
    let client = target.connect(application_name).await?;
    let schema = sql::identifier(&extension.schema);
    let statement = format!(
        "SET client_min_messages = warning; CREATE SCHEMA IF NOT EXISTS {schema}; \
         CREATE EXTENSION IF NOT EXISTS timescaledb WITH SCHEMA {schema}{}",
        match same_version {
            true => format!(" VERSION {}", sql::literal(&extension.version).trim_start()),
            false => String::new(),
        }
    );
    client.batch_execute(&statement).await.context(|| "creating the extension timescaledb on the target".into())
}

/// The rows of the extension's catalog, as statements for the end of the schema before the rows. In the transaction under whose snapshot
/// they are to be.
///
/// # Errors
/// Whatever the server says.
pub async fn catalog_items(source: &Client, paused: &BTreeSet<i32>, owners: &Owners) -> Result<Vec<SchemaItem>> {
    if source::extension(source).await?.is_none() {
        return Ok(Vec::new());
    }
    let item = |(name, statement)| SchemaItem {
        section: Section::PreData,
        kind: "TIMESCALEDB CATALOG".into(),
        name,
        relid: None,
        statement,
    };
    let mut items: Vec<SchemaItem> = catalog_rows(source, owners, |_| Some("")).await?.into_iter().map(item).collect();
    items.push(remember_jobs(source, paused).await?);
    Ok(items)
}

/// The same, by the names of the catalog's tables and sequences, with those rows of each that a condition on `t` chooses, or without any.
///
/// # Errors
/// Whatever the server says.
pub(super) async fn catalog_rows(
    source: &Client,
    owners: &Owners,
    chosen: impl Fn(&str) -> Option<&'static str>,
) -> Result<Vec<(String, String)>> {
    let configured = source
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, c.relkind = 'S', coalesce(u.condition, '') \
             FROM pg_catalog.pg_extension e, unnest(e.extconfig, e.extcondition) WITH ORDINALITY u(relid, condition, number) \
             JOIN pg_catalog.pg_class c ON c.oid = u.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE e.extname = 'timescaledb' AND c.relkind IN ('r', 'S') ORDER BY u.number",
            &[],
        )
        .await
        .context(|| "reading which tables of TimescaleDB hold the users' rows".into())?;
    let mut statements = Vec::new();
    for row in &configured {
        let (schema, name, is_sequence, condition): (&str, &str, bool, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        // What refreshes are at work belongs to the server that does it.
        if name == "continuous_aggs_jobs_refresh_ranges" {
            continue;
        }
        let Some(narrower) = chosen(name) else { continue };
        let condition = if narrower.is_empty() { condition } else { narrower };
        let qualified = sql::qualified(schema, name);
        let statement = if is_sequence {
            let value = source
                .query_typed_one(&format!("SELECT last_value, is_called FROM {qualified}"), &[])
                .await
                .context(|| format!("reading {qualified}"))?;
            let (last, is_called): (i64, bool) = (value.get(0), value.get(1));
            format!("SELECT pg_catalog.setval({}::pg_catalog.regclass, {last}, {is_called})", sql::literal(&qualified))
        } else {
            let rows = rows_as_json(source, &qualified, name, condition, owners).await?;
            insert_statement(&qualified, name, &rows, owners)
        };
        statements.push((name.to_owned(), statement));
    }
    Ok(statements)
}

/// The rows of a catalog table, by the names of their columns: another order, or a column more, does no harm.
pub(super) async fn rows_as_json(
    source: &Client,
    qualified: &str,
    name: &str,
    condition: &str,
    owners: &Owners,
) -> Result<String> {
    let query = if name == "bgw_job" {
        let (from, to): (Vec<&str>, Vec<&str>) =
            owners.role_map.iter().map(|(from, to)| (from.as_str(), to.as_str())).unzip();
        let list = |names: &[&str]| {
            format!("ARRAY[{}]::text[]", names.iter().map(|name| sql::literal(name)).collect::<Vec<_>>().join(", "))
        };
        format!(
            "SELECT coalesce(jsonb_agg(to_jsonb(t) || jsonb_build_object('scheduled', false, 'owner', pg_catalog.quote_ident( \
                 coalesce((SELECT m.renamed FROM unnest({}, {}) m(name, renamed) WHERE m.name = r.rolname), r.rolname))))::text, '[]') \
             FROM {qualified} t JOIN pg_catalog.pg_roles r ON r.oid = t.owner {condition}",
            list(&from),
            list(&to)
        )
        .replace("WHERE id", "WHERE t.id")
    } else {
        format!("SELECT coalesce(jsonb_agg(to_jsonb(t))::text, '[]') FROM {qualified} t {condition}")
    };
    Ok(source.query_typed_one(&query, &[]).await.context(|| format!("reading {qualified}"))?.get(0))
}

/// Writes such rows.
pub(super) fn insert_statement(qualified: &str, name: &str, rows: &str, owners: &Owners) -> String {
    let owner = if name == "bgw_job" && owners.no_owner {
        " || jsonb_build_object('owner', pg_catalog.quote_ident(current_user))"
    } else {
        ""
    };
    // The target's own rows of it say what it is, and stay.
    let conflict = if name == "metadata" { " ON CONFLICT (key) DO NOTHING" } else { "" };
    format!(
        "INSERT INTO {qualified} SELECT r.* FROM pg_catalog.jsonb_array_elements({}::pg_catalog.jsonb) e, \
         pg_catalog.jsonb_populate_record(NULL::{qualified}, e{owner}) r{conflict}",
        sql::literal(rows)
    )
}

/// Which jobs are to run after the cutover, for the ledger.
async fn remember_jobs(source: &Client, paused: &BTreeSet<i32>) -> Result<SchemaItem> {
    let jobs = source::jobs(source).await?;
    let scheduled: Vec<String> =
        jobs.iter().filter(|job| job.scheduled || paused.contains(&job.id)).map(|job| job.id.to_string()).collect();
    let rows = scheduled.iter().map(|id| format!("({id})")).collect::<Vec<_>>().join(", ");
    let insert =
        if rows.is_empty() { String::new() } else { format!("; INSERT INTO walferry.timescaledb_job VALUES {rows}") };
    Ok(SchemaItem {
        section: Section::PreData,
        kind: "TIMESCALEDB CATALOG".into(),
        name: "jobs that are to run after the cutover".into(),
        relid: None,
        statement: format!("CREATE TABLE walferry.timescaledb_job (id integer PRIMARY KEY){insert}"),
    })
}
