//! Runs the migrations of several databases, in one process.

use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::Client;
use tracing::Instrument;

use super::list::{self, Database};
use super::overview::{self, Member, Overview};
use super::served::{self, Boards};
use super::summary::Summary;
use super::{create, share, worst};
use crate::check::{self, AllChecked, Inputs};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::migrate::{self, Config};
use crate::observe::board::StatusBoard;
use crate::observe::progress::{self, ProgressMode};
use crate::record::{Recorder, Server};
use crate::state_directory::LockedDirectory;
use crate::target::roles;

/// What our own sessions call themselves.
const APPLICATION_NAME: &str = "walferry databases";

/// How often it is looked for databases that have come.
const WATCH_INTERVAL: Duration = Duration::from_secs(30);

/// How long the migrations may take to end after a signal. Whatever dies, they go on where they were.
const STOP_MAX: Duration = Duration::from_secs(20);

/// Which databases.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Patterns of databases that are moved; empty for all.
    pub include: Vec<String>,
    /// Patterns of those that are not.
    pub exclude: Vec<String>,
    /// Those against which the check finds something stay behind, instead of holding up all.
    pub skip_blocked: bool,
}

/// Runs the migration of each until all are over: of those that began before, and of those that are new and pass the check.
///
/// `config` is for all of them together; its connection strings name any database of each server.
///
/// # Errors
/// `Blocked` when the check finds something against one of the new ones (nothing is begun then); else the gravest of what
/// the migrations ended with, once all have ended.
pub async fn run(config: Config, options: &Options) -> Result<Summary> {
    let mut stopped = pin!(migrate::stop_signal());
    let locked = tokio::select! {
        // Before everything else, so that no other process changes what is read.
        locked = async { overview::lock(&config.directory) } => locked?,
        error = &mut stopped => return Err(error),
    };
    if let Some(record) = config.source.record() {
        record.recorder().open();
    }
    let all = Several { config, locked };
    let members = tokio::select! {
        members = all.prepare(options) => members?,
        error = &mut stopped => return Err(error),
    };
    all.migrate(members, stopped).await
}

struct Several {
    config: Config,
    locked: LockedDirectory,
}

impl Several {
    fn directory(&self) -> &std::path::Path {
        self.locked.directory().path()
    }

    /// Finds out which databases there are, and gets those ready that have not begun. Answers those whose migrations can run.
    async fn prepare(&self, options: &Options) -> Result<Vec<Member>> {
        let recorded = Overview::of(self.directory())?;
        let mut overview = match &recorded {
            Some(recorded) => recorded.clone(),
            None => Overview::new(
                self.config.source.without_password(),
                self.config.target.without_password(),
                Vec::new(),
                Vec::new(),
            ),
        };
        if !options.include.is_empty() || !options.exclude.is_empty() {
            (overview.include, overview.exclude) = (options.include.clone(), options.exclude.clone());
        }
        let source = match self.connect(&self.config.source, "source").await {
            Ok(source) => source,
            // Each migration that has begun waits for its servers by itself; what is new can wait for the next start.
            Err(error) if error.is_transient() && recorded.is_some() => {
                tracing::warn!("databases that have come are not looked for: {error}");
                return self.begun(&overview);
            }
            Err(error) => return Err(error),
        };
        let databases = list::databases(&source, &overview.include, &overview.exclude).await?;
        // What has begun stays; what has not is as the patterns and the server say now.
        let begun = self.begun(&overview)?;
        overview.members.retain(|member| begun.contains(member) || member.creating);
        overview.add(databases.iter().map(|database| database.name.clone()));
        overview.unmoved.clear();
        if overview.members.is_empty() {
            return Err(Error::new(ErrorKind::Blocked, "there is no database to move on the source's server"));
        }
        share::caps(&self.config, overview.members.len())?;
        let new: Vec<&Database> =
            databases.iter().filter(|database| begun.iter().all(|member| member.database != database.name)).collect();
        if new.is_empty() {
            overview.write(self.directory())?;
            return Ok(begun);
        }
        let target = self.connect(&self.config.target, "target").await?;
        let mut members = begun;
        let (passed, refused) = self.check(&source, &target, &new, options).await?;
        overview.members.retain(|member| !refused.contains(&member.database));
        overview.unmoved.clone_from(&refused);
        overview.write(self.directory())?;
        let created = self.create(&mut overview, &source, &target, &passed).await?;
        let created: Vec<&Database> = passed.iter().copied().filter(|one| created.contains(&one.name)).collect();
        // What was checked with another database standing in for it is checked itself now.
        let (_, refused) = self.check(&source, &target, &created, options).await?;
        overview.unmoved.extend(refused.iter().cloned());
        overview.members.retain(|member| !refused.contains(&member.database));
        overview.write(self.directory())?;
        let passes = |member: &&Member| passed.iter().any(|database| database.name == member.database);
        members.extend(overview.members.iter().filter(passes).cloned());
        members.sort_by(|one, other| one.database.cmp(&other.database));
        Ok(members)
    }

