//! What must fit between the two servers: identity, encoding, collations, extensions, roles, tablespaces.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, first_ten};
use super::server::Server;
use crate::error::{Context, Result};
use crate::source::catalog::USER_RELATION;
use crate::source::scope::Selection;
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// A finding whose fix belongs on the target.
fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Target, code, object, message)
}

/// What the source's database refers to by name and its dump does not bring along.
#[derive(Debug, Default)]
pub(crate) struct References {
    /// Extensions with their version; `plpgsql` is everywhere.
    extensions: BTreeMap<String, String>,
    /// Roles that own something, and whether they may log in.
    owners: BTreeMap<String, bool>,
    /// Other roles that grants name, and whether they may log in.
    grantees: BTreeMap<String, bool>,
    /// Other roles that policies, user mappings and default privileges name, and whether they may log in.
    named: BTreeMap<String, bool>,
    tablespaces: BTreeSet<String>,
    /// Collations of `pg_catalog` that a column or an index asks for.
    collations: BTreeSet<String>,
    /// Schemas of users, without `public`.
    schemas: BTreeSet<String>,
    uses_public: bool,
    uses_icu: bool,
    /// Tables whose row level security holds for their owner too.
    forced_security: Vec<String>,
    /// Relations that creating the whole schema in one transaction would lock.
    restore_locks: i64,
    /// Relations that pg_dump, or the fence with the sequences, locks.
    dump_locks: i64,
}

impl References {
    /// Relations that pg_dump, or the fence with the sequences, locks at once.
    pub(crate) fn dump_locks(&self) -> i64 {
        self.dump_locks
    }

    /// Relations that creating the whole schema in one transaction locks.
    pub(crate) fn restore_locks(&self) -> i64 {
        self.restore_locks
    }
}

/// Reads the references from the source.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn references(source: &Client, selection: Option<&Selection>) -> Result<References> {
    let moved = super::scope::moved(selection, "c.oid");
    let moved_owner = super::scope::moved(selection, "d.objid");
    let rows = source
        .query_typed(
            &format!(
                "WITH relations AS ( \
                   SELECT c.oid, c.relname, c.relkind, c.relowner, c.reltablespace, c.reltoastrelid, c.relrowsecurity, c.relforcerowsecurity, \
                          n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.relkind IN ('r', 'p', 'i', 'I', 'S', 'v', 'm', 'f', 'c') AND c.relpersistence <> 't' AND {USER_RELATION} AND {moved}), \
                 used_collations AS ( \
                   SELECT a.attcollation AS oid FROM pg_attribute a JOIN relations c ON c.oid = a.attrelid \
                   WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attcollation <> 0 \
                   UNION SELECT unnest(i.indcollation::oid[]) FROM pg_index i JOIN relations c ON c.oid = i.indexrelid), \
                 schemas AS ( \
                   SELECT n.oid, n.nspname, n.nspowner FROM pg_namespace n WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
                     AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp\\_%' \
                     AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass \
                                     AND d.objid = n.oid AND d.deptype = 'e')) \
                 SELECT 'extension', extname::text, extversion FROM pg_extension WHERE extname <> 'plpgsql' \
                 UNION ALL \
                 SELECT CASE WHEN bool_or(d.deptype = 'o' AND d.classid NOT IN ('pg_default_acl'::regclass, 'pg_user_mapping'::regclass)) \
                             THEN 'owner' WHEN bool_or(d.deptype = 'r' OR d.deptype = 'o' AND d.classid = 'pg_user_mapping'::regclass) THEN 'named' \
                             ELSE 'grantee' END, r.rolname, r.rolcanlogin::text \
                 FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid \
                 WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype IN ('o', 'a', 'r') \
                   AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                   AND (d.classid <> 'pg_class'::regclass OR {moved_owner}) \
                   AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = d.classid AND e.objid = d.objid AND e.deptype = 'e') \
                 GROUP BY r.rolname, r.rolcanlogin \
                 UNION ALL \
                 SELECT 'owner', r.rolname, r.rolcanlogin::text FROM pg_roles r \
                 WHERE r.oid = 10 AND (EXISTS (SELECT FROM relations WHERE relowner = 10 AND relkind NOT IN ('i', 'I')) \
                   OR EXISTS (SELECT FROM schemas WHERE nspowner = 10 AND nspname <> 'public') \
                   OR EXISTS (SELECT FROM pg_proc p JOIN schemas s ON s.oid = p.pronamespace WHERE p.proowner = 10 \
                       AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'))) \
                 UNION ALL \
                 SELECT DISTINCT 'tablespace', t.spcname, '' FROM pg_tablespace t JOIN relations c ON c.reltablespace = t.oid \
                 UNION ALL \
                 SELECT 'collation', l.collname, '' FROM pg_collation l JOIN used_collations u ON u.oid = l.oid \
                 WHERE l.collnamespace = 'pg_catalog'::regnamespace AND l.collname NOT IN ('default', 'C', 'POSIX') \
                 UNION ALL \
                 SELECT 'icu', '', '' WHERE EXISTS (SELECT FROM pg_collation l WHERE l.collprovider = 'i' \
                   AND (l.oid IN (SELECT oid FROM used_collations) OR l.collnamespace <> 'pg_catalog'::regnamespace)) \
                 UNION ALL \
                 SELECT 'schema', nspname, '' FROM schemas WHERE nspname <> 'public' \
                 UNION ALL \
                 SELECT 'public', '', '' WHERE EXISTS (SELECT FROM relations WHERE nspname = 'public') \
                   OR EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace) \
                 UNION ALL \
                 SELECT 'forced security', format('%I.%I', nspname, relname), '' FROM relations \
                 WHERE relrowsecurity AND relforcerowsecurity \
                 UNION ALL \
                 SELECT 'dump locks', count(*)::text, '' FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't' AND {USER_RELATION} \
                 UNION ALL \
                 SELECT 'restore locks', (count(*) FILTER (WHERE relkind NOT IN ('i', 'I')) \
                          + 2 * count(*) FILTER (WHERE reltoastrelid <> 0))::text, '' FROM relations",
            )
            // Where somebody has dropped public, the cast of its name would fail.
            .replace("'public'::regnamespace", "to_regnamespace('public')"),
            &[],
        )
        .await
        .context(|| "reading what the source's database refers to".into())?;
    let mut found = References::default();
    for row in rows {
        let (kind, name, more): (&str, String, String) = (row.get(0), row.get(1), row.get(2));
        match kind {
            "extension" => drop(found.extensions.insert(name, more)),
            "owner" => drop(found.owners.insert(name, more == "true")),
            "grantee" => drop(found.grantees.insert(name, more == "true")),
            "named" => drop(found.named.insert(name, more == "true")),
            "tablespace" => drop(found.tablespaces.insert(name)),
            "collation" => drop(found.collations.insert(name)),
            "schema" => drop(found.schemas.insert(name)),
            "public" => found.uses_public = true,
            "icu" => found.uses_icu = true,
            "forced security" => found.forced_security.push(name),
            "dump locks" => found.dump_locks = name.parse().unwrap_or(0),
            "restore locks" => found.restore_locks = name.parse().unwrap_or(0),
            _ => {}
        }
    }
    Ok(found)
}

