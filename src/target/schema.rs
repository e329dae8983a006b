//! The schema: written by `pg_dump`, split into its items, run item by item in our own sessions.
//!
//! PostgreSQL's own tools own DDL; nothing here composes a statement of the schema. `pg_restore` would run them in a
//! session of its own, where the ledger's row cannot ride along (H12): so its SQL is taken (`-f -`), cut at the headers
//! that its verbose form writes before every item, and each item is run together with its row in the ledger.
//!
//! Items of the post-data section that belong to one table (its indexes and keys) are run as soon as that table is
//! copied, several tables at a time; the rest (attached indexes, foreign keys, triggers, rules) in `pg_dump`'s order once
//! the apply has passed every snapshot (H24). What would fire while rows are written in the origin role waits for the cutover
//! ([`super::late`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures_util::future::{join_all, try_join};
use tokio::process::Command;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::late;
use super::ledger::{self, SchemaItem, Section};
use super::role::ApplyRole;
use super::{harmless, role_map};
use crate::check::tools::Tools;
use crate::connection::{ConnectionSpec, without_secrets};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{Firing, Table};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// Dumps the source's schema as it is under a snapshot, and splits it into its items.
///
/// The archive exists only as long as this function runs, with mode 0600 in the state directory: user mappings can hold
/// passwords (I10).
///
/// # Errors
/// `Other` with what `pg_dump` or `pg_restore` said.
pub async fn dump(
    tools: &Tools,
    source: &ConnectionSpec,
    application_name: &str,
    snapshot: &str,
    directory: &Path,
    owners: &Owners,
    role: ApplyRole,
) -> Result<Vec<SchemaItem>> {
    let archive = Archive(directory.join("schema.dump"));
    // Made before pg_dump does, so that it never is readable for others.
    let _ = std::fs::remove_file(&archive.0);
    crate::crashsafe::create_private(&archive.0)?;
    let environment = source.child_environment(application_name).await?;
    let mut command = Command::new(&tools.pg_dump);
    command
        .args(["--format=custom", "--schema-only", "--no-publications", "--no-subscriptions", "--no-tablespaces"])
        .args(["--exclude-schema=walferry", "--exclude-schema=walferry_ddl_*", "--lock-wait-timeout=30s"])
        .arg(format!("--snapshot={snapshot}"))
        .arg(format!("--file={}", archive.0.display()));
    environment.apply(&mut command);
    output_of(command, "pg_dump").await.context(|| "dumping the source's schema".into())?;

    let file = &archive.0;
    let left_out: Vec<&str> = [(owners.no_owner, "--no-owner"), (owners.no_privileges, "--no-privileges")]
        .into_iter()
        .filter_map(|(is_left_out, option)| is_left_out.then_some(option))
        .collect();
    let left_out = &left_out;
    let read = |section: Section| {
        let restore = move |arguments: &[&str]| {
            let mut command = Command::new(&tools.pg_restore);
            command.arg(format!("--section={}", section.name())).arg("--no-tablespaces").args(left_out);
            command.args(arguments).arg(file);
            without_secrets(&mut command);
            output_of(command, "pg_restore")
        };
        try_join(restore(&["--list"]), restore(&["--verbose", "--file=-"]))
    };
    let (before, after) = try_join(read(Section::PreData), read(Section::PostData)).await?;
    let mut items = Vec::new();
    let mut relations = BTreeMap::new();
    for (section, (list, script)) in [(Section::PreData, before), (Section::PostData, after)] {
        let entries = list.lines().filter_map(Entry::in_list).collect();
        items.extend(split(section, &entries, &script, &mut relations, role)?);
        // Our own (--replicate-ddl).
        items.retain(|item| item.kind != "EVENT TRIGGER" || !item.name.contains("walferry_"));
    }
    if !owners.role_map.is_empty() {
        for item in &mut items {
            item.statement = role_map::rename(&item.statement, &item.kind, &owners.role_map);
        }
    }
    Ok(items)
}

