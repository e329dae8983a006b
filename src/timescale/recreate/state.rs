//! Up to where continuous aggregates are materialized, and what of that is invalid: as the source has it at the drain, with the target's
//! ids. Their rows have come through the stream, so this fits them, and nothing is computed anew.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::super::prepare;
use super::super::source::{self, ContinuousAggregate};
use super::places::Places;
use super::recompute;
use crate::error::{Context, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

const THRESHOLD: &str = "continuous_aggs_invalidation_threshold";

/// The tables with that state, and the column that says of what it is.
const STATE: [(&str, &str); 5] = [
    (THRESHOLD, "hypertable_id"),
    ("continuous_aggs_watermark", "mat_hypertable_id"),
    ("continuous_aggs_hypertable_invalidation_log", "hypertable_id"),
    ("continuous_aggs_materialization_invalidation_log", "materialization_id"),
    ("continuous_aggs_materialization_ranges", "materialization_id"),
];

/// Writes it, in the session's open transaction, whose role is a superuser, or where every aggregate is recomputed.
///
/// What the target has of recomputed aggregates stays, and of what they stand on: what was logged there since they were computed. Where
/// others that were copied stand on the same, both logs are there: what is in one of them is computed once too often at worst.
///
/// # Errors
/// Whatever the servers say.
pub async fn carry(source: &Client, target: &Client) -> Result<()> {
    let (Some(of_source), Some(of_target)) = (source::settings(source).await?, source::settings(target).await?) else {
        return Ok(());
    };
    let places = Places::of(&of_source, &of_target);
    let recomputed = recompute::recorded(target).await?;
    let is_recomputed = |id: i32| recomputed.iter().any(|one| one.hypertable == id);
    let (computed, copied): (Vec<&ContinuousAggregate>, Vec<&ContinuousAggregate>) =
        of_source.aggregates.iter().partition(|aggregate| is_recomputed(aggregate.materialization));
    if copied.is_empty() {
        return Ok(());
    }
    let below = |aggregates: &[&ContinuousAggregate]| aggregates.iter().map(|one| one.raw).collect::<BTreeSet<i32>>();
    let (below_computed, below_copied) = (below(&computed), below(&copied));
    for (name, column) in STATE {
        let qualified = sql::qualified("_timescaledb_catalog", name);
        let doing = || format!("carrying over {name} of TimescaleDB");
        let there = "SELECT pg_catalog.to_regclass($1) IS NOT NULL";
        if !source.query_one(there, &[&qualified]).await?.get::<_, bool>(0)
            || !target.query_one(there, &[&qualified]).await?.get::<_, bool>(0)
        {
            continue;
        }
        // Of what aggregates stand on, or of their own rows.
        let is_below = column == "hypertable_id";
        let is_carried = |here: i32| if is_below { below_copied.contains(&here) } else { !is_recomputed(here) };
        let ids: Vec<(i32, i32)> = places.ids().filter(|(here, _)| is_carried(*here)).collect();
        let replaced = ids.iter().filter(|(here, _)| !is_below || !below_computed.contains(here));
        let replaced: Vec<String> = replaced.map(|(_, there)| there.to_string()).collect();
        let ids: Vec<String> = ids.iter().map(|(here, there)| format!("({here}, {there})")).collect();
        let rows = prepare::rows_as_json(source, &qualified, name, "", &Owners::default()).await?;
        let both = match name {
            THRESHOLD => {
                " ON CONFLICT (hypertable_id) DO UPDATE SET watermark = greatest(t.watermark, EXCLUDED.watermark)"
            }
            _ => "",
        };
        let statement = format!(
            "DELETE FROM {qualified} WHERE {column} = ANY ('{{{}}}'); INSERT INTO {qualified} AS t SELECT r.* \
             FROM pg_catalog.jsonb_array_elements({}::pg_catalog.jsonb) e \
             JOIN (VALUES {}) m(here, there) ON m.here = (e->>'{column}')::int, \
             pg_catalog.jsonb_populate_record(NULL::{qualified}, e || pg_catalog.jsonb_build_object('{column}', m.there)) r{both}",
            replaced.join(","),
            sql::literal(&rows),
            ids.join(", ")
        );
        target.batch_execute(&statement).await.context(doing)?;
    }
    Ok(())
}