    async fn connect(&self, spec: &ConnectionSpec, side: &str) -> Result<Client> {
        spec.connect(APPLICATION_NAME).await.context(|| format!("connecting to the {side}'s server"))
    }

    /// Those whose migration has begun: it knows who it is.
    fn begun(&self, overview: &Overview) -> Result<Vec<Member>> {
        let mut begun = Vec::new();
        for member in &overview.members {
            if overview::state_of(self.directory(), member).identity()?.is_some() {
                begun.push(member.clone());
            }
        }
        Ok(begun)
    }

    /// Checks databases that have not begun. Answers those that can, and the names of those that cannot, where these may stay behind.
    async fn check<'a>(
        &self,
        source: &Client,
        target: &Client,
        databases: &[&'a Database],
        options: &Options,
    ) -> Result<(Vec<&'a Database>, Vec<String>)> {
        if databases.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let inputs = Inputs {
            source: &self.config.source,
            target: &self.config.target,
            standbys: &self.config.standbys,
            state_directory: Some(self.directory()),
            jobs: share::jobs(&self.config, databases.len()),
            queue_max_bytes: Some(self.config.queue.max_bytes),
            scope: &self.config.scope,
            resuming: false,
            replicate_ddl: self.config.replicate_ddl,
            owners: &self.config.owners,
            replica_identity_full: self.config.replica_identity_full,
            pause_source_jobs: self.config.pause_source_jobs,
            caggs: self.config.caggs,
            estimate: Duration::ZERO,
        };
        let checked = check::all(source, target, databases, &inputs, self.config.reverse).await?;
        if checked.ready {
            return Ok((databases.to_vec(), Vec::new()));
        }
        let refused: Vec<String> = checked.blocked().map(|one| one.database.clone()).collect();
        eprintln!("{checked}");
        if !options.skip_blocked || checked.blockers_of_servers() > 0 || refused.len() == databases.len() {
            return Err(blocked(&checked));
        }
        tracing::warn!("not begun, because of what the check finds: {refused:?}");
        let passed = databases.iter().copied().filter(|database| !refused.contains(&database.name)).collect();
        Ok((passed, refused))
    }

    /// Makes roles, one database after another, and then the databases that the target lacks. Answers which those are.
    async fn create(
        &self,
        overview: &mut Overview,
        source: &Client,
        target: &Client,
        databases: &[&Database],
    ) -> Result<Vec<String>> {
        let owners = &self.config.owners;
        let rows = target.query_typed("SELECT datname::text FROM pg_catalog.pg_database", &[]).await?;
        let there: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if owners.create_roles {
            for database in databases {
                let from = self.connect(&self.config.source.with_database(&database.name), "source").await?;
                let on_target = there.contains(&database.name);
                let spec = &self.config.target;
                let spec = if on_target { spec.with_database(&database.name) } else { spec.clone() };
                let mut to = self.connect(&spec, "target").await?;
                // What a role has in a database that is not there yet comes with that database.
                for said in roles::create_missing(&from, &mut to, owners, on_target).await? {
                    tracing::info!(database = ?database.name, "{said}");
                }
            }
        }
        let mut created = Vec::new();
        for database in databases {
            let Some(at) = overview.members.iter().position(|member| member.database == database.name) else {
                continue;
            };
            if there.contains(&database.name) && !overview.members[at].creating {
                continue;
            }
            overview.members[at].creating = true;
            overview.write(self.directory())?;
            tracing::info!(database = ?database.name, "creating the database on the target");
            for said in create::create(source, target, database, owners).await? {
                tracing::warn!(database = ?database.name, "{said}");
            }
            overview.members[at].creating = false;
            overview.write(self.directory())?;
            created.push(database.name.clone());
        }
        Ok(created)
    }

