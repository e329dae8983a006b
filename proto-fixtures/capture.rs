//! Captures the fixtures beside this file from throwaway servers of each version, which lie in one directory as
//! scripts/servers.sh gets them: `make fixtures`, or `cargo run --example capture-fixtures -- DIRECTORY`; with names of directories
//! beside this file (`15`, `timescaledb`) behind it, only those.
//!
//! Each scenario runs its SQL once. The same WAL is then decoded twice by the server's own pgoutput, in text and in
//! binary mode, and each goes to one file. README.md explains their form.

mod format;
mod server;
mod timescale;

use std::error::Error;
use std::path::Path;

use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::{Client, NoTls};
use walferry::error::with_causes;

use format::Captured;
use server::Server;

/// What is done on the server, and which file tells of it.
struct Scenario {
    name: &'static str,
    /// The first version that has it.
    since: i32,
    /// Done before, and not captured.
    setup: &'static [&'static str],
    /// Each is sent by itself, and is a transaction of its own.
    captured: &'static [&'static str],
}

/// The column that versions before 12 do not have.
const GENERATED: &str = ", doubled int GENERATED ALWAYS AS (2) STORED";

/// `tests/proto_fixtures.rs` knows what these do, and checks it by meaning.
const SCENARIOS: [Scenario; 8] = [
    Scenario {
        name: "insert",
        since: 10,
        setup: &[
            "CREATE TYPE mood AS ENUM ('calm', 'wild')",
            // aclitem has no send function, so its column comes as text in binary mode too.
            r#"CREATE TABLE "Every kind" (id bigint PRIMARY KEY, price numeric(8,2), "Größe" varchar(20), mood mood,
               access aclitem, data bytea, tags text[], nothing text, doubled int GENERATED ALWAYS AS (2) STORED)"#,
        ],
        captured: &[r#"INSERT INTO "Every kind" VALUES
               (7, 12.50, 'drei "Äpfel"', 'wild', 'postgres=r/postgres', '\x00ff', '{a,NULL}', NULL), (8, NULL, '', NULL, NULL, NULL, NULL, NULL)"#],
    },
    Scenario {
        name: "update",
        since: 10,
        setup: &[
            "CREATE TABLE by_key (id int PRIMARY KEY, note text, big text)",
            // Out of line and not compressed, so that an update which does not touch it leaves it out.
            "ALTER TABLE by_key ALTER big SET STORAGE EXTERNAL",
            "INSERT INTO by_key VALUES (1, 'old', repeat('toast ', 350))",
        ],
        captured: &["UPDATE by_key SET note = 'new'", "UPDATE by_key SET id = 2", "UPDATE by_key SET big = NULL"],
    },
    Scenario {
        name: "update-old-row",
        since: 10,
        setup: &[
            "CREATE TABLE by_row (id int, note text, big text)",
            "ALTER TABLE by_row ALTER big SET STORAGE EXTERNAL, REPLICA IDENTITY FULL",
            "INSERT INTO by_row VALUES (1, 'old', repeat('toast ', 350))",
        ],
        captured: &["UPDATE by_row SET note = 'new'"],
    },
    Scenario {
        name: "delete",
        since: 10,
        setup: &[
            "CREATE TABLE gone_by_key (note text, id int PRIMARY KEY)",
            "CREATE TABLE gone_by_row (note text, id int, nothing text)",
            "ALTER TABLE gone_by_row REPLICA IDENTITY FULL",
            "INSERT INTO gone_by_key VALUES ('old', 1)",
            "INSERT INTO gone_by_row VALUES ('old', 1, NULL)",
        ],
        captured: &["DELETE FROM gone_by_key", "DELETE FROM gone_by_row"],
    },
    Scenario {
        name: "truncate",
        since: 11,
        setup: &[
            "CREATE TABLE single (id int)",
            "CREATE TABLE parent (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)",
            "CREATE TABLE child (parent_id int REFERENCES parent)",
        ],
        captured: &[
            "TRUNCATE single",
            "TRUNCATE parent CASCADE",
            "TRUNCATE single RESTART IDENTITY",
            "TRUNCATE single, parent RESTART IDENTITY CASCADE",
        ],
    },
    Scenario {
        name: "logical-message",
        since: 10,
        setup: &[],
        captured: &[
            "SELECT pg_logical_emit_message(true, 'walferry', 'marker 1')",
            r"SELECT pg_logical_emit_message(false, 'walferry', '\x00ff'::bytea)",
            "SELECT pg_logical_emit_message(false, '', '')",
        ],
    },
    Scenario {
        name: "origin",
        since: 10,
        setup: &["CREATE TABLE replicated (id int)", "SELECT pg_replication_origin_create('elsewhere')"],
        captured: &["SELECT pg_replication_origin_session_setup('elsewhere');
               BEGIN;
               SELECT pg_replication_origin_xact_setup('16/B374D848', '2000-01-01 00:00:01+00');
               INSERT INTO replicated VALUES (1);
               COMMIT;
               SELECT pg_replication_origin_session_reset()"],
    },
    Scenario {
        name: "relation",
        since: 10,
        setup: &[
            "CREATE TABLE identity_default (id int PRIMARY KEY, note text)",
            "CREATE TABLE identity_nothing (id int PRIMARY KEY)",
            "ALTER TABLE identity_nothing REPLICA IDENTITY NOTHING",
            "CREATE TABLE identity_full (id int PRIMARY KEY, note text)",
            "ALTER TABLE identity_full REPLICA IDENTITY FULL",
            "CREATE TABLE identity_index (id int PRIMARY KEY, a int, b varchar(8) NOT NULL CONSTRAINT b_key UNIQUE)",
            "ALTER TABLE identity_index REPLICA IDENTITY USING INDEX b_key",
            "CREATE TABLE no_columns ()",
            r#"CREATE SCHEMA "Lager""#,
            r#"CREATE TABLE "Lager"."the ""big"" table" (id int)"#,
            // The only way to see the empty schema on the wire.
            "CREATE TYPE pg_catalog.size AS ENUM ('small')",
            "CREATE TABLE pg_catalog.built_in (size pg_catalog.size)",
        ],
        captured: &[
            "INSERT INTO identity_default VALUES (1, 'before')",
            "ALTER TABLE identity_default ADD added date; INSERT INTO identity_default VALUES (2, 'after')",
            "INSERT INTO identity_nothing VALUES (1)",
            "INSERT INTO identity_full VALUES (1)",
            "INSERT INTO identity_index VALUES (1, 2, 'b')",
            "INSERT INTO no_columns DEFAULT VALUES",
            r#"INSERT INTO "Lager"."the ""big"" table" VALUES (1)"#,
            "INSERT INTO pg_catalog.built_in VALUES ('small')",
        ],
    },
];

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    // An interruption must not leave the server behind. From here on it no longer ends the process by itself.
    let mut interruption = signal(SignalKind::interrupt())?;
    let servers = std::env::args_os().nth(1).ok_or("the directory of the servers is missing: run `make fixtures`")?;
    let only: Vec<String> = std::env::args().skip(2).collect();
    let is_wanted = |name: &str| only.is_empty() || only.iter().any(|wanted| wanted == name);
    let mut files = Vec::new();
    for major in (10..=18).filter(|major| is_wanted(&major.to_string())) {
        let server = Server::start(Path::new(&servers).join(major.to_string()).join("bin"))?;
        tokio::select! {
            biased;
            _ = interruption.recv() => return Err("interrupted; the fixtures are as they were".into()),
            captured = capture(&server, major) => files.extend(captured.map_err(|error| format!("PostgreSQL {major}: {}", with_causes(error.as_ref())))?),
        }
    }
    if is_wanted(timescale::DIRECTORY) {
        tokio::select! {
            biased;
            _ = interruption.recv() => return Err("interrupted; the fixtures are as they were".into()),
            captured = timescale::capture() => files.extend(captured.map_err(|error| format!("TimescaleDB: {}", with_causes(error.as_ref())))?),
        }
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto-fixtures");
    for (name, text) in files {
        let file = directory.join(&name);
        std::fs::create_dir_all(file.parent().unwrap_or(&directory))?;
        std::fs::write(file, text)?;
        println!("proto-fixtures/{name}");
    }
    Ok(())
}

/// Every fixture's name and text.
async fn capture(server: &Server, major: i32) -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let client = connect(server).await?;
    let version: String = client.query_one("SELECT current_setting('server_version')", &[]).await?.try_get(0)?;
    client.batch_execute("CREATE PUBLICATION fixtures FOR ALL TABLES").await?;
    client.execute("SELECT pg_create_logical_replication_slot('fixtures', 'pgoutput')", &[]).await?;

    let mut files = Vec::new();
    for scenario in SCENARIOS.iter().filter(|scenario| major >= scenario.since) {
        for sql in scenario.setup {
            // There are none before 12.
            let sql = if major < 12 { sql.replace(GENERATED, "") } else { (*sql).to_owned() };
            client.batch_execute(&sql).await.map_err(|error| format!("{sql}: {}", with_causes(&error)))?;
        }
        changes(server, major, "get", "false").await?;
        for sql in scenario.captured {
            client.batch_execute(sql).await.map_err(|error| format!("{sql}: {}", with_causes(&error)))?;
        }
        // The functions read as far as the WAL is flushed. A message outside of a transaction does not flush it; this does.
        client.execute("SELECT pg_switch_wal()", &[]).await?;
        let modes = [("binary", "peek", "true"), ("text", "get", "false")];
        for (mode, take, binary) in modes.into_iter().filter(|(mode, ..)| *mode == "text" || major >= 14) {
            let messages = changes(server, major, take, binary).await?;
            let name = format!("{major}/{}.{mode}.txt", scenario.name);
            files.push((name, fixture(scenario, mode, &version, messages)?));
        }
    }
    Ok(files)
}

