//! The preflight of several databases of one server (`check --all-databases`, and before `migrate --all-databases` begins).
//!
//! Each database is checked like any other, against its namesake on the target. Where that is not there yet, the database that
//! `--target` names stands in for it, and what is said of that one's content is left out.

use std::fmt;

use serde::Serialize;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::report::{Finding, Report, Severity, Side, write_finding};
use super::{Inputs, several};
use crate::databases::list::Database;
use crate::error::{Context, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// Codes of findings on a database as such, of which nothing is known before it is created.
const OF_THE_STAND_IN: [&str; 9] = [
    "target-not-empty",
    "preinstalled",
    "create-on-database",
    "create-in-public",
    "encoding",
    "collation",
    "collation-version",
    "database-settings",
    "database-privileges",
];

/// What the check of one of the databases came to.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// Its name.
    pub database: String,
    /// Whether the target has a database of that name.
    pub on_target: bool,
    /// As for a database by itself.
    pub report: Report,
}

/// What the check of all came to.
#[derive(Clone, Debug, Serialize)]
pub struct AllChecked {
    /// Version of this format.
    pub version: u32,
    /// Whether all can begin.
    pub ready: bool,
    /// What was found on the servers for all together.
    pub findings: Vec<Finding>,
    /// Each database, by name.
    pub databases: Vec<Checked>,
}

impl AllChecked {
    /// The databases that cannot begin.
    pub fn blocked(&self) -> impl Iterator<Item = &Checked> {
        self.databases.iter().filter(|checked| !checked.report.ready())
    }

    /// How many findings stand against all of them together.
    pub fn blockers_of_servers(&self) -> usize {
        self.findings.iter().filter(|finding| finding.severity == Severity::Blocker).count()
    }
}

/// Checks the servers for all of them together, then each.
///
/// `inputs` has the connection strings that the operator gave; each database is looked for on both servers under its own name.
///
/// # Errors
/// As [`super::run`].
pub async fn all(
    source: &Client,
    target: &Client,
    databases: &[&Database],
    inputs: &Inputs<'_>,
    reverse: bool,
) -> Result<AllChecked> {
    let there = on_server(target, databases).await?;
    let mut findings = several::findings(source, target, databases.len(), inputs.jobs, reverse).await?;
    if there.len() < databases.len() {
        findings.extend(may_create(target).await?);
    }
    let mut checked = Vec::new();
    for database in databases {
        let on_target = there.contains(&database.name);
        let of_source = inputs.source.with_database(&database.name);
        let of_target = if on_target { inputs.target.with_database(&database.name) } else { inputs.target.clone() };
        let standbys = inputs.standbys.with_database(&database.name);
        let one = Inputs { source: &of_source, target: &of_target, standbys: &standbys, ..*inputs };
        let mut report = super::run(&one).await.context(|| format!("checking the database {:?}", database.name))?;
        if !on_target {
            report.findings.retain(|finding| !OF_THE_STAND_IN.contains(&finding.code));
            report.findings.extend(created(target, database, inputs.owners).await?);
            report.findings.sort_by_key(|finding| finding.severity);
            report.ready = report.findings.iter().all(|finding| finding.severity != Severity::Blocker);
        }
        checked.push(Checked { database: database.name.clone(), on_target, report });
    }
    let ready = checked.iter().all(|checked| checked.report.ready())
        && findings.iter().all(|finding| finding.severity != Severity::Blocker);
    Ok(AllChecked { version: 1, ready, findings, databases: checked })
}

/// Which of the databases a server has.
async fn on_server(client: &Client, databases: &[&Database]) -> Result<Vec<String>> {
    let names: Vec<&str> = databases.iter().map(|database| database.name.as_str()).collect();
    let rows = client
        .query_typed(
            "SELECT datname::text FROM pg_catalog.pg_database WHERE datname::text = ANY ($1)",
            &[(&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "looking for the databases on the target".into())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn may_create(target: &Client) -> Result<Option<Finding>> {
    let row = target
        .query_typed_one(
            "SELECT rolname::text, rolsuper OR rolcreatedb FROM pg_catalog.pg_roles WHERE rolname = current_user",
            &[],
        )
        .await?;
    let role: String = row.get(0);
    let message = "The target lacks databases of the source, and this role may not create any.";
    let found = Finding::new(Severity::Blocker, Side::Target, "create-database", sql::identifier(&role), message);
    Ok((!row.get::<_, bool>(1)).then(|| found.fix(format!("ALTER ROLE {} CREATEDB;", sql::identifier(&role)))))
}

/// That it will be created, and whether the target knows its owner and its locale.
async fn created(target: &Client, database: &Database, owners: &Owners) -> Result<Vec<Finding>> {
    let name = sql::identifier(&database.name);
    let locale = database.locale.as_deref().unwrap_or(&database.collate);
    let message = format!(
        "The target has no database of this name: it is created there, with encoding {}, the {} locale {locale}, owner, settings, \
         comment and privileges.",
        database.encoding, database.provider
    );
    let mut findings = vec![Finding::new(Severity::Info, Side::Target, "database-created", name.clone(), message)];
    let owner = owners.role(&database.owner);
    let has_owner: bool = target
        .query_typed_one("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)", &[(&owner, Type::TEXT)])
        .await?
        .get(0);
    if !has_owner && !owners.create_roles && !owners.no_owner {
        let message = "It owns the database on the source, and the target has no such role: the database would belong to whoever connects.";
        let fix = format!("CREATE ROLE {};  -- or --roles, --role-map, --no-owner", sql::identifier(owner));
        let owner = sql::identifier(owner);
        findings.push(Finding::new(Severity::Warning, Side::Target, "database-owner", owner, message).fix(fix));
    }
    if database.provider != "libc" {
        return Ok(findings);
    }
    // The server lists the locales that its machine had when it was made; `de_DE.UTF-8` and `de_DE.utf8` are one.
    let known: bool = target
        .query_typed_one(
            "SELECT NOT EXISTS (SELECT FROM unnest($1) l WHERE l NOT IN ('C', 'POSIX') AND NOT EXISTS ( \
                 SELECT FROM pg_catalog.pg_collation c WHERE c.collprovider = 'c' \
                   AND lower(replace(c.collcollate, '-', '')) = lower(replace(l, '-', ''))))",
            &[(&[database.collate.as_str(), database.ctype.as_str()].as_slice(), Type::TEXT_ARRAY)],
        )
        .await?
        .get(0);
    if !known {
        let message = format!(
            "The target lists no locale {} or {}: where its machine has none either, the database cannot be created there.",
            database.collate, database.ctype
        );
        let fix = format!("locale-gen {}  # on the target's machine; or create the database by hand", database.collate);
        findings.push(Finding::new(Severity::Warning, Side::Target, "database-locale", name, message).fix(fix));
    }
    Ok(findings)
}

impl fmt::Display for AllChecked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.findings.is_empty() {
            writeln!(f, "both servers, for {} databases together", self.databases.len())?;
            self.findings.iter().try_for_each(|finding| write_finding(f, finding))?;
            writeln!(f)?;
        }
        for checked in &self.databases {
            writeln!(f, "=== {:?}\n{}\n", checked.database, checked.report)?;
        }
        let blocked: Vec<String> = self.blocked().map(|checked| format!("{:?}", checked.database)).collect();
        match (self.ready, blocked.is_empty()) {
            (true, _) => write!(f, "all {} databases are ready", self.databases.len()),
            (false, true) => write!(f, "blocked by what both servers lack for all of them together"),
            (false, false) => write!(f, "blocked: {}", blocked.join(", ")),
        }
    }
}
