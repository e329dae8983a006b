//! The list's part of TimescaleDB.

use super::On::{Source, Target};
use super::When::{Always, Hypertables, PauseSourceJobs};
use super::kinds::{CLEAN, CLEANING, COPYING, CUTOVER, DECISION, FOLLOWING, ITSELF, PREPARING};
use super::{Kind, durable, kind, redacted};

const DROP_DATABASE: &str = "dropping the target database";

/// Each group with the kind of the rest of the list that it comes before, by name and phase.
pub(super) static GROUPS: [((&str, &str), &[Kind]); 6] = [
    (("replica identity", PREPARING), BEFORE_THE_SLOT),
    (("identity column", PREPARING), WITH_THE_SCHEMA),
    (("maintenance", COPYING), WITH_THE_ROWS),
    (("maintenance", FOLLOWING), JOBS_MADE_AGAIN),
    (("decision", CUTOVER), AT_THE_CUTOVER),
    (("slot", CLEANING), AT_ITS_END),
];

const BEFORE_THE_SLOT: &[Kind] = &[
    durable(kind(
        "job",
        Source,
        (PREPARING, PauseSourceJobs, "for each job that runs; noted in the ledger and the state directory before"),
        "SELECT alter_job( <job>, scheduled => <false, or true when it is given back> )",
        "walferry clean, or a migration that goes on without the option",
    )),
    durable(kind(
        "setting",
        Source,
        (
            PREPARING,
            Always,
            "where the source has TimescaleDB: new chunks are published, deletions of segments streamed",
        ),
        "ALTER DATABASE <database> SET timescaledb.<setting> = <value>",
        CLEAN,
    )),
    durable(kind(
        "setting",
        Source,
        (
            PREPARING,
            Always,
            "the same for sessions that are there already, where our role is a superuser of the source",
        ),
        "ALTER SYSTEM SET timescaledb.<setting> = <value>",
        CLEAN,
    )),
    kind("setting", Source, (PREPARING, Always, "after that"), "SELECT pg_reload_conf( )", ITSELF),
];

const WITH_THE_SCHEMA: &[Kind] = &[
    kind(
        "extension",
        Target,
        (PREPARING, Always, "where the source has TimescaleDB and the target has not"),
        "CREATE SCHEMA IF NOT EXISTS <schema of the extension>",
        DROP_DATABASE,
    ),
    durable(kind(
        "extension",
        Target,
        (PREPARING, Always, "the same, in the source's version, where it is taken over as it is"),
        "CREATE EXTENSION IF NOT EXISTS timescaledb WITH SCHEMA <schema> VERSION <version>",
        DROP_DATABASE,
    )),
    durable(kind(
        "extension",
        Target,
        (PREPARING, Always, "the same, in the target's version, where TimescaleDB is made again there"),
        "CREATE EXTENSION IF NOT EXISTS timescaledb WITH SCHEMA <schema>",
        DROP_DATABASE,
    )),
    kind("hypertable", Target, (PREPARING, Always, MADE_AGAIN), "SELECT create_hypertable( … )", DROP_DATABASE),
    kind("hypertable", Target, (PREPARING, Always, MADE_AGAIN), "SELECT add_dimension( … )", DROP_DATABASE),
    kind("hypertable", Target, (PREPARING, Always, MADE_AGAIN), "SELECT set_integer_now_func( … )", DROP_DATABASE),
    durable(kind(
        "extension",
        Target,
        (PREPARING, Hypertables, "where the target has not"),
        "CREATE EXTENSION timescaledb SCHEMA public",
        DROP_DATABASE,
    )),
    // Jobs have options of the users' own.
    redacted(kind(
        "hypertable",
        Target,
        (
            "preparing, cutting over (what has changed since)",
            Always,
            "where the source has TimescaleDB: the rows of the extension's catalog, jobs asleep",
        ),
        "INSERT INTO <_timescaledb_catalog>.<table> …",
        DROP_DATABASE,
    )),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "for each table that is declared"),
        "SELECT create_hypertable( <table>, <dimension>, create_default_indexes => <whether> )",
        DROP_DATABASE,
    ),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "its further dimensions"),
        "SELECT add_dimension( <table>, <dimension> )",
        DROP_DATABASE,
    ),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "of integers: what is now"),
        "SELECT set_integer_now_func( <table>, <function> )",
        DROP_DATABASE,
    ),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "its compression"),
        "ALTER TABLE <table> SET ( timescaledb.compress … )",
        DROP_DATABASE,
    ),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "its compression policy, asleep"),
        "SELECT add_compression_policy( <table>, <when> )",
        DROP_DATABASE,
    ),
    kind(
        "hypertable",
        Target,
        (PREPARING, Hypertables, "its retention policy, asleep"),
        "SELECT add_retention_policy( <table>, <when> )",
        DROP_DATABASE,
    ),
];

/// The rest of it (`timescaledb.compress`, aggregates) is among the items of the schema.
const MADE_AGAIN: &str = "where TimescaleDB is made again on the target, which has another version of it";

const MADE_AGAIN_LATE: &str = "the same; behind the fence what has changed on the source since";