/// Findings from the two servers' own words: one and the same, versions, encoding, collation.
pub(crate) fn servers(source: &Server, target: &Server) -> Vec<Finding> {
    let mut findings = Vec::new();
    // A physical copy has the same identifier, but was started at another moment.
    let one_server = source.started == target.started
        && (source.system_identifier.is_none() || source.system_identifier == target.system_identifier);
    if one_server && source.database == target.database {
        let message = "Source and target are one and the same database.";
        findings.push(
            finding(Severity::Blocker, "same-database", sql::identifier(&source.database), message)
                .fix("name the other server, or a new database, in --target"),
        );
    } else if one_server {
        let message = "Source and target are two databases of one server: its disk and memory have to serve both.";
        findings.push(finding(Severity::Info, "same-server", sql::identifier(&target.database), message));
    }
    if target.major() < source.major() {
        let message = format!(
            "The target is of version {}, older than the source's {}: what the newer one writes the older one may not understand.",
            target.major(),
            source.major()
        );
        findings.push(
            finding(Severity::Blocker, "target-older", format!("PostgreSQL {}", target.version), message)
                .fix(format!("install PostgreSQL {} or newer on the target", source.major())),
        );
    }
    if source.encoding != target.encoding {
        let create = format!(
            "CREATE DATABASE {} ENCODING {} LC_COLLATE {} LC_CTYPE {} TEMPLATE template0;  -- and name it in --target",
            sql::identifier(&format!("{}_new", target.database)),
            sql::literal(&source.encoding).trim_start(),
            sql::literal(if source.provider == "libc" { &source.collation } else { &source.ctype }).trim_start(),
            sql::literal(&source.ctype).trim_start(),
        );
        let (severity, message) = if source.encoding == "SQL_ASCII" || target.encoding != "UTF8" {
            (
                Severity::Blocker,
                "Not every text of the source can be written in the target's encoding; the copy would stop at the first that cannot.",
            )
        } else {
            (Severity::Warning, "Texts are converted on the way. Lengths in bytes and the order of rows can differ.")
        };
        let object = format!("{} to {}", source.encoding, target.encoding);
        findings.push(finding(severity, "encoding", object, message).fix(create));
    }
    let sorts = |server: &Server| (server.provider.clone(), server.collation.clone());
    let bytewise = |server: &Server| matches!(server.collation.as_str(), "C" | "POSIX");
    let (here, there) = (source.summary(String::new()).collation, target.summary(String::new()).collation);
    if sorts(source) != sorts(target) && !(bytewise(source) && bytewise(target)) || source.ctype != target.ctype {
        let message = "The databases sort texts by different collations, or differ in LC_CTYPE: ORDER BY, ranges over \
                       text, upper() and lower() can give other results at the target. Equality of texts is not concerned.";
        let object = format!("{here} (LC_CTYPE {}) to {there} (LC_CTYPE {})", source.ctype, target.ctype);
        findings.push(finding(Severity::Warning, "collation", object, message));
    } else if !bytewise(source) && source.collation_version != target.collation_version {
        let message = "The collation is of another version there: some texts may be sorted in another order. The indexes \
                       are built anew at the target and are right; results of ORDER BY may change, and partitions by \
                       ranges of text may refuse rows.";
        findings.push(finding(Severity::Warning, "collation-version", format!("{here} to {there}"), message));
    }
    findings
}

