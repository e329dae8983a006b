//! Whether the tables that a target has already can take the rows of the source's (`--data-only`).
//!
//! Columns meet by name, in any order. What the target's own constraints could refuse, or what would make something of a row that
//! the source did not, is found here and not in the middle of a copy.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, first_ten};
use crate::error::{Context, Result};
use crate::source::catalog::{Table, USER_TRIGGER};
use crate::sql;
use crate::target::role::ApplyRole;
use crate::unstreamed::large_object::Owners;

/// Schema and name.
type Name = (String, String);

/// A table as the target has it.
#[derive(Default)]
struct Existing {
    columns: BTreeMap<String, ExistingColumn>,
    /// The columns of each complete unique index.
    unique: Vec<BTreeSet<String>>,
}

struct ExistingColumn {
    type_name: String,
    not_null: bool,
    fills_itself: bool,
    generated: bool,
}

/// Compares the tables that are to be moved with the target's of the same name.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn compare(
    source: &Client,
    target: &Client,
    tables: &[Table],
    inputs: &super::Inputs<'_>,
) -> Result<Vec<Finding>> {
    let existing = read(target).await?;
    let mut findings = differences(tables, &existing);
    findings.extend(foreign_keys(source, target, tables).await?);
    findings.extend(always_fires(target, tables).await?);
    findings.extend(sequences(source, target).await?);
    if ApplyRole::allowed(target).await? == ApplyRole::Origin {
        findings.extend(fires_in_origin_role(target, tables).await?);
    }
    if inputs.scope.moves_large_objects() && !inputs.owners.create_roles {
        findings.extend(roles_of_large_objects(source, target, inputs.owners).await?);
    }
    if !inputs.resuming {
        let there: Vec<&Table> = tables.iter().filter(|table| existing.contains_key(&name(table))).collect();
        findings.extend(rows(target, &there).await?);
    }
    Ok(findings)
}

/// What stands against rows of these tables coming to the target's tables of the same name, by whatever way they come.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn differences_of(target: &Client, tables: &[Table], role: ApplyRole) -> Result<Vec<Finding>> {
    let mut findings = differences(tables, &read(target).await?);
    findings.extend(always_fires(target, tables).await?);
    if role == ApplyRole::Origin {
        findings.extend(fires_in_origin_role(target, tables).await?);
    }
    Ok(findings)
}

fn name(table: &Table) -> Name {
    (table.schema.clone(), table.name.clone())
}

fn finding(severity: Severity, code: &'static str, names: &[String], message: &str) -> Option<Finding> {
    (!names.is_empty()).then(|| Finding::new(severity, Side::Target, code, first_ten(names), message))
}

fn differences(tables: &[Table], existing: &BTreeMap<Name, Existing>) -> Vec<Finding> {
    let (mut missing, mut no_column, mut other_type) = (Vec::new(), Vec::new(), Vec::new());
    let (mut generated, mut not_null, mut extra, mut no_key) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for table in tables {
        let Some(there) = existing.get(&name(table)) else {
            missing.push(table.qualified());
            continue;
        };
        let of_table = |column: &str| format!("{} of {}", sql::identifier(column), table.qualified());
        for column in &table.columns {
            let Some(other) = there.columns.get(&column.name) else {
                no_column.push(format!("{} ({})", of_table(&column.name), column.type_name));
                continue;
            };
            if other.type_name != column.type_name {
                let types = format!("{} there, {} on the source", other.type_name, column.type_name);
                other_type.push(format!("{} ({types})", of_table(&column.name)));
            }
            if other.generated {
                generated.push(of_table(&column.name));
            }
            if other.not_null && !column.not_null {
                not_null.push(of_table(&column.name));
            }
        }
        let is_new = |column: &&String| !table.columns.iter().any(|known| known.name == **column);
        for column in there.columns.keys().filter(is_new) {
            let other = &there.columns[column];
            if other.not_null && !other.fills_itself {
                extra.push(of_table(column));
            }
        }
        let key: BTreeSet<String> = table.key_columns().map(|column| column.name.clone()).collect();
        if !key.is_empty() && !there.unique.contains(&key) {
            let columns: Vec<String> = key.iter().map(|column| sql::identifier(column)).collect();
            no_key.push(format!("{} ({})", table.qualified(), columns.join(", ")));
        }
    }
    let blocker = Severity::Blocker;
    [
        finding(blocker, "target-table-missing", &missing, "The target has no such table, and --data-only makes none."),
        finding(blocker, "target-column-missing", &no_column, "The target's table lacks a column that has rows on the source."),
        finding(
            blocker,
            "target-column-type",
            &other_type,
            "The types differ. Give the target's column the source's type; it can be changed after the cutover.",
        ),
        finding(blocker, "target-column-generated", &generated, "The target computes this column, and takes no value for it."),
        finding(
            blocker,
            "target-column-not-null",
            &not_null,
            "The target's column is NOT NULL and the source's is not: rows could be refused.",
        ),
        finding(
            blocker,
            "target-column-extra",
            &extra,
            "The source has no such column, and on the target it is NOT NULL without a default: every row would be refused.",
        ),
        finding(
            blocker,
            "target-key-missing",
            &no_key,
            "The target has no unique index over the key by which changes find their row: each would read the whole table.",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

async fn read(target: &Client) -> Result<BTreeMap<Name, Existing>> {
    let doing = || "reading the target's tables".to_string();
    let mut tables: BTreeMap<Name, Existing> = BTreeMap::new();
    let rows = target
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), \
                    a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
             WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema')",
            &[],
        )
        .await
        .context(doing)?;
    for row in rows {
        let table = tables.entry((row.get(0), row.get(1))).or_default();
        if let Some(column) = row.get::<_, Option<String>>(2) {
            let facts = ExistingColumn {
                type_name: row.get(3),
                not_null: row.get(4),
                fills_itself: row.get(5),
                generated: row.get(6),
            };
            table.columns.insert(column, facts);
        }
    }
    let rows = target
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, array_agg(a.attname::text) \
             FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indrelid \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, place) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum \
             WHERE i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND k.place <= i.indnkeyatts \
               AND n.nspname NOT IN ('pg_catalog', 'information_schema') \
             GROUP BY i.indexrelid, 1, 2",
            &[],
        )
        .await
        .context(doing)?;
    for row in rows {
        if let Some(table) = tables.get_mut(&(row.get(0), row.get(1))) {
            table.unique.push(row.get::<_, Vec<String>>(2).into_iter().collect());
        }
    }
    Ok(tables)
}

