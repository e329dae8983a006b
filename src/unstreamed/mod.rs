//! What the stream does not carry, and what is kept current beside it: large objects, the rows of extensions' configuration tables,
//! and what materialized views show.
//!
//! ```text
//!                    ┌── marker of each, read on the source ──┐
//!  copy ─► follow: every 30 s ─► differs from the ledger's? ──┴─► copied or refreshed again, with its marker in the ledger (I2)
//!          cutover, before the fence: once more, so that little is left
//!          cutover, under the fence: once more (H14); nobody writes any more, so what is equal now stays equal
//! ```
//!
//! Of a part of a database (`--include-table` and the like) only the materialized views that belong to it are kept current: large objects
//! and extensions belong to no table, and `check` names what is left out.
//!
//! A marker is whatever changes when the thing does: cheap to read, and compared for equality only.

pub mod compare;
pub mod configuration;
pub mod large_object;
pub mod materialized_view;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio_postgres::Client;

use crate::apply::Applied;
use crate::connection::ConnectionSpec;
use crate::cutover;
use crate::error::{Context, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;
use crate::source::scope::Scope;
use configuration::LEFT_OUT;
use large_object::Owners;
use materialized_view::View;

pub(crate) use materialized_view::Refused;

/// How often it is looked while following.
const INTERVAL: Duration = Duration::from_secs(30);
/// So many times as long as a look takes is none: where there is much, the servers have other work to do.
const REST: u32 = 10;

/// Has the session's own DDL (`REFRESH`, `COMMENT`, `ALTER … IDENTITY`) fire no event trigger of the user: what they have done on the
/// source comes with the stream. Where the role may not do that, they fire.
pub(crate) async fn silence_event_triggers(target: &Client) {
    if let Err(error) = target.batch_execute("SET session_replication_role = replica").await {
        tracing::debug!(%error, "event triggers of the target fire for what the migration does");
    }
}

/// Forgets when what was copied: a source that has failed over may use the numbers of its lost transactions once more, so what is there
/// is compared by its content.
///
/// # Errors
/// Whatever the server says.
pub async fn forget(target: &Client) -> Result<()> {
    target
        .batch_execute("DROP TABLE IF EXISTS walferry.large_object, walferry.materialized_view")
        .await
        .context(|| "forgetting what the ledger says of large objects and materialized views".into())
}

/// Copies what there is, before the target follows. Materialized views come later, when there is something to refresh them from.
///
/// # Errors
/// Whatever the servers say; called again, it goes on.
pub async fn copy(source: &Client, target: &Client, owners: &Owners, scope: &Scope) -> Result<()> {
    if scope.moves_large_objects() {
        large_object::sync(source, target, owners).await?;
    }
    if scope.moves_configuration() {
        configuration::sync(source, target).await?;
    }
    Ok(())
}

/// Brings all of it up to date once. Answers the materialized views that cannot be refreshed.
///
/// # Errors
/// Whatever the servers say, and `Other` when the apply has ended.
pub async fn bring_up_to_date(
    source: &Client,
    target: &Client,
    owners: &Owners,
    scope: &Scope,
    applied: &watch::Receiver<Applied>,
) -> Result<Vec<Refused>> {
    copy(source, target, owners, scope).await?;
    let views = changed_views(source, target, scope).await?;
    if views.is_empty() {
        return Ok(Vec::new());
    }
    cutover::let_the_apply_pass(source, applied).await?;
    refresh(target, views).await
}

/// The views that are moved, and that the ledger knows otherwise.
async fn changed_views(source: &Client, target: &Client, scope: &Scope) -> Result<Vec<View>> {
    let selection = scope.select(source).await?;
    materialized_view::changed(target, materialized_view::list(source, selection.as_ref()).await?).await
}

/// Refreshes views from what the target holds now, and writes into the ledger which of them are done.
async fn refresh(target: &Client, views: Vec<View>) -> Result<Vec<Refused>> {
    let refused = materialized_view::refresh(target, &views).await?;
    let is_done = |view: &View| refused.iter().all(|refused| refused.view != *view);
    let done: Vec<View> = views.into_iter().filter(is_done).collect();
    materialized_view::remember(target, &done).await?;
    Ok(refused)
}

/// Whether there is anything of it at all, in one round trip: most databases have nothing, and applications wait.
///
/// # Errors
/// Whatever the servers say.
pub async fn is_there_any(source: &Client, target: &Client, scope: &Scope) -> Result<bool> {
    let others = format!(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extconfig IS NOT NULL AND extname NOT IN ({LEFT_OUT}) AND {}) \
             OR EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind = 'm')",
        scope.moves_configuration()
    );
    let large_objects = async { Ok(scope.moves_large_objects() && large_object::are_there(source, target).await?) };
    let (large_objects, others) = tokio::try_join!(large_objects, async {
        source.query_typed_one(&others, &[]).await.context(|| "looking for what is in no stream".into())
    })?;
    Ok(large_objects || others.get(0))
}

