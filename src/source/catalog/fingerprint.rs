//! A fingerprint of everything that DDL can change (I11).

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};

use super::USER_RELATION;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::scope::Selection;
use crate::source::version::Version;
use crate::sql;
use crate::timescale;

/// How the fingerprint names a table's file, on a server that has no TRUNCATE in its stream.
const FILE_OF_TABLE: &str = "file of table %s (PostgreSQL before 11 streams no TRUNCATE)";

/// That name for a table, quoted as `format('%I.%I')` does it.
pub(crate) fn file_of_table(quoted: &str) -> String {
    FILE_OF_TABLE.replace("%s", quoted)
}

/// Every object whose coming, going or change the stream does not show (I11), with a hash of its definition.
///
/// The key reads as an operator would name the object: `table "public"."orders"`, `column … of table …`.
///
/// A column's hash has the transaction that last wrote its row of the catalog (`xmin`): `ALTER … TYPE integer USING v + 1` of
/// an integer column rewrites every value, shows none of them in the stream, and leaves a definition that reads as before (H4).
/// The table's file alone would not tell, since TRUNCATE and VACUUM FULL change it too and lose nothing.
///
/// # Errors
/// Whatever the server says.
pub async fn fingerprint(client: &Client) -> Result<BTreeMap<String, String>> {
    fingerprint_of(client, None).await
}

/// The same of what is moved of a database: its relations with what hangs on them, and the functions and types of its schemas and
/// of its tables.
///
/// # Errors
/// Whatever the server says.
pub async fn fingerprint_of(client: &Client, selection: Option<&Selection>) -> Result<BTreeMap<String, String>> {
    let version = Version::of(client).await?;
    let oids = |oids: &BTreeSet<u32>| oids.iter().copied().collect::<Vec<u32>>();
    let chosen = selection.map(|selection| (oids(&selection.relations), oids(&selection.schemas)));
    let (of, parameters): (_, Vec<(&(dyn ToSql + Sync), Type)>) = match &chosen {
        None if timescale::source::extension(client).await?.is_some_and(|extension| extension.is_readable()) => {
            (Objects { relations: timescale::chunk::NOT_A_CHUNK, ..Objects::ALL }, Vec::new())
        }
        None => (Objects::ALL, Vec::new()),
        Some((relations, schemas)) => {
            (Objects::OF_PART, vec![(relations, Type::OID_ARRAY), (schemas, Type::OID_ARRAY)])
        }
    };
    let rows = client
        .query_typed(&fingerprint_query(version, Hash::OfTheServer, &of), &parameters)
        .await
        .context(|| "reading the catalog's fingerprint".into())
        .map_err(what_went_meanwhile)?;
    let hypertables = if selection.is_none() { timescale::settle::fingerprint(client).await? } else { BTreeMap::new() };
    // What went while the query ran has no description any more.
    let found = rows.into_iter().filter_map(|row| Some((row.get::<_, Option<String>>(0)?, row.get(1))));
    Ok(found.chain(hypertables).collect())
}

/// The query shows objects of its snapshot, and the server's functions look each up as it is now: of one that was dropped in between
/// they fail with an internal error, which has no translations. Read again, it is gone.
fn what_went_meanwhile(error: Error) -> Error {
    let text = error.to_string();
    let is_gone =
        ["cache lookup failed for ", "could not open relation with OID "].iter().any(|said| text.contains(said));
    match error.sqlstate() == Some(&SqlState::INTERNAL_ERROR) && is_gone {
        true => error.with_kind(ErrorKind::Transient),
        false => error,
    }
}

