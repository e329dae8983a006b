//! Builds the keys and indexes of a table as soon as it is copied, several at a time, and then analyses it.
//!
//! The keys of a table come first, one after the other, because they lock it; its plain indexes are then built beside each
//! other, and beside those of other tables, by as many sessions as there are jobs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::ledger::SchemaItem;
use super::schema;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::TableState;

/// The items of each table that have not been run, in `pg_dump`'s order, with their positions in the ledger.
pub type ItemsByTable = BTreeMap<u32, Vec<(i32, SchemaItem)>>;

/// How builds are done.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Sessions that build at once.
    pub jobs: usize,
    /// The memory for all of them together, in bytes; by the target's settings when it is not given.
    pub memory_bytes: Option<u64>,
}

/// Builds what the tables of a channel need, until the channel is closed. A table is named there once it is copied.
///
/// # Errors
/// The first error of a build; what was built stays.
pub async fn run(
    target: &ConnectionSpec,
    application_name: &str,
    items: ItemsByTable,
    names: BTreeMap<u32, String>,
    options: Options,
    mut copied: mpsc::UnboundedReceiver<u32>,
    board: &StatusBoard,
) -> Result<()> {
    let builder = Arc::new(Builder {
        target: target.clone(),
        application_name: application_name.to_owned(),
        items: Mutex::new(items),
        names,
        options,
        free: Semaphore::new(options.jobs.max(1)),
        idle: Mutex::new(Vec::new()),
        board: board.clone(),
    });
    let mut tables = JoinSet::new();
    let mut more = true;
    loop {
        tokio::select! {
            relid = copied.recv(), if more => match relid {
                Some(relid) => drop(tables.spawn(Arc::clone(&builder).build(relid))),
                None => more = false,
            },
            Some(ended) = tables.join_next() => {
                ended.unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, format!("an index job failed: {error}"))))?;
            }
            else => return Ok(()),
        }
    }
}

struct Builder {
    target: ConnectionSpec,
    application_name: String,
    items: Mutex<ItemsByTable>,
    names: BTreeMap<u32, String>,
    options: Options,
    /// One permit for each session that may work.
    free: Semaphore,
    /// Sessions that do not.
    idle: Mutex<Vec<Client>>,
    board: StatusBoard,
}

impl Builder {
    /// Everything that one table needs.
    async fn build(self: Arc<Self>, relid: u32) -> Result<()> {
        let items = self.items.lock().unwrap_or_else(PoisonError::into_inner).remove(&relid).unwrap_or_default();
        let progress = self.board.table(relid);
        let (beside_others, in_order): (Vec<_>, Vec<_>) = items.into_iter().partition(|(_, item)| is_plain_index(item));
        if !in_order.is_empty() {
            let _permit = self.permit().await?;
            if let Some(progress) = &progress {
                progress.set_state(TableState::Indexing);
            }
            let client = self.session().await?;
            for item in &in_order {
                self.run_item(&client, item).await?;
            }
            self.give_back(client);
        }
        let build_one = async |item: &(i32, SchemaItem)| {
            let _permit = self.permit().await?;
            if let Some(progress) = &progress {
                progress.set_state(TableState::Indexing);
            }
            let client = self.session().await?;
            self.run_item(&client, item).await?;
            self.give_back(client);
            Result::<()>::Ok(())
        };
        try_join_all(beside_others.iter().map(build_one)).await?;
        if let Some(name) = self.names.get(&relid) {
            let _permit = self.permit().await?;
            let client = self.session().await?;
            client
                .batch_execute(&format!("ANALYZE {name}"))
                .await
                .context(|| format!("analysing {name} on the target"))?;
            self.give_back(client);
        }
        if let Some(progress) = &progress {
            progress.set_state(TableState::Done);
        }
        Ok(())
    }

    async fn run_item(&self, client: &Client, (position, item): &(i32, SchemaItem)) -> Result<()> {
        schema::run_post_data_item(client, *position, item).await?;
        self.board.index_done();
        Ok(())
    }

    async fn permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.free.acquire().await.map_err(|error| Error::new(ErrorKind::Other, error.to_string()))
    }

    /// A session of whoever holds a permit.
    async fn session(&self) -> Result<Client> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(client) = idle {
            return Ok(client);
        }
        let client = self.target.connect(&self.application_name).await?;
        set_memory(&client, self.options).await?;
        Ok(client)
    }

    fn give_back(&self, client: Client) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(client);
    }
}

/// Whether an item does nothing but build an index: what else `pg_dump` writes with one (`CLUSTER ON`, `REPLICA IDENTITY`)
/// wants a stronger lock, for which two builds of a table would wait for each other.
fn is_plain_index(item: &SchemaItem) -> bool {
    item.kind == "INDEX" && !item.statement.contains("ALTER ")
}

/// Gives a session its share of the memory: sorts in memory are faster, and the server takes parallel workers by it, one
/// for each 32 MiB. Unless it was said how much, a quarter of `shared_buffers` for all, which is a sixteenth of the memory of a
/// server that is set up as the manual advises; and never less than the server's own setting.
async fn set_memory(client: &Client, options: Options) -> Result<()> {
    const DEFAULT_MAX_KILOBYTES: i64 = 1 << 20;
    let jobs = i64::try_from(options.jobs.max(1)).unwrap_or(i64::MAX);
    let share = |bytes: i64| (bytes / jobs) >> 10;
    let settings = client
        .query_typed_one(
            "SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('maintenance_work_mem')), \
                    pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers'))",
            &[],
        )
        .await
        .context(|| "reading the target's memory settings".into())?;
    let (own, buffers): (i64, i64) = (settings.get(0), settings.get(1));
    let kilobytes = match options.memory_bytes {
        Some(bytes) => share(bytes.min(i64::MAX.unsigned_abs()).cast_signed()).max(1 << 10),
        None => share(buffers / 4).min(DEFAULT_MAX_KILOBYTES).max(own >> 10),
    };
    let statement = format!("SET maintenance_work_mem = {}", kilobytes.min(i64::from(i32::MAX)));
    client.batch_execute(&statement).await.context(|| "setting the memory for index builds".into())
}