/// Rows come without their foreign keys being looked at, because those of the source hold. One that only the target has may not.
async fn foreign_keys(source: &Client, target: &Client, tables: &[Table]) -> Result<Option<Finding>> {
    const LIST: &str = "SELECT n.nspname::text, c.relname::text, pg_catalog.pg_get_constraintdef(k.oid), k.conname::text \
         FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE k.contype = 'f' AND c.relkind = 'r' ORDER BY 1, 2, 4";
    let doing = || "reading foreign keys".to_string();
    let known = source.query_typed(LIST, &[]).await.context(doing)?;
    // A key that is NOT VALID on the one side refers to the same.
    let definition = |row: &tokio_postgres::Row| -> (String, String, String) {
        (row.get(0), row.get(1), row.get::<_, &str>(2).trim_end_matches(" NOT VALID").to_owned())
    };
    let known: BTreeSet<_> = known.iter().map(definition).collect();
    let moved: BTreeSet<Name> = tables.iter().map(name).collect();
    let there = target.query_typed(LIST, &[]).await.context(doing)?;
    let extra: Vec<String> = there
        .iter()
        .filter(|row| moved.contains(&(row.get(0), row.get(1))) && !known.contains(&definition(row)))
        .map(|row| format!("{} of {}", sql::identifier(row.get(3)), sql::qualified(row.get(0), row.get(1))))
        .collect();
    let message = "The source has no such foreign key, so its rows need not fit it, and it is not looked at while they come. Add it \
                   after the cutover.";
    Ok(finding(Severity::Blocker, "target-foreign-key-extra", &extra, message))
}

/// What fires even in sessions that apply changes.
async fn always_fires(target: &Client, tables: &[Table]) -> Result<Option<Finding>> {
    let rows = target
        .query_typed(
            &format!(
                "SELECT n.nspname::text, c.relname::text, t.tgname::text FROM pg_catalog.pg_trigger t \
                 JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE {USER_TRIGGER} AND t.tgenabled IN ('A', 'R') \
                 UNION ALL \
                 SELECT n.nspname, c.relname, w.rulename FROM pg_catalog.pg_rewrite w \
                 JOIN pg_catalog.pg_class c ON c.oid = w.ev_class JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'r' AND w.ev_enabled IN ('A', 'R') ORDER BY 1, 2, 3"
            ),
            &[],
        )
        .await
        .context(|| "reading the target's triggers".into())?;
    let moved: BTreeSet<Name> = tables.iter().map(name).collect();
    let named: Vec<String> = rows
        .iter()
        .filter(|row| moved.contains(&(row.get(0), row.get(1))))
        .map(|row| format!("{} on {}", sql::identifier(row.get(2)), sql::qualified(row.get(0), row.get(1))))
        .collect();
    let message = "It fires in replica sessions too, and so for every row that is copied or applied. ENABLE it without ALWAYS or \
                   REPLICA for the time of the migration.";
    Ok(finding(Severity::Blocker, "target-trigger-always", &named, message))
}

