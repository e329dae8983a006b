//! The runner: which table and which range is compared when, on which sessions, and what the digests say.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use futures_util::future::try_join_all;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_postgres::Client;

use super::hash::{self, Cells, HashFunction, Statements};
use super::layout::{self, Shared};
use super::narrow::{self, Suspects};
use super::plan::{self, Plan, Range};
use super::report::{Report, TableReport};
use super::sample::{SAMPLED_RANGE_ROWS, Sample};
use super::snapshots::{self, Snapshots};
use super::{Options, Progress};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;

/// What a set of rows is compared by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digest {
    pub(super) rows: i64,
    /// The sums of both halves of the rows' hashes. A sum of fewer than 2⁶³ hashes of 64 bits cannot overflow.
    pub(super) sums: (i128, i128),
}

/// Digests by cell; a cell without rows is not there.
pub(super) type Digests = BTreeMap<i64, Digest>;

/// Sessions on both sides, each in whatever transaction its owner began, lent out in pairs.
pub struct Sessions {
    pairs: Mutex<Vec<Pair>>,
    free: Semaphore,
    size: usize,
    pub(super) function: HashFunction,
    /// Where there are any, each loan is a transaction of its own that imports them.
    snapshots: Option<Snapshots>,
    /// Tables that are not the files any more that the snapshots show.
    stale: Mutex<BTreeSet<String>>,
}

/// One session on each side.
pub(super) struct Pair {
    pub(super) source: Client,
    pub(super) target: Client,
    /// Whether a loan has begun transactions in them, and not ended them.
    has_begun: bool,
}

/// A pair on loan; it goes back when this is dropped.
pub struct Lent<'a> {
    pair: Option<Pair>,
    sessions: &'a Sessions,
    _permit: SemaphorePermit<'a>,
}

impl Sessions {
    /// Takes sessions, one on each side per pair, and finds the hash that both servers compute alike.
    ///
    /// # Errors
    /// No pair at all, or whatever a server says.
    pub async fn new(pairs: Vec<(Client, Client)>) -> Result<Sessions> {
        Sessions::under(pairs, None).await
    }

    /// The same for sessions without a transaction, which see these snapshots when they are lent out.
    pub(super) async fn under(pairs: Vec<(Client, Client)>, snapshots: Option<Snapshots>) -> Result<Sessions> {
        let Some((source, target)) = pairs.first() else {
            return Err(Error::new(ErrorKind::Other, "a comparison needs a session on each side"));
        };
        let function = hash::agree(source, target).await?;
        let size = pairs.len();
        let pairs = pairs.into_iter().map(|(source, target)| Pair { source, target, has_begun: false }).collect();
        let (pairs, stale) = (Mutex::new(pairs), Mutex::default());
        Ok(Sessions { pairs, free: Semaphore::new(size), size, function, snapshots, stale })
    }

    /// Gives the sessions back, so that their transactions can be ended.
    pub fn into_inner(self) -> Vec<(Client, Client)> {
        let pairs = self.pairs.into_inner().unwrap_or_else(PoisonError::into_inner);
        pairs.into_iter().map(|pair| (pair.source, pair.target)).collect()
    }

    fn pairs(&self) -> std::sync::MutexGuard<'_, Vec<Pair>> {
        // A push or pop cannot leave the vector in a state that a later one may not see.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends a pair, as soon as one is free.
    ///
    /// # Errors
    /// When the sessions are gone.
    pub async fn lend(&self) -> Result<Lent<'_>> {
        let closed = || Error::new(ErrorKind::Other, "the sessions of the comparison are gone");
        let permit = self.free.acquire().await.map_err(|_| closed())?;
        let pair = self.pairs().pop().ok_or_else(closed)?;
        Ok(Lent { pair: Some(pair), sessions: self, _permit: permit })
    }

    /// Lends a pair to read a table with. It sees the snapshots, and holds locks on the table only until it is given back: whoever wants to
    /// change the table, and all who then wait behind him, wait for one range (H9).
    ///
    /// # Errors
    /// That of [`Sessions::is_stale`]; that a snapshot is gone; else whatever a server says.
    pub(super) async fn lend_for(&self, table: &Table) -> Result<Lent<'_>> {
        let mut lent = self.lend().await?;
        let (Some(snapshots), Some(pair)) = (&self.snapshots, lent.pair.as_mut()) else { return Ok(lent) };
        let left_over = std::mem::replace(&mut pair.has_begun, true);
        let (source, target) = tokio::try_join!(
            snapshots::begin(&pair.source, &snapshots.source, table, left_over),
            snapshots::begin(&pair.target, &snapshots.target, table, left_over)
        )?;
        if source && target {
            return Ok(lent);
        }
        let name = table.qualified();
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        let text = format!("the table {name} was truncated, rewritten or dropped since the snapshots were taken");
        Err(Error::new(ErrorKind::Transient, text))
    }

    /// Whether a table is not the file any more that a snapshot shows: an older snapshot reads a truncated table as empty (H4).
    fn is_stale(&self, table: &str) -> bool {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).contains(table)
    }
}