/// What the target has of what the source's database refers to.
struct Offers {
    /// Available extensions: versions, and whether our role could create it or it is there.
    extensions: BTreeMap<String, (Vec<String>, bool)>,
    /// Roles, and whether ours may give objects to them.
    roles: BTreeMap<String, bool>,
    collations: BTreeSet<String>,
    schemas: BTreeSet<String>,
    public_create: Option<bool>,
    has_icu: bool,
    /// Our role may create others.
    create_role: bool,
}

async fn offers(target: &Client, server: &Server) -> Result<Offers> {
    let doing = || "reading what the target has".to_string();
    let mut offers = Offers {
        extensions: BTreeMap::new(),
        roles: BTreeMap::new(),
        collations: BTreeSet::new(),
        schemas: BTreeSet::new(),
        public_create: None,
        has_icu: false,
        create_role: false,
    };
    let extensions = target
        .query_typed(
            "SELECT v.name::text, v.version, v.installed OR NOT v.superuser OR v.trusted \
             FROM pg_available_extension_versions v ORDER BY 1, 2",
            &[],
        )
        .await
        .context(doing)?;
    for row in extensions {
        let entry = offers.extensions.entry(row.get(0)).or_insert((Vec::new(), server.superuser));
        entry.0.push(row.get(1));
        entry.1 |= row.get::<_, bool>(2);
    }
    // From 16 on, giving an object away takes the SET option of the membership.
    let giving = if server.major() >= 16 { "SET" } else { "MEMBER" };
    let rows = target
        .query_typed(
            &format!(
                "SELECT 'role', rolname::text, pg_has_role(oid, '{giving}') FROM pg_roles \
                 UNION ALL SELECT 'create role', '', rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user \
                 UNION ALL SELECT 'collation', collname, collprovider = 'i' FROM pg_collation \
                   WHERE collencoding IN (-1, (SELECT encoding FROM pg_database WHERE datname = current_database())) \
                 UNION ALL SELECT 'schema', nspname, has_schema_privilege(oid, 'CREATE') FROM pg_namespace n \
                   WHERE NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = n.oid \
                                     AND d.deptype = 'e')"
            ),
            &[],
        )
        .await
        .context(doing)?;
    for row in rows {
        let (kind, name, flag): (&str, String, bool) = (row.get(0), row.get(1), row.get(2));
        match kind {
            "role" => drop(offers.roles.insert(name, flag)),
            "create role" => offers.create_role = flag,
            "collation" => {
                offers.has_icu |= flag;
                offers.collations.insert(name);
            }
            _ if name == "public" => offers.public_create = Some(flag),
            _ => drop(offers.schemas.insert(name)),
        }
    }
    Ok(offers)
}

