//! The schema without rows (`--schema-only`): dumped, and run on the target as one transaction, so it is there as a whole or not at
//! all. No slot, no ledger, nothing is left on either server but the schema.

use std::collections::HashMap;
use std::path::Path;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::check::{self, Severity, tools};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog;
use crate::source::scope::Scope;
use crate::source::version::Version;
use crate::state_directory::StateDirectory;
use crate::target::role::ApplyRole;
use crate::target::{roles, schema};
use crate::timescale::{bare::Bare, prepare};
use crate::unstreamed::large_object::Owners;
use crate::unstreamed::silence_event_triggers;

/// What our sessions call themselves.
const APPLICATION_NAME: &str = "walferry schema";

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Brought {
    /// How many statements the schema took.
    pub statements: usize,
    /// What else was done or left out, in a sentence each.
    pub said: Vec<String>,
}

/// Brings the schema.
///
/// # Errors
/// `Blocked` when the target is not empty or lacks what the schema refers to, `Usage` for filters that name nothing; else what a server
/// or `pg_dump` says.
pub async fn schema_only(
    source: &ConnectionSpec,
    target: &ConnectionSpec,
    directory: &Path,
    scope: &Scope,
    owners: &Owners,
) -> Result<Brought> {
    let directory = StateDirectory::at(directory).lock()?;
    if directory.directory().identity()?.is_some() {
        let text = format!("{} belongs to a migration", directory.directory().path().display());
        return Err(
            Error::new(ErrorKind::Blocked, text).hint("Choose another directory with --dir; it is removed at the end.")
        );
    }
    let report = check::schema(source, target, scope, owners).await?;
    if !report.ready() {
        eprintln!("{report}");
        let count = report.of(Severity::Blocker).count();
        return Err(Error::new(ErrorKind::Blocked, format!("{} against it", check::that_stand(count))).hint(
            "Mend what the check names, then run the same command again. Nothing was changed on either server.",
        ));
    }
    let from = source.connect(APPLICATION_NAME).await?;
    from.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let selection = scope.select_strictly(&from).await?;
    let schemas = catalog::schemas_of_objects(&from).await?;
    let snapshot: String = from
        .query_typed_one("SELECT pg_catalog.pg_export_snapshot()", &[])
        .await
        .context(|| "exporting a snapshot of the source".into())?
        .get(0);
    let mut to = target.connect(APPLICATION_NAME).await?;
    let tools = tools::find_tools_for(Version::of(&from).await?.0, Version::of(&to).await?.0)?;
    let dump = schema::Dump {
        tools: &tools,
        source,
        application_name: APPLICATION_NAME,
        snapshot: &snapshot,
        directory: directory.directory().path(),
        owners,
        without_schema: None,
        // No row is written.
        role: ApplyRole::Replica,
    };
    let bare = Bare::read(&from, owners).await?;
    let mut dumped = dump.read().await?;
    if let Some(bare) = &bare {
        dumped = schema::without(dumped, &bare.chunks);
    }
    let items = schema::wanted(dumped, selection.as_ref().map(|selection| (selection, &schemas)))?;
    from.batch_execute("COMMIT").await?;
    let mut said = Vec::new();
    let mut at_the_end = scope.rename_schemas();
    if let Some(bare) = &bare {
        prepare::create_extension(target, APPLICATION_NAME, &bare.extension, true).await?;
        // Another session than that in which it was made; to this one, hypertables are ordinary tables.
        to.batch_execute("SET timescaledb.restoring = on").await?;
        at_the_end.push_str(&bare.statements());
        said.extend(bare.say());
    }
    if owners.create_roles {
        said.extend(roles::create_missing(&from, &mut to, owners, true).await?);
    }
    silence_event_triggers(&to).await;
    let extensions = extension_versions(&from, &to).await?;
    said.extend(schema::restore_all(&mut to, &items, &extensions, &at_the_end).await?);
    directory.remove()?;
    Ok(Brought { statements: items.len(), said })
}

/// The source's versions of its extensions, where the target offers them.
async fn extension_versions(source: &Client, target: &Client) -> Result<HashMap<String, String>> {
    let doing = || "looking for the versions of extensions".to_owned();
    let rows = source
        .query_typed("SELECT extname::text, extversion FROM pg_catalog.pg_extension", &[])
        .await
        .context(doing)?;
    let (names, versions): (Vec<String>, Vec<String>) = rows.iter().map(|row| (row.get(0), row.get(1))).unzip();
    let rows = target
        .query_typed(
            "SELECT v.name::text, v.version FROM pg_catalog.pg_available_extension_versions v \
             WHERE (v.name::text, v.version) IN (SELECT * FROM unnest($1, $2))",
            &[(&names, Type::TEXT_ARRAY), (&versions, Type::TEXT_ARRAY)],
        )
        .await
        .context(doing)?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
