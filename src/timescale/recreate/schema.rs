//! Hypertables and continuous aggregates of a source as statements for a target that makes them again, and the dump without what the
//! extension makes by itself.
//!
//! Everything is made in the transaction that makes the schema: all tables, then the hypertables of them, then the aggregates in the
//! order in which they stand on each other, then what needs those ([`Instead`]).

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::super::create;
use super::super::declaration::{self, Compression, OrderBy, Span};
use super::super::source::{self, Database, Hypertable};
use super::{Aggregate, Recreation};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;
use crate::target::ledger::{SchemaItem, Section};
use crate::target::schema::{Instead, View};

/// What the extension's own functions do comes with what it makes.
const OWN_TRIGGERS: &[&str] = &["EXECUTE FUNCTION _timescaledb_functions.", "EXECUTE FUNCTION _timescaledb_internal."];

/// The schema of all that the extension makes by itself, where nobody has named another.
pub const OF_CHUNKS: &str = "_timescaledb_internal";

/// The partitions by hash of which nothing has to be said.
const USUAL_HASHES: [&str; 2] =
    ["_timescaledb_functions.get_partition_hash", "_timescaledb_internal.get_partition_hash"];

/// What of a source is made again, for the ledger, and what comes instead of its dump. In the transaction under whose snapshot it is
/// dumped.
///
/// # Errors
/// `Blocked` for what cannot be said to another TimescaleDB; else whatever the server says.
pub async fn read(source: &Client) -> Result<Option<(Recreation, Instead)>> {
    let Some(database) = source::settings(source).await? else { return Ok(None) };
    let extension = &database.extension.schema;
    let chosen_late = segments_chosen_late(source).await?;
    let (mut recreation, mut then) = (Recreation::default(), Vec::new());
    for hypertable in database.hypertables.iter().filter(|hypertable| hypertable.materializes.is_none()) {
        let declared = declared(hypertable)?;
        let mut statements = create::statements(&declared, extension, false);
        if chosen_late.contains(&hypertable.relid) {
            statements.iter_mut().for_each(|statement| *statement = statement.replace(NO_SEGMENTS, ""));
        }
        then.push(SchemaItem {
            section: Section::PreData,
            kind: "HYPERTABLE".into(),
            name: hypertable.qualified(),
            relid: None,
            // Indexes are those of the dump.
            statement: statements.join(";\n"),
        });
        recreation.hypertables.push(declared);
    }
    let mut views = Vec::new();
    for aggregate in &database.aggregates {
        let Some(rows) = database.hypertable(aggregate.materialization) else { continue };
        recreation.aggregates.push(Aggregate {
            schema: aggregate.schema.clone(),
            name: aggregate.name.clone(),
            rows: (rows.schema.clone(), rows.name.clone()),
        });
        views.push(view(source, &database, aggregate, (rows, chosen_late.contains(&rows.relid))).await?);
    }
    let without = source
        .query_typed(
            "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname IN ('_timescaledb_internal', '_timescaledb_cache') OR (n.nspname, c.relname) IN ( \
                 SELECT schema_name, table_name FROM _timescaledb_catalog.chunk \
                 UNION ALL SELECT schema_name, table_name FROM _timescaledb_catalog.hypertable WHERE compression_state = 2)",
            &[],
        )
        .await
        .context(|| "reading the relations of TimescaleDB".into())?;
    let without = without.iter().map(|row| row.get(0)).collect();
    let instead = Instead {
        without,
        then,
        views,
        without_triggers: OWN_TRIGGERS,
        without_extension: "timescaledb",
        by_owners: false,
    };
    Ok(Some((recreation, instead)))
}

/// What is said of segments where there are none.
const NO_SEGMENTS: &str = ", timescaledb.compress_segmentby = ''";

