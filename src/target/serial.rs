//! Row by row, in exactly the source's order: what a refused batch is replayed with, and what TRUNCATE needs (I5).
//!
//! Each function says what it met; what that means is for the caller to decide (I6). Values go as parameters in the form they came
//! in, text or binary.

use super::writer::Writer;
use crate::decode::{Datum, OldTuple, Tuple};
use crate::error::{Context, Result};
use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::timescale::rows;

/// A column's value as the parameter with this number, from 1 on, and as the column's type.
pub(crate) fn parameter(number: usize, column: &Column) -> String {
    format!("CAST(${number} AS {})", column.type_name)
}

/// The condition that names one row, whose parameters come after so many others; its values are those of [`found_by`].
pub(crate) fn condition(table: &Table, parameters_before: usize) -> String {
    let equal = |(number, column): (usize, &Column)| {
        let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
        format!("{} OPERATOR({schema}.=) {}", sql::identifier(&column.name), parameter(number, column))
    };
    if table.key.is_empty() {
        // REPLICA IDENTITY FULL without any key (H26): the row with exactly these values, and if there are several, one.
        let same = |(number, column): (usize, &Column)| {
            let value = parameter(number, column);
            format!("{}::text IS NOT DISTINCT FROM {value}::text", sql::identifier(&column.name))
        };
        let mut all: Vec<String> = (parameters_before + 1..).zip(&table.columns).map(same).collect();
        if is_one_of_equals(table) {
            // Of the hypertable, all such rows; by its dimensions the other chunks are left alone.
            let divides = |column: &Column| match &table.chunk {
                Some(chunk) => column.not_null && chunk.dimensions.contains(&column.name),
                None => table.hypertable.as_deref() == Some(&column.name),
            };
            let columns = (parameters_before + 1..).zip(&table.columns);
            all.extend(columns.filter(|(_, column)| column.equality_schema.is_some() && divides(column)).map(equal));
            return all.join(" AND ");
        }
        if all.is_empty() {
            // Every row of a table without columns is the same.
            all.push("true".into());
        }
        return format!("ctid = (SELECT ctid FROM ONLY {} WHERE {} LIMIT 1)", table.qualified(), all.join(" AND "));
    }
    (parameters_before + 1..).zip(table.key_columns()).map(equal).collect::<Vec<_>>().join(" AND ")
}

/// Whether the condition holds for all rows that are the same, and not for one of them.
fn is_one_of_equals(table: &Table) -> bool {
    table.key.is_empty() && (table.chunk.is_some() || table.hypertable.is_some())
}

/// The values that name one row, in the order of [`condition`].
fn found_by<'a>(table: &Table, row: Tuple<'a>, values: &mut Vec<Datum<'a>>) {
    if table.key.is_empty() {
        values.extend(row.columns());
    } else {
        values.extend(table.key.iter().map(|&at| row.columns().nth(at).unwrap_or(Datum::Null)));
    }
}

/// The statement that removes one row; its values are those of [`delete_values`].
pub(super) fn delete_text(table: &Table) -> String {
    let condition = condition(table, 0);
    if is_one_of_equals(table) {
        return rows::exactly_one(table, &condition, None);
    }
    format!("DELETE FROM {} WHERE {condition}", table.applied_to())
}

/// The values of [`delete_text`].
pub(super) fn delete_values<'a>(table: &Table, old: Tuple<'a>) -> Vec<Datum<'a>> {
    let mut values = Vec::with_capacity(table.key.len());
    found_by(table, old, &mut values);
    values
}