/// Runs everything of the schema that comes before the rows, as one transaction with its rows in the ledger.
///
/// Identity columns become `BY DEFAULT` for the time of the migration, so that rows keep their values (H22). Extensions get the
/// version that the source has, where the target offers it. Answers what was left out, in a sentence each ([`harmless`]).
///
/// # Errors
/// What the server says, with the item.
pub async fn restore_pre_data(client: &mut Client, tables: &[Table]) -> Result<Vec<String>> {
    let mut items = ledger::pending_items(client, Section::PreData).await?;
    let versions = extension_versions(client).await?;
    for (_, item) in items.iter_mut().filter(|(_, item)| item.kind == "EXTENSION") {
        item.statement = with_version(&item.statement, versions.get(&item.name));
    }
    let mut left_out = Vec::new();
    let transaction = client.transaction().await?;
    let client = transaction.client();
    for items in items.chunk_by(|(_, a), (_, b)| !harmless::may_be_refused(a) && !harmless::may_be_refused(b)) {
        if let [(position, item)] = items
            && harmless::may_be_refused(item)
        {
            left_out.extend(run_item_that_may_be_refused(client, *position, item).await?);
            continue;
        }
        for items in items.chunks(ITEMS_IN_FLIGHT) {
            // Sent in this order without waiting for each answer. After the first that fails, the server refuses the others.
            let sent: Vec<_> = items.iter().map(|(position, item)| run_item(client, *position, item)).collect();
            join_all(sent).await.into_iter().collect::<Result<()>>()?;
        }
    }
    transaction.batch_execute(RESET_SETTINGS).await?;
    for statement in tables.iter().flat_map(identity_statements("SET GENERATED BY DEFAULT")) {
        transaction.batch_execute(&statement).await.context(|| statement.clone())?;
    }
    transaction.batch_execute("UPDATE walferry.migration SET pre_data_restored = true").await?;
    transaction.commit().await.context(|| "restoring the schema on the target".into())?;
    Ok(left_out)
}

