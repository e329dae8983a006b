//! Whether `--replicate-ddl` can work: the event triggers on the source, and what they may do there.

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side};
use super::server::Server;
use crate::error::{Context, Result};
use crate::target::role::ApplyRole;

/// Administrators of services that may make event triggers without being superusers.
const ADMINISTRATORS: [&str; 4] = ["rds_superuser", "cloudsqlsuperuser", "azure_pg_admin", "alloydbsuperuser"];

/// The first version whose pgoutput sends messages.
const MESSAGES_SINCE: u32 = 14;

/// A finding on the target: DDL that runs there while rows are written must make nothing that fires for them.
pub(super) async fn target(client: &Client) -> Result<Option<Finding>> {
    if ApplyRole::allowed(client).await? == ApplyRole::Replica {
        return Ok(None);
    }
    let message = "The role may not set session_replication_role: a trigger or foreign key that DDL brings would act on every row that is \
                   applied.";
    let finding = Finding::new(Severity::Blocker, Side::Target, "replicate-ddl", "--replicate-ddl", message);
    Ok(Some(finding.fix("connect to the target as a role that may; or migrate without --replicate-ddl")))
}

/// Findings on the source.
pub(super) async fn source(client: &Client, server: &Server) -> Result<Vec<Finding>> {
    let finding =
        |severity, message: &str| Finding::new(severity, Side::Source, "replicate-ddl", "--replicate-ddl", message);
    let mut findings = Vec::new();
    if server.major() < MESSAGES_SINCE {
        findings.push(
            finding(Severity::Blocker, "DDL comes as messages in the stream, which PostgreSQL sends from 14 on.").fix(
                "migrate without --replicate-ddl: DDL then stops the apply, with the statements that mend the target",
            ),
        );
    }
    let is_administrator: bool = client
        .query_typed_one(
            &format!(
                "SELECT coalesce(bool_or(pg_catalog.pg_has_role(oid, 'MEMBER')), false) FROM pg_catalog.pg_roles WHERE rolname IN ('{}')",
                ADMINISTRATORS.join("', '")
            ),
            &[],
        )
        .await
        .context(|| "asking whether the role may make event triggers".into())?
        .get(0);
    let is_superuser = server.superuser;
    if !is_superuser && !is_administrator {
        findings.push(
            finding(Severity::Blocker, "The role may not make event triggers: that takes a superuser, or the administrator's role of a service.")
                .fix("connect to the source as such a role; or migrate without --replicate-ddl"),
        );
    } else if !is_superuser {
        findings.push(finding(
            Severity::Warning,
            "A new table joins the publication only where our role is a member of its owner's. Others are made on the target, left out of the \
             migration, and named by the cutover.",
        ));
    }
    Ok(findings)
}
