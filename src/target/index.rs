//! Builds the keys and indexes of a table as soon as it is copied, several tables at a time, and then analyses it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::ledger::SchemaItem;
use super::schema;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::TableState;

/// The items of each table that have not been run, in `pg_dump`'s order, with their positions in the ledger.
pub type ItemsByTable = BTreeMap<u32, Vec<(i32, SchemaItem)>>;

/// Builds what the tables of a channel need, until the channel is closed. A table is named there once it is copied.
///
/// # Errors
/// The first error of a job; what was built stays.
pub async fn run(
    target: &ConnectionSpec,
    application_name: &str,
    items: ItemsByTable,
    names: BTreeMap<u32, String>,
    jobs: usize,
    copied: mpsc::UnboundedReceiver<u32>,
    board: &StatusBoard,
) -> Result<()> {
    let shared = Arc::new(Shared {
        target: target.clone(),
        application_name: application_name.to_owned(),
        items: Mutex::new(items),
        names,
        copied: tokio::sync::Mutex::new(copied),
        board: board.clone(),
    });
    let mut running = JoinSet::new();
    for _ in 0..jobs.max(1) {
        running.spawn(job(Arc::clone(&shared)));
    }
    while let Some(ended) = running.join_next().await {
        ended.unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, format!("an index job failed: {error}"))))?;
    }
    Ok(())
}

struct Shared {
    target: ConnectionSpec,
    application_name: String,
    items: Mutex<ItemsByTable>,
    names: BTreeMap<u32, String>,
    copied: tokio::sync::Mutex<mpsc::UnboundedReceiver<u32>>,
    board: StatusBoard,
}

async fn job(shared: Arc<Shared>) -> Result<()> {
    let mut client = None;
    loop {
        let Some(relid) = shared.copied.lock().await.recv().await else { return Ok(()) };
        let client = match &mut client {
            Some(client) => client,
            none => none.insert(shared.target.connect(&shared.application_name).await?),
        };
        let progress = shared.board.table(relid);
        if let Some(progress) = &progress {
            progress.set_state(TableState::Indexing);
        }
        let items = shared.items.lock().unwrap_or_else(PoisonError::into_inner).remove(&relid).unwrap_or_default();
        for (position, item) in &items {
            schema::run_post_data_item(client, *position, item).await?;
            shared.board.index_done();
        }
        if let Some(name) = shared.names.get(&relid) {
            client
                .batch_execute(&format!("ANALYZE {name}"))
                .await
                .context(|| format!("analysing {name} on the target"))?;
        }
        if let Some(progress) = &progress {
            progress.set_state(TableState::Done);
        }
    }
}
