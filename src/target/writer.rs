//! A session that writes net effects to the target, all of a share in one go.
//!
//! | of a table | goes by |
//! |---|---|
//! | new rows | COPY into the table itself |
//! | few changed or gone rows | a prepared statement each, by the key |
//! | many changed rows | COPY into a temporary table of this session, then `UPDATE … FROM` it |
//! | many gone rows | COPY of their keys into another, then `DELETE … USING` it |
//! | many gone rows of a chunk that have no key | COPY of the rows into another, then `DELETE … USING` it; too many equal ones come back |
//!
//! What a session writes of a chunk, over all its tables, goes to the server as one pipeline without waiting for an answer in
//! between, `BEGIN`, the preparing of statements and (with a unit's last chunk) its rows of the ledger included; the commit is
//! another. So a unit takes two round trips, whatever is in it.
//!
//! The temporary tables empty themselves at commit (H25: emptied by TRUNCATE, they would bloat the catalog), every one of the
//! session as soon as one was used; only a unit of several chunks has to truncate them in between. The plan is pinned: the
//! temporary table is read once and the target's key index is asked for each row; a surprising full scan of a large table would
//! cost more than the batch.
//!
//! Every statement must meet exactly the rows it was given (I6). When one does not, or when the target refuses it, nothing of
//! the unit is committed, and it is replayed row by row ([`WriteError::Refused`]). The counts are looked at when the answers are
//! there, which is before the commit is sent.

mod statements;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use statements::{Key, Staging, Statements, What, text};

use super::copy_rows::CopyRows;
use super::role::ApplyRole;
use super::serial;
use crate::connection::ConnectionSpec;
use crate::connection::pipeline::{Requests, Value};
use crate::connection::wire::RawSession;
use crate::decode::{Datum, KeptTuple};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::timescale::place::Places;
use crate::timescale::rows;
use crate::timescale::sets::{self, TimeRange};

/// What every apply session sets for itself, besides what all of our sessions pin.
///
/// A lock wait of this length is a refusal (I5): a session that waits for its sibling would wait for ever, because the sibling
/// waits for it at the barrier, where PostgreSQL sees no deadlock. What is looked for in pg_settings came with 11 and 12, and the old
/// server of a way back may be older. With TimescaleDB a generic plan would open every chunk of a hypertable for each row, and the
/// extension would decompress only so many rows.
const SETTINGS: &str = "SET synchronous_commit = off; SET lock_timeout = '10s'; \
     SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; SET enable_bitmapscan = off; \
     SET enable_material = off; SET max_parallel_workers_per_gather = 0; \
     SELECT pg_catalog.set_config(s.name, v.value, false) FROM pg_catalog.pg_settings s \
     JOIN (VALUES ('jit', 'off'), ('plan_cache_mode', 'force_generic_plan')) v(name, value) USING (name); \
     SELECT pg_catalog.set_config(v.name, v.value, false) FROM pg_catalog.pg_extension e, \
     (VALUES ('plan_cache_mode', 'force_custom_plan'), ('timescaledb.max_tuples_decompressed_per_dml_transaction', '0')) v(name, value) \
     WHERE e.extname = 'timescaledb'";

/// The rows must be where their sessions left them; a row that another transaction is moving is waited for, and then looked at anew.
const ADVANCE: &str = "UPDATE walferry.apply_progress p SET applied = $3 FROM unnest($1::int4[], $2::pg_lsn[]) s(worker, applied) \
     WHERE p.worker = s.worker AND p.applied = s.applied";

/// Each commit locks and empties every temporary table of the session; with more of them, all go, so that a source of
/// thousands of tables does not fill the target's lock table (H10).
const STAGING_TABLES_MAX: usize = 64;

/// Rows of a table, in a session's share of a chunk, that are deleted or updated by a statement each; more of them go as sets.
///
/// Measured in one session, each as one transaction, with a table of 200,000 rows: 20 rows take 0.4 ms singly and 0.7 ms as a set,
/// 80 rows 1.2 ms either way, 160 rows 2.3 ms and 2.0 ms. Every other temporary table that the session has adds 0.2 ms to the set
/// (the commit empties them all). So 20,000 updates over 500 tables, ten of each in a session's share, go at 90,000 a second singly,
/// and at 7,000 as sets.
pub const SINGLE_ROWS_MAX: usize = 100;

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
    /// Rows that go, by their keys.
    pub deletes: CopyRows,
    /// The same, each by a statement of its own.
    pub single_deletes: Vec<KeptTuple>,
    /// Rows by the columns that they leave unchanged: those are not in the rows.
    pub updates: BTreeMap<Vec<u16>, CopyRows>,
    /// The same, each by a statement of its own; unchanged columns have no value in them.
    pub single_updates: Vec<KeptTuple>,
    /// Whole rows that go and that nothing else names, with how many equal ones go, by the columns that are NULL in them.
    pub equal_deletes: BTreeMap<Vec<u16>, CopyRows>,
    /// Of a chunk, the times of the rows that are deleted or updated as sets.
    pub range: Option<TimeRange>,
    /// Whole rows.
    pub inserts: CopyRows,
}

