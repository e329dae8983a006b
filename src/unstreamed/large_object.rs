//! Large objects: found changed by a marker, and copied whole, with their OID, owner, privileges and comment (H14).
//!
//! ```text
//!  source: marker of each ──► ledger: marker when it was copied ──► lo_get in chunks ──► one transaction on the target:
//!                                 (differs)                                                lo_put, owner, …, the new marker
//! ```
//!
//! Where our role may read `pg_largeobject` (a superuser, or whom it was granted), a marker is made of the pages' transaction ids and
//! reads no content over the wire; elsewhere it is a hash of the content, made in the source. The content itself goes by `lo_get` and
//! `lo_put` everywhere: they ask for the rights on each object and not for a superuser ("Server-Side Functions" in the manual).
//!
//! Nothing here is larger in memory than a page of markers and a few chunks of content, whatever there is.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use crate::check::SERVICE_OWNERS;
use crate::error::{Context, Result};
use crate::sql;

/// How many objects' markers are compared at once; the transactions of both sides are no longer than one of these takes.
const PAGE: i64 = 500;
/// How much of an object is read and written at once.
const CHUNK_BYTES: i64 = 1 << 20;
/// How many objects that are no larger than a chunk go in one round trip.
const TOGETHER: usize = 16;

/// What a comparison did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Copied because they were new or had changed.
    pub copied: u64,
    /// Removed because the source has them no more.
    pub removed: u64,
}

/// Whether either side has any, or had when the ledger was last written: asked in one round trip each.
///
/// # Errors
/// Whatever the servers say.
pub async fn are_there(source: &Client, target: &Client) -> Result<bool> {
    let any = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)";
    let doing = || "looking for large objects".to_owned();
    let (source, target) =
        tokio::try_join!(source.query_typed_one(any, &[]), target.query_typed_one(any, &[])).context(doing)?;
    Ok(source.get::<_, bool>(0) || target.get::<_, bool>(0))
}

/// Makes the target's large objects those of the source: the same OIDs, content, owners, privileges and comments.
///
/// Each page of objects is read under a snapshot of its own; what changes behind it is found the next time. The sessions are in no
/// transaction before and after, unless this fails.
///
/// # Errors
/// Whatever the servers say; what was copied until then stands in the ledger.
pub async fn sync(source: &Client, target: &Client, owners: &Owners) -> Result<Synced> {
    let mut synced = Synced::default();
    if !are_there(source, target).await? {
        return Ok(synced);
    }
    target
        .batch_execute(
            "SET client_min_messages = warning; \
             CREATE TABLE IF NOT EXISTS walferry.large_object (loid oid PRIMARY KEY, marker text NOT NULL)",
        )
        .await
        .context(|| "adding the large objects to the ledger".into())?;
    let marker = marker_query(source).await?;
    let mut after = 0_u32;
    loop {
        let page = page(source, &marker, after).await?;
        // Behind the last of the source, everything is too much.
        let last = last_of(&page);
        let page_synced = sync_page(source, target, owners, &page, after, last).await;
        if page_synced.is_err() {
            let _ = tokio::join!(source.batch_execute("ROLLBACK"), target.batch_execute("ROLLBACK"));
        }
        let page_synced = page_synced?;
        synced.copied += page_synced.copied;
        synced.removed += page_synced.removed;
        if last == u32::MAX {
            if synced != Synced::default() {
                tracing::info!(copied = synced.copied, removed = synced.removed, "large objects");
            }
            return Ok(synced);
        }
        after = last;
    }
}

/// Who owns what on the target, and who may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// Roles that are missing on the target are made there (`--roles`).
    pub create_roles: bool,
    /// Nothing is given to another owner (`--no-owner`).
    pub no_owner: bool,
    /// No privileges are granted (`--no-privileges`).
    pub no_privileges: bool,
    /// Roles that have another name on the target (`--role-map`).
    pub role_map: Vec<(String, String)>,
}

impl Owners {
    /// The same the other way.
    #[must_use]
    pub fn reversed(mut self) -> Owners {
        for (source, target) in &mut self.role_map {
            std::mem::swap(source, target);
        }
        self
    }

    /// What a role of the source is called on the target.
    pub fn role<'a>(&'a self, name: &'a str) -> &'a str {
        self.role_map.iter().find(|(source, _)| source == name).map_or(name, |(_, target)| target)
    }
}

/// A large object of the source, with what tells whether it has changed.
pub(super) struct Object {
    pub(super) oid: u32,
    owner: String,
    /// Grantee (none for everybody), privilege, whether it may be passed on; `None` for the built-in ones.
    privileges: Option<Vec<(Option<String>, String, bool)>>,
    comment: Option<String>,
    pub(super) marker: String,
}