/// The source's versions of extensions that the target offers, by name; as the catalog's fingerprint recorded them.
async fn extension_versions(client: &Client) -> Result<HashMap<String, String>> {
    let rows = client
        .query_typed(
            "SELECT v.name::text, v.version FROM pg_catalog.pg_available_extension_versions v \
             JOIN walferry.fingerprint f ON f.object = format('extension %I', v.name) AND f.hash = v.version",
            &[],
        )
        .await
        .context(|| "looking for the versions of extensions".into())?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// `CREATE EXTENSION`, which `pg_dump` writes without a version: there it would be the newest that the target has.
fn with_version(statement: &str, version: Option<&String>) -> String {
    match (version, statement.trim_end().strip_suffix(';')) {
        (Some(version), Some(create)) => format!("{create} VERSION {};", sql::literal(version).trim_start()),
        _ => statement.to_owned(),
    }
}

/// Tables with only those identity columns, triggers and rules that the target has: what an operator has removed there like on the source
/// is not to make a cutover fail for ever.
///
/// # Errors
/// Whatever the server says.
pub async fn restorable(client: &Client, tables: &[&Table]) -> Result<Vec<Table>> {
    let mut restorable: Vec<Table> = tables.iter().map(|table| (*table).clone()).collect();
    let names: Vec<(usize, &str, &str)> = tables
        .iter()
        .enumerate()
        .flat_map(|(place, table)| {
            let always = table.columns.iter().filter(|column| column.identity_always);
            let columns = always.map(|column| ("column", column.name.as_str()));
            let firing = table
                .firing
                .iter()
                .map(|firing| (if firing.is_rule { "rule" } else { "trigger" }, firing.name.as_str()));
            columns.chain(firing).map(move |(kind, name)| (place, kind, name))
        })
        .collect();
    if names.is_empty() {
        return Ok(restorable);
    }
    let places: Vec<i64> = names.iter().map(|(place, ..)| i64::try_from(*place).unwrap_or(i64::MAX)).collect();
    let qualified: Vec<String> = names.iter().map(|(place, ..)| tables[*place].qualified()).collect();
    let kinds: Vec<&str> = names.iter().map(|(_, kind, _)| *kind).collect();
    let objects: Vec<&str> = names.iter().map(|(.., name)| *name).collect();
    let rows = client
        .query_typed(
            "SELECT place, kind, object FROM unnest($1, $2, $3, $4) u(place, relation, kind, object) WHERE CASE kind \
                 WHEN 'column' THEN EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = pg_catalog.to_regclass(relation) \
                                            AND a.attname = object AND a.attidentity <> '' AND NOT a.attisdropped) \
                 WHEN 'trigger' THEN EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass(relation) \
                                             AND t.tgname = object) \
                 ELSE EXISTS (SELECT FROM pg_catalog.pg_rewrite w WHERE w.ev_class = pg_catalog.to_regclass(relation) AND w.rulename = object) END",
            &[
                (&places, Type::INT8_ARRAY),
                (&qualified, Type::TEXT_ARRAY),
                (&kinds, Type::TEXT_ARRAY),
                (&objects, Type::TEXT_ARRAY),
            ],
        )
        .await
        .context(|| "looking for identity columns and triggers on the target".into())?;
    let there: HashSet<(i64, &str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    for (place, table) in (0..).zip(&mut restorable) {
        for column in &mut table.columns {
            column.identity_always &= there.contains(&(place, "column", column.name.as_str()));
        }
        table.firing.retain(|firing| {
            there.contains(&(place, if firing.is_rule { "rule" } else { "trigger" }, firing.name.as_str()))
        });
    }
    Ok(restorable)
}

/// The statements that give identity columns, and triggers and rules that fire in replica sessions, back what they were on the
/// source: for the cutover.
pub fn restore_identity(tables: &[Table]) -> Vec<String> {
    let identity = tables.iter().flat_map(identity_statements("SET GENERATED ALWAYS"));
    let fire =
        |table| move |firing: &Firing| alter_firing(table, firing, if firing.always { "ALWAYS " } else { "REPLICA " });
    identity.chain(tables.iter().flat_map(|table| table.firing.iter().map(fire(table)))).collect()
}

/// The statements that make triggers and rules ordinary ones, which do not fire for what is applied: what they did on the source
/// is in the stream.
pub fn relax_firing(tables: &[Table]) -> Vec<String> {
    tables.iter().flat_map(|table| table.firing.iter().map(|firing| alter_firing(table, firing, ""))).collect()
}

fn alter_firing(table: &Table, firing: &Firing, when: &str) -> String {
    let kind = if firing.is_rule { "RULE" } else { "TRIGGER" };
    format!("ALTER TABLE ONLY {} ENABLE {when}{kind} {}", table.qualified(), sql::identifier(&firing.name))
}

/// Has identity columns take the values that they are given, and triggers and rules not fire for what is applied, for the way back: the
/// old server has them as they were (H22).
///
/// # Errors
/// Whatever the server says.
pub async fn relax_identity(client: &Client, tables: &[Table]) -> Result<()> {
    for table in tables.iter().filter(|table| table.columns.iter().any(|column| column.identity_always)) {
        let always = client
            .query(
                "SELECT attname FROM pg_catalog.pg_attribute \
                 WHERE attrelid = pg_catalog.to_regclass($1) AND attidentity = 'a' AND NOT attisdropped",
                &[&table.qualified()],
            )
            .await
            .context(|| format!("looking for identity columns of {}", table.qualified()))?;
        let names: Vec<&str> = always.iter().map(|row| row.get(0)).collect();
        let columns = table.columns.iter().filter(|column| names.contains(&column.name.as_str()));
        for column in columns {
            let statement = alter_identity(table, &column.name, "SET GENERATED BY DEFAULT");
            alter_beside_readers(client, statement).await?;
        }
    }
    for table in tables.iter().filter(|table| !table.firing.is_empty()) {
        let fire = client
            .query(
                "SELECT tgname::text, false FROM pg_catalog.pg_trigger WHERE tgrelid = pg_catalog.to_regclass($1) \
                   AND NOT tgisinternal AND tgenabled IN ('A', 'R') \
                 UNION ALL SELECT rulename::text, true FROM pg_catalog.pg_rewrite \
                 WHERE ev_class = pg_catalog.to_regclass($1) AND ev_enabled IN ('A', 'R')",
                &[&table.qualified()],
            )
            .await
            .context(|| format!("looking for triggers and rules of {}", table.qualified()))?;
        let fires = |firing: &&Firing| {
            fire.iter().any(|row| (row.get::<_, &str>(0), row.get::<_, bool>(1)) == (&*firing.name, firing.is_rule))
        };
        for firing in table.firing.iter().filter(fires) {
            alter_beside_readers(client, alter_firing(table, firing, "")).await?;
        }
    }
    Ok(())
}

/// Readers are there: nobody waits behind it for long, and it is tried again.
async fn alter_beside_readers(client: &Client, statement: String) -> Result<()> {
    let within = format!("BEGIN; SET LOCAL lock_timeout = '2s'; {statement}; COMMIT");
    if let Err(error) = client.batch_execute(&within).await {
        client.batch_execute("ROLLBACK").await?;
        return Err(Error::from(error).with_kind(ErrorKind::Transient).context(statement));
    }
    Ok(())
}

fn alter_identity(table: &Table, column: &str, action: &str) -> String {
    format!("ALTER TABLE {} ALTER COLUMN {} {action}", table.qualified(), sql::identifier(column))
}

fn identity_statements(action: &'static str) -> impl Fn(&Table) -> Vec<String> {
    move |table| {
        // A partition's identity is its own up to PostgreSQL 16.
        let always = table.columns.iter().filter(|column| column.identity_always);
        always.map(|column| alter_identity(table, &column.name, action)).collect()
    }
}

/// Runs one item with its row in the ledger, as one transaction of its own; one round trip.
///
/// Safe to lose in a crash of the target, because both go together; entering the next phase makes it durable. Answers what is to be
/// said where it was left out ([`harmless`]).
///
/// # Errors
/// What the server says, with the item.
pub async fn run_post_data_item(client: &Client, position: i32, item: &SchemaItem) -> Result<Option<String>> {
    let statement =
        format!("BEGIN; SET LOCAL synchronous_commit = off; {};\n{RESET_SETTINGS}; COMMIT", with_mark(position, item));
    let outcome = client.batch_execute(&statement).await.context(|| restoring(item));
    if outcome.is_err() {
        // The session is in a failed transaction, or gone.
        let _ = client.batch_execute("ROLLBACK").await;
    }
    if let Err(error) = &outcome
        && let Some(said) = harmless::explain(item, error)
    {
        client.batch_execute(&ledger::mark_done(position)).await.context(|| restoring(item))?;
        return Ok(Some(said));
    }
    outcome.map(|()| None)
}

pub(super) fn restoring(item: &SchemaItem) -> String {
    format!("restoring {} {} on the target", item.kind, item.name)
}

/// The items that can be run as soon as their table is copied, by table; in `pg_dump`'s order.
///
/// The keys and indexes of partitioned tables come first of all (those have no rows, and a leaf's index hangs on its
/// parent's), under the relid 0.
pub fn items_by_table(items: Vec<(i32, SchemaItem)>, tables: &[u32]) -> BTreeMap<u32, Vec<(i32, SchemaItem)>> {
    let mut by_table: BTreeMap<u32, Vec<(i32, SchemaItem)>> = BTreeMap::new();
    for (position, item) in items {
        let Some(relid) = item.relid else { continue };
        if matches!(item.kind.as_str(), "INDEX" | "CONSTRAINT") {
            let of = if tables.contains(&relid) { relid } else { 0 };
            by_table.entry(of).or_default().push((position, item));
        }
    }
    by_table
}

/// How many items of the schema are sent ahead of the server's answers. Up to 30 futures `join_all` polls in their order, which is
/// the order in which they are sent.
const ITEMS_IN_FLIGHT: usize = 30;

/// What an item may have set for its session; `pg_dump` itself starts from these.
pub(super) const RESET_SETTINGS: &str = "RESET default_tablespace; RESET default_table_access_method";

/// What every script of `pg_restore` starts with, besides what our sessions have pinned already.
pub(super) const ITEM_SETTINGS: &str = "SET LOCAL check_function_bodies = false; SET LOCAL client_min_messages = warning; \
     SELECT pg_catalog.set_config('search_path', '', true)";

/// In the transaction that the session is in, which goes on when a rule says that the refusal is harmless.
async fn run_item_that_may_be_refused(client: &Client, position: i32, item: &SchemaItem) -> Result<Option<String>> {
    client.batch_execute("SAVEPOINT item").await?;
    let outcome = run_item(client, position, item).await;
    let Err(error) = outcome else {
        client.batch_execute("RELEASE item").await?;
        return Ok(None);
    };
    let said = harmless::explain(item, &error).ok_or(error)?;
    let go_on = format!("ROLLBACK TO item; RELEASE item; {}", ledger::mark_done(position));
    client.batch_execute(&go_on).await.context(|| restoring(item))?;
    Ok(Some(said))
}

async fn run_item(client: &Client, position: i32, item: &SchemaItem) -> Result<()> {
    client.batch_execute(&with_mark(position, item)).await.context(|| restoring(item))
}

/// An item with its settings before it and its row in the ledger after it. Each begins on a line of its own, whatever comment
/// the other ends with.
fn with_mark(position: i32, item: &SchemaItem) -> String {
    format!("{ITEM_SETTINGS};\n{}\n;{}", item.statement, ledger::mark_done(position))
}

/// An archive that goes with the function that made it.
struct Archive(PathBuf);

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn output_of(mut command: Command, program: &str) -> Result<String> {
    let output = command
        // What it says is read below.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| Error::new(ErrorKind::Other, format!("{program} cannot be started: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let kind = if is_transient(&said) { ErrorKind::Transient } else { ErrorKind::Other };
        return Err(Error::new(kind, format!("{program}: {}", said.trim())));
    }
    String::from_utf8(output.stdout)
        .map_err(|_| Error::new(ErrorKind::Other, format!("{program} wrote something that is not UTF-8")))
}

/// Whether what a program of PostgreSQL said on standard error can be mended by trying again: it could not connect, lost its
/// connection, waited too long for a lock, or found the snapshot gone, whose session had broken off.
fn is_transient(said: &str) -> bool {
    [
        "connection to server",
        "server closed the connection",
        "terminating connection",
        "no connection to the server",
        "could not receive data from server",
        "could not send data to server",
        "SSL SYSCALL error",
        "SSL connection has been closed",
        "the database system is ",
        "canceling statement due to lock timeout",
        "invalid snapshot identifier",
        "snapshot identifier does not exist",
        "could not import the requested snapshot",
    ]
    .iter()
    .any(|text| said.contains(text))
}

/// What names an item: a line of `pg_restore --list` (`3227; 2606 16392 CONSTRAINT public a a_pkey postgres`), and the
/// line of the verbose script in front of it (`-- TOC entry 3227 (class 2606 OID 16392)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Entry {
    dump_id: u32,
    class: u32,
    oid: u32,
}

