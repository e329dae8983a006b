//! The preflight against real servers: what blocks is found, what it says mends it, and nothing is changed.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too, which clippy does not see

use std::time::Duration;

use tokio_postgres::Client;
use walferry::care::connections::Jobs;
use walferry::check::{self, Finding, Inputs, Report, Severity, Side};
use walferry::connection::ConnectionSpec;
use walferry::demo::server::{ServerPrograms, StopMode, ThrowawayServer};
use walferry::unstreamed::large_object::Owners;

static NO_STANDBYS: walferry::source::standby::Standbys =
    walferry::source::standby::Standbys { copy: None, stream: None, left: None };
static NO_OWNERS: Owners = Owners { create_roles: false, no_owner: false, no_privileges: false, role_map: Vec::new() };

/// The settings of a source as it should be; autovacuum would change the catalogs on its own.
const LOGICAL: [(&str, &str); 3] =
    [("wal_level", "logical"), ("max_prepared_transactions", "5"), ("autovacuum", "off")];

/// A source and a target, each with a database and a role of its own that is no superuser.
struct Pair {
    source: ThrowawayServer,
    target: ThrowawayServer,
}

impl Pair {
    /// Starts both; `settings` are the source's, and win over those that it should have.
    async fn start(settings: &[(&str, &str)]) -> Pair {
        let programs = ServerPrograms::find(None).unwrap();
        let source = ThrowawayServer::start(&programs, "check-source", &[&LOGICAL, settings].concat()).await.unwrap();
        let target = ThrowawayServer::start(&programs, "check-target", &LOGICAL).await.unwrap();
        let pair = Pair { source, target };
        for server in [&pair.source, &pair.target] {
            let first = server.connect("postgres").await.unwrap();
            run(&first, "CREATE ROLE app LOGIN REPLICATION").await;
            run(&first, "CREATE DATABASE shop").await;
            run(
                &server.connect("shop").await.unwrap(),
                "ALTER DATABASE shop OWNER TO app; GRANT pg_signal_backend TO app; GRANT CREATE ON SCHEMA public TO app;",
            )
            .await;
        }
        let grant = "GRANT SET ON PARAMETER session_replication_role TO app";
        for client in [pair.on_source().await, pair.on_target().await] {
            run(&client, grant).await;
        }
        pair
    }

    /// The superuser in the source's database.
    async fn on_source(&self) -> Client {
        self.source.connect("shop").await.unwrap()
    }

    /// The superuser in the target's database.
    async fn on_target(&self) -> Client {
        self.target.connect("shop").await.unwrap()
    }

    /// Runs SQL on the source as the role that migrates.
    async fn as_app(&self, sql: &str) {
        let client = spec(&self.source, "app", "shop").connect("test").await.unwrap();
        run(&client, &format!("SET search_path = public; {sql}")).await;
    }

    async fn check(&self) -> Report {
        self.check_as("app").await
    }

    async fn check_as(&self, role: &str) -> Report {
        check_between(&spec(&self.source, role, "shop"), &spec(&self.target, role, "shop")).await
    }

    /// The finding is there, its fix runs on the side that it names, and then it is gone.
    async fn is_mended_by_its_fix(&self, severity: Severity, code: &str) {
        let report = self.check().await;
        let finding = the_finding(&report, code);
        assert_eq!(finding.severity, severity, "{report}");
        assert_eq!(report.ready(), severity != Severity::Blocker, "{report}");
        let client = match finding.side {
            Side::Target => self.on_target().await,
            _ => self.on_source().await,
        };
        // One at a time: ALTER SYSTEM must not be in a transaction with others.
        for statement in finding.fix.as_ref().unwrap_or_else(|| panic!("{code} has no fix")).lines() {
            run(&client, statement).await;
        }
        // A reloaded setting reaches new sessions a moment later.
        for _ in 0..100 {
            if self.check().await.findings.iter().all(|finding| finding.code != code) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("the fix did not mend it: {}", self.check().await);
    }
}

fn spec(server: &ThrowawayServer, role: &str, database: &str) -> ConnectionSpec {
    let text = format!("host=127.0.0.1 port={} user={role} dbname={database} sslmode=disable", server.port());
    ConnectionSpec::parse(&text).unwrap()
}

fn inputs<'a>(source: &'a ConnectionSpec, target: &'a ConnectionSpec) -> Inputs<'a> {
    Inputs {
        owners: &NO_OWNERS,
        source,
        target,
        standbys: &NO_STANDBYS,
        state_directory: None,
        jobs: Jobs { copy: 4, index: 2, apply: 4 },
        queue_max_bytes: None,
        scope: &walferry::source::scope::WHOLE_DATABASE,
        resuming: false,
        replica_identity_full: false,
        pause_source_jobs: false,
        caggs: walferry::timescale::Caggs::Copy,
        replicate_ddl: false,
        estimate: Duration::ZERO,
    }
}

async fn check_between(source: &ConnectionSpec, target: &ConnectionSpec) -> Report {
    check::run(&inputs(source, target)).await.unwrap()
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

fn the_finding<'a>(report: &'a Report, code: &str) -> &'a Finding {
    report.findings.iter().find(|finding| finding.code == code).unwrap_or_else(|| panic!("no {code} in\n{report}"))
}

