//! DDL in the stream (`--replicate-ddl`): event triggers on the source that put each statement into the stream as a transactional
//! message, at its place among the rows, with the tables as they are behind it.
//!
//! PostgreSQL fires no event trigger for roles, databases and tablespaces, nor for TRUNCATE (which is in the stream by itself),
//! VACUUM and CLUSTER. A new table joins the publication in the source's own transaction, and is decoded from there on: rows of the
//! same transaction are in the stream, so it is complete without a copy.

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use std::collections::BTreeMap;

use super::catalog::{self, Column, Hash, Index, Objects, Others, ReplicaIdentity, Table, USER_RELATION};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::version::Version;
use crate::sql;

/// Rows that CREATE TABLE AS has written are written once more up to this size, so that they are in the stream.
const ROWS_MAX: u64 = 1 << 30;

/// The prefix of a migration's messages.
pub fn prefix(id: &str) -> String {
    format!("walferry_{id}_ddl")
}

fn schema(id: &str) -> String {
    format!("walferry_ddl_{id}")
}

fn triggers(id: &str) -> [String; 3] {
    ["ddl", "drop", "rewrite"].map(|event| format!("walferry_{id}_{event}"))
}

/// Makes the event triggers, in place of those that are there. The publications have to be there.
///
/// # Errors
/// Whatever the server says; event triggers take a superuser, or the administrator's role of a service.
pub async fn create(client: &Client, id: &str, publication: &str, insert_only: &str) -> Result<()> {
    remove(client, id).await?;
    let version = Version::of(client).await?;
    let of = Objects {
        relations: "c.oid = ANY (v_relations)",
        functions: "p.oid = ANY (v_functions)",
        types: "t.oid = ANY (v_types)",
        extensions: "e.oid = ANY (v_extensions)",
        others: Others::Where("pg_catalog.age(o.xmin) <= v_age"),
    };
    // Objects are named in the server's language; only a superuser can choose it.
    let row = client
        .query_typed_one(
            "SELECT pg_catalog.current_setting('is_superuser')::bool, pg_catalog.current_setting('lc_messages')",
            &[],
        )
        .await
        .context(|| "asking for the language of the source".into())?;
    let (is_superuser, language): (bool, &str) = (row.get(0), row.get(1));
    let messages = match is_superuser && !language.is_empty() {
        true => format!(" SET lc_messages = {}", sql::literal(language)),
        false => String::new(),
    };
    let mut made = include_str!("ddl/trigger.sql").to_owned();
    let [name, name_drop, name_rewrite] = triggers(id);
    for (place, text) in [
        ("{schema}", sql::identifier(&schema(id))),
        ("{schema_name}", schema(id)),
        ("{others}", others_that_may_read(client).await?),
        ("{prefix}", sql::literal(&prefix(id))),
        ("{prefix_end}", sql::literal(&format!("{}_end", prefix(id)))),
        ("{publication}", sql::literal(publication)),
        ("{inserts}", sql::literal(insert_only)),
        ("{messages}", messages),
        ("{rows_max}", ROWS_MAX.to_string()),
        ("{user_relation}", USER_RELATION.to_owned()),
        ("{columns}", catalog::columns_query(version, "c.oid = ANY (v_relations)")),
        ("{indexes}", catalog::indexes_query(version, "i.indrelid = ANY (v_relations)")),
        (
            "{fingerprint}",
            catalog::fingerprint_query(
                version,
                Hash::OfTheServer,
                &Objects { relations: "c.oid = ANY (v_sent)", ..of },
            ),
        ),
        ("{definition}", catalog::fingerprint_query(version, Hash::OfTheDefinition, &of)),
        ("{name}", sql::identifier(&name)),
        ("{name_drop}", sql::identifier(&name_drop)),
        ("{name_rewrite}", sql::identifier(&name_rewrite)),
    ] {
        made = made.replace(place, &text);
    }
    let made = format!("BEGIN;\n{made}\nCOMMIT");
    client.batch_execute(&made).await.context(|| "making the event triggers for --replicate-ddl on the source".into())
}