impl Entry {
    /// The entry, and what the list says of it: `CONSTRAINT public a a_pkey postgres`.
    fn in_list(line: &str) -> Option<(Entry, &str)> {
        let (dump_id, rest) = line.split_once("; ")?;
        let mut numbers = rest.splitn(3, ' ');
        let (class, oid) = (numbers.next()?, numbers.next()?);
        let entry = Entry { dump_id: dump_id.parse().ok()?, class: class.parse().ok()?, oid: oid.parse().ok()? };
        Some((entry, numbers.next().unwrap_or_default()))
    }

    fn in_script(line: &str) -> Option<Entry> {
        let (dump_id, rest) = line.strip_prefix("-- TOC entry ")?.split_once(" (class ")?;
        let (class, oid) = rest.strip_suffix(')')?.split_once(" OID ")?;
        Some(Entry { dump_id: dump_id.parse().ok()?, class: class.parse().ok()?, oid: oid.parse().ok()? })
    }
}

/// `pg_class` has this OID in every PostgreSQL.
const CLASS_RELATION: u32 = 1259;

/// Cuts a script at the headers of its entries. A body that looks like a header (a function, a comment) would have to
/// name an entry of the list with its three numbers; then the header is there twice, and the dump is refused.
fn split(
    section: Section,
    entries: &HashMap<Entry, &str>,
    script: &str,
    relations: &mut BTreeMap<u32, u32>,
    role: ApplyRole,
) -> Result<Vec<SchemaItem>> {
    let mut expected: HashMap<Entry, bool> = entries.keys().map(|entry| (*entry, false)).collect();
    // Where the header of each item begins and where its first line ends.
    let mut headers: Vec<(Entry, usize, usize)> = Vec::new();
    let (mut at, mut before) = (0, "");
    for line in script.split_inclusive('\n') {
        let start = at;
        at += line.len();
        if before == "--\n"
            && let Some(entry) = Entry::in_script(line.trim_end())
            && let Some(seen) = expected.get_mut(&entry)
        {
            if std::mem::replace(seen, true) {
                let text = format!("the schema holds the header of a dump's item {} twice", entry.dump_id);
                return Err(Error::new(ErrorKind::Other, text).hint(
                    "A function or comment of the source contains the text of a dump with the same object; change it.",
                ));
            }
            headers.push((entry, start - before.len(), at));
        }
        before = line;
    }
    let mut items = Vec::new();
    let mut late = HashSet::new();
    let end = without_psql_commands_at_the_end(script);
    for (number, (entry, _, body)) in headers.iter().enumerate() {
        let until = headers.get(number + 1).map_or(end, |(_, next, _)| *next).max(*body);
        let listed = entries.get(entry).copied().unwrap_or_default();
        let (dependencies, kind, name, statement) = read_item(&script[*body..until], listed);
        if entry.class == CLASS_RELATION && kind == "TABLE" {
            relations.insert(entry.dump_id, entry.oid);
        }
        let relid = dependencies.iter().find_map(|dump_id| relations.get(dump_id).copied());
        let depends_on_late = dependencies.iter().any(|dump_id| late.contains(dump_id));
        let waits = depends_on_late || late::waits_for_cutover(&kind, &name, relid.is_some());
        let section = if section == Section::PostData && role == ApplyRole::Origin && waits {
            late.insert(entry.dump_id);
            Section::AtCutover
        } else {
            section
        };
        if !statement.is_empty() {
            items.push(SchemaItem { section, kind, name, relid, statement });
        }
    }
    Ok(items)
}