/// The jobs, at the end of the schema and behind the fence.
const JOBS_MADE_AGAIN: &[Kind] = &[
    kind(
        "aggregate",
        Target,
        (
            JOBS,
            Always,
            "with --caggs recompute, for each aggregate that is computed on the target, those that others stand on first",
        ),
        "CALL <refresh_continuous_aggregate>( … )",
        DROP_DATABASE,
    ),
    redacted(kind(
        "job",
        Target,
        (JOBS, Always, "where TimescaleDB is made again on the target: policies and jobs, asleep"),
        "SELECT add_job( <procedure>, <schedule and options> )",
        DROP_DATABASE,
    )),
    redacted(kind("job", Target, (JOBS, Always, MADE_AGAIN_LATE), "SELECT delete_job( <job> )", DROP_DATABASE)),
    kind(
        "job",
        Target,
        (JOBS, Always, "of what hypertable a job is"),
        "SELECT alter_job_set_hypertable_id( <job>, <hypertable> )",
        DROP_DATABASE,
    ),
];

const JOBS: &str = "catching up, cutting over";

const WITH_THE_ROWS: &[Kind] = &[
    kind(
        "copy",
        Source,
        (
            COPYING,
            Always,
            "a compressed chunk that has uncompressed rows too, while it is read: holds up its recompression, and no writer",
        ),
        "LOCK TABLE ONLY <chunk> IN ROW SHARE MODE",
        ITSELF,
    ),
    kind(
        "chunk",
        Target,
        (COPYING, Hypertables, "the chunks of a large table, before its rows"),
        "SELECT create_chunk( <table>, <ranges> )",
        DROP_DATABASE,
    ),
    kind(
        "chunk",
        Target,
        (COPYING, Hypertables, "chunks that are older than declared; again behind late changes"),
        "SELECT compress_chunk( <chunk> )",
        "SELECT decompress_chunk(…)",
    ),
    kind(
        "chunk",
        Target,
        (
            COPYING,
            Always,
            "a chunk whose compressed rows were changed on the source since the slot: its rows come decompressed",
        ),
        "SELECT decompress_chunk( <chunk>, true )",
        "SELECT compress_chunk(…)",
    ),
    kind(
        "chunk",
        Target,
        ("copying, following", Always, "a chunk of the source's ranges, where TimescaleDB is made again on the target"),
        "SELECT create_chunk( … )",
        DROP_DATABASE,
    ),
    kind(
        "chunk",
        Target,
        ("copying, following", Always, "there: a chunk that is compressed on the source"),
        "SELECT compress_chunk( … )",
        "SELECT decompress_chunk(…)",
    ),
    kind(
        "publication",
        Source,
        (FOLLOWING, Always, "a chunk that a session made without publishing it"),
        "ALTER PUBLICATION <name> ADD TABLE <chunk>",
        CLEAN,
    ),
    kind(
        "chunk",
        Target,
        (FOLLOWING, Always, "a chunk that the source has dropped"),
        "SELECT drop_chunk( <chunk> )",
        "nothing: the source has dropped its rows",
    ),
];

const AT_THE_CUTOVER: &[Kind] = &[
    kind(
        "guard",
        Source,
        (CUTOVER, Always, "where the source has TimescaleDB with compression, before the fence: the guard's home"),
        "CREATE SCHEMA IF NOT EXISTS walferry",
        CLEAN,
    ),
    kind(
        "guard",
        Source,
        (CUTOVER, Always, "so that the owners of hypertables find its function"),
        "GRANT USAGE ON SCHEMA walferry TO PUBLIC",
        CLEAN,
    ),
    kind(
        "guard",
        Source,
        (CUTOVER, Always, "the function of its triggers, which is never called"),
        "CREATE OR REPLACE FUNCTION walferry.seen ( ) …",
        CLEAN,
    ),
    kind(
        "guard",
        Source,
        (CUTOVER, Always, "the same"),
        "GRANT EXECUTE ON FUNCTION walferry.seen ( ) TO PUBLIC",
        CLEAN,
    ),
    kind(
        "guard",
        Source,
        (CUTOVER, Always, "on each hypertable: keeps changes of compressed rows in the stream, and fires for no row"),
        "CREATE TRIGGER <name> AFTER DELETE ON <hypertable> FOR EACH ROW WHEN ( false ) EXECUTE FUNCTION walferry.seen ( )",
        CLEAN,
    ),
    kind(
        "hypertable",
        Target,
        (
            CUTOVER,
            Always,
            "where the source has TimescaleDB: the state of continuous aggregates and jobs, before it is carried over",
        ),
        "DELETE FROM <_timescaledb_catalog>.<table> …",
        DECISION,
    ),
    kind(
        "job",
        Target,
        (CUTOVER, Always, "part of the decision: the jobs that ran on the source run from now on"),
        "SELECT alter_job( <job>, scheduled => true )",
        DECISION,
    ),
];

const AT_ITS_END: &[Kind] = &[
    kind(
        "guard",
        Source,
        (CLEANING, Always, "where hypertables have a guard"),
        "DROP FUNCTION walferry.seen ( ) CASCADE",
        ITSELF,
    ),
    kind(
        "guard",
        Source,
        (CLEANING, Always, "the guard's home, where nothing else is in it"),
        "DO $clean$ … $clean$",
        ITSELF,
    ),
    kind(
        "setting",
        Source,
        (CLEANING, Always, "where it was set for the migration and there was none before"),
        "ALTER DATABASE <database> RESET timescaledb.<setting>",
        ITSELF,
    ),
    kind(
        "setting",
        Source,
        (CLEANING, Always, "the same of the server"),
        "ALTER SYSTEM RESET timescaledb.<setting>",
        ITSELF,
    ),
];