/// Whom default privileges could let read a new table of ours.
async fn others_that_may_read(client: &Client) -> Result<String> {
    let rows = client
        .query_typed(
            "SELECT DISTINCT pg_catalog.quote_ident(r.rolname) FROM pg_catalog.pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) a \
             JOIN pg_catalog.pg_roles r ON r.oid = a.grantee \
             WHERE d.defaclobjtype = 'r' AND d.defaclrole = current_user::regrole AND a.grantee <> d.defaclrole ORDER BY 1",
            &[],
        )
        .await
        .context(|| "reading the default privileges of our role on the source".into())?;
    let others = std::iter::once("PUBLIC").chain(rows.iter().map(|row| row.get(0)));
    Ok(others.collect::<Vec<&str>>().join(", "))
}

/// What proves that a message is from the event triggers.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Key(…)")
    }
}

impl Key {
    /// Reads it; `None` where an earlier version made the event triggers, whose messages prove nothing.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn read(client: &Client, id: &str) -> Result<Option<Key>> {
        let table = sql::qualified(&schema(id), "key");
        let exists = format!("SELECT pg_catalog.to_regclass({}) IS NOT NULL", sql::literal(&table));
        let reading = || "reading what proves the messages of --replicate-ddl on the source".into();
        if !client.query_typed_one(&exists, &[]).await.context(reading)?.get::<_, bool>(0) {
            return Ok(None);
        }
        let row = client.query_typed_one(&format!("SELECT key FROM {table}"), &[]).await.context(reading)?;
        Ok(Some(Key(row.get(0))))
    }

    /// What a message of a transaction says, if it is from the event triggers.
    fn proven<'a>(&self, xid: u32, content: &'a [u8]) -> Option<&'a [u8]> {
        let (proof, said) = content.split_at_checked(64)?;
        let hash = |parts: &[&[u8]]| {
            let mut hash = Sha256::new();
            parts.iter().for_each(|part| hash.update(part));
            hash.finalize()
        };
        let inner = hash(&[&self.0, format!("{xid}/").as_bytes(), said]);
        let outer: String = hash(&[&self.0, &inner]).iter().map(|byte| format!("{byte:02x}")).collect();
        (outer.as_bytes() == proof).then_some(said)
    }
}

/// Removes them, where they are there. Answers what was.
///
/// # Errors
/// Whatever the server says.
pub async fn remove(client: &Client, id: &str) -> Result<Vec<String>> {
    let (schema, triggers) = (schema(id), triggers(id));
    let there = client
        .query(
            "SELECT 'event trigger ' || evtname FROM pg_catalog.pg_event_trigger WHERE evtname = ANY ($1) \
             UNION ALL SELECT 'schema ' || nspname FROM pg_catalog.pg_namespace WHERE nspname = $2 ORDER BY 1",
            &[&triggers.to_vec(), &schema],
        )
        .await
        .context(|| "looking for event triggers of --replicate-ddl on the source".into())?;
    let there: Vec<String> = there.iter().map(|row| row.get(0)).collect();
    if !there.is_empty() {
        // First what calls the functions, as a transaction of its own: nobody's DDL is to look for a function that is gone.
        let drops: Vec<String> =
            triggers.iter().map(|name| format!("DROP EVENT TRIGGER IF EXISTS {}", sql::identifier(name))).collect();
        let schema = format!("DROP SCHEMA IF EXISTS {} CASCADE", sql::identifier(&schema));
        for drop in [format!("BEGIN; {}; COMMIT", drops.join("; ")), schema] {
            let dropped = client.batch_execute(&drop).await;
            dropped.context(|| "removing the event triggers of --replicate-ddl from the source".into())?;
        }
    }
    Ok(there)
}

/// What the source says of one statement.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Told {
    /// The command tag.
    pub tag: String,
    /// What the client sent: the statement, several, or a call of what ran it.
    pub query: String,
    /// Why nothing else could be told.
    pub failed: Option<String>,
    /// Which of the statements of `query` with this tag it is; the first is 1.
    #[serde(default)]
    pub nth: usize,
    /// PL/pgSQL's lines of what ran it, the innermost first; empty when the client did.
    #[serde(default)]
    pub context: String,
    /// Who ran it, and how.
    #[serde(default)]
    pub caller: Caller,
    /// What makes the same table without its rows, of CREATE TABLE AS.
    #[serde(default)]
    pub statement: Option<String>,
    /// What it made or altered.
    #[serde(default)]
    pub commands: Vec<Object>,
    /// What it dropped.
    #[serde(default)]
    pub dropped: Vec<Dropped>,
    /// Tables whose rows it has written anew.
    #[serde(default)]
    pub rewritten: Vec<Rewritten>,
    /// Tables whose rows are not in the stream.
    #[serde(default)]
    pub unpublished: Vec<Unpublished>,
    /// The tables that it is about, behind it; see [`Told::tables`].
    #[serde(default)]
    tables: Vec<ToldTable>,
    /// Their columns.
    #[serde(default)]
    pub columns: Vec<ToldColumn>,
    #[serde(default)]
    indexes: Vec<ToldIndex>,
    /// What the fingerprint has of these objects behind it: the source's own hashes. Without tables whose rows are not in the stream.
    #[serde(default)]
    pub fingerprint: BTreeMap<String, String>,
    /// The same hashes as another server has them.
    #[serde(default)]
    pub definition: BTreeMap<String, String>,
}

