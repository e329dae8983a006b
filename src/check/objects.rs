//! What the source's database holds that a migration must treat with care, or cannot move.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, first_ten};
use super::server::Server;
use crate::cutover::unlogged;
use crate::error::{Context, Result};
use crate::source::catalog::{ReplicaIdentity, Table, USER_RELATION};
use crate::source::scope::Selection;
use crate::timescale;

/// A finding on the source.
fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Source, code, object, message)
}

/// Tables with a primary key that could serve, and tables whose chosen key has generated columns, by OID.
#[derive(Default)]
struct Keys {
    has_primary: BTreeSet<u32>,
    generated: BTreeSet<u32>,
}

async fn keys(client: &Client) -> Result<Keys> {
    let rows = client
        .query_typed(
            "SELECT i.indrelid, i.indisprimary, \
                    EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) \
                              AND coalesce(to_jsonb(a)->>'attgenerated', '') <> '') \
             FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid \
             WHERE c.relkind = 'r' AND i.indisvalid AND i.indimmediate \
               AND (i.indisprimary OR c.relreplident = 'i' AND i.indisreplident)",
            &[],
        )
        .await
        .context(|| "reading the source's primary keys".into())?;
    let mut keys = Keys::default();
    for row in rows {
        let (table, primary, generated): (u32, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if generated {
            keys.generated.insert(table);
        } else if primary {
            keys.has_primary.insert(table);
        }
    }
    Ok(keys)
}

/// Replica identities and unlogged tables: what the stream can and cannot say about each table (H14, H26, H27).
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn tables(client: &Client, tables: &[Table], set_full: bool) -> Result<Vec<Finding>> {
    Ok(table_findings(tables, &keys(client).await?, set_full))
}

/// `set_full`: the migration sets `REPLICA IDENTITY FULL` where nothing else identifies a row.
fn table_findings(tables: &[Table], keys: &Keys, set_full: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |severity, code, tables: Vec<&Table>, message: &str, fix: &dyn Fn(&Table) -> String| {
        if !tables.is_empty() {
            let names: Vec<String> = tables.iter().map(|table| table.qualified()).collect();
            let fixes: Vec<String> = tables.iter().map(|table| fix(table)).collect();
            findings.push(finding(severity, code, first_ten(&names), message).fix(fixes.join("\n")));
        }
    };
    let identity = |table: &Table| {
        let has_primary = keys.has_primary.contains(&table.relid);
        let identity = if has_primary && table.identity != ReplicaIdentity::Default { "DEFAULT" } else { "FULL" };
        format!("ALTER TABLE {} REPLICA IDENTITY {identity};", table.qualified())
    };
    let keyless = |written: bool, generated: bool| -> Vec<&Table> {
        tables
            .iter()
            .filter(|table| !table.unlogged && !table.has_usable_identity())
            .filter(|table| (table.updates_and_deletes > 0) == written)
            .filter(|table| {
                (table.identity != ReplicaIdentity::Nothing && keys.generated.contains(&table.relid)) == generated
            })
            .collect()
    };
    let full = |table: &Table| format!("ALTER TABLE {} REPLICA IDENTITY FULL;", table.qualified());
    if !set_full {
        add(
            Severity::Blocker,
            "replica-identity",
            keyless(true, false),
            "Rows of it are updated or deleted, and nothing says which: it has no primary key that can serve as replica \
             identity. Published for updates, the application's own UPDATE and DELETE would fail; not published, they \
             would be lost. Add a primary key, or let the whole old row identify it; with --replica-identity-full, walferry \
             does that for the time of the migration.",
            &identity,
        );
        add(
            Severity::Warning,
            "replica-identity",
            keyless(false, false),
            "It has no replica identity. No update or delete was counted since the source's statistics began, so only its \
             inserts and truncates are followed, and it is compared row by row at the cutover, which refuses to switch if \
             a row was updated or deleted after all. With --replica-identity-full, walferry has the whole old row identify \
             it for the time of the migration.",
            &identity,
        );
        let over_generated = "Its key contains a generated column, which the stream does not carry before PostgreSQL 18, so \
                              its updates and deletes name no row. Let the whole old row identify it; with \
                              --replica-identity-full, walferry does that for the time of the migration.";
        add(Severity::Blocker, "identity-generated", keyless(true, true), over_generated, &full);
        add(Severity::Warning, "identity-generated", keyless(false, true), over_generated, &full);
    } else {
        let lacking = tables.iter().filter(|table| !table.unlogged && !table.has_usable_identity()).collect();
        add(
            Severity::Warning,
            "replica-identity-full",
            lacking,
            "Nothing identifies its rows, so the migration begins by having the whole old row do so: an exclusive lock for a \
             moment, and more WAL for each update and delete, until `walferry clean` puts back what there was. Where many \
             rows are updated or deleted, a primary key is applied faster. To do the same by hand:",
            &full,
        );
    }

    let unlogged = |large: bool| {
        let is_large = |table: &Table| table.bytes > unlogged::BYTES_MAX;
        tables.iter().filter(|table| table.unlogged && is_large(table) == large).collect()
    };
    let logged = |table: &Table| unlogged::set_logged(&[table]);
    add(
        Severity::Warning,
        "unlogged-table",
        unlogged(false),
        "An unlogged table is in no stream: it is copied again at the cutover, while applications wait. SET LOGGED avoids \
         that, and rewrites the table under an exclusive lock.",
        &logged,
    );
    add(
        Severity::Warning,
        "unlogged-table-large",
        unlogged(true),
        "An unlogged table is in no stream, and this one is too large to be copied while applications wait: the cutover \
         refuses to switch until it is smaller, or waived by name (--waive), which leaves on the target what was copied at the \
         start. SET LOGGED rewrites the table under an exclusive lock; truncate it first if its rows may go.",
        &logged,
    );
    findings
}

/// Everything else in the database: rules, triggers, foreign tables, inheritance, event triggers.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn others(client: &Client, selection: Option<&Selection>) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let moved = super::scope::moved(selection, "c.oid");
    // Chunks inherit from their hypertable.
    let chunks = match timescale::source::extension(client).await?.is_some_and(|extension| extension.is_readable()) {
        true => timescale::chunk::NOT_A_CHUNK,
        false => "true",
    };
    let rows = client
        .query_typed(
            &format!(
                "SELECT 'rule', format('%I.%I', n.nspname, c.relname), quote_ident(w.rulename), w.ev_enabled::text \
                 FROM pg_rewrite w JOIN pg_class c ON c.oid = w.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p') AND w.rulename <> '_RETURN' AND {USER_RELATION} AND {moved} \
                 UNION ALL \
                 SELECT 'trigger', format('%I.%I', n.nspname, c.relname), quote_ident(t.tgname), t.tgenabled::text \
                 FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE NOT t.tgisinternal AND t.tgenabled IN ('A', 'R') AND {USER_RELATION} AND {moved} \
                 UNION ALL \
                 SELECT 'foreign table', format('%I.%I', n.nspname, c.relname), '', '' \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'f' AND {USER_RELATION} AND {moved} \
                 UNION ALL \
                 SELECT 'child', format('%I.%I', n.nspname, c.relname), '', '' \
                 FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'r' AND NOT c.relispartition AND {USER_RELATION} AND {moved} AND {chunks} \
                 UNION ALL \
                 SELECT 'event trigger', quote_ident(e.evtname), '', '' FROM pg_event_trigger e WHERE e.evtenabled <> 'D' \
                   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_event_trigger'::regclass AND d.objid = e.oid AND d.deptype = 'e') \
                 UNION ALL \
                 SELECT 'subscription', quote_ident(s.subname), '', '' FROM pg_subscription s \
                 WHERE s.subenabled AND s.subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
 \
                 ORDER BY 1, 2, 3"
            ),
            &[],
        )
        .await
        .context(|| "reading the source's rules, triggers and other objects".into())?;
    // Kind, table or object, rule or trigger, when it fires.
    let rows: Vec<[String; 4]> = rows.iter().map(|row| [row.get(0), row.get(1), row.get(2), row.get(3)]).collect();
    let mut add = |kind: &str, fires: &[&str], severity, code, message: &str, fix: Option<&str>| {
        let these: Vec<&[String; 4]> = rows
            .iter()
            .filter(|row| row[0] == kind && (fires.is_empty() || fires.contains(&row[3].as_str())))
            .collect();
        if these.is_empty() {
            return;
        }
        let names: Vec<String> = these
            .iter()
            .map(|[_, object, part, _]| if fires.is_empty() { object.clone() } else { format!("{part} on {object}") })
            .collect();
        let mut found = finding(severity, code, first_ten(&names), message);
        if let Some(verb) = fix {
            let lines: Vec<String> =
                these.iter().map(|[_, object, part, _]| format!("ALTER TABLE {object} {verb} {part};")).collect();
            found = found.fix(lines.join("\n"));
        }
        findings.push(found);
    };
    add(
        "rule",
        &["A", "R"],
        Severity::Info,
        "rule-always",
        "This rule fires in replica sessions too. On the target it is an ordinary one until the switch, so that it does \
         not fire for what is applied.",
        None,
    );
    add(
        "rule",
        &["O", "D"],
        Severity::Warning,
        "rule",
        "The rule does not fire while changes are applied: what it did on the source is in the stream.",
        None,
    );
    add(
        "trigger",
        &["A", "R"],
        Severity::Info,
        "trigger-always",
        "This trigger fires in replica sessions too. On the target it is an ordinary one until the switch, so that it does \
         not fire for what is applied.",
        None,
    );
    add(
        "foreign table",
        &[],
        Severity::Info,
        "foreign-table",
        "Its definition is moved, its rows are not ours. The target must reach the foreign server, with user mappings of its own.",
        None,
    );
    add(
        "child",
        &[],
        Severity::Info,
        "inheritance",
        "It inherits from another table. Parent and child are copied and followed each on its own.",
        None,
    );
    add(
        "event trigger",
        &[],
        Severity::Info,
        "event-trigger",
        "Only a superuser can make an event trigger on the target.",
        None,
    );
    add(
        "subscription",
        &[],
        Severity::Warning,
        "subscription",
        "A subscription writes to the source by itself. It has to be disabled before the cutover, and made anew at the \
         target.",
        None,
    );
    Ok(findings)
}

