//! What fires when a row is written is made only at the cutover, where rows are written in the origin role (H23).
//!
//! Without `session_replication_role`, the owner of a table can disable its triggers but not its foreign keys, which are checked by
//! system triggers; and apply sessions do not see each other's uncommitted parents. So foreign keys, triggers, rules on tables and
//! event triggers are not there while rows are written:
//!
//! | when | what |
//! |---|---|
//! | the schema is finished, nothing is applied meanwhile | all of them are made in a transaction that is rolled back: PostgreSQL itself looks for rows without their parents, and says what could not be made ([`prove`]) |
//! | before the fence | what the deciding transaction is to run is read from the ledger ([`AtCutover::plan`]) |
//! | the deciding transaction | all of them are made, foreign keys as `NOT VALID`, which reads no row; with their marks in the ledger and what is left to do ([`AtCutover::statements`]) |
//! | applications are at work | the foreign keys are validated one by one, under locks that stop nobody ([`run_left`]) |
//!
//! Before PostgreSQL 18 a partitioned table cannot have a foreign key that is `NOT VALID`. There its leaves get it; once all of them
//! are valid, that of the partitioned table takes them as its own without reading a row.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::ledger::{self, SchemaItem, Section};
use super::schema::{ITEM_SETTINGS, RESET_SETTINGS};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// How long a statement after the cutover waits for its lock: writers may wait behind it.
const LOCK_TIMEOUT: &str = "300ms";
/// Rest before it is tried again.
const LOCK_PAUSE: Duration = Duration::from_secs(1);
/// The first version in which a partitioned table can have a foreign key that is not valid.
const PARTITIONED_NOT_VALID_FROM: i32 = 180_000;

/// Whether an item of the schema fires for rows that are written, or with our own DDL.
///
/// A rule named `_RETURN` is what a view is made of, and other rules of views concern nobody who writes to tables.
pub(super) fn waits_for_cutover(kind: &str, name: &str, has_table: bool) -> bool {
    match kind {
        "FK CONSTRAINT" | "TRIGGER" | "EVENT TRIGGER" => true,
        "RULE" => has_table && !name.ends_with(" _RETURN"),
        _ => false,
    }
}

/// Makes everything that waits for the cutover, and takes it back. While nothing is applied.
///
/// # Errors
/// `Divergence` for a foreign key that the rows do not hold; else what the server says, with the item.
pub async fn prove(target: &mut Client) -> Result<usize> {
    let items = ledger::pending_items(target, Section::AtCutover).await?;
    let transaction = target.transaction().await?;
    for (_, item) in &items {
        let made = transaction.batch_execute(&format!("{ITEM_SETTINGS};\n{}", item.statement)).await;
        made.map_err(Error::from).map_err(|error| {
            let is_violated = error.sqlstate() == Some(&SqlState::FOREIGN_KEY_VIOLATION);
            let error = error.context(format!("trying to make {} {}, which the cutover is to", item.kind, item.name));
            match is_violated {
                true => error.with_kind(ErrorKind::Divergence).hint(
                    "The source has rows that its own foreign key forbids (written with session_replication_role, or with triggers \
                     disabled). Mend them there, or declare it NOT VALID there and begin anew.",
                ),
                false => error,
            }
        })?;
    }
    transaction.rollback().await?;
    Ok(items.len())
}

/// What the deciding transaction makes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AtCutover {
    /// In this order.
    statements: Vec<String>,
    /// Foreign keys that are valid only later: as the catalog's fingerprint names them.
    later: Vec<String>,
    /// The items, each with the place of its first statement.
    items: Vec<(usize, Waiting)>,
}

/// An item of the schema that waits for the cutover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its position in the ledger.
    pub position: i32,
    /// What it is.
    pub item: SchemaItem,
}

