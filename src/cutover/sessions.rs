//! What a cutover works with, opened before anybody waits.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio_postgres::Client;

use super::{Cutover, FenceMode, Options};
use crate::error::{Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::target::ledger;
use crate::unstreamed;

/// The sessions, and what was read by them at once.
pub(super) struct Sessions {
    pub(super) source: Client,
    pub(super) target: Client,
    /// Of their own, for the last look at the catalog and the constraints.
    pub(super) inspector: Client,
    pub(super) checker: Client,
    /// The source's catalog as it was recorded.
    pub(super) before: BTreeMap<String, String>,
    /// Behind this fence the source takes no new session, ours neither.
    pub(super) is_locked_out: bool,
    /// For a comparison there.
    spare: Mutex<Option<Client>>,
}

impl Sessions {
    pub(super) async fn open(cutover: &Cutover<'_>, options: &Options) -> Result<Sessions> {
        let source = cutover.source.connect(cutover.application_name).await?;
        let target = cutover.target.connect(cutover.application_name).await?;
        let inspector = cutover.source.connect(cutover.application_name).await?;
        let checker = cutover.target.connect(cutover.application_name).await?;
        tokio::join!(unstreamed::silence_event_triggers(&target), unstreamed::silence_event_triggers(&checker));
        let before = ledger::fingerprint(&target).await?;
        let now: Vec<Table> = ledger::tables(&target).await?.into_iter().map(|entry| entry.table).collect();
        if let Some(name) = changed_since(cutover.tables, &now) {
            let text = format!("{name} has come, gone or changed just now: DDL of the source has reached the target");
            return Err(Error::new(ErrorKind::Aborted, text).hint("Nothing has happened. Run the same command again."));
        }
        let is_locked_out = options.fence == FenceMode::Connections;
        let spare = if is_locked_out && cutover.tables.iter().any(|(_, insert_only)| *insert_only) {
            Some(cutover.source.connect(cutover.application_name).await?)
        } else {
            None
        };
        Ok(Sessions { source, target, inspector, checker, before, is_locked_out, spare: Mutex::new(spare) })
    }

    /// A session with the source that is there already, once.
    pub(super) fn spare(&self) -> Option<Client> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A table that the ledger has otherwise than it was read for the cutover: it would be in what is compared, and in nothing else.
///
/// Chunks do not count. They come and go all the time, the apply takes them up while a cutover drains, and nothing of a cutover names
/// one: it locks, compares and hands over hypertables. That none was missed is looked at behind the fence, in the source's catalog
/// and the ledger as they are then (`timescale/settle.rs`).
fn changed_since(read: &[(Table, bool)], now: &[Table]) -> Option<String> {
    let was: BTreeMap<u32, &Table> = read.iter().map(|(table, _)| (table.relid, table)).collect();
    let is: BTreeMap<u32, &Table> = now.iter().map(|table| (table.relid, table)).collect();
    let other = |(relid, table): &(&u32, &&Table)| was.get(relid) != Some(table);
    let gone = |(relid, _): &(&u32, &&Table)| !is.contains_key(relid);
    let differing = is.iter().filter(other).chain(was.iter().filter(gone));
    differing.map(|(_, table)| table).find(|table| table.chunk.is_none()).map(|table| table.qualified())
}
