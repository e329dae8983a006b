//! In which schema an object is that is no relation.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::error::{Context, Result};

/// Schemas of objects: by the OIDs of an object's catalog and its own, that of its schema.
pub type Schemas = BTreeMap<(u32, u32), u32>;

/// The schema of every object that is no relation, by the OIDs of its catalog and its own.
///
/// # Errors
/// Whatever the server says.
pub async fn schemas_of_objects(client: &Client) -> Result<Schemas> {
    const CATALOGS: [(&str, &str); 14] = [
        ("pg_type", "typnamespace"),
        ("pg_proc", "pronamespace"),
        ("pg_operator", "oprnamespace"),
        ("pg_opclass", "opcnamespace"),
        ("pg_opfamily", "opfnamespace"),
        ("pg_collation", "collnamespace"),
        ("pg_conversion", "connamespace"),
        ("pg_ts_config", "cfgnamespace"),
        ("pg_ts_dict", "dictnamespace"),
        ("pg_ts_parser", "prsnamespace"),
        ("pg_ts_template", "tmplnamespace"),
        ("pg_statistic_ext", "stxnamespace"),
        ("pg_default_acl", "defaclnamespace"),
        ("pg_namespace", "oid"),
    ];
    // What comes with the server is in no dump.
    let select = |(catalog, namespace): &(&str, &str)| {
        format!(
            "SELECT tableoid, oid, {namespace} FROM pg_catalog.{catalog} WHERE {namespace} <> 'pg_catalog'::regnamespace"
        )
    };
    let selects: Vec<String> = CATALOGS.iter().map(select).collect();
    let rows = client
        .query_typed(&selects.join(" UNION ALL "), &[])
        .await
        .context(|| "reading the schemas of the catalog's objects".into())?;
    Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect())
}