impl TableWrites {
    /// Whether rows that were there are changed or go.
    fn has_changes(&self) -> bool {
        let sets = [self.deletes.is_empty(), self.updates.is_empty(), self.equal_deletes.is_empty()];
        let singly = [self.single_deletes.is_empty(), self.single_updates.is_empty()];
        sets.into_iter().chain(singly).any(|none| !none)
    }
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

/// One apply session.
pub struct Writer {
    session: RawSession,
    in_transaction: bool,
    statements: Statements,
    /// Temporary tables that there are.
    staging: HashSet<(usize, Staging)>,
    /// Those of them that this transaction has made, and that a rollback takes back.
    staging_made: Vec<(usize, Staging)>,
    /// Those of them that this transaction has filled.
    staged: HashSet<(usize, Staging)>,
    /// The target's chunks.
    places: Places,
    role: ApplyRole,
    /// This transaction plans each statement for its values, as a hypertable needs it.
    custom_plans: bool,
    opened: Instant,
}

/// What is sent at once, and what is expected of it.
#[derive(Default)]
struct Pipeline {
    requests: Requests,
    expected: Vec<Expected>,
}

/// What a statement is for, and how many rows it must meet.
#[derive(Clone, Copy)]
enum Expected {
    /// Whatever it meets.
    Any,
    /// What is done to so many rows of the table at a place.
    Rows(usize, &'static str, u64),
    /// Rows of the ledger.
    Progress(u64),
}

impl Pipeline {
    fn text(&mut self, text: &str) -> Result<()> {
        self.expected.push(Expected::Any);
        self.requests.execute_text(text)
    }
}

impl Writer {
    /// Opens a session that writes in a role.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn open(target: &ConnectionSpec, application_name: &str, role: ApplyRole) -> Result<Writer> {
        let mut session = RawSession::connect(target, application_name).await?;
        let settings = match role {
            ApplyRole::Replica => format!("{SETTINGS}; SET session_replication_role = replica"),
            ApplyRole::Origin => SETTINGS.to_owned(),
        };
        session.simple_query(&settings).await.context(|| "preparing an apply session on the target".into())?;
        Ok(Writer {
            session,
            in_transaction: false,
            statements: Statements::default(),
            staging: HashSet::new(),
            staging_made: Vec::new(),
            staged: HashSet::new(),
            places: Places::default(),
            role,
            custom_plans: false,
            opened: Instant::now(),
        })
    }

    /// When it was opened. Sessions are renewed now and then: autovacuum cannot freeze their temporary tables (H25).
    pub fn opened(&self) -> Instant {
        self.opened
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
        self.find_chunks(tables, writes).await?;
        let mut pipeline = Pipeline::default();
        self.add_begin(&mut pipeline).await?;
        self.add_writes(&mut pipeline, tables, writes)?;
        self.run(pipeline, tables).await
    }

    /// The last chunk of a unit, and with it what [`Writer::advance`] does.
    ///
    /// # Errors
    /// Those of both; the transaction is then to be rolled back.
    pub async fn write_and_advance(
        &mut self,
        tables: &(impl Tables + Sync),
        writes: &mut [TableWrites],
        sessions: &[(i32, Lsn)],
        applied: Lsn,
    ) -> Result<(), WriteError> {
        self.find_chunks(tables, writes).await?;
        let mut pipeline = Pipeline::default();
        self.add_begin(&mut pipeline).await?;
        self.add_writes(&mut pipeline, tables, writes)?;
        self.add_advance(&mut pipeline, sessions, applied)?;
        self.run(pipeline, tables).await
    }

    /// Opens the transaction, if it is not.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn begin(&mut self) -> Result<()> {
        let mut pipeline = Pipeline::default();
        self.add_begin(&mut pipeline).await?;
        self.run_without_tables(pipeline).await
    }

