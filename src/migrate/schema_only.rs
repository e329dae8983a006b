//! The schema without rows (`--schema-only`): dumped, and run on the target as one transaction, so it is there as a whole or not at
//! all. No slot, no ledger, nothing is left on either server but the schema.

use std::path::Path;

use crate::check::{self, Severity, tools};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog;
use crate::source::scope::Scope;
use crate::state_directory::StateDirectory;
use crate::target::schema;

/// What our sessions call themselves.
const APPLICATION_NAME: &str = "walferry schema";

/// Brings the schema. Answers how many statements it took.
///
/// # Errors
/// `Blocked` when the target is not empty or lacks what the schema refers to, `Usage` for filters that name nothing; else what a server
/// or `pg_dump` says.
pub async fn schema_only(
    source: &ConnectionSpec,
    target: &ConnectionSpec,
    directory: &Path,
    scope: &Scope,
) -> Result<usize> {
    let directory = StateDirectory::at(directory).lock()?;
    if directory.directory().identity()?.is_some() {
        let text = format!("{} belongs to a migration", directory.directory().path().display());
        return Err(
            Error::new(ErrorKind::Blocked, text).hint("Choose another directory with --dir; it is removed at the end.")
        );
    }
    let report = check::schema(source, target, scope).await?;
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
    let tools = tools::find_tools_for(super::prepare::major(&from).await?, super::prepare::major(&to).await?)?;
    let dump = schema::Dump {
        tools: &tools,
        source,
        application_name: APPLICATION_NAME,
        snapshot: Some(&snapshot),
        directory: directory.directory().path(),
    };
    let items = schema::wanted(dump.read().await?, selection.as_ref().map(|selection| (selection, &schemas)))?;
    from.batch_execute("COMMIT").await?;
    schema::restore_all(&mut to, &items, &scope.rename_schemas()).await?;
    directory.remove()?;
    Ok(items.len())
}
