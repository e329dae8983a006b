//! Which migration this is: a new one, or one that goes on.

use super::{Config, Heal};
use crate::care::connections::Jobs;
use crate::check::{self, Severity};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;
use crate::source::identity;
use crate::source::replication::ReplicationSession;
use crate::source::scope::Scope;
use crate::source::slot;
use crate::state_directory::{FIRST_QUEUE, Identity, LockedDirectory};
use crate::target::ddl;
use crate::target::ledger::{self, Migration, Phase};
use crate::target::role::ApplyRole;
use crate::timescale;

/// How long the sessions of a process that died may take to end.
const ALONE_WITHIN_SECONDS: u32 = 15;

/// Compares the state directory with the target's ledger, and checks both servers. Only when nothing stands against it is
/// anything written: first the directory, then the ledger. Answers what the migration's sessions call themselves.
pub(super) async fn identify(
    config: &Config,
    jobs: Jobs,
    directory: &LockedDirectory,
    board: &StatusBoard,
) -> Result<String> {
    let identity = directory.directory().identity()?;
    if let Some(identity) = &identity {
        identity.scope.prove_same(&config.scope)?;
    }
    let recorded = match config.target.connect("walferry").await {
        Ok(mut target) => {
            let migration = ledger::load(&target).await?;
            // Begun, but never prepared: nothing of it counts.
            match (migration, &identity) {
                (Some(migration), Some(identity))
                    if migration.id == identity.id && migration.consistent_point.is_none() =>
                {
                    // What died in the middle of it may still hold the ledger's locks (H18).
                    super::prepare::end_sessions(&target, &application_name(&migration.id)).await?;
                    give_back_to_the_source(config, &target, &application_name(&migration.id)).await?;
                    remove_unprepared(&mut target).await?;
                    None
                }
                (migration, _) => migration,
            }
        }
        // Begun: what the target's ledger says decides, and nothing else may.
        Err(error) if identity.is_some() || config.heal == Heal::Everything => {
            return Err(error.context("looking for the ledger on the target"));
        }
        // The check says it better, together with whatever else is wrong.
        Err(_) => None,
    };
    if config.heal == Heal::Everything {
        return adopt(config, directory, identity, recorded).await;
    }
    if let Some(migration) = &recorded
        && identity.as_ref().is_none_or(|identity| identity.id != migration.id)
    {
        return Err(Error::new(
            ErrorKind::Blocked,
            format!(
                "the target {} holds the ledger of migration {} whose state directory is not {}",
                config.target.describe(),
                migration.id,
                directory.directory().path().display()
            ),
        )
        .hint(
            "Go on with that migration's --dir. If it is lost: `walferry resync` with the same options goes on in this one, \
             with a new slot. If it is no longer wanted: `walferry clean --source … --target …` removes what it left.",
        ));
    }
    if let Some(identity) = &identity {
        for (side, given, known) in
            [("source", &config.source, &identity.source), ("target", &config.target, &identity.target)]
        {
            if given.without_password() != *known {
                return Err(Error::new(
                    ErrorKind::Blocked,
                    format!("{} belongs to a migration with another {side}", directory.directory().path().display()),
                )
                .hint(
                    "Give the connection string that the migration began with, or another --dir for another migration. \
                     If it has failed over to another address: `walferry resync` with the same options goes on there.",
                ));
            }
        }
    }
    if let Some(identity) = &identity
        && identity.stream_from != stream_from(config)
    {
        let (text, hint) = match &identity.stream_from {
            Some(standby) => (
                "this migration has its slot on a standby of the source, and another --stream-from or none was given",
                format!("Give --stream-from {standby} again."),
            ),
            None => (
                "this migration has its slot on the source itself: --stream-from is fixed when a migration begins",
                "Leave it out.".to_owned(),
            ),
        };
        return Err(Error::new(ErrorKind::Blocked, text)
            .hint(format!("{hint} `walferry resync` makes a new slot wherever it is wanted.")));
    }
    if let Some(migration) = recorded {
        // Its preconditions held when it began; what fails now is said by the step that fails, and can pass.
        board.event(Level::Info, format!("going on with migration {}", migration.id));
        if config.replicate_ddl && !replicates_ddl(config).await? {
            let text = "this migration began without --replicate-ddl, which is fixed when it begins";
            return Err(Error::new(ErrorKind::Blocked, text)
                .hint("Go on without it; or start anew: `walferry clean`, then `walferry migrate --replicate-ddl`."));
        }
        return Ok(application_name(&migration.id));
    }
    let report = check::run(&check::Inputs {
        source: &config.source,
        target: &config.target,
        standbys: &config.standbys,
        state_directory: Some(directory.directory().path()),
        jobs,
        queue_max_bytes: Some(config.queue.max_bytes),
        scope: scope_of(config, identity.as_ref()),
        resuming: false,
        replicate_ddl: config.replicate_ddl,
        owners: &config.owners,
        replica_identity_full: config.replica_identity_full,
        pause_source_jobs: config.pause_source_jobs,
        caggs: config.caggs,
        estimate: std::time::Duration::ZERO,
    })
    .await?;
    if let Some(identity) = &identity
        && (report.source.is_none() || report.target.is_none())
    {
        // It has passed the check once.
        let side = if report.source.is_none() { "source" } else { "target" };
        return Err(Error::new(
            ErrorKind::Transient,
            format!("the {side} of migration {} cannot be connected to", identity.id),
        ));
    }
    if !report.ready() {
        eprintln!("{report}");
        let count = report.of(Severity::Blocker).count();
        return Err(Error::new(ErrorKind::Blocked, format!("{} against the migration", check::that_stand(count)))
            .hint(
                "Mend what the check names, then run the same command again. Nothing was changed on either server.",
            ));
    }
    for finding in report.of(Severity::Warning) {
        board.event(Level::Warn, format!("{}: {}", finding.object, finding.message));
    }
    let id = write_down(config, directory, identity).await?;
    Ok(application_name(&id))
}

