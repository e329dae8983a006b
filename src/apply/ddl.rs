//! DDL in the stream (`--replicate-ddl`): runs on the target at its place in its transaction, which is replayed serially as one
//! transaction of the target, with the ledger (I2).
//!
//! The source says with each statement what it has made of the tables ([`Told`]); that is what the rows behind it look like. A
//! statement counts only when the target, after it, has the definitions that the source had, and nothing new besides: nothing is
//! taken on trust. What cannot be run, or cannot be proven, stops the apply at its place; a target that has been brought there by
//! hand is gone on with.

pub(crate) mod statement;

use std::collections::BTreeMap;

use super::replay::Replay;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::status::Level;
use crate::queue::TransactionHead;
use crate::source::catalog::{THERE, Table};
use crate::source::ddl::{Key, Told};
use crate::source::slot;
use crate::target::ddl::{self, Recorded};
use crate::unstreamed::large_object::Owners;

/// How much of a statement an error shows.
const SHOWN: usize = 400;

/// What became of a statement that is not run, and on which no row depends.
const LEFT: &str = "left to the operator";

/// Bits of a table's rewriting.
const PERSISTENCE: u32 = 1;
const DEFAULT: u32 = 2;
const TYPE: u32 = 4;

/// How DDL is replicated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ddl {
    /// What the messages of this migration begin with.
    pub prefix: String,
    /// What proves that they are from our event triggers; `None` where an earlier version made those.
    pub key: Option<Key>,
    /// Who runs it on the target.
    pub owners: Owners,
}

/// The target's catalog by the fingerprint's names.
type Definitions = BTreeMap<String, String>;