/// Reads what follows the first line of a header: the other comment lines, then the statement.
fn read_item(text: &str, listed: &str) -> (Vec<u32>, String, String, String) {
    let (mut dependencies, mut kind, mut name) = (Vec::new(), String::new(), String::new());
    let mut rest = text;
    while let Some((line, after)) = rest.split_once('\n') {
        let Some(comment) = line.strip_prefix("--") else { break };
        rest = after;
        let comment = comment.trim_start();
        if let Some(list) = comment.strip_prefix("Dependencies: ") {
            dependencies = list.split_whitespace().filter_map(|dump_id| dump_id.parse().ok()).collect();
        } else if let Some(fields) = comment.strip_prefix("Name: ") {
            (name, kind) = name_and_kind(fields, listed);
        } else if comment.is_empty() {
            // The line that closes the header.
            break;
        }
    }
    (dependencies, kind, name, rest.trim_matches('\n').to_owned())
}

/// The name and the kind out of `t t_pkey; Type: CONSTRAINT; Schema: public; Owner: me`.
///
/// A name may itself read `x; Type: INDEX; `: the list of the archive, which begins with the kind, decides.
fn name_and_kind(fields: &str, listed: &str) -> (String, String) {
    let candidate = |(at, separator): (usize, &str)| {
        let kind = fields[at + separator.len()..].split(';').next().unwrap_or_default();
        let is_listed = listed.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' '));
        is_listed.then(|| (fields[..at].to_owned(), kind.to_owned()))
    };
    let found = fields.match_indices("; Type: ").filter_map(candidate).max_by_key(|(_, kind)| kind.len());
    found.unwrap_or_else(|| (fields.to_owned(), String::new()))
}

