//! Which objects of the source's catalog are dealt with by a change that the target has too (I11).
//!
//! Only what the change is about: the columns that came, went or changed, on the table and on the rest of its partitions, and
//! what hangs on the table (indexes, constraints, triggers). And only what is the same on both servers now: anything else stays
//! in the way of the cutover, under its name.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::ask;
use crate::error::Result;
use crate::source::catalog::{self, Table};
use crate::target::ledger;

/// The fingerprints that are compared.
pub(super) struct Catalogs {
    recorded: BTreeMap<String, String>,
    on_source: BTreeMap<String, String>,
    on_target: BTreeMap<String, String>,
}

impl Catalogs {
    pub async fn read(source: &Client, target: &Client) -> Result<Catalogs> {
        let recorded = ledger::fingerprint(target).await?;
        let mut on_source = catalog::fingerprint(source).await?;
        if let Some(migration) = ledger::load(target).await?
            && let Some(selection) = migration.scope.select(source).await?
        {
            // What is new beside the part that is moved concerns nobody.
            let part = catalog::fingerprint_of(source, Some(&selection)).await?;
            on_source.retain(|object, _| recorded.contains_key(object) || part.contains_key(object));
        }
        Ok(Catalogs { recorded, on_source, on_target: catalog::fingerprint(target).await? })
    }

    /// The objects, with their hashes on the source now; `all` columns, where the rows are compared too.
    pub async fn dealt_with(
        &self,
        source: &Client,
        target: &Client,
        before: &Table,
        after: &Table,
        all: bool,
    ) -> Result<Vec<(String, Option<String>)>> {
        let Catalogs { recorded, on_source, on_target } = self;
        let tables = tables(source, before, all).await?;
        let mut dealt = Vec::new();

        let columns = touched(before, after, all);
        let (facts_of_source, facts_of_target) =
            (facts(source, &tables, &columns).await?, facts(target, &tables, &columns).await?);
        for (object, fact) in &facts_of_source {
            if facts_of_target.get(object) == Some(fact) {
                dealt.push((object.clone(), on_source.get(object).cloned()));
            }
        }
        if all {
            // Whatever became of its rows without a word in the stream, they are compared now.
            let files = tables.iter().map(|table| catalog::file_of_table(&table.quoted));
            dealt.extend(files.filter_map(|file| on_source.get(&file).map(|hash| (file.clone(), Some(hash.clone())))));
        }
        // Of other objects the hash has nothing that is the server's own.
        let names: BTreeSet<&String> = tables.iter().map(|table| &table.quoted).collect();
        let hangs_on_it = |object: &str| {
            let of = |word: &str| object.rsplit_once(word).is_some_and(|(_, table)| names.contains(&table.to_owned()));
            object.starts_with("index ")
                || object.starts_with("partitioned index ")
                || (object.starts_with("constraint ") && of(" of table "))
                || (object.starts_with("trigger ") && of(" on table "))
                || ["table ", "partitioned table "]
                    .iter()
                    .any(|kind| object.strip_prefix(kind).is_some_and(|table| names.contains(&table.to_owned())))
        };
        for object in catalog::changed_objects(recorded, on_source) {
            if hangs_on_it(object) && on_source.get(object) == on_target.get(object) {
                dealt.push((object.to_owned(), on_source.get(object).cloned()));
            }
        }
        Ok(dealt)
    }
}

impl Catalogs {
    /// Whether the columns that a change is not about are what was recorded: none of them was written anew by an ALTER TABLE.
    pub async fn are_as_recorded(&self, source: &Client, before: &Table, after: &Table) -> Result<bool> {
        let touched = touched(before, after, false);
        let others = before.columns.iter().map(|column| &column.name).filter(|name| !touched.contains(name));
        let others: Vec<String> = others.cloned().collect();
        let (schemas, names) = ([&before.schema], [&before.name]);
        let query = "SELECT pg_catalog.format('column %I of table %I.%I', k.name, t.schema, t.name) \
             FROM unnest($1::text[], $2::text[]) t(schema, name), unnest($3::text[]) k(name)";
        let objects = ask(source, query, &[&&schemas[..], &&names[..], &others]).await?;
        Ok(objects.iter().all(|row| {
            let object: &str = row.get(0);
            self.recorded.get(object).is_some_and(|hash| self.on_source.get(object) == Some(hash))
        }))
    }
}

/// A table by its name, and as the fingerprint quotes it.
struct Named {
    schema: String,
    name: String,
    quoted: String,
}

/// The table under its old and its new name, and the rest of the partitioned table that it is a part of; when it is `alone`, of that only
/// what has no rows of its own.
async fn tables(source: &Client, before: &Table, alone: bool) -> Result<Vec<Named>> {
    // As pg_partition_tree and pg_partition_root do it from 12 on.
    let query = "WITH RECURSIVE above(oid) AS ( \
           SELECT $1::oid UNION ALL SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN above ON i.inhrelid = above.oid \
           JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition), \
         tree(oid) AS ( \
           SELECT oid FROM above UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid \
           JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition) \
         SELECT n.nspname, c.relname, pg_catalog.format('%I.%I', n.nspname, c.relname) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.oid = $1 OR (c.relkind = 'p' OR NOT $4) \
           AND c.oid IN (SELECT oid FROM tree) \
         UNION SELECT $2::text, $3::text, pg_catalog.format('%I.%I', $2::text, $3::text)";
    let rows = ask(source, query, &[&before.relid, &before.schema, &before.name, &alone]).await?;
    Ok(rows.iter().map(|row| Named { schema: row.get(0), name: row.get(1), quoted: row.get(2) }).collect())
}

/// The names of the columns that the change is about; all, where the table has another name.
fn touched(before: &Table, after: &Table, all: bool) -> Vec<String> {
    let renamed = all || (&before.schema, &before.name) != (&after.schema, &after.name);
    let is_in = |table: &Table, column: &catalog::Column| {
        table.columns.iter().any(|other| {
            (other.number, &other.name, &other.type_name) == (column.number, &column.name, &column.type_name)
        })
    };
    let gone = before.columns.iter().filter(|column| renamed || !is_in(after, column));
    let come = after.columns.iter().filter(|column| renamed || !is_in(before, column));
    gone.chain(come).map(|column| column.name.clone()).collect::<BTreeSet<String>>().into_iter().collect()
}

/// What can be compared of columns between two servers, by the fingerprint's names for them; `None` for those that are not there.
async fn facts(client: &Client, tables: &[Named], columns: &[String]) -> Result<BTreeMap<String, Option<String>>> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    // GENERATED ALWAYS is BY DEFAULT on the target for the time of the migration (H22).
    let query = "SELECT pg_catalog.format('column %I of table %I.%I', k.name, t.schema, t.name), \
                (SELECT concat_ws('/', pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity <> '', \
                                  coalesce(pg_catalog.to_jsonb(a)->>'attgenerated', ''), \
                                  pg_catalog.pg_get_expr(d.adbin, d.adrelid)) \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                 LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
                 WHERE n.nspname = t.schema AND c.relname = t.name AND a.attname = k.name) \
         FROM unnest($1::text[], $2::text[]) t(schema, name), unnest($3::text[]) k(name)";
    let rows = ask(client, query, &[&schemas, &names, &columns]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