/// Catalogs whose rows are objects that the fingerprint has nothing special to say of: the catalog, which rows, and what is hashed of
/// a row `o`. The rows of servers may hold passwords, of which not even a hash is to leave the server (I10).
const OBJECTS: [(&str, &str, &str); 22] = [
    ("pg_am", "true", "o::text"),
    ("pg_amop", "true", "o::text"),
    ("pg_amproc", "true", "o::text"),
    ("pg_cast", "true", "o::text"),
    ("pg_collation", "true", "o::text"),
    ("pg_conversion", "true", "o::text"),
    ("pg_default_acl", "true", "o::text"),
    ("pg_event_trigger", "o.evtname !~ '^walferry'", "o::text"),
    ("pg_foreign_data_wrapper", "true", "o.xmin::text"),
    ("pg_foreign_server", "true", "o.xmin::text"),
    ("pg_language", "true", "o::text"),
    ("pg_namespace", "o.nspname !~ '^(pg_temp_|pg_toast|walferry(_ddl_|$))'", "o::text"),
    ("pg_opclass", "true", "o::text"),
    ("pg_operator", "true", "o::text"),
    ("pg_opfamily", "true", "o::text"),
    ("pg_policy", "true", "o::text"),
    ("pg_rewrite", "o.rulename <> '_RETURN'", "o::text"),
    ("pg_statistic_ext", "true", "o::text"),
    ("pg_transform", "true", "o::text"),
    (
        "pg_ts_config",
        "true",
        "o::text || coalesce((SELECT pg_catalog.string_agg(m::text, ' ' ORDER BY m::text) FROM pg_catalog.pg_ts_config_map m WHERE m.mapcfg = o.oid), '')",
    ),
    ("pg_ts_dict", "true", "o::text"),
    ("pg_type", "o.typrelid = 0 AND o.typtype IN ('b', 'd', 'e', 'r', 'p') AND o.typcategory <> 'A'", "o::text"),
];

/// All that is neither a relation nor a function, and the comments on everything; more branches of the query above.
fn everything_else(hash: Hash, which_others: Others<'_>) -> String {
    // What a row has is the server's own; that it is there is not.
    let hash = |hashed: &str| match hash {
        Hash::OfTheServer => format!("md5({hashed})"),
        Hash::OfTheDefinition => sql::literal(THERE),
    };
    let not_an_extensions = |class: &str, object: &str| {
        format!(
            "{object} >= 16384 AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = {class} AND d.objid = {object} \
                                               AND d.deptype = 'e')"
        )
    };
    let mut branches: String = OBJECTS
        .iter()
        .map(|(catalog, which, hashed)| {
            let class = format!("'pg_catalog.{catalog}'::regclass");
            let users = not_an_extensions(&class, "o.oid");
            format!(
                " UNION ALL SELECT pg_catalog.pg_describe_object({class}, o.oid, 0), {} FROM pg_catalog.{catalog} o \
                 WHERE {which} AND {users} AND {}",
                hash(hashed),
                which_others.of(catalog)
            )
        })
        .collect();
    branches.push_str(&format!(
        " UNION ALL SELECT format('constraint %I on type %s', o.conname, pg_catalog.format_type(o.contypid, NULL)), {} \
         FROM pg_catalog.pg_constraint o WHERE o.contypid <> 0 AND {} AND {}",
        hash("o::text"),
        not_an_extensions("'pg_catalog.pg_type'::regclass", "o.contypid"),
        which_others.of("pg_constraint")
    ));
    // Its options, which hold passwords, only a superuser may read.
    branches.push_str(&format!(
        " UNION ALL SELECT pg_catalog.pg_describe_object('pg_catalog.pg_user_mapping'::regclass, umid, 0), {} \
         FROM pg_catalog.pg_user_mappings WHERE {}",
        hash("srvid || '/' || umuser"),
        !matches!(which_others, Others::OfPart)
    ));
    branches.push_str(&format!(
        " UNION ALL SELECT 'comment on ' || pg_catalog.pg_describe_object(o.classoid, o.objoid, o.objsubid), {} \
         FROM pg_catalog.pg_description o WHERE {} AND o.objoid IS DISTINCT FROM pg_catalog.to_regnamespace('walferry') \
           AND o.classoid <> 'pg_catalog.pg_largeobject'::regclass AND {}",
        hash("o.description"),
        not_an_extensions("o.classoid", "o.objoid"),
        which_others.of("pg_description")
    ));
    branches
}

/// What a hash of the fingerprint is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    /// To be compared with an earlier one of the same server: it shows also what leaves a definition that reads as before.
    OfTheServer,
    /// To be compared with that of another server: only what a definition says.
    OfTheDefinition,
}

/// Conditions that say which relations (`c`), functions (`p`), types (`t`) and extensions (`e`) a fingerprint is of.
#[derive(Clone, Copy)]
pub(crate) struct Objects<'a> {
    pub relations: &'a str,
    pub functions: &'a str,
    pub types: &'a str,
    pub extensions: &'a str,
    /// Of the catalogs of all else, and of comments.
    pub others: Others<'a>,
}