fn codes(report: &Report, severity: Severity) -> Vec<&'static str> {
    report.of(severity).map(|finding| finding.code).collect()
}

/// What a check could have changed: every catalog's rows, slots, settings, sessions, and last the next transaction number.
async fn everything(client: &Client) -> Vec<String> {
    let catalogs = client
        .query(
            "SELECT format('%s %s', relname, (xpath('/row/n/text()', query_to_xml(format( \
                  'SELECT count(*) || md5(coalesce(string_agg(t::text, %L ORDER BY t::text), %L)) AS n FROM %I.%I t', \
                  '|', '', nspname, relname), false, true, '')))[1]) \
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind = 'r' AND nspname IN ('pg_catalog', 'public') AND relname <> 'pg_statistic' ORDER BY 1",
            &[],
        )
        .await
        .unwrap();
    let mut all: Vec<String> = catalogs.iter().map(|row| row.get(0)).collect();
    let more = client
        .query_one(
            "SELECT txid_snapshot_xmax(txid_current_snapshot())::text, concat_ws('/', \
               (SELECT count(*) FROM pg_replication_slots), (SELECT sum(hashtext(setting)::int8) FROM pg_settings WHERE source <> 'session'), \
               (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'))",
            &[],
        )
        .await
        .unwrap();
    all.extend([more.get(1), more.get(0)]);
    all
}

#[tokio::test]
async fn a_plain_database_is_ready_and_nothing_is_changed_on_either_server() {
    let pair = Pair::start(&[]).await;
    pair.as_app(
        "CREATE TABLE orders (id int PRIMARY KEY, note text); INSERT INTO orders SELECT n, 'x' FROM generate_series(1, 100) n; \
         UPDATE orders SET note = 'y'; ANALYZE orders; CREATE TABLE fresh (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);",
    )
    .await;
    let (source, target) = (pair.on_source().await, pair.on_target().await);
    let (source_before, target_before) = (everything(&source).await, everything(&target).await);
    let report = pair.check().await;
    // Our sessions end on the server a moment after we have gone.
    for (client, before) in [(&source, source_before), (&target, target_before)] {
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'";
        while client.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(before, everything(client).await);
    }
    assert!(report.ready(), "{report}");
    assert_eq!(codes(&report, Severity::Warning), Vec::<&str>::new(), "{report}");
    assert_eq!((report.tables, report.rows_estimate, report.tables_never_analysed), (2, 100, 1));
    assert!(report.to_string().ends_with("\nready"));
}

