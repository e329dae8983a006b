//! `--roles`: the roles that the source's database refers to, made on the target where it has none of that name.
//!
//! Which ones: whoever owns something, is granted something, or is named by a policy or a user mapping; their members, and the members
//! of those, because they have their rights through them; and what all of these are members of. Not the roles that every server or a
//! managed service has of its own.
//!
//! All of them come in one transaction, so that a role is never there without its memberships. Roles that are there already stay as
//! they are.
//!
//! A password is what the source stores of it (a SCRAM verifier or an MD5 hash), and only a superuser may read that. It goes to the
//! target as a parameter, and becomes a statement only there: no log, error or debug line of ours can hold it (I10).

use std::collections::BTreeMap;
use std::fmt;

use bytes::BytesMut;
use tokio_postgres::Client;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::error::{Context, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// Roles of the server itself and of managed services: SQL that is true for a role `r`.
const SERVICE_ROLE: &str = "(r.oid < 16384 OR r.rolname ~ '^(pg_|rds|azure|cloudsql|alloydb|supabase)' OR r.rolname IN ('tsdbadmin', 'tsdbexplorer'))";

/// Settings whose values in the catalog are lists that are quoted already.
pub(crate) const LISTS: [&str; 4] =
    ["search_path", "temp_tablespaces", "local_preload_libraries", "session_preload_libraries"];

/// Text that no debug output shows.
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl ToSql for Secret {
    fn to_sql(
        &self,
        of: &Type,
        out: &mut BytesMut,
    ) -> std::result::Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.as_str().to_sql(of, out)
    }

    fn accepts(of: &Type) -> bool {
        <&str as ToSql>::accepts(of)
    }

    to_sql_checked!();
}

/// A role of the source.
struct Role {
    /// On the target.
    name: String,
    /// `LOGIN NOINHERIT …`.
    attributes: String,
    /// `SUPERUSER REPLICATION BYPASSRLS`, as far as it has them: what a managed service refuses to give.
    high_attributes: String,
    password: Option<Secret>,
    /// `name=value`, in every database and in this one.
    settings: Vec<String>,
    settings_here: Vec<String>,
    comment: Option<String>,
}

/// Makes those that are missing. Answers what is to be said, a sentence each. `with_settings_here` is false where the target's session is
/// in another database: then what a role has set in this one only is left out.
///
/// # Errors
/// Whatever the servers say; no role is made then.
pub async fn create_missing(
    source: &Client,
    target: &mut Client,
    owners: &Owners,
    with_settings_here: bool,
) -> Result<Vec<String>> {
    let rows = target.query_typed("SELECT rolname::text FROM pg_catalog.pg_roles", &[]).await?;
    let there: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let (mut roles, may_read_passwords) = read(source, owners).await?;
    roles.retain(|_, role| !there.contains(&role.name));
    if !with_settings_here {
        roles.values_mut().for_each(|role| role.settings_here.clear());
    }
    if roles.is_empty() {
        return Ok(Vec::new());
    }
    let mut said = Vec::new();
    let names: Vec<String> = roles.values().map(|role| sql::identifier(&role.name)).collect();
    said.push(format!("creating roles on the target: {}", names.join(", ")));
    if !may_read_passwords {
        said.push(
            "without passwords, which our role may not read on the source (pg_authid): set them before the cutover"
                .to_owned(),
        );
    }
    let memberships = memberships(source, owners).await?;
    let transaction = target.transaction().await?;
    let client = transaction.client();
    for role in roles.values() {
        said.extend(
            create(client, role).await.context(|| format!("creating the role {}", sql::identifier(&role.name)))?,
        );
    }
    let is_new = |name: &str| roles.values().any(|role| role.name == name);
    let is_known = |name: &str| is_new(name) || there.iter().any(|there| there == name);
    for (group, member, admin) in memberships {
        if (is_new(&group) || is_new(&member)) && is_known(&group) && is_known(&member) {
            let option = if admin { " WITH ADMIN OPTION" } else { "" };
            let grant = format!("GRANT {} TO {}{option}", sql::identifier(&group), sql::identifier(&member));
            said.extend(unless_refused(client, &grant).await?);
        }
    }
    // Only a member of a role can give objects to it.
    let superuser: bool = client
        .query_typed_one("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user", &[])
        .await?
        .get(0);
    if !superuser {
        for name in names {
            said.extend(unless_refused(client, &format!("GRANT {name} TO CURRENT_USER")).await?);
        }
    }
    transaction.commit().await.context(|| "creating roles on the target".into())?;
    Ok(said)
}

