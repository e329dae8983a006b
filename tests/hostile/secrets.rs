//! A whole migration with passwords that are like nothing else, and then a search for them in everything that it wrote, said
//! and started (I10).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use walferry::demo::server::ThrowawayServer;

use crate::passwords::ask_for_password;
use crate::support::http::{self, ask};
use crate::support::process::{Finished, Running};
use crate::support::{Servers, hold_pg_dump, until, until_true};

/// The part of each password that no encoding of URLs changes, and that nothing else on the machine has.
const CORES: [&str; 3] = ["Kq7ZsourceWx93Lm", "Vt4RtargetYb68Np", "Jd5GmistakenHc27Qs"];
const USER: &str = "careful";

fn password(core: &str) -> String {
    format!("%{core}/: @é'\\\"")
}

/// As it stands in a URL: what can stay as it is does.
fn encoded(value: &str) -> String {
    let one =
        |byte: u8| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    value.bytes().map(one).collect()
}

/// A core in plain, as hexadecimal digits, and in base64 at each of its three alignments.
fn disguises(core: &str) -> Vec<String> {
    let mut all = vec![core.to_owned(), core.bytes().map(|byte| format!("{byte:02x}")).collect()];
    for before in 0..3 {
        let bytes = [&b"\0\0"[..before], core.as_bytes()].concat();
        let letters = base64(&bytes);
        // The first and last letters depend on what stands beside.
        all.push(letters[[0, 2, 3][before]..letters.len() - 2].to_owned());
    }
    all
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let letter = |bits: u32| char::from(LETTERS[(bits & 63) as usize]);
    let whole = bytes.chunks(3).filter(|chunk| chunk.len() == 3);
    whole
        .flat_map(|chunk| {
            let bits = chunk.iter().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
            [letter(bits >> 18), letter(bits >> 12), letter(bits >> 6), letter(bits)]
        })
        .collect()
}

/// What was looked through, and where a password was.
#[derive(Default)]
struct Search {
    looked_at: usize,
    found: Vec<String>,
}

impl Search {
    fn text(&mut self, what: &str, bytes: &[u8]) {
        self.looked_at += 1;
        let text = String::from_utf8_lossy(bytes).to_lowercase();
        for core in CORES {
            for disguise in disguises(core) {
                if text.contains(&disguise.to_lowercase()) {
                    self.found.push(format!("{disguise} is in {what}: {}", excerpt(&text, &disguise.to_lowercase())));
                }
            }
        }
    }

    fn files(&mut self, path: &Path) {
        let metadata = std::fs::symlink_metadata(path).unwrap();
        if metadata.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                self.files(&entry.unwrap().path());
            }
        } else if metadata.is_file() && path.file_name() != Some(OsStr::new("password")) {
            self.text(&path.display().to_string(), &std::fs::read(path).unwrap());
        }
    }

    async fn ledger(&mut self, server: &ThrowawayServer) {
        let client = server.connect("shop").await.unwrap();
        let tables = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = 'walferry' AND c.relkind = 'r'";
        let tables = client.query(tables, &[]).await.unwrap();
        assert!(tables.len() > 3);
        for table in tables {
            let table: String = table.get(0);
            let rows = client.query(&format!("SELECT t::text FROM {table} t"), &[]).await.unwrap();
            let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            self.text(&table, rows.join("\n").as_bytes());
        }
    }
}

fn excerpt(text: &str, part: &str) -> String {
    let at = text.find(part).unwrap_or(0);
    text[..at].chars().rev().take(80).collect::<Vec<_>>().into_iter().rev().collect()
}

/// Looks at the command line and the environment of every descendant of processes of ours, all the time.
struct Watch {
    stop: Arc<AtomicBool>,
    /// What was seen, by the program's path.
    seen: Arc<Mutex<BTreeMap<String, Vec<Vec<u8>>>>>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn start() -> Watch {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
        let (stopped, note) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                look(&note);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Watch { stop, seen, thread }
    }

