//! What `--hypertables` declares, against what both servers have: tables and columns that there are, keys that a hypertable can have,
//! and an extension that can make it.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::report::{Finding, Severity, Side};
use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::timescale::declaration::{Hypertable, Span};
use crate::timescale::source;

/// The first version that is told of dimensions by `by_range` and `by_hash`.
const OLDEST: (u32, u32) = (2, 13);
/// The first version in which other tables may refer to a hypertable.
const REFERENCES_FROM: (u32, u32) = (2, 16);
/// timestamptz, timestamp, date.
const TIMES: [u32; 3] = [1184, 1114, 1082];
/// int8, int2, int4.
const INTEGERS: [u32; 3] = [20, 21, 23];

fn blocker(code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(Severity::Blocker, Side::Source, code, object, message)
}

/// What stands against the declared hypertables on the source; `extension` is that of the target, where it is there.
///
/// # Errors
/// Whatever the server says.
pub(super) async fn source(
    client: &Client,
    tables: &[Table],
    declared: &[Hypertable],
    extension: Option<(u32, u32)>,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for hypertable in declared {
        let name = hypertable.qualified();
        let table = tables.iter().find(|table| (&table.schema, &table.name) == (&hypertable.schema, &hypertable.name));
        match table {
            Some(table) => {
                findings.extend(columns(client, table, hypertable).await?);
                findings.extend(kind(client, table, hypertable).await?);
                findings.extend(indexes(client, table, hypertable).await?);
                findings.extend(constraints(client, table, declared, extension).await?);
                findings.extend(spans(client, hypertable).await?);
            }
            None => {
                let message = "It is declared as a hypertable, and is no table with rows of its own that is moved: it is not there, \
                     is left out by a filter, is partitioned, or is no table.";
                let fix = "# Correct its name in the file of --hypertables, or remove its section. A partitioned table has to become an \
                     ordinary one first.";
                findings.push(blocker("hypertable-table", name, message).fix(fix));
            }
        }
    }
    Ok(findings)
}

async fn columns(client: &Client, table: &Table, hypertable: &Hypertable) -> Result<Vec<Finding>> {
    let name = table.qualified();
    let rows = client
        .query_typed(
            "SELECT a.attname::text, a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, \
                    coalesce(pg_catalog.to_jsonb(a)->>'attgenerated', '') <> '' \
             FROM pg_catalog.pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped",
            &[(&table.relid, Type::OID)],
        )
        .await
        .context(|| format!("reading the columns of {name}"))?;
    let mut findings = Vec::new();
    for (column, key) in hypertable.columns() {
        let object = format!("{name} ({column})");
        let Some(row) = rows.iter().find(|row| row.get::<_, &str>(0) == column) else {
            let message = format!("The declaration names it with `{key}`, and the table has no such column.");
            findings.push(blocker("hypertable-column", object, message).fix("# Correct the file of --hypertables."));
            continue;
        };
        let (type_oid, type_name, is_generated): (u32, &str, bool) = (row.get(1), row.get(2), row.get(4));
        if is_generated && (key == "time" || key == "dimension.column") {
            let message = "A hypertable cannot be cut into chunks by a generated column.";
            let fix = "# Cut it by another column.".to_owned();
            findings.push(blocker("hypertable-column", &object, message).fix(fix));
        }
        if key != "time" {
            continue;
        }
        if !row.get::<_, bool>(3) {
            let message = "The time column of a hypertable is never NULL, and this one may be.";
            let column = sql::identifier(column);
            let fix = format!("ALTER TABLE {name} ALTER COLUMN {column} SET NOT NULL;");
            findings.push(blocker("hypertable-time", &object, message).fix(fix));
        }
        let is_integer = INTEGERS.contains(&type_oid);
        if !is_integer && !TIMES.contains(&type_oid) {
            let message = format!(
                "A hypertable is cut into chunks by a timestamp, a date or an integer, and this column is of type {type_name}."
            );
            findings.push(blocker("hypertable-time", &object, message).fix("# Name another column with `time`."));
        } else if is_integer != matches!(hypertable.chunk_interval, Span::Integer(_)) {
            let message = format!(
                "The column is of type {type_name}, and `chunk_interval` is {}.",
                if is_integer { "an interval" } else { "a number" }
            );
            let fix = "# Give a number where the time column is an integer, and an interval elsewhere.";
            findings.push(blocker("hypertable-time", &object, message).fix(fix));
        }
    }
    Ok(findings)
}