/// The last look, when nobody writes to the source any more (H14): what is left is copied. Answers the materialized views that were
/// refreshed meanwhile: refreshing them may take longer than applications are to wait.
///
/// # Errors
/// Whatever the servers say.
pub async fn settle(source: &Client, target: &Client, owners: &Owners, scope: &Scope) -> Result<Vec<View>> {
    copy(source, target, owners, scope).await?;
    changed_views(source, target, scope).await
}

/// Refreshes, after the decision, what [`settle`] has left. Answers a sentence for each that somebody has to look after.
pub async fn refresh_late(target: &Client, views: Vec<View>) -> Vec<String> {
    let names: Vec<String> = views.iter().map(|view| view.object.clone()).collect();
    match refresh(target, views).await {
        Ok(refused) => refused.into_iter().map(|refused| refused.into_error().to_string()).collect(),
        Err(error) => vec![format!("refreshing {}: {error}", names.join(", "))],
    }
}

/// Brings it up to date again and again while following.
pub struct Keeper {
    /// Where it comes from.
    pub source: ConnectionSpec,
    /// Where it goes.
    pub target: ConnectionSpec,
    /// What our sessions call themselves.
    pub application_name: String,
    /// Who owns what on the target.
    pub owners: Owners,
    /// What of the database is moved.
    pub scope: Scope,
    /// How far the apply is.
    pub applied: watch::Receiver<Applied>,
    /// What would stand against a cutover, a sentence each.
    pub obstacles: watch::Sender<Vec<String>>,
    /// Where it is said.
    pub board: StatusBoard,
    /// It works while it has the turn: vacuuming the target uses the same connections.
    pub turn: Arc<Mutex<()>>,
}

impl Keeper {
    /// Does it, until it is dropped.
    pub async fn run(self) -> Infallible {
        loop {
            let in_turn = self.turn.lock().await;
            let began = Instant::now();
            let now: Vec<String> = match self.once().await {
                Ok(refused) => refused.into_iter().map(|refused| refused.into_error().to_string()).collect(),
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, "what is not in the stream is looked at again later");
                    self.obstacles.borrow().clone()
                }
                Err(error) => vec![error.to_string()],
            };
            drop(in_turn);
            let before = self.obstacles.send_replace(now.clone());
            for obstacle in now.iter().filter(|obstacle| !before.contains(obstacle)) {
                self.board.event(Level::Warn, obstacle);
            }
            tokio::time::sleep(INTERVAL.max(began.elapsed() * REST)).await;
        }
    }

    async fn once(&self) -> Result<Vec<Refused>> {
        let name = &self.application_name;
        let (source, target) = tokio::try_join!(self.source.connect(name), self.target.connect(name))?;
        silence_event_triggers(&target).await;
        bring_up_to_date(&source, &target, &self.owners, &self.scope, &self.applied).await
    }
}