    /// Writes into the ledger how far sessions have come, each with where it stood before: the last thing before the commit
    /// (I2). Deferred constraints are checked here too, because after the barrier it is too late to refuse.
    ///
    /// # Errors
    /// `Transient` when the ledger has another position: somebody else has applied meanwhile, such as a session of ours whose
    /// connection was lost and whose commit went through all the same. Committing would apply the unit twice.
    /// Otherwise whatever the server says.
    pub async fn advance(&mut self, sessions: &[(i32, Lsn)], applied: Lsn) -> Result<()> {
        let mut pipeline = Pipeline::default();
        self.add_begin(&mut pipeline).await?;
        self.add_advance(&mut pipeline, sessions, applied)?;
        self.run_without_tables(pipeline).await
    }

    /// Commits, after [`Writer::advance`].
    ///
    /// # Errors
    /// Whatever the server says. Whether it was committed is then in the ledger, and only there.
    pub async fn commit(&mut self) -> Result<()> {
        let mut pipeline = Pipeline::default();
        pipeline.text("COMMIT")?;
        let committed = self.run_without_tables(pipeline).await;
        self.in_transaction = false;
        self.custom_plans = false;
        self.staged.clear();
        if committed.is_err() {
            self.forget_what_was_made();
        }
        self.staging_made.clear();
        committed.context(|| "committing a batch on the target".into())
    }

