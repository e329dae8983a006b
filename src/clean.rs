//! Removes what a migration left: slot, publications, ledger, fence and state directory (I9).

use std::time::Duration;

use tokio_postgres::Client;

use crate::backfill;
use crate::connection::ConnectionSpec;
use crate::cutover;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::migrate::{self, application_name};
use crate::source::identity::{self, On};
use crate::source::{ddl, slot};
use crate::state_directory::{LockedDirectory, StateDirectory};
use crate::target::ledger::{self, LedgerTable, Phase, Section, WayBack};
use crate::target::schema;
use crate::timescale;

/// How often, and how far apart, an old server that does not answer is tried again before it counts as gone.
const SOURCE_ATTEMPTS: usize = 5;
const SOURCE_PAUSE: Duration = Duration::from_secs(2);

/// How often it is asked whether a slot is still read, with pauses that double from 100 ms: 6 s in all.
const READ_ATTEMPTS: usize = 6;

/// Something that was removed, for people.
pub type Removed = String;

/// Removes everything that belongs to the migration of a state directory, then the directory.
///
/// # Errors
/// `Blocked` while the migration runs; else what a server or the disk says. What was removed stays removed; run it again.
pub async fn directory(
    path: &std::path::Path,
    source: Option<ConnectionSpec>,
    target: Option<ConnectionSpec>,
    standby: Option<ConnectionSpec>,
) -> Result<Vec<Removed>> {
    let directory = StateDirectory::at(path);
    if !path.is_dir() {
        return Err(Error::new(ErrorKind::Other, format!("there is no state directory {}", path.display()))
            .hint("If it is lost: `walferry clean --source … --target …` finds on the servers what is left."));
    }
    let locked = lock(&directory)?;
    // From here on nobody runs in it.
    let Some(identity) = directory.identity()? else {
        locked.remove()?;
        return Ok(vec![format!("state directory {}", path.display())]);
    };
    let given = |spec: Option<ConnectionSpec>, known: &str| spec.map_or_else(|| ConnectionSpec::parse(known), Ok);
    let (source, target) = (given(source, &identity.source)?, given(target, &identity.target)?);
    let mut removed = servers(&source, &target, standby.as_ref(), Some(&identity.id)).await?;
    // Where the ledger is gone, and with it what it knew.
    let started = timescale::pause::resume_noted_in(path, &source, true).await?;
    removed.extend(started.into_iter().map(|job| job_rests_no_more(&job)));
    locked.remove()?;
    removed.push(format!("state directory {}", path.display()));
    Ok(removed)
}

fn lock(directory: &StateDirectory) -> Result<LockedDirectory> {
    directory.lock().map_err(|error| match error.kind() {
        ErrorKind::Blocked => Error::new(ErrorKind::Blocked, "the migration is still running")
            .hint("Stop it first (Ctrl-C or SIGTERM); after a cutover `walferry finish` ends it."),
        _ => error,
    })
}