/// What the table is besides its columns.
async fn kind(client: &Client, table: &Table, hypertable: &Hypertable) -> Result<Vec<Finding>> {
    let name = table.qualified();
    let row = client
        .query_typed_one(
            "SELECT c.relispartition, \
                    EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)), \
                    EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid), c.relrowsecurity, r.rolname::text, r.rolcanlogin, \
                    coalesce((SELECT array_agg(t.tgname::text ORDER BY 1) FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid \
                       AND NOT t.tgisinternal AND coalesce(t.tgoldtable, t.tgnewtable) IS NOT NULL), '{}') \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles r ON r.oid = c.relowner WHERE c.oid = $1",
            &[(&table.relid, Type::OID)],
        )
        .await
        .context(|| format!("reading what {name} is"))?;
    let mut findings = Vec::new();
    let mut found = |is: bool, code, message: &str, fix: String| {
        if is {
            findings.push(blocker(code, &name, message).fix(fix));
        }
    };
    let leave = "# Remove its section from the file of --hypertables, or make it an ordinary table first.".to_owned();
    let (is_partition, inherits): (bool, bool) = (row.get(0), row.get(1));
    found(
        is_partition || inherits,
        "hypertable-inherits",
        "A table that is a partition, inherits or is inherited from cannot become a hypertable.",
        leave,
    );
    found(
        table.unlogged,
        "hypertable-unlogged",
        "An unlogged table is not in the stream, and its chunks would be.",
        format!("ALTER TABLE {name} SET LOGGED;"),
    );
    found(
        row.get(2),
        "hypertable-rule",
        "A hypertable cannot have rules.",
        format!("# Drop the rules that \\d {name} shows."),
    );
    found(
        row.get::<_, bool>(3) && hypertable.compression.is_some(),
        "hypertable-row-security",
        "A hypertable with row level security cannot be compressed.",
        format!("ALTER TABLE {name} DISABLE ROW LEVEL SECURITY;\n# Or declare no compression."),
    );
    let triggers: Vec<String> = row.get(6);
    let drops: Vec<String> =
        triggers.iter().map(|trigger| format!("DROP TRIGGER {} ON {name};", sql::identifier(trigger))).collect();
    found(
        !triggers.is_empty(),
        "hypertable-trigger",
        "A hypertable cannot have row triggers with transition tables (REFERENCING), and compression none at all.",
        drops.join("\n"),
    );
    if hypertable.has_policies() && !row.get::<_, bool>(5) {
        let role: &str = row.get(4);
        let message = format!("Its policies are run as its owner, the role {role}, which may not log in.");
        findings.push(
            blocker("hypertable-owner", name, message).fix(format!("ALTER ROLE {} LOGIN;", sql::identifier(role))),
        );
    }
    Ok(findings)
}