#[tokio::test]
async fn a_trial_estimates_the_copy_and_leaves_nothing_on_either_server() {
    let pair = Pair::start(&[]).await;
    let (from, to) = (spec(&pair.source, "app", "shop"), spec(&pair.target, "app", "shop"));
    // It ends when all has been copied, however busy the machine is.
    let inputs = Inputs { estimate: Duration::from_secs(600), ..inputs(&from, &to) };
    let report = check::run(&inputs).await.unwrap();
    let estimate = report.estimate.as_ref().unwrap();
    assert_eq!((estimate.seconds, estimate.bytes, estimate.bytes_per_second), (0.0, 0, None), "a source with no rows");
    assert_eq!(estimate.index_seconds, Some(0.0));
    assert!(the_finding(&report, "copy-time").message.starts_with("There are no rows"), "{report}");

    // Types that the target does not know, with and without a binary form that is the same everywhere; TOAST; a table without rows.
    pair.as_app(
        "CREATE TYPE mood AS ENUM ('ok', 'sad'); CREATE DOMAIN amount AS bigint; CREATE TYPE pair AS (a int, b text); \
         CREATE TABLE \"Or\"\"ders\" (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, mood mood, amount amount, note text); \
         CREATE TABLE pairs (id int, pair pair, oid regclass, PRIMARY KEY (id) INCLUDE (oid)); CREATE TABLE fresh (id int PRIMARY KEY); \
         CREATE TABLE documents (name text PRIMARY KEY, body text); ALTER TABLE documents ALTER body SET STORAGE EXTERNAL; \
         INSERT INTO \"Or\"\"ders\" (mood, amount, note) SELECT 'sad', n, repeat('x', 50) FROM generate_series(1, 100000) n; \
         INSERT INTO pairs SELECT n, ROW(n, 'x')::pair, 'pg_class' FROM generate_series(1, 1000) n; \
         INSERT INTO documents SELECT n::text, repeat('long', 10000) FROM generate_series(1, 40) n;",
    )
    .await;
    let (source, target) = (pair.on_source().await, pair.on_target().await);
    let (source_before, mut target_before) = (everything(&source).await, everything(&target).await);
    let report = check::run(&inputs).await.unwrap();
    for client in [&source, &target] {
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'";
        while client.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) > 0 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(source_before, everything(&source).await);
    let mut target_after = everything(&target).await;
    assert_ne!(target_before.pop(), target_after.pop(), "rows were written to the target");
    assert_eq!(target_before, target_after);

    let estimate = report.estimate.as_ref().unwrap();
    let bytes: i64 = estimate.tables.iter().map(|table| table.bytes).sum();
    let names: Vec<&str> = estimate.tables.iter().map(|table| table.table.as_str()).collect();
    assert_eq!(names, ["\"public\".\"Or\"\"ders\"", "\"public\".\"documents\"", "\"public\".\"pairs\""]);
    assert!(estimate.tables.iter().all(|table| table.left_out.is_none()), "{report}");
    assert!(estimate.tables.iter().all(|table| table.measured_bytes == table.bytes && table.measured_seconds > 0.0));
    assert!(estimate.complete && estimate.written, "{estimate:?}");
    assert_eq!((estimate.bytes, estimate.streams), (bytes, 2));
    assert!(estimate.seconds > 0.0 && estimate.measured_seconds > 0.0 && estimate.index_bytes > 2 << 20);
    assert!(estimate.index_seconds.unwrap() > 0.0);
    let message = &the_finding(&report, "copy-time").message;
    assert!(message.contains(" with 2 streams of ") && message.contains("which is all there is"), "{message}");
    let json = serde_json::to_value(&report).unwrap();
    for field in ["seconds", "bytes", "bytes_per_second", "index_seconds", "index_bytes", "measured_seconds", "streams"]
    {
        assert!(json["estimate"][field].is_number(), "{field} in {json}");
    }

    let nothing = check::run(&Inputs { estimate: Duration::ZERO, ..inputs }).await.unwrap();
    assert!(nothing.estimate.is_none() && nothing.findings.iter().all(|finding| finding.code != "copy-time"));

    // Where nothing can be made on the target, and where there is none, the reading is tried.
    run(&target, "REVOKE CREATE ON DATABASE shop FROM app; ALTER DATABASE shop OWNER TO postgres").await;
    let gone = ConnectionSpec::parse("host=127.0.0.1 port=1 user=app dbname=shop").unwrap();
    for to in [&to, &gone] {
        let report = check::run(&Inputs { target: to, ..inputs }).await.unwrap();
        let estimate = report.estimate.as_ref().unwrap();
        assert!(!estimate.written && estimate.complete && estimate.index_seconds.is_none(), "{estimate:?}");
        let message = &the_finding(&report, "copy-time").message;
        assert!(
            message.starts_with("The reading alone takes about ") && message.contains("the target cannot be used"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn settings_of_the_server_block_until_their_fix_and_a_restart() {
    let settings = [("wal_level", "replica"), ("max_replication_slots", "0"), ("max_wal_senders", "1")];
    let mut pair = Pair::start(&settings).await;
    let report = pair.check().await;
    assert_eq!(codes(&report, Severity::Blocker), ["wal-level", "replication-slots", "walsenders"], "{report}");
    assert!(report.to_string().contains("\nblocked by 3 findings: "));
    let client = pair.on_source().await;
    for finding in report.of(Severity::Blocker) {
        run(&client, finding.fix.as_ref().unwrap()).await;
    }
    drop(client);
    pair.source.restart().await.unwrap();
    let report = pair.check().await;
    assert!(report.ready(), "{report}");
}

#[tokio::test]
async fn every_missing_right_is_found_and_its_fix_mends_it() {
    let pair = Pair::start(&[]).await;
    let source = pair.on_source().await;
    // A role that owns a hostile name, on both sides.
    for client in [&source, &pair.on_target().await] {
        run(client, "CREATE ROLE \"Owner \"\"x\"; GRANT \"Owner \"\"x\" TO app;").await;
    }
    run(&source, "ALTER ROLE app NOREPLICATION").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "replication-role").await;

    run(&source, "ALTER DATABASE shop OWNER TO postgres; GRANT CREATE ON DATABASE shop TO app").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "database-owner").await;

    run(&source, "REVOKE pg_signal_backend FROM app").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "signal-backend").await;

    run(&source, "REVOKE CREATE ON DATABASE shop FROM app").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "create-on-database").await;

    run(&pair.on_target().await, "REVOKE CREATE ON DATABASE shop FROM app").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "create-on-database").await;

    run(&pair.on_target().await, "REVOKE SET ON PARAMETER session_replication_role FROM app").await;
    pair.is_mended_by_its_fix(Severity::Info, "replica-role").await;

    let owned = "CREATE SCHEMA \"Sales \"\"s\" AUTHORIZATION \"Owner \"\"x\"; SET ROLE \"Owner \"\"x\"; \
                 CREATE TABLE \"Sales \"\"s\".\"T\nt\" (id serial PRIMARY KEY); RESET ROLE;";
    run(&source, owned).await;
    assert!(pair.check().await.ready());
    run(&source, "REVOKE \"Owner \"\"x\" FROM app").await;
    let report = pair.check().await;
    assert_eq!(codes(&report, Severity::Blocker), ["select", "table-owner"], "{report}");
    run(&source, the_finding(&report, "select").fix.as_ref().unwrap()).await;
    pair.is_mended_by_its_fix(Severity::Blocker, "table-owner").await;
    assert!(pair.check().await.ready());

    run(&pair.on_target().await, "REVOKE \"Owner \"\"x\" FROM app").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "owner-membership").await;

    let policy = "ALTER TABLE \"Sales \"\"s\".\"T\nt\" ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY";
    run(&source, policy).await;
    let report = pair.check().await;
    let sides: Vec<Side> = report
        .findings
        .iter()
        .filter(|finding| finding.code == "row-level-security")
        .map(|finding| finding.side)
        .collect();
    assert_eq!(sides, [Side::Source, Side::Target], "{report}");
    run(&source, the_finding(&report, "row-level-security").fix.as_ref().unwrap()).await;
    pair.is_mended_by_its_fix(Severity::Blocker, "row-level-security").await;
    assert!(pair.check().await.ready());
}

