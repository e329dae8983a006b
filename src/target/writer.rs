//! A session that writes net effects to the target: set by set, never row by row.
//!
//! | of a table | goes by |
//! |---|---|
//! | new rows | COPY into the table itself |
//! | changed rows | COPY into a temporary table of this session, then `UPDATE … FROM` it |
//! | gone rows | COPY of their keys into another, then `DELETE … USING` it |
//!
//! The temporary tables empty themselves at commit (H25: emptied by TRUNCATE, they would bloat the catalog); only a unit of
//! several chunks has to truncate them in between. The plan is pinned: the temporary table is read once and the target's key
//! index is asked for each row; a surprising full scan of a large table would cost more than the batch.
//!
//! Every statement must meet exactly the rows it was given (I6). When it does not, or when the target refuses it, nothing of
//! the unit is committed, and it is replayed row by row ([`WriteError::Refused`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;
use std::time::Instant;

use bytes::Bytes;
use futures_util::SinkExt;
use futures_util::future::try_join;
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, Statement};
use xxhash_rust::xxh3::xxh3_64;

use super::copy_rows::CopyRows;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::{Column, Table};
use crate::sql;

/// What every apply session sets for itself, besides what all of our sessions pin.
///
/// A lock wait of this length is a refusal (I5): a session that waits for its sibling would wait for ever, because the sibling
/// waits for it at the barrier, where PostgreSQL sees no deadlock.
const SETTINGS: &str = "SET session_replication_role = replica; SET synchronous_commit = off; SET lock_timeout = '10s'; \
     SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; SET enable_bitmapscan = off; \
     SET enable_material = off; SET jit = off; SET max_parallel_workers_per_gather = 0";

/// The rows must be where their sessions left them; a row that another transaction is moving is waited for, and then looked at anew.
const ADVANCE: &str = "UPDATE walferry.apply_progress p SET applied = $3 FROM unnest($1::int4[], $2::pg_lsn[]) s(worker, applied) \
     WHERE p.worker = s.worker AND p.applied = s.applied";

/// Each commit locks and empties every temporary table of the session; with more of them, all go, so that a source of
/// thousands of tables does not fill the target's lock table (H10).
const STAGING_TABLES_MAX: usize = 64;

/// Prepared statements of the serial way that a session keeps: one for each table, operation and set of columns.
const SERIAL_STATEMENTS_MAX: usize = 256;

/// The tables that are written to, by their places.
pub trait Tables {
    /// The table at a place, which exists.
    fn table(&self, place: usize) -> &Table;
    /// Whether rows come in binary.
    fn is_binary(&self) -> bool;
}

/// What one session writes to one table, in this order: deletes, updates, inserts.
#[derive(Debug)]
pub struct TableWrites {
    /// The table's place among the [`Tables`].
    pub place: usize,
    /// Keys.
    pub deletes: CopyRows,
    /// Rows by the columns that they leave unchanged: those are not in the rows.
    pub updates: BTreeMap<Vec<u16>, CopyRows>,
    /// Whole rows.
    pub inserts: CopyRows,
}

/// Why a unit could not be written as a set.
#[derive(Debug)]
pub enum WriteError {
    /// The target refused it, or did not hold the rows it should: replay it row by row.
    Refused(Error),
    /// The session is of no more use, or the target of none at the moment.
    Failed(Error),
}

impl From<Error> for WriteError {
    fn from(error: Error) -> WriteError {
        let refused = error.sqlstate().is_some_and(|state| {
            // Whatever the server holds against the rows, deadlocks and lock timeouts; not a server that goes away, is full
            // or was told to stop (57).
            let contends = state.code().starts_with("40") || state.code() == "55P03";
            contends || (!error.is_transient() && !state.code().starts_with("57"))
        });
        if refused { WriteError::Refused(error) } else { WriteError::Failed(error) }
    }
}

impl From<tokio_postgres::Error> for WriteError {
    fn from(error: tokio_postgres::Error) -> WriteError {
        Error::from(error).into()
    }
}

