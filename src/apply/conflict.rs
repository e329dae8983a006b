//! Changes that do not meet the row they should have, and what the operator wants done about them (I6).
//!
//! | the change | what is on the target | `stop` | `source` | `target` |
//! |---|---|---|---|---|
//! | insert | a row with that key | stop | it becomes the source's row | it stays |
//! | update | no such row | stop | the source's row is inserted, if it is known whole | nothing |
//! | update of the key | another row with the new key | stop | it makes way for the source's row | both rows stay as they are |
//! | delete | no such row | stop | nothing to do | nothing to do |
//! | any | another row with a value that must be unique | stop | stop | stop |
//!
//! The last is not a question of one row: to let the source win would be to remove a row that the source did not touch. Only the
//! serial replay decides; the set-based way refuses the whole batch.

use bytes::{Bytes, BytesMut};

use super::net::put_datum;
use super::replay::RowChange;
use crate::decode::{Datum, OldTuple, Tuple};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::status::ConflictKind;
use crate::source::catalog::Table;
use crate::target::serial;
use crate::target::writer::Writer;

/// Who wins when somebody else has written to the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnConflict {
    /// Nobody: the migration stops, and names the row
    #[default]
    Stop,
    /// The source's row replaces what is there
    Source,
    /// The target's row stays, and the change is left out
    Target,
}

impl OnConflict {
    fn name(self) -> &'static str {
        match self {
            OnConflict::Stop => "stop",
            OnConflict::Source => "source",
            OnConflict::Target => "target",
        }
    }
}

/// Writes a change, and decides what it does when it does not meet what it should. Tells `met` of every conflict, decided or not.
///
/// # Errors
/// `Divergence` for a conflict that stops the migration; else what the server says.
pub async fn write(
    writer: &mut Writer,
    table: &Table,
    change: RowChange<'_>,
    policy: OnConflict,
    met: &mut (dyn FnMut(ConflictKind) + Send),
) -> Result<()> {
    let outcome = match change {
        RowChange::Insert(new) => insert(writer, table, new, policy, met).await,
        RowChange::Update(old, new) => update(writer, table, old, new, policy, met).await,
        RowChange::Delete(old) => delete(writer, table, old, policy, met).await,
    };
    outcome.map_err(|error| {
        let taken = error.sqlstate().is_some_and(|state| matches!(state.code(), "23505" | "23P01"));
        if !taken {
            return error;
        }
        met(ConflictKind::UniqueValueTaken);
        error.with_kind(ErrorKind::Divergence).hint(format!(
            "Another row on the target has a value that only one row may have, and --on-conflict decides nothing there: it would \
             have to remove a row that this change is not about. Somebody else has written to the target. Find that row by the \
             constraint's columns and mend it, then run the same command again; or {}",
            compare_again(table)
        ))
    })
}

async fn insert(
    writer: &mut Writer,
    table: &Table,
    new: Tuple<'_>,
    policy: OnConflict,
    met: &mut (dyn FnMut(ConflictKind) + Send),
) -> Result<()> {
    if serial::insert(writer, table, new).await? {
        return Ok(());
    }
    met(ConflictKind::InsertFoundRow);
    let row = serial::name_row(table, new);
    decide(policy, table, || {
        format!(
            "inserting {row} into {}: the source's row is there, and the target has a row with that key already",
            table.qualified()
        )
    })?;
    if policy == OnConflict::Source {
        // Every column has a value in a new row.
        one(serial::update(writer, table, None, new).await?, table, &row)?;
    }
    note(policy, table, ConflictKind::InsertFoundRow, &row);
    Ok(())
}

async fn update(
    writer: &mut Writer,
    table: &Table,
    old: Option<OldTuple<'_>>,
    new: Tuple<'_>,
    policy: OnConflict,
    met: &mut (dyn FnMut(ConflictKind) + Send),
) -> Result<()> {
    let before = old.map_or(new, |old| old.tuple());
    let row = serial::name_row(table, before);
    if let Some(old) = old
        && moves(table, old.tuple(), new)
        && serial::has_another(writer, table, old.tuple(), new).await?
    {
        let to = serial::name_row(table, new);
        met(ConflictKind::UpdateFoundRow);
        decide(policy, table, || {
            format!(
                "updating {row} of {} to {to}: the source's row is there, and the target has another row with the new key already",
                table.qualified()
            )
        })?;
        note(policy, table, ConflictKind::UpdateFoundRow, &to);
        if policy == OnConflict::Target {
            return Ok(());
        }
        serial::delete(writer, table, OldTuple::Key(new)).await?;
    }
    let count = serial::update(writer, table, old, new).await?;
    if count > 0 {
        return one(count, table, &row);
    }
    met(ConflictKind::UpdateFoundNone);
    decide(policy, table, || {
        format!("updating {row} of {}: the source's row is there, and the target has no such row", table.qualified())
    })?;
    if policy == OnConflict::Source {
        let (count, columns) = whole(table, old, new)?;
        if !serial::insert(writer, table, Tuple::of_encoded(count, &columns)).await? {
            let text =
                format!("{} of {} came on the target meanwhile", serial::name_row(table, new), table.qualified());
            return Err(Error::new(ErrorKind::Transient, text).hint(mend(table)));
        }
    }
    note(policy, table, ConflictKind::UpdateFoundNone, &row);
    Ok(())
}

