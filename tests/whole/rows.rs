//! Rows and tables of every kind.

use crate::area::{Area, assert_cleans_up, assert_whole};
use crate::support::{Servers, until_true};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_with_its_edge_values() {
    let locks = [("max_locks_per_transaction", "1000")];
    let servers = Servers::with(&locks, &locks).await;
    for (database, in_binary) in [("whole_text", false), ("whole_binary", true)] {
        let area = Area::new("types").in_database(database);
        let (migration, running, before) = area.begin(&servers).await;
        let binary = migration.ledger("SELECT binary_format FROM walferry.migration").await[0].get::<_, bool>(0);
        assert_eq!(binary, in_binary);
        area.change(&migration.source_url, 2).await;
        area.change(&migration.source_url, 3).await;
        migration.cut_over(running).await;
        assert_whole(&migration, &before).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_tables_arrive_as_they_are() {
    let servers = Servers::start().await;
    let migration = Area::new("odd").migrate(&servers).await;
    // What fires is what fired on the source.
    let target = migration.target().await;
    target
        .batch_execute("INSERT INTO odd.replica VALUES (9000, 'a'); INSERT INTO odd.triggered VALUES (9000, 'a')")
        .await
        .unwrap();
    let written =
        "SELECT array_agg(who || ' ' || coalesce(what, '') ORDER BY who, what) FROM odd.trace WHERE what LIKE '%9000%'";
    let written: Vec<String> = target.query_one(written, &[]).await.unwrap().get(0);
    assert_eq!(written, ["always rule 9000", "always_trace INSERT (9000,a+)", "b_trace INSERT (9000,a+)"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_of_every_kind_and_inheritance_arrive_with_rows_that_move() {
    let servers = Servers::start().await;
    Area::new("partitions").migrate(&servers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_come_and_go_on_the_way_are_named_and_what_is_attached_goes_on() {
    let servers = Servers::start().await;
    let area = Area::new("partitions");
    let (migration, mut running, _) = area.begin(&servers).await;
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let (source, target) = (migration.source().await, migration.target().await);
    let detach = "ALTER TABLE parted.sale DETACH PARTITION parted.sale_2023";
    let attach =
        "ALTER TABLE parted.sale ATTACH PARTITION parted.sale_2023 FOR VALUES FROM ('2023-01-01') TO ('2024-01-01')";
    source.batch_execute(detach).await.unwrap();
    source
        .batch_execute("INSERT INTO parted.sale_2023 (id, region, at) VALUES (-1, 'detached', '2023-05-05')")
        .await
        .unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM parted.sale_2023 WHERE region = 'detached'").await;
    let new = "CREATE TABLE parted.sale_2040 PARTITION OF parted.sale FOR VALUES FROM ('2040-01-01') TO ('2041-01-01')";
    for statement in [attach, new, "INSERT INTO parted.sale (region, at) VALUES ('lost', '2040-02-02')"] {
        source.batch_execute(statement).await.unwrap();
    }
    area.change(&migration.source_url, 2).await;

    // Named, so that its row is not lost unseen.
    let changed = async || -> Vec<String> {
        let rehearsed = migration.with_directory("cutover", &["--dry-run", "--no-reverse", "--json"]).await.json();
        let findings = rehearsed["preconditions"].as_array().unwrap().clone();
        let catalog = findings.iter().find(|finding| finding["name"] == "catalog").unwrap();
        let text = catalog["text"].as_str().unwrap();
        text.split_once(": ").map_or(Vec::new(), |(_, list)| list.split("; ").map(str::to_owned).collect())
    };
    assert!(changed().await.contains(&"table parted.sale_2040 is new".to_owned()), "{:?}", changed().await);
    source.batch_execute("DROP TABLE parted.sale_2040").await.unwrap();
    target.batch_execute(&format!("{detach}; {attach}")).await.unwrap();
    area.change(&migration.source_url, 3).await;
    // The same partition again; what the attaching made anew is waived by name.
    let changed = changed().await;
    migration.ready_but_for_the_source(&mut running).await;
    let mut arguments = vec!["--yes", "--no-reverse", "--max-write-stall", "25s"];
    for change in &changed {
        let object = [" is new", " is gone", " has changed"].iter().find_map(|end| change.strip_suffix(end)).unwrap();
        arguments.extend(["--waive", object]);
    }
    let cutover = migration.with_directory("cutover", &arguments).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!(running.wait().await.code, Some(0));
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h26_every_replica_identity_finds_exactly_its_row() {
    let servers = Servers::start().await;
    Area::new("identity").migrate(&servers).await;
}

/// All that the stream cannot tell without a replica identity.
const UNTOLD: &str = "
    UPDATE identity.nothing_key SET id = id + 1000 WHERE id = :round;
    UPDATE identity.nothing_key SET t = t || '.' WHERE id % 3 = 0;
    DELETE FROM identity.nothing_key WHERE id = 10 + :round;
    INSERT INTO identity.default_none SELECT n, t FROM identity.default_none WHERE n < 5;
    UPDATE identity.default_none SET t = 'one of them' WHERE ctid = (SELECT min(ctid::text)::tid FROM identity.default_none WHERE n = 2 AND t = 't');
    DELETE FROM identity.default_none WHERE ctid = (SELECT min(ctid::text)::tid FROM identity.default_none WHERE n = 3);
    UPDATE identity.nullable_unique SET t = NULL WHERE ctid = (SELECT min(ctid::text)::tid FROM identity.nullable_unique WHERE n IS NULL AND t IS NOT NULL);
    DELETE FROM identity.nullable_unique WHERE n = 10 + :round;
    UPDATE identity.deferrable_key SET id = 200 - id WHERE id BETWEEN 50 AND 150;
    DELETE FROM identity.deferrable_key WHERE id = 10 + :round;";

const IDENTITIES: &str = "SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class \
    WHERE relname IN ('nothing_key', 'default_none', 'nullable_unique', 'deferrable_key')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_what_has_no_identity_gets_full_for_the_time_of_the_migration_and_the_way_back() {
    let servers = Servers::start().await;
    let area = Area { options: &["--replica-identity-full"], more_changes: UNTOLD, ..Area::new("identity") };
    let mut migration = area.make(&servers).await;
    let before = crate::area::dump(&migration.source_url).await;
    let source = migration.source().await;
    let identities =
        async |client: &tokio_postgres::Client| -> String { client.query_one(IDENTITIES, &[]).await.unwrap().get(0) };
    let (as_it_was, full) = (
        "default_none d, deferrable_key d, nothing_key n, nullable_unique d",
        "default_none f, deferrable_key f, nothing_key f, nullable_unique f",
    );

    // It waits for those who use a table; and what it has set before it died, the next start and `clean` know.
    let mut user = migration.source().await;
    let using = user.transaction().await.unwrap();
    using.batch_execute("LOCK TABLE identity.deferrable_key IN ROW EXCLUSIVE MODE").await.unwrap();
    let mut running = migration.migrate(area.options);
    crate::support::until("it waits", async || running.log().contains("somebody uses").then_some(())).await;
    assert!(running.is_alive());
    let noted = migration.ledger("SELECT count(*) FROM walferry.replica_identity").await[0].get::<_, i64>(0);
    assert_eq!(noted, 4, "noted before it is done");
    assert_eq!(identities(&source).await, "default_none f, deferrable_key d, nothing_key f, nullable_unique f");
    running.kill().await;
    drop(using);
    assert_eq!(migration.with_directory("clean", &[]).await.code, Some(0));
    assert_eq!(identities(&source).await, as_it_was);

    let held = crate::support::hold_pg_dump(&mut migration);
    let running = migration.migrate(area.options);
    held.is_reached().await;
    assert_eq!(identities(&source).await, full);
    running.kill().await;
    held.release();
    let mut running = migration.migrate(area.options);
    migration.wait_for_phase(&mut running, "following").await;
    let published = source
        .query_one("SELECT count(*) FROM pg_publication_tables WHERE pubname LIKE '%inserts'", &[])
        .await
        .unwrap();
    assert_eq!(published.get::<_, i64>(0), 0, "all tell their updates and deletes");
    area.change(&migration.source_url, 1).await;
    area.change(&migration.source_url, 2).await;

    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let target = migration.target().await;
    assert_eq!(identities(&target).await, full, "the way back needs it too");
    area.change(&migration.target_url, 3).await;
    target.batch_execute("INSERT INTO identity.default_key VALUES (77777, NULL, 'the last')").await.unwrap();
    until_true(&migration.source().await, "SELECT count(*) = 1 FROM identity.default_key WHERE id = 77777").await;
    let finished = migration.with_directory("finish", &[]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(running.wait().await.code, Some(0));
    migration.assert_equal().await;
    assert_cleans_up(&migration, &before).await;
    assert_eq!(identities(&migration.target().await).await, as_it_was);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_what_has_no_identity_is_published_for_its_inserts_only_and_an_update_is_found_at_the_cutover() {
    let servers = Servers::start().await;
    let area = Area::new("identity");
    let (migration, mut running, _) = area.begin(&servers).await;
    let source = migration.source().await;
    let published = "SELECT string_agg(tablename, ', ' ORDER BY tablename) FROM pg_publication_tables JOIN pg_publication USING (pubname) \
                     WHERE NOT pubupdate AND NOT pubdelete";
    let published: String = source.query_one(published, &[]).await.unwrap().get(0);
    assert_eq!(published, "default_none, deferrable_key, nothing_key, nullable_unique");
    // The application's own update must not fail.
    source.batch_execute("UPDATE identity.default_none SET t = 'changed' WHERE n = 1").await.unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse", "--max-write-stall", "25s"]).await;
    refused.assert_refused(5, &["identity\".\"default_none", "REPLICA IDENTITY FULL"]);
    running.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_unlogged_tables_are_copied_behind_the_fence_and_back() {
    let servers = Servers::start().await;
    let migration = servers.migration("unlogged").await;
    let source = migration.source().await;
    let schema = "CREATE UNLOGGED TABLE cache (id int PRIMARY KEY, t text); INSERT INTO cache SELECT i, 'first' FROM generate_series(1, 1000) i;
         CREATE UNLOGGED TABLE keyless (t text); CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)";
    source.batch_execute(schema).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    // None of this is in the stream.
    source
        .batch_execute(
            "DELETE FROM cache WHERE id % 2 = 0; UPDATE cache SET t = 'changed' WHERE id < 100; INSERT INTO cache VALUES (5000, 'new');
             INSERT INTO keyless SELECT 'line' FROM generate_series(1, 10); INSERT INTO t VALUES (2)",
        )
        .await
        .unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let verified = migration.with_directory("verify", &[]).await;
    assert_eq!(verified.code, Some(0), "they are left out until the cutover: {}{}", verified.stdout, verified.stderr);
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let (there, here) = (migration.target().await, migration.source().await);
    let state = "SELECT (SELECT md5(string_agg(c::text, ',' ORDER BY id)) FROM cache c), (SELECT count(*) FROM keyless), \
                 (SELECT string_agg(relname || relpersistence::text, ',' ORDER BY relname) FROM pg_class WHERE relname IN ('cache', 'keyless', 't'))";
    let read = async |client: &tokio_postgres::Client| {
        let row = client.query_one(state, &[]).await.unwrap();
        (row.get::<_, String>(0), row.get::<_, i64>(1), row.get::<_, String>(2))
    };
    let now = read(&there).await;
    assert_eq!(now, read(&here).await);
    assert_eq!((now.1, now.2.as_str()), (10, "cacheu,keylessu,tp"));

    there
        .batch_execute("UPDATE cache SET t = 'on the new primary'; DELETE FROM keyless; INSERT INTO t VALUES (3)")
        .await
        .unwrap();
    migration.wait_for_status(&mut running, "ready to go back", |status| status["ready_to_cutover"] == true).await;
    let back = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    assert_eq!(running.wait().await.code, Some(0));
    assert_eq!(read(&migration.source().await).await, read(&migration.target().await).await);
    migration.assert_equal().await;
}

/// What the trigger wrote, in both directions, is in the stream: fired by the apply as well, there would be more of it.
const FIRING: &str = "
    CREATE TABLE t (id int PRIMARY KEY, n int);
    CREATE TABLE trace (id bigserial PRIMARY KEY, what text);
    CREATE FUNCTION trace() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        NEW.n := NEW.n + 1; INSERT INTO trace (what) VALUES (NEW.id || ' ' || NEW.n); RETURN NEW; END $$;
    CREATE TRIGGER a BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION trace();
    CREATE TRIGGER r BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION trace();
    CREATE RULE w AS ON INSERT TO t DO ALSO INSERT INTO trace (what) VALUES ('rule');
    ALTER TABLE t ENABLE ALWAYS TRIGGER a, ENABLE REPLICA TRIGGER r, ENABLE ALWAYS RULE w;
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 50) i";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fires_in_replica_sessions_is_quiet_for_what_is_applied_there_and_back() {
    let servers = Servers::start().await;
    let migration = servers.migration("firing").await;
    let source = migration.source().await;
    source.batch_execute(FIRING).await.unwrap();
    let before = crate::area::dump(&migration.source_url).await;
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    source
        .batch_execute("UPDATE t SET n = 10 WHERE id < 20; INSERT INTO t VALUES (100, 0); DELETE FROM t WHERE id = 3")
        .await
        .unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let target = migration.target().await;
    let fires = "SELECT string_agg(name || enabled, ' ' ORDER BY name) FROM (SELECT tgname::text, tgenabled::text FROM pg_trigger WHERE NOT tgisinternal \
                 UNION ALL SELECT rulename::text, ev_enabled::text FROM pg_rewrite WHERE rulename = 'w') firing(name, enabled)";
    assert_eq!(target.query_one(fires, &[]).await.unwrap().get::<_, String>(0), "aA rR wA");
    let traces = async |client: tokio_postgres::Client| -> i64 {
        client.query_one("SELECT count(*) FROM trace", &[]).await.unwrap().get(0)
    };
    assert_eq!(traces(migration.source().await).await, traces(migration.target().await).await);
    until_true(&migration.source().await, &format!("SELECT fires = 'aO rO wO' FROM ({fires}) f(fires)")).await;
    target
        .batch_execute("UPDATE t SET n = 20 WHERE id < 10; INSERT INTO t VALUES (101, 0); DELETE FROM t WHERE id = 4")
        .await
        .unwrap();
    migration.wait_for_status(&mut running, "ready to go back", |status| status["ready_to_cutover"] == true).await;
    let back = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    assert_eq!(running.wait().await.code, Some(0));
    migration.assert_equal().await;
    assert_cleans_up(&migration, &before).await;
}

#[tokio::test]
async fn what_would_fire_is_quiet_from_the_moment_that_it_is_made() {
    let servers = Servers::start().await;
    let migration = servers.migration("made").await;
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, p int REFERENCES p); CREATE TABLE trace (id bigserial PRIMARY KEY); \
             CREATE FUNCTION trace() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.trace DEFAULT VALUES; RETURN NULL; END $$; \
             CREATE TRIGGER a AFTER INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION trace(); ALTER TABLE t ENABLE ALWAYS TRIGGER a; \
             SET session_replication_role = replica; INSERT INTO t VALUES (1, 1); RESET session_replication_role",
        )
        .await
        .unwrap();
    // The schema ends at a foreign key that the rows do not hold, behind the trigger.
    let ended = migration.migrate(&[]).wait().await;
    ended.assert_refused(1, &["t_p_fkey"]);
    let target = migration.target().await;
    let enabled = "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'a'";
    assert_eq!(target.query_one(enabled, &[]).await.unwrap().get::<_, String>(0), "O");
    // What is applied before it goes on does not fire it.
    source.batch_execute("INSERT INTO p VALUES (1); UPDATE t SET p = 1; INSERT INTO t VALUES (2, 1)").await.unwrap();
    let running = migration.migrate(&[]);
    migration.cut_over(running).await;
    assert_eq!(target.query_one(enabled, &[]).await.unwrap().get::<_, String>(0), "A");
    let traces = "SELECT count(*) FROM trace";
    assert_eq!(target.query_one(traces, &[]).await.unwrap().get::<_, i64>(0), 3);
}