/// One apply session.
pub struct Writer {
    client: Client,
    in_transaction: bool,
    statements: HashMap<(usize, What), Statement>,
    /// Statements of the serial way, by their text.
    serial: HashMap<String, Statement>,
    /// The statement that moves the ledger's rows on.
    advance: Statement,
    /// How many temporary tables there are.
    staging_tables: usize,
    /// Temporary tables that this transaction has filled.
    staged: HashSet<(usize, Staging)>,
    opened: Instant,
}

/// Which statement of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum What {
    Stage(Staging),
    Delete,
    Update(Staging),
    Insert,
}

impl Writer {
    /// Opens a session.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn open(target: &ConnectionSpec, application_name: &str) -> Result<Writer> {
        let client = target.connect(application_name).await?;
        let preparing = || "preparing an apply session on the target".into();
        client.batch_execute(SETTINGS).await.context(preparing)?;
        let advance = client.prepare(ADVANCE).await.context(preparing)?;
        Ok(Writer {
            client,
            in_transaction: false,
            statements: HashMap::new(),
            serial: HashMap::new(),
            advance,
            staging_tables: 0,
            staged: HashSet::new(),
            opened: Instant::now(),
        })
    }

    /// When it was opened. Sessions are renewed now and then: autovacuum cannot freeze their temporary tables (H25).
    pub fn opened(&self) -> Instant {
        self.opened
    }

    /// The session, for statements of its own transaction.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Whether something is written and not committed.
    pub fn in_transaction(&self) -> bool {
        self.in_transaction
    }

    /// Writes the rows of one chunk; the transaction stays open.
    ///
    /// # Errors
    /// [`WriteError`]; the transaction is then to be rolled back.
    pub async fn write(&mut self, tables: &(impl Tables + Sync), writes: &mut [TableWrites]) -> Result<(), WriteError> {
        self.begin().await?;
        for table in writes {
            let name = tables.table(table.place).qualified();
            self.write_table(tables, table).await.map_err(|error| match error {
                WriteError::Refused(error) => WriteError::Refused(error.context(format!("writing to {name}"))),
                WriteError::Failed(error) => WriteError::Failed(error.context(format!("writing to {name}"))),
            })?;
        }
        Ok(())
    }

    /// Opens the transaction, if it is not.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn begin(&mut self) -> Result<()> {
        if !self.in_transaction {
            if self.staging_tables > STAGING_TABLES_MAX {
                self.client.batch_execute("DISCARD TEMP").await?;
                self.staging_tables = 0;
                self.statements.clear();
            }
            self.client.batch_execute("BEGIN").await?;
            self.in_transaction = true;
        }
        Ok(())
    }

    /// Writes into the ledger how far sessions have come, each with where it stood before: the last thing before the commit
    /// (I2). Deferred constraints are checked here too, because after the barrier it is too late to refuse.
    ///
    /// # Errors
    /// `Transient` when the ledger has another position: somebody else has applied meanwhile, such as a session of ours whose
    /// connection was lost and whose commit went through all the same. Committing would apply the unit twice.
    /// Otherwise whatever the server says.
    pub async fn advance(&mut self, sessions: &[(i32, Lsn)], applied: Lsn) -> Result<()> {
        self.begin().await?;
        let (numbers, before): (Vec<i32>, Vec<PgLsn>) =
            sessions.iter().map(|(number, before)| (*number, PgLsn::from(*before))).unzip();
        let applied = PgLsn::from(applied);
        let parameters: [&(dyn ToSql + Sync); 3] = [&numbers, &before, &applied];
        let (advanced, ()) = try_join(
            self.client.execute(&self.advance, &parameters),
            self.client.batch_execute("SET CONSTRAINTS ALL IMMEDIATE"),
        )
        .await
        .context(|| "writing the apply's progress into the ledger".into())?;
        if advanced != sessions.len() as u64 {
            let text = "the ledger's progress is not where this apply left it: another session has applied meanwhile";
            return Err(Error::new(ErrorKind::Transient, text)
                .hint("It is read again. If this repeats, a second walferry works on the same target: stop one."));
        }
        Ok(())
    }

    /// Commits, after [`Writer::advance`].
    ///
    /// # Errors
    /// Whatever the server says. Whether it was committed is then in the ledger, and only there.
    pub async fn commit(&mut self) -> Result<()> {
        self.in_transaction = false;
        self.staged.clear();
        let committed = self.client.batch_execute("COMMIT").await;
        if committed.is_err() {
            // Temporary tables made in that transaction are gone with it.
            self.statements.clear();
        }
        committed.context(|| "committing a batch on the target".into())
    }

    /// Takes back what is not committed.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn roll_back(&mut self) -> Result<()> {
        if self.in_transaction {
            self.in_transaction = false;
            self.staged.clear();
            self.client.batch_execute("ROLLBACK").await?;
            // Temporary tables made in that transaction are gone with it.
            self.statements.clear();
        }
        Ok(())
    }

    /// Runs a statement of the serial way, prepared once.
    pub(super) async fn execute_one(&mut self, text: String, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64> {
        let statement = match self.serial.get(&text) {
            Some(statement) => statement.clone(),
            None => {
                if self.serial.len() >= SERIAL_STATEMENTS_MAX {
                    self.serial.clear();
                }
                let statement = self.client.prepare(&text).await?;
                self.serial.insert(text, statement.clone());
                statement
            }
        };
        Ok(self.client.execute(&statement, parameters).await?)
    }

    async fn write_table(&mut self, tables: &(impl Tables + Sync), writes: &mut TableWrites) -> Result<(), WriteError> {
        let (place, table) = (writes.place, tables.table(writes.place));
        if !writes.deletes.is_empty() {
            let staged = self.stage(tables, place, Staging::Keys, &mut writes.deletes).await?;
            expect(staged, self.execute(tables, place, What::Delete).await?, "deletes", table)?;
        }
        for (unchanged, rows) in &mut writes.updates {
            let staging = Staging::Rows(unchanged.clone());
            let staged = self.stage(tables, place, staging.clone(), rows).await?;
            expect(staged, self.execute(tables, place, What::Update(staging)).await?, "updates", table)?;
        }
        if !writes.inserts.is_empty() {
            self.copy(tables, place, What::Insert, &mut writes.inserts).await?;
        }
        Ok(())
    }

    /// Fills a temporary table, which is empty but where an earlier chunk of the same unit used it.
    async fn stage(
        &mut self,
        tables: &(impl Tables + Sync),
        place: usize,
        staging: Staging,
        rows: &mut CopyRows,
    ) -> Result<u64, WriteError> {
        let table = tables.table(place);
        if !self.staged.insert((place, staging.clone())) {
            self.client.batch_execute(&format!("TRUNCATE {}", staging.qualified(table))).await?;
        }
        let staged = rows.len();
        self.copy(tables, place, What::Stage(staging), rows).await?;
        Ok(staged)
    }

    async fn copy(
        &mut self,
        tables: &(impl Tables + Sync),
        place: usize,
        what: What,
        rows: &mut CopyRows,
    ) -> Result<(), WriteError> {
        let statement = self.statement(tables, place, what).await?;
        let sink = self.client.copy_in::<_, Bytes>(&statement).await?;
        let mut sink = pin!(sink);
        let mut bytes = rows.finish();
        while !bytes.is_empty() {
            sink.feed(bytes.split_to(bytes.len().min(COPY_BYTES))).await?;
        }
        sink.finish().await?;
        Ok(())
    }

    async fn execute(&mut self, tables: &(impl Tables + Sync), place: usize, what: What) -> Result<u64, WriteError> {
        let statement = self.statement(tables, place, what).await?;
        Ok(self.client.execute(&statement, &[]).await?)
    }

    async fn statement(&mut self, tables: &(impl Tables + Sync), place: usize, what: What) -> Result<Statement> {
        if let Some(statement) = self.statements.get(&(place, what.clone())) {
            return Ok(statement.clone());
        }
        let table = tables.table(place);
        if let What::Stage(staging) = &what {
            self.client.batch_execute(&staging.create(table)).await?;
            self.staging_tables += 1;
        }
        let statement = self.client.prepare(&text(table, &what, tables.is_binary())).await?;
        self.statements.insert((place, what), statement.clone());
        Ok(statement)
    }
}