impl Replay<'_> {
    /// One statement.
    ///
    /// # Errors
    /// `SchemaChanged` when the target does not become what the source did: with the statement, and what to do. `Transient` when
    /// it waits for a lock in vain.
    pub(super) async fn ddl(&mut self, head: &TransactionHead, content: &[u8]) -> Result<()> {
        let key = self.layout.ddl.as_ref().and_then(|ddl| ddl.key.as_ref());
        let Some(told) = Told::parse(key, head.xid, content)? else {
            let text = format!(
                "somebody on the source wrote a message that looks like replicated DDL, in transaction {} that commits at {}; nothing \
                 of it is done",
                head.xid, head.commit_lsn
            );
            self.board.event(Level::Warn, text);
            return Ok(());
        };
        if let Some(why) = &told.failed {
            let text = format!(
                "the source ran {} and could not tell what it did ({why}); it is met like DDL that is not replicated",
                told.tag
            );
            self.board.event(Level::Warn, text);
            return Ok(());
        }
        let tables = told.tables();
        // The copies were made of what it has left, and the target fitted them.
        if self.copies_have_seen(head, &told, &tables) {
            return Ok(());
        }
        let recorded = ddl::recorded(self.writer).await?;
        let before = ddl::definitions(self.writer).await?;
        let changed: Definitions = told
            .definition
            .iter()
            .filter(|(object, _)| told.fingerprint.get(*object).is_some_and(|now| recorded.get(*object) != Some(now)))
            .map(|(object, hash)| (object.clone(), hash.clone()))
            .collect();
        let unproven = self.rows_unproven(&told, &tables).await?;
        let stop = |why: String| stopped(head, &told, &why, unproven.is_none());
        if let Some(why) = &unproven {
            return Err(stop(why.clone()));
        }
        // A target that an operator has brought there; seen only when the statement cannot be run (again).
        let is_there =
            (!changed.is_empty() || !told.dropped.is_empty()) && lacking(&told, &changed, &before).is_empty();
        let refused = match statement::of(&told) {
            Err(why) => Some(why),
            Ok(statement) => self.run_and_compare(&told, &statement, &changed, &before).await?,
        };
        // What it did shows: an object has come or gone. What the message carries beside a grant or a comment is others' doing.
        let makes = !matches!(
            told.tag.as_str(),
            "GRANT" | "REVOKE" | "COMMENT" | "SECURITY LABEL" | "ALTER DEFAULT PRIVILEGES"
        );
        let shows = makes
            && (changed.keys().any(|object| !recorded.contains_key(object))
                || recorded.keys().any(|object| told.dropped.iter().any(|dropped| dropped.is(object))));
        let outcome = match refused {
            None => "run",
            Some(why) if is_there && shows => {
                let text = format!("{}{} was not run: the target has it already ({why})", told.tag, told.objects());
                self.board.event(Level::Info, text);
                "there already"
            }
            Some(why) if is_there || (changed.is_empty() && told.dropped.is_empty()) => {
                // Grants, comments and the like: no row depends on them, and no comparison shows whether they are there.
                let text = format!(
                    "{}{} is not on the target: {why}. Run it there by hand; the cutover names what is different until it is waived",
                    told.tag,
                    told.objects()
                );
                self.board.event(Level::Warn, text);
                LEFT
            }
            Some(why) => return Err(stop(why)),
        };
        let after = ddl::definitions(self.writer).await?;
        let mut record = self.redefine(head, &told, tables, &changed).await?;
        let is_left = outcome == LEFT;
        if !is_left {
            self.fingerprint(&told, &recorded, (&before, &after), &mut record).await?;
        }
        ddl::record(self.writer, &record).await?;
        let left: Vec<&String> = if is_left { changed.keys().collect() } else { Vec::new() };
        ddl::note(self.writer, head.commit_lsn, &told, outcome, &left).await?;
        tracing::info!(tag = told.tag, objects = told.objects(), outcome, "DDL of the source");
        self.ddl_replayed += 1;
        Ok(())
    }

    /// Whether it is about tables whose copies have all seen it.
    fn copies_have_seen(&self, head: &TransactionHead, told: &Told, tables: &[(Table, bool)]) -> bool {
        let about = tables.iter().filter(|(table, _)| told.is_about(table.relid));
        let mut places = about.filter_map(|(table, _)| self.layout.find(table.relid)).peekable();
        places.peek().is_some() && places.all(|place| self.layout.copy_has_seen(place, head.xid, head.commit_lsn))
    }

    /// Runs a statement; answers why it did not make what it made on the source, and takes it back then.
    async fn run_and_compare(
        &mut self,
        told: &Told,
        statement: &str,
        changed: &Definitions,
        before: &Definitions,
    ) -> Result<Option<String>> {
        let layout = std::sync::Arc::clone(&self.layout);
        let owners = layout.ddl.as_ref().map(|ddl| &ddl.owners);
        let role = owners.filter(|owners| !owners.no_owner).map(|owners| owners.role(&told.caller.role));
        self.writer.query("SAVEPOINT walferry_ddl").await?;
        let why = match ddl::run(self.writer, &told.caller, role, statement).await {
            Err(error) => {
                let waits = error.sqlstate().is_some_and(|state| {
                    let class = state.code().get(..2).unwrap_or_default();
                    ["40", "53", "57"].contains(&class) || matches!(state.code(), "55P03" | "55006")
                });
                if error.is_transient() || waits {
                    return Err(error
                        .with_kind(ErrorKind::Transient)
                        .context(format!("running {} on the target", told.tag)));
                }
                format!("the target refused it: {error}")
            }
            Ok(()) => {
                let after = ddl::definitions(self.writer).await?;
                let lacking = lacking(told, changed, &after);
                let is_new = |(object, hash): &(&String, &String)| {
                    *hash != THERE && !before.contains_key(*object) && !told.definition.contains_key(*object)
                };
                let more: Vec<&str> = after.iter().filter(is_new).map(|(object, _)| object.as_str()).collect();
                if lacking.is_empty() && more.is_empty() {
                    return Ok(None);
                }
                let all: Vec<&str> = lacking.iter().map(String::as_str).chain(more).collect();
                format!("after it, the target would differ from the source in {}", all.join(", "))
            }
        };
        self.writer.query("ROLLBACK TO SAVEPOINT walferry_ddl").await?;
        Ok(Some(why))
    }

    /// Why the rows that were there are not what the same statement makes of them on the target, or cannot be known to be.
    async fn rows_unproven(&mut self, told: &Told, tables: &[(Table, bool)]) -> Result<Option<String>> {
        for rewritten in &told.rewritten {
            let Some(place) = self.layout.find(rewritten.relid) else { continue };
            let before = self.layout.tables[place].table.clone();
            let name = before.qualified();
            if rewritten.reason & PERSISTENCE != 0 {
                return Ok(Some(format!(
                    "it makes {name} logged or unlogged, and rows of an unlogged table are not in the stream"
                )));
            }
            let Some((after, _)) = tables.iter().find(|(table, _)| table.relid == rewritten.relid) else { continue };
            let is_added = after.columns.iter().any(|now| !before.columns.iter().any(|was| was.number == now.number));
            let values = rewritten.reason & DEFAULT != 0 && is_added;
            let using =
                rewritten.reason & TYPE != 0 && statement::of(told).map_or(true, |text| statement::has_using(&text));
            if (values || using) && !ddl::is_empty(self.writer, &before).await? {
                let what = if values { "gave each row of" } else { "computed anew by USING values of" };
                return Ok(Some(format!(
                    "it {what} {name} what the stream does not show. Run it on the target, then `walferry migrate {}` takes these rows over",
                    Table::recopy_option(&[&before])
                )));
            }
        }
        Ok(None)
    }

    /// The tables as they are from here on.
    async fn redefine(
        &mut self,
        head: &TransactionHead,
        told: &Told,
        tables: Vec<(Table, bool)>,
        changed: &Definitions,
    ) -> Result<Recorded> {
        let mut record = Recorded::default();
        for (mut table, is_new) in tables {
            let place = self.layout.find(table.relid);
            if let Some(place) = place {
                if self.layout.copy_has_seen(place, head.xid, head.commit_lsn) {
                    continue;
                }
                let before = &self.layout.tables[place].table;
                (table.pages, table.bytes) = (before.pages, before.bytes);
                (table.estimated_rows, table.updates_and_deletes) = (before.estimated_rows, before.updates_and_deletes);
            } else if !is_new {
                continue;
            }
            if self.layout.binary && !table.binary_safe() {
                let text = format!(
                    "the stream of this migration is binary, and a column of {} has no binary form that is the same on both servers",
                    table.qualified()
                );
                return Err(Error::new(ErrorKind::SchemaChanged, text).hint(slot::RESYNC));
            }
            ddl::relax_identity(self.writer, &table).await?;
            let fired = place.map(|place| self.layout.tables[place].table.firing.clone()).unwrap_or_default();
            table.firing =
                ddl::relax_firing(self.writer, &table, &fired, |object| changed.contains_key(object)).await?;
            if let Some(place) = place {
                let before = self.layout.tables[place].table.clone();
                let added = |column: &&crate::source::ddl::ToldColumn| {
                    column.relid == table.relid && !before.columns.iter().any(|was| was.number == column.column.number)
                };
                let added: Vec<_> = told.columns.iter().filter(added).collect();
                for column in added {
                    ddl::give_missing(self.writer, &table, column).await?;
                }
                std::sync::Arc::make_mut(&mut self.layout).redefine(place, &table);
                record.redefined.push(table);
            } else {
                std::sync::Arc::make_mut(&mut self.layout).add(&table);
                record.new.push(table);
            }
        }
        for relid in told.dropped.iter().filter_map(|dropped| dropped.relid) {
            if std::sync::Arc::make_mut(&mut self.layout).remove(relid) {
                record.dropped.push(relid);
            }
        }
        for table in &told.unpublished {
            let text = format!(
                "{} was made on the source, and its rows are not in the stream: {}. The cutover names it",
                table.table, table.error
            );
            self.board.event(Level::Warn, text);
        }
        Ok(record)
    }

    /// Which objects of the fingerprint are dealt with by it (I11).
    async fn fingerprint(
        &mut self,
        told: &Told,
        recorded: &Definitions,
        (before, after): (&Definitions, &Definitions),
        record: &mut Recorded,
    ) -> Result<()> {
        let left = ddl::left(self.writer).await?;
        record.present = told.fingerprint.clone();
        record.present.retain(|object, _| !left.contains_key(object));
        // What is no longer there under the table's name of before, where it was another.
        let mut names = Vec::new();
        for table in &record.redefined {
            names.push(ddl::quoted(self.writer, table).await?);
        }
        let is_part = |object: &str| {
            names.iter().any(|name| object.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with(' ')))
        };
        let is_gone = |object: &&String| {
            !record.present.contains_key(*object)
                && !after.contains_key(*object)
                && (before.contains_key(*object)
                    || is_part(object)
                    || told.dropped.iter().any(|dropped| dropped.is(object)))
        };
        record.gone = recorded.keys().filter(is_gone).cloned().collect();
        Ok(())
    }
}