/// Removes from both servers what belongs to one migration, or to the one that the target's ledger names.
///
/// # Errors
/// What a server says.
pub async fn servers(
    source: &ConnectionSpec,
    target: &ConnectionSpec,
    standby: Option<&ConnectionSpec>,
    id: Option<&str>,
) -> Result<Vec<Removed>> {
    let to = target.connect("walferry").await?;
    if ledger::load(&to).await?.is_some() && cutover::may_refuse_connections(&to).await? {
        // Behind the fence `connections` the source refuses us too.
        cutover::open_for_good(source, &to).await?;
    }
    let mut removed = Vec::new();
    let migration = ledger::load(&to).await?;
    if let (Some(migration), Some(id)) = (&migration, id)
        && migration.id != id
    {
        return Err(Error::new(
            ErrorKind::Blocked,
            format!("the target holds the ledger of another migration ({})", migration.id),
        )
        .hint("Run clean with that migration's --dir."));
    }
    let cut_over = migration.as_ref().is_some_and(|migration| migration.phase == Phase::CutOver);
    if let Some(standby) = standby {
        let id = id.or(migration.as_ref().map(|migration| migration.id.as_str()));
        on_standby(standby, id, &mut removed).await?;
    }
    let mut connected = source.connect("walferry").await;
    for _ in 0..SOURCE_ATTEMPTS {
        if !cut_over || !connected.as_ref().is_err_and(Error::is_transient) {
            break;
        }
        // It may only be restarting, and then nothing is to be left on it.
        tokio::time::sleep(SOURCE_PAUSE).await;
        connected = source.connect("walferry").await;
    }
    let from = match (connected, &migration) {
        (Ok(from), _) => from,
        // After the cutover the old server may be gone for good.
        (Err(error), Some(migration)) if cut_over && error.is_transient() => {
            return without_source(&to, migration, source, &error).await;
        }
        (Err(error), _) => return Err(error),
    };
    let back = if migration.is_some() { ledger::load(&from).await? } else { None };
    let back = back.filter(|back| migration.as_ref().is_some_and(|migration| migration.id == back.id));
    let reversed = cut_over && back.as_ref().is_some_and(|back| back.phase == Phase::CutOver);
    if cut_over && !reversed && migration.as_ref().is_some_and(|migration| migration.way_back == Some(WayBack::Armed)) {
        return Err(is_armed());
    }
    if let (None, Some(migration)) = (id, &migration) {
        is_not_read(&from, &migration.id).await?;
    }
    if let Some(id) = id.map(str::to_owned).or_else(|| migration.as_ref().map(|migration| migration.id.clone())) {
        // A statement of ours there may be at work still: a server looks for its client only after it.
        migrate::end_sessions(&to, &application_name(&id)).await?;
        let noted = match migration {
            Some(_) => Vec::new(),
            None => identity::noted(&from, &format!("walferry_{id}")).await?,
        };
        source_of(&from, &id, &mut removed).await?;
        give_identities_back((&from, &to), &noted, &mut removed).await?;
    } else {
        for id in orphans(&from, "").await? {
            // Of several migrations from this database another may be at work.
            is_not_read(&from, &id).await?;
            let noted = identity::noted(&from, &format!("walferry_{id}")).await?;
            source_of(&from, &id, &mut removed).await?;
            give_identities_back((&from, &to), &noted, &mut removed).await?;
        }
        for id in orphans(&to, "_back").await? {
            let names = cutover::arming::Names::of(&id);
            removed.extend(names.remove(&to).await?.into_iter().map(|what| format!("{what} on the target")));
        }
    }
    let Some(migration) = migration else {
        removed.extend(backfill::ledger::remove(&to).await?);
        return Ok(removed);
    };
    let of_the_way_back = cutover::arming::Names::of(&migration.id).remove(&to).await?;
    removed.extend(of_the_way_back.into_iter().map(|what| format!("{what} on the target")));
    if reversed {
        // The source is the primary again; who is closed now is the target.
        if cutover::open_for_good(target, &from).await? {
            removed.push(format!("fence: the database {} on the target takes writes again", target.database()));
        }
    } else if cutover::open_for_good(source, &to).await? {
        removed.push(format!("fence: the database {} on the source takes writes again", source.database()));
    }
    if back.is_some() && !reversed && cutover::open_for_good(target, &from).await? {
        removed.push(format!(
            "fence of a switchback: the database {} on the target takes writes again",
            target.database()
        ));
    }
    if timescale::unseen::remove(source, &from, "walferry").await? {
        removed.push("triggers that keep changes of compressed rows in the stream, on the source".into());
    }
    for (server, side) in [(&from, "source"), (&to, "target")] {
        if cutover::guard::remove(server).await? {
            removed.push(format!("triggers that refuse writes to tables that have moved, on the {side}"));
        }
    }
    if back.is_some() {
        if cut_over && !reversed {
            // What the way back changed on the old server.
            give_back(&from, &ledger::tables(&from).await?).await;
        }
        from.batch_execute("DROP SCHEMA walferry CASCADE")
            .await
            .context(|| "removing the ledger of the way back from the source".into())?;
        removed.push("schema walferry (the ledger of the way back) on the source".into());
    }
    if !cut_over {
        // What the migration changed on the target for its own time only.
        give_back(&to, &ledger::tables(&to).await?).await;
    }
    let identities = ledger::replica_identities(&to).await?;
    give_identities_back((&from, &to), &identities, &mut removed).await?;
    removed.extend(timescale::prepare::put_back(&from, &to).await?);
    let started = timescale::pause::resume(&from, &to).await?;
    removed.extend(started.into_iter().map(|job| job_rests_no_more(&job)));
    say_what_is_not_validated(&to, &mut removed).await?;
    to.batch_execute("DROP SCHEMA walferry CASCADE").await.context(|| "removing the ledger from the target".into())?;
    removed.push("schema walferry (the ledger) on the target".into());
    Ok(removed)
}

