//! Single rows of a hypertable: found in its chunks, whether compressed or not, and moved between them.
//!
//! A `ctid` names no row here: it is another one in each chunk, and a compressed chunk has none to show. An update cannot carry a row to
//! another chunk either. So a row goes and comes back, in one statement, and TimescaleDB decompresses what that meets.

use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::target::serial::{condition, parameter};

/// For the transaction that looks for rows of a hypertable. However much of a chunk a change decompresses, the source has made it.
pub(crate) const SETTINGS: &str = "SELECT pg_catalog.set_config('plan_cache_mode', 'force_custom_plan', true), \
     pg_catalog.set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true)";

/// In an INSERT: identity columns of a hypertable stay `GENERATED ALWAYS` during the migration, because TimescaleDB would not give that
/// back where compression is enabled.
pub(crate) const PAST_IDENTITY: &str = " OVERRIDING SYSTEM VALUE";

/// Of the rows of a hypertable or a chunk with exactly the values of all columns, which fulfil this condition and which no key tells apart
/// (H26): one is removed, or gets other values. The rows of compressed chunks have no `ctid` to name one of them by, so all are taken
/// out, and all but one put back. Answers as many rows as it met: one, or none.
pub(crate) fn exactly_one(table: &Table, condition: &str, new_values: Option<&[String]>) -> String {
    // What comes back may be in another chunk.
    let (name, into, columns) = (table.applied_to(), table.inserted_into(), table.column_list());
    let past = if table.hypertable.is_some() { PAST_IDENTITY } else { "" };
    let gone = format!("gone AS (DELETE FROM {name} WHERE {condition} RETURNING *)");
    let back = format!("back AS (INSERT INTO {into} ({columns}){past} SELECT {columns} FROM gone OFFSET 1)");
    match new_values {
        None => format!("WITH {gone}, {back} SELECT FROM gone LIMIT 1"),
        Some(values) => {
            let values = values.join(", ");
            format!("WITH {gone}, {back} INSERT INTO {into} ({columns}){past} SELECT {values} FROM gone LIMIT 1")
        }
    }
}

/// The statement that gives a row new values of these columns, in whatever chunk it is then; the values are those of the columns and
/// then of what names it. Its count is that of the rows that there were, or 1 of several that are all the same.
pub(crate) fn move_text(table: &Table, set: &[usize]) -> String {
    let value = |(at, column): (usize, &Column)| match set.iter().position(|&position| position == at) {
        Some(number) => parameter(number + 1, column),
        None => format!("gone.{}", sql::identifier(&column.name)),
    };
    let values: Vec<String> = table.columns.iter().enumerate().map(value).collect();
    let condition = condition(table, set.len());
    if table.key.is_empty() {
        return exactly_one(table, &condition, Some(&values));
    }
    format!(
        "WITH gone AS (DELETE FROM {} WHERE {condition} RETURNING *) INSERT INTO {} ({}){PAST_IDENTITY} SELECT {} FROM gone",
        table.applied_to(),
        table.inserted_into(),
        table.column_list(),
        values.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::catalog::ReplicaIdentity;

    fn table(key: Vec<usize>) -> Table {
        let column = |name: &str, type_name: &str| Column {
            name: name.into(),
            number: 1,
            type_oid: 23,
            type_name: type_name.into(),
            type_modifier: -1,
            not_null: true,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: Some("pg_catalog".into()),
        };
        let columns = vec![column("at", "date"), column("v", "integer")];
        let (identity, hypertable) = (ReplicaIdentity::Full, Some("at".to_owned()));
        Table { columns, key, identity, hypertable, ..Table::plain("public", "m") }
    }

    #[test]
    fn a_row_moves_to_its_new_chunk_with_what_the_stream_left_out() {
        assert_eq!(
            move_text(&table(vec![0]), &[0]),
            "WITH gone AS (DELETE FROM \"public\".\"m\" WHERE \"at\" OPERATOR(\"pg_catalog\".=) CAST($2 AS date) RETURNING *) \
             INSERT INTO \"public\".\"m\" (\"at\", \"v\") OVERRIDING SYSTEM VALUE SELECT CAST($1 AS date), gone.\"v\" FROM gone"
        );
    }

    #[test]
    fn of_equal_rows_one_goes_and_the_others_stay() {
        let table = table(Vec::new());
        let condition = condition(&table, 0);
        assert_eq!(
            condition,
            "\"at\"::text IS NOT DISTINCT FROM CAST($1 AS date)::text AND \"v\"::text IS NOT DISTINCT FROM CAST($2 AS integer)::text \
             AND \"at\" OPERATOR(\"pg_catalog\".=) CAST($1 AS date)",
            "by the time itself, so that only its chunk is looked at"
        );
        assert_eq!(
            exactly_one(&table, &condition, None),
            format!(
                "WITH gone AS (DELETE FROM \"public\".\"m\" WHERE {condition} RETURNING *), \
                 back AS (INSERT INTO \"public\".\"m\" (\"at\", \"v\") OVERRIDING SYSTEM VALUE SELECT \"at\", \"v\" FROM gone OFFSET 1) \
                 SELECT FROM gone LIMIT 1"
            )
        );
        assert!(move_text(&table, &[1]).ends_with("SELECT gone.\"at\", CAST($1 AS integer) FROM gone LIMIT 1"));
    }
}
