//! The statements of an apply session, and the temporary tables that they stage rows in.

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::connection::pipeline::Requests;
use crate::error::Result;
use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::target::serial;
use crate::timescale::sets;

/// Prepared statements that a session keeps: each takes some ten kilobytes of the server's memory. With more of them, the half
/// that was not used the longest goes.
pub(super) const STATEMENTS_MAX: usize = 1024;

/// Which statement of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    Stage(Staging),
    Delete,
    Update(Staging),
    Insert,
    /// Rows that only their values name, NULL in the columns at these positions.
    DeleteEqual(Vec<u16>),
    DeleteOne,
    /// Without the columns at these positions.
    UpdateOne(Vec<u16>),
}

/// The prepared statements of a session, as many as the server's memory should hold.
#[derive(Default)]
pub(super) struct Statements {
    pub(super) known: HashMap<Key, Known>,
    /// How many were ever named.
    named: u64,
    /// How many were ever asked for.
    asked: u64,
    /// The server may not have what is known here, since what should have made it did not go through.
    pub(super) are_unknown: bool,
}

/// A statement by what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// Of the table at a place.
    Table(usize, What),
    /// By its text.
    Text(String),
}

pub(super) struct Known {
    name: Arc<str>,
    /// When it was asked for last.
    asked: u64,
}

impl Statements {
    /// The name of a statement, which is prepared in front of what is asked next where it is not.
    pub(super) fn name(
        &mut self,
        key: Key,
        requests: &mut Requests,
        text: impl FnOnce(&Key) -> String,
    ) -> Result<Arc<str>> {
        self.asked += 1;
        if let Some(known) = self.known.get_mut(&key) {
            known.asked = self.asked;
            return Ok(Arc::clone(&known.name));
        }
        if self.known.len() >= STATEMENTS_MAX {
            self.forget_half(requests)?;
        }
        self.named += 1;
        let name: Arc<str> = format!("w{}", self.named).into();
        requests.prepare(&name, &text(&key))?;
        self.known.insert(key, Known { name: Arc::clone(&name), asked: self.asked });
        Ok(name)
    }

    /// Forgets those that were not asked for the longest.
    pub(super) fn forget_half(&mut self, requests: &mut Requests) -> Result<()> {
        let mut asked: Vec<u64> = self.known.values().map(|known| known.asked).collect();
        let (_, &mut middle, _) = asked.select_nth_unstable(self.known.len() / 2);
        for (_, known) in self.known.extract_if(|_, known| known.asked < middle) {
            requests.close(&known.name)?;
        }
        Ok(())
    }
}

/// A temporary table that a session has for the changes of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Staging {
    /// The keys of rows that go.
    Keys,
    /// Rows that change, without the columns at these positions.
    Rows(Vec<u16>),
    /// Whole rows that go, NULL in the columns at these positions, with how many equal ones.
    Equal(Vec<u16>),
}

impl Staging {
    pub(super) fn name(&self, table: &Table) -> String {
        let hash = |positions: &[u16]| {
            let positions: Vec<u8> = positions.iter().flat_map(|at| at.to_be_bytes()).collect();
            xxh3_64(&positions)
        };
        match self {
            Staging::Keys => format!("walferry_keys_{}", table.relid),
            Staging::Rows(unchanged) => format!("walferry_rows_{}_{:x}", table.relid, hash(unchanged)),
            Staging::Equal(nulls) => format!("walferry_equal_{}_{:x}", table.relid, hash(nulls)),
        }
    }

    pub(super) fn qualified(&self, table: &Table) -> String {
        sql::qualified("pg_temp", &self.name(table))
    }