impl AtCutover {
    /// Reads it from the ledger, and the partitions from the target's catalog.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn plan(target: &Client) -> Result<AtCutover> {
        let mut plan = AtCutover::default();
        let items = ledger::pending_items(target, Section::AtCutover).await?;
        if items.is_empty() {
            return Ok(plan);
        }
        let version: i32 =
            target.query_typed_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[]).await?.get(0);
        plan.statements.push(ITEM_SETTINGS.to_owned());
        for (position, item) in &items {
            plan.items.push((plan.statements.len(), Waiting { position: *position, item: item.clone() }));
            match ForeignKey::parse(item) {
                Some(key) if key.is_partitioned && version < PARTITIONED_NOT_VALID_FROM => {
                    plan.add_by_leaves(target, &key, item).await?;
                }
                Some(key) => plan.add_key(&key),
                None => plan.statements.push(item.statement.clone()),
            }
            plan.statements.push(ledger::mark_done(*position));
        }
        plan.statements.push(RESET_SETTINGS.to_owned());
        Ok(plan)
    }

    /// For the deciding transaction, each with its semicolon; empty where nothing waits.
    pub fn statements(&self) -> String {
        // Each on a line of its own, whatever comment the one before ends with.
        self.statements.iter().map(|statement| format!("\n{statement}\n;")).collect()
    }

    /// One by one, as [`AtCutover::statements`] has them.
    pub fn each(&self) -> impl Iterator<Item = &str> {
        self.statements.iter().map(String::as_str)
    }

    /// The item that the statement at a place of [`AtCutover::each`] comes from.
    pub fn item_at(&self, place: usize) -> Option<&Waiting> {
        self.items.iter().take_while(|(first, _)| *first <= place).last().map(|(_, waiting)| waiting)
    }

    /// The foreign keys that are not valid yet when the target takes over, as the catalog's fingerprint names them.
    pub fn later(&self) -> &[String] {
        &self.later
    }

    fn add_key(&mut self, key: &ForeignKey<'_>) {
        let (only, table, name) = (if key.is_partitioned { "" } else { "ONLY " }, key.table, key.name);
        self.statements.push(format!("ALTER TABLE {only}{table} ADD CONSTRAINT {name} {}", key.not_valid()));
        if key.is_to_be_validated() {
            self.leave(key, table, "VALIDATE", &format!("ALTER TABLE {only}{table} VALIDATE CONSTRAINT {name}"));
        }
    }

    async fn add_by_leaves(&mut self, target: &Client, key: &ForeignKey<'_>, item: &SchemaItem) -> Result<()> {
        let leaves = target
            .query(
                "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1)) p \
                 JOIN pg_catalog.pg_class c ON c.oid = p.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE p.isleaf AND c.relkind <> 'p' ORDER BY c.oid",
                &[&key.table],
            )
            .await
            .context(|| format!("listing the partitions of {}", key.table))?;
        if leaves.is_empty() {
            self.statements.push(item.statement.clone());
            return Ok(());
        }
        for leaf in &leaves {
            self.add_key(&ForeignKey { table: leaf.get(0), is_partitioned: false, ..*key });
        }
        self.leave(key, key.table, "FK CONSTRAINT", &item.statement);
        Ok(())
    }

    /// Leaves a statement to be run after the cutover, under the name that the constraint has in the fingerprint.
    fn leave(&mut self, key: &ForeignKey<'_>, table: &str, kind: &str, statement: &str) {
        // `pg_dump` quotes as `format('%I')` does, by which the fingerprint is made: where that is needed.
        let name = format!("constraint {} of table {table}", key.name);
        self.statements.push(format!(
            "INSERT INTO walferry.schema_item (position, section, kind, name, statement) \
             SELECT max(position) + 1, '{}', '{kind}', {}, {} FROM walferry.schema_item",
            Section::AfterCutover.name(),
            sql::literal(&name),
            sql::literal(statement)
        ));
        self.later.push(name);
    }
}

/// A foreign key out of the statement that `pg_dump` writes for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ForeignKey<'a> {
    /// Qualified and quoted where that is needed.
    table: &'a str,
    is_partitioned: bool,
    /// Quoted where that is needed.
    name: &'a str,
    /// From `FOREIGN KEY` on.
    definition: &'a str,
}

impl<'a> ForeignKey<'a> {
    /// `ALTER TABLE [ONLY] s.t\n    ADD CONSTRAINT c FOREIGN KEY …;`; without ONLY, the table is partitioned.
    fn parse(item: &'a SchemaItem) -> Option<ForeignKey<'a>> {
        if item.kind != "FK CONSTRAINT" {
            return None;
        }
        let rest = item.statement.strip_prefix("ALTER TABLE ")?;
        let (is_partitioned, rest) = rest.strip_prefix("ONLY ").map_or((true, rest), |rest| (false, rest));
        let schema = identifier_end(rest)?;
        let table = schema + 1 + identifier_end(rest.get(schema..)?.strip_prefix('.')?)?;
        let (table, rest) = rest.split_at(table);
        let rest = rest.trim_start().strip_prefix("ADD CONSTRAINT ")?;
        let (name, definition) = rest.split_at(identifier_end(rest)?);
        let definition = definition.trim_start().trim_end().trim_end_matches(';');
        definition.starts_with("FOREIGN KEY ").then_some(ForeignKey { table, is_partitioned, name, definition })
    }

    /// Whether it is valid on the source.
    fn is_to_be_validated(&self) -> bool {
        !self.definition.ends_with(" NOT VALID") && !self.definition.ends_with(" NOT ENFORCED")
    }

    fn not_valid(&self) -> String {
        if self.is_to_be_validated() { format!("{} NOT VALID", self.definition) } else { self.definition.to_owned() }
    }
}

/// Where the identifier ends that a text begins with, quoted or not.
fn identifier_end(text: &str) -> Option<usize> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|letter: char| letter == '.' || letter.is_whitespace()).unwrap_or(text.len());
        return (end > 0).then_some(end);
    };
    let mut letters = quoted.char_indices().peekable();
    while let Some((at, letter)) = letters.next() {
        if letter == '"' && letters.next_if(|(_, next)| *next == '"').is_none() {
            return Some(at + 2);
        }
    }
    None
}

