//! Row by row, in exactly the source's order: what a refused batch is replayed with, and what TRUNCATE needs (I5).
//!
//! Each function says what it met; what that means is for the caller to decide (I6). Values go as parameters in the form they came
//! in, text or binary.

use std::error::Error as StdError;

use bytes::BytesMut;
use tokio_postgres::types::{Format, IsNull, ToSql, Type};

use super::writer::Writer;
use crate::decode::{Datum, OldTuple, Tuple};
use crate::error::{Context, Result};
use crate::source::catalog::{Column, Table};
use crate::sql;

/// A value as it came over the wire.
#[derive(Debug)]
struct Parameter<'a>(Datum<'a>);

impl ToSql for Parameter<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match self.0 {
            Datum::Text(value) | Datum::Binary(value) => {
                out.extend_from_slice(value);
                Ok(IsNull::No)
            }
            Datum::Null | Datum::Unchanged => Ok(IsNull::Yes),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        match self.0 {
            Datum::Binary(_) => Format::Binary,
            Datum::Text(_) | Datum::Null | Datum::Unchanged => Format::Text,
        }
    }

    fn to_sql_checked(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        self.to_sql(ty, out)
    }
}

/// A statement in the making.
#[derive(Default)]
struct Query<'a> {
    text: String,
    parameters: Vec<Parameter<'a>>,
}

impl<'a> Query<'a> {
    /// Adds a value, and answers with its place in the statement, as the column's type.
    fn value(&mut self, column: &Column, datum: Datum<'a>) -> String {
        self.parameters.push(Parameter(datum));
        format!("CAST(${} AS {})", self.parameters.len(), column.type_name)
    }

    /// The condition that names one row.
    fn row(&mut self, table: &Table, old: Tuple<'a>) -> String {
        let values: Vec<Datum<'a>> = old.columns().collect();
        if table.key.is_empty() {
            // REPLICA IDENTITY FULL without any key (H26): the row with exactly these values, and if there are several, one.
            let same = |(column, datum): (&Column, &Datum<'a>)| {
                let value = self.value(column, *datum);
                format!("{}::text IS NOT DISTINCT FROM {value}::text", sql::identifier(&column.name))
            };
            let mut all: Vec<String> = table.columns.iter().zip(&values).map(same).collect();
            if all.is_empty() {
                // Every row of a table without columns is the same.
                all.push("true".into());
            }
            return format!("ctid = (SELECT ctid FROM ONLY {} WHERE {} LIMIT 1)", table.qualified(), all.join(" AND "));
        }
        let mut conditions = Vec::with_capacity(table.key.len());
        for &at in &table.key {
            let column = &table.columns[at];
            let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
            let value = self.value(column, values.get(at).copied().unwrap_or(Datum::Null));
            conditions.push(format!("{} OPERATOR({schema}.=) {value}", sql::identifier(&column.name)));
        }
        conditions.join(" AND ")
    }

    async fn run(self, writer: &mut Writer) -> Result<u64> {
        let parameters: Vec<&(dyn ToSql + Sync)> =
            self.parameters.iter().map(|parameter| parameter as &(dyn ToSql + Sync)).collect();
        writer.execute_one(self.text, &parameters).await
    }
}

/// Inserts a row; answers false when there is one with that key already.
///
/// # Errors
/// What the server says: another row can have a value that must be unique.
pub async fn insert(writer: &mut Writer, table: &Table, new: Tuple<'_>) -> Result<bool> {
    let mut query = Query::default();
    let values: Vec<String> =
        table.columns.iter().zip(new.columns()).map(|(column, datum)| query.value(column, datum)).collect();
    let key = sql::identifiers(table.key_columns().map(|column| column.name.as_str()));
    let unless = if key.is_empty() { String::new() } else { format!(" ON CONFLICT ({key}) DO NOTHING") };
    query.text = if values.is_empty() {
        format!("INSERT INTO {} DEFAULT VALUES", table.qualified())
    } else {
        format!("INSERT INTO {} ({}) VALUES ({}){unless}", table.qualified(), table.column_list(), values.join(", "))
    };
    let met = query.run(writer).await;
    Ok(met.context(|| format!("inserting {} into {}", name_row(table, new), table.qualified()))? == 1)
}

/// Whether a row that is to get the key of `new` would meet another row there.
///
/// # Errors
/// Whatever the server says.
pub async fn has_another(writer: &mut Writer, table: &Table, old: Tuple<'_>, new: Tuple<'_>) -> Result<bool> {
    if table.key.is_empty() {
        return Ok(false);
    }
    let mut query = Query::default();
    // Keys can be equal in other bytes (H20).
    let (there, itself) = (query.row(table, new), query.row(table, old));
    query.text = format!("SELECT FROM ONLY {} WHERE {there} AND NOT ({itself})", table.qualified());
    let found = query.run(writer).await;
    Ok(found.context(|| format!("looking for {} in {}", name_row(table, new), table.qualified()))? > 0)
}