/// Bytes in a message of COPY.
const COPY_BYTES: usize = 128 * 1024;

fn expect(staged: u64, met: u64, what: &str, table: &Table) -> Result<(), WriteError> {
    if staged == met {
        return Ok(());
    }
    let text = format!("{what} of {staged} rows of {} met {met} rows on the target", table.qualified());
    Err(WriteError::Refused(Error::new(ErrorKind::Divergence, text)))
}

/// A temporary table that a session has for the changes of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Staging {
    /// The keys of rows that go.
    Keys,
    /// Rows that change, without the columns at these positions.
    Rows(Vec<u16>),
}

impl Staging {
    fn name(&self, table: &Table) -> String {
        match self {
            Staging::Keys => format!("walferry_keys_{}", table.relid),
            Staging::Rows(unchanged) => {
                let positions: Vec<u8> = unchanged.iter().flat_map(|at| at.to_be_bytes()).collect();
                format!("walferry_rows_{}_{:x}", table.relid, xxh3_64(&positions))
            }
        }
    }

    fn qualified(&self, table: &Table) -> String {
        sql::qualified("pg_temp", &self.name(table))
    }

    fn columns<'a>(&self, table: &'a Table) -> Vec<&'a Column> {
        match self {
            Staging::Keys => table.key_columns().collect(),
            Staging::Rows(unchanged) => (0u16..)
                .zip(&table.columns)
                .filter(|(at, _)| !unchanged.contains(at))
                .map(|(_, column)| column)
                .collect(),
        }
    }

    fn column_list(&self, table: &Table) -> String {
        sql::identifiers(self.columns(table).into_iter().map(|column| column.name.as_str()))
    }

    /// Without the table's constraints: refusing is for the table itself.
    fn create(&self, table: &Table) -> String {
        format!(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {} ON COMMIT DELETE ROWS AS SELECT {} FROM ONLY {} WITH NO DATA",
            sql::identifier(&self.name(table)),
            self.column_list(table),
            table.qualified()
        )
    }
}