#[tokio::test]
async fn h27_tables_the_stream_cannot_speak_of_are_found_and_mended() {
    let pair = Pair::start(&[]).await;
    pair.as_app("CREATE TABLE log (line text); INSERT INTO log VALUES ('a');").await;
    let report = pair.check().await;
    assert!(report.ready(), "{report}");
    assert_eq!(the_finding(&report, "replica-identity").severity, Severity::Warning);

    pair.as_app("UPDATE log SET line = 'b';").await;
    let statistics = "SELECT pg_stat_get_tuples_updated('public.log'::regclass)";
    let source = pair.on_source().await;
    // A session reports its statistics when it ends.
    while source.query_one(statistics, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        tokio::task::yield_now().await;
    }
    // Offered by name, and taken.
    let report = pair.check().await;
    assert!(the_finding(&report, "replica-identity").message.contains("--replica-identity-full"), "{report}");
    let (from, to) = (spec(&pair.source, "app", "shop"), spec(&pair.target, "app", "shop"));
    let with_full = Inputs { replica_identity_full: true, ..inputs(&from, &to) };
    let report = check::run(&with_full).await.unwrap();
    assert!(report.ready(), "{report}");
    assert_eq!(the_finding(&report, "replica-identity-full").severity, Severity::Warning);
    pair.is_mended_by_its_fix(Severity::Blocker, "replica-identity").await;

    // H26: pgoutput leaves the generated column out, and with it the key.
    pair.as_app(
        "CREATE TABLE doubled (n int NOT NULL, twice int GENERATED ALWAYS AS (n * 2) STORED PRIMARY KEY); \
         CREATE TABLE nothing (id int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING;",
    )
    .await;
    pair.is_mended_by_its_fix(Severity::Warning, "identity-generated").await;
    pair.is_mended_by_its_fix(Severity::Warning, "replica-identity").await;
    let identity = "SELECT relreplident::text FROM pg_class WHERE relname = 'nothing'";
    assert_eq!(source.query_one(identity, &[]).await.unwrap().get::<_, &str>(0), "d");

    // H14
    pair.as_app("CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY); INSERT INTO scratch VALUES (1);").await;
    pair.is_mended_by_its_fix(Severity::Warning, "unlogged-table").await;
}