impl Lent<'_> {
    /// Its session on the source.
    ///
    /// # Errors
    /// None while it is on loan.
    pub fn source(&self) -> Result<&Client> {
        Ok(&self.pair()?.source)
    }

    /// Its session on the target.
    ///
    /// # Errors
    /// None while it is on loan.
    pub fn target(&self) -> Result<&Client> {
        Ok(&self.pair()?.target)
    }

    /// Ends what [`Sessions::lend_for`] began.
    pub(super) async fn give_back(mut self) -> Result<()> {
        let Some(pair) = self.pair.as_mut().filter(|pair| pair.has_begun) else { return Ok(()) };
        tokio::try_join!(pair.source.batch_execute("COMMIT"), pair.target.batch_execute("COMMIT"))?;
        pair.has_begun = false;
        Ok(())
    }

    fn pair(&self) -> Result<&Pair> {
        self.pair.as_ref().ok_or_else(|| Error::new(ErrorKind::Other, "a session was used after it was given back"))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // Before the permit, which is dropped after this body: whoever gets it finds the pair.
        self.sessions.pairs().extend(self.pair.take());
    }
}

/// Compares all tables, or those that the options name.
///
/// The factories open sessions, at most `options.jobs` of each, in whatever transaction (and under whatever
/// snapshot) the comparison is to see. `progress` is called after every range.
///
/// # Errors
/// A table in `options.tables` that is not in `tables`, and whatever a server says. A difference is not an error.
pub async fn compare<S, T, SF, TF>(
    tables: &[Table],
    source: S,
    target: T,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report>
where
    S: Fn() -> SF,
    T: Fn() -> TF,
    SF: Future<Output = Result<Client>>,
    TF: Future<Output = Result<Client>>,
{
    let tables = choose(tables, options.tables.as_deref())?;
    let mut pairs = Vec::new();
    for _ in 0..options.jobs.max(1) {
        pairs.push(tokio::try_join!(source(), target())?);
    }
    let sessions = Sessions::under(pairs, options.snapshots.clone()).await?;
    let reports = Mutex::new(Vec::with_capacity(tables.len()));
    let one = |at: usize| -> Work<'_> {
        let (table, sessions, reports) = (tables[at], &sessions, &reports);
        Box::pin(async move {
            let report = match compare_table(table, sessions, options, progress).await {
                // The others are compared all the same.
                Err(_) if sessions.is_stale(&table.qualified()) => return Ok(()),
                report => report?,
            };
            reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            Ok(())
        })
    };
    in_parallel(sessions.size, tables.len(), &one).await?;
    let stale = std::mem::take(&mut *sessions.stale.lock().unwrap_or_else(PoisonError::into_inner));
    let report = Report::new(reports.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(Report { stale: stale.into_iter().collect(), sample_percent: options.sample_percent, ..report })
}

/// One piece of work, boxed: its type must not depend on a lifetime, or the whole comparison could not be spawned.
type Work<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// Runs `work` for 0, 1, … `count` - 1, at most `jobs` at a time, and stops at the first error.
async fn in_parallel<'a>(jobs: usize, count: usize, work: &(dyn Fn(usize) -> Work<'a> + Sync)) -> Result<()> {
    let next = AtomicUsize::new(0);
    let worker = async || -> Result<()> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return Ok(());
            }
            work(at).await?;
        }
    };
    let workers: Vec<_> = (0..jobs.min(count)).map(|_| worker()).collect();
    try_join_all(workers).await?;
    Ok(())
}