/// The standby that the slot is on, as the state directory has it.
fn stream_from(config: &Config) -> Option<String> {
    config.standbys.stream.as_ref().map(ConnectionSpec::without_password)
}

/// A new slot is made elsewhere than the old one, which would keep WAL there.
async fn drop_slot_elsewhere(config: &Config, identity: Option<&Identity>, name: &str) {
    const ANSWER_MAX: std::time::Duration = std::time::Duration::from_secs(10);
    let Some(identity) = identity.filter(|identity| identity.stream_from != stream_from(config)) else { return };
    let dropped = async {
        match &identity.stream_from {
            Some(standby) => slot::drop(&ConnectionSpec::parse(standby)?.connect("walferry").await?, name).await,
            None => slot::drop(&config.source.connect("walferry").await?, name).await,
        }
    };
    if !matches!(tokio::time::timeout(ANSWER_MAX, dropped).await, Ok(Ok(()))) {
        let place = identity.stream_from.as_deref().unwrap_or(&identity.source);
        tracing::warn!(
            "the slot {name} could not be dropped from {place}, where it keeps WAL: SELECT pg_drop_replication_slot('{name}')"
        );
    }
}

async fn replicates_ddl(config: &Config) -> Result<bool> {
    let target = config.target.connect("walferry").await?;
    ddl::is_replicated(&target).await
}

/// What is moved: as it was said when the migration began, or else now.
fn scope_of<'a>(config: &'a Config, identity: Option<&'a Identity>) -> &'a Scope {
    identity.map_or(&config.scope, |identity| &identity.scope)
}

/// Takes up the migration that the target's ledger speaks of, whatever became of its state directory or its servers' addresses.
async fn adopt(
    config: &Config,
    directory: &LockedDirectory,
    identity: Option<Identity>,
    recorded: Option<Migration>,
) -> Result<String> {
    let Some(migration) = recorded else {
        let text = format!("there is no migration to resync: the target {} has no ledger", config.target.describe());
        return Err(
            Error::new(ErrorKind::Blocked, text).hint("Look at --target. A migration begins with `walferry migrate`.")
        );
    };
    if let Some(identity) = &identity
        && identity.id != migration.id
    {
        let text = format!(
            "{} belongs to migration {}, and the target holds the ledger of {}",
            directory.directory().path().display(),
            identity.id,
            migration.id
        );
        return Err(
            Error::new(ErrorKind::Blocked, text).hint("Give that migration's --dir; if it is lost, an empty one.")
        );
    }
    if migration.source_database != config.source.database() {
        let text = format!(
            "migration {} moves the database {}, not {}",
            migration.id,
            migration.source_database,
            config.source.database()
        );
        return Err(Error::new(ErrorKind::Blocked, text).hint("Look at --source."));
    }
    migration.scope.prove_same(&config.scope)?;
    let name = application_name(&migration.id);
    if identity.is_none() {
        // The lock of the lost directory cannot be asked whether its process lives.
        wait_until_alone(config, &name).await?;
    }
    let (source, target) = (config.source.without_password(), config.target.without_password());
    drop_slot_elsewhere(config, identity.as_ref(), &migration.slot).await;
    let identity = Identity::new(migration.id, source, target, migration.scope);
    directory.identify(&identity.streaming_from(stream_from(config)))?;
    Ok(name)
}

