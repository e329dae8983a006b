//! A table that changed on the source, and the target's table: does it fit now, and if not, which statements mend it?
//!
//! What is compared is the target as it is, so whatever the operator has done already is not asked for again, and a target that
//! was changed before the source does not stop the apply at all. A column is the same column while its number is; by name
//! alone a renamed column and a dropped one beside an added one look alike.
//!
//! What nobody can see is said plainly: whether an ALTER had a USING clause, and whether a default was given when the column was
//! added or afterwards, when the source no longer has it as a missing value. Such rows were rewritten without being streamed. That
//! the table was written anew shows in its file, which is another one then: a column that comes or gets another name with it is
//! not taken for what the target can do by itself. TRUNCATE and VACUUM FULL look the same, which costs a comparison too many.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::change::{Adoption, Announced, Change};
use super::layout::Layout;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{self, Column, ReplicaIdentity, Table};
use crate::source::slot;
use crate::sql;
use crate::target::ledger::Redefinition;
use crate::target::route::Routing;

mod fingerprint;
mod side;

use side::{Fact, Side};

/// Looks at both servers, and answers how to go on when the target fits.
///
/// # Errors
/// `SchemaChanged` with the statements that mend the target, or with why none can. Otherwise whatever the servers say.
pub async fn reconcile(source: &Client, target: &Client, layout: &Layout, change: &Change) -> Result<Adoption> {
    begin(source).await?;
    let adoption = adoption(source, target, layout, change).await;
    end(source, adoption).await
}

/// All that is read of the source is of one moment: what comes between two readings would be taken for dealt with.
async fn begin(source: &Client) -> Result<()> {
    let begin = source.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await;
    begin.context(|| "beginning to look at the source's tables".into())
}

async fn end<T>(source: &Client, outcome: Result<T>) -> Result<T> {
    let ended = source.batch_execute("ROLLBACK").await.context(|| "looking at the source's tables".into());
    let answer = outcome?;
    ended?;
    Ok(answer)
}

async fn adoption(source: &Client, target: &Client, layout: &Layout, change: &Change) -> Result<Adoption> {
    let before = &layout.tables[layout.place(change.announced.relid)?].table;
    let announced = &change.announced;
    let current = catalog::tables(source).await?.into_iter().find(|table| table.relid == announced.relid);
    let mut plan = Plan::new(before, announced);
    let columns = plan.columns(source, current.as_ref()).await?;
    if layout.binary {
        plan.all_are_binary_safe(&columns);
    }
    let taken = layout.tables.iter().any(|entry| {
        entry.table.relid != announced.relid
            && (entry.table.schema.as_str(), entry.table.name.as_str()) == (&announced.schema, &announced.name)
    });
    if taken {
        plan.undecidable(format!(
            "another migrated table was named {} before, and which of the target's tables is which cannot be seen",
            sql::qualified(&announced.schema, &announced.name)
        ));
    }
    let on_source = side::by_relid(source, announced.relid).await?;
    let root = side::root(source, announced.relid).await?.unwrap_or_else(|| before.qualified());
    let on_target = plan.find_table(target).await?;
    if let Some(on_target) = &on_target {
        plan.compare(&columns, on_source.as_ref(), on_target, &root);
    }
    let key = plan.key(&columns, current.as_ref(), on_target.as_ref());
    let file = current.as_ref().and_then(|current| current.relfilenode);
    if before.relfilenode.is_some() && file.is_some() && before.relfilenode != file {
        plan.written_anew(&columns);
    }
    plan.finish(
        &format!("transaction {} that commits at {} finds ", change.head.xid, change.head.commit_lsn),
        "Everything before the change is on the target, and nothing of it.",
    )?;

    let is_current = current.as_ref().is_some_and(|current| is_as_announced(current, announced));
    let mut table = Table {
        schema: announced.schema.clone(),
        name: announced.name.clone(),
        identity: announced.identity,
        key,
        has_other_unique: current.is_none_or(|current| current.has_other_unique),
        columns,
        ..before.clone()
    };
    // What is not known of a column's type spreads its rows over no sessions.
    let routing = if is_current { Routing::of(&table) } else { Routing::Whole };
    let is_added = |column: &&Column| !before.columns.iter().any(|was| was.number == column.number);
    let missing_of = |column: &Column| {
        let fact = on_source.as_ref().and_then(|side| side.fact(&column.name));
        fact.and_then(|fact| Some((column.number, fact.missing.clone()?)))
    };
    let missing = table.columns.iter().filter(is_added).filter_map(missing_of).collect();
    let catalogs = fingerprint::Catalogs::read(source, target).await?;
    let fingerprint = catalogs.dealt_with(source, target, before, &table, false).await?;
    // What has changed the file since is still to be announced, or seen only in the columns that this change is not about: then
    // the old file is what the next change is judged by.
    if is_current && catalogs.are_as_recorded(source, before, &table).await? {
        table.relfilenode = file;
    }
    Ok(Adoption { change: change.clone(), table, routing, missing, fingerprint })
}

