//! What the source holds: tables with their columns and keys, and a fingerprint of everything that DDL can change.
//!
//! The catalog is read under the slot's snapshot, kept in the ledger, and is from then on the only authority on the
//! layout of a row in the stream: pgoutput sends the columns that are not dropped and not generated in the order of
//! `attnum` ("Logical Replication Message Formats" in the manual), which is exactly [`Table::columns`].

mod fingerprint;
mod older;
mod schemas;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::scope::Selection;
use super::version::Version;
use crate::error::{Context, Result};
use crate::sql;
use crate::timescale::{self, ChunkOf};

pub(crate) use fingerprint::{Hash, Objects, Others, THERE, file_of_table, fingerprint_query};
pub use fingerprint::{changed_objects, fingerprint, fingerprint_of};
pub use older::fingerprint_of_format_3;
pub use schemas::{Schemas, schemas_of_objects};

/// A table that holds rows of its own: an ordinary table or a leaf of a partitioned one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The relation's OID on the source, by which the stream names it.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Whether it is `UNLOGGED`, and so never in the stream (H14).
    pub unlogged: bool,
    /// Whether it is a partition of another table.
    pub is_partition: bool,
    /// What `REPLICA IDENTITY` says.
    pub identity: ReplicaIdentity,
    /// The columns a row in the stream has, in its order.
    pub columns: Vec<Column>,
    /// Positions in `columns` by which apply finds a row; empty where the table has no usable key.
    pub key: Vec<usize>,
    /// Whether two rows with different keys can still contend for one value: a second unique index, or an
    /// exclusion constraint.
    pub has_other_unique: bool,
    /// Size of the main fork in pages of 8 KiB, when the catalog was read.
    pub pages: i64,
    /// Size with TOAST, without indexes, in bytes.
    pub bytes: i64,
    /// The planner's estimate of the row count; -1 where it was never analysed.
    pub estimated_rows: f64,
    /// Updates and deletes that the source's statistics have counted.
    pub updates_and_deletes: i64,
    /// `pg_class.relfilenode`: another one shows that all rows may have been written anew, which is not streamed. `None` where
    /// an earlier version recorded the table.
    #[serde(default)]
    pub relfilenode: Option<u32>,
    /// What would fire for every change that is applied, were it not made ordinary for the time of the migration.
    #[serde(default)]
    pub firing: Vec<Firing>,
    /// The hypertable that it is a chunk of, to which its changes are applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<ChunkOf>,
    /// It is a hypertable: its rows are in its chunks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_hypertable: bool,
    /// Set where the target has it as a hypertable, whose rows are in other relations: the time column. The ledger says so, not the
    /// catalog, and so it is not kept with the rest.
    #[serde(skip)]
    pub hypertable: Option<String>,
}

/// A trigger or rule that is `ENABLE ALWAYS` or `ENABLE REPLICA`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firing {
    /// Name, unquoted.
    pub name: String,
    /// A rule, not a trigger.
    pub is_rule: bool,
    /// `ENABLE ALWAYS`, not `ENABLE REPLICA`.
    pub always: bool,
}

/// A column as the stream and COPY see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name, unquoted.
    pub name: String,
    /// `pg_attribute.attnum`.
    pub number: i16,
    /// OID of the type, on the source.
    pub type_oid: u32,
    /// `format_type` of it, such as `character varying(20)`.
    pub type_name: String,
    /// The type modifier, -1 for none.
    pub type_modifier: i32,
    /// `NOT NULL`.
    pub not_null: bool,
    /// `GENERATED ALWAYS AS IDENTITY` (H22).
    pub identity_always: bool,
    /// Binary output means the same on every server (H13).
    pub binary_safe: bool,
    /// Two values are equal exactly when their output is the same bytes (H20).
    pub byte_equal: bool,
    /// The schema of the equality operator of the type's default index class (`citext` brings its own); `None` for json, xml,
    /// point and others that have none, which cannot be in a key.
    pub equality_schema: Option<String>,
}

/// `ALTER TABLE … REPLICA IDENTITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaIdentity {
    /// The primary key, if there is one that can serve.
    Default,
    /// Nothing.
    Nothing,
    /// The whole old row.
    Full,
    /// A unique index.
    Index,
}

impl ReplicaIdentity {
    /// Reads `pg_class.relreplident`.
    pub(super) fn of_catalog(relreplident: &str) -> ReplicaIdentity {
        match relreplident {
            "n" => ReplicaIdentity::Nothing,
            "f" => ReplicaIdentity::Full,
            "i" => ReplicaIdentity::Index,
            _ => ReplicaIdentity::Default,
        }
    }
}