async fn delete(
    writer: &mut Writer,
    table: &Table,
    old: OldTuple<'_>,
    policy: OnConflict,
    met: &mut (dyn FnMut(ConflictKind) + Send),
) -> Result<()> {
    let row = serial::name_row(table, old.tuple());
    let count = serial::delete(writer, table, old).await?;
    if count > 0 {
        return one(count, table, &row);
    }
    met(ConflictKind::DeleteFoundNone);
    decide(policy, table, || {
        format!(
            "deleting {row} of {}: the source's row was there until now, and the target has no such row",
            table.qualified()
        )
    })?;
    note(policy, table, ConflictKind::DeleteFoundNone, &row);
    Ok(())
}

/// An error, unless the operator has decided.
fn decide(policy: OnConflict, table: &Table, what: impl FnOnce() -> String) -> Result<()> {
    match policy {
        OnConflict::Stop => Err(Error::new(ErrorKind::Divergence, what()).hint(mend(table))),
        OnConflict::Source | OnConflict::Target => Ok(()),
    }
}

/// Every conflict that is decided is in the log.
fn note(policy: OnConflict, table: &Table, kind: ConflictKind, row: &str) {
    let (table, kind, wins) = (table.qualified(), kind.name(), policy.name());
    tracing::warn!(table, kind, row, "a conflict on the target was decided: --on-conflict {wins}");
}

/// What an operator can do about a row that is not as it should be.
fn mend(table: &Table) -> String {
    format!(
        "Somebody else has written to the target. Nothing of this transaction has been applied. Make this row there what it was on \
         the source before, and run the same command again; or decide for all such rows: `walferry migrate --on-conflict source` \
         (the source's rows win) or `--on-conflict target` (the target's stay); or {}",
        compare_again(table)
    )
}

fn compare_again(table: &Table) -> String {
    format!(
        "compare the whole table and copy what differs: `walferry migrate {}`. `walferry verify` shows what else differs.",
        Table::recopy_option(&[table])
    )
}

/// A key names one row: whatever the operator decided, more are none of his rows.
fn one(count: u64, table: &Table, row: &str) -> Result<()> {
    if count == 1 {
        return Ok(());
    }
    let text = format!("the target has {count} rows {row} of {}, and the source had one", table.qualified());
    Err(Error::new(ErrorKind::Divergence, text).hint(mend(table)))
}

/// Whether a change gives a row another key, as far as bytes tell.
fn moves(table: &Table, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    let (old, new): (Vec<Datum<'_>>, Vec<Datum<'_>>) = (old.columns().collect(), new.columns().collect());
    table.key.iter().any(|&at| new.get(at) != Some(&Datum::Unchanged) && old.get(at) != new.get(at))
}

/// The row as it is on the source now; a column that the update left unchanged and that is TOASTed is known from the old row at best.
fn whole(table: &Table, old: Option<OldTuple<'_>>, new: Tuple<'_>) -> Result<(u16, Bytes)> {
    let before: Vec<Datum<'_>> = old.map(|old| old.tuple().columns().collect()).unwrap_or_default();
    let mut columns = BytesMut::with_capacity(new.encoded().len());
    for (at, datum) in new.columns().enumerate() {
        let known = match old {
            Some(OldTuple::Full(_)) => true,
            Some(OldTuple::Key(_)) => table.key.contains(&at),
            None => false,
        };
        let value = if datum == Datum::Unchanged && known { before.get(at).copied().unwrap_or(datum) } else { datum };
        if value == Datum::Unchanged {
            let text = format!(
                "updating {} of {}: the target has no such row, and the source's is not known whole: the update left the large value of \
                 column {} unchanged, and the stream does not carry it",
                serial::name_row(table, old.map_or(new, |old| old.tuple())),
                table.qualified(),
                table.columns.get(at).map_or("?", |column| &column.name)
            );
            return Err(Error::new(ErrorKind::Divergence, text).hint(format!(
                "--on-conflict source cannot insert it. Insert the row on the target by hand, as it was on the source before, and run \
                 the same command again; or {}",
                compare_again(table)
            )));
        }
        put_datum(&mut columns, value);
    }
    Ok((new.len() as u16, columns.freeze()))
}