fn is_as_announced(table: &Table, announced: &Announced) -> bool {
    let ours = table.columns.iter().map(|column| (&column.name, column.type_oid, column.type_modifier));
    ours.eq(announced.columns.iter().map(|column| (&column.name, column.type_oid, column.type_modifier)))
}

/// How the tables' changes come after they were compared again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// From the slot that is there.
    GoesOn {
        /// Whether in binary.
        binary: bool,
    },
    /// From a new one, which is in the form that the tables can be sent in, and without tables that are gone: those are left out of
    /// the answer.
    New,
}

/// The same for tables whose rows will be compared with the source again: then names are enough, whatever became of the values.
/// The copy makes sure that its snapshot shows the same columns.
///
/// # Errors
/// As [`reconcile`].
pub async fn redefine(
    source: &Client,
    target: &Client,
    tables: &[&Table],
    stream: Stream,
) -> Result<Vec<Redefinition>> {
    begin(source).await?;
    let redefined = redefinitions(source, target, tables, stream).await;
    end(source, redefined).await
}

async fn redefinitions(
    source: &Client,
    target: &Client,
    tables: &[&Table],
    stream: Stream,
) -> Result<Vec<Redefinition>> {
    let current = catalog::tables(source).await?;
    let catalogs = fingerprint::Catalogs::read(source, target).await?;
    let mut redefined = Vec::with_capacity(tables.len());
    for &before in tables {
        // A chunk has the columns of its hypertable, and what the target has in its place is found by its range. One that is gone is
        // taken up as such.
        if before.chunk.is_some() {
            let now = current.iter().find(|table| table.relid == before.relid);
            redefined.extend(now.map(|now| Redefinition {
                table: Table { chunk: before.chunk.clone(), ..now.clone() },
                routing: Routing::of(now),
                fingerprint: Vec::new(),
            }));
            continue;
        }
        let Some(table) = current.iter().find(|table| table.relid == before.relid) else {
            let text = format!("{} is gone from the source, and cannot be compared again", before.qualified());
            let error = Error::new(ErrorKind::SchemaChanged, text);
            // The target would keep rows of the old one under that name.
            if current.iter().any(|table| table.qualified() == before.qualified()) {
                return Err(error.hint(
                    "Another table has its name now, which is not migrated. Start anew: `walferry clean`, then `walferry migrate`.",
                ));
            }
            if stream == Stream::New {
                continue;
            }
            return Err(error.hint(format!("Compare the others. Else {}", slot::RESYNC)));
        };
        let announced = Announced::of_table(table);
        let mut plan = Plan::new(before, &announced);
        if stream == (Stream::GoesOn { binary: true }) {
            plan.all_are_binary_safe(&table.columns);
        }
        let on_source = side::by_relid(source, table.relid).await?;
        let root = side::root(source, table.relid).await?.unwrap_or_else(|| before.qualified());
        let on_target = plan.find_table(target).await?;
        if let Some(on_target) = &on_target {
            plan.compare_names(table, on_source.as_ref(), on_target, &root);
        }
        plan.key(&table.columns, Some(table), on_target.as_ref());
        plan.finish("comparing again: ", "Nothing has been changed yet.")?;
        let fingerprint = catalogs.dealt_with(source, target, before, table, true).await?;
        let table = Table { hypertable: before.hypertable.clone(), ..table.clone() };
        redefined.push(Redefinition { routing: Routing::of(&table), table, fingerprint });
    }
    Ok(redefined)
}