#[tokio::test]
async fn what_this_version_cannot_move_blocks() {
    let pair = Pair::start(&[]).await;
    pair.as_app(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
         CREATE TRIGGER always BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f(); ALTER TABLE t ENABLE ALWAYS TRIGGER always; \
         CREATE RULE r AS ON DELETE TO t DO ALSO NOTIFY x; ALTER TABLE t ENABLE ALWAYS RULE r; \
         CREATE TABLE child () INHERITS (t); ALTER TABLE child ADD PRIMARY KEY (id);",
    )
    .await;
    let report = pair.check().await;
    assert!(report.ready(), "{report}");
    assert_eq!(the_finding(&report, "rule-always").severity, Severity::Info);
    assert_eq!(the_finding(&report, "trigger-always").severity, Severity::Info);
    assert_eq!(the_finding(&report, "inheritance").severity, Severity::Info);

    pair.as_app("SELECT lo_from_bytea(0, 'x');").await;
    pair.is_mended_by_its_fix(Severity::Warning, "large-objects-slow").await;
    // Somebody else's.
    run(&pair.on_source().await, "SELECT lo_from_bytea(0, 'x')").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "large-objects-unreadable").await;
    assert_eq!(the_finding(&pair.check().await, "large-objects").severity, Severity::Info);
    assert!(pair.check().await.ready());
}

#[tokio::test]
async fn transactions_that_the_slot_would_wait_for_are_named_without_their_statements() {
    let pair = Pair::start(&[]).await;
    let source = pair.on_source().await;
    pair.as_app("CREATE TABLE t (id int PRIMARY KEY);").await;
    run(&source, "BEGIN; INSERT INTO t VALUES (4711); PREPARE TRANSACTION 'it''s'").await;
    let report = pair.check().await;
    assert!(codes(&report, Severity::Warning).contains(&"prepared-transactions"), "{report}");
    assert!(report.ready(), "it is waited for: {report}");
    assert!(!report.to_string().contains("4711"));
    pair.is_mended_by_its_fix(Severity::Warning, "prepared-transactions").await;
    // app sees no other role's sessions, and says so.
    pair.is_mended_by_its_fix(Severity::Info, "sessions-hidden").await;
}

#[tokio::test]
async fn what_an_earlier_migration_left_is_named_unless_it_is_resumed() {
    let pair = Pair::start(&[]).await;
    let source = pair.on_source().await;
    run(&source, "SELECT pg_create_logical_replication_slot('walferry_1', 'pgoutput'); CREATE PUBLICATION walferry_1")
        .await;
    run(&pair.on_target().await, "CREATE SCHEMA walferry; CREATE TABLE public.moved ()").await;
    let report = pair.check().await;
    assert_eq!(the_finding(&report, "leftovers").object, "slot walferry_1, publication walferry_1");
    assert_eq!(codes(&report, Severity::Blocker), ["target-not-empty"], "{report}");
    assert_eq!(the_finding(&report, "target-not-empty").object, "schema walferry, table public.moved");
    let (from, to) = (spec(&pair.source, "app", "shop"), spec(&pair.target, "app", "shop"));
    let resumed = check::run(&Inputs { resuming: true, ..inputs(&from, &to) }).await.unwrap();
    assert!(resumed.ready() && resumed.findings.iter().all(|finding| finding.code != "leftovers"), "{resumed}");
}