impl Table {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }

    /// Its name in a statement on the target that is to meet no table that inherits from it. The rows of a hypertable are in such
    /// tables, and TimescaleDB refuses `ONLY`.
    pub fn only_on_target(&self) -> String {
        let only = if self.hypertable.is_some() { "" } else { "ONLY " };
        format!("{only}{}", self.qualified())
    }

    /// What its changes are applied to: itself without what inherits from it, or the hypertable with all of its chunks, or the target's chunk.
    pub fn applied_to(&self) -> String {
        self.chunk.as_ref().map_or_else(|| self.only_on_target(), ChunkOf::applied_to)
    }

    /// What new rows are copied into: itself or the hypertable.
    pub fn inserted_into(&self) -> String {
        self.chunk.as_ref().map_or_else(|| self.qualified(), ChunkOf::qualified)
    }

    /// Whose changes all go to one session, if not by key: the table's own, or those of its hypertable.
    pub fn routed_as(&self) -> u32 {
        self.chunk.as_ref().map_or(self.relid, |chunk| chunk.relid)
    }

    /// Whether the stream can carry updates and deletes of this table (H27).
    pub fn has_usable_identity(&self) -> bool {
        match self.identity {
            ReplicaIdentity::Full => true,
            ReplicaIdentity::Nothing => false,
            ReplicaIdentity::Default | ReplicaIdentity::Index => !self.key.is_empty(),
        }
    }

    /// Whether every column can go in binary.
    pub fn binary_safe(&self) -> bool {
        self.columns.iter().all(|column| column.binary_safe)
    }

    /// The columns by which apply finds a row.
    pub fn key_columns(&self) -> impl Iterator<Item = &Column> {
        self.key.iter().map(|&position| &self.columns[position])
    }

    /// `--recopy 'schema.table' …`, to be pasted into a shell: the option that has these tables compared with the source again.
    pub fn recopy_option(tables: &[&Table]) -> String {
        let quoted =
            |table: &&Table| format!(" '{}'", format!("{}.{}", table.schema, table.name).replace('\'', "'\\''"));
        format!("--recopy{}", tables.iter().map(quoted).collect::<String>())
    }

    /// All columns as a list of quoted identifiers.
    pub fn column_list(&self) -> String {
        sql::identifiers(self.columns.iter().map(|column| column.name.as_str()))
    }
}

/// A relation that is not one of ours to migrate: a system schema, an extension's, or walferry's own.
pub(crate) const USER_RELATION: &str = "n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
     AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp\\_%' AND n.nspname NOT LIKE 'walferry\\_ddl\\_%' \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
                     AND d.objid = c.oid AND d.deptype = 'e')";

/// A trigger (`t`) that somebody made, and none behind a constraint. What PostgreSQL makes of it for each partition is internal in
/// 11 to 14.
pub(crate) const USER_TRIGGER: &str = "(NOT t.tgisinternal OR t.tgconstraint = 0 \
     OR EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.oid = t.tgconstraint AND k.contype = 't'))";

/// Types whose binary form is the same on every server and version: no OID of anything, no locale (H13).
///
/// bool bytea "char" name int8 int2 int4 text json point lseg path box polygon line cidr float4 float8 circle
/// macaddr8 macaddr inet bpchar varchar date time timestamp timestamptz interval timetz bit varbit numeric uuid jsonb
/// tsvector, the built-in ranges, and the arrays of the commonest of them (an array names its element's OID, which
/// for a built-in type is fixed).
const BINARY_SAFE_TYPES: &str = "16,17,18,19,20,21,23,25,114,600,601,602,603,604,628,650,700,701,718,774,829,869,1042,\
     1043,1082,1083,1114,1184,1186,1266,1560,1562,1700,2950,3802,3614,3904,3906,3908,3910,3912,3926,\
     1000,1001,1005,1007,1009,1014,1015,1016,1021,1022,1115,1182,1183,1185,1187,1231,2951,3807,199";

/// Types that are equal exactly when their output is: bool bytea name int8 int2 int4 text varchar date timestamp
/// timestamptz uuid (text and varchar only under a deterministic collation).
const BYTE_EQUAL_TYPES: &str = "16,17,19,20,21,23,25,1043,1082,1114,1184,2950";

/// Types that are compared by another type's operators: varchar by text's, cidr by inet's, reg* by oid's. A key of them is a key.
const BORROWED_EQUALITY: &str = "1043,650,24,2202,2203,2204,2205,2206,3734,3769,4089,4096,4191";

