//! What the stream does not carry: large objects, configuration of extensions, publications and subscriptions, security labels.

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, counted, first_ten};
use super::server::Server;
use crate::error::{Context, Result};
use crate::source::scope::Scope;
use crate::sql;
use crate::unstreamed::configuration::{self, LEFT_OUT};

fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Source, code, object, message)
}

/// Findings on the source.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn findings(client: &Client, server: &Server, scope: &Scope) -> Result<Vec<Finding>> {
    let mut findings = match scope.moves_large_objects() {
        true => large_objects(client, server).await?,
        false => large_objects_left_out(client).await?.into_iter().collect(),
    };
    let is_left_out = if scope.moves_configuration() { "false" } else { "true" };
    let rows = client
        .query_typed(
            &format!(
                "SELECT 'publication', quote_ident(pubname) FROM pg_publication WHERE pubname !~ '^walferry_' \
                 UNION ALL \
                 SELECT 'subscription', quote_ident(subname) FROM pg_subscription \
                 WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                 UNION ALL \
                 SELECT CASE WHEN e.extname IN ({LEFT_OUT}) THEN 'jobs' WHEN {is_left_out} THEN 'left out' ELSE 'unreadable' END, \
                        format('%I.%I', n.nspname, c.relname) || ' of extension ' || e.extname \
                 FROM pg_extension e, unnest(e.extconfig) u(relid), pg_class c, pg_namespace n \
                 WHERE c.oid = u.relid AND n.oid = c.relnamespace AND c.relkind IN ('r', 'p') AND e.extname <> 'timescaledb' \
                   AND (e.extname IN ({LEFT_OUT}) OR {is_left_out} OR NOT has_table_privilege(c.oid, 'SELECT')) \
                 UNION ALL \
                 SELECT DISTINCT 'label', provider FROM pg_seclabel \
                 ORDER BY 1, 2"
            ),
            &[],
        )
        .await
        .context(|| "reading the source's publications and configuration tables".into())?;
    let of = |kind: &str| -> Vec<String> {
        rows.iter().filter(|row| row.get::<_, &str>(0) == kind).map(|row| row.get(1)).collect()
    };
    let mut add = |kind: &str, severity, code, message: &str, fix: Option<&str>| {
        let names = of(kind);
        if !names.is_empty() {
            let mut found = finding(severity, code, first_ten(&names), message);
            found.fix = fix.map(str::to_owned);
            findings.push(found);
        }
    };
    add(
        "publication",
        Severity::Info,
        "publication",
        "Publications are not made on the target: whoever subscribes to this one has to be moved too. Make it there after the cutover.",
        Some("pg_dump --schema-only SOURCE | grep -A1 PUBLICATION  # how they were made"),
    );
    add(
        "subscription",
        Severity::Info,
        "subscription-left-out",
        "Subscriptions are not made on the target, where they would receive a second time what the source receives. Make it there after \
         the cutover.",
        None,
    );
    add(
        "jobs",
        Severity::Warning,
        "extension-jobs",
        "Its rows are not copied: they would be at work on the target before the cutover, and twice. Make them there after it.",
        Some(
            "SELECT format('SELECT cron.schedule(%L, %L, %L);', jobname, schedule, command) FROM cron.job;  -- on the source",
        ),
    );
    add(
        "left out",
        Severity::Warning,
        "extension-configuration",
        "Rows that users have in this configuration table of an extension are moved with a whole database only, and not with filters or \
         --data-only. Copy them yourself, if there are any.",
        None,
    );
    add(
        "unreadable",
        Severity::Warning,
        "extension-configuration",
        "Our role may not read this configuration table of an extension; rows of the user's own in it are not copied.",
        Some("GRANT SELECT ON … TO our role;"),
    );
    add(
        "label",
        Severity::Info,
        "security-label",
        "Security labels of this provider are restored where the target has loaded it (shared_preload_libraries), and left out and named \
         where it has not.",
        None,
    );
    Ok(findings)
}

/// Rows of extensions' configuration that our role could not write on the target: found only after the copy otherwise.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn configuration(source: &Client, target: &Client, role: &str) -> Result<Option<Finding>> {
    let unwritable = configuration::unwritable(source, target, role).await?;
    if unwritable.is_empty() {
        return Ok(None);
    }
    let (names, grants): (Vec<String>, Vec<String>) = unwritable.into_iter().unzip();
    let message =
        "Users have rows in this configuration table of an extension, and our role may not write them on the target.";
    Ok(Some(
        Finding::new(Severity::Blocker, Side::Target, "extension-configuration-unwritable", first_ten(&names), message)
            .fix(grants.join("\n")),
    ))
}

/// They belong to no table, and so to no part of a database.
async fn large_objects_left_out(client: &Client) -> Result<Option<Finding>> {
    let row = client
        .query_typed_one("SELECT count(*) FROM pg_largeobject_metadata", &[])
        .await
        .context(|| "counting the source's large objects".into())?;
    let all: i64 = row.get(0);
    let message = "Large objects belong to no table, and so to no part of a database: none of them is moved with filters, whatever \
                   table refers to it.";
    let object = counted(usize::try_from(all).unwrap_or(usize::MAX), "large object");
    Ok((all > 0).then(|| finding(Severity::Warning, "large-objects-left-out", object, message)))
}

/// Those that our role may not read cannot be copied (H14).
async fn large_objects(client: &Client, server: &Server) -> Result<Vec<Finding>> {
    let row = client
        .query_typed_one(
            "SELECT count(*), count(*) FILTER (WHERE NOT readable), \
                    (array_agg(oid ORDER BY oid) FILTER (WHERE NOT readable))[1:10], \
                    has_table_privilege('pg_largeobject', 'SELECT') \
             FROM (SELECT m.oid, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) \
                            OR current_setting('lo_compat_privileges')::bool OR pg_has_role(m.lomowner, 'USAGE') \
                            OR EXISTS (SELECT FROM aclexplode(m.lomacl) a WHERE a.privilege_type = 'SELECT' \
                                       AND (a.grantee = 0 OR pg_has_role(a.grantee, 'USAGE'))) AS readable \
                   FROM pg_largeobject_metadata m) m",
            &[],
        )
        .await
        .context(|| "counting the source's large objects".into())?;
    let (all, unreadable, some, pages): (i64, i64, Option<Vec<u32>>, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let count = |number: i64| counted(usize::try_from(number).unwrap_or(usize::MAX), "large object");
    let role = sql::identifier(&server.role);
    let mut findings = Vec::new();
    if unreadable > 0 {
        let message = "Our role may read neither these nor grant itself the right.";
        let fix: Vec<String> = some
            .unwrap_or_default()
            .iter()
            .map(|oid| format!("GRANT SELECT ON LARGE OBJECT {oid} TO {role};  -- and likewise the others"))
            .collect();
        findings.push(
            finding(Severity::Blocker, "large-objects-unreadable", count(unreadable), message).fix(fix.join("\n")),
        );
    } else if all > 0 && !pages {
        let message = "Our role may not read pg_largeobject, so what has changed is found by reading all content on the source: every 30 s, \
                       and once while applications wait at the cutover.";
        findings.push(
            finding(Severity::Warning, "large-objects-slow", count(all), message)
                .fix(format!("GRANT SELECT ON pg_largeobject TO {role};  -- as a superuser")),
        );
    } else if all > 0 {
        let message = "They are copied with their OIDs, and what changes is found and copied again. To prove that at the cutover, the \
                       source reads pg_largeobject once while applications wait.";
        findings.push(finding(Severity::Info, "large-objects", count(all), message));
    }
    Ok(findings)
}