#[tokio::test]
async fn a_schema_of_the_ledgers_name_that_is_not_the_ledger_blocks() {
    let pair = Pair::start(&[]).await;
    pair.as_app("CREATE SCHEMA walferry; CREATE TABLE walferry.migration (id int PRIMARY KEY);").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "schema-walferry").await;
}

#[tokio::test]
async fn a_target_that_is_not_empty_blocks_and_a_new_database_mends_it() {
    let pair = Pair::start(&[]).await;
    let target = pair.on_target().await;
    run(
        &target,
        "CREATE TYPE public.mood AS ENUM ('ok'); CREATE FUNCTION public.f(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    )
    .await;
    let many: String = (0..12).map(|n| format!("CREATE TABLE public.t{n:02} ();")).collect();
    run(&target, &many).await;
    let report = pair.check().await;
    let finding = the_finding(&report, "target-not-empty");
    assert!(finding.object.starts_with("function public.f(integer), table public.t00, "), "{}", finding.object);
    assert!(finding.object.ends_with(" and 4 more"), "{}", finding.object);
    run(&target, finding.fix.as_ref().unwrap()).await;
    let report =
        check_between(&spec(&pair.source, "postgres", "shop"), &spec(&pair.target, "postgres", "shop_new")).await;
    assert!(report.findings.iter().all(|finding| finding.code != "target-not-empty"), "{report}");

    // An extension of the target's own is no obstacle, a schema of the source's is.
    run(&pair.on_source().await, "CREATE SCHEMA sales AUTHORIZATION app").await;
    run(&pair.target.connect("shop_new").await.unwrap(), "CREATE SCHEMA sales").await;
    let (from, to) = (spec(&pair.source, "postgres", "shop"), spec(&pair.target, "postgres", "shop_new"));
    assert_eq!(codes(&check_between(&from, &to).await, Severity::Blocker), ["schema-exists"]);
    run(&pair.target.connect("shop_new").await.unwrap(), "DROP SCHEMA \"sales\";").await;
    assert!(check_between(&from, &to).await.ready());
}

#[tokio::test]
async fn what_a_managed_service_has_put_into_every_database_leaves_the_target_empty() {
    let pair = Pair::start(&[]).await;
    let target = pair.on_target().await;
    run(
        &target,
        "CREATE ROLE rdsadmin; CREATE SCHEMA service AUTHORIZATION rdsadmin; SET ROLE rdsadmin; \
         CREATE TABLE service.t (id serial PRIMARY KEY); CREATE FUNCTION service.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
         CREATE TYPE service.mood AS ENUM ('ok'); SELECT lo_create(7); RESET ROLE; CREATE EXTENSION citext",
    )
    .await;
    let report = pair.check().await;
    assert!(report.ready(), "{report}");
    let found = the_finding(&report, "preinstalled");
    assert_eq!(
        found.object,
        "function service.f(), large object 7, sequence service.t_id_seq, table service.t, type service.mood"
    );
    // Somebody else's in the same schema is in the way, and a large object too.
    run(&target, "CREATE TABLE service.ours (); SELECT lo_create(8)").await;
    let report = pair.check().await;
    assert_eq!(the_finding(&report, "target-not-empty").object, "large object 8, table service.ours");
}

#[tokio::test]
async fn roles_that_the_dump_names_must_be_on_the_target() {
    let pair = Pair::start(&[]).await;
    pair.as_app("CREATE TABLE t (id int PRIMARY KEY);").await;
    run(&pair.on_source().await, "CREATE ROLE reader NOLOGIN; GRANT SELECT ON t TO reader").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "grantee-role").await;
    let source = pair.on_source().await;
    run(&source, "CREATE ROLE keeper LOGIN; GRANT keeper TO app; CREATE SCHEMA kept AUTHORIZATION keeper").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "owner-role").await;
    let target = pair.on_target().await;
    let login = target.query_one("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'keeper'", &[]);
    assert!(login.await.unwrap().get::<_, bool>(0));
    assert!(pair.check().await.ready());
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_and_one_database_twice_are_findings() {
    let mut pair = Pair::start(&[]).await;
    let one = spec(&pair.source, "postgres", "shop");
    let report = check_between(&one, &one).await;
    assert!(codes(&report, Severity::Blocker).contains(&"same-database"), "{report}");

    pair.target.stop(StopMode::Fast).await.unwrap();
    let report = pair.check().await;
    assert_eq!(codes(&report, Severity::Blocker), ["connection"], "{report}");
    assert_eq!(the_finding(&report, "connection").side, Side::Target);
    assert!(report.source.is_some() && report.target.is_none());
    assert!(!check_between(&spec(&pair.source, "nobody", "shop"), &one).await.ready());
}