/// Positions of the columns that an update gives a value: all that have one, or those outside of the key.
pub(super) fn columns_to_set(table: &Table, new: Tuple<'_>, with_key: bool) -> Vec<usize> {
    let is_set =
        |&(at, datum): &(usize, Datum<'_>)| datum != Datum::Unchanged && (with_key || !table.key.contains(&at));
    new.columns().enumerate().filter(is_set).map(|(at, _)| at).collect()
}

/// The statement that gives one row new values of these columns; its own values are those of [`update_values`].
pub(super) fn update_text(table: &Table, set: &[usize]) -> String {
    let takes_no_update = table.hypertable.is_some() && set.iter().any(|&at| table.columns[at].identity_always);
    if is_one_of_equals(table) || takes_no_update {
        return rows::move_text(table, set);
    }
    let assign = |(number, &at): (usize, &usize)| {
        let column = &table.columns[at];
        format!("{} = {}", sql::identifier(&column.name), parameter(number, column))
    };
    let mut assignments: Vec<String> = (1..).zip(set).map(assign).collect();
    if assignments.is_empty() {
        // Nothing to set: the row must be there all the same.
        assignments.extend(table.columns.first().map(|column| format!("{0} = {0}", sql::identifier(&column.name))));
    }
    let row = condition(table, set.len());
    format!("UPDATE {} SET {} WHERE {row}", table.applied_to(), assignments.join(", "))
}

/// The values of [`update_text`].
pub(super) fn update_values<'a>(table: &Table, set: &[usize], old: Tuple<'a>, new: Tuple<'a>) -> Vec<Datum<'a>> {
    let mut values = Vec::with_capacity(set.len() + table.key.len());
    let mut set = set.iter().copied().peekable();
    values.extend(new.columns().enumerate().filter(|(at, _)| set.next_if_eq(at).is_some()).map(|(_, datum)| datum));
    found_by(table, old, &mut values);
    values
}

/// Inserts a row; answers false when there is one with that key already.
///
/// # Errors
/// What the server says: another row can have a value that must be unique.
pub async fn insert(writer: &mut Writer, table: &Table, new: Tuple<'_>) -> Result<bool> {
    let mut values: Vec<Datum<'_>> = new.columns().collect();
    let placeholders: Vec<String> =
        (1..).zip(&table.columns).map(|(number, column)| parameter(number, column)).collect();
    let text = if placeholders.is_empty() {
        format!("INSERT INTO {} DEFAULT VALUES", table.inserted_into())
    } else {
        let (name, columns, placeholders) = (table.inserted_into(), table.column_list(), placeholders.join(", "));
        let past = if table.hypertable.is_some() || table.chunk.is_some() { rows::PAST_IDENTITY } else { "" };
        if table.key.is_empty() {
            format!("INSERT INTO {name} ({columns}){past} VALUES ({placeholders})")
        } else {
            // Not ON CONFLICT, which is refused for a table with rules, whether they fire or not.
            let (there, only) = (condition(table, values.len()), table.applied_to());
            found_by(table, new, &mut values);
            format!(
                "INSERT INTO {name} ({columns}){past} SELECT {placeholders} WHERE NOT EXISTS (SELECT FROM {only} WHERE {there})"
            )
        }
    };
    writer.plan_for(table).await?;
    let met = writer.execute(text, &values).await;
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
    // Keys can be equal in other bytes (H20).
    let (there, itself) = (condition(table, 0), condition(table, table.key.len()));
    let text = format!("SELECT FROM {} WHERE {there} AND NOT ({itself})", table.applied_to());
    let mut values = delete_values(table, new);
    found_by(table, old, &mut values);
    writer.plan_for(table).await?;
    let found = writer.execute(text, &values).await;
    Ok(found.context(|| format!("looking for {} in {}", name_row(table, new), table.qualified()))? > 0)
}

/// Gives a row new values; columns that the stream says are unchanged keep theirs. Answers how many rows there were.
///
/// # Errors
/// What the server says.
pub async fn update(writer: &mut Writer, table: &Table, old: Option<OldTuple<'_>>, new: Tuple<'_>) -> Result<u64> {
    let before = old.map_or(new, |old| old.tuple());
    // The rows of a compressed chunk take no new key, and not even the one that they have.
    let moves = match &table.chunk {
        Some(_) => old.is_some_and(|old| !has_same_key(table, old.tuple(), new)),
        None => old.is_some() && table.hypertable.is_some(),
    };
    let set = columns_to_set(table, new, moves || table.hypertable.is_none() && table.chunk.is_none());
    let text = if moves { rows::move_text(table, &set) } else { update_text(table, &set) };
    writer.plan_for(table).await?;
    let met = writer.execute(text, &update_values(table, &set, before, new)).await;
    met.context(|| format!("updating {} of {}", name_row(table, before), table.qualified()))
}

/// Whether a row keeps what names it. One that nothing but its values names does.
fn has_same_key(table: &Table, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    let is_same = |(at, (old, new)): (usize, (Datum<'_>, Datum<'_>))| {
        !table.key.contains(&at) || new == Datum::Unchanged || new == old
    };
    old.columns().zip(new.columns()).enumerate().all(is_same)
}

/// Removes a row; answers how many there were.
///
/// # Errors
/// What the server says.
pub async fn delete(writer: &mut Writer, table: &Table, old: OldTuple<'_>) -> Result<u64> {
    writer.plan_for(table).await?;
    let met = writer.execute(delete_text(table), &delete_values(table, old.tuple())).await;
    met.context(|| format!("deleting {} of {}", name_row(table, old.tuple()), table.qualified()))
}

/// Empties tables, all at once as the source did.
///
/// # Errors
/// Whatever the server says.
pub async fn truncate(writer: &mut Writer, tables: &[&Table], restart_identity: bool) -> Result<()> {
    let names: Vec<String> = tables.iter().map(|table| table.only_on_target()).collect();
    let identity = if restart_identity { " RESTART IDENTITY" } else { "" };
    let statement = format!("TRUNCATE {}{identity}", names.join(", "));
    writer.execute(statement.clone(), &[]).await.map(drop).context(|| statement)
}

/// Empties some of the tables that the source emptied together, the others being as the source had them afterwards. TRUNCATE of a
/// table that another refers to is refused without that one; a foreign key does not look at a DELETE in the replica role.
///
/// # Errors
/// Whatever the server says.
pub async fn empty(writer: &mut Writer, tables: &[&Table]) -> Result<()> {
    for table in tables {
        let statement = format!("DELETE FROM {}", table.only_on_target());
        writer.execute(statement.clone(), &[]).await.context(|| statement)?;
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
