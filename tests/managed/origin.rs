//! H23: rows are written without `session_replication_role`, so nothing is there that fires.

use crate::service::{RDS, superuser, url};
use crate::shop::{self, Application};
use crate::support::{Servers, until, until_true};

/// By somebody who is not held by anything.
const ORPHAN: &str = "INSERT INTO shop.item (id, owner, place) OVERRIDING SYSTEM VALUE VALUES (-1, -1, 1)";

#[tokio::test]
async fn h23_foreign_keys_come_with_the_cutover_are_looked_at_before_and_validated_after() {
    let servers = Servers::start().await;
    let migration = RDS.migration(&servers).await;
    shop::fill(&superuser(&servers.source).await).await;
    let application = Application::start(&url(&servers.source, "app", "app"), 2);
    let mut running = migration.migrate(&["--no-reverse"]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let target = superuser(&servers.target).await;
    assert_eq!(shop::what_fires(&target).await, [""; 0]);

    target.batch_execute(ORPHAN).await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["shop.item", "item_owner_fkey", "no parent"]);
    target.batch_execute("DELETE FROM shop.item WHERE id = -1").await.unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;

    // What the decision is to make no longer fits once a column has another name on both sides: found before the fence, with what mends it.
    let rename = "ALTER TABLE shop.rental RENAME room TO chamber";
    target.batch_execute(rename).await.unwrap();
    superuser(&servers.source)
        .await
        .batch_execute(&format!("{rename}; INSERT INTO shop.rental VALUES (3, 2)"))
        .await
        .unwrap();
    until_true(&target, "SELECT count(*) = 3 FROM shop.rental").await;
    migration.ready_but_for_the_source(&mut running).await;
    let waived = ["constraint rental_room_fkey of table shop.rental", "trigger rented on table shop.rental"];
    let waived = ["--no-reverse", "--waive", waived[0], "--waive", waived[1]];
    let rehearsed = migration.with_directory("cutover", &[&["--dry-run"], &waived[..]].concat()).await;
    assert_eq!(rehearsed.code, Some(0), "{}\n{}", rehearsed.stdout, running.log());
    for made in ["TRIGGER rental rented", "FK CONSTRAINT rental rental_room_fkey"] {
        assert!(running.log().contains(&format!("{made} is made as the source has it now")), "{}", running.log());
    }
    // What nothing mends but an operator is refused before the fence, and its text is not shown: it may hold a password.
    target
        .batch_execute(
            "BEGIN; CREATE TRIGGER counted BEFORE UPDATE ON shop.item FOR EACH ROW EXECUTE FUNCTION shop.never(); \
             ALTER TABLE shop.item DISABLE TRIGGER counted; COMMIT",
        )
        .await
        .unwrap();
    let given_up = migration.with_directory("cutover", &[&["--yes"], &waived[..]].concat()).await;
    given_up.assert_refused(5, &["TRIGGER item counted", "already exists", "before the fence", "Nothing was touched"]);
    assert!(!given_up.stderr.contains("EXECUTE FUNCTION"), "{}", given_up.stderr);
    target.batch_execute("DROP TRIGGER counted ON shop.item").await.unwrap();

    // Behind the fence nobody looks any more.
    let psql = walferry::demo::server::ServerPrograms::find(None).unwrap().bin("psql");
    let command = format!("{} -X -q -d {} -c '{ORPHAN}'", psql.display(), servers.target.url_for("app"));
    let arguments = ["--yes", "--max-write-stall", "25s", "--on-fence", &command];
    let cutover = migration.with_directory("cutover", &[&arguments, &waived[..]].concat()).await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("item_owner_fkey"), "{}", ended.stderr);
    application.has_ended().await;
    let left = "SELECT name FROM walferry.schema_item WHERE section = 'after-cutover' AND NOT done";
    let left: Vec<String> = target.query(left, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(
        left,
        ["constraint item_owner_fkey of table shop.item", "constraint \"the Visitor\" of table shop.visit"]
    );
    assert_eq!(shop::not_valid(&target).await, ["item_owner_fkey", "of_customer"]);
    let attention = migration.status().await.unwrap()["attention"].to_string();
    assert!(attention.contains("item_owner_fkey"), "{attention}");

    // It holds for what is written from now on, and the next start goes on.
    let orphan = target.batch_execute("INSERT INTO shop.item VALUES (-2, -2, 1)").await.unwrap_err();
    assert_eq!(orphan.code().map(|code| code.code()), Some("23503"));
    target.batch_execute("SET session_replication_role = replica; DELETE FROM shop.item WHERE id = -1").await.unwrap();
    let again = migration.migrate(&["--no-reverse"]).wait().await;
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert_eq!(shop::not_valid(&target).await, ["of_customer"]);
    shop::is_the_same_on_both_sides(&migration).await;
}