/// The tables that were asked for, by `schema.name` or `"schema"."name"`; all where none was asked for.
///
/// # Errors
/// `Usage` for a name that is not among them.
pub fn choose<'a>(tables: &'a [Table], wanted: Option<&[String]>) -> Result<Vec<&'a Table>> {
    // The extension's own tables are chunks, which are compared with their hypertable.
    let Some(wanted) = wanted else { return Ok(tables.iter().filter(|table| !is_chunk(table)).collect()) };
    let mut chosen: Vec<&Table> = Vec::new();
    for name in wanted {
        let is_it = |table: &&Table| *name == table.qualified() || *name == format!("{}.{}", table.schema, table.name);
        let table = tables.iter().find(is_it).ok_or_else(|| {
            Error::new(ErrorKind::Usage, format!("there is no table {name} among those to compare"))
                .hint("give it as schema.name, without quotes; of a partitioned table give its partitions")
        })?;
        if !chosen.iter().any(|other| std::ptr::eq(*other, table)) {
            chosen.push(table);
        }
    }
    Ok(chosen)
}

fn is_chunk(table: &Table) -> bool {
    table.schema.starts_with("_timescaledb_")
}

/// Compares one table on sessions that are already open.
///
/// # Errors
/// Whatever a server says. A difference, a missing table included, is not an error.
pub async fn compare_table(
    table: &Table,
    sessions: &Sessions,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<TableReport> {
    let mut report = TableReport { table: table.qualified(), differences_complete: true, ..TableReport::default() };
    let lent = sessions.lend_for(table).await?;
    let pair = lent.pair()?;
    let (source, target) = layouts(table, pair).await?;
    let (Some(source), Some(target)) = (&source, &target) else {
        report.missing_on_source = source.is_none();
        report.missing_on_target = target.is_none();
        for (layout, client, rows) in
            [(&source, &pair.source, &mut report.rows_source), (&target, &pair.target, &mut report.rows_target)]
        {
            if let Some(layout) = layout {
                *rows = count(client, &layout.from).await?;
            }
        }
        lent.give_back().await?;
        return Ok(report);
    };
    let shared = shared(table, source, target);
    let sample = options.sample_percent.map(Sample::new);
    let range_rows = sample.as_ref().map_or(options.range_rows, |_| options.range_rows.min(SAMPLED_RANGE_ROWS));
    let plan = plan::plan(&pair.source, source, target, &shared, range_rows).await?;
    lent.give_back().await?;

    let comparison = Comparison {
        table: &report.table,
        statements: Statements::new(sessions.function, &shared),
        source: &source.from,
        target: &target.from,
        shared: &shared,
    };
    let outcome = comparison.first_pass(table, &plan, sample, sessions, progress).await?;
    let columns_equal = shared.missing_on_target.is_empty() && shared.extra_on_target.is_empty();
    let equal = outcome.suspects.is_empty() && columns_equal;
    let found = if outcome.suspects.is_empty() {
        narrow::Found::default()
    } else {
        let lent = sessions.lend_for(table).await?;
        let found = narrow::narrow(&comparison, lent.pair()?, outcome.suspects, options).await?;
        lent.give_back().await?;
        found
    };
    Ok(TableReport {
        rows_source: outcome.rows_source,
        rows_target: outcome.rows_target,
        equal,
        ranges: outcome.ranges,
        columns_missing_on_target: shared.missing_on_target.clone(),
        columns_extra_on_target: shared.extra_on_target.clone(),
        differences: found.named,
        differences_total: found.total,
        differences_complete: found.complete,
        rows_fetched: found.rows_fetched,
        ..report.clone()
    })
}

/// Where two sides of a table differ.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// Rows counted on the source.
    pub rows_source: i64,
    /// Rows counted on the target.
    pub rows_target: i64,
    /// What to read the source's rows from: the name, with its `ONLY` where there is one to say.
    pub source: String,
    /// The same of the target.
    pub target: String,
    /// Conditions on the alias `t`, which no row fulfils twice. A row that is not exactly the same on both sides fulfils one
    /// of them; and those of both sides that fulfil one can be exchanged for each other, because each condition cuts
    /// the same piece out of both.
    pub conditions: Vec<String>,
}

