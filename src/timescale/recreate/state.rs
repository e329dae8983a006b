//! Up to where continuous aggregates are materialized, and what of that is invalid: as the source has it at the drain, with the target's
//! ids. Their rows have come through the stream, so this fits them, and nothing is computed anew.

use tokio_postgres::Client;

use super::super::prepare;
use super::places::Places;
use crate::error::{Context, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// The tables with that state, and the column that says of what it is.
const STATE: [(&str, &str); 5] = [
    ("continuous_aggs_invalidation_threshold", "hypertable_id"),
    ("continuous_aggs_watermark", "mat_hypertable_id"),
    ("continuous_aggs_hypertable_invalidation_log", "hypertable_id"),
    ("continuous_aggs_materialization_invalidation_log", "materialization_id"),
    ("continuous_aggs_materialization_ranges", "materialization_id"),
];

/// Writes it, in the session's open transaction. The session's role is a superuser.
///
/// # Errors
/// Whatever the servers say.
pub async fn carry(source: &Client, target: &Client) -> Result<()> {
    let places = Places::read(source, target).await?;
    let ids: Vec<String> = places.ids().map(|(here, there)| format!("({here}, {there})")).collect();
    if ids.is_empty() {
        return Ok(());
    }
    for (name, column) in STATE {
        let qualified = sql::qualified("_timescaledb_catalog", name);
        let doing = || format!("carrying over {name} of TimescaleDB");
        let there = "SELECT pg_catalog.to_regclass($1) IS NOT NULL";
        if !source.query_one(there, &[&qualified]).await?.get::<_, bool>(0)
            || !target.query_one(there, &[&qualified]).await?.get::<_, bool>(0)
        {
            continue;
        }
        let rows = prepare::rows_as_json(source, &qualified, name, "", &Owners::default()).await?;
        let statement = format!(
            "DELETE FROM {qualified}; INSERT INTO {qualified} SELECT r.* \
             FROM pg_catalog.jsonb_array_elements({}::pg_catalog.jsonb) e \
             JOIN (VALUES {}) m(here, there) ON m.here = (e->>'{column}')::int, \
             pg_catalog.jsonb_populate_record(NULL::{qualified}, e || pg_catalog.jsonb_build_object('{column}', m.there)) r",
            sql::literal(&rows),
            ids.join(", ")
        );
        target.batch_execute(&statement).await.context(doing)?;
    }
    Ok(())
}