fn job_rests_no_more(job: &str) -> Removed {
    format!("the rest of the source's TimescaleDB job {job}, which runs again")
}

/// What tables were identified by before the migration, on both servers.
async fn give_identities_back(
    (from, to): (&Client, &Client),
    identities: &[identity::Before],
    removed: &mut Vec<Removed>,
) -> Result<()> {
    for (server, on, side) in [(from, On::Source, "source"), (to, On::Target, "target")] {
        let restored = identity::restore(server, identities, on).await?;
        removed.extend(restored.into_iter().map(|table| format!("REPLICA IDENTITY FULL of {table} on the {side}")));
    }
    Ok(())
}

/// The ledger is all that knows of it (H23).
async fn say_what_is_not_validated(target: &Client, removed: &mut Vec<Removed>) -> Result<()> {
    let left = ledger::pending_items(target, Section::AfterCutover).await?;
    removed.extend(left.into_iter().map(|(_, item)| {
        format!("the task to validate the {}; it is left to you: {}", item.name, item.statement.replace('\n', " "))
    }));
    Ok(())
}

/// Identity columns, triggers and rules as they were, where a migration made them other for its own time only.
async fn give_back(server: &Client, tables: &[LedgerTable]) {
    let tables: Vec<_> = tables.iter().map(|entry| entry.table.clone()).collect();
    for statement in schema::restore_identity(&tables) {
        // A table that is gone has nothing to give back.
        if let Err(error) = server.batch_execute(&statement).await {
            tracing::debug!(%error, statement, "an identity column, trigger or rule was not given back");
        }
    }
}