/// The SQL of a statement.
fn text(table: &Table, what: &What, binary: bool) -> String {
    let format = if binary { "binary" } else { "text" };
    let target = table.qualified();
    match what {
        What::Stage(staging) => {
            format!("COPY {} ({}) FROM STDIN (FORMAT {format})", staging.qualified(table), staging.column_list(table))
        }
        What::Delete => {
            format!("DELETE FROM ONLY {target} t USING {} s WHERE {}", Staging::Keys.qualified(table), same_key(table))
        }
        What::Update(staging) => {
            let is_key = |column: &Column| table.key_columns().any(|key| key.number == column.number);
            let columns = staging.columns(table);
            let (keys, others): (Vec<&Column>, Vec<&Column>) = columns.into_iter().partition(|column| is_key(column));
            // A row that is all key has nothing to set, but it must be there all the same.
            let set = if others.is_empty() { keys } else { others };
            let set: Vec<String> =
                set.iter().map(|column| format!("{0} = s.{0}", sql::identifier(&column.name))).collect();
            format!(
                "UPDATE ONLY {target} t SET {} FROM {} s WHERE {}",
                set.join(", "),
                staging.qualified(table),
                same_key(table)
            )
        }
        What::Insert if table.columns.is_empty() => format!("COPY {target} FROM STDIN (FORMAT {format})"),
        What::Insert => format!("COPY {target} ({}) FROM STDIN (FORMAT {format})", table.column_list()),
    }
}

/// The key's columns compared with the operator that its index has, whatever the search path.
fn same_key(table: &Table) -> String {
    let equal = |column: &Column| {
        let name = sql::identifier(&column.name);
        let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
        format!("t.{name} OPERATOR({schema}.=) s.{name}")
    };
    table.key_columns().map(equal).collect::<Vec<_>>().join(" AND ")
}
