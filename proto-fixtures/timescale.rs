//! The scenarios of TimescaleDB, captured from a server that has the extension. Nothing of it is kept but what its server sent.
//!
//! They are one history of one hypertable, each going on where the one before it ended: `tests/proto_fixtures/timescale.rs` applies
//! them in this order.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio_postgres::Client;
use walferry::demo::server::ServerPrograms;

use super::{Scenario, changes, connect, fixture, with_causes};
use crate::server::Server;

/// The directory of the fixtures, in the place of a version.
pub const DIRECTORY: &str = "timescaledb";

/// What the server is started with besides.
const SETTINGS: &str = "-c shared_preload_libraries=timescaledb -c timescaledb.telemetry_level=off \
     -c timescaledb.max_background_workers=0 -c max_locks_per_transaction=256";

/// As a migration has them, and the tables of the extension's catalog besides: those are in no publication of walferry, which asks the
/// catalog itself, but the fixtures show what stands there when a chunk's rows come.
const PREPARED: [&str; 9] = [
    "CREATE EXTENSION timescaledb",
    "SET timescaledb.enable_chunk_auto_publication = on",
    "SET timescaledb.enable_compressed_direct_batch_delete = off",
    "SET timezone = 'UTC'",
    "CREATE TABLE metrics (time timestamp NOT NULL, device int NOT NULL, value int, PRIMARY KEY (device, time))",
    "SELECT create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    "ALTER TABLE metrics SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    "CREATE PUBLICATION fixtures FOR TABLE metrics, _timescaledb_catalog.chunk, _timescaledb_catalog.dimension_slice",
    "SELECT pg_create_logical_replication_slot('fixtures', 'pgoutput')",
];

const SCENARIOS: [Scenario; 11] = [
    of(
        "new-chunk",
        &[
            "INSERT INTO metrics VALUES ('2025-01-01 01:00', 1, 10), ('2025-01-01 02:00', 1, 20), ('2025-01-01 01:00', 2, 30)",
        ],
    ),
    of("compression", &["SELECT compress_chunk(c) FROM show_chunks('metrics') c"]),
    of("insert-into-compressed", &["INSERT INTO metrics VALUES ('2025-01-01 03:00', 1, 40)"]),
    of("recompression", &["SELECT compress_chunk(c) FROM show_chunks('metrics') c"]),
    of("update-of-compressed", &["UPDATE metrics SET value = 21 WHERE device = 1 AND time = '2025-01-01 02:00'"]),
    of(
        "upsert-of-compressed",
        &[
            "INSERT INTO metrics VALUES ('2025-01-01 01:00', 2, 31) ON CONFLICT (device, time) DO UPDATE SET value = EXCLUDED.value",
        ],
    ),
    of(
        "delete-of-compressed",
        &["SELECT compress_chunk(c) FROM show_chunks('metrics') c", "DELETE FROM metrics WHERE device = 1"],
    ),
    of("decompression", &["SELECT decompress_chunk(c) FROM show_chunks('metrics') c"]),
    // With what the user does in the same transaction, before, between and after the extension's own work.
    of(
        "all-in-one",
        &[
            "BEGIN; INSERT INTO metrics VALUES ('2025-01-01 04:00', 3, 50); SELECT compress_chunk(c) FROM show_chunks('metrics') c; \
           UPDATE metrics SET value = 32 WHERE device = 2; INSERT INTO metrics VALUES ('2025-01-02 01:00', 3, 60); COMMIT",
        ],
    ),
    of(
        "unpublished-chunk",
        &[
            "BEGIN; SET LOCAL timescaledb.enable_chunk_auto_publication = off; INSERT INTO metrics VALUES ('2025-01-03 01:00', 1, 70); COMMIT",
        ],
    ),
    of("dropped-chunks", &["SELECT drop_chunks('metrics', older_than => timestamp '2025-01-02')", "TRUNCATE metrics"]),
];

const fn of(name: &'static str, captured: &'static [&'static str]) -> Scenario {
    Scenario { name, since: 14, setup: &[], captured }
}

/// Every fixture's name and text; nothing, and a loud word about it, where there is no server with the extension.
pub async fn capture() -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let Some(programs) = programs() else {
        eprintln!(
            "\n==== SKIPPED, LEFT AS THEY ARE: the fixtures of TimescaleDB. The extension is not installed for the PostgreSQL of this \
             machine (WALFERRY_PG_BIN names another) ====\n"
        );
        return Ok(Vec::new());
    };
    let major = programs.major().cast_signed();
    let bin = programs.bin("postgres").parent().map(Path::to_path_buf).unwrap_or_default();
    let server = Server::start_with(bin, SETTINGS)?;
    let client = connect(&server).await?;
    for sql in PREPARED {
        client.batch_execute(sql).await.map_err(|error| format!("{sql}: {}", with_causes(&error)))?;
    }
    let version = version(&client).await?;
    let mut files = Vec::new();
    for scenario in &SCENARIOS {
        changes(&server, major, "get", "false").await?;
        for sql in scenario.captured {
            client.batch_execute(sql).await.map_err(|error| format!("{sql}: {}", with_causes(&error)))?;
        }
        for (mode, take, binary) in [("binary", "peek", "true"), ("text", "get", "false")] {
            let messages = changes(&server, major, take, binary).await?;
            files.push((
                format!("{DIRECTORY}/{}.{mode}.txt", scenario.name),
                fixture(scenario, mode, &version, messages)?,
            ));
        }
    }
    Ok(files)
}

/// A server that has the extension.
fn programs() -> Option<ServerPrograms> {
    let programs = ServerPrograms::find(None).ok()?;
    let output = Command::new(programs.bin("pg_config")).arg("--sharedir").output().ok();
    let shared = match output.filter(|output| output.status.success()) {
        Some(output) => PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()),
        // Debian's packages have pg_config only with the development files.
        None => PathBuf::from(format!("/usr/share/postgresql/{}", programs.major())),
    };
    shared.join("extension/timescaledb.control").exists().then_some(programs)
}

async fn version(client: &Client) -> Result<String, Box<dyn Error>> {
    let sql = "SELECT current_setting('server_version') || ' with TimescaleDB ' || extversion FROM pg_extension \
               WHERE extname = 'timescaledb'";
    Ok(client.query_one(sql, &[]).await?.try_get(0)?)
}