/// The part of a marker that speaks of the content. A page's visible row is another whenever anything of it has changed, and so is its
/// `xmin`; transaction ids come again after four billion, and then only on the same page by chance.
pub(super) async fn marker_query(source: &Client) -> Result<String> {
    let may_read: bool = source
        .query_typed_one("SELECT pg_catalog.has_table_privilege('pg_catalog.pg_largeobject', 'SELECT')", &[])
        .await
        .context(|| "looking whether pg_largeobject may be read".into())?
        .get(0);
    let content = if may_read {
        "(SELECT 'pages:' || pg_catalog.count(*) || ':' || coalesce(pg_catalog.sum( \
                     ('x' || pg_catalog.left(pg_catalog.md5(p.pageno || '.' || p.xmin), 15))::bit(60)::int8), 0) \
          FROM pg_catalog.pg_largeobject p WHERE p.loid = m.oid)"
            .to_owned()
    } else {
        content_hash()
    };
    Ok(format!(
        "SELECT m.oid, pg_catalog.pg_get_userbyid(m.lomowner)::text, m.lomacl IS NULL, \
                (SELECT pg_catalog.array_agg(coalesce(pg_catalog.pg_get_userbyid(nullif(a.grantee, 0))::text, '') ORDER BY o) \
                 FROM pg_catalog.aclexplode(m.lomacl) WITH ORDINALITY a(grantor, grantee, privilege_type, is_grantable, o)), \
                (SELECT pg_catalog.array_agg(a.privilege_type || CASE WHEN a.is_grantable THEN '*' ELSE '' END ORDER BY o) \
                 FROM pg_catalog.aclexplode(m.lomacl) WITH ORDINALITY a(grantor, grantee, privilege_type, is_grantable, o)), \
                pg_catalog.obj_description(m.oid, 'pg_largeobject'), {content} \
         FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid > $1 ORDER BY m.oid LIMIT {PAGE}"
    ))
}

/// A hash of the content of the object `m.oid`, that reads a chunk at a time.
fn content_hash() -> String {
    format!(
        "(WITH RECURSIVE c(i, h, n) AS ( \
            SELECT 0::int8, pg_catalog.md5(b), pg_catalog.length(b) \
            FROM (SELECT pg_catalog.lo_get(m.oid, 0, {CHUNK_BYTES}) AS b OFFSET 0) x \
            UNION ALL SELECT i, pg_catalog.md5(b), pg_catalog.length(b) \
            FROM (SELECT c.i + 1 AS i, pg_catalog.lo_get(m.oid, (c.i + 1) * {CHUNK_BYTES}, {CHUNK_BYTES}) AS b \
                  FROM c WHERE c.n = {CHUNK_BYTES} OFFSET 0) x) \
          SELECT 'content:' || pg_catalog.md5(pg_catalog.string_agg(h, '' ORDER BY i)) FROM c)"
    )
}

/// The next objects behind an OID. The source's session is in a transaction afterwards, whose snapshot also shows their content.
pub(super) async fn page(source: &Client, query: &str, after: u32) -> Result<Vec<Object>> {
    let doing = || "reading the source's large objects".to_owned();
    source.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.context(doing)?;
    let rows = match source.query_typed(query, &[(&after, Type::OID)]).await {
        Ok(rows) => rows,
        Err(error) => {
            let _ = source.batch_execute("ROLLBACK").await;
            return Err(error).context(doing);
        }
    };
    Ok(rows
        .into_iter()
        .map(|row| {
            let (owner, is_default): (String, bool) = (row.get(1), row.get(2));
            let grantees: Vec<String> = row.get::<_, Option<Vec<String>>>(3).unwrap_or_default();
            let granted: Vec<String> = row.get::<_, Option<Vec<String>>>(4).unwrap_or_default();
            let comment: Option<String> = row.get(5);
            let content: String = row.get(6);
            let marker = format!("{content}/{owner}/{is_default}/{grantees:?}/{granted:?}/{comment:?}");
            let privileges = (!is_default).then(|| {
                let one = |(grantee, granted): (String, String)| {
                    let privilege = granted.trim_end_matches('*').to_owned();
                    let is_grantable = privilege.len() < granted.len();
                    ((!grantee.is_empty()).then_some(grantee), privilege, is_grantable)
                };
                grantees.into_iter().zip(granted).map(one).collect()
            });
            Object { oid: row.get(0), owner, privileges, comment, marker }
        })
        .collect())
}