/// Who ran a statement.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Caller {
    /// The role.
    pub role: String,
    /// Where it found names.
    pub search_path: String,
    /// What its text is read by.
    pub settings: BTreeMap<String, String>,
}

/// An object, as PostgreSQL names it.
#[derive(Clone, Debug, Deserialize)]
pub struct Object {
    /// `table`, `index` …
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name; GRANT has none.
    pub identity: Option<String>,
}

/// An object that is gone.
#[derive(Clone, Debug, Deserialize)]
pub struct Dropped {
    /// `table`, `table column` …
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name.
    pub identity: String,
    /// What the fingerprint calls it, where it is a part of a table.
    pub object: Option<String>,
    /// Its OID, of a relation.
    pub relid: Option<u32>,
}

impl Dropped {
    /// Whether the fingerprint's object is it, or a part of it.
    pub fn is(&self, object: &str) -> bool {
        if self.object.as_deref() == Some(object) {
            return true;
        }
        let rest = object.strip_prefix("partitioned ").unwrap_or(object).strip_prefix(self.kind.as_str());
        let part_of = match self.kind.as_str() {
            "table" => [" of table ", " on table "],
            "type" => [" of type ", " of type "],
            _ => return rest.is_some_and(|rest| rest.strip_prefix(' ') == Some(self.identity.as_str())),
        };
        rest.is_some_and(|rest| rest.strip_prefix(' ') == Some(self.identity.as_str()))
            || part_of
                .iter()
                .any(|word| object.strip_suffix(self.identity.as_str()).is_some_and(|before| before.ends_with(word)))
    }
}

/// A table that got a new file.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Rewritten {
    /// Its OID.
    pub relid: u32,
    /// Bits of `pg_event_trigger_table_rewrite_reason`: 1 persistence, 2 a column's default, 4 a column's type, 8 access method.
    pub reason: u32,
}

/// A table whose rows are not in the stream.
#[derive(Clone, Debug, Deserialize)]
pub struct Unpublished {
    /// Its OID.
    pub relid: u32,
    /// Its name.
    pub table: String,
    /// Why.
    pub error: String,
}

#[derive(Clone, Debug, Deserialize)]
struct ToldTable {
    relid: u32,
    schema: String,
    name: String,
    unlogged: bool,
    is_partition: bool,
    identity: String,
    relfilenode: u32,
    is_new: bool,
    is_about: bool,
}

/// A column, and the value of the rows that have none.
#[derive(Clone, Debug, Deserialize)]
pub struct ToldColumn {
    /// Of which table.
    pub relid: u32,
    /// What rows have that were there when it was added (`attmissingval`), as text.
    pub missing: Option<String>,
    /// The column.
    pub column: Column,
}

#[derive(Clone, Debug, Deserialize)]
struct ToldIndex {
    relid: u32,
    index: Index,
}

impl Told {
    /// Reads a message of a transaction; `None` for one that does not come from the event triggers.
    ///
    /// That something could not be told proves nothing, and nothing follows from it.
    ///
    /// # Errors
    /// `Other` for one that this version does not understand.
    pub fn parse(key: Option<&Key>, xid: u32, content: &[u8]) -> Result<Option<Told>> {
        let Some(key) = key else { return Told::read(content).map(Some) };
        match key.proven(xid, content) {
            Some(said) => Told::read(said).map(Some),
            None => Ok(Told::read(content).ok().filter(|told| told.failed.is_some())),
        }
    }

    fn read(content: &[u8]) -> Result<Told> {
        serde_json::from_slice(content)
            .map_err(|error| Error::new(ErrorKind::Other, format!("reading what the source told of DDL: {error}")))
    }

    /// Whether it names a table, or a whole that this is a part of.
    pub fn is_about(&self, relid: u32) -> bool {
        self.tables.iter().any(|table| table.relid == relid && table.is_about)
    }