/// Finds where two sides differ, in whole cells of the hash of the key: not more than that is needed to make them equal, and it
/// holds for tables without a key, keys that are there twice and any collation.
///
/// # Errors
/// `SchemaChanged` when a side lacks the table or a column; else whatever a server says.
pub async fn mismatch(
    table: &Table,
    sessions: &Sessions,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Mismatch> {
    let name = table.qualified();
    let lent = sessions.lend().await?;
    let pair = lent.pair()?;
    let (Some(source), Some(target)) = layouts(table, pair).await? else {
        return Err(Error::new(ErrorKind::SchemaChanged, format!("the table {name} is not there on both sides")));
    };
    let shared = shared(table, &source, &target);
    let only_here: Vec<String> = [("source", &shared.missing_on_target), ("target", &shared.extra_on_target)]
        .iter()
        .flat_map(|(side, columns)| columns.iter().map(move |column| format!("{column} (only on the {side})")))
        .collect();
    if !only_here.is_empty() {
        let text = format!("the table {name} has other columns on the target: {}", only_here.join(", "));
        return Err(Error::new(ErrorKind::SchemaChanged, text).hint(
            "Give the table on the target the columns that it has on the source, then run the same command again.",
        ));
    }
    let plan = plan::plan(&pair.source, &source, &target, &shared, options.range_rows).await?;
    drop(lent);
    let statements = Statements::new(sessions.function, &shared);
    let comparison =
        Comparison { table: &name, statements, source: &source.from, target: &target.from, shared: &shared };
    let pass = comparison.first_pass(table, &plan, None, sessions, progress).await?;
    let lent = sessions.lend().await?;
    let pieces = narrow::refine(&comparison, lent.pair()?, pass.suspects).await?;
    Ok(Mismatch {
        rows_source: pass.rows_source,
        rows_target: pass.rows_target,
        conditions: pieces
            .iter()
            .map(|piece| comparison.statements.condition(&piece.range.condition(), &piece.cells))
            .collect(),
        source: source.from.clone(),
        target: target.from.clone(),
    })
}

async fn layouts(table: &Table, pair: &Pair) -> Result<(Option<layout::Layout>, Option<layout::Layout>)> {
    tokio::try_join!(layout::read(&pair.source, table, "source"), layout::read(&pair.target, table, "target"))
}

fn shared(table: &Table, source: &layout::Layout, target: &layout::Layout) -> Shared {
    let key: Vec<&str> = table.key_columns().map(|column| column.name.as_str()).collect();
    layout::shared(source, target, &key)
}

async fn count(client: &Client, from: &str) -> Result<i64> {
    let rows = client.query_typed(&format!("SELECT pg_catalog.count(*) FROM {from}"), &[]).await;
    Ok(rows.context(|| format!("counting the rows of {from}"))?.first().map_or(0, |row| row.get(0)))
}

/// One table that both sides have.
pub(super) struct Comparison<'a> {
    pub(super) table: &'a str,
    pub(super) statements: Statements,
    /// What to read from, on each side.
    pub(super) source: &'a str,
    pub(super) target: &'a str,
    pub(super) shared: &'a Shared,
}

/// What the first pass over a table found.
#[derive(Default)]
struct FirstPass {
    rows_source: i64,
    rows_target: i64,
    /// Ranges compared so far.
    ranges: usize,
    suspects: Vec<Suspects>,
    /// The digests of each side's page ranges, together; they mean something only when all ranges are in.
    source: Digests,
    target: Digests,
}

impl FirstPass {
    /// Takes in one range: compares it where it is a range of keys, else adds it to what the other ranges hold.
    fn add(&mut self, keys: Option<&Range>, source: Digests, target: Digests) {
        self.ranges += 1;
        self.rows_source += rows_in(&source);
        self.rows_target += rows_in(&target);
        match keys {
            Some(range) => self.suspects.extend(Suspects::between(range, 0, &source, &target)),
            None => {
                add(&mut self.source, source);
                add(&mut self.target, target);
            }
        }
    }
}

