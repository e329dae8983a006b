//! Which hypertable of the target stands for which of the source. The ids of the extension's catalog are others there, and so are the
//! names of the hypertables with the rows of aggregates: those go by their view, all others by their name, dimensions by their column.

use std::collections::BTreeMap;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::super::source::{self, Chunk, Database, Hypertable, Slice};
use super::{Recreation, is_recreated};
use crate::error::{Context, Error, ErrorKind, Result};

/// A hypertable with the rows of an aggregate, as each server calls it: schema and name, unquoted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// On the source.
    pub source: (String, String),
    /// On the target.
    pub target: (String, String),
}

/// What the target calls the hypertables with the rows of aggregates; those that are not made yet are not among them.
///
/// # Errors
/// Whatever the target says.
pub async fn names(target: &Client, recreation: &Recreation) -> Result<Vec<Named>> {
    if source::extension(target).await?.is_none() {
        return Ok(Vec::new());
    }
    let (schemas, views): (Vec<&str>, Vec<&str>) =
        recreation.aggregates.iter().map(|aggregate| (aggregate.schema.as_str(), aggregate.name.as_str())).unzip();
    let rows = target
        .query_typed(
            "SELECT u.number, h.schema_name::text, h.table_name::text \
             FROM unnest($1, $2) WITH ORDINALITY u(schema, view, number) \
             JOIN _timescaledb_catalog.continuous_agg a ON (a.user_view_schema::text, a.user_view_name::text) = (u.schema, u.view) \
             JOIN _timescaledb_catalog.hypertable h ON h.id = a.mat_hypertable_id ORDER BY 1",
            &[(&schemas, Type::TEXT_ARRAY), (&views, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "reading the target's continuous aggregates".into())?;
    let named = |row: &tokio_postgres::Row| {
        let at = usize::try_from(row.get::<_, i64>(0) - 1).ok()?;
        let source = recreation.aggregates.get(at)?.rows.clone();
        Some(Named { source, target: (row.get(1), row.get(2)) })
    };
    Ok(rows.iter().filter_map(named).collect())
}

/// A hypertable of the target, for one of the source.
#[derive(Clone, Debug)]
struct Place {
    hypertable: Hypertable,
    /// Its dimensions' ids by those of the source.
    dimensions: BTreeMap<i32, i32>,
}

/// The target's hypertables, by the ids that the source has for them.
#[derive(Clone, Debug, Default)]
pub struct Places(BTreeMap<i32, Place>);

impl Places {
    /// Pairs them.
    pub fn of(of_source: &Database, of_target: &Database) -> Places {
        let view = |database: &Database, id: i32| {
            let aggregate = database.aggregates.iter().find(|aggregate| aggregate.materialization == id);
            aggregate.map(|aggregate| (aggregate.schema.clone(), aggregate.name.clone()))
        };
        let stands_for = |hypertable: &Hypertable| {
            let wanted = view(of_source, hypertable.id);
            let is_it = |other: &&Hypertable| match (&wanted, view(of_target, other.id)) {
                (Some(view), Some(other)) => *view == other,
                (None, None) => (&other.schema, &other.name) == (&hypertable.schema, &hypertable.name),
                _ => false,
            };
            let found = of_target.hypertables.iter().find(is_it)?;
            let dimension = |dimension: &source::Dimension| {
                let other = found.dimensions.iter().find(|other| other.column == dimension.column)?;
                Some((dimension.id, other.id))
            };
            let dimensions = hypertable.dimensions.iter().filter_map(dimension).collect();
            Some((hypertable.id, Place { hypertable: found.clone(), dimensions }))
        };
        Places(of_source.hypertables.iter().filter_map(stands_for).collect())
    }

    /// Reads both servers, and pairs them.
    ///
    /// # Errors
    /// Whatever the servers say.
    pub async fn read(source: &Client, target: &Client) -> Result<Places> {
        let (of_source, of_target) = (source::settings(source).await?, source::settings(target).await?);
        Ok(of_source.zip(of_target).map_or_else(Places::default, |(source, target)| Places::of(&source, &target)))
    }

    /// The target's hypertable.
    ///
    /// # Errors
    /// `Other` where it has none.
    pub fn hypertable(&self, of_source: &Hypertable) -> Result<&Hypertable> {
        self.0.get(&of_source.id).map(|place| &place.hypertable).ok_or_else(|| {
            let text = format!("the target has no hypertable {} any more", of_source.qualified());
            Error::new(ErrorKind::Other, text).hint("Begin anew: `walferry clean`, then `walferry migrate`.")
        })
    }

    /// The ids, of the source and of the target.
    pub fn ids(&self) -> impl Iterator<Item = (i32, i32)> {
        self.0.iter().map(|(id, place)| (*id, place.hypertable.id))
    }

    /// A hypertable of the target by the source's id.
    pub fn by_id(&self, id: i32) -> Option<&Hypertable> {
        self.0.get(&id).map(|place| &place.hypertable)
    }

    /// A chunk of the source as one of the target would be: with the target's ids of hypertable and dimensions.
    pub fn chunk(&self, chunk: &Chunk) -> Option<Chunk> {
        let place = self.0.get(&chunk.hypertable)?;
        let slice = |slice: &Slice| Some(Slice { dimension: *place.dimensions.get(&slice.dimension)?, ..*slice });
        let slices = chunk.slices.iter().filter_map(slice).collect();
        Some(Chunk { hypertable: place.hypertable.id, slices, ..chunk.clone() })
    }
}

/// Chunks of the source with the ids that the target has for what they are in; the same where those are the source's.
///
/// # Errors
/// Whatever the servers say.
pub async fn on_target(source: &Client, target: &Client, chunks: Vec<Chunk>) -> Result<Vec<Chunk>> {
    if !is_recreated(target).await? {
        return Ok(chunks);
    }
    let places = Places::read(source, target).await?;
    Ok(chunks.iter().filter_map(|chunk| places.chunk(chunk)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timescale::source::{ContinuousAggregate, Dimension, Extension};

    fn hypertable(id: i32, name: &str, dimension: i32) -> Hypertable {
        let dimension = Dimension {
            id: dimension,
            column: "at".into(),
            column_type: "date".into(),
            interval: Some(1),
            partitions: None,
            integer_now: None,
            partitioning: None,
        };
        Hypertable {
            id,
            relid: 1,
            schema: "s".into(),
            name: name.into(),
            chunk_schema: "c".into(),
            chunk_prefix: "p".into(),
            dimensions: vec![dimension],
            compression: false,
            compressed_hypertable: None,
            segment_by: Vec::new(),
            order_by: Vec::new(),
            materializes: None,
            replication_factor: None,
        }
    }

    fn database(hypertables: Vec<Hypertable>, (view, materialization): (&str, i32)) -> Database {
        let aggregate = ContinuousAggregate {
            schema: "public".into(),
            name: view.into(),
            materialization,
            raw: 1,
            parent: None,
            definition: String::new(),
            materialized_only: true,
            watermark: None,
        };
        let extension =
            Extension { version: "2".into(), schema: "public".into(), license: String::new(), loaded: true };
        Database { extension, hypertables, chunks: Vec::new(), aggregates: vec![aggregate], jobs: Vec::new() }
    }

    #[test]
    fn rows_of_aggregates_are_found_by_their_view_though_another_has_the_name() {
        let source = database(vec![hypertable(1, "m", 1), hypertable(6, "mat_6", 5)], ("hourly", 6));
        let target =
            database(vec![hypertable(6, "m", 7), hypertable(9, "mat_9", 8), hypertable(10, "mat_6", 9)], ("hourly", 9));
        let places = Places::of(&source, &target);
        assert_eq!(places.ids().collect::<Vec<_>>(), [(1, 6), (6, 9)]);
        let chunk = Chunk {
            id: 3,
            relid: 3,
            schema: "c".into(),
            name: "k".into(),
            hypertable: 6,
            slices: vec![Slice { dimension: 5, start: 0, end: 4 }],
            status: 0,
            compressed: None,
            tiered: false,
        };
        let there = places.chunk(&chunk).unwrap();
        assert_eq!((there.hypertable, there.slices[0].dimension, there.slices[0].end), (9, 8, 4));
    }
}