/// Where the role may not set `session_replication_role`, nothing keeps the target's triggers, rules and foreign keys from acting on rows
/// that are copied or applied.
async fn fires_in_origin_role(target: &Client, tables: &[Table]) -> Result<Option<Finding>> {
    let rows = target
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, \
                    coalesce('constraint ' || pg_catalog.quote_ident(k.conname), 'trigger ' || pg_catalog.quote_ident(t.tgname)) \
             FROM pg_catalog.pg_trigger t \
             JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_constraint k ON k.oid = t.tgconstraint \
             WHERE t.tgenabled <> 'D' AND coalesce(k.contype, 't') NOT IN ('p', 'u', 'x') AND t.tgname <> 'ts_insert_blocker' \
             UNION \
             SELECT n.nspname, c.relname, 'rule ' || pg_catalog.quote_ident(w.rulename) FROM pg_catalog.pg_rewrite w \
             JOIN pg_catalog.pg_class c ON c.oid = w.ev_class JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind = 'r' AND w.ev_enabled <> 'D' ORDER BY 1, 2, 3",
            &[],
        )
        .await
        .context(|| "reading the target's triggers".into())?;
    let moved: BTreeSet<Name> = tables.iter().map(name).collect();
    let named: Vec<String> = rows
        .iter()
        .filter(|row| moved.contains(&(row.get(0), row.get(1))))
        .map(|row| format!("{} on {}", row.get::<_, &str>(2), sql::qualified(row.get(0), row.get(1))))
        .collect();
    let message = "The role may not set session_replication_role on the target, so it would act on every row that is copied or applied. \
                   Drop it for the time of the migration, or connect as a role that may set that.";
    Ok(finding(Severity::Blocker, "target-fires", &named, message))
}

/// Who owns large objects and may use them, where the target has no such role.
async fn roles_of_large_objects(source: &Client, target: &Client, owners: &Owners) -> Result<Option<Finding>> {
    let doing = || "reading the roles of large objects".to_owned();
    let rows = source
        .query_typed(
            "SELECT DISTINCT pg_catalog.pg_get_userbyid(lomowner)::text, true FROM pg_catalog.pg_largeobject_metadata \
             UNION SELECT pg_catalog.pg_get_userbyid(a.grantee)::text, false \
             FROM pg_catalog.pg_largeobject_metadata m, pg_catalog.aclexplode(m.lomacl) a WHERE a.grantee <> 0",
            &[],
        )
        .await
        .context(doing)?;
    let is_left_out = |is_owner: bool| if is_owner { owners.no_owner } else { owners.no_privileges };
    let needed: BTreeSet<String> =
        rows.iter().filter(|row| !is_left_out(row.get(1))).map(|row| owners.role(row.get(0)).to_owned()).collect();
    let there = target.query_typed("SELECT rolname::text FROM pg_catalog.pg_roles", &[]).await.context(doing)?;
    let there: BTreeSet<String> = there.iter().map(|row| row.get(0)).collect();
    let missing: Vec<String> = needed.difference(&there).map(|role| sql::identifier(role)).collect();
    let message = "Large objects belong to this role, or are granted to it, and the target has none of that name. Create it there; or give \
                   --roles, --role-map, --no-owner or --no-privileges.";
    Ok(finding(Severity::Blocker, "large-object-role", &missing, message))
}

async fn sequences(source: &Client, target: &Client) -> Result<Option<Finding>> {
    const LIST: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'S' AND c.relpersistence <> 't' ORDER BY 1, 2";
    let doing = || "reading sequences".to_string();
    let there = target.query_typed(LIST, &[]).await.context(doing)?;
    let there: BTreeSet<Name> = there.iter().map(|row| (row.get(0), row.get(1))).collect();
    let missing: Vec<String> = source
        .query_typed(LIST, &[])
        .await
        .context(doing)?
        .iter()
        .filter(|row| !there.contains(&(row.get(0), row.get(1))))
        .map(|row| sql::qualified(row.get(0), row.get(1)))
        .collect();
    let message = "The target has no sequence of that name: the cutover sets none. Where another takes its place, set that one by hand.";
    Ok(finding(Severity::Warning, "target-sequence-missing", &missing, message))
}

/// How many tables are looked into by one statement.
const CHUNK: usize = 200;

async fn rows(target: &Client, tables: &[&Table]) -> Result<Option<Finding>> {
    let mut filled = Vec::new();
    for chunk in tables.chunks(CHUNK) {
        let one = |(at, table): (usize, &&Table)| {
            format!("SELECT {at}::int4 WHERE EXISTS (SELECT FROM ONLY {})", table.qualified())
        };
        let statement: Vec<String> = chunk.iter().enumerate().map(one).collect();
        let rows = target.query_typed(&statement.join(" UNION ALL "), &[]).await;
        let rows = rows.context(|| "looking whether the target's tables are empty".into())?;
        let places = rows.iter().filter_map(|row| usize::try_from(row.get::<_, i32>(0)).ok());
        filled.extend(places.filter_map(|at| chunk.get(at)).map(|table| table.qualified()));
    }
    filled.sort();
    let message = "The target's table has rows already, which would mix with the source's. Empty it.";
    let found = finding(Severity::Blocker, "target-table-not-empty", &filled, message);
    Ok(found
        .map(|found| found.fix(filled.iter().map(|name| format!("TRUNCATE {name};")).collect::<Vec<_>>().join("\n"))))
}
