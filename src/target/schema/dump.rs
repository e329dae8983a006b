//! The dump of the source's schema, cut into its items.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures_util::future::try_join;
use tokio::process::Command;

use super::attribute_version;
use crate::check::tools::Tools;
use crate::connection::{ConnectionSpec, without_secrets};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::target::ledger::{SchemaItem, Section};
use crate::target::role::ApplyRole;
use crate::target::{late, role_map};
use crate::unstreamed::large_object::Owners;

/// How the source's schema is dumped.
pub struct Dump<'a> {
    /// `pg_dump` and `pg_restore`.
    pub tools: &'a Tools,
    /// The server that is moved away from.
    pub source: &'a ConnectionSpec,
    /// What its session calls itself.
    pub application_name: &'a str,
    /// The snapshot under which it is read.
    pub snapshot: &'a str,
    /// Where the archive is for the time of the call.
    pub directory: &'a Path,
    /// Whose the objects become on the target.
    pub owners: &'a Owners,
    /// A schema of which nothing is dumped: its tables are not even locked.
    pub without_schema: Option<&'a str>,
    /// In which role rows are written: what would fire in it waits for the cutover ([`late`]).
    pub role: ApplyRole,
}

impl Dump<'_> {
    /// Dumps the schema, and splits it into its items.
    ///
    /// The archive exists only as long as this function runs, with mode 0600 in the state directory: user mappings can hold
    /// passwords (I10).
    ///
    /// # Errors
    /// `Other` with what `pg_dump` or `pg_restore` said.
    pub async fn read(&self) -> Result<Vec<Dumped>> {
        let archive = Archive(self.directory.join("schema.dump"));
        // Made before pg_dump does, so that it never is readable for others.
        let _ = std::fs::remove_file(&archive.0);
        crate::crashsafe::create_private(&archive.0)?;
        let environment = self.source.child_environment(self.application_name).await?;
        let mut command = Command::new(&self.tools.pg_dump);
        command
            .args(["--format=custom", "--schema-only", "--no-publications", "--no-subscriptions", "--no-tablespaces"])
            .args(["--exclude-schema=walferry", "--exclude-schema=walferry_ddl_*", "--lock-wait-timeout=30s"])
            .args(self.without_schema.map(|schema| format!("--exclude-schema={schema}")))
            .arg(format!("--snapshot={}", self.snapshot))
            .arg(format!("--file={}", archive.0.display()));
        environment.apply(&mut command);
        output_of(command, "pg_dump").await.context(|| "dumping the source's schema".into())?;

        let file = &archive.0;
        let owners = self.owners;
        let left_out: Vec<&str> = [(owners.no_owner, "--no-owner"), (owners.no_privileges, "--no-privileges")]
            .into_iter()
            .filter_map(|(is_left_out, option)| is_left_out.then_some(option))
            .collect();
        let left_out = &left_out;
        let read = |section: Section| {
            let restore = move |arguments: &[&str]| {
                let mut command = Command::new(&self.tools.pg_restore);
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
            items.extend(split(section, &entries, &script, &mut relations, self.role)?);
        }
        // Our own (--replicate-ddl, and the guards of an earlier cutover).
        items.retain(|Dumped { item, .. }| match item.kind.as_str() {
            "EVENT TRIGGER" => !item.name.contains("walferry_"),
            "TRIGGER" => !item.name.contains(" !walferry_moved") && !item.name.contains(" !walferry_seen"),
            _ => true,
        });
        for Dumped { item, .. } in &mut items {
            item.statement = attribute_version::leave_out(&item.statement);
        }
        if !owners.role_map.is_empty() {
            for Dumped { item, .. } in &mut items {
                item.statement = role_map::rename(&item.statement, &item.kind, &owners.role_map);
            }
        }
        Ok(items)
    }
}

/// An item of the schema with its place among the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dumped {
    /// The dump's own number for it.
    pub(super) dump_id: u32,
    /// OIDs of the catalog that holds the object, and of the object; 0 for a comment, a grant and other things that hang on one.
    pub(super) class: u32,
    pub(super) oid: u32,
    /// The dump's numbers of the items that it needs.
    pub(super) dependencies: Vec<u32>,
    pub(super) item: SchemaItem,
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
        // A table that was dropped between its reading and its lock.
        "Query was: LOCK TABLE",
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
pub(super) const CLASS_RELATION: u32 = 1259;

/// Cuts a script at the headers of its entries. A body that looks like a header (a function, a comment) would have to
/// name an entry of the list with its three numbers; then the header is there twice, and the dump is refused.
fn split(
    section: Section,
    entries: &HashMap<Entry, &str>,
    script: &str,
    relations: &mut BTreeMap<u32, u32>,
    role: ApplyRole,
) -> Result<Vec<Dumped>> {
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
            let item = SchemaItem { section, kind, name, relid, statement };
            let Entry { dump_id, class, oid } = *entry;
            items.push(Dumped { dump_id, class, oid, dependencies, item });
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
        let items: Vec<SchemaItem> = items.into_iter().map(|dumped| dumped.item).collect();
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
            let late = items.into_iter().map(|dumped| dumped.item).filter(|item| item.section == Section::AtCutover);
            late.map(|item| item.name).collect::<Vec<_>>()
        };
        assert_eq!(late(ApplyRole::Origin), ["t g", "TRIGGER g ON t", "t fk", "t r", "e"]);
        assert_eq!(late(ApplyRole::Replica), [""; 0]);
    }
}
