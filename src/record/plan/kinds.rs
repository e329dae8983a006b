//! The list itself.

use super::On::{Both, Source, Target};
use super::When::{Always, MapSchema, Part, ReplicaIdentityFull, ReplicateDdl, Roles, WayBack, Whole, WithSchema};
use super::{Kind, durable, kind, redacted};

pub(super) const ITSELF: &str = "nothing: it changes nothing that stays";
pub(super) const CLEAN: &str = "walferry clean";
const END: &str = "the end of its transaction";
pub(super) const DECISION: &str = "nothing: the target is the primary now (walferry switchback leads back)";

pub(super) const PREPARING: &str = "preparing";
pub(super) const COPYING: &str = "copying";
pub(super) const FOLLOWING: &str = "following";
pub(super) const CUTOVER: &str = "cutting over";
pub(super) const CLEANING: &str = "clean";

/// A statement that fits none of the list.
pub static UNPLANNED: Kind = redacted(durable(kind(
    "unplanned",
    Both,
    ("any", Always, "a mistake in walferry's plan: please report it"),
    "",
    "",
)));

/// A statement out of `pg_dump`'s output; `wire.rs` tells it by the settings that stand before it.
pub static SCHEMA: Kind = redacted(kind(
    "schema item",
    Target,
    (
        "preparing, copying (indexes and keys), catching up (the rest), cutting over (what waits for it)",
        WithSchema,
        "once for each object of the source's schema, exactly as pg_dump writes it",
    ),
    "… (a statement of pg_dump --schema-only)",
    "dropping the target database",
));

/// A statement of the source's applications that the target repeats.
pub static REPLICATED: Kind = redacted(kind(
    "replicated DDL",
    Target,
    ("following", ReplicateDdl, "for each DDL statement of the source, in its place among the rows"),
    "… (the statement of the source)",
    "nothing: it is the source's own",
));