/// What the target does not have as the source has it: objects that the statement changed, and dropped ones that are there.
fn lacking(told: &Told, changed: &Definitions, target: &Definitions) -> Vec<String> {
    // Another version of an extension is the target's own affair.
    let differs = changed.iter().filter(|(object, hash)| {
        !object.starts_with("extension ") && *hash != THERE && target.get(*object) != Some(hash)
    });
    let there = target.keys().filter(|object| {
        !told.definition.contains_key(*object) && told.dropped.iter().any(|dropped| dropped.is(object))
    });
    differs.map(|(object, _)| object.clone()).chain(there.cloned()).collect()
}

fn stopped(head: &TransactionHead, told: &Told, why: &str, by_hand: bool) -> Error {
    // The options of these can hold passwords (I10).
    let is_secret = ["USER MAPPING", "SERVER", "SUBSCRIPTION"].iter().any(|word| told.tag.contains(word));
    let mut text = statement::of(told).unwrap_or_else(|_| told.query.clone());
    if is_secret {
        text = "(its text may hold a password, and is not shown)".into();
    } else if text.chars().count() > SHOWN {
        text = text.chars().take(SHOWN).chain("…".chars()).collect();
    }
    let what = format!(
        "transaction {} that commits at {} changed the schema on the source by {}{}, which cannot be replayed: {why}",
        head.xid,
        head.commit_lsn,
        told.tag,
        told.objects()
    );
    let mut hint =
        format!("Everything before that transaction is on the target, and nothing of it. The statement: {text}");
    if by_hand {
        hint.push_str(" -- Make the same change on the target, then run the same command again, and it goes on.");
    }
    Error::new(ErrorKind::SchemaChanged, what).hint(hint)
}