/// Reads every table that holds rows, largest first.
///
/// Run it inside the transaction whose snapshot the answer has to describe.
///
/// # Errors
/// Whatever the server says.
pub async fn tables(client: &Client) -> Result<Vec<Table>> {
    let version = Version::of(client).await?;
    let mut columns = columns(client, version).await?;
    let mut indexes = indexes(client, version).await?;
    let mut firing = firing(client).await?;
    // Of a table that somebody drops meanwhile the server tells no size.
    let rows = client
        .query_typed(
            &format!(
                "SELECT c.oid, n.nspname, c.relname, c.relpersistence = 'u', c.relispartition, c.relreplident::text, \
                        coalesce(pg_catalog.pg_relation_size(c.oid), 0) / pg_catalog.current_setting('block_size')::int8, \
                        coalesce(pg_catalog.pg_table_size(c.oid), 0), c.reltuples::float8, \
                        coalesce(pg_catalog.pg_stat_get_tuples_updated(c.oid) \
                                 + pg_catalog.pg_stat_get_tuples_deleted(c.oid), 0), \
                        c.relfilenode \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND {USER_RELATION} \
                 ORDER BY 8 DESC, 1"
            ),
            &[],
        )
        .await
        .context(|| "reading the catalog's tables".into())?;
    let mut tables = Vec::with_capacity(rows.len());
    for row in rows {
        let relid: u32 = row.get(0);
        let identity = ReplicaIdentity::of_catalog(row.get(5));
        let columns = columns.remove(&relid).unwrap_or_default();
        let indexes = indexes.remove(&relid).unwrap_or_default();
        let (key, has_other_unique) = choose_key(identity, &columns, &indexes);
        tables.push(Table {
            relid,
            schema: row.get(1),
            name: row.get(2),
            unlogged: row.get(3),
            is_partition: row.get(4),
            identity,
            columns,
            key,
            has_other_unique,
            pages: row.get(6),
            bytes: row.get(7),
            estimated_rows: row.get(8),
            updates_and_deletes: row.get(9),
            relfilenode: Some(row.get(10)),
            firing: firing.remove(&relid).unwrap_or_default(),
            chunk: None,
            is_hypertable: false,
            hypertable: None,
        });
    }
    timescale::chunk::arrange(client, &mut tables).await?;
    Ok(tables)
}

/// The tables of these that are moved.
pub fn chosen(mut tables: Vec<Table>, selection: Option<&Selection>) -> Vec<Table> {
    tables.retain(|table| selection.is_none_or(|selection| selection.relations.contains(&table.relid)));
    tables
}

async fn columns(client: &Client, version: Version) -> Result<BTreeMap<u32, Vec<Column>>> {
    let rows = client
        .query_typed(&columns_query(version, "true"), &[])
        .await
        .context(|| "reading the catalog's columns".into())?;
    let mut columns: BTreeMap<u32, Vec<Column>> = BTreeMap::new();
    for row in rows {
        columns.entry(row.get(0)).or_default().push(Column {
            name: row.get(1),
            number: row.get(2),
            type_oid: row.get(3),
            type_name: row.get(4),
            type_modifier: row.get(5),
            not_null: row.get(6),
            identity_always: row.get(7),
            binary_safe: row.get(8),
            byte_equal: row.get(9),
            equality_schema: row.get(10),
        });
    }
    Ok(columns)
}

