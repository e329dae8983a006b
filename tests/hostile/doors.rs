//! Who may look into a running migration: nobody but its user, and over HTTP whoever is told to, for reading only.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use crate::support::http::{self, ask};
use crate::support::process::{Finished, Running};
use crate::support::{Migration, Servers};

/// The migration's row; its way back is prepared in its own time.
const LEDGER: &str = "SELECT (to_jsonb(m) - 'way_back')::text FROM walferry.migration m";
const TABLES: &str = "CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item SELECT i, 'name ' || i FROM generate_series(1, 1000) i";

/// The directory and everything in it, with what others may do with it.
fn modes(path: &Path, found: &mut Vec<(PathBuf, u32)>) {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    found.push((path.to_owned(), metadata.mode() & 0o7777));
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            modes(&entry.unwrap().path(), found);
        }
    }
}

/// `walferry migrate` in a shell that lets everybody read and write what it makes.
fn migrate_openly(migration: &Migration) -> Running {
    let program = migration.files().join("open-walferry");
    let script = format!("#!/bin/sh\numask 000\nexec '{}' \"$@\"\n", env!("CARGO_BIN_EXE_walferry"));
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let directory = migration.directory();
    let arguments = ["migrate", "--source", &migration.source_url, "--target", &migration.target_url];
    let more = ["--dir", directory.to_str().unwrap(), "--http-addr", "127.0.0.1:0", "--queue-max-bytes", "1GiB"];
    Running::start_program(&program, &[&arguments[..], &more[..]].concat(), &migration.files(), &[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_migration_writes_is_for_its_user_alone_and_http_only_reads() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    migration.source().await.batch_execute(TABLES).await.unwrap();
    let mut running = migrate_openly(&migration);
    migration.wait_for_phase(&mut running, "following").await;
    migration.with_directory("pause", &["apply"]).await;
    migration.with_directory("resume", &[]).await;
    let mut found = Vec::new();
    modes(&migration.directory(), &mut found);
    let names: Vec<_> = found.iter().filter_map(|(path, _)| path.file_name()?.to_str()).collect();
    for needed in ["state", "queue", "control.sock", "migration.json", "status.json", "paused.json", "lock"] {
        assert!(names.contains(&needed), "{needed} is not in {names:?}");
    }
    assert!(
        names.iter().any(|name| name.ends_with(".seg") || name.chars().any(|letter| letter.is_ascii_digit())),
        "a segment: {names:?}"
    );
    for (path, mode) in found {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, expected, "mode of {}: {mode:o}", path.display());
    }

    // Every method on every path: nothing but GET and HEAD is known, and nothing happens.
    let port = http::port(&running);
    let before = migration.ledger(LEDGER).await[0].get::<_, String>(0);
    for path in [
        "/",
        "/status",
        "/metrics",
        "/healthz",
        "/cutover",
        "/pause",
        "/resume",
        "/clean",
        "/control.sock",
        "/../lock",
        "/%2e%2e/lock",
    ] {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "CUTOVER"] {
            let known = ["/", "/status", "/metrics", "/healthz"].contains(&path);
            let code = code(
                port,
                &format!(
                    "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 21\r\n\r\n{{\"command\":\"cutover\"}}"
                ),
            );
            assert!(
                code == if known { 405 } else { 404 } || (method == "CONNECT" && (400..500).contains(&code)),
                "{method} {path}: {code}"
            );
        }
    }
    let mut strangers = Vec::new();
    for begun in ["", "GET /metrics HTTP/1.1\r\nX: ", "\0\0\0\x03\x01\u{ff}", "GET"].into_iter().cycle().take(60) {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(begun.as_bytes()).unwrap();
        strangers.push(stream);
    }
    // Not one open file more than it may have for them, and the migration goes on.
    let files = std::fs::read_dir(format!("/proc/{}/fd", running.id())).unwrap().count();
    assert!(files < 60, "{files} open files");
    migration.source().await.batch_execute("UPDATE item SET name = 'changed'").await.unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let after = migration.ledger(LEDGER).await[0].get::<_, String>(0);
    assert_eq!(after, before);
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

fn code(port: u16, request: &str) -> u16 {
    let answer = ask(port, request);
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{request}: {answer}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_directory_that_others_can_reach_is_mended_or_refused() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    migration.source().await.batch_execute(TABLES).await.unwrap();
    let start = async |migration: &Migration| -> Finished { migration.migrate(&[]).wait().await };
    let make = |migration: &Migration, mode: u32| {
        std::fs::create_dir(migration.directory()).unwrap();
        std::fs::set_permissions(migration.directory(), PermissionsExt::from_mode(mode)).unwrap();
    };
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;

    // Others' files are in it: it is used for something else, and what others may do there is not ours to decide.
    migration.state = "shared".to_owned();
    make(&migration, 0o755);
    std::fs::write(migration.directory().join("letter"), "").unwrap();
    start(&migration).await.assert_refused(3, &["is open to others (mode 0755)", "--dir"]);
    assert_eq!(mode(&migration.directory()), 0o755);
    assert_eq!(std::fs::read_dir(migration.directory()).unwrap().count(), 1, "nothing was written into it");

    // A link, also with a slash behind it, and also into nowhere.
    let (real, nowhere) = (migration.files().join("real"), migration.files().join("nowhere"));
    std::fs::create_dir(&real).unwrap();
    for (link, to) in [("link", &real), ("dangling", &nowhere)] {
        symlink(to, migration.files().join(link)).unwrap();
        for slash in ["", "/"] {
            migration.state = format!("{link}{slash}");
            start(&migration).await.assert_refused(3, &["is a symbolic link", "--dir"]);
        }
    }
    assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
    assert!(!nowhere.exists());

    // Another user's.
    if rustix::process::geteuid().is_root() {
        migration.state = "strange".to_owned();
        make(&migration, 0o700);
        chown(migration.directory(), Some(65_534), None).unwrap();
        start(&migration).await.assert_refused(3, &["belongs to another user (uid 65534)", "--dir"]);
        assert_eq!(std::fs::read_dir(migration.directory()).unwrap().count(), 0);
    }

    // An empty one is taken, and made private; so is one that was opened while nobody looked.
    migration.state = "prepared".to_owned();
    make(&migration, 0o777);
    std::fs::create_dir(migration.directory().join("lost+found")).unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    assert_eq!(mode(&migration.directory()), 0o700);
    assert!(running.log().contains("was open to others (mode 0777)"), "{}", running.log());
    running.terminate().await;
    std::fs::set_permissions(migration.directory(), PermissionsExt::from_mode(0o750)).unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    assert_eq!(mode(&migration.directory()), 0o700);
}