/// Unique indexes and exclusion constraints must have every column that cuts the table into chunks.
async fn indexes(client: &Client, table: &Table, hypertable: &Hypertable) -> Result<Vec<Finding>> {
    let name = table.qualified();
    let rows = client
        .query_typed(
            "SELECT x.relname::text, i.indisexclusion, i.indimmediate, k.conname::text, i.indisprimary, \
                    ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(attnum, at) \
                          JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum \
                          WHERE u.at <= coalesce((pg_catalog.to_jsonb(i)->>'indnkeyatts')::int, i.indnatts) ORDER BY u.at) \
             FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid \
             LEFT JOIN pg_catalog.pg_constraint k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x') \
             WHERE i.indrelid = $1 AND (i.indisunique OR i.indisexclusion) ORDER BY 1",
            &[(&table.relid, Type::OID)],
        )
        .await
        .context(|| format!("reading the keys of {name}"))?;
    let mut findings = Vec::new();
    for row in rows {
        let (index, constraint): (&str, Option<&str>) = (row.get(0), row.get(3));
        let (is_exclusion, is_primary, columns): (bool, bool, Vec<String>) = (row.get(1), row.get(4), row.get(5));
        let missing: Vec<&str> =
            hypertable.partitioned_by().filter(|by| !columns.iter().any(|column| column == by)).collect();
        let object = format!("{name}: {index}");
        let drop = match constraint {
            Some(constraint) => format!("ALTER TABLE {name} DROP CONSTRAINT {};", sql::identifier(constraint)),
            None => format!("DROP INDEX {};", sql::qualified(&table.schema, index)),
        };
        if !missing.is_empty() {
            let what = if is_exclusion { "exclusion constraint" } else { "unique key" };
            let message = format!(
                "A {what} of a hypertable holds within its chunks only, so it must have the columns by which they are cut; this one \
                 lacks {}.",
                missing.join(", ")
            );
            let all = sql::identifiers(columns.iter().map(String::as_str).chain(missing.iter().copied()));
            let anew = match (is_exclusion, is_primary, constraint) {
                (true, ..) => String::new(),
                (_, true, _) => format!("\nALTER TABLE {name} ADD PRIMARY KEY ({all});"),
                (_, _, Some(_)) => format!("\nALTER TABLE {name} ADD UNIQUE ({all});"),
                (_, _, None) => format!("\nCREATE UNIQUE INDEX ON {name} ({all});"),
            };
            findings.push(blocker("hypertable-key", object, message).fix(format!("{drop}{anew}")));
        } else if !row.get::<_, bool>(2) {
            let message = "A deferrable key is not looked at while changes are applied, and cannot be looked for across chunks afterwards.";
            findings.push(blocker("hypertable-key", object, message).fix(drop));
        }
    }
    Ok(findings)
}

async fn constraints(
    client: &Client,
    table: &Table,
    declared: &[Hypertable],
    extension: Option<(u32, u32)>,
) -> Result<Vec<Finding>> {
    let name = table.qualified();
    let rows = client
        .query_typed(
            "SELECT k.contype = 'f', k.conname::text, n.nspname::text, c.relname::text \
             FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE k.contype = 'f' AND k.confrelid = $1 OR k.contype = 'c' AND k.conrelid = $1 AND k.connoinherit ORDER BY 2",
            &[(&table.relid, Type::OID)],
        )
        .await
        .context(|| format!("reading the constraints of {name}"))?;
    let mut findings = Vec::new();
    for row in rows {
        let (is_reference, constraint, schema, other): (bool, &str, &str, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let of = sql::qualified(schema, other);
        let fix = format!("ALTER TABLE {of} DROP CONSTRAINT {};", sql::identifier(constraint));
        let object = format!("{of}: {constraint}");
        let is_declared = declared.iter().any(|declared| declared.qualified() == of);
        if !is_reference {
            let message = "A hypertable cannot have a constraint that its chunks do not have (NO INHERIT).";
            findings.push(blocker("hypertable-constraint", object, message).fix(fix));
        } else if is_declared {
            let message = format!("A foreign key of one hypertable cannot refer to another, {name}.");
            findings.push(blocker("hypertable-reference", object, message).fix(fix));
        } else if extension.is_some_and(|version| version < REFERENCES_FROM) {
            let message = format!(
                "Before TimescaleDB 2.16, which the target has, no foreign key can refer to a hypertable, {name}."
            );
            findings.push(blocker("hypertable-reference", object, message).fix(fix));
        }
    }
    Ok(findings)
}

/// Every interval as the server reads it.
async fn spans(client: &Client, hypertable: &Hypertable) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (span, key) in hypertable.spans() {
        let Span::Interval(text) = span else { continue };
        let read = client.query_typed("SELECT $1::text::interval > interval '0'", &[(text, Type::TEXT)]).await;
        let is_length = match &read {
            Ok(rows) => rows.first().is_some_and(|row| row.get(0)),
            Err(error) if client.is_closed() => {
                return Err(crate::error::Error::new(crate::error::ErrorKind::Transient, error.to_string()));
            }
            Err(_) => false,
        };
        if !is_length {
            let message = format!("`{key}` is `{text}`, which PostgreSQL does not read as a length of time.");
            let fix = "# Give an interval such as '1 day' in the file of --hypertables.";
            findings.push(blocker("hypertable-interval", hypertable.qualified(), message).fix(fix));
        }
    }
    Ok(findings)
}