    /// Takes back what is not committed.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn roll_back(&mut self) -> Result<()> {
        if self.in_transaction {
            self.in_transaction = false;
            self.custom_plans = false;
            self.staged.clear();
            self.forget_what_was_made();
            self.session.simple_query("ROLLBACK").await?;
        }
        Ok(())
    }

    /// Temporary tables made in a transaction are gone with it, and statements that came behind what was refused were not prepared.
    fn forget_what_was_made(&mut self) {
        for made in self.staging_made.drain(..) {
            self.staging.remove(&made);
        }
        self.statements.are_unknown = true;
    }

    /// Runs one statement in the open transaction, and answers how many rows it met. One that has values comes again with
    /// others, and is prepared once.
    ///
    /// # Errors
    /// What the server says.
    pub(crate) async fn execute(&mut self, text: String, values: &[Datum<'_>]) -> Result<u64> {
        let mut pipeline = Pipeline::default();
        if values.is_empty() {
            pipeline.text(&text)?;
        } else {
            let name = self.statements.name(Key::Text(text), &mut pipeline.requests, |key| match key {
                Key::Text(text) => text.clone(),
                Key::Table(..) => String::new(),
            })?;
            pipeline.requests.execute(&name, &values.iter().map(value).collect::<Vec<_>>());
        }
        match self.session.run(pipeline.requests).await {
            Ok(met) => Ok(met.first().copied().unwrap_or_default()),
            Err(refused) => Err(refused.error),
        }
    }

    /// Asks something in the open transaction; the rows as text.
    ///
    /// # Errors
    /// What the server says.
    pub(crate) async fn query(&mut self, text: &str) -> Result<Vec<Vec<Option<String>>>> {
        self.session.simple_query(text).await
    }

    /// Forgets what was prepared for tables as they were.
    ///
    /// # Errors
    /// What the server says.
    pub(super) async fn forget_prepared(&mut self) -> Result<()> {
        self.statements.known.clear();
        self.session.simple_query("DEALLOCATE ALL").await.map(|_| ())
    }

    /// Before statements that look for rows of a table: which chunks of a hypertable they are in, and what of a compressed one has to be
    /// decompressed, TimescaleDB sees only in values that are known when it plans.
    ///
    /// # Errors
    /// Whatever the server says.
    pub(super) async fn plan_for(&mut self, table: &Table) -> Result<()> {
        let mut pipeline = Pipeline::default();
        self.add_plans(&mut pipeline, table)?;
        self.run_without_tables(pipeline).await
    }

    fn add_plans(&mut self, pipeline: &mut Pipeline, table: &Table) -> Result<()> {
        if table.hypertable.is_some() && self.in_transaction && !self.custom_plans {
            self.custom_plans = true;
            pipeline.text(rows::SETTINGS)?;
        }
        Ok(())
    }

    async fn add_begin(&mut self, pipeline: &mut Pipeline) -> Result<()> {
        if self.in_transaction {
            return Ok(());
        }
        if self.staging.len() > STAGING_TABLES_MAX {
            self.statements.are_unknown = true;
            self.session.simple_query("DISCARD TEMP").await?;
            self.staging.clear();
        }
        if std::mem::take(&mut self.statements.are_unknown) {
            self.statements.known.clear();
            self.session.simple_query("DEALLOCATE ALL").await?;
        }
        pipeline.text("BEGIN")?;
        if self.role == ApplyRole::Origin {
            pipeline.text(self.role.begin_statement())?;
        }
        self.in_transaction = true;
        Ok(())
    }

    /// Before rows of chunks are changed that this session has not changed yet.
    async fn find_chunks(&mut self, tables: &(impl Tables + Sync), writes: &[TableWrites]) -> Result<()> {
        let unknown = |writes: &&TableWrites| {
            writes.has_changes() && self.places.is_unknown(writes.place, tables.table(writes.place))
        };
        let wanted: Vec<(usize, &Table)> =
            writes.iter().filter(unknown).map(|writes| (writes.place, tables.table(writes.place))).collect();
        if wanted.is_empty() { Ok(()) } else { self.places.find(&mut self.session, &wanted).await }
    }

    fn add_writes(
        &mut self,
        pipeline: &mut Pipeline,
        tables: &(impl Tables + Sync),
        writes: &mut [TableWrites],
    ) -> Result<()> {
        for writes in writes {
            let (place, table) = (writes.place, tables.table(writes.place));
            if !writes.single_deletes.is_empty() || !writes.single_updates.is_empty() {
                self.add_plans(pipeline, table)?;
            }
            let range: Vec<Value<'_>> =
                writes.range.iter().flat_map(TimeRange::values).map(|datum| value(&datum)).collect();
            if !writes.deletes.is_empty() {
                let staged = self.add_stage(pipeline, tables, place, Staging::Keys, &mut writes.deletes)?;
                self.add(pipeline, tables, place, What::Delete, &range, ("deletes", staged))?;
            }
            for (nulls, rows) in &mut writes.equal_deletes {
                let staged = self.add_stage(pipeline, tables, place, Staging::Equal(nulls.clone()), rows)?;
                pipeline.text(sets::PLAN_FREELY)?;
                self.add(pipeline, tables, place, What::DeleteEqual(nulls.clone()), &range, ("deletes", staged))?;
                pipeline.text(sets::PLAN_BY_KEY)?;
            }
            for row in writes.single_deletes.drain(..) {
                let values: Vec<Value<'_>> = serial::delete_values(table, row.tuple()).iter().map(value).collect();
                self.add(pipeline, tables, place, What::DeleteOne, &values, ("deletes", 1))?;
            }
            for (unchanged, rows) in &mut writes.updates {
                let staging = Staging::Rows(unchanged.clone());
                let staged = self.add_stage(pipeline, tables, place, staging.clone(), rows)?;
                self.add(pipeline, tables, place, What::Update(staging), &range, ("updates", staged))?;
            }
            for row in writes.single_updates.drain(..) {
                let set = serial::columns_to_set(table, row.tuple(), false);
                let values = serial::update_values(table, &set, row.tuple(), row.tuple());
                let values: Vec<Value<'_>> = values.iter().map(value).collect();
                self.add(pipeline, tables, place, What::UpdateOne(row.unchanged()), &values, ("updates", 1))?;
            }
            if !writes.inserts.is_empty() {
                self.add_copy(pipeline, tables, place, What::Insert, &mut writes.inserts)?;
            }
        }
        Ok(())
    }

    /// Fills a temporary table, which is empty but where an earlier chunk of the same unit used it.
    fn add_stage(
        &mut self,
        pipeline: &mut Pipeline,
        tables: &(impl Tables + Sync),
        place: usize,
        staging: Staging,
        rows: &mut CopyRows,
    ) -> Result<u64> {
        let (table, key) = (tables.table(place), (place, staging));
        if self.staging.insert(key.clone()) {
            pipeline.text(&key.1.create(table))?;
            self.staging_made.push(key.clone());
        }
        if !self.staged.insert(key.clone()) {
            pipeline.text(&format!("TRUNCATE {}", key.1.qualified(table)))?;
        }
        let staged = rows.len();
        self.add_copy(pipeline, tables, place, What::Stage(key.1), rows)?;
        Ok(staged)
    }

    fn add_copy(
        &mut self,
        pipeline: &mut Pipeline,
        tables: &(impl Tables + Sync),
        place: usize,
        what: What,
        rows: &mut CopyRows,
    ) -> Result<()> {
        let name = self.name(pipeline, tables, place, what)?;
        pipeline.expected.push(Expected::Rows(place, "a COPY", rows.len()));
        pipeline.requests.copy(&name, rows.finish());
        Ok(())
    }

    fn add(
        &mut self,
        pipeline: &mut Pipeline,
        tables: &(impl Tables + Sync),
        place: usize,
        what: What,
        values: &[Value<'_>],
        (doing, rows): (&'static str, u64),
    ) -> Result<()> {
        let name = self.name(pipeline, tables, place, what)?;
        pipeline.expected.push(Expected::Rows(place, doing, rows));
        pipeline.requests.execute(&name, values);
        Ok(())
    }

    fn name(
        &mut self,
        pipeline: &mut Pipeline,
        tables: &(impl Tables + Sync),
        place: usize,
        what: What,
    ) -> Result<Arc<str>> {
        let table = self.places.get(place).unwrap_or_else(|| tables.table(place));
        self.statements.name(Key::Table(place, what), &mut pipeline.requests, |key| match key {
            Key::Table(_, what) => text(table, what, tables.is_binary()),
            Key::Text(text) => text.clone(),
        })
    }

    fn add_advance(&mut self, pipeline: &mut Pipeline, sessions: &[(i32, Lsn)], applied: Lsn) -> Result<()> {
        let list = |values: Vec<String>| format!("{{{}}}", values.join(","));
        let numbers = list(sessions.iter().map(|(number, _)| number.to_string()).collect());
        let before = list(sessions.iter().map(|(_, before)| before.to_string()).collect());
        let applied = applied.to_string();
        let values = [&numbers, &before, &applied].map(|text| Value::Text(text.as_bytes()));
        let name = self.statements.name(Key::Text(ADVANCE.into()), &mut pipeline.requests, |_| ADVANCE.into())?;
        pipeline.expected.push(Expected::Progress(sessions.len() as u64));
        pipeline.requests.execute(&name, &values);
        pipeline.text("SET CONSTRAINTS ALL IMMEDIATE")
    }

    async fn run(&mut self, pipeline: Pipeline, tables: &(impl Tables + Sync)) -> Result<(), WriteError> {
        let doing = |expected: Expected| match expected {
            Expected::Any => "writing a batch".to_owned(),
            Expected::Rows(place, _, _) => format!("writing to {}", tables.table(place).qualified()),
            Expected::Progress(_) => WRITING_PROGRESS.to_owned(),
        };
        let met = match self.session.run(pipeline.requests).await {
            Ok(met) => met,
            Err(refused) => {
                let doing = pipeline.expected.get(refused.at).map_or_else(|| doing(Expected::Any), |at| doing(*at));
                return Err(refused.error.context(doing).into());
            }
        };
        check_progress(&pipeline.expected, &met)?;
        for (expected, met) in pipeline.expected.iter().zip(met) {
            if let Expected::Rows(place, what, rows) = *expected
                && rows != met
            {
                let table = tables.table(place).qualified();
                let text = format!("{what} of {rows} rows of {table} met {met} rows on the target");
                let error = Error::new(ErrorKind::Divergence, text);
                return Err(WriteError::Refused(error.context(doing(*expected))));
            }
        }
        Ok(())
    }

    /// Runs what speaks of no table.
    async fn run_without_tables(&mut self, pipeline: Pipeline) -> Result<()> {
        if pipeline.requests.is_empty() {
            return Ok(());
        }
        match self.session.run(pipeline.requests).await {
            Ok(met) => check_progress(&pipeline.expected, &met),
            Err(refused) => {
                let progress = matches!(pipeline.expected.get(refused.at), Some(Expected::Progress(_)));
                Err(if progress { refused.error.context(WRITING_PROGRESS) } else { refused.error })
            }
        }
    }
}

const WRITING_PROGRESS: &str = "writing the apply's progress into the ledger";

/// Looked at before all else: where the ledger has gone on, the rows are not to blame for what they met.
fn check_progress(expected: &[Expected], met: &[u64]) -> Result<()> {
    let elsewhere = |(expected, met): (&Expected, &u64)| matches!(expected, Expected::Progress(rows) if rows != met);
    if !expected.iter().zip(met).any(elsewhere) {
        return Ok(());
    }
    let text = "the ledger's progress is not where this apply left it: another session has applied meanwhile";
    Err(Error::new(ErrorKind::Transient, text)
        .hint("It is read again. If this repeats, a second walferry works on the same target: stop one."))
}

fn value<'a>(datum: &Datum<'a>) -> Value<'a> {
    match *datum {
        Datum::Text(bytes) => Value::Text(bytes),
        Datum::Binary(bytes) => Value::Binary(bytes),
        Datum::Null | Datum::Unchanged => Value::Null,
    }
}