/// A statement within the transaction; a refusal takes only it back, and is said.
async fn unless_refused(client: &Client, statement: &str) -> Result<Option<String>> {
    client.batch_execute("SAVEPOINT role").await?;
    match client.batch_execute(statement).await {
        Ok(()) => {
            client.batch_execute("RELEASE role").await?;
            Ok(None)
        }
        Err(error) if error.as_db_error().is_some() => {
            client.batch_execute("ROLLBACK TO role; RELEASE role").await?;
            let refused = crate::error::Error::from(error);
            Ok(Some(format!("the target refuses `{statement}`: {refused}")))
        }
        Err(error) => Err(error).context(|| statement.to_owned()),
    }
}

async fn create(client: &Client, role: &Role) -> Result<Vec<String>> {
    let name = sql::identifier(&role.name);
    let mut said = Vec::new();
    client.batch_execute(&format!("CREATE ROLE {name} {}", role.attributes)).await?;
    if !role.high_attributes.is_empty() {
        said.extend(unless_refused(client, &format!("ALTER ROLE {name} {}", role.high_attributes)).await?);
    }
    if let Some(password) = &role.password {
        // `set_config` with true: until the end of the transaction. The statement is put together in the server.
        client
            .query_typed(
                "SELECT pg_catalog.set_config('walferry.role', $1, true), pg_catalog.set_config('walferry.secret', $2, true)",
                &[(&role.name, Type::TEXT), (password, Type::TEXT)],
            )
            .await?;
        client
            .batch_execute(
                "DO $$ BEGIN EXECUTE pg_catalog.format('ALTER ROLE %I PASSWORD %L', pg_catalog.current_setting('walferry.role'), \
                     pg_catalog.current_setting('walferry.secret')); END $$; \
                 SELECT pg_catalog.set_config('walferry.secret', '', true)",
            )
            .await?;
    }
    let database: String = client.query_typed_one("SELECT pg_catalog.current_database()::text", &[]).await?.get(0);
    let here = format!(" IN DATABASE {}", sql::identifier(&database));
    for (settings, of) in [(&role.settings, ""), (&role.settings_here, here.as_str())] {
        for (setting, value) in settings.iter().filter_map(|setting| setting.split_once('=')) {
            let value = if LISTS.contains(&setting) { value.to_owned() } else { sql::literal(value) };
            let statement = format!("ALTER ROLE {name}{of} SET {} = {value}", sql::identifier(setting));
            said.extend(unless_refused(client, &statement).await?);
        }
    }
    if let Some(comment) = &role.comment {
        said.extend(unless_refused(client, &format!("COMMENT ON ROLE {name} IS {}", sql::literal(comment))).await?);
    }
    Ok(said)
}