/// The hypertables of which nobody has said by what their compressed rows are put together: the extension chooses for each chunk.
async fn segments_chosen_late(source: &Client) -> Result<BTreeSet<u32>> {
    let query = "SELECT relid::pg_catalog.oid FROM _timescaledb_catalog.compression_settings WHERE segmentby IS NULL";
    let rows = source.query_typed(query, &[]).await.context(|| "reading the settings of compression".into())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A hypertable as it is declared.
///
/// # Errors
/// `Blocked` where a function of the user's own partitions it.
pub fn declared(hypertable: &Hypertable) -> Result<declaration::Hypertable> {
    let cannot = |what: &str| {
        Error::new(ErrorKind::Blocked, format!("the hypertable {} cannot be made again: {what}", hypertable.qualified()))
            .hint("Bring both servers to the same version of TimescaleDB, and connect as a superuser of the target: it is moved as it is then.")
    };
    if let Some(function) = own_partitioning(hypertable) {
        return Err(cannot(&format!("it is partitioned by the function {function}")));
    }
    let [time, further @ ..] = hypertable.dimensions.as_slice() else { return Err(cannot("it has no dimension")) };
    let span = |interval: Option<i64>| interval.map(Span::Integer).ok_or_else(|| cannot("a dimension has no length"));
    let mut dimensions = Vec::new();
    for dimension in further {
        let column = dimension.column.clone();
        dimensions.push(match dimension.partitions {
            Some(partitions) => declaration::Dimension::Hash { column, partitions },
            None => declaration::Dimension::Range { column, interval: span(dimension.interval)? },
        });
    }
    let order = |text: &String| OrderBy::parse(text).map_err(|wrong| cannot(&wrong));
    let compression = match hypertable.compression {
        true => Some(Compression {
            segment_by: hypertable.segment_by.clone(),
            order_by: hypertable.order_by.iter().map(order).collect::<Result<_>>()?,
            // Chunks are compressed as they are on the source.
            after: None,
            schedule: None,
        }),
        false => None,
    };
    Ok(declaration::Hypertable {
        schema: hypertable.schema.clone(),
        name: hypertable.name.clone(),
        time: time.column.clone(),
        chunk_interval: span(time.interval)?,
        dimensions,
        integer_now: time.integer_now.as_deref().and_then(declaration::qualified),
        compression,
        retention: None,
    })
}

/// A function that partitions a hypertable and is not the extension's.
pub fn own_partitioning(hypertable: &Hypertable) -> Option<&str> {
    let of_dimensions = hypertable.dimensions.iter().filter_map(|dimension| dimension.partitioning.as_deref());
    of_dimensions.into_iter().find(|function| !USUAL_HASHES.contains(function))
}

/// A continuous aggregate, empty, with its settings and indexes.
async fn view(
    source: &Client,
    database: &Database,
    aggregate: &source::ContinuousAggregate,
    (rows, chosen_late): (&Hypertable, bool),
) -> Result<View> {
    let name = aggregate.qualified();
    let doing = || format!("reading the continuous aggregate {name}");
    let relid = source
        .query_typed_one(&format!("SELECT {}::pg_catalog.regclass::pg_catalog.oid", sql::literal(&name)), &[])
        .await
        .context(doing)?
        .get(0);
    let create = format!(
        "CREATE MATERIALIZED VIEW {name} WITH (timescaledb.continuous, timescaledb.materialized_only = {}, \
         timescaledb.create_group_indexes = false) AS\n{}\nWITH NO DATA",
        aggregate.materialized_only,
        aggregate.definition.trim_end().trim_end_matches(';')
    );
    let mut after = Vec::new();
    let time = rows.dimensions.first();
    if let Some(interval) = time.and_then(|time| time.interval) {
        let function = sql::qualified(&database.extension.schema, "set_chunk_time_interval");
        after.push(format!("SELECT {function}({}::pg_catalog.regclass, {interval}::bigint)", sql::literal(&name)));
    }
    if rows.compression {
        let segments = sql::identifiers(rows.segment_by.iter().map(String::as_str));
        let order = match rows.order_by.is_empty() {
            true => String::new(),
            false => format!(", timescaledb.compress_orderby = {}", sql::literal(&rows.order_by.join(", "))),
        };
        let statement = format!(
            "ALTER MATERIALIZED VIEW {name} SET (timescaledb.compress, timescaledb.compress_segmentby = {}{order})",
            sql::literal(&segments)
        );
        after.push(if chosen_late { statement.replace(NO_SEGMENTS, "") } else { statement });
    }
    after.extend(indexes(source, &name, rows).await.context(doing)?);
    Ok(View { relid, name, create, after })
}

/// The indexes of an aggregate's rows but that by its time, which the extension makes.
async fn indexes(source: &Client, view: &str, rows: &Hypertable) -> Result<Vec<String>> {
    let found = source
        .query_typed(
            &format!(
                "SELECT pg_catalog.quote_ident(c.relname), substr(d.definition, strpos(d.definition, ' USING ')), \
                        c.relname LIKE {} \
                 FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid, \
                      LATERAL (SELECT pg_catalog.pg_get_indexdef(c.oid)) d(definition) \
                 WHERE i.indrelid = {} AND i.indisvalid ORDER BY c.relname",
                sql::literal(&format!("{}\\_%", rows.name.replace('_', "\\_"))),
                rows.relid
            ),
            &[],
        )
        .await?;
    let by_time = rows.dimensions.first().map(|time| time.column.clone()).unwrap_or_default();
    let of_the_extension = [&by_time, &sql::identifier(&by_time)].map(|column| format!(" USING btree ({column} DESC)"));
    let statement = |row: &tokio_postgres::Row| {
        let (name, definition, is_named_by_extension): (&str, &str, bool) = (row.get(0), row.get(1), row.get(2));
        if of_the_extension.iter().any(|own| own == definition) {
            return None;
        }
        // A name of the extension has the number that the rows' table has on the source.
        let name = if is_named_by_extension { "" } else { name };
        Some(format!("CREATE INDEX {name} ON {view}{definition}"))
    };
    Ok(found.iter().filter_map(statement).collect())
}