/// Brings the objects with OIDs behind `after` and up to `last` in line, in one transaction for each batch that goes together.
async fn sync_page(
    source: &Client,
    target: &Client,
    owners: &Owners,
    page: &[Object],
    after: u32,
    last: u32,
) -> Result<Synced> {
    let doing = || "comparing large objects".to_owned();
    // Another session of ours, whose connection broke, may still have a commit on its way.
    let known = "BEGIN; LOCK TABLE walferry.large_object IN SHARE ROW EXCLUSIVE MODE";
    target.batch_execute(known).await.context(doing)?;
    let there = there(target, true, after, last).await?;
    let of_source: BTreeSet<u32> = page.iter().map(|object| object.oid).collect();
    let gone: Vec<u32> = there.keys().copied().filter(|oid| !of_source.contains(oid)).collect();
    let is_known = |object: &Object| {
        there.get(&object.oid).is_some_and(|(is_there, known)| *is_there && known.as_ref() == Some(&object.marker))
    };
    let changed = |object: &&Object| !is_known(object);
    let changed: Vec<&Object> = page.iter().filter(changed).collect();
    if !gone.is_empty() {
        remove(target, &gone).await.context(|| "removing large objects that the source has no more".into())?;
    }
    let mut copied = 0;
    for together in changed.chunks(TOGETHER) {
        // There already, and this ledger has never copied it: as on the way back, where all of them are.
        let unknown: Vec<u32> = together
            .iter()
            .filter(|object| there.get(&object.oid) == Some(&(true, None)))
            .map(|object| object.oid)
            .collect();
        let equal = equal_content(source, target, &unknown).await?;
        let (equal, different): (Vec<&Object>, Vec<&Object>) =
            together.iter().partition(|object| equal.contains(&object.oid));
        copy_content(source, target, &different).await?;
        describe(target, owners, together).await?;
        copied += different.len() as u64;
        tracing::debug!(copied = different.len(), equal = equal.len(), "large objects");
    }
    tokio::try_join!(target.batch_execute("COMMIT"), source.batch_execute("COMMIT"))
        .context(|| "copying large objects".into())?;
    Ok(Synced { copied, removed: gone.len() as u64 })
}

/// Where the page ends that these objects are: behind the last of the source, everything is too much.
pub(super) fn last_of(page: &[Object]) -> u32 {
    page.last().filter(|_| page.len() as i64 == PAGE).map_or(u32::MAX, |object| object.oid)
}

/// What the target has with OIDs behind `after` and up to `last`: whether it is there, and what the ledger knows of it, where there is one.
/// What a managed service has of its own is not the migration's.
pub(super) async fn there(
    target: &Client,
    is_kept: bool,
    after: u32,
    last: u32,
) -> Result<BTreeMap<u32, (bool, Option<String>)>> {
    let doing = || "comparing large objects".to_owned();
    let table = "SELECT pg_catalog.to_regclass('walferry.large_object') IS NOT NULL";
    let known = match is_kept && target.query_typed_one(table, &[]).await.context(doing)?.get::<_, bool>(0) {
        true => "SELECT loid, marker FROM walferry.large_object WHERE loid > $1 AND loid <= $2",
        false => "SELECT NULL::oid AS loid, NULL::text AS marker WHERE false",
    };
    let rows = target
        .query_typed(
            &format!(
                "SELECT coalesce(m.oid, l.loid), m.oid IS NOT NULL, l.marker \
                 FROM (SELECT oid FROM pg_catalog.pg_largeobject_metadata WHERE oid > $1 AND oid <= $2 \
                         AND (pg_catalog.pg_get_userbyid(lomowner) NOT IN ({SERVICE_OWNERS}) \
                              OR pg_catalog.pg_get_userbyid(lomowner) = current_user)) m \
                 FULL JOIN ({known}) l ON l.loid = m.oid"
            ),
            &[(&after, Type::OID), (&last, Type::OID)],
        )
        .await
        .context(doing)?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}

async fn remove(target: &Client, oids: &[u32]) -> Result<()> {
    let parameter = [(&oids as &(dyn ToSql + Sync), Type::OID_ARRAY)];
    tokio::try_join!(
        target.query_typed(
            "SELECT pg_catalog.lo_unlink(oid) FROM pg_catalog.pg_largeobject_metadata WHERE oid = ANY ($1)",
            &parameter
        ),
        target.execute_typed("DELETE FROM walferry.large_object WHERE loid = ANY ($1)", &parameter),
    )?;
    Ok(())
}