    fn has_seen(&self, program: &str) -> bool {
        self.seen.lock().unwrap().keys().any(|path| path.ends_with(program))
    }

    fn end(self) -> BTreeMap<String, Vec<Vec<u8>>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        Arc::into_inner(self.seen).unwrap().into_inner().unwrap()
    }
}

fn look(seen: &Mutex<BTreeMap<String, Vec<Vec<u8>>>>) {
    let walferry = Path::new(env!("CARGO_BIN_EXE_walferry")).canonicalize().unwrap();
    let mut processes = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        let program = std::fs::read_link(entry.path().join("exe")).unwrap_or_default();
        processes.insert(pid, (parent.unwrap_or(0), program));
    }
    let is_ours = |pid: u32| {
        let mut at = pid;
        for _ in 0..10 {
            let Some((parent, _)) = processes.get(&at) else { return false };
            // Those of this test alone: other walferries may run beside it.
            if processes.get(parent).is_some_and(|(of, program)| *program == walferry && *of == std::process::id()) {
                return true;
            }
            at = *parent;
        }
        false
    };
    for (&pid, (_, program)) in &processes {
        // Between fork and exec a child is still a copy of its parent.
        if !is_ours(pid) || *program == walferry || program.as_os_str().is_empty() {
            continue;
        }
        let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let content = [read("cmdline"), b"\0\n".to_vec(), read("environ")].concat();
        let mut seen = seen.lock().unwrap();
        let of_program = seen.entry(program.display().to_string()).or_default();
        if !of_program.contains(&content) {
            of_program.push(content);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_password_is_in_logs_status_metrics_ledger_directory_or_any_child() {
    let [source_password, target_password, mistaken] = CORES.map(password);
    // What walferry sends to the servers is looked through, too.
    let settings = [("log_statement", "all"), ("log_replication_commands", "on"), ("log_connections", "on")];
    let servers = Servers::with(&settings, &settings).await;
    let mut migration = servers.migration("shop").await;
    let source = servers.source.connect("shop").await.unwrap();
    let tables: String = (0..50).map(|n| format!("CREATE TABLE t{n} (id int PRIMARY KEY, v text);")).collect();
    source.batch_execute(&tables).await.unwrap();
    source.batch_execute("INSERT INTO t1 SELECT i, 'v' || i FROM generate_series(1, 1000) i").await.unwrap();
    ask_for_password(&servers.source, USER, &source_password).await;
    ask_for_password(&servers.target, USER, &target_password).await;

    let url = |port: u16, password: &str| format!("postgres://{USER}:{}@127.0.0.1:{port}/shop", encoded(password));
    let (source_url, target_url) =
        (url(servers.source.port(), &source_password), url(servers.target.port(), &target_password));
    let mistaken_url = url(servers.target.port(), &mistaken);
    let dump = hold_pg_dump(&mut migration);
    let dir = migration.directory().to_str().unwrap().to_owned();
    // One in the option itself, the other in the environment; PGPASSWORD beside them, which nothing needs.
    let environment = [
        &migration.environment[..],
        &[
            ("WALFERRY_TARGET".to_owned(), target_url.clone()),
            ("PGPASSWORD".to_owned(), mistaken.clone()),
            ("WALFERRY_LOG".to_owned(), "walferry=trace,tokio_postgres=trace,rustls=trace,hyper=trace".to_owned()),
        ],
    ]
    .concat();
    let run = |arguments: &[&str]| Running::start(arguments, &migration.files(), &environment);
    let mut all: Vec<Finished> = Vec::new();
    let watch = Watch::start();

    let check = run(&["check", "--source", &source_url, "--queue-max-bytes", "1GiB"]).wait().await;
    assert_eq!(check.code, Some(0), "{}{}", check.stdout, check.stderr);
    all.push(check);
    for command in ["check", "migrate"] {
        let arguments = [command, "--source", &source_url, "--target", &mistaken_url, "--dir", &dir];
        let refused = run(&arguments).wait().await;
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        all.push(refused);
    }
    // On a command line that is wrong, too.
    let in_pairs = format!("host=h user=u password={target_password}");
    let as_number = format!("--copy-jobs={source_url}");
    for wrong in [
        &["check", &source_url][..],
        &["migrate", "--surce", &source_url],
        &["status", "--watch", &target_url],
        &["check", &in_pairs],
        &["check", &as_number],
    ] {
        let refused = run(wrong).wait().await;
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        all.push(refused);
    }

    let migrate =
        ["migrate", "--source", &source_url, "--dir", &dir, "--http-addr", "127.0.0.1:0", "--queue-max-bytes", "1GiB"];
    let mut running = run(&migrate);
    dump.is_reached().await;
    // The real one waits for this, and is looked at.
    source.batch_execute("BEGIN; LOCK TABLE t7 IN ACCESS EXCLUSIVE MODE").await.unwrap();
    dump.release();
    until("pg_dump is seen", || async { watch.has_seen("/pg_dump").then_some(()) }).await;
    let mut search = Search::default();
    search.files(&migration.directory());
    source.batch_execute("COMMIT").await.unwrap();
    migration.wait_for_phase(&mut running, "following").await;
    source.batch_execute("UPDATE t1 SET v = 'changed'").await.unwrap();
    until_true(&servers.target.connect("shop").await.unwrap(), "SELECT bool_and(v = 'changed') FROM t1").await;
    // Reconnecting writes more than running does.
    for server in [&servers.source, &servers.target] {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'";
        server.connect("postgres").await.unwrap().query(end, &[]).await.unwrap();
    }
    source.batch_execute("UPDATE t1 SET v = 'changed again'").await.unwrap();
    until_true(&servers.target.connect("shop").await.unwrap(), "SELECT bool_and(v = 'changed again') FROM t1").await;
    assert!(running.log().contains("shows in the process list"), "{}", running.log());
    let port = http::port(&running);
    for path in ["/metrics", "/status", "/healthz", "/"] {
        let answer = ask(port, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        search.text(path, answer.as_bytes());
    }
    search.ledger(&servers.target).await;
    search.files(&migration.directory());
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    for arguments in [
        &["status", "--dir", &dir, "--json"][..],
        &["status", "--dir", &dir],
        &["cutover", "--dir", &dir, "--yes", "--no-reverse"],
    ] {
        let finished = run(arguments).wait().await;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        all.push(finished);
    }
    all.push(running.wait().await);
    search.ledger(&servers.target).await;
    search.files(&migration.directory());
    for command in ["verify", "clean"] {
        let finished = run(&[command, "--dir", &dir, "--source", &source_url, "--json"]).wait().await;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        all.push(finished);
    }

    for finished in &all {
        search.text("standard output", finished.stdout.as_bytes());
        search.text("standard error", finished.stderr.as_bytes());
    }
    search.files(&migration.files());
    for server in [&servers.source, &servers.target] {
        search.text("a server's log", &std::fs::read(server.log()).unwrap());
    }
    let children = watch.end();
    for needed in ["/pg_dump", "/dash"] {
        let seen =
            children.keys().any(|program| program.ends_with(needed) || (needed == "/dash" && program.ends_with("sh")));
        assert!(seen, "no {needed} in {:?}", children.keys());
    }
    for (program, contents) in &children {
        for content in contents {
            search.text(program, content);
        }
    }
    assert!(search.looked_at > 50, "{}", search.looked_at);
    assert!(search.found.is_empty(), "{:#?}", search.found);
}

#[test]
fn the_search_finds_what_is_hidden_in_every_way() {
    let [core, ..] = CORES;
    let hexadecimal: String = password(core).bytes().map(|byte| format!("{byte:02X}")).collect();
    for shown in [password(core), encoded(&password(core)), hexadecimal]
        .into_iter()
        .chain(["", "x", "xy", "xyz"].map(|before| base64(format!("{before}{}pad", password(core)).as_bytes())))
    {
        let mut search = Search::default();
        search.text("a text", format!("before {shown} after").as_bytes());
        assert!(!search.found.is_empty(), "{shown}");
    }
}
