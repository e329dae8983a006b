//! In which role rows are written to the target: what the server allows decides, once, when a migration begins (H23).
//!
//! | role | triggers, rules, foreign keys | who may |
//! |---|---|---|
//! | replica | are there while rows are written, and do not fire | superusers; from 15 on also who was granted `SET ON PARAMETER session_replication_role` |
//! | origin | are not there before the cutover ([`super::late`]) | every owner |

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::error::{Context, Error, ErrorKind, Result};

/// The value of `session_replication_role` in the sessions that write rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApplyRole {
    /// Triggers, rules and foreign keys are there and do not fire.
    #[default]
    Replica,
    /// They would fire, and so are made at the cutover only.
    Origin,
}

impl ApplyRole {
    /// What our role may be on a server; tried in a transaction that is rolled back.
    ///
    /// # Errors
    /// Whatever the server says, but for the refusal itself.
    pub async fn allowed(target: &Client) -> Result<ApplyRole> {
        let doing = || "trying session_replication_role".to_owned();
        target.batch_execute("BEGIN").await.context(doing)?;
        let tried = target.batch_execute("SET LOCAL session_replication_role = replica").await;
        target.batch_execute("ROLLBACK").await.context(doing)?;
        match tried {
            Ok(()) => Ok(ApplyRole::Replica),
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(ApplyRole::Origin),
            Err(error) => Err(error).context(doing),
        }
    }

    /// That of the migration whose ledger the target has.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn recorded(target: &Client) -> Result<ApplyRole> {
        let row = target
            .query_typed_one("SELECT apply_role FROM walferry.migration", &[])
            .await
            .context(|| "reading from the ledger in which role rows are written".into())?;
        ApplyRole::parse(row.get(0))
    }

    /// As the ledger has it.
    pub fn name(self) -> &'static str {
        match self {
            ApplyRole::Replica => "replica",
            ApplyRole::Origin => "origin",
        }
    }

    /// The role of a name in the ledger.
    ///
    /// # Errors
    /// `Other` for one that this version does not know.
    pub fn parse(name: &str) -> Result<ApplyRole> {
        let known = [ApplyRole::Replica, ApplyRole::Origin].into_iter().find(|role| role.name() == name);
        known.ok_or_else(|| {
            Error::new(ErrorKind::Other, format!("the ledger names a role `{name}` that this version does not know"))
        })
    }

    /// What the transactions begin with that write rows.
    ///
    /// In the origin role deferrable constraints are looked at, and a batch can break one between two of its statements: all wait
    /// until [`super::writer`] asks for them, before the barrier (H19).
    pub fn begin_statement(self) -> &'static str {
        match self {
            ApplyRole::Replica => "SET LOCAL session_replication_role = replica",
            ApplyRole::Origin => "SET CONSTRAINTS ALL DEFERRED",
        }
    }
}