/// Gives a row new values; columns that the stream says are unchanged keep theirs. Answers how many rows there were.
///
/// # Errors
/// What the server says.
pub async fn update(writer: &mut Writer, table: &Table, old: Option<OldTuple<'_>>, new: Tuple<'_>) -> Result<u64> {
    let mut query = Query::default();
    let mut set = Vec::with_capacity(table.columns.len());
    for (column, datum) in table.columns.iter().zip(new.columns()) {
        if datum != Datum::Unchanged {
            let value = query.value(column, datum);
            set.push(format!("{} = {value}", sql::identifier(&column.name)));
        }
    }
    if set.is_empty() {
        // Nothing but TOASTed keys, all unchanged: the row must be there all the same.
        set.extend(table.columns.first().map(|column| format!("{0} = {0}", sql::identifier(&column.name))));
    }
    let found_by = old.map_or(new, |old| old.tuple());
    let row = query.row(table, found_by);
    query.text = format!("UPDATE ONLY {} SET {} WHERE {row}", table.qualified(), set.join(", "));
    query.run(writer).await.context(|| format!("updating {} of {}", name_row(table, found_by), table.qualified()))
}

/// Removes a row; answers how many there were.
///
/// # Errors
/// What the server says.
pub async fn delete(writer: &mut Writer, table: &Table, old: OldTuple<'_>) -> Result<u64> {
    let mut query = Query::default();
    let row = query.row(table, old.tuple());
    query.text = format!("DELETE FROM ONLY {} WHERE {row}", table.qualified());
    query.run(writer).await.context(|| format!("deleting {} of {}", name_row(table, old.tuple()), table.qualified()))
}

/// Empties tables, all at once as the source did.
///
/// # Errors
/// Whatever the server says.
pub async fn truncate(writer: &Writer, tables: &[&Table], restart_identity: bool) -> Result<()> {
    let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.qualified())).collect();
    let identity = if restart_identity { " RESTART IDENTITY" } else { "" };
    let statement = format!("TRUNCATE {}{identity}", names.join(", "));
    writer.client().batch_execute(&statement).await.context(|| statement.clone())
}

/// Empties some of the tables that the source emptied together, the others being as the source had them afterwards. TRUNCATE of a
/// table that another refers to is refused without that one; a foreign key does not look at a DELETE in the replica role.
///
/// # Errors
/// Whatever the server says.
pub async fn empty(writer: &Writer, tables: &[&Table]) -> Result<()> {
    for table in tables {
        let statement = format!("DELETE FROM ONLY {}", table.qualified());
        writer.client().batch_execute(&statement).await.context(|| statement.clone())?;
    }
    Ok(())
}

/// A row by its key, for people: `(id)=(42)`.
pub fn name_row(table: &Table, row: Tuple<'_>) -> String {
    let values: Vec<Datum<'_>> = row.columns().collect();
    if table.key.is_empty() {
        return "a row without a key".to_owned();
    }
    let value = |&at: &usize| match values.get(at) {
        Some(Datum::Text(value)) => String::from_utf8_lossy(value).into_owned(),
        Some(Datum::Binary(value)) => binary_key(&table.columns[at], value),
        Some(Datum::Null | Datum::Unchanged) | None => "?".to_owned(),
    };
    let names: Vec<&str> = table.key_columns().map(|column| column.name.as_str()).collect();
    format!("({})=({})", names.join(", "), table.key.iter().map(value).collect::<Vec<_>>().join(", "))
}

/// A binary key in a form that a person can look for.
fn binary_key(column: &Column, value: &[u8]) -> String {
    match (column.type_name.as_str(), value.len()) {
        ("smallint" | "integer" | "bigint", 1..=8) => {
            let sign = if value[0] & 0x80 == 0 { 0 } else { -1i64 };
            value.iter().fold(sign, |number, &byte| (number << 8) | i64::from(byte)).to_string()
        }
        (name, _) if name.starts_with("character varying") || name == "text" => {
            String::from_utf8_lossy(value).into_owned()
        }
        _ => value.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_key_is_named_as_a_person_would_write_it() {
        let column = |type_name: &str| Column {
            name: "id".into(),
            number: 1,
            type_oid: 0,
            type_name: type_name.into(),
            type_modifier: -1,
            not_null: true,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: None,
        };
        assert_eq!(binary_key(&column("bigint"), &42i64.to_be_bytes()), "42");
        assert_eq!(binary_key(&column("integer"), &(-7i32).to_be_bytes()), "-7");
        assert_eq!(binary_key(&column("text"), b"abc"), "abc");
        assert_eq!(binary_key(&column("uuid"), &[0xab, 0x01]), "ab01");
    }
}