/// Those of some objects that both sides have with the same content.
pub(super) async fn equal_content(source: &Client, target: &Client, oids: &[u32]) -> Result<BTreeSet<u32>> {
    if oids.is_empty() {
        return Ok(BTreeSet::new());
    }
    let query =
        format!("SELECT m.oid, {} FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid = ANY ($1)", content_hash());
    let parameter = [(&oids as &(dyn ToSql + Sync), Type::OID_ARRAY)];
    let (here, there) =
        tokio::try_join!(source.query_typed(&query, &parameter), target.query_typed(&query, &parameter))
            .context(|| format!("comparing the large objects {oids:?}"))?;
    let hashes = |rows: &[Row]| rows.iter().map(|row| (row.get(0), row.get(1))).collect::<BTreeSet<(u32, String)>>();
    Ok(hashes(&here).intersection(&hashes(&there)).map(|(oid, _)| *oid).collect())
}

/// Gives objects the source's content, in the transactions that both sessions are in. One that is there keeps whatever else it has.
async fn copy_content(source: &Client, target: &Client, objects: &[&Object]) -> Result<()> {
    if objects.is_empty() {
        return Ok(());
    }
    let oids: Vec<u32> = objects.iter().map(|object| object.oid).collect();
    let doing = || format!("copying the large objects {oids:?}");
    let first = format!("SELECT o, pg_catalog.lo_get(o, 0, {CHUNK_BYTES}) FROM pg_catalog.unnest($1) o");
    let rows = source.query_typed(&first, &[(&oids, Type::OID_ARRAY)]).await.context(doing)?;
    let read: Vec<u32> = rows.iter().map(|row| row.get(0)).collect();
    let contents: Vec<&[u8]> = rows.iter().map(|row| row.get(1)).collect();
    let parameter = [(&oids as &(dyn ToSql + Sync), Type::OID_ARRAY)];
    let with_content: [(&(dyn ToSql + Sync), Type); 2] = [(&read, Type::OID_ARRAY), (&contents, Type::BYTEA_ARRAY)];
    // Sent in this order without waiting for each answer. 131072 is INV_WRITE.
    tokio::try_join!(
        target.query_typed(
            "SELECT pg_catalog.lo_truncate64(pg_catalog.lo_open(oid, 131072), 0) \
             FROM pg_catalog.pg_largeobject_metadata WHERE oid = ANY ($1)",
            &parameter
        ),
        target.query_typed(
            "SELECT pg_catalog.lo_create(o) FROM pg_catalog.unnest($1) o \
             WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid = o)",
            &parameter
        ),
        target.query_typed(
            "SELECT pg_catalog.lo_put(o, 0, b) FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) u(o, b)",
            &with_content,
        ),
    )
    .context(doing)?;
    for (oid, _) in read.iter().zip(&contents).filter(|(_, content)| content.len() as i64 == CHUNK_BYTES) {
        copy_rest(source, target, *oid).await.context(doing)?;
    }
    Ok(())
}

/// Gives objects their comments, privileges and owners, and writes their markers into the ledger.
async fn describe(target: &Client, owners: &Owners, objects: &[&Object]) -> Result<()> {
    let oids: Vec<u32> = objects.iter().map(|object| object.oid).collect();
    let doing = || format!("giving the large objects {oids:?} their comments, privileges and owners");
    let granted = target
        .query_typed(
            "SELECT m.oid, pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(m.lomowner)), \
                    (SELECT pg_catalog.array_agg(DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' \
                         ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END) \
                     FROM pg_catalog.aclexplode(m.lomacl) a) \
             FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid = ANY ($1)",
            &[(&oids, Type::OID_ARRAY)],
        )
        .await
        .context(doing)?;
    let there: BTreeMap<u32, There> =
        granted.iter().map(|row| (row.get(0), There { owner: row.get(1), granted: row.get(2) })).collect();
    let statements = |object: &&Object| metadata_statements(object, owners, there.get(&object.oid));
    let statements: Vec<String> = objects.iter().flat_map(statements).collect();
    target.batch_execute(&statements.join("; ")).await.context(doing)?;
    let markers: Vec<&str> = objects.iter().map(|object| object.marker.as_str()).collect();
    target
        .execute_typed(
            "INSERT INTO walferry.large_object SELECT * FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) u(o, m) \
             ON CONFLICT (loid) DO UPDATE SET marker = excluded.marker",
            &[(&oids, Type::OID_ARRAY), (&markers, Type::TEXT_ARRAY)],
        )
        .await
        .context(doing)?;
    Ok(())
}