/// Which rows of the catalogs that are neither of relations nor of functions.
#[derive(Clone, Copy)]
pub(crate) enum Others<'a> {
    /// A condition on a row `o` of any of them.
    Where(&'a str),
    /// What belongs to the relations and schemas of a part.
    OfPart,
}

impl<'a> Others<'a> {
    fn of(self, catalog: &str) -> &'a str {
        match self {
            Others::Where(condition) => condition,
            Others::OfPart => match catalog {
                "pg_policy" => "o.polrelid IN (SELECT unnest($1))",
                "pg_rewrite" => "o.ev_class IN (SELECT unnest($1))",
                "pg_statistic_ext" => "o.stxrelid IN (SELECT unnest($1))",
                "pg_namespace" => "o.oid IN (SELECT unnest($2))",
                "pg_type" => {
                    "(o.typnamespace IN (SELECT unnest($2)) \
                      OR o.oid IN (SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid IN (SELECT unnest($1))))"
                }
                // Of a domain.
                "pg_constraint" => {
                    "(o.connamespace IN (SELECT unnest($2)) \
                      OR o.contypid IN (SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid IN (SELECT unnest($1))))"
                }
                "pg_description" => {
                    "(o.classoid = 'pg_catalog.pg_class'::regclass AND o.objoid IN (SELECT unnest($1)))"
                }
                // Operators, casts, languages, servers and the like belong to no table.
                _ => "false",
            },
        }
    }
}

impl Objects<'_> {
    pub const ALL: Objects<'static> = Objects {
        relations: "true",
        functions: "true",
        types: "true",
        extensions: "true",
        others: Others::Where("true"),
    };

    /// Of the relations `$1` and the schemas `$2`.
    const OF_PART: Objects<'static> = Objects {
        relations: "(coalesce((SELECT x.indrelid FROM pg_catalog.pg_index x WHERE x.indexrelid = c.oid), c.oid) IN (SELECT unnest($1)) \
             OR c.relkind = 'c' AND c.relnamespace IN (SELECT unnest($2)))",
        functions: "(p.pronamespace IN (SELECT unnest($2)) \
             OR p.oid IN (SELECT t.tgfoid FROM pg_catalog.pg_trigger t WHERE t.tgrelid IN (SELECT unnest($1))))",
        types: "(t.typnamespace IN (SELECT unnest($2)) \
             OR t.oid IN (SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid IN (SELECT unnest($1))))",
        extensions: "true",
        others: Others::OfPart,
    };
}

/// The hash of a definition that is not compared: an object of which only its name is known on another server, in the server's
/// language.
pub(crate) const THERE: &str = "there";