/// What is different, and what has to be done about it.
struct Plan<'a> {
    before: &'a Table,
    announced: &'a Announced,
    /// What changed, for people.
    differences: Vec<String>,
    /// What mends the target.
    statements: Vec<String>,
    /// What the operator has to think of.
    notes: Vec<String>,
    /// What no statement mends.
    obstacles: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(before: &'a Table, announced: &'a Announced) -> Plan<'a> {
        let (differences, statements, notes, obstacles) = Default::default();
        Plan { before, announced, differences, statements, notes, obstacles }
    }

    /// The announced columns with all that the catalog knows of them, and what became of those that were there.
    async fn columns(&mut self, source: &Client, current: Option<&Table>) -> Result<Vec<Column>> {
        let mut columns = Vec::with_capacity(self.announced.columns.len());
        for announced in &self.announced.columns {
            let of_name = |table: &'a Table| table.columns.iter().find(|column| column.name == announced.name);
            let same_type = |column: &&Column| {
                column.type_oid == announced.type_oid && column.type_modifier == announced.type_modifier
            };
            let now = current.and_then(|table| table.columns.iter().find(|column| column.name == announced.name));
            let was = of_name(self.before);
            if let Some(column) = now.filter(same_type) {
                columns.push(column.clone());
                continue;
            }
            // The source has changed it again since.
            let of_type =
                catalog::column_of_type(source, &announced.name, announced.type_oid, announced.type_modifier).await?;
            let Some(mut column) = of_type else {
                self.undecidable(format!("the type of column {} is gone from the source", announced.name));
                continue;
            };
            column.number = was.filter(same_type).or(now).map_or(0, |known| known.number);
            columns.push(column);
        }
        let names: BTreeSet<&str> = self.announced.columns.iter().map(|column| column.name.as_str()).collect();
        let is_missing = |column: &Column| !names.contains(column.name.as_str());
        let is_new = |column: &Column| {
            is_missing(column) && !self.before.columns.iter().any(|before| before.name == column.name)
        };
        let others = current.is_none_or(|table| table.columns.iter().any(is_new));
        let unknown = columns.iter().any(|column| column.number == 0);
        let known: Vec<i16> = columns.iter().map(|column| column.number).filter(|number| *number != 0).collect();
        if unknown && (others || self.before.columns.iter().any(is_missing)) || !known.is_sorted_by(|a, b| a < b) {
            self.undecidable("the source has changed it again since, and which column is which cannot be seen".into());
        }
        // Those that are gone again: numbers that no other column has.
        let mut spare = i16::MAX;
        for column in columns.iter_mut().filter(|column| column.number == 0) {
            column.number = spare;
            spare -= 1;
        }
        Ok(columns)
    }

    fn all_are_binary_safe(&mut self, columns: &[Column]) {
        for column in columns.iter().filter(|column| !column.binary_safe) {
            self.obstacles.push(format!(
                "the stream of this migration is binary, and {} has no binary form that is the same on both servers. When the target has \
                 the change too, {}",
                column.type_name,
                slot::RESYNC.trim_end_matches('.')
            ));
        }
    }

    /// The table on the target, under its new name or its old one.
    async fn find_table(&mut self, target: &Client) -> Result<Option<Side>> {
        let (before, announced) = (self.before, self.announced);
        let new = side::by_name(target, &announced.schema, &announced.name).await?;
        if (&announced.schema, &announced.name) == (&before.schema, &before.name) {
            if new.is_none() {
                self.obstacles.push("the target does not have it".into());
            }
            return Ok(new);
        }
        let now = sql::qualified(&announced.schema, &announced.name);
        self.differences.push(format!("it is now {now}"));
        let old = side::by_name(target, &before.schema, &before.name).await?;
        match (&new, &old) {
            (None, Some(_)) => {
                if before.name != announced.name {
                    let name = sql::identifier(&announced.name);
                    self.statements.push(format!("ALTER TABLE {} RENAME TO {name}", before.qualified()));
                }
                if before.schema != announced.schema {
                    let renamed = sql::qualified(&before.schema, &announced.name);
                    let schema = sql::identifier(&announced.schema);
                    self.statements.push(format!("ALTER TABLE {renamed} SET SCHEMA {schema}"));
                }
            }
            (Some(_), Some(_)) => self.obstacles.push(format!(
                "the target has both {} and {now}: only the second may be there, with the first one's rows",
                before.qualified()
            )),
            (None, None) => self.obstacles.push("the target has it under neither name".into()),
            (Some(_), None) => {}
        }
        Ok(new.or(old))
    }

    /// Column by column.
    fn compare(&mut self, columns: &[Column], on_source: Option<&Side>, on_target: &Side, root: &str) {
        let before = self.before;
        let names: BTreeSet<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        let had = |name: &str| before.columns.iter().any(|column| column.name == name);
        for column in columns {
            let was = before.columns.iter().find(|was| was.number == column.number);
            let name = sql::identifier(&column.name);
            match was {
                Some(was) if was.name != column.name => {
                    self.differences.push(format!("column {} is now named {name}", sql::identifier(&was.name)));
                }
                None => self.differences.push(format!("column {name} {} was added", column.type_name)),
                Some(_) => {}
            }
            if was.is_none_or(|was| was.name != column.name) && had(&column.name) {
                self.undecidable(format!(
                    "another column was named {name} before, and whether the target's is the old or the new one cannot be seen"
                ));
                continue;
            }
            let retyped = was.is_some_and(|was| was.type_name != column.type_name);
            if let Some(was) = was.filter(|_| retyped) {
                self.differences
                    .push(format!("column {name} is now of type {} instead of {}", column.type_name, was.type_name));
            }
            let there = on_target.fact(&column.name);
            let old = was.filter(|was| was.name != column.name).and_then(|was| on_target.fact(&was.name));
            match (there, old, was) {
                (Some(_), Some(old), _) => {
                    self.obstacles.push(format!("the target has both {} and {name}", sql::identifier(&old.name)));
                }
                (None, Some(old), _) => {
                    let old = sql::identifier(&old.name);
                    self.statements.push(format!("ALTER TABLE {root} RENAME COLUMN {old} TO {name}"));
                }
                // Also when a later change of the same transaction drops it, and the target was mended for that one already.
                (None, None, Some(_)) => self.undecidable(format!("the target has no column {name}")),
                _ => {}
            }
            let now = there.or(old);
            if let Some(now) = now.filter(|now| (retyped || was.is_none()) && now.type_name != column.type_name) {
                let to = &column.type_name;
                self.statements.push(format!("ALTER TABLE {root} ALTER COLUMN {name} TYPE {to}"));
                self.notes.push(format!(
                    "It was {} on the target. If the source's ALTER had a USING clause, give the same one; if it gave values that \
                     cannot be had again, copy the table again: {}",
                    now.type_name,
                    self.recopy()
                ));
            }
            if was.is_none() {
                self.added(column, on_source.and_then(|side| side.fact(&column.name)), there, root);
            }
            if now.is_some_and(|now| now.is_generated) {
                self.obstacles.push(format!("column {name} is generated on the target, and cannot be written to"));
            }
        }
        for gone in before.columns.iter().filter(|was| !columns.iter().any(|now| now.number == was.number)) {
            let name = sql::identifier(&gone.name);
            self.differences.push(format!("column {name} was dropped"));
            if on_target.fact(&gone.name).is_some() && !names.contains(gone.name.as_str()) {
                self.statements.push(format!("ALTER TABLE {root} DROP COLUMN {name}"));
            }
        }
        for extra in on_target.facts.iter().filter(|fact| !names.contains(fact.name.as_str()) && !had(&fact.name)) {
            if extra.not_null && extra.default.is_none() && !extra.is_identity && !extra.is_generated {
                self.obstacles.push(format!(
                    "the target has a column {} that the source does not have, which must not be null and has no default",
                    sql::identifier(&extra.name)
                ));
            }
        }
    }

    /// The target has the columns of the source by name and type, and no others; what is in the rows is no matter.
    fn compare_names(&mut self, table: &Table, on_source: Option<&Side>, on_target: &Side, root: &str) {
        for column in &table.columns {
            let name = sql::identifier(&column.name);
            match on_target.fact(&column.name) {
                Some(there) if there.is_generated => {
                    self.obstacles.push(format!("column {name} is generated on the target, and cannot be written to"));
                }
                Some(there) if there.type_name != column.type_name => {
                    let to = &column.type_name;
                    self.differences.push(format!("column {name} is now of type {to} instead of {}", there.type_name));
                    self.statements.push(format!("ALTER TABLE {root} ALTER COLUMN {name} TYPE {to}"));
                }
                Some(_) => {}
                None => {
                    self.differences.push(format!("column {name} {} was added", column.type_name));
                    self.statements.push(format!("ALTER TABLE {root} ADD COLUMN {name} {}", column.type_name));
                    let default = on_source.and_then(|side| side.fact(&column.name)?.default.as_ref());
                    match default {
                        Some(default) if !default.contains("nextval(") => self
                            .statements
                            .push(format!("ALTER TABLE {root} ALTER COLUMN {name} SET DEFAULT {default}")),
                        Some(default) => self.notes.push(format!("On the source its default is {default}")),
                        None => {}
                    }
                }
            }
        }
        let computed = on_source.iter().flat_map(|side| &side.facts).filter(|fact| fact.is_generated);
        for fact in computed.clone() {
            if !on_target.fact(&fact.name).is_some_and(|there| there.is_generated) {
                let name = sql::identifier(&fact.name);
                self.obstacles.push(format!("column {name} is generated on the source, and not on the target"));
            }
        }
        for extra in &on_target.facts {
            let name = sql::identifier(&extra.name);
            if table.columns.iter().any(|column| column.name == extra.name)
                || computed.clone().any(|fact| fact.name == extra.name)
            {
                continue;
            }
            if self.before.columns.iter().any(|column| column.name == extra.name) {
                self.differences.push(format!("column {name} was dropped"));
                self.statements.push(format!("ALTER TABLE {root} DROP COLUMN {name}"));
            } else {
                self.obstacles.push(format!(
                    "the target has a column {name} that the source does not have, and rows with other columns cannot be compared"
                ));
            }
        }
    }

    /// A column that was added: the rows that were there have its default as a missing value, and were not streamed.
    fn added(&mut self, column: &Column, on_source: Option<&Fact>, there: Option<&Fact>, root: &str) {
        let name = sql::identifier(&column.name);
        // It is gone from the source again: it comes and goes without being looked at.
        let nothing = Fact::default();
        let wanted = on_source.unwrap_or(&nothing);
        if wanted.missing.is_none() && (wanted.default.is_some() || wanted.is_identity) {
            self.undecidable(format!(
                "column {name} has a default on the source ({}) which may have given each of the rows that were there a value \
                 of its own, and the stream does not show those",
                wanted.default.as_deref().unwrap_or("identity")
            ));
            return;
        }
        // Rows that are there with another value than on the source are not what a new default mends.
        let fits = there.is_some_and(|there| on_source.is_none() || there.missing == wanted.missing);
        if !fits {
            if there.is_some() {
                self.statements.push(format!("ALTER TABLE {root} DROP COLUMN {name}"));
            }
            self.statements.push(add_column(root, column, wanted));
        }
        let follows = match there.filter(|_| fits) {
            Some(there) => there.default == wanted.default,
            None => wanted.missing.is_none() || wanted.is_default_missing(),
        };
        if on_source.is_some() && !follows {
            self.statements.push(match &wanted.default {
                Some(default) => format!("ALTER TABLE {root} ALTER COLUMN {name} SET DEFAULT {default}"),
                None => format!("ALTER TABLE {root} ALTER COLUMN {name} DROP DEFAULT"),
            });
        }
        if wanted.not_null && there.is_none_or(|there| !there.not_null) && wanted.missing.is_none() {
            self.notes.push(format!(
                "On the source the column is NOT NULL; once no row has NULL there: ALTER TABLE {root} ALTER COLUMN {name} SET NOT NULL"
            ));
        }
    }

    /// The table has another file on the source. What the rows have in a column that came, or in one whose old name the fingerprint
    /// is kept under, nobody can see then. Of a new type it is said what to think of.
    fn written_anew(&mut self, columns: &[Column]) {
        let (before, announced) = (self.before, self.announced);
        let is_kept =
            |column: &Column| before.columns.iter().any(|was| (was.number, &was.name) == (column.number, &column.name));
        let mut names: Vec<String> =
            columns.iter().filter(|column| !is_kept(column)).map(|column| sql::identifier(&column.name)).collect();
        if (&announced.schema, &announced.name) != (&before.schema, &before.name) {
            names = vec!["any column".to_owned()];
        }
        if !names.is_empty() {
            self.undecidable(format!(
                "the source has written all rows of the table anew, by an ALTER TABLE or by TRUNCATE, VACUUM FULL or CLUSTER, and \
                 whether they got other values in {} the stream does not show",
                names.join(", ")
            ));
        }
    }

    /// By which columns rows are found from there on.
    fn key(&mut self, columns: &[Column], current: Option<&Table>, on_target: Option<&Side>) -> Vec<usize> {
        let before = self.before;
        let place = |&at: &usize| columns.iter().position(|column| column.number == before.columns[at].number);
        let old: Option<Vec<usize>> = before.key.iter().map(place).collect();
        let announced: Vec<usize> = (0..columns.len())
            .filter(|&at| self.announced.columns.get(at).is_some_and(|column| column.is_key))
            .collect();
        match (self.announced.identity, old) {
            (ReplicaIdentity::Full, Some(old)) => return old,
            (ReplicaIdentity::Full, None) => {
                let same = current.filter(|current| is_as_announced(current, self.announced));
                return same.map(|current| current.key.clone()).unwrap_or_default();
            }
            // The source refuses updates and deletes then, so none can come.
            (ReplicaIdentity::Nothing, _) => return Vec::new(),
            (_, Some(old)) if old.iter().collect::<BTreeSet<_>>() == announced.iter().collect() => return old,
            _ => {}
        }
        if announced.is_empty() {
            return announced;
        }
        let names: BTreeSet<&str> = announced.iter().map(|&at| columns[at].name.as_str()).collect();
        let list = sql::identifiers(names.iter().copied());
        self.differences.push(format!("its replica identity is now ({list})"));
        if on_target.is_none_or(|target| {
            !target.unique.iter().any(|index| index.iter().map(String::as_str).eq(names.iter().copied()))
        }) {
            let table = sql::qualified(&self.announced.schema, &self.announced.name);
            self.statements.push(format!("CREATE UNIQUE INDEX ON {table} ({list})"));
            self.notes.push("Instead of that index, make the same change of the primary key there".into());
        }
        announced
    }

    fn undecidable(&mut self, why: String) {
        self.obstacles.push(format!("{why}. Copy it again: {}", self.recopy()));
    }

    /// By the name that the ledger has.
    fn recopy(&self) -> String {
        format!("`walferry migrate {}`", Table::recopy_option(&[self.before]))
    }

    /// Nothing left to do, or the error that says what.
    fn finish(self, whoever: &str, so_far: &str) -> Result<()> {
        if self.statements.is_empty() && self.obstacles.is_empty() {
            return Ok(());
        }
        let what = if self.differences.is_empty() { "it has changed".to_owned() } else { self.differences.join(", ") };
        let text = format!("{whoever}{} changed on the source: {what}", self.before.qualified());
        let mut hint = so_far.to_owned();
        for obstacle in &self.obstacles {
            hint.push_str(&format!(" No statement mends this: {obstacle}."));
        }
        if self.obstacles.is_empty() {
            hint.push_str(&format!(
                " Run this on the target: {}; Then run the same command again, and it goes on.",
                self.statements.join("; ")
            ));
            for note in &self.notes {
                hint.push_str(&format!(" {note}."));
            }
        }
        Err(Error::new(ErrorKind::SchemaChanged, text).hint(hint))
    }
}

fn add_column(root: &str, column: &Column, wanted: &Fact) -> String {
    let mut statement = format!("ALTER TABLE {root} ADD COLUMN {} {}", sql::identifier(&column.name), column.type_name);
    if let Some(missing) = &wanted.missing {
        let default = match &wanted.default {
            Some(default) if wanted.is_default_missing() => default.clone(),
            _ => format!("CAST({} AS {})", sql::literal(missing).trim_start(), column.type_name),
        };
        statement.push_str(&format!(" DEFAULT {default}"));
        if wanted.not_null {
            statement.push_str(" NOT NULL");
        }
    }
    statement
}

/// Asks a server, and says for what.
async fn ask(
    client: &Client,
    query: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<Vec<tokio_postgres::Row>> {
    client.query(query, parameters).await.context(|| "comparing a table that has changed on the source".into())
}
