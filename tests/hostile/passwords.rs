//! Passwords of every character, given in every way, reach both servers and PostgreSQL's own tools; tokens may change.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use walferry::demo::server::ThrowawayServer;

use crate::support::process::Running;
use crate::support::{Migration, Servers, until};

/// What `pg_hba.conf`, a URL, a service file and SQL each take for something else.
pub const ROLE: &str = "ro\"le's =%é🦀\\:@/";

/// Every printable ASCII character, and more: what SASLprep changes (a ligature, a no-break space), and what it does not.
pub fn every_character(side: &str) -> String {
    let ascii: String = (0x20..0x7f).map(char::from).collect();
    format!("{ascii}ﬁ\u{a0}é密码🦀 {side}")
}

pub fn encoded(value: &str) -> String {
    value.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

fn in_pairs(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn in_password_file(value: &str) -> String {
    value.replace('\\', "\\\\").replace(':', "\\:")
}

/// From now on a server asks everybody but `postgres` for a password, and has a superuser who has one.
pub async fn ask_for_password(server: &ThrowawayServer, role: &str, password: &str) {
    let hba = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
    std::fs::write(server.data_directory().join("pg_hba.conf"), hba).unwrap();
    let administrator = server.connect("postgres").await.unwrap();
    administrator.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    administrator.batch_execute("SET log_statement = none").await.unwrap();
    let (role, password) = (role.replace('"', "\"\""), password.replace('\'', "''"));
    administrator
        .batch_execute(&format!("CREATE ROLE \"{role}\" LOGIN SUPERUSER PASSWORD '{password}'"))
        .await
        .unwrap();
}

/// One way to give passwords: what the options say, and what the environment does.
struct Way {
    name: &'static str,
    source: String,
    target: String,
    more: Vec<String>,
    environment: Vec<(String, String)>,
}

fn private_file(migration: &Migration, name: &str, text: &str) -> PathBuf {
    let path = migration.files().join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

fn ways(servers: &Servers, migration: &Migration, database: &str) -> Vec<Way> {
    let (source, target) = (every_character("source"), every_character("target"));
    let ports = (servers.source.port(), servers.target.port());
    let user = in_pairs(ROLE);
    let pairs = |port: u16| format!("host=127.0.0.1 port={port} dbname={database} user={user}");
    let url = |port: u16, password: &str| {
        format!("postgresql://{}:{}@127.0.0.1:{port}/{database}", encoded(ROLE), encoded(password))
    };
    let file = private_file(
        migration,
        "passwords",
        &format!(
            "# comment\n*:1:*:*:wrong\n127.0.0.1:{}:*:{role}:{}\n127.0.0.1:{}:{database}:{role}:{}\n",
            ports.0,
            in_password_file(&source),
            ports.1,
            in_password_file(&target),
            role = in_password_file(ROLE),
        ),
    );
    let service = |name: &str, port: u16, password: &str| {
        format!("[{name}]\nhost=127.0.0.1\nport={port}\ndbname={database}\nuser={ROLE}\npassword={password}\n\n")
    };
    let services =
        private_file(migration, "services", &(service("old", ports.0, &source) + &service("new", ports.1, &target)));
    let printed = |name: &str, password: &str| private_file(migration, name, &format!("{password}\n"));
    let command = |file: PathBuf| format!("cat '{}'", file.display());
    let home = tempfile::tempdir_in(migration.files()).unwrap().keep();
    std::fs::copy(&file, home.join(".pgpass")).unwrap();
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let variable = |name: &str, value: String| (name.to_owned(), value);
    let way = |name, source: String, target: String| Way { name, source, target, more: vec![], environment: vec![] };
    // One variable for both sides: the target's role has the source's password too, under another name.
    let same = format!("{} ", pairs(ports.1)).replace(&user, "same");
    vec![
        way("URLs", url(ports.0, &source), url(ports.1, &target)),
        way(
            "pairs",
            format!("{} password={}", pairs(ports.0), in_pairs(&source)),
            format!("{} password={}", pairs(ports.1), in_pairs(&target)),
        ),
        Way { environment: vec![variable("PGPASSWORD", source.clone())], ..way("PGPASSWORD", pairs(ports.0), same) },
        Way {
            environment: vec![variable("PGPASSFILE", text(&file))],
            ..way("PGPASSFILE", pairs(ports.0), pairs(ports.1))
        },
        Way { environment: vec![variable("HOME", text(&home))], ..way(".pgpass", pairs(ports.0), pairs(ports.1)) },
        Way {
            environment: vec![variable("PGSERVICEFILE", text(&services))],
            ..way("services", "service=old".to_owned(), "postgresql://?service=new".to_owned())
        },
        Way {
            more: vec![
                "--source-password-command".to_owned(),
                command(printed("source", &source)),
                "--target-password-command".to_owned(),
                command(printed("target", &target)),
            ],
            ..way("commands", pairs(ports.0), pairs(ports.1))
        },
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_of_every_character_is_given_in_every_way_to_every_client() {
    let servers = Servers::start().await;
    ask_for_password(&servers.source, ROLE, &every_character("source")).await;
    ask_for_password(&servers.target, ROLE, &every_character("target")).await;
    ask_for_password(&servers.target, "same", &every_character("source")).await;
    for number in 0.. {
        let database = format!("shop{number}");
        let migration = servers.migration(&database).await;
        let Some(way) = ways(&servers, &migration, &database).into_iter().nth(number) else { break };
        migration
            .source()
            .await
            .batch_execute("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1)")
            .await
            .unwrap();
        let dir = migration.directory().to_str().unwrap().to_owned();
        let run = |command: &str, arguments: &[&str]| {
            let more: Vec<&str> = way.more.iter().map(String::as_str).collect();
            Running::start(&[&[command], arguments, &more].concat(), &migration.files(), &way.environment)
        };
        let both = ["--source", &way.source, "--target", &way.target];
        let more = ["--dir", &dir, "--http-addr", "off", "--queue-max-bytes", "1GiB"];
        let mut running = run("migrate", &[&both[..], &more].concat());
        migration.wait_for_phase(&mut running, "following").await;
        let warned = running.log().contains("shows in the process list");
        assert_eq!(warned, ["URLs", "pairs"].contains(&way.name), "{}: {}", way.name, running.log());
        running.terminate().await;
        // With the directory alone: its strings have no password, and name no service.
        let needs_both = warned || way.name == "services";
        let with_directory: &[&str] =
            if needs_both { &[&both[..], &["--dir", &dir]].concat() } else { &["--dir", &dir] };
        let verified = run("verify", with_directory).wait().await;
        assert_eq!(verified.code, Some(0), "{}: {}", way.name, verified.stderr);
        let cleaned = run("clean", with_directory).wait().await;
        assert_eq!(cleaned.code, Some(0), "{}: {}", way.name, cleaned.stderr);
    }
}

/// A token service of the test's own: a file that is locked while the token changes.
struct Token {
    file: PathBuf,
    lock: PathBuf,
    runs: PathBuf,
}

impl Token {
    fn new(migration: &Migration, side: &str) -> Token {
        let path = |name: &str| migration.files().join(format!("{side}.{name}"));
        Token { file: path("token"), lock: path("lock"), runs: path("runs") }
    }

    fn command(&self) -> String {
        let [file, lock, runs] = [&self.file, &self.lock, &self.runs].map(|path| path.display());
        format!("echo x >> '{runs}'; exec flock '{lock}' sh -c \"cat '{file}'\"")
    }

    fn runs(&self) -> usize {
        std::fs::read_to_string(&self.runs).unwrap_or_default().lines().count()
    }

    fn locked(&self) -> File {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&self.lock).unwrap();
        lock.lock().unwrap();
        lock
    }

    /// The old token is refused from now on; what it let in is ended.
    async fn change(&self, server: &ThrowawayServer, role: &str, token: &str) {
        let administrator = server.connect("postgres").await.unwrap();
        let lock = self.locked();
        administrator.batch_execute(&format!("ALTER ROLE {role} PASSWORD '{token}'")).await.unwrap();
        std::fs::write(&self.file, format!("{token}\r\n")).unwrap();
        drop(lock);
        end_sessions(server).await;
    }
}

async fn end_sessions(server: &ThrowawayServer) {
    let administrator = server.connect("postgres").await.unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'";
    // It may just have left both servers because of the other.
    until("walferry has a session", || async {
        let ended = administrator.query(end, &[]).await.unwrap();
        (!ended.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_changes_is_asked_for_at_each_connect_and_a_token_service_may_be_away() {
    let servers = Servers::start().await;
    for server in [&servers.source, &servers.target] {
        ask_for_password(server, "app", "first").await;
    }
    let mut migration = servers.migration("shop").await;
    let as_app = |url: &str| url.replace("postgres@", "app@");
    let administrator = migration.source().await;
    migration.source_url = as_app(&migration.source_url);
    migration.target_url = as_app(&migration.target_url);
    administrator.batch_execute("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (0)").await.unwrap();
    let (source, target) = (Token::new(&migration, "source"), Token::new(&migration, "target"));
    for token in [&source, &target] {
        std::fs::write(&token.file, "first").unwrap();
    }
    let (of_source, of_target) = (source.command(), target.command());
    let commands = ["--source-password-command", &of_source, "--target-password-command", &of_target];
    let mut running = migration.migrate(&commands);
    migration.wait_for_phase(&mut running, "following").await;
    let beside = servers.target.connect("shop").await.unwrap();
    let arrived = async |id: i32| {
        administrator.execute("INSERT INTO item VALUES ($1)", &[&id]).await.unwrap();
        crate::support::until_true(&beside, &format!("SELECT EXISTS (SELECT FROM item WHERE id = {id})")).await;
    };
    for round in 1..=2 {
        let runs = (source.runs(), target.runs());
        source.change(&servers.source, "app", &format!("source-{round}")).await;
        target.change(&servers.target, "app", &format!("target-{round}")).await;
        arrived(round).await;
        assert!(source.runs() > runs.0 && target.runs() > runs.1);
    }

    // Away for a while: it says so, and goes on.
    for (token, server) in [(&source, &servers.source), (&target, &servers.target)] {
        let away = token.file.with_extension("away");
        std::fs::rename(&token.file, &away).unwrap();
        end_sessions(server).await;
        until("the failing command is named", || async {
            let log = running.log();
            let said = log.contains("the password command for app@") && log.contains("ended with exit status: 1");
            said.then_some(())
        })
        .await;
        std::fs::rename(&away, &token.file).unwrap();
        arrived(token.runs() as i32 + 1000 * i32::from(server.port() == servers.target.port()) + 10).await;
    }
    assert!(running.is_alive(), "{}", running.log());
    for token in ["source-1", "target-2"] {
        assert!(!running.log().contains(token), "{}", running.log());
    }
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());

    // What cannot work is said at once, and what it printed is not.
    let cases = [
        ("yes secret", "printed more than 65536 bytes"),
        ("/no/such/command", "cannot be run"),
        ("true", "printed nothing that can be a password"),
        ("printf 'secret\\000'", "printed nothing that can be a password"),
        ("echo secret; echo to the operator >&2; exit 7", "exit status: 7"),
    ];
    for (command, text) in cases {
        let arguments = ["--source-password-command", command, "--target-password-command", &of_target, "--json"];
        let check = migration.with_servers("check", &arguments).await;
        assert_eq!(check.code, Some(3), "{}", check.stderr);
        assert!(check.stdout.contains(text), "{command}: {}", check.stdout);
        assert!(!check.stdout.contains("secret") || command.contains("yes"), "{}", check.stdout);
        assert_eq!(check.stderr.contains("to the operator"), command.contains("operator"), "{}", check.stderr);
        assert!(!check.stderr.contains("secret"), "{}", check.stderr);
    }
}