/// The query behind [`fingerprint`].
pub(crate) fn fingerprint_query(version: Version, hash: Hash, of: &Objects<'_>) -> String {
    let Objects { relations, functions, types, extensions, others } = of;
    let (generated, (missing_value, has_missing)) = (version.generated(), version.missing_value());
    let column_of_the_server = format!(
        "a.xmin, a.attnum, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, {generated}, \
         a.attcollation, {has_missing}, {missing_value}, pg_catalog.pg_get_expr(d.adbin, d.adrelid)"
    );
    let column_of_the_definition = format!(
        "pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity <> '', {generated}, \
         pg_catalog.pg_get_expr(d.adbin, d.adrelid)"
    );
    // Where no TRUNCATE is in the stream, the table's file is what shows it; VACUUM FULL and CLUSTER change that too.
    let files = match hash {
        Hash::OfTheServer if !version.streams_truncate() => "c.relkind = 'r'",
        _ => "false",
    };
    let (relation, view, column, constraint, function) = match hash {
        Hash::OfTheServer => (
            "c.relowner, c.relacl::text,",
            "pg_catalog.pg_get_viewdef(c.oid)",
            column_of_the_server,
            "true",
            "p.prosrc, p.probin, p.prolang, p.prorettype, p.proretset, p.provolatile, p.prosecdef, p.proisstrict, p.proconfig, \
             p.proowner, p.proacl::text",
        ),
        // A view is printed otherwise by another version, and NOT NULL is a constraint only since 18. Identity columns are BY DEFAULT
        // on the target for the time of the migration (H22).
        Hash::OfTheDefinition => (
            "",
            "(SELECT string_agg(concat_ws(' ', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)), ',' ORDER BY a.attnum) \
              FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)",
            column_of_the_definition,
            "k.contype <> 'n'",
            "p.prosrc, p.probin, p.proretset, p.provolatile, p.prosecdef, p.proisstrict, p.proconfig",
        ),
    };
    format!(
        "SELECT (CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'i' THEN 'index' \
                   WHEN 'I' THEN 'partitioned index' WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' \
                   WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' ELSE 'type' END) \
                || ' ' || format('%I.%I', n.nspname, c.relname), \
                md5(concat_ws('/', c.relkind, c.relpersistence, c.relreplident, {relation} \
                    CASE WHEN c.relkind IN ('i', 'I') THEN pg_catalog.pg_get_indexdef(c.oid) END, \
                    CASE WHEN c.relkind IN ('v', 'm') THEN {view} END, \
                    pg_catalog.pg_get_expr(c.relpartbound, c.oid), \
                    (SELECT concat_ws('/', s.seqtypid, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle) \
                     FROM pg_catalog.pg_sequence s WHERE s.seqrelid = c.oid))) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p', 'i', 'I', 'S', 'v', 'm', 'f', 'c') AND c.relpersistence <> 't' AND {USER_RELATION} \
           AND {relations} \
         UNION ALL \
         SELECT format('column %I of table %I.%I', a.attname, n.nspname, c.relname), md5(concat_ws('/', {column})) \
         FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
         WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND {USER_RELATION} AND {relations} \
           AND a.attnum > 0 AND NOT a.attisdropped \
         UNION ALL \
         SELECT format({}, format('%I.%I', n.nspname, c.relname)), c.relfilenode::text \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE {files} AND c.relpersistence = 'p' AND {USER_RELATION} AND {relations} \
         UNION ALL \
         SELECT format('constraint %I of table %I.%I', k.conname, n.nspname, c.relname), \
                md5(concat_ws('/', pg_catalog.pg_get_constraintdef(k.oid), k.convalidated)) \
         FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE {USER_RELATION} AND {relations} AND {constraint} \
         UNION ALL \
         SELECT format('trigger %I on table %I.%I', t.tgname, n.nspname, c.relname), \
                md5(concat_ws('/', pg_catalog.pg_get_triggerdef(t.oid), t.tgenabled)) \
         FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE NOT t.tgisinternal AND {USER_RELATION} AND {relations} \
           AND t.tgfoid NOT IN (SELECT p.oid FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace s ON s.oid = p.pronamespace \
                                WHERE s.nspname = 'walferry') \
         UNION ALL \
         SELECT format('function %I.%I(%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)), \
                md5(concat_ws('/', {function})) \
         FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
         WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') AND n.nspname NOT LIKE 'pg\\_temp\\_%' \
           AND n.nspname NOT LIKE 'walferry\\_ddl\\_%' AND {functions} \
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_proc'::regclass \
                           AND d.objid = p.oid AND d.deptype = 'e') \
         UNION ALL \
         SELECT format('enum value %L of type %I.%I', e.enumlabel, n.nspname, t.typname), e.enumsortorder::text \
         FROM pg_catalog.pg_enum e JOIN pg_catalog.pg_type t ON t.oid = e.enumtypid \
         JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE {types} \
         UNION ALL \
         SELECT format('extension %I', e.extname), e.extversion FROM pg_catalog.pg_extension e WHERE {extensions}{}",
        sql::literal(FILE_OF_TABLE),
        everything_else(hash, *others)
    )
}

/// The objects that are not the same in two fingerprints.
pub fn changed_objects<'a>(
    before: &'a BTreeMap<String, String>,
    now: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = &'a str> {
    let gone = before.keys().filter(|object| !now.contains_key(*object));
    let other = now.iter().filter(|(object, hash)| before.get(*object) != Some(hash)).map(|(object, _)| object);
    gone.chain(other).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_while_the_catalog_is_read_is_read_again() {
        let kind = |state, text| what_went_meanwhile(Error::from_server(state, text)).kind();
        assert_eq!(kind("XX000", "cache lookup failed for namespace 16621"), ErrorKind::Transient);
        assert_eq!(kind("XX000", "could not open relation with OID 16621"), ErrorKind::Transient);
        assert_eq!(kind("XX000", "unexpected chunk number"), ErrorKind::Server);
        assert_eq!(kind("42501", "cache lookup failed for namespace 16621"), ErrorKind::Server);
    }
}
