//! The target's side of a replicated statement: it runs in the apply's own transaction, is compared with what it made on the source,
//! and stands in the ledger by the same commit (I2).
//!
//! `walferry.ddl` is there when a migration replicates DDL, and has a row for each statement that was met.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::adopt;
use super::route::Routing;
use super::schema;
use super::writer::Writer;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::record::wire::REPLICATED_MARK;
use crate::source::catalog::{self, Firing, Hash, Objects, Table, USER_TRIGGER};
use crate::source::ddl::{Caller, Told, ToldColumn};
use crate::source::version::Version;
use crate::sql;

const LOG: &str = "CREATE TABLE IF NOT EXISTS walferry.ddl ( \
     number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, commit_lsn pg_lsn NOT NULL, tag text NOT NULL, objects text NOT NULL, \
     outcome text NOT NULL, left_objects text[] NOT NULL DEFAULT '{}', at timestamptz NOT NULL DEFAULT pg_catalog.now())";

/// What the apply's sessions have switched off; a statement's own work is planned as usual.
const PLANNER: [&str; 5] =
    ["enable_hashjoin", "enable_mergejoin", "enable_seqscan", "enable_bitmapscan", "enable_material"];

/// Records that the migration replicates DDL, before anything is made on the source.
///
/// # Errors
/// Whatever the server says.
pub async fn will_replicate(client: &Client) -> Result<()> {
    client.batch_execute(LOG).await.context(|| "writing into the ledger that DDL is replicated".into())
}

/// Whether the migration replicates DDL.
///
/// # Errors
/// Whatever the server says.
pub async fn is_replicated(client: &Client) -> Result<bool> {
    let there = client.query_typed_one("SELECT pg_catalog.to_regclass('walferry.ddl') IS NOT NULL", &[]).await;
    Ok(there.context(|| "reading from the ledger whether DDL is replicated".into())?.get(0))
}

/// The hashes of the target's definitions in the open transaction, to be compared with those of another server.
///
/// # Errors
/// Whatever the server says.
pub async fn definitions(writer: &mut Writer) -> Result<BTreeMap<String, String>> {
    // Every target has what this asks for.
    pairs(writer, &catalog::fingerprint_query(Version(13), Hash::OfTheDefinition, &Objects::ALL)).await
}

/// The fingerprint that the ledger has.
///
/// # Errors
/// Whatever the server says.
pub async fn recorded(writer: &mut Writer) -> Result<BTreeMap<String, String>> {
    pairs(writer, "SELECT object, hash FROM walferry.fingerprint").await
}

async fn pairs(writer: &mut Writer, query: &str) -> Result<BTreeMap<String, String>> {
    let rows = writer.query(query).await.context(|| "reading the target's catalog".into())?;
    let pair = |row: Vec<Option<String>>| {
        let mut row = row.into_iter();
        Some((row.next()??, row.next()?.unwrap_or_default()))
    };
    Ok(rows.into_iter().filter_map(pair).collect())
}

/// Runs a statement as a role, `None` for our own, with what its text is read by, and goes back to what our sessions pin.
///
/// # Errors
/// What the server says: the transaction is then to be rolled back.
pub async fn run(writer: &mut Writer, caller: &Caller, role: Option<&str>, statement: &str) -> Result<()> {
    let mut settings = caller.settings.clone();
    settings.insert("search_path".into(), caller.search_path.clone());
    settings.insert("row_security".into(), "on".into());
    settings.extend(PLANNER.map(|name| (name.to_owned(), "on".to_owned())));
    let set = |(name, value): (&String, &String)| {
        format!("pg_catalog.set_config({}, {}, true)", sql::literal(name), sql::literal(value))
    };
    let mut before = format!("SELECT {}", settings.iter().map(set).collect::<Vec<_>>().join(", "));
    if let Some(role) = role {
        before.push_str(&format!("; SET LOCAL ROLE {}", sql::identifier(role)));
    }
    writer.query(&before).await?;
    writer.execute(format!("{REPLICATED_MARK}{statement}"), &[]).await?;
    let reset = |name: &String| {
        let value = if PLANNER.contains(&name.as_str()) { "off" } else { "DEFAULT" };
        format!("SET LOCAL {} TO {value}", sql::identifier(name))
    };
    let after = format!("RESET ROLE; {}", settings.keys().map(reset).collect::<Vec<_>>().join("; "));
    writer.query(&after).await?;
    // What was prepared for the tables as they were.
    writer.forget_prepared().await
}