#[tokio::test]
async fn too_few_connections_and_a_queue_larger_than_its_disk_block() {
    let pair = Pair::start(&[]).await;
    run(&pair.on_target().await, "ALTER ROLE app CONNECTION LIMIT 9").await;
    let report = pair.check().await;
    assert_eq!(codes(&report, Severity::Blocker), ["connections"], "{report}");
    run(&pair.on_target().await, "ALTER ROLE app CONNECTION LIMIT -1").await;

    let (from, to) = (spec(&pair.source, "app", "shop"), spec(&pair.target, "app", "shop"));
    let directory = tempfile::tempdir().unwrap();
    let wanted = directory.path().join("state");
    let inputs = Inputs { state_directory: Some(&wanted), queue_max_bytes: Some(u64::MAX), ..inputs(&from, &to) };
    let report = check::run(&inputs).await.unwrap();
    assert_eq!(codes(&report, Severity::Blocker), ["queue-disk"], "{report}");
    assert!(!wanted.exists());
}

#[tokio::test]
async fn h36_timeouts_of_servers_roles_and_databases_are_named() {
    let pair = Pair::start(&[("max_slot_wal_keep_size", "1GB"), ("wal_sender_timeout", "5s")]).await;
    run(&pair.on_source().await, "ALTER ROLE app SET statement_timeout = '5s'").await;
    run(&pair.on_source().await, "ALTER SYSTEM SET idle_session_timeout = '1h'").await;
    run(&pair.on_target().await, "ALTER DATABASE shop SET default_transaction_read_only = on").await;
    pair.is_mended_by_its_fix(Severity::Warning, "slot-wal-limit").await;
    pair.is_mended_by_its_fix(Severity::Warning, "wal-sender-timeout").await;
    let report = pair.check().await;
    let timeouts: Vec<&str> = report
        .findings
        .iter()
        .filter(|finding| finding.code == "session-timeout")
        .map(|finding| finding.object.as_str())
        .collect();
    assert_eq!(timeouts, ["idle_session_timeout of the server", "statement_timeout of role app"], "{report}");
    let read_only = the_finding(&report, "read-only").fix.clone().unwrap();
    // Not in the database itself: a session there begins read-only.
    run(&pair.target.connect("postgres").await.unwrap(), &read_only).await;
    assert!(pair.check().await.findings.iter().all(|finding| finding.code != "read-only"));
}

