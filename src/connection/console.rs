//! PgBouncer's admin console: a session that takes no settings and knows only the simple protocol.

use std::time::Duration;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::login::{self, Login, Session};
use super::{ConnectionSpec, Stream};
use crate::error::{Context, Result};

/// A session with the admin console.
pub(crate) struct Console(Client);

impl Session for Console {
    const TCP_USER_TIMEOUT: Option<Duration> = None;
    const IS_A_SERVER: bool = false;

    async fn log_in(stream: Stream, login: &Login) -> Result<Console> {
        Ok(Console(login::client(stream, login, false).await?))
    }

    async fn first_row(&mut self, sql: &str) -> Result<Vec<Option<String>>> {
        login::first_row(&self.0, sql).await
    }
}

impl Console {
    /// Logs in to the console of a PgBouncer; its database is called `pgbouncer`, whatever the specification says.
    pub(crate) async fn open(spec: &ConnectionSpec) -> Result<Console> {
        login::open(&spec.with_database("pgbouncer"), "walferry").await
    }

    /// Runs a command, and waits until PgBouncer has done it.
    pub(crate) async fn command(&self, command: &str) -> Result<()> {
        self.0.simple_query(command).await.context(|| format!("{command} in PgBouncer's admin console"))?;
        Ok(())
    }

    /// The rows that a SHOW answers, each with the named columns as text.
    pub(crate) async fn show<const N: usize>(
        &self,
        command: &str,
        columns: [&str; N],
    ) -> Result<Vec<[Option<String>; N]>> {
        let messages =
            self.0.simple_query(command).await.context(|| format!("{command} in PgBouncer's admin console"))?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(columns.map(|column| {
                let known = row.columns().iter().any(|known| known.name() == column);
                if known { row.get(column).map(str::to_owned) } else { None }
            })),
            _ => None,
        });
        Ok(rows.collect())
    }
}