async fn connect(server: &Server) -> Result<Client, Box<dyn Error>> {
    let host = server.socket().to_str().ok_or("a directory that is not UTF-8")?;
    let (client, connection) =
        tokio_postgres::Config::new().host(host).user("postgres").dbname("postgres").connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// What pgoutput says about everything since the last `get`; a `peek` leaves it there.
async fn changes(server: &Server, major: i32, take: &str, binary: &str) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let options = if major >= 14 { format!(", 'messages', 'true', 'binary', '{binary}'") } else { String::new() };
    let sql = format!(
        "SELECT data FROM pg_logical_slot_{take}_binary_changes('fixtures', NULL, NULL, 'proto_version', '1',
         'publication_names', 'fixtures'{options})"
    );
    // In a session of its own: pgoutput of old servers leaves something behind in each that it was called in, and fails at the tenth.
    let client = connect(server).await?;
    let rows = client.query(&sql, &[]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

fn fixture(scenario: &Scenario, mode: &str, version: &str, messages: Vec<Vec<u8>>) -> Result<String, Box<dyn Error>> {
    let mut text = format!(
        "# {}, {mode} mode, from PostgreSQL {version}\n# Written by `cargo run --example capture-fixtures`; see README.md.\n#\n",
        scenario.name
    );
    for sql in scenario.captured {
        let lines: Vec<&str> = sql.lines().map(str::trim).collect();
        text.push_str(&format!("#   {};\n", lines.join("\n#     ")));
    }
    let mut captured = Vec::new();
    for bytes in messages {
        let description = format::describe(&walferry::decode::decode(&bytes)?);
        captured.push(Captured { bytes, description });
    }
    for message in &captured {
        text.push('\n');
        text.push_str(&format::write(message));
    }
    if format::read(&text)? != captured {
        return Err(format!("{}: the fixture does not read back as it was written", scenario.name).into());
    }
    Ok(text)
}