/// What came of a statement that the cutover had left.
#[derive(Debug)]
pub enum Left {
    /// It is done.
    Done,
    /// Somebody holds a lock that it needs: to be tried again after a rest.
    Waits,
}

/// Runs one statement that the cutover left, with its mark in the ledger, as one transaction.
///
/// Validating stops nobody who writes. It waits a moment for its lock, and steps back where it does not get it.
///
/// # Errors
/// What the server says, with the object; `Divergence` when there are rows that the foreign key forbids.
pub async fn run_left(target: &Client, position: i32, item: &SchemaItem) -> Result<Left> {
    let statements = format!(
        "BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {ITEM_SETTINGS};\n{}\n;{}; {RESET_SETTINGS}; COMMIT",
        item.statement,
        ledger::mark_done(position)
    );
    let Err(error) = target.batch_execute(&statements).await else { return Ok(Left::Done) };
    // The session is in a failed transaction, or gone.
    let _ = target.batch_execute("ROLLBACK").await;
    match error.code() {
        Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED) => Ok(Left::Waits),
        Some(&SqlState::FOREIGN_KEY_VIOLATION) => Err(Error::from(error)
            .with_kind(ErrorKind::Divergence)
            .context(format!("validating the {}", item.name))
            .hint(format!(
                "It holds for every row that is written from now on. Find the rows without a parent, mend them, then: {}",
                item.statement
            ))),
        _ => Err(error).context(|| format!("validating the {}", item.name)),
    }
}

/// How long to rest before a statement that [`Left::Waits`] is run again.
pub const REST: Duration = LOCK_PAUSE;

#[cfg(test)]
mod tests {
    use super::*;

    fn item(statement: &str) -> SchemaItem {
        SchemaItem {
            section: Section::AtCutover,
            kind: "FK CONSTRAINT".into(),
            name: "t c".into(),
            relid: None,
            statement: statement.into(),
        }
    }

    #[test]
    fn a_foreign_key_is_read_whatever_its_names_are() {
        let statement = "ALTER TABLE ONLY \"s \"\"\n    ADD CONSTRAINT x FOREIGN KEY \".\"t.u\"\n    ADD CONSTRAINT \"c d\" \
                         FOREIGN KEY (a) REFERENCES public.p(id) ON DELETE CASCADE;";
        let parsed = item(statement);
        let key = ForeignKey::parse(&parsed).unwrap();
        assert_eq!(key.table, "\"s \"\"\n    ADD CONSTRAINT x FOREIGN KEY \".\"t.u\"");
        assert_eq!((key.name, key.is_partitioned), ("\"c d\"", false));
        assert_eq!(key.not_valid(), "FOREIGN KEY (a) REFERENCES public.p(id) ON DELETE CASCADE NOT VALID");
    }

    #[test]
    fn one_that_is_not_valid_on_the_source_stays_so() {
        let statement = "ALTER TABLE public.t\n    ADD CONSTRAINT c FOREIGN KEY (a) REFERENCES public.p(id) NOT VALID;";
        let parsed = item(statement);
        let key = ForeignKey::parse(&parsed).unwrap();
        assert!(key.is_partitioned && !key.is_to_be_validated());
        assert_eq!(key.not_valid(), "FOREIGN KEY (a) REFERENCES public.p(id) NOT VALID");
        let mut plan = AtCutover::default();
        plan.add_key(&key);
        assert_eq!(plan.later(), [""; 0]);
    }

    #[test]
    fn what_is_left_is_named_as_the_fingerprint_names_it() {
        let statement = "ALTER TABLE ONLY public.\"T\"\n    ADD CONSTRAINT c FOREIGN KEY (a) REFERENCES public.p(id);";
        let (mut plan, parsed) = (AtCutover::default(), item(statement));
        plan.add_key(&ForeignKey::parse(&parsed).unwrap());
        assert_eq!(plan.later(), ["constraint c of table public.\"T\""]);
        assert!(plan.statements().contains("ALTER TABLE ONLY public.\"T\" VALIDATE CONSTRAINT c"), "{plan:?}");
    }
}