/// In the order in which a migration comes to them.
pub static KINDS: &[Kind] = &[
    // The trial of `check`.
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE SCHEMA <walferry_trial>",
        END,
    ),
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE TABLE <walferry_trial>.<table> ( … )",
        END,
    ),
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE … INDEX <name> ON <walferry_trial>.<table> ( … )",
        END,
    ),
    // The ledger.
    durable(kind(
        "ledger",
        Both,
        (PREPARING, Always, "on the target; on the source when a way back is drafted"),
        "CREATE SCHEMA walferry",
        CLEAN,
    )),
    kind("ledger", Both, (PREPARING, Always, "beside it"), "COMMENT ON SCHEMA walferry IS <text>", CLEAN),
    kind(
        "ledger",
        Both,
        ("any", Always, "once for each table of the ledger"),
        "CREATE TABLE … walferry.<table> ( … ) …",
        CLEAN,
    ),
    kind("ledger", Both, (PREPARING, Always, "a ledger of an older walferry"), "ALTER TABLE walferry.<table> …", CLEAN),
    kind(
        "ledger",
        Both,
        ("any", Always, "what two sessions must not do at once"),
        "LOCK TABLE walferry.<tables> IN <mode> MODE",
        END,
    ),
    kind(
        "ledger",
        Target,
        ("resync", Always, "what was copied is not known any more"),
        "DROP TABLE IF EXISTS walferry.<tables>",
        ITSELF,
    ),
    kind(
        "ledger",
        Both,
        ("any", Always, "a preparation that was cut off, a draft of the way back"),
        "DROP SCHEMA IF EXISTS walferry CASCADE",
        ITSELF,
    ),
    // Roles.
    durable(redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "for each role that the target lacks"),
        "CREATE ROLE <name> …",
        "DROP ROLE, by hand",
    ))),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its attributes and settings"),
        "ALTER ROLE <name> …",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its comment"),
        "COMMENT ON ROLE <name> IS <text>",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its password, put together in the server"),
        "DO $$ BEGIN EXECUTE pg_catalog.format('ALTER ROLE %I PASSWORD %L', …); END $$",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its memberships"),
        "GRANT <role> TO <member>",
        "REVOKE, by hand",
    )),
    // Publications and slot.
    durable(kind(
        "replica identity",
        Both,
        (
            PREPARING,
            ReplicaIdentityFull,
            "for each table whose updates and deletes would name no row; a moment of ACCESS EXCLUSIVE; clean puts back what was, on both servers",
        ),
        "ALTER TABLE <table> REPLICA IDENTITY <identity>",
        CLEAN,
    )),
    kind(
        "publication",
        Both,
        (PREPARING, Always, "what an earlier attempt left; on the target for the way back"),
        "DROP PUBLICATION IF EXISTS <names>",
        ITSELF,
    ),
    durable(kind(
        "publication",
        Both,
        (
            PREPARING,
            Always,
            "one for tables with a replica identity, one for those without; on the target for the way back",
        ),
        "CREATE PUBLICATION <name> …",
        CLEAN,
    )),
    durable(kind(
        "event trigger",
        Source,
        (
            PREPARING,
            ReplicateDdl,
            "their schema; then, within the applications' own DDL, the triggers run ALTER PUBLICATION … ADD or DROP TABLE",
        ),
        "CREATE SCHEMA <walferry_ddl>",
        CLEAN,
    )),
    kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their schema"),
        "GRANT USAGE ON SCHEMA <walferry_ddl> TO PUBLIC",
        CLEAN,
    ),
    kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "what proves their messages, for our role to read"),
        "CREATE TABLE <walferry_ddl>.key ( … )",
        CLEAN,
    ),
    kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "the same"),
        "REVOKE ALL ON TABLE <walferry_ddl>.key FROM …",
        CLEAN,
    ),
    redacted(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their functions"),
        "CREATE FUNCTION <walferry_ddl>.<name> ( … ) …",
        CLEAN,
    )),
    redacted(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their functions"),
        "REVOKE … ON FUNCTION <walferry_ddl>.<name> ( … ) FROM <role>",
        CLEAN,
    )),
    durable(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "three of them"),
        "CREATE EVENT TRIGGER <name> …",
        CLEAN,
    )),
    durable(kind(
        "slot",
        Source,
        (PREPARING, Always, "waits for every open transaction of the cluster, once"),
        "CREATE_REPLICATION_SLOT <slot> LOGICAL pgoutput …",
        CLEAN,
    )),
    kind(
        "publication",
        Source,
        (PREPARING, ReplicaIdentityFull, "which replica identities were changed, for a clean that finds no ledger"),
        "COMMENT ON PUBLICATION <name> IS <text>",
        CLEAN,
    ),
    kind(
        "slot",
        Source,
        (PREPARING, Always, "on the primary, with --stream-from: what a slot on a standby waits for"),
        "SELECT pg_log_standby_snapshot( )",
        ITSELF,
    ),
    // The schema stands here in time: SCHEMA.
    kind(
        "identity column",
        Both,
        (
            PREPARING,
            Always,
            "for each GENERATED ALWAYS identity, so that rows keep their values; on the source for the way back",
        ),
        "ALTER TABLE <table> ALTER COLUMN <column> SET GENERATED BY DEFAULT",
        "the cutover's decision; clean",
    ),
    kind(
        "trigger",
        Both,
        (
            PREPARING,
            Always,
            "for each trigger or rule that would fire for what is applied; back to what it was at the decision",
        ),
        "ALTER TABLE ONLY <table> ENABLE …",
        "the cutover's decision; clean",
    ),
    // Copy.
    kind(
        "copy",
        Target,
        (COPYING, Always, "a table that is copied whole, so that its rows arrive frozen"),
        "LOCK TABLE ONLY <table> IN ACCESS EXCLUSIVE MODE NOWAIT",
        END,
    ),
    kind(
        "copy",
        Both,
        (
            COPYING,
            Always,
            "a table that is copied whole, or once more from its beginning; unlogged tables behind the fence; a TRUNCATE of the source",
        ),
        "TRUNCATE <tables>",
        "nothing: its rows come from the source",
    ),
    kind(
        "maintenance",
        Both,
        (
            COPYING,
            Always,
            "each table once its rows are there, and when many have changed; on the old primary while the way back is open",
        ),
        "ANALYZE <table>",
        ITSELF,
    ),
    kind(
        "maintenance",
        Both,
        (FOLLOWING, Always, "each table whose pages are not known to be visible"),
        "VACUUM ( <options> ) <table>",
        ITSELF,
    ),
    kind(
        "materialized view",
        Both,
        (FOLLOWING, Always, "when the source's was refreshed"),
        "REFRESH MATERIALIZED VIEW <name> …",
        ITSELF,
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "where the source has any: created, written, removed"),
        "SELECT lo_create( <oid> )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its content"),
        "SELECT lo_put( <oid>, <offset>, <bytes> )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its content"),
        "SELECT lo_truncate64( <descriptor>, 0 )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "that the source has no more"),
        "SELECT lo_unlink( <oid> )",
        "nothing: they are the source's",
    ),
    redacted(kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its comment"),
        "COMMENT ON LARGE OBJECT <oid> IS <text>",
        "nothing: they are the source's",
    )),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its owner"),
        "ALTER LARGE OBJECT <oid> OWNER TO <role>",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its privileges"),
        "GRANT <privilege> ON LARGE OBJECT <oid> TO <role>",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its privileges"),
        "REVOKE ALL ON LARGE OBJECT <oid> FROM <role>",
        "nothing: they are the source's",
    ),
    // Following.
    kind(
        "marker",
        Both,
        (FOLLOWING, Always, "a transactional message in the WAL: the heartbeat, and the proofs of the cutover"),
        "SELECT pg_logical_emit_message( true, <prefix>, <text> )",
        ITSELF,
    ),
    durable(kind(
        "slot",
        Both,
        (FOLLOWING, WayBack, "the slot of the way back"),
        "SELECT pg_create_logical_replication_slot( <slot>, 'pgoutput' )",
        "walferry finish or clean",
    )),
    kind(
        "slot",
        Both,
        (FOLLOWING, WayBack, "it is moved on every few seconds"),
        "SELECT pg_replication_slot_advance( <slot>, <lsn> )",
        ITSELF,
    ),
    kind(
        "session",
        Both,
        (
            "any",
            Always,
            "sessions of a dead walferry or of ours that are in the way; behind the fence all others of the database",
        ),
        "SELECT pg_terminate_backend( <pid> )",
        ITSELF,
    ),
    kind(
        "session",
        Both,
        ("any", Always, "a vacuum of ours that somebody waits for"),
        "SELECT pg_cancel_backend( <pid> )",
        ITSELF,
    ),
    // Cutover.
    kind(
        "prewarm",
        Target,
        (CUTOVER, Always, "with --prewarm, where it is not there"),
        "CREATE EXTENSION pg_prewarm SCHEMA walferry",
        CLEAN,
    ),
    kind("prewarm", Target, (CUTOVER, Always, "with --prewarm"), "SELECT pg_prewarm( <table> )", ITSELF),
    kind(
        "fence",
        Both,
        (CUTOVER, Always, "a table that is being vacuumed: asked to make way"),
        "LOCK TABLE ONLY <table> IN SHARE UPDATE EXCLUSIVE MODE",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Always, "with --fence lock or tables: writers wait, readers go on"),
        "LOCK TABLE <tables> IN SHARE ROW EXCLUSIVE MODE",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Part, "with --fence tables: holds nextval back and changes nothing"),
        "ALTER SEQUENCE <sequence> CACHE <as it is>",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "the database becomes read-only by default"),
        "ALTER DATABASE <database> SET default_transaction_read_only = <on, or as it was>",
        "an abort at once; after the decision: walferry clean or switchback",
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "as it was before: at an abort, a switchback, or by clean"),
        "ALTER DATABASE <database> RESET default_transaction_read_only",
        ITSELF,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "with --fence connections"),
        "ALTER DATABASE <database> WITH ALLOW_CONNECTIONS <true or false>",
        "the same with true, at an abort and after the decision",
    ),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "with --fence tables: their home"),
        "CREATE SCHEMA IF NOT EXISTS walferry",
        CLEAN,
    ),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "what refuses writes to tables that have moved"),
        "CREATE OR REPLACE FUNCTION walferry.moved ( ) …",
        "walferry switchback or clean",
    ),
    kind("guard", Both, (CUTOVER, Part, "its triggers on each table"), "DO $guard$ … CREATE TRIGGER … $guard$", CLEAN),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "lets writes through again, at an abort or a switchback"),
        "DO $open$ … $open$",
        ITSELF,
    ),
    kind(
        "sequence",
        Both,
        (CUTOVER, Always, "each sequence, to where the source's is"),
        "SELECT setval( <sequence>, <value>, <called> )",
        DECISION,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, WayBack, "the way back begins here: rows of its ledger"),
        "DO $begin$ … $begin$",
        CLEAN,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, Always, "proves that the fence is up; changes nothing"),
        "DO $decide$ … $decide$",
        ITSELF,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, Always, "identity columns as they were on the source"),
        "ALTER TABLE <table> ALTER COLUMN <column> SET GENERATED ALWAYS",
        DECISION,
    ),
    kind(
        "decision",
        Target,
        (
            CUTOVER,
            Always,
            "foreign keys that had to wait (our role may not set session_replication_role), validated afterwards",
        ),
        "ALTER TABLE … ADD CONSTRAINT <name> …",
        DECISION,
    ),
    kind("decision", Target, ("cut over", Always, "the same"), "ALTER TABLE … VALIDATE CONSTRAINT <name>", DECISION),
    kind("decision", Target, (CUTOVER, MapSchema, "--map-schema"), "ALTER SCHEMA <old> RENAME TO <new>", DECISION),
    // Clean.
    kind(
        "slot",
        Both,
        (CLEANING, Always, "also when a slot is made anew or given up, and by finish"),
        "SELECT pg_drop_replication_slot( <slot> )",
        ITSELF,
    ),
    kind(
        "event trigger",
        Source,
        (CLEANING, ReplicateDdl, "and after the cutover"),
        "DROP EVENT TRIGGER IF EXISTS <name>",
        ITSELF,
    ),
    kind(
        "event trigger",
        Source,
        (CLEANING, ReplicateDdl, "and after the cutover"),
        "DROP SCHEMA IF EXISTS <walferry_ddl> CASCADE",
        ITSELF,
    ),
    kind("guard", Both, (CLEANING, Part, "each table's by itself"), "DROP TRIGGER IF EXISTS <name> ON <name>", ITSELF),
    kind("guard", Both, (CLEANING, Part, "where there is a guard"), "DROP FUNCTION walferry.moved ( )", ITSELF),
    kind("guard", Both, (CLEANING, Part, "where nothing else is in it"), "DO $clean$ … $clean$", ITSELF),
    kind(
        "ledger",
        Both,
        (CLEANING, Always, "the ledger, with all that is recorded in it"),
        "DROP SCHEMA walferry CASCADE",
        ITSELF,
    ),
];