#[tokio::test]
async fn extensions_and_collations_that_the_target_lacks_block_and_tablespaces_are_named() {
    let pair = Pair::start(&[]).await;
    let (source, target) = (pair.on_source().await, pair.on_target().await);
    run(&source, "CREATE EXTENSION pageinspect").await;
    pair.is_mended_by_its_fix(Severity::Blocker, "extension-rights").await;

    run(&source, "CREATE EXTENSION citext; UPDATE pg_extension SET extname = 'absent' WHERE extname = 'citext'").await;
    assert_eq!(codes(&pair.check().await, Severity::Blocker), ["extension"]);
    run(&source, "UPDATE pg_extension SET extname = 'citext', extversion = '0' WHERE extname = 'absent'").await;
    assert_eq!(codes(&pair.check().await, Severity::Warning), ["extension-version"]);

    run(&source, "SET allow_in_place_tablespaces = on").await;
    run(&source, "CREATE TABLESPACE fast LOCATION ''").await;
    run(&source, "GRANT CREATE ON TABLESPACE fast TO app").await;
    pair.as_app("CREATE TABLE t (id int PRIMARY KEY) TABLESPACE fast;").await;
    let report = pair.check().await;
    assert!(report.ready(), "{report}");
    let found = the_finding(&report, "tablespace");
    assert_eq!((found.severity, found.object.as_str()), (Severity::Info, "\"fast\""));

    let collation: String = source
        .query_one("SELECT collname::text FROM pg_collation WHERE collprovider = 'c' AND collencoding = 6 AND collname <> 'ucs_basic' LIMIT 1", &[])
        .await
        .unwrap()
        .get(0);
    pair.as_app(&format!("CREATE TABLE sorted (id text COLLATE \"{collation}\" PRIMARY KEY);")).await;
    run(&target, &format!("DELETE FROM pg_collation WHERE collname = '{collation}'")).await;
    pair.is_mended_by_its_fix(Severity::Blocker, "collation-missing").await;
}

#[tokio::test]
async fn h10_more_tables_than_the_lock_table_has_places_block_until_it_is_larger() {
    let mut pair = Pair::start(&[("max_locks_per_transaction", "10"), ("max_connections", "20")]).await;
    // A few at a time: creating them all at once would meet the limit itself.
    for batch in 0..50 {
        let tables: String = (0..10).map(|n| format!("CREATE TABLE t{batch}_{n} (id int PRIMARY KEY);")).collect();
        pair.as_app(&tables).await;
    }
    let report = pair.check().await;
    assert_eq!(codes(&report, Severity::Blocker), ["locks"], "{report}");
    assert_eq!((the_finding(&report, "locks").side, report.tables), (Side::Source, 500));
    run(&pair.on_source().await, the_finding(&report, "locks").fix.as_ref().unwrap()).await;
    pair.source.restart().await.unwrap();
    let report = pair.check().await;
    assert!(report.ready() && report.findings.iter().all(|finding| finding.code != "locks"), "{report}");
}

#[tokio::test]
async fn what_the_way_back_lacks_is_named_with_what_mends_it() {
    let pair = Pair::start(&[]).await;
    pair.as_app("CREATE TABLE t (id int PRIMARY KEY); ANALYZE t").await;
    run(&pair.on_source().await, "REVOKE SET ON PARAMETER session_replication_role FROM app").await;
    pair.is_mended_by_its_fix(Severity::Warning, "way-back").await;
    run(&pair.on_target().await, "ALTER ROLE app NOREPLICATION").await;
    pair.is_mended_by_its_fix(Severity::Warning, "way-back").await;
    run(&pair.on_target().await, "REVOKE pg_signal_backend FROM app").await;
    pair.is_mended_by_its_fix(Severity::Warning, "signal-backend").await;
}

#[tokio::test]
async fn settings_that_the_target_has_otherwise_are_named() {
    let pair = Pair::start(&[("max_locks_per_transaction", "65")]).await;
    pair.as_app("CREATE TABLE t (id int PRIMARY KEY); ANALYZE t").await;
    run(&pair.on_source().await, "ALTER DATABASE shop SET search_path = \"My Schema\", public").await;
    run(&pair.on_source().await, "ALTER DATABASE shop SET \"app.greeting\" = 'it''s = me'").await;
    run(&pair.on_target().await, "ALTER DATABASE shop SET work_mem = '9MB'").await;
    pair.is_mended_by_its_fix(Severity::Warning, "database-settings").await;
    let shown = pair
        .on_target()
        .await
        .query_one("SELECT current_setting('search_path'), current_setting('app.greeting')", &[])
        .await
        .unwrap();
    assert_eq!((shown.get(0), shown.get(1)), ("\"My Schema\", public", "it's = me"));
    let report = pair.check().await;
    let differing: Vec<&str> = report
        .findings
        .iter()
        .filter(|finding| finding.code == "settings-differ")
        .map(|finding| finding.object.as_str())
        .collect();
    assert_eq!(differing, ["max_locks_per_transaction", "work_mem"], "{report}");
}
