//! Rows that are on the target already where a piece is to come: the application wrote them to both databases, or somebody else did.
//!
//! | a row of the piece finds | `stop` | `source` | `target` |
//! |---|---|---|---|
//! | the same row | it is there: nothing to do | nothing to do | nothing to do |
//! | another row with its key | stop, and the keys are named | it takes that row's place | that row stays |
//! | no row with its key | it is inserted | it is inserted | it is inserted |
//!
//! Rows of the target whose key the source does not have are found by the comparison behind this, but for `target`. Without a unique key
//! nobody can say which rows are the same, and any row in the way stops it.

use tokio_postgres::Client;

use super::compare::There;
use super::plan::{Piece, Work};
use crate::apply::conflict::OnConflict;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// Where the rows of a piece wait to be compared: a table of our session.
pub(super) const STAGE: &str = "pg_temp.walferry_backfill";

/// Keys that are named.
const KEYS_MAX: usize = 5;

/// Makes the table that a piece's rows are copied into.
///
/// # Errors
/// `Divergence` when rows cannot be told apart; else what the server says.
pub(super) async fn make_stage(target: &Client, work: &Work, there: &There) -> Result<()> {
    let name = work.table.qualified();
    if there.key.is_empty() {
        let text =
            format!("the target has rows already where a piece of {name} is to come, and no unique key tells which");
        return Err(Error::new(ErrorKind::Divergence, text).hint(
            "Find out who wrote them. Delete them on the target, or give the table a unique index, and run the same command again.",
        ));
    }
    let statement = format!(
        "CREATE TEMPORARY TABLE walferry_backfill ON COMMIT DROP AS SELECT {} FROM {name} WITH NO DATA",
        work.table.column_list()
    );
    target.batch_execute(&statement).await.context(|| format!("making a temporary table for a piece of {name}"))
}

/// Brings the rows of the stage to where they belong.
///
/// # Errors
/// `Divergence` for rows that are other on the target, under `stop`; else what the server says.
pub(super) async fn merge(
    target: &Client,
    work: &Work,
    there: &There,
    piece: &Piece,
    policy: OnConflict,
) -> Result<()> {
    let name = work.table.qualified();
    let doing = || format!("merging rows into {name}");
    let condition = work.condition(piece);
    let same_key: Vec<String> = there
        .key
        .iter()
        .map(|column| {
            let (name, schema) =
                (sql::identifier(&column.name), column.equality_schema.as_deref().unwrap_or("pg_catalog"));
            format!("s.{name} OPERATOR({}.=) t.{name}", sql::identifier(schema))
        })
        .collect();
    // Where the key does not hold the time, the row of a key can be of another time on the target. Else the condition, which follows from the
    // key then, keeps the other chunks out of it.
    let has_time = |(column, _): &(String, _)| there.key.iter().any(|of_key| of_key.name == *column);
    let same_key = match &work.time {
        Some(time) if !has_time(time) => same_key.join(" AND "),
        _ => format!("{} AND {condition}", same_key.join(" AND ")),
    };
    let row = |alias: &str| {
        let columns: Vec<String> =
            work.table.columns.iter().map(|column| format!("{alias}.{}", sql::identifier(&column.name))).collect();
        // As the types print them: also types without an equality are compared.
        format!("ROW({})::text", columns.join(", "))
    };
    let other = format!("{same_key} AND {} IS DISTINCT FROM {}", row("s"), row("t"));
    target.batch_execute(&format!("ANALYZE {STAGE}")).await.context(doing)?;
    match policy {
        OnConflict::Stop => none_is_other(target, work, there, &other).await?,
        OnConflict::Source => {
            let (first, last) = (work.pieces.first().unwrap_or(piece), work.pieces.last().unwrap_or(piece));
            let all = Piece { range: (first.range.0, last.range.1), further: Vec::new(), ..piece.clone() };
            let statement = format!("DELETE FROM {name} t USING {STAGE} s WHERE {other} AND {}", work.condition(&all));
            target.batch_execute(&statement).await.context(doing)?;
            // Of a time that this backfill is not about: it is not ours to touch.
            none_is_other(target, work, there, &other).await?;
        }
        OnConflict::Target => {}
    }
    let columns = work.table.column_list();
    let statement = format!(
        "INSERT INTO {name} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {STAGE} s \
         WHERE NOT EXISTS (SELECT FROM {name} t WHERE {same_key})"
    );
    target.batch_execute(&statement).await.context(doing)
}

/// No row of the stage meets another with its key.
async fn none_is_other(target: &Client, work: &Work, there: &There, other: &str) -> Result<()> {
    let name = work.table.qualified();
    let key: Vec<String> = there.key.iter().map(|column| format!("s.{}", sql::identifier(&column.name))).collect();
    let statement =
        format!("SELECT ROW({})::text FROM {STAGE} s JOIN {name} t ON {other} LIMIT {}", key.join(", "), KEYS_MAX + 1);
    let rows = target.query_typed(&statement, &[]).await.context(|| format!("looking for other rows in {name}"))?;
    if rows.is_empty() {
        return Ok(());
    }
    let mut keys: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    if keys.len() > KEYS_MAX {
        keys[KEYS_MAX] = "and more".into();
    }
    let names: Vec<String> = there.key.iter().map(|column| sql::identifier(&column.name)).collect();
    let text = format!(
        "rows of {name} are on the target already, and are not what the source has: ({})={}",
        names.join(", "),
        keys.join(", ")
    );
    Err(Error::new(ErrorKind::Divergence, text).hint(
        "Nothing of this piece was written. Mend the rows and run the same command again; or decide for all such rows: \
         --on-conflict source (the source's win, where the target's are older than --until too) or --on-conflict target (the target's stay).",
    ))
}