/// Findings where the target lacks what the source's database refers to.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn missing(
    target: &Client,
    server: &Server,
    references: &References,
    inputs: &super::Inputs<'_>,
) -> Result<Vec<Finding>> {
    let offers = offers(target, server).await?;
    let mut findings = extensions(references, &offers);
    findings.extend(roles(references, &offers, server, inputs.owners));
    let mut add = |severity, code, names: Vec<String>, message: &str, fix: &dyn Fn(&str) -> String| {
        if !names.is_empty() {
            let fixes: Vec<String> = names.iter().map(|name| fix(name)).collect();
            findings.push(finding(severity, code, first_ten(&names), message).fix(fixes.join("\n")));
        }
    };
    let not_in = |wanted: &BTreeSet<String>, there: &BTreeSet<String>| -> Vec<String> {
        wanted.difference(there).map(|name| sql::identifier(name)).collect()
    };
    add(
        Severity::Info,
        "tablespace",
        references.tablespaces.iter().map(|name| sql::identifier(name)).collect(),
        "Tables, indexes or materialized views of the source are in this tablespace. Tablespaces are not moved: on the target, all is \
         made in the database's default tablespace.",
        &|name| {
            format!(
                "ALTER TABLE ALL IN TABLESPACE pg_default SET TABLESPACE {name};  -- for instance, after the cutover"
            )
        },
    );
    add(
        Severity::Blocker,
        "collation-missing",
        not_in(&references.collations, &offers.collations),
        "Columns or indexes of the source use this collation, and the target has none of that name.",
        &|_| "SELECT pg_import_system_collations('pg_catalog');  -- once the operating system has the locale".into(),
    );
    if !inputs.resuming {
        let there = references.schemas.intersection(&offers.schemas).map(|name| sql::identifier(name)).collect();
        add(
            Severity::Blocker,
            "schema-exists",
            there,
            "The target has a schema of this name already, and making it again would fail.",
            &|name| format!("DROP SCHEMA {name};"),
        );
    }
    let role = sql::identifier(&server.role);
    if references.uses_public && offers.public_create != Some(true) {
        let message = "The role may not create in the schema public, where objects of the source are.";
        let fix = match offers.public_create {
            Some(_) => format!("GRANT USAGE, CREATE ON SCHEMA public TO {role};"),
            None => "CREATE SCHEMA public;".to_string(),
        };
        findings.push(finding(Severity::Blocker, "create-in-public", "public", message).fix(fix));
    }
    if references.uses_icu && !offers.has_icu {
        let message = "The source uses ICU collations, and the target's server was built without ICU.";
        findings.push(finding(Severity::Blocker, "icu", format!("PostgreSQL {}", server.version), message));
    }
    if !references.forced_security.is_empty() && !server.bypass_rls {
        let message = "Row level security is forced on these tables. It would hide rows from our role, or refuse them, even where it owns them.";
        findings.push(
            finding(Severity::Blocker, "row-level-security", first_ten(&references.forced_security), message)
                .fix(format!("ALTER ROLE {role} BYPASSRLS;")),
        );
    }
    Ok(findings)
}

fn extensions(references: &References, offers: &Offers) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, version) in &references.extensions {
        let object = sql::identifier(name);
        match offers.extensions.get(name) {
            None => {
                let message = format!(
                    "The source uses this extension (version {version}), and it is not installed on the target's machine."
                );
                findings.push(
                    finding(Severity::Blocker, "extension", object, message)
                        .fix(format!("install the package of the extension {name} on the target's machine")),
                );
            }
            Some((_, false)) => {
                let message = "Only a superuser can create this extension on the target.";
                findings.push(finding(Severity::Blocker, "extension-rights", &object, message).fix(format!(
                    "CREATE EXTENSION IF NOT EXISTS {object};  -- as a superuser, in the target's database"
                )));
            }
            Some((versions, true)) if !versions.contains(version) => {
                let message = format!(
                    "The source has version {version}, the target offers {}. The target's default version is taken.",
                    versions.join(", ")
                );
                findings.push(finding(Severity::Warning, "extension-version", object, message));
            }
            Some(_) => {}
        }
    }
    findings
}