/// What is behind the first chunk. A chunk of nothing but zeros is not written, as holes are not stored, unless it is the last, which
/// says where the object ends.
async fn copy_rest(source: &Client, target: &Client, oid: u32) -> Result<()> {
    let read = format!("SELECT pg_catalog.lo_get($1, $2, {CHUNK_BYTES})");
    let mut at = CHUNK_BYTES;
    let mut hole_before = false;
    loop {
        let row = source.query_typed_one(&read, &[(&oid, Type::OID), (&at, Type::INT8)]).await?;
        let chunk: &[u8] = row.get(0);
        let is_last = (chunk.len() as i64) < CHUNK_BYTES;
        if chunk.iter().any(|byte| *byte != 0) || is_last && !chunk.is_empty() {
            put(target, oid, at, chunk).await?;
            hole_before = false;
        } else if is_last && hole_before {
            // It ends with a whole chunk of zeros.
            put(target, oid, at - 1, &[0]).await?;
        } else {
            hole_before = true;
        }
        if is_last {
            return Ok(());
        }
        at += CHUNK_BYTES;
    }
}

async fn put(target: &Client, oid: u32, at: i64, bytes: &[u8]) -> Result<()> {
    target
        .query_typed(
            "SELECT pg_catalog.lo_put($1, $2, $3)",
            &[(&oid, Type::OID), (&at, Type::INT8), (&bytes, Type::BYTEA)],
        )
        .await?;
    Ok(())
}

/// Whose an object is on the target, and who has been granted something there (`None` for the built-in privileges): ready for SQL.
struct There {
    owner: String,
    granted: Option<Vec<String>>,
}

/// Comment, owner and privileges.
fn metadata_statements(object: &Object, owners: &Owners, there: Option<&There>) -> Vec<String> {
    let granted = there.and_then(|there| there.granted.as_ref());
    let this = format!("LARGE OBJECT {}", object.oid);
    let comment = object.comment.as_deref().map_or("NULL".to_owned(), sql::literal);
    let mut statements = vec![format!("COMMENT ON {this} IS {comment}")];
    let owner = sql::identifier(owners.role(&object.owner));
    if !owners.no_owner {
        statements.push(format!("ALTER {this} OWNER TO {owner}"));
    }
    if owners.no_privileges || object.privileges.is_none() && granted.is_none() {
        return statements;
    }
    // Without owners it stays whose it is there: on the way back the old server's own.
    let own = match there {
        Some(there) if owners.no_owner => &there.owner,
        _ if owners.no_owner => "CURRENT_USER",
        _ => &owner,
    };
    for role in granted.into_iter().flatten() {
        statements.push(format!("REVOKE ALL ON {this} FROM {role}"));
    }
    statements.push(format!("REVOKE ALL ON {this} FROM {own}"));
    let Some(privileges) = &object.privileges else {
        statements.push(format!("GRANT ALL ON {this} TO {own}"));
        return statements;
    };
    for (grantee, privilege, is_grantable) in privileges {
        let grantee = match grantee {
            None => "PUBLIC".to_owned(),
            Some(grantee) if *grantee == object.owner => own.to_owned(),
            Some(grantee) => sql::identifier(owners.role(grantee)),
        };
        let passing_on = if *is_grantable { " WITH GRANT OPTION" } else { "" };
        statements.push(format!("GRANT {privilege} ON {this} TO {grantee}{passing_on}"));
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_owners_what_the_owner_may_is_granted_to_whose_it_is_there() {
        let object = Object {
            oid: 7,
            owner: "migrator".into(),
            privileges: Some(vec![
                (Some("migrator".into()), "SELECT".into(), false),
                (Some("reader".into()), "SELECT".into(), false),
            ]),
            comment: None,
            marker: String::new(),
        };
        let owners = Owners { no_owner: true, ..Owners::default() };
        let there = There { owner: "app".into(), granted: Some(vec!["app".into(), "reader".into()]) };
        let statements = metadata_statements(&object, &owners, Some(&there));
        let expected = [
            "COMMENT ON LARGE OBJECT 7 IS NULL",
            "REVOKE ALL ON LARGE OBJECT 7 FROM app",
            "REVOKE ALL ON LARGE OBJECT 7 FROM reader",
            "REVOKE ALL ON LARGE OBJECT 7 FROM app",
            "GRANT SELECT ON LARGE OBJECT 7 TO app",
            "GRANT SELECT ON LARGE OBJECT 7 TO \"reader\"",
        ];
        assert_eq!(statements, expected);
    }
}
