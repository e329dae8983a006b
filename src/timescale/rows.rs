//! Single rows of a hypertable: found in its chunks, whether compressed or not, and moved between them.
//!
//! A `ctid` names no row here: it is another one in each chunk, and a compressed chunk has none to show. An update cannot carry a row to
//! another chunk either. So a row goes and comes back, in one statement, and TimescaleDB decompresses what that meets.

use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::target::serial::parameter;

/// For the transaction that looks for rows of a hypertable. However much of a chunk a change decompresses, the source has made it.
pub(crate) const SETTINGS: &str = "SELECT pg_catalog.set_config('plan_cache_mode', 'force_custom_plan', true), \
     pg_catalog.set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true)";

/// In an INSERT: identity columns of a hypertable stay `GENERATED ALWAYS` during the migration, because TimescaleDB would not give that
/// back where compression is enabled.
pub(crate) const PAST_IDENTITY: &str = " OVERRIDING SYSTEM VALUE";

/// The statement that removes one of the rows with exactly the values of all columns, whose parameters these are; `None` where a
/// key names it, or the table is no hypertable. It answers a row if there was one.
pub(crate) fn delete_one_of_equals(table: &Table) -> Option<String> {
    let time = table.hypertable.as_deref().filter(|_| table.key.is_empty())?;
    Some(format!("{} SELECT FROM gone LIMIT 1", without_one(table, time, 0)))
}

/// The statement that gives a row new values of these columns, in whatever chunk it is then; the values are those of the columns and
/// then of what names it. Its count is that of the rows that there were, or 1 of several that are all the same.
pub(crate) fn move_text(table: &Table, set: &[usize]) -> String {
    let value = |(at, column): (usize, &Column)| match set.iter().position(|&position| position == at) {
        Some(number) => parameter(number + 1, column),
        None => format!("gone.{}", sql::identifier(&column.name)),
    };
    let values: Vec<String> = table.columns.iter().enumerate().map(value).collect();
    let (gone, one) = match &table.hypertable {
        Some(time) if table.key.is_empty() => (without_one(table, time, set.len()), " LIMIT 1"),
        _ => {
            let equal = |(number, column): (usize, &Column)| {
                let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
                format!("{} OPERATOR({schema}.=) {}", sql::identifier(&column.name), parameter(number, column))
            };
            let row: Vec<String> = (set.len() + 1..).zip(table.key_columns()).map(equal).collect();
            let gone = format!("DELETE FROM {} WHERE {} RETURNING *", table.applied_to(), row.join(" AND "));
            (format!("WITH gone AS ({gone})"), "")
        }
    };
    format!(
        "{gone} INSERT INTO {} ({}){PAST_IDENTITY} SELECT {} FROM gone{one}",
        table.inserted_into(),
        table.column_list(),
        values.join(", ")
    )
}

/// All rows with these values go, and all but one come back.
fn without_one(table: &Table, time: &str, parameters_before: usize) -> String {
    let same = |(number, column): (usize, &Column)| {
        let (name, value) = (sql::identifier(&column.name), parameter(number, column));
        // By the time itself, so that only its chunk is looked at.
        if column.name == time {
            format!("{name} OPERATOR(pg_catalog.=) {value}")
        } else {
            format!("{name}::text IS NOT DISTINCT FROM {value}::text")
        }
    };
    let row: Vec<String> = (parameters_before + 1..).zip(&table.columns).map(same).collect();
    let (name, columns) = (table.qualified(), table.column_list());
    format!(
        "WITH gone AS (DELETE FROM {name} WHERE {} RETURNING *), \
         kept AS (INSERT INTO {name} ({columns}){PAST_IDENTITY} SELECT {columns} FROM gone OFFSET 1)",
        row.join(" AND ")
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
        assert_eq!(delete_one_of_equals(&table(vec![0])), None, "the key names it");
        assert_eq!(
            delete_one_of_equals(&table(Vec::new())).unwrap(),
            "WITH gone AS (DELETE FROM \"public\".\"m\" WHERE \"at\" OPERATOR(pg_catalog.=) CAST($1 AS date) \
             AND \"v\"::text IS NOT DISTINCT FROM CAST($2 AS integer)::text RETURNING *), \
             kept AS (INSERT INTO \"public\".\"m\" (\"at\", \"v\") OVERRIDING SYSTEM VALUE SELECT \"at\", \"v\" FROM gone OFFSET 1) SELECT FROM gone LIMIT 1"
        );
    }
}