/// Whether a table has no rows.
///
/// # Errors
/// Whatever the server says.
pub async fn is_empty(writer: &mut Writer, table: &Table) -> Result<bool> {
    let rows = writer.query(&format!("SELECT FROM ONLY {} LIMIT 1", table.qualified())).await?;
    Ok(rows.is_empty())
}

/// How the fingerprint quotes a table's name.
///
/// # Errors
/// Whatever the server says.
pub async fn quoted(writer: &mut Writer, table: &Table) -> Result<String> {
    let query =
        format!("SELECT pg_catalog.format('%I.%I', {}, {})", sql::literal(&table.schema), sql::literal(&table.name));
    let rows = writer.query(&query).await?;
    let name = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    name.ok_or_else(|| Error::new(ErrorKind::Other, "the target does not answer with a name"))
}

/// Gives the rows that were there the value that they have on the source in a column that was added: a default like `now()` is
/// another here. No row can have been changed since, so all rows have it.
///
/// # Errors
/// Whatever the server says.
pub async fn give_missing(writer: &mut Writer, table: &Table, added: &ToldColumn) -> Result<()> {
    let Some(missing) = &added.missing else { return Ok(()) };
    let (name, qualified) = (&added.column.name, table.qualified());
    let query = format!(
        "SELECT (a.attmissingval::text::text[])[1] FROM pg_catalog.pg_attribute a \
         WHERE a.attrelid = {}::pg_catalog.regclass AND a.attname = {} AND a.atthasmissing",
        sql::literal(&qualified),
        sql::literal(name)
    );
    let there = writer.query(&query).await?.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    if there.as_ref() == Some(missing) {
        return Ok(());
    }
    let update = format!(
        "UPDATE ONLY {qualified} SET {} = CAST({} AS {})",
        sql::identifier(name),
        sql::literal(missing),
        added.column.type_name
    );
    writer.execute(update, &[]).await.context(|| format!("giving the rows of {qualified} what they have in {name}"))?;
    Ok(())
}

/// Has identity columns take the values that they are given, as those that were there from the start (H22).
///
/// # Errors
/// Whatever the server says.
pub async fn relax_identity(writer: &mut Writer, table: &Table) -> Result<()> {
    let query = format!(
        "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = {}::pg_catalog.regclass AND attidentity = 'a' AND NOT attisdropped",
        sql::literal(&table.qualified())
    );
    for row in writer.query(&query).await? {
        let Some(Some(name)) = row.into_iter().next() else { continue };
        let column = sql::identifier(&name);
        let relax = format!("ALTER TABLE {} ALTER COLUMN {column} SET GENERATED BY DEFAULT", table.qualified());
        writer.execute(relax, &[]).await?;
    }
    Ok(())
}

/// Has triggers and rules that a statement made `ENABLE ALWAYS` or `REPLICA` not fire for what is applied, as those that were there
/// from the start. Answers all of the table that are to be given that back: of `before` those that are there still and that the
/// statement left alone, by the names that the fingerprint has for them.
///
/// # Errors
/// Whatever the server says.
pub async fn relax_firing(
    writer: &mut Writer,
    table: &Table,
    before: &[Firing],
    is_changed: impl Fn(&str) -> bool,
) -> Result<Vec<Firing>> {
    let name = sql::literal(&table.qualified());
    let query = format!(
        "SELECT tgname, false, tgenabled, pg_catalog.format('trigger %I on table %I.%I', tgname, {schema}, {relation}) \
         FROM pg_catalog.pg_trigger t WHERE tgrelid = {name}::pg_catalog.regclass AND {USER_TRIGGER} \
         UNION ALL SELECT rulename, true, ev_enabled, pg_catalog.pg_describe_object('pg_catalog.pg_rewrite'::pg_catalog.regclass, oid, 0) \
         FROM pg_catalog.pg_rewrite WHERE ev_class = {name}::pg_catalog.regclass",
        schema = sql::literal(&table.schema),
        relation = sql::literal(&table.name)
    );
    let mut firing = Vec::new();
    for row in writer.query(&query).await? {
        let [Some(name), Some(is_rule), Some(enabled), Some(object)] = row.as_slice() else { continue };
        let is_rule = is_rule == "t";
        match enabled.as_str() {
            "A" | "R" => firing.push(Firing { name: name.clone(), is_rule, always: enabled == "A" }),
            _ if is_changed(object) => {}
            _ => firing.extend(before.iter().find(|was| was.name == *name && was.is_rule == is_rule).cloned()),
        }
    }
    let with_firing = Table { firing, ..table.clone() };
    for statement in schema::relax_firing(std::slice::from_ref(&with_firing)) {
        writer.execute(statement, &[]).await?;
    }
    Ok(with_firing.firing)
}