#[tokio::test]
async fn h23_the_way_back_knows_what_the_cutover_has_made() {
    let servers = Servers::start().await;
    let migration = RDS.migration(&servers).await;
    let beside = servers.source.connect("postgres").await.unwrap();
    beside.batch_execute("GRANT SET ON PARAMETER session_replication_role TO walferry").await.unwrap();
    shop::fill(&superuser(&servers.source).await).await;
    let mut running = migration.migrate(&[]);
    let ready = |status: &serde_json::Value| status["ready_to_cutover"] == true && status["way_back"] == "ready";
    migration.wait_for_status(&mut running, "ready with a way back", ready).await;
    let no_superuser =
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'app' AND usename = 'postgres')";
    until_true(&beside, no_superuser).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());

    let target = superuser(&servers.target).await;
    until("all foreign keys are validated", || async {
        (shop::not_valid(&target).await == ["of_customer"]).then_some(())
    })
    .await;
    for number in 1..=20 {
        target.batch_execute(&format!("SELECT shop.work(9, {number})")).await.unwrap();
    }
    drop(target);
    until_true(&servers.target.connect("postgres").await.unwrap(), no_superuser).await;
    let ready =
        |status: &serde_json::Value| status["ready_to_cutover"] == true && status["attention"] == serde_json::json!([]);
    migration.wait_for_status(&mut running, "ready to switch back", ready).await;
    let back = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    shop::is_the_same_on_both_sides(&migration).await;
    let source = superuser(&servers.source).await;
    let orphan = source.batch_execute("INSERT INTO shop.item VALUES (-2, -2, 1)").await.unwrap_err();
    assert_eq!(orphan.code().map(|code| code.code()), Some("23503"));
}

#[tokio::test]
async fn h19_in_the_origin_role_a_deferrable_constraint_may_be_broken_within_a_batch_and_not_at_its_end() {
    let servers = Servers::start().await;
    let migration = RDS.migration(&servers).await;
    let (source, target) = (superuser(&servers.source).await, superuser(&servers.target).await);
    let seats = "SET ROLE app_owner; CREATE SCHEMA shop; CREATE TABLE shop.seat (id int PRIMARY KEY, place int UNIQUE DEFERRABLE); \
         INSERT INTO shop.seat SELECT i, i FROM generate_series(1, 10) i";
    source.batch_execute(seats).await.unwrap();
    let mut running = migration.migrate(&["--no-reverse"]);
    // The session of this test stands against a cutover.
    migration.ready_but_for_the_source(&mut running).await;
    for _ in 0..5 {
        source.batch_execute("UPDATE shop.seat SET place = 11 - place").await.unwrap();
    }
    source.batch_execute("INSERT INTO shop.seat VALUES (11, 11)").await.unwrap();
    until_true(&target, "SELECT sum(place * id) = 341 AND max(id) = 11 FROM shop.seat").await;
    assert!(!running.log().contains("row by row"), "{}", running.log());

    target.batch_execute("INSERT INTO shop.seat VALUES (100, 77)").await.unwrap();
    source.batch_execute("INSERT INTO shop.seat VALUES (12, 77)").await.unwrap();
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("seat_place_key"), "{}", ended.stderr);
}
