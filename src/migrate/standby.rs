//! Where the reading is done: on the source, or on standbys of it.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::Client;
use tracing::Instrument;

use super::{Config, Running};

use crate::connection::ConnectionSpec;
use crate::error::Result;
use crate::observe::status::Level;
use crate::source::slot::{self, ServerIdentity, SlotState};
use crate::source::snapshot::HeldSnapshot;
use crate::source::standby;
use crate::target::ledger::Migration;

/// How long a standby may take to end what a dead walferry left there.
const ANSWER_MAX: Duration = Duration::from_secs(10);

impl Config {
    /// Where rows are read.
    pub(super) fn copy_source(&self) -> &ConnectionSpec {
        self.standbys.copy.as_ref().unwrap_or(&self.source)
    }

    /// Where the slot is.
    pub(super) fn stream_source(&self) -> &ConnectionSpec {
        self.standbys.stream.as_ref().unwrap_or(&self.source)
    }
}

impl Running {
    /// A snapshot for the tables that are to be copied, where they are read.
    pub(super) async fn take_snapshot(&self, server: &ServerIdentity, floor: u64) -> Result<HeldSnapshot> {
        let (source, name) = (&self.config.source, &self.application_name);
        match &self.config.standbys.copy {
            None => HeldSnapshot::take(source, name, server, floor).await,
            Some(standby) => {
                self.board.event(Level::Info, format!("rows are read on the standby {}", standby.describe()));
                HeldSnapshot::take_on_standby(source, standby, name, server, floor).await
            }
        }
    }

    /// Ends what a dead walferry left on standbys. It holds nothing there that anybody waits for, so one that does not answer is let be.
    pub(super) async fn end_sessions_on_standbys(&self) {
        for standby in self.config.standbys.all() {
            match tokio::time::timeout(ANSWER_MAX, self.end_sessions(standby)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "sessions of an earlier walferry on a standby"),
                Err(_) => tracing::debug!("a standby does not answer"),
            }
        }
    }

    /// A session where the slot is, if that is not the source.
    async fn session_at_slot(&self) -> Result<Option<Client>> {
        match &self.config.standbys.stream {
            Some(standby) => Ok(Some(standby.connect("walferry").await?)),
            None => Ok(None),
        }
    }

    /// Drops the slot where it is; `source` is a session on the source.
    pub(super) async fn drop_slot(&self, source: &Client, name: &str) -> Result<()> {
        let standby = self.session_at_slot().await?;
        slot::drop(standby.as_ref().unwrap_or(source), name).await
    }

    /// How the slot stands; `source` is a session on the source.
    pub(super) async fn slot_state(&self, source: &Client, name: &str) -> Result<Option<SlotState>> {
        let standby = self.session_at_slot().await?;
        slot::state(standby.as_ref().unwrap_or(source), name).await
    }

    /// Ends the migration when the standby that the stream comes from is promoted (H16).
    pub(super) fn watch_standby(&self, migration: &Migration, beside: &mut JoinSet<Result<()>>) {
        let Some(standby) = self.config.standbys.stream.clone() else { return };
        let timeline = u32::try_from(migration.source_timeline).unwrap_or_default();
        let server = ServerIdentity { system: migration.source_system.clone(), timeline };
        let name = self.application_name.clone();
        beside.spawn(async move { standby::watch(&standby, &name, &server).await }.in_current_span());
    }
}