/// Without its state directory, whose lock would say so, a running migration is known by its slot, which is read.
async fn is_not_read(source: &Client, id: &str) -> Result<()> {
    let name = format!("walferry_{id}");
    let query = "SELECT s.active_pid, coalesce(pg_catalog.host(a.client_addr), 'a local socket') FROM pg_catalog.pg_replication_slots s \
                 LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1 AND s.active";
    let mut pause = Duration::from_millis(100);
    for _ in 0..READ_ATTEMPTS {
        let read =
            source.query_opt(query, &[&name]).await.context(|| format!("looking whether the slot {name} is read"))?;
        let Some(row) = read else { return Ok(()) };
        let (pid, place): (Option<i32>, String) = (row.get(0), row.get(1));
        tracing::debug!(pid, place, "the slot {name} is read");
        // One that was killed a moment ago is noticed as soon as the server writes to it, or hears that it is gone.
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    Err(Error::new(ErrorKind::Blocked, format!("the migration is still running: its slot {name} is being read")).hint(
        "Stop it first where it runs (Ctrl-C or SIGTERM), or give its --dir; after a cutover `walferry finish` ends it. If its machine is gone, \
         the server notices within its wal_sender_timeout (a minute): run the same command again then. SELECT client_addr FROM pg_stat_replication \
         on the source says where it is.",
    ))
}

fn is_armed() -> Error {
    Error::new(ErrorKind::Blocked, "the way back is armed: the old server is kept current")
        .hint("`walferry finish` ends the way back; then `walferry clean` removes what is left.")
}

/// Of a migration that has been cut over, what is on the new server.
async fn without_source(
    target: &Client,
    migration: &ledger::Migration,
    source: &ConnectionSpec,
    error: &Error,
) -> Result<Vec<Removed>> {
    if migration.way_back == Some(WayBack::Armed) {
        return Err(is_armed());
    }
    let removed = cutover::arming::Names::of(&migration.id).remove(target).await?;
    let mut removed: Vec<Removed> = removed.into_iter().map(|what| format!("{what} on the target")).collect();
    let identities = ledger::replica_identities(target).await?;
    let restored = identity::restore(target, &identities, On::Target).await?;
    removed.extend(restored.into_iter().map(|table| format!("REPLICA IDENTITY FULL of {table} on the target")));
    say_what_is_not_validated(target, &mut removed).await?;
    target
        .batch_execute("DROP SCHEMA walferry CASCADE")
        .await
        .context(|| "removing the ledger from the target".into())?;
    removed.push("schema walferry (the ledger) on the target".into());
    tracing::warn!(
        "the old server cannot be reached ({error}). Should it come back: `walferry clean --source … --target …` removes its slot, and \
         ALTER DATABASE {} RESET default_transaction_read_only lets it take writes again",
        crate::sql::identifier(source.database())
    );
    Ok(removed)
}

/// The slot on a standby, which may be gone like any server: what is on the others goes all the same.
async fn on_standby(standby: &ConnectionSpec, id: Option<&str>, removed: &mut Vec<Removed>) -> Result<()> {
    let place = standby.describe();
    let session = match standby.connect("walferry").await {
        Err(error) if error.is_transient() => {
            tracing::warn!(
                "the standby {place} cannot be reached ({error}). Should it come back, its slot keeps WAL: \
                 SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'walferry\\_%'"
            );
            return Ok(());
        }
        session => session?,
    };
    let ids = match id {
        Some(id) => vec![id.to_owned()],
        None => orphans(&session, "").await?,
    };
    for id in ids {
        let name = format!("walferry_{id}");
        migrate::end_sessions(&session, &application_name(&id)).await?;
        if slot::state(&session, &name).await?.is_some() {
            slot::drop(&session, &name).await?;
            removed.push(format!("slot {name} on the standby {place}"));
        }
    }
    Ok(())
}

async fn source_of(source: &Client, id: &str, removed: &mut Vec<Removed>) -> Result<()> {
    let name = format!("walferry_{id}");
    migrate::end_sessions(source, &application_name(id)).await?;
    if slot::state(source, &name).await?.is_some() {
        slot::drop(source, &name).await?;
        removed.push(format!("slot {name} on the source"));
    }
    removed.extend(ddl::remove(source, id).await?.into_iter().map(|what| format!("{what} on the source")));
    let inserts = format!("{name}_inserts");
    let publications = source
        .query("SELECT pubname FROM pg_catalog.pg_publication WHERE pubname IN ($1, $2) ORDER BY 1", &[&name, &inserts])
        .await
        .context(|| "looking for publications on the source".into())?;
    slot::drop_publications(source, &name, &inserts).await?;
    removed.extend(publications.iter().map(|row| format!("publication {} on the source", row.get::<_, &str>(0))));
    Ok(())
}

/// Ids of migrations whose slot or publication is in this database, though no ledger names them; those of a way back have `_back`
/// in their names.
async fn orphans(server: &Client, way: &str) -> Result<Vec<String>> {
    let rows = server
        .query(
            "SELECT DISTINCT substr(name, 10, 8) FROM ( \
                 SELECT slot_name::text FROM pg_catalog.pg_replication_slots WHERE database = pg_catalog.current_database() AND NOT active \
                 UNION ALL SELECT pubname::text FROM pg_catalog.pg_publication \
                 UNION ALL SELECT 'walferry_' || substr(nspname, 14) FROM pg_catalog.pg_namespace \
                     WHERE nspname LIKE 'walferry\\_ddl\\_%') names(name) \
             WHERE name ~ ('^walferry_[0-9a-f]{8}' || $1 || '(_inserts)?$')",
            &[&way],
        )
        .await
        .context(|| "looking for what migrations left".into())?;
    Ok(rows.into_iter().map(|row| row.get(0)).collect())
}