/// What is read of the columns of those tables (`c`) that a condition holds of.
pub(super) fn columns_query(version: Version, of: &str) -> String {
    let (generated, deterministic, binary) = (version.generated(), version.deterministic(), version.streams_messages());
    format!(
        // A domain goes over the wire as its base type does, so the base decides. What is asked of a type is asked once for
        // each type (OFFSET 0 keeps it so), not for each of perhaps a hundred thousand columns.
        "WITH RECURSIVE a AS ( \
                   SELECT a.attrelid, a.attname, a.attnum, a.atttypid, a.atttypmod, a.attnotnull, a.attidentity, a.attcollation \
                   FROM pg_catalog.pg_attribute a \
                   JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.relkind = 'r' AND {USER_RELATION} AND a.attnum > 0 AND NOT a.attisdropped \
                     AND {generated} = '' AND {of}), \
                 base(type, root) AS ( \
                   SELECT DISTINCT atttypid, atttypid FROM a \
                   UNION ALL SELECT base.type, t.typbasetype FROM base JOIN pg_catalog.pg_type t ON t.oid = base.root \
                   WHERE t.typtype = 'd'), \
                 facts AS ( \
                   SELECT base.type, {binary} AND (b.oid IN ({BINARY_SAFE_TYPES}) OR b.typtype = 'e') AS binary_safe, \
                        b.oid IN ({BYTE_EQUAL_TYPES}) OR b.typtype = 'e' AS byte_equal, \
                        CASE WHEN b.typtype IN ('e', 'r', 'm', 'c') OR b.typcategory = 'A' OR b.oid IN ({BORROWED_EQUALITY}) THEN 'pg_catalog' \
                             ELSE (SELECT pg_catalog.min(on_.nspname) FROM pg_catalog.pg_opclass oc \
                                   JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree' \
                                   JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3 \
                                     AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype \
                                   JOIN pg_catalog.pg_operator o ON o.oid = ao.amopopr \
                                   JOIN pg_catalog.pg_namespace on_ ON on_.oid = o.oprnamespace \
                                   WHERE oc.opcdefault AND oc.opcintype = b.oid) END AS equality_schema \
                   FROM base JOIN pg_catalog.pg_type b ON b.oid = base.root WHERE b.typtype <> 'd' OFFSET 0) \
                 SELECT a.attrelid, a.attname, a.attnum, a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod), \
                        a.atttypmod, a.attnotnull, a.attidentity = 'a', facts.binary_safe, \
                        facts.byte_equal AND coalesce({deterministic}, true), facts.equality_schema \
                 FROM a JOIN facts ON facts.type = a.atttypid \
                 LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation \
                 ORDER BY a.attrelid, a.attnum"
    )
}

/// A column of a type, where the catalog no longer has the column itself; `None` when it does not have the type either. Its
/// number is 0, and it can serve in no key.
///
/// # Errors
/// Whatever the server says.
pub async fn column_of_type(client: &Client, name: &str, oid: u32, modifier: i32) -> Result<Option<Column>> {
    let row = client
        .query_opt(
            &format!(
                "WITH RECURSIVE base(oid, typtype, typbasetype) AS ( \
                   SELECT oid, typtype, typbasetype FROM pg_catalog.pg_type WHERE oid = $1 \
                   UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t \
                   JOIN base ON t.oid = base.typbasetype WHERE base.typtype = 'd') \
                 SELECT pg_catalog.format_type($1, $2), (oid IN ({BINARY_SAFE_TYPES}) OR typtype = 'e') \
                   AND pg_catalog.current_setting('server_version_num')::int4 >= 140000 \
                 FROM base WHERE typtype <> 'd'"
            ),
            &[&oid, &modifier],
        )
        .await
        .context(|| format!("asking for the type with OID {oid}"))?;
    Ok(row.map(|row| Column {
        name: name.to_owned(),
        number: 0,
        type_oid: oid,
        type_name: row.get(0),
        type_modifier: modifier,
        not_null: false,
        identity_always: false,
        binary_safe: row.get(1),
        byte_equal: false,
        equality_schema: None,
    }))
}

async fn firing(client: &Client) -> Result<BTreeMap<u32, Vec<Firing>>> {
    let rows = client
        .query_typed(
            &format!(
                "SELECT tgrelid, tgname::text, false, tgenabled = 'A' FROM pg_catalog.pg_trigger t \
                 WHERE {USER_TRIGGER} AND tgenabled IN ('A', 'R') \
                 UNION ALL SELECT ev_class, rulename::text, true, ev_enabled = 'A' FROM pg_catalog.pg_rewrite \
                 WHERE ev_enabled IN ('A', 'R') ORDER BY 1, 3, 2"
            ),
            &[],
        )
        .await
        .context(|| "reading the catalog's triggers and rules".into())?;
    let mut firing: BTreeMap<u32, Vec<Firing>> = BTreeMap::new();
    for row in rows {
        let one = Firing { name: row.get(1), is_rule: row.get(2), always: row.get(3) };
        firing.entry(row.get(0)).or_default().push(one);
    }
    Ok(firing)
}

/// A unique index or exclusion constraint of a table.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Index {
    pub columns: Vec<i16>,
    pub primary: bool,
    pub replica_identity: bool,
    /// Unique, valid, immediate, without predicate and without expressions: it can name one row.
    pub names_one_row: bool,
}

/// What is read of the indexes (`i`) of those tables that a condition holds of.
pub(super) fn indexes_query(version: Version, of: &str) -> String {
    let key_columns = version.key_columns();
    format!(
        "SELECT i.indrelid, \
                (SELECT array_agg(k.attnum ORDER BY k.ordinality) \
                 FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ordinality) \
                 WHERE k.ordinality <= {key_columns}), \
                i.indisprimary, i.indisreplident, \
                i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL \
         FROM pg_catalog.pg_index i WHERE (i.indisunique OR i.indisexclusion) AND {of} ORDER BY i.indrelid, i.indexrelid"
    )
}