/// What a statement did to the tables of the migration, for the ledger.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Tables that are otherwise now.
    pub redefined: Vec<Table>,
    /// New ones, of which every row is in the stream.
    pub new: Vec<Table>,
    /// Gone ones, by their OIDs.
    pub dropped: Vec<u32>,
    /// Objects of the fingerprint with their hashes.
    pub present: BTreeMap<String, String>,
    /// Objects of the fingerprint that are gone.
    pub gone: Vec<String>,
}

/// Writes it into the ledger, in the open transaction.
///
/// # Errors
/// Whatever the server says.
pub async fn record(writer: &mut Writer, recorded: &Recorded) -> Result<()> {
    for table in &recorded.redefined {
        adopt::redefine_in(writer, table, Routing::of(table), &[]).await?;
        // Once without, changes may be missing: it stays among those that the cutover compares whole (H27).
        if !table.has_usable_identity() {
            let mark = format!("UPDATE walferry.source_table SET insert_only = true WHERE relid = {}", table.relid);
            writer.execute(mark, &[]).await?;
        }
    }
    for table in &recorded.new {
        let definition =
            serde_json::to_string(table).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        // Under any snapshot of before: none has seen it.
        let insert = format!(
            "INSERT INTO walferry.source_table (relid, definition, insert_only, routing, snapshot, copied) \
             SELECT {}, {}::jsonb, {}, {}, (SELECT min(id) FROM walferry.snapshot), true",
            table.relid,
            sql::literal(&definition),
            !table.has_usable_identity(),
            sql::literal(Routing::of(table).name())
        );
        writer.execute(insert, &[]).await.context(|| format!("writing {} into the ledger", table.qualified()))?;
    }
    for relid in &recorded.dropped {
        for table in ["part", "source_table"] {
            writer.execute(format!("DELETE FROM walferry.{table} WHERE relid = {relid}"), &[]).await?;
        }
    }
    if !recorded.gone.is_empty() {
        let list: Vec<String> = recorded.gone.iter().map(|object| sql::literal(object)).collect();
        writer.execute(format!("DELETE FROM walferry.fingerprint WHERE object IN ({})", list.join(", ")), &[]).await?;
    }
    if !recorded.present.is_empty() {
        let row = |(object, hash): (&String, &String)| format!("({}, {})", sql::literal(object), sql::literal(hash));
        let rows: Vec<String> = recorded.present.iter().map(row).collect();
        let upsert = format!(
            "INSERT INTO walferry.fingerprint (object, hash) VALUES {} ON CONFLICT (object) DO UPDATE SET hash = EXCLUDED.hash",
            rows.join(", ")
        );
        writer.execute(upsert, &[]).await?;
    }
    Ok(())
}

/// Objects of the fingerprint that statements were left to the operator for: whatever comes later, the cutover names them.
///
/// # Errors
/// Whatever the server says.
pub async fn left(writer: &mut Writer) -> Result<BTreeMap<String, String>> {
    pairs(writer, "SELECT DISTINCT o, '' FROM walferry.ddl, pg_catalog.unnest(left_objects) o").await
}

/// Writes down what became of a statement, and which objects of the fingerprint were left to the operator.
///
/// # Errors
/// Whatever the server says.
pub async fn note(writer: &mut Writer, commit_lsn: Lsn, told: &Told, outcome: &str, left: &[&String]) -> Result<()> {
    let left: Vec<String> = left.iter().map(|object| sql::literal(object)).collect();
    let insert = format!(
        "INSERT INTO walferry.ddl (commit_lsn, tag, objects, outcome, left_objects) VALUES ('{commit_lsn}', {}, {}, {}, ARRAY[{}]::text[])",
        sql::literal(&told.tag),
        sql::literal(&told.objects()),
        sql::literal(outcome),
        left.join(", ")
    );
    writer.execute(insert, &[]).await.context(|| "writing into the ledger what became of DDL".into())?;
    Ok(())
}