/// Whether the target can make hypertables; and its extension's version, where it is there or would be made.
///
/// # Errors
/// Whatever the server says.
pub(super) async fn target(client: &Client, declared: &[Hypertable]) -> Result<(Vec<Finding>, Option<(u32, u32)>)> {
    let on_target = |severity, object: &str, message: String| {
        Finding::new(severity, Side::Target, "hypertable-extension", object, message)
    };
    let row = client
        .query_typed_one(
            "SELECT (SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'timescaledb'), \
                    pg_catalog.current_setting('timescaledb.disable_load', true) IS NOT NULL, \
                    pg_catalog.to_regnamespace('public') IS NOT NULL, \
                    pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')",
            &[],
        )
        .await
        .context(|| "looking for TimescaleDB on the target".into())?;
    let available: Option<String> = row.get(0);
    let Some(available) = available else {
        let message =
            "The file of --hypertables needs the extension timescaledb, which this server does not offer.".to_owned();
        let found = on_target(Severity::Blocker, "timescaledb", message)
            .fix("# Install TimescaleDB on the target's server, or choose a target that has it.");
        return Ok((vec![found], None));
    };
    let there = source::extension(client).await?;
    let mut findings = Vec::new();
    let is_loaded: bool = row.get(1);
    if !is_loaded && there.as_ref().is_none_or(|extension| !extension.loaded) {
        let message = "TimescaleDB works only where the server loads it at its start.".to_owned();
        findings.push(on_target(Severity::Blocker, "shared_preload_libraries", message).fix(
            "ALTER SYSTEM SET shared_preload_libraries = 'timescaledb'; -- besides what it names already; then restart the server",
        ));
    }
    let version = there.as_ref().map_or(available.clone(), |extension| extension.version.clone());
    let mut parts = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let number: (u32, u32) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if number < OLDEST {
        let message = format!(
            "Hypertables are made as TimescaleDB {}.{} or newer does it, and this is {version}.",
            OLDEST.0, OLDEST.1
        );
        findings.push(on_target(Severity::Blocker, "timescaledb", message).fix("ALTER EXTENSION timescaledb UPDATE;"));
    }
    let needs_licence = declared.iter().any(|declared| declared.compression.is_some() || declared.has_policies());
    match &there {
        Some(extension) if needs_licence && extension.license == "apache" => {
            let message = "Compression and policies need timescaledb.license = timescale, and it is apache.".to_owned();
            findings.push(on_target(Severity::Blocker, "timescaledb.license", message).fix(
                "ALTER SYSTEM SET timescaledb.license = 'timescale'; -- then restart the server; or declare no compression and no retention",
            ));
        }
        Some(_) => {}
        None if row.get(2) && row.get(3) => {
            let message =
                format!("The extension is not created yet: `migrate` creates version {version} in the schema public.");
            findings.push(on_target(Severity::Info, "timescaledb", message));
        }
        None => {
            let message =
                "The extension is not created, and our role may not, or there is no schema public for it.".to_owned();
            findings.push(
                on_target(Severity::Blocker, "timescaledb", message).fix("CREATE EXTENSION timescaledb SCHEMA public;"),
            );
        }
    }
    let count = declared.len();
    let message = format!(
        "There is no way back from hypertables to plain tables: {count} are declared, and `migrate` asks for --no-reverse beside \
         --hypertables."
    );
    findings.push(Finding::new(Severity::Warning, Side::Target, "hypertable-way-back", "--hypertables", message));
    Ok((findings, Some(number)))
}