/// What dump and fence, or the restore, lock at once, against the room in the server's lock table (H10).
///
/// The lock table has `max_locks_per_transaction` places for each backend and prepared transaction that the server can
/// have ("Lock Management" in the manual); what else is in shared memory may lend it some more, which is not to be
/// counted on.
pub(crate) fn locks(server: &Server, side: Side, needed: i64, what: &str) -> Option<Finding> {
    let sum = |names: &[&str]| -> i64 { names.iter().map(|name| server.number(name)).sum() };
    let sessions = sum(&["max_connections", "max_prepared_transactions"]);
    let backends = sessions + sum(&["autovacuum_max_workers", "max_worker_processes", "max_wal_senders"]) + 1;
    let per_transaction = server.number("max_locks_per_transaction");
    let severity = match needed {
        needed if needed > per_transaction * backends => Severity::Blocker,
        // The other sessions of the server need theirs at the same time.
        needed if needed > per_transaction * sessions / 2 => Severity::Warning,
        _ => return None,
    };
    // Twice what is needed, rounded up to the next 64.
    let wanted = ((2 * needed / sessions.max(1)) / 64 + 1) * 64;
    let message = format!(
        "{what} locks {needed} relations at once, and the server's lock table has about {} places, shared by all sessions. \
         It would end with \"out of shared memory\".",
        per_transaction * backends
    );
    Some(
        Finding::new(severity, side, "locks", "max_locks_per_transaction", message)
            .fix(format!("ALTER SYSTEM SET max_locks_per_transaction = {wanted};  -- then restart the server")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::server::Setting;
    use crate::check::server::tests::server;

    fn table(name: &str, identity: ReplicaIdentity, updates_and_deletes: i64) -> Table {
        Table { identity, updates_and_deletes, ..Table::plain("public", name) }
    }

    fn summary(found: &[Finding]) -> Vec<(&str, Severity)> {
        found.iter().map(|finding| (finding.code, finding.severity)).collect()
    }

    fn summary_of(found: Vec<Finding>) -> Vec<&'static str> {
        found.iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn h27_a_keyless_table_blocks_when_it_is_updated_and_warns_when_it_only_grows() {
        let tables = [table("log", ReplicaIdentity::Default, 0), table("t", ReplicaIdentity::Default, 1)];
        let found = table_findings(&tables, &Keys::default(), false);
        assert_eq!(summary(&found), [("replica-identity", Severity::Blocker), ("replica-identity", Severity::Warning)]);
        assert_eq!(found[0].fix.as_deref(), Some("ALTER TABLE \"public\".\"t\" REPLICA IDENTITY FULL;"));
        assert_eq!(found[1].object, "\"public\".\"log\"");
        assert_eq!(table_findings(&[table("t", ReplicaIdentity::Full, 1)], &Keys::default(), false), []);
        let found = table_findings(&tables, &Keys::default(), true);
        assert_eq!(summary(&found), [("replica-identity-full", Severity::Warning)]);
        assert_eq!(found[0].object, "\"public\".\"log\", \"public\".\"t\"");
    }

    #[test]
    fn a_table_told_to_have_no_identity_gets_its_primary_key_back() {
        let keys = Keys { has_primary: BTreeSet::from([1]), generated: BTreeSet::new() };
        let found = table_findings(&[table("t", ReplicaIdentity::Nothing, 1)], &keys, false);
        assert_eq!(found[0].fix.as_deref(), Some("ALTER TABLE \"public\".\"t\" REPLICA IDENTITY DEFAULT;"));
    }

    #[test]
    fn h26_a_key_over_a_generated_column_is_told_apart() {
        let keys = Keys { has_primary: BTreeSet::new(), generated: BTreeSet::from([1]) };
        let found = table_findings(&[table("t", ReplicaIdentity::Default, 1)], &keys, false);
        assert_eq!(summary(&found), [("identity-generated", Severity::Blocker)]);
    }

    #[test]
    fn h14_an_unlogged_table_is_named_and_so_is_one_that_is_too_large_for_the_cutover() {
        let mut unlogged = table("t", ReplicaIdentity::Full, 0);
        unlogged.unlogged = true;
        unlogged.bytes = unlogged::BYTES_MAX;
        let found = |table: &Table| summary_of(table_findings(std::slice::from_ref(table), &Keys::default(), false));
        assert_eq!(found(&unlogged), ["unlogged-table"]);
        unlogged.bytes += 1;
        assert_eq!(found(&unlogged), ["unlogged-table-large"]);
    }

    #[test]
    fn h10_more_relations_than_places_in_the_lock_table_block() {
        let mut server = server();
        for (name, value) in [("max_connections", "20"), ("max_locks_per_transaction", "64"), ("max_wal_senders", "10")]
        {
            server.settings.insert(name.into(), Setting { value: value.into(), shown: value.into() });
        }
        let severity = |needed| locks(&server, Side::Source, needed, "pg_dump").map(|finding| finding.severity);
        assert_eq!((severity(640), severity(641)), (None, Some(Severity::Warning)));
        assert_eq!((severity(1984), severity(1985)), (Some(Severity::Warning), Some(Severity::Blocker)));
        let fix = locks(&server, Side::Source, 6000, "pg_dump").and_then(|finding| finding.fix).unwrap();
        assert!(fix.starts_with("ALTER SYSTEM SET max_locks_per_transaction = 640;"), "{fix}");
    }
}