async fn indexes(client: &Client, version: Version) -> Result<BTreeMap<u32, Vec<Index>>> {
    let rows = client
        .query_typed(&indexes_query(version, "true"), &[])
        .await
        .context(|| "reading the catalog's indexes".into())?;
    let mut indexes: BTreeMap<u32, Vec<Index>> = BTreeMap::new();
    for row in rows {
        indexes.entry(row.get(0)).or_default().push(Index {
            columns: row.get(1),
            primary: row.get(2),
            replica_identity: row.get(3),
            names_one_row: row.get(4),
        });
    }
    Ok(indexes)
}

/// Which columns find a row, and whether another index can make rows with different keys contend.
pub(super) fn choose_key(identity: ReplicaIdentity, columns: &[Column], indexes: &[Index]) -> (Vec<usize>, bool) {
    let positions = |index: &Index| -> Option<Vec<usize>> {
        let place = |number: &i16| {
            columns
                .iter()
                .position(|column| column.number == *number && column.not_null && column.equality_schema.is_some())
        };
        index.names_one_row.then(|| index.columns.iter().map(place).collect()).flatten()
    };
    let usable = |wanted: &dyn Fn(&Index) -> bool| indexes.iter().filter(|i| wanted(i)).find_map(&positions);
    let key = match identity {
        ReplicaIdentity::Nothing => None,
        ReplicaIdentity::Default => usable(&|index| index.primary),
        ReplicaIdentity::Index => usable(&|index| index.replica_identity),
        // The stream carries the whole old row: any key of the table can be taken out of it.
        ReplicaIdentity::Full => usable(&|index| index.primary).or_else(|| usable(&|_| true)),
    };
    let spare = indexes.len() - usize::from(key.is_some());
    (key.unwrap_or_default(), spare > 0)
}

#[cfg(test)]
impl Table {
    /// An ordinary table without columns, for tests.
    pub(crate) fn plain(schema: &str, name: &str) -> Table {
        Table {
            relid: 1,
            schema: schema.into(),
            name: name.into(),
            unlogged: false,
            is_partition: false,
            identity: ReplicaIdentity::Default,
            columns: Vec::new(),
            key: Vec::new(),
            has_other_unique: false,
            pages: 0,
            bytes: 0,
            estimated_rows: -1.0,
            updates_and_deletes: 0,
            relfilenode: None,
            firing: Vec::new(),
            chunk: None,
            is_hypertable: false,
            hypertable: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(number: i16, not_null: bool) -> Column {
        Column {
            name: format!("c{number}"),
            number,
            type_oid: 23,
            type_name: "integer".into(),
            type_modifier: -1,
            not_null,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: Some("pg_catalog".into()),
        }
    }

    fn index(columns: &[i16], primary: bool) -> Index {
        Index { columns: columns.to_vec(), primary, replica_identity: false, names_one_row: true }
    }

    #[test]
    fn the_option_that_compares_tables_again_can_be_pasted_into_a_shell() {
        let table = |name: &str| Table::plain("public", name);
        let (plain, hostile) = (table("t"), table("it's $(a) \"b\""));
        let option = Table::recopy_option(&[&plain, &hostile]);
        assert_eq!(option, r#"--recopy 'public.t' 'public.it'\''s $(a) "b"'"#);
    }

    #[test]
    fn the_primary_key_names_a_row_and_a_second_unique_index_is_noted() {
        let columns = [column(1, true), column(3, true)];
        let (key, other) = choose_key(ReplicaIdentity::Default, &columns, &[index(&[3, 1], true)]);
        assert_eq!((key, other), (vec![1, 0], false));
        let two = [index(&[1], true), index(&[3], false)];
        assert_eq!(choose_key(ReplicaIdentity::Default, &columns, &two), (vec![0], true));
    }

    #[test]
    fn a_nullable_or_missing_key_names_nothing() {
        let columns = [column(1, false)];
        assert_eq!(choose_key(ReplicaIdentity::Full, &columns, &[index(&[1], false)]), (vec![], true));
        assert_eq!(choose_key(ReplicaIdentity::Default, &columns, &[]), (vec![], false));
        assert_eq!(choose_key(ReplicaIdentity::Nothing, &columns, &[index(&[1], true)]).0, Vec::<usize>::new());
    }
}