    /// Runs them until all have ended.
    async fn migrate(self, members: Vec<Member>, mut stopped: impl Future<Output = Error> + Unpin) -> Result<Summary> {
        let mut boards = Boards { directory: self.directory().to_owned(), boards: Vec::new() };
        for member in &members {
            boards.boards.push((member.clone(), StatusBoard::of_database(&member.database)?));
        }
        let _http = match self.config.http_address {
            Some(address) => Some(served::serve(address, boards.clone()).await?),
            None => None,
        };
        let mut running = JoinSet::new();
        for (member, board) in &boards.boards {
            let state = overview::state_of(self.directory(), member);
            let mut config = share::of_one(&self.config, members.len(), &state)?;
            config.source = config.source.with_database(&member.database);
            config.target = config.target.with_database(&member.database);
            config.standbys = config.standbys.with_database(&member.database);
            if config.source.record().is_some() {
                // Each has its own record; that of all is of what was done before.
                let recorder = Recorder::at(state.path());
                config.source = config.source.recorded(recorder.of(Server::Source));
                config.target = config.target.recorded(recorder.of(Server::Target));
            }
            // All of them are made by now, one database after another: two at once would collide.
            config.owners.create_roles = false;
            // An error's line has to say whose it is, whatever the level.
            let span = tracing::error_span!("migration", database = ?member.database);
            let (database, board) = (member.database.clone(), board.clone());
            let one = async move {
                let shown = progress::start(board.clone(), ProgressMode::Lines);
                let outcome = migrate::run(config, &board).await;
                drop(shown);
                (database, outcome)
            };
            running.spawn(one.instrument(span));
        }
        let mut watch = JoinSet::new();
        let (source, directory) = (self.config.source.clone(), self.directory().to_owned());
        watch.spawn(watch_for_others(source, directory, members));
        let mut errors = Vec::new();
        let mut is_stopped = false;
        while !running.is_empty() {
            let stop_within = tokio::time::sleep(STOP_MAX);
            tokio::select! {
                ended = running.join_next() => match ended {
                    Some(Ok((_, Ok(())))) | None => {}
                    Some(Ok((database, Err(error)))) => errors.push((database, error)),
                    Some(Err(error)) => {
                        errors.push(("?".to_owned(), Error::new(ErrorKind::Other, format!("this is a bug: {error}"))));
                    }
                },
                // Each of them has heard the signal too.
                error = &mut stopped, if !is_stopped => {
                    errors.push(("all".to_owned(), error));
                    is_stopped = true;
                }
                () = stop_within, if is_stopped => running.shutdown().await,
            }
        }
        match worst(&errors) {
            // One by one they say no more than the signal does.
            Some(error) if error.kind() == ErrorKind::Interrupted => {
                Err(Error::new(ErrorKind::Interrupted, "stopped by a signal")
                    .hint("Nothing is lost. Run the same command again to go on."))
            }
            Some(error) => Err(error),
            None => boards.summary(),
        }
    }
}

fn blocked(checked: &AllChecked) -> Error {
    let names: Vec<String> = checked.blocked().map(|one| format!("{:?}", one.database)).collect();
    let text = match names.is_empty() {
        true => format!("{} against all databases together", check::that_stand(checked.blockers_of_servers())),
        false => {
            format!("the check refuses {} of {} databases: {}", names.len(), checked.databases.len(), names.join(", "))
        }
    };
    Error::new(ErrorKind::Blocked, text).hint(
        "Mend what the check names, then run the same command again. No migration was begun. --exclude-database leaves one out, \
         --skip-blocked-databases all that the check refuses.",
    )
}

/// Notes databases that come while the migrations run, for `status` and `cutover`, until it is dropped.
async fn watch_for_others(source: ConnectionSpec, directory: PathBuf, members: Vec<Member>) {
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        if let Err(error) = note_others(&source, &directory, &members).await {
            // The next look will do; a pattern may name nothing any more.
            tracing::debug!(%error, "databases that have come could not be looked for");
        }
    }
}

async fn note_others(source: &ConnectionSpec, directory: &std::path::Path, members: &[Member]) -> Result<()> {
    let Some(mut overview) = Overview::of(directory)? else { return Ok(()) };
    let client = source.connect(APPLICATION_NAME).await?;
    let databases = list::databases(&client, &overview.include, &overview.exclude).await?;
    let is_member = |name: &String| members.iter().any(|member| member.database == *name);
    let others: Vec<String> = databases.into_iter().map(|one| one.name).filter(|name| !is_member(name)).collect();
    if others != overview.unmoved {
        for name in others.iter().filter(|name| !overview.unmoved.contains(name)) {
            tracing::warn!("the database {name:?} has come, and is not moved before the next start");
        }
        overview.unmoved = others;
        overview.write(directory)?;
    }
    Ok(())
}