/// Waits until no session of a migration is left on the target: those of a process that died end soon by themselves.
///
/// # Errors
/// `Blocked` when they do not.
async fn wait_until_alone(config: &Config, application_name: &str) -> Result<()> {
    let target = config.target.connect("walferry").await?;
    for _ in 0..ALONE_WITHIN_SECONDS {
        let sessions = target
            .query_one(
                "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE application_name = $1",
                &[&application_name],
            )
            .await
            .context(|| "looking for another walferry on the target".into())?;
        if sessions.get::<_, i64>(0) == 0 {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    let text =
        format!("another walferry is at work on this migration: the target has sessions named {application_name}");
    Err(Error::new(ErrorKind::Blocked, text)
        .hint("Stop that process first; it has the state directory that you look for. If it runs on a host that is lost, end its sessions with pg_terminate_backend."))
}

async fn write_down(config: &Config, directory: &LockedDirectory, identity: Option<Identity>) -> Result<String> {
    let scope = scope_of(config, identity.as_ref()).clone();
    let id = identity.map_or_else(new_id, |identity| identity.id);
    let (source, target) = (config.source.without_password(), config.target.without_password());
    let identity = Identity::new(id.clone(), source, target, scope.clone());
    directory.identify(&identity.streaming_from(stream_from(config)))?;
    let mut source = ReplicationSession::connect(&config.source, &application_name(&id)).await?;
    let server = source.identify_system().await.context(|| "asking the source who it is".into())?;
    source.close().await;
    let mut target = config.target.connect(&application_name(&id)).await?;
    let migration = Migration {
        apply_role: ApplyRole::allowed(&target).await?,
        source_system: server.system_id,
        source_timeline: i32::try_from(server.timeline).unwrap_or(i32::MAX),
        source_database: config.source.database().to_owned(),
        slot: format!("walferry_{id}"),
        publication: format!("walferry_{id}"),
        insert_only_publication: format!("walferry_{id}_inserts"),
        binary: false,
        apply_workers: config.apply_workers,
        phase: Phase::Preparing,
        consistent_point: None,
        pre_data_restored: false,
        post_data_restored: false,
        snapshot_floor: 0,
        queue: FIRST_QUEUE.to_owned(),
        way_back: None,
        scope,
        id,
    };
    ledger::create(&mut target, &migration).await?;
    if config.replicate_ddl {
        ddl::will_replicate(&target).await?;
    }
    Ok(migration.id)
}

/// What a preparation that was interrupted had changed on the source, as its ledger says, which goes.
async fn give_back_to_the_source(config: &Config, target: &tokio_postgres::Client, name: &str) -> Result<()> {
    let before = ledger::replica_identities(target).await?;
    let paused = timescale::pause::noted(target).await?;
    if !before.is_empty() || !paused.is_empty() || timescale::prepare::is_of_timescaledb(target).await? {
        let source = config.source.connect("walferry").await?;
        // One that still waits for a table's lock would change it afterwards.
        super::prepare::end_sessions(&source, name).await?;
        identity::restore(&source, &before, identity::On::Source).await?;
        timescale::prepare::put_back(&source, target).await?;
        timescale::pause::resume(&source, target).await?;
    }
    Ok(())
}

async fn remove_unprepared(target: &mut tokio_postgres::Client) -> Result<()> {
    target
        .batch_execute("DROP SCHEMA walferry CASCADE")
        .await
        .context(|| "removing the ledger of a preparation that was interrupted".into())
}

/// What the sessions of a migration call themselves on both servers.
pub(crate) fn application_name(id: &str) -> String {
    format!("walferry/{id}")
}

/// Eight hexadecimal digits that no other migration has.
pub(crate) fn new_id() -> String {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's random keys are the operating system's randomness.
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    format!("{:08x}", hasher.finish() as u32)
}