    /// The tables that it is about, and others that were altered lately, as they are behind it, and whether it has made them.
    pub fn tables(&self) -> Vec<(Table, bool)> {
        let table = |told: &ToldTable| {
            let columns: Vec<Column> = self
                .columns
                .iter()
                .filter(|column| column.relid == told.relid)
                .map(|column| column.column.clone())
                .collect();
            let indexes: Vec<Index> =
                self.indexes.iter().filter(|index| index.relid == told.relid).map(|told| told.index.clone()).collect();
            let identity = ReplicaIdentity::of_catalog(&told.identity);
            let (key, has_other_unique) = catalog::choose_key(identity, &columns, &indexes);
            let table = Table {
                relid: told.relid,
                schema: told.schema.clone(),
                name: told.name.clone(),
                unlogged: told.unlogged,
                is_partition: told.is_partition,
                identity,
                columns,
                // Whatever it is, the target has the same by then, and is asked.
                firing: Vec::new(),
                chunk: None,
                is_hypertable: false,
                key,
                has_other_unique,
                pages: 0,
                bytes: 0,
                estimated_rows: -1.0,
                updates_and_deletes: 0,
                relfilenode: Some(told.relfilenode),
                hypertable: None,
            };
            (table, told.is_new)
        };
        self.tables.iter().map(table).collect()
    }

    /// What it is about, for people.
    pub fn objects(&self) -> String {
        let made = self
            .commands
            .iter()
            .filter_map(|object| object.identity.as_ref().map(|identity| format!("{} {identity}", object.kind)));
        let gone = self.dropped.iter().map(|object| format!("{} {}", object.kind, object.identity));
        let mut all: Vec<String> = made.chain(gone).collect();
        all.dedup();
        let more = all.len().saturating_sub(3);
        all.truncate(3);
        match (all.is_empty(), more) {
            (true, _) => String::new(),
            (false, 0) => format!(" ({})", all.join(", ")),
            (false, more) => format!(" ({} and {more} more)", all.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_takes_its_parts_along_and_nothing_else() {
        let table = Dropped { kind: "table".into(), identity: "public.a".into(), object: None, relid: Some(1) };
        for part in [
            "table public.a",
            "partitioned table public.a",
            "column x of table public.a",
            "trigger t on table public.a",
        ] {
            assert!(table.is(part), "{part}");
        }
        for other in ["table public.ab", "view public.a", "column x of table xpublic.a", "index public.a"] {
            assert!(!table.is(other), "{other}");
        }
        let column = Dropped {
            kind: "table column".into(),
            identity: "public.a.x".into(),
            object: Some("column x of table public.a".into()),
            relid: None,
        };
        assert!(column.is("column x of table public.a") && !column.is("column xy of table public.a"));
    }

    #[test]
    fn a_message_without_anything_but_its_failure_is_understood() {
        let content = br#"{"tag": "ALTER TABLE", "query": "ALTER TABLE a", "failed": "no"}"#;
        for key in [None, Some(&Key(vec![7; 32]))] {
            let told = Told::parse(key, 5, content).unwrap().unwrap();
            assert_eq!(told.failed.as_deref(), Some("no"));
            assert!(told.tables().is_empty());
        }
        assert!(Told::parse(None, 5, b"{}").is_err());
    }

    #[test]
    fn only_what_the_event_triggers_said_in_this_very_transaction_is_believed() {
        let said = r#"{"tag": "DROP TABLE", "query": "DROP TABLE a"}"#;
        // SELECT encode(sha256(k || sha256(k || convert_to('5/' || said, 'UTF8'))), 'hex') FROM (VALUES (decode(repeat('07', 32), 'hex'))) v(k)
        let proof = "6b3cb433c048dc6ace3340eb47cb788256c464e5b495df77013c3513e59b452e";
        let content = format!("{proof}{said}");
        let key = Key(vec![7; 32]);
        let parse =
            |xid, content: &str| Told::parse(Some(&key), xid, content.as_bytes()).unwrap().map(|told| told.query);
        assert_eq!(parse(5, &content).as_deref(), Some("DROP TABLE a"));
        assert_eq!(parse(6, &content), None, "said once, and said again in another transaction");
        assert_eq!(parse(5, &content.replace("TABLE a", "TABLE b")), None);
        assert_eq!(parse(5, said), None);
        assert_eq!(parse(5, ""), None);
        assert_eq!(format!("{key:?}"), "Key(…)");
    }
}