    fn columns<'a>(&self, table: &'a Table) -> Vec<&'a Column> {
        match self {
            Staging::Keys => table.key_columns().collect(),
            Staging::Equal(_) => table.columns.iter().collect(),
            Staging::Rows(unchanged) => (0u16..)
                .zip(&table.columns)
                .filter(|(at, _)| !unchanged.contains(at))
                .map(|(_, column)| column)
                .collect(),
        }
    }

    pub(super) fn column_list(&self, table: &Table) -> String {
        let list = sql::identifiers(self.columns(table).into_iter().map(|column| column.name.as_str()));
        if matches!(self, Staging::Equal(_)) { format!("{list}, {}", sets::TIMES) } else { list }
    }

    /// Without the table's constraints: refusing is for the table itself.
    pub(super) fn create(&self, table: &Table) -> String {
        let times =
            if matches!(self, Staging::Equal(_)) { format!(", 0::int8 AS {}", sets::TIMES) } else { String::new() };
        let columns = sql::identifiers(self.columns(table).into_iter().map(|column| column.name.as_str()));
        format!(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {} ON COMMIT DELETE ROWS AS SELECT {columns}{times} FROM {} WITH NO DATA",
            sql::identifier(&self.name(table)),
            table.applied_to()
        )
    }
}

/// The SQL of a statement.
pub(super) fn text(table: &Table, what: &What, binary: bool) -> String {
    let format = if binary { "binary" } else { "text" };
    let target = table.applied_to();
    match what {
        What::Stage(staging) => {
            format!("COPY {} ({}) FROM STDIN (FORMAT {format})", staging.qualified(table), staging.column_list(table))
        }
        What::Delete => {
            let staging = Staging::Keys.qualified(table);
            format!("DELETE FROM {target} t USING {staging} s WHERE {}{}", same_key(table), sets::condition(table))
        }
        What::DeleteEqual(nulls) => {
            sets::delete_equal_text(table, nulls, &Staging::Equal(nulls.clone()).qualified(table))
        }
        What::Update(staging) => {
            let is_key = |column: &Column| table.key_columns().any(|key| key.number == column.number);
            let columns = staging.columns(table);
            let (keys, others): (Vec<&Column>, Vec<&Column>) = columns.into_iter().partition(|column| is_key(column));
            // A row that is all key has nothing to set, but it must be there all the same.
            let set = if others.is_empty() { keys } else { others };
            let set: Vec<String> =
                set.iter().map(|column| format!("{0} = s.{0}", sql::identifier(&column.name))).collect();
            format!(
                "UPDATE {target} t SET {} FROM {} s WHERE {}{}",
                set.join(", "),
                staging.qualified(table),
                same_key(table),
                sets::condition(table)
            )
        }
        What::DeleteOne => serial::delete_text(table),
        What::UpdateOne(unchanged) => {
            let is_set = |at: &usize| !table.key.contains(at) && !unchanged.contains(&(*at as u16));
            serial::update_text(table, &(0..table.columns.len()).filter(is_set).collect::<Vec<_>>())
        }
        What::Insert if table.columns.is_empty() => {
            format!("COPY {} FROM STDIN (FORMAT {format})", table.inserted_into())
        }
        What::Insert => {
            format!("COPY {} ({}) FROM STDIN (FORMAT {format})", table.inserted_into(), table.column_list())
        }
    }
}

/// The key's columns compared with the operator that its index has, whatever the search path.
pub(super) fn same_key(table: &Table) -> String {
    let equal = |column: &Column| {
        let name = sql::identifier(&column.name);
        let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
        format!("t.{name} OPERATOR({schema}.=) s.{name}")
    };
    table.key_columns().map(equal).collect::<Vec<_>>().join(" AND ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statements_that_are_kept_are_bounded_and_the_newest() {
        let mut statements = Statements::default();
        let mut requests = Requests::default();
        let mut ask = |statements: &mut Statements, number: usize| {
            let (mut prepared, key) = (false, Key::Table(number, What::DeleteOne));
            statements
                .name(key, &mut requests, |_| {
                    prepared = true;
                    "SELECT".into()
                })
                .unwrap();
            prepared
        };
        for number in 0..STATEMENTS_MAX * 3 {
            assert!(ask(&mut statements, number));
            assert!(!ask(&mut statements, number), "the newest is kept");
            assert!(!ask(&mut statements, 0), "and what is used all the time");
            assert!(statements.known.len() <= STATEMENTS_MAX);
        }
        assert!(ask(&mut statements, 1), "what was not used for long is gone");
    }
}