/// Where the script ends for us: before `-- Completed on …` and the `\unrestrict` that newer versions write for psql.
fn without_psql_commands_at_the_end(script: &str) -> usize {
    let end = script.rfind("\n--\n-- PostgreSQL database dump complete\n").unwrap_or(script.len());
    script[..end]
        .rfind("\n-- Completed on ")
        .filter(|at| script[*at + 1..end].trim_end().lines().count() == 1)
        .unwrap_or(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\n\nSET statement_timeout = 0;\nSET transaction_timeout = 0;\n\n\
        --\n-- TOC entry 7 (class 1259 OID 100)\n-- Name: t; Type: TABLE; Schema: public; Owner: me\n-- Data Pos: 0\n--\n\n\
        CREATE TABLE public.t (\n    id integer\n);\n\n\n\
        --\n-- TOC entry 9 (class 1255 OID 102)\n-- Dependencies: 5\n-- Name: f(); Type: FUNCTION; Schema: public; Owner: me\n--\n\n\
        CREATE FUNCTION public.f() RETURNS text AS $$\n--\n-- TOC entry 8 (class 1259 OID 101)\n-- Name: fake; Type: INDEX\n--\n$$;\n\n\n\
        --\n-- TOC entry 12 (class 2606 OID 103)\n-- Dependencies: 3 7\n-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: me\n--\n\n\
        ALTER TABLE ONLY public.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\n\n\
        -- Completed on 2026-01-01 00:00:00 UTC\n\n--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict abc\n\n";

    const LIST: &str = ";\n; Archive created\n7; 1259 100 TABLE public t me\n9; 1255 102 FUNCTION public f() me\n\
        12; 2606 103 CONSTRAINT public t t_pkey me\n13; 0 0 SCHEMA - public me\n14; 1259 101 INDEX public real_one me\n";

    #[test]
    fn a_dump_whose_connection_broke_off_is_made_again() {
        for said in [
            "pg_dump: error: query failed: server closed the connection unexpectedly\n\tThis probably means the server \
             terminated abnormally\n\tbefore or while processing the request.",
            "pg_dump: error: query failed: FATAL:  terminating connection due to administrator command",
            "pg_dump: error: query failed: ERROR:  invalid snapshot identifier: \"00000003-0000001B-1\"",
        ] {
            assert!(is_transient(said), "{said}");
        }
        assert!(!is_transient("pg_dump: error: query failed: ERROR:  permission denied for table t"));
    }

    #[test]
    fn a_script_is_cut_into_the_items_of_its_list() {
        let entries: HashMap<Entry, &str> = LIST.lines().filter_map(Entry::in_list).collect();
        assert_eq!(entries.len(), 5);
        let mut relations = BTreeMap::new();
        let items = split(Section::PreData, &entries, SCRIPT, &mut relations, ApplyRole::Origin).unwrap();
        let kinds: Vec<(&str, &str, Option<u32>)> =
            items.iter().map(|item| (item.kind.as_str(), item.name.as_str(), item.relid)).collect();
        assert_eq!(kinds, [("TABLE", "t", None), ("FUNCTION", "f()", None), ("CONSTRAINT", "t t_pkey", Some(100))]);
        assert_eq!(items[0].statement, "CREATE TABLE public.t (\n    id integer\n);");
        assert!(
            items[1].statement.ends_with("$$;"),
            "a body that looks like a header stays a body: {}",
            items[1].statement
        );
        assert_eq!(items[2].statement, "ALTER TABLE ONLY public.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);");
        assert!(
            items.iter().all(|item| !item.statement.contains("\\restrict") && !item.statement.contains("\\unrestrict"))
        );
        // The head of the script is no item: an older server does not know every setting of a newer `pg_dump`.
        assert!(items.iter().all(|item| !item.statement.contains("_timeout")));
    }

    #[test]
    fn a_name_that_looks_like_the_rest_of_its_header_does_not_change_what_the_item_is() {
        for (fields, listed, name, kind) in [
            ("t; Type: TABLE; Schema: public; Owner: me", "TABLE public t me", "t", "TABLE"),
            (
                "x; Type: INDEX; Schema: s; Type: FK CONSTRAINT; Schema: public; Owner: me",
                "FK CONSTRAINT public x; Type: INDEX; Schema: s me",
                "x; Type: INDEX; Schema: s",
                "FK CONSTRAINT",
            ),
            (
                "x; Type: INDEX; y; Type: INDEX ATTACH; Schema: public; Owner: me",
                "INDEX ATTACH public x; Type: INDEX; y me",
                "x; Type: INDEX; y",
                "INDEX ATTACH",
            ),
        ] {
            assert_eq!(name_and_kind(fields, listed), (name.to_owned(), kind.to_owned()), "{fields}");
        }
    }

    #[test]
    fn a_body_that_repeats_the_header_of_an_item_is_refused() {
        let entries = HashMap::from([(Entry { dump_id: 8, class: 1259, oid: 101 }, "TABLE public t me")]);
        let twice = SCRIPT.replacen("entry 7 (class 1259 OID 100)", "entry 8 (class 1259 OID 101)", 1);
        assert!(split(Section::PreData, &entries, &twice, &mut BTreeMap::new(), ApplyRole::Replica).is_err());
    }

    #[test]
    fn what_would_fire_waits_for_the_cutover_where_rows_are_written_in_the_origin_role() {
        let item = |dump_id: u32, depends: &str, name: &str, kind: &str| {
            format!(
                "--\n-- TOC entry {dump_id} (class 2620 OID {dump_id})\n-- Dependencies: {depends}\n\
                 -- Name: {name}; Type: {kind}; Schema: public; Owner: me\n--\n\nSELECT {dump_id};\n\n\n"
            )
        };
        let script = [
            item(20, "9", "t i", "INDEX"),
            item(21, "9", "t g", "TRIGGER"),
            item(22, "9 21", "TRIGGER g ON t", "COMMENT"),
            item(23, "9", "t fk", "FK CONSTRAINT"),
            item(24, "9 30", "v _RETURN", "RULE"),
            item(25, "9", "t r", "RULE"),
            item(26, "30", "v r", "RULE"),
            item(27, "", "e", "EVENT TRIGGER"),
        ]
        .concat();
        let kinds = ["INDEX", "TRIGGER", "COMMENT", "FK CONSTRAINT", "RULE", "RULE", "RULE", "EVENT TRIGGER"];
        let list: Vec<String> =
            (20u32..).zip(kinds).map(|(id, kind)| format!("{id}; 2620 {id} {kind} public x me")).collect();
        let entries: HashMap<Entry, &str> = list.iter().filter_map(|line| Entry::in_list(line)).collect();
        let late = |role| {
            let items = split(Section::PostData, &entries, &script, &mut BTreeMap::from([(9, 100)]), role).unwrap();
            assert_eq!(items.len(), kinds.len());
            let late = items.into_iter().filter(|item| item.section == Section::AtCutover);
            late.map(|item| item.name).collect::<Vec<_>>()
        };
        assert_eq!(late(ApplyRole::Origin), ["t g", "TRIGGER g ON t", "t fk", "t r", "e"]);
        assert_eq!(late(ApplyRole::Replica), [""; 0]);
    }

    #[test]
    fn indexes_are_grouped_by_the_table_they_wait_for() {
        let item = |kind: &str, relid| SchemaItem {
            section: Section::PostData,
            kind: kind.into(),
            name: String::new(),
            relid,
            statement: String::new(),
        };
        let items = vec![
            (1, item("CONSTRAINT", Some(9))),
            (2, item("INDEX", Some(5))),
            (3, item("FK CONSTRAINT", Some(5))),
            (4, item("INDEX", None)),
        ];
        let by_table = items_by_table(items, &[5]);
        assert_eq!(by_table.keys().copied().collect::<Vec<_>>(), [0, 5]);
        assert_eq!(by_table[&5].len(), 1);
    }
}