fn roles(references: &References, offers: &Offers, server: &Server, owners: &Owners) -> Vec<Finding> {
    let mut findings = Vec::new();
    let none = BTreeMap::new();
    let unless = |left_out: bool, roles: &'_ BTreeMap<String, bool>| -> BTreeMap<String, bool> {
        let roles = if left_out { &none } else { roles };
        roles.iter().map(|(name, login)| (owners.role(name).to_owned(), *login)).collect()
    };
    let owning = unless(owners.no_owner, &references.owners);
    for (code, wanted, why) in [
        ("owner-role", &owning, "It owns objects of the source; restoring them as its own fails without it."),
        (
            "grantee-role",
            &unless(owners.no_privileges, &references.grantees),
            "Grants of the source name it; restoring them fails without it.",
        ),
        (
            "named-role",
            &unless(false, &references.named),
            "Policies or user mappings of the source name it; restoring them fails without it.",
        ),
    ] {
        let missing: Vec<(&String, &bool)> =
            wanted.iter().filter(|(name, _)| !offers.roles.contains_key(*name)).collect();
        if missing.is_empty() {
            continue;
        }
        let names: Vec<String> = missing.iter().map(|(name, _)| sql::identifier(name)).collect();
        if owners.create_roles {
            if offers.create_role {
                let message = "The target has no such role; migrate --roles creates it.";
                findings.push(finding(Severity::Info, "role-created", first_ten(&names), message));
            } else {
                let message = "The target has no such role, and our role may not create it, as --roles asks.";
                let fix = format!("ALTER ROLE {} CREATEROLE;", sql::identifier(&server.role));
                findings.push(finding(Severity::Blocker, "role-created", first_ten(&names), message).fix(fix));
            }
            continue;
        }
        let member = |name: &str| match server.superuser || code != "owner-role" {
            true => String::new(),
            false => format!("\nGRANT {} TO {};", sql::identifier(name), sql::identifier(&server.role)),
        };
        let fix: Vec<String> = missing
            .iter()
            .map(|(name, login)| {
                let login = if **login { "LOGIN" } else { "NOLOGIN" };
                format!("CREATE ROLE {} {login};{}", sql::identifier(name), member(name))
            })
            .collect();
        let message = format!(
            "The target has no such role. {why} With --roles it is created, with its password and memberships."
        );
        findings.push(finding(Severity::Blocker, code, first_ten(&names), message).fix(fix.join("\n")));
    }
    let foreign: Vec<String> = owning
        .keys()
        .filter(|name| offers.roles.get(*name) == Some(&false))
        .map(|name| sql::identifier(name))
        .collect();
    if !foreign.is_empty() {
        let role = sql::identifier(&server.role);
        let fix: Vec<String> = foreign.iter().map(|name| format!("GRANT {name} TO {role};")).collect();
        let message = "Objects are to belong to it, and only a member of it can give them to it.";
        findings.push(finding(Severity::Blocker, "owner-membership", first_ten(&foreign), message).fix(fix.join("\n")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::server::tests::server;

    fn codes(source: &Server, target: &Server) -> Vec<(&'static str, Severity)> {
        servers(source, target).iter().map(|finding| (finding.code, finding.severity)).collect()
    }

    /// Another server than [`server`], alike but for its identity.
    fn other() -> Server {
        Server { system_identifier: Some("2".into()), started: "2026-02-02 00:00:00+00".into(), ..server() }
    }

    #[test]
    fn one_database_on_both_sides_blocks_and_a_physical_copy_does_not() {
        assert_eq!(codes(&server(), &server()), [("same-database", Severity::Blocker)]);
        let sibling = Server { database: "other".into(), ..server() };
        assert_eq!(codes(&server(), &sibling), [("same-server", Severity::Info)]);
        let copy = Server { started: "2026-02-02 00:00:00+00".into(), ..server() };
        assert_eq!(codes(&server(), &copy), []);
        assert_eq!(codes(&server(), &other()), []);
    }

    #[test]
    fn an_older_target_blocks() {
        let source = Server { version_number: 160_001, ..server() };
        assert_eq!(codes(&source, &other()), [("target-older", Severity::Blocker)]);
        assert_eq!(codes(&server(), &Server { version_number: 160_001, ..other() }), []);
    }

    #[test]
    fn an_encoding_that_cannot_hold_every_text_blocks() {
        let with = |encoding: &str, server: Server| Server { encoding: encoding.into(), ..server };
        assert_eq!(codes(&with("LATIN1", server()), &other()), [("encoding", Severity::Warning)]);
        assert_eq!(codes(&with("SQL_ASCII", server()), &other()), [("encoding", Severity::Blocker)]);
        assert_eq!(codes(&server(), &with("LATIN1", other())), [("encoding", Severity::Blocker)]);
    }

    #[test]
    fn another_collation_or_another_version_of_it_warns() {
        let icu = Server { provider: "icu".into(), collation: "en".into(), ..other() };
        assert_eq!(codes(&server(), &icu), [("collation", Severity::Warning)]);
        let newer = Server { collation_version: Some("2.41".into()), ..other() };
        assert_eq!(codes(&server(), &newer), [("collation-version", Severity::Warning)]);
    }
}