impl Comparison<'_> {
    async fn first_pass(
        &self,
        table: &Table,
        plan: &Plan,
        sample: Option<Sample>,
        sessions: &Sessions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<FirstPass> {
        let (source_ranges, target_ranges, bits) = match plan {
            Plan::Keys(ranges) => (ranges, ranges, 0),
            Plan::Pages { source, target, bits } => (source, target, *bits),
        };
        let by_key = matches!(plan, Plan::Keys(_));
        let all_ranges = source_ranges.len().max(target_ranges.len());
        // Ranges of keys are the same rows on both sides; of pages they are not, so there cells of the key's hash are chosen.
        let (chosen, within) = match sample {
            Some(sample) if by_key => (sample.of(all_ranges), None),
            Some(sample) => ((0..all_ranges).collect(), Some(sample.cells())),
            None => ((0..all_ranges).collect(), None),
        };
        let ranges = chosen.len();
        let pass = Mutex::new(FirstPass::default());
        let one = |at: usize| -> Work<'_> {
            let (source_range, target_range) = (source_ranges.get(chosen[at]), target_ranges.get(chosen[at]));
            let (pass, within) = (&pass, within.as_ref());
            Box::pin(async move {
                let lent = sessions.lend_for(table).await?;
                let pair = lent.pair()?;
                let (source, target) = tokio::try_join!(
                    self.digests(&pair.source, self.source, source_range, within, bits),
                    self.digests(&pair.target, self.target, target_range, within, bits)
                )?;
                lent.give_back().await?;
                let rows = rows_in(&source);
                let done = {
                    let mut pass = pass.lock().unwrap_or_else(PoisonError::into_inner);
                    pass.add(by_key.then_some(source_range).flatten(), source, target);
                    pass.ranges
                };
                let table = self.table.to_owned();
                progress(Progress { table, ranges_done: done, ranges_total: ranges, rows });
                Ok(())
            })
        };
        in_parallel(sessions.size, ranges, &one).await?;
        let mut pass = pass.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (source, target) = (std::mem::take(&mut pass.source), std::mem::take(&mut pass.target));
        pass.suspects.extend(Suspects::between(&Range::All, bits, &source, &target));
        Ok(pass)
    }

    /// The digests of a range's cells on one side; none for a range that this side does not have.
    pub(super) async fn digests(
        &self,
        client: &Client,
        from: &str,
        range: Option<&Range>,
        within: Option<&Cells>,
        bits: u32,
    ) -> Result<Digests> {
        let Some(range) = range else { return Ok(Digests::new()) };
        let statement = self.statements.digests(from, &range.condition(), within, bits);
        let doing = || format!("hashing the rows of table {}", self.table);
        let rows = client.query_typed(&statement, &[]).await.context(doing)?;
        let mut digests = Digests::new();
        for row in rows {
            let half = |at: usize| -> Result<i128> {
                let sum: &str = row.try_get(at).context(doing)?;
                sum.parse()
                    .map_err(|_| Error::new(ErrorKind::Other, format!("{sum} is not a sum of hashes")))
                    .context(doing)
            };
            let digest = Digest { rows: row.try_get(1).context(doing)?, sums: (half(2)?, half(3)?) };
            digests.insert(row.try_get(0).context(doing)?, digest);
        }
        Ok(digests)
    }
}

fn rows_in(digests: &Digests) -> i64 {
    digests.values().map(|digest| digest.rows).sum()
}

fn add(all: &mut Digests, some: Digests) {
    for (cell, digest) in some {
        let sum = all.entry(cell).or_default();
        sum.rows += digest.rows;
        sum.sums.0 += digest.sums.0;
        sum.sums.1 += digest.sums.1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(schema: &str, name: &str) -> Table {
        Table::plain(schema, name)
    }

    #[test]
    fn tables_are_chosen_by_name_once_and_an_unknown_one_is_wrong_usage() {
        let tables = [table("public", "a"), table("My Schema", "B")];
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
            choose(&tables, Some(&wanted)).map(|chosen| chosen.iter().map(|t| t.name.clone()).collect::<Vec<_>>())
        };
        assert_eq!(names(&["My Schema.B", "\"public\".\"a\"", "public.a"]).unwrap(), ["B", "a"]);
        assert_eq!(names(&["public.b"]).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(choose(&tables, None).unwrap().len(), 2);
    }

    #[test]
    fn digests_of_ranges_add_up_to_the_digest_of_the_table() {
        let digest = |rows, low, high| Digest { rows, sums: (low, high) };
        let mut all = Digests::from([(0, digest(1, 5, -5))]);
        add(&mut all, Digests::from([(0, digest(2, 7, 1)), (3, digest(1, 1, 1))]));
        assert_eq!(all, Digests::from([(0, digest(3, 12, -4)), (3, digest(1, 1, 1))]));
    }
}
