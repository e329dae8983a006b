//! The fingerprint as walferry made it up to the ledger's format 3, when it knew less: asked once more when such a ledger is taken up.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::USER_RELATION;
use crate::error::{Context, Result};
use crate::source::version::Version;

/// What [`super::fingerprint`] was: without owners and privileges, and of relations, functions, values of enums and extensions only.
///
/// # Errors
/// Whatever the server says.
pub async fn fingerprint_of_format_3(client: &Client) -> Result<BTreeMap<String, String>> {
    let version = Version::of(client).await?;
    let (generated, (missing_value, has_missing)) = (version.generated(), version.missing_value());
    let rows = client
        .query_typed(
            &format!(
                "SELECT (CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'i' THEN 'index' \
                           WHEN 'I' THEN 'partitioned index' WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' \
                           WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' ELSE 'type' END) \
                        || ' ' || format('%I.%I', n.nspname, c.relname), \
                        md5(concat_ws('/', c.relkind, c.relpersistence, c.relreplident, \
                            CASE WHEN c.relkind IN ('i', 'I') THEN pg_catalog.pg_get_indexdef(c.oid) END, \
                            CASE WHEN c.relkind IN ('v', 'm') THEN pg_catalog.pg_get_viewdef(c.oid) END, \
                            pg_catalog.pg_get_expr(c.relpartbound, c.oid), \
                            (SELECT concat_ws('/', s.seqtypid, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle) \
                             FROM pg_catalog.pg_sequence s WHERE s.seqrelid = c.oid))) \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'i', 'I', 'S', 'v', 'm', 'f', 'c') AND c.relpersistence <> 't' AND {USER_RELATION} \
                 UNION ALL \
                 SELECT format('column %I of table %I.%I', a.attname, n.nspname, c.relname), \
                        md5(concat_ws('/', a.xmin, a.attnum, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, \
                            a.attidentity, {generated}, a.attcollation, \
                            {has_missing}, {missing_value}, pg_catalog.pg_get_expr(d.adbin, d.adrelid))) \
                 FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
                 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND {USER_RELATION} \
                   AND a.attnum > 0 AND NOT a.attisdropped \
                 UNION ALL \
                 SELECT format('constraint %I of table %I.%I', k.conname, n.nspname, c.relname), \
                        md5(concat_ws('/', pg_catalog.pg_get_constraintdef(k.oid), k.convalidated)) \
                 FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE {USER_RELATION} \
                 UNION ALL \
                 SELECT format('trigger %I on table %I.%I', t.tgname, n.nspname, c.relname), \
                        md5(concat_ws('/', pg_catalog.pg_get_triggerdef(t.oid), t.tgenabled)) \
                 FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE NOT t.tgisinternal AND {USER_RELATION} \
                 UNION ALL \
                 SELECT format('function %I.%I(%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)), \
                        md5(concat_ws('/', p.prosrc, p.probin, p.prolang, p.prorettype, p.proretset, p.provolatile, p.prosecdef, \
                            p.proisstrict, p.proconfig)) \
                 FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
                 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') AND n.nspname NOT LIKE 'pg\\_temp\\_%' \
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_proc'::regclass \
                                   AND d.objid = p.oid AND d.deptype = 'e') \
                 UNION ALL \
                 SELECT format('enum value %L of type %I.%I', e.enumlabel, n.nspname, t.typname), e.enumsortorder::text \
                 FROM pg_catalog.pg_enum e JOIN pg_catalog.pg_type t ON t.oid = e.enumtypid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace \
                 UNION ALL \
                 SELECT format('extension %I', e.extname), e.extversion FROM pg_catalog.pg_extension e"
            ),
            &[],
        )
        .await
        .context(|| "reading the catalog's fingerprint as an older walferry did".into())?;
    Ok(rows.into_iter().map(|row| (row.get(0), row.get(1))).collect())
}
