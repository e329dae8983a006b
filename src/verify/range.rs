//! Ranges of a table compared one by one, for whoever has sessions and conditions of his own: the same hash as everywhere here.

use tokio_postgres::Client;

use super::hash::{self, Statements};
use super::layout;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;

/// What a range of rows is compared by: how many there are, and the sums of both halves of their hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeDigest {
    /// How many rows there are.
    pub rows: i64,
    /// As text; `0,0` for no row.
    pub hash: String,
}

/// Computes digests of ranges of one table that mean the same on both servers.
pub struct RangeHash {
    table: String,
    statements: Statements,
}

impl RangeHash {
    /// Over the columns that both sides have; they need not be in the same order, nor the tables have the same name.
    ///
    /// # Errors
    /// `SchemaChanged` when a side has no such table; else whatever a server says.
    pub async fn new((table, source): (&Table, &Client), (on_target, target): (&Table, &Client)) -> Result<RangeHash> {
        let (of_source, of_target) =
            tokio::try_join!(layout::read(source, table, "source"), layout::read(target, on_target, "target"))?;
        let (Some(of_source), Some(of_target)) = (of_source, of_target) else {
            let text = format!("the table {} is not there on both sides", table.qualified());
            return Err(Error::new(ErrorKind::SchemaChanged, text));
        };
        let function = hash::agree(source, target).await?;
        let shared = layout::shared(&of_source, &of_target, &[]);
        Ok(RangeHash { table: table.qualified(), statements: Statements::new(function, &shared) })
    }

    /// The digest of the rows of a relation that fulfil a condition on the alias `t`.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn of(&self, client: &Client, from: &str, condition: &str) -> Result<RangeDigest> {
        let statement = self.statements.digests(from, condition, None, 0);
        let rows = client.query_typed(&statement, &[]).await;
        let rows = rows.context(|| format!("hashing rows of {}", self.table))?;
        Ok(rows.first().map_or_else(
            || RangeDigest { rows: 0, hash: "0,0".into() },
            |row| RangeDigest {
                rows: row.get(1),
                hash: format!("{},{}", row.get::<_, &str>(2), row.get::<_, &str>(3)),
            },
        ))
    }
}