/// The roles that the database refers to, with what they are, by their OIDs; and whether passwords may be read.
async fn read(source: &Client, owners: &Owners) -> Result<(BTreeMap<u32, Role>, bool)> {
    let doing = || "reading the source's roles".to_owned();
    let may_read: bool = source
        .query_typed_one("SELECT pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'SELECT')", &[])
        .await
        .context(doing)?
        .get(0);
    let password =
        if may_read { "(SELECT a.rolpassword FROM pg_catalog.pg_authid a WHERE a.oid = r.oid)" } else { "NULL::text" };
    let rows = source
        .query_typed(
            &format!(
                "WITH RECURSIVE referred(oid) AS ( \
                   SELECT d.refobjid FROM pg_catalog.pg_shdepend d \
                   WHERE d.refclassid = 'pg_catalog.pg_authid'::regclass AND d.deptype IN ('o', 'a', 'r') \
                     AND (SELECT b.oid FROM pg_catalog.pg_database b WHERE b.datname = pg_catalog.current_database()) \
                         IN (d.dbid, CASE WHEN d.classid = 'pg_catalog.pg_database'::regclass THEN d.objid END) \
                   UNION SELECT m.member FROM referred JOIN pg_catalog.pg_auth_members m ON m.roleid = referred.oid \
                         WHERE m.roleid >= 16384), \
                 wanted(oid) AS ( \
                   SELECT oid FROM referred \
                   UNION SELECT m.roleid FROM wanted JOIN pg_catalog.pg_auth_members m ON m.member = wanted.oid) \
                 SELECT r.oid, r.rolname::text, \
                        concat_ws(' ', CASE WHEN r.rolcanlogin THEN 'LOGIN' ELSE 'NOLOGIN' END, \
                            CASE WHEN r.rolinherit THEN 'INHERIT' ELSE 'NOINHERIT' END, \
                            CASE WHEN r.rolcreaterole THEN 'CREATEROLE' END, CASE WHEN r.rolcreatedb THEN 'CREATEDB' END, \
                            'CONNECTION LIMIT ' || r.rolconnlimit, 'VALID UNTIL ' || pg_catalog.quote_literal(r.rolvaliduntil)), \
                        concat_ws(' ', CASE WHEN r.rolsuper THEN 'SUPERUSER' END, \
                            CASE WHEN r.rolreplication THEN 'REPLICATION' END, CASE WHEN r.rolbypassrls THEN 'BYPASSRLS' END), \
                        {password}, \
                        coalesce((SELECT s.setconfig FROM pg_catalog.pg_db_role_setting s WHERE s.setrole = r.oid AND s.setdatabase = 0), '{{}}'), \
                        coalesce((SELECT s.setconfig FROM pg_catalog.pg_db_role_setting s \
                                  JOIN pg_catalog.pg_database b ON b.oid = s.setdatabase \
                                  WHERE s.setrole = r.oid AND b.datname = pg_catalog.current_database()), '{{}}'), \
                        pg_catalog.shobj_description(r.oid, 'pg_authid') \
                 FROM pg_catalog.pg_roles r WHERE r.oid IN (SELECT oid FROM wanted) AND NOT {SERVICE_ROLE}"
            ),
            &[],
        )
        .await
        .context(doing)?;
    let role = |row: &tokio_postgres::Row| {
        let source_name: String = row.get(1);
        let name = owners.role(&source_name).to_owned();
        // An MD5 hash is salted with the role's name.
        let password: Option<String> =
            row.get::<_, Option<String>>(4).filter(|password| name == source_name || !password.starts_with("md5"));
        let role = Role {
            name,
            attributes: row.get(2),
            high_attributes: row.get(3),
            password: password.map(Secret),
            settings: row.get(5),
            settings_here: row.get(6),
            comment: row.get(7),
        };
        (row.get(0), role)
    };
    Ok((rows.iter().map(role).collect(), may_read))
}

/// Group, member, and whether with the right to pass it on; as they are called on the target.
async fn memberships(source: &Client, owners: &Owners) -> Result<Vec<(String, String, bool)>> {
    let rows = source
        .query_typed(
            "SELECT g.rolname::text, m.rolname::text, bool_or(a.admin_option) FROM pg_catalog.pg_auth_members a \
             JOIN pg_catalog.pg_roles g ON g.oid = a.roleid JOIN pg_catalog.pg_roles m ON m.oid = a.member GROUP BY 1, 2 ORDER BY 1, 2",
            &[],
        )
        .await
        .context(|| "reading the source's memberships".into())?;
    let called = |name: String| owners.role(&name).to_owned();
    Ok(rows.iter().map(|row| (called(row.get(0)), called(row.get(1)), row.get(2))).collect())
}
