//! A target that follows is warm: analysed and vacuumed.

use crate::support::load::{self, Application};
use crate::support::{Servers, until_true};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_follows_is_vacuumed_and_analysed() {
    let servers = Servers::with(&[], &[("autovacuum", "off")]).await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 500).await;
    let source = migration.source().await;
    // In ranges, so not frozen; large enough that a vacuum with its delays takes a while.
    let large = "CREATE TABLE public.large (id int PRIMARY KEY, body text); \
                 INSERT INTO public.large SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n; ANALYZE public.large";
    source.batch_execute(large).await.unwrap();
    let application = Application::start(&migration.source_url, 1);
    let mut running = migration.migrate(&["--split-above", "4MiB"]);
    migration.wait_for_phase(&mut running, "following").await;
    let target = migration.target().await;
    until_true(&target, "SELECT last_vacuum IS NOT NULL FROM pg_stat_user_tables WHERE relname = 'large'").await;
    // At the second vacuum where a snapshot was older than the rows at the first.
    until_true(&target, "SELECT relallvisible * 2 >= relpages FROM pg_class WHERE relname = 'large'").await;
    let never = "SELECT count(*) = 0 FROM pg_stat_user_tables \
                 WHERE schemaname IN ('app', 'public') AND pg_relation_size(relid) > 0 AND last_analyze IS NULL";
    until_true(&target, never).await;
    application.goes_on(10).await;
    application.stop().await;

    let cutover = migration.with_directory("cutover", &["--yes", "--no-reverse", "--prewarm"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let (_, said) = ended.stderr.split_once("prewarmed ").expect("it says what it read");
    let relations: u32 = said.split(' ').next().unwrap().parse().unwrap();
    assert!(relations > 3, "{relations} relations");
    migration.assert_equal().await;
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    until_true(&target, "SELECT count(*) = 0 FROM pg_extension WHERE extname = 'pg_prewarm'").await;
}
