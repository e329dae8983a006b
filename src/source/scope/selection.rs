//! The relations that the filters come to, as the catalog is now.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Pattern, Scope};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::USER_RELATION;

/// What is moved of a database.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// OIDs of tables, partitioned tables, views, materialized views, foreign tables and sequences.
    pub relations: BTreeSet<u32>,
    /// OIDs of the schemas of which all other objects are moved too.
    pub schemas: BTreeSet<u32>,
    /// Something was included by name: what is in no schema comes only where something needs it.
    pub by_name: bool,
    /// The partitioned table of each partition.
    pub partition_of: BTreeMap<u32, u32>,
    /// What was wanted and cannot come without what is left out.
    pub left_out: Vec<LeftOut>,
    /// Foreign keys of tables that stay, to tables that move.
    pub stays: Vec<LeftOut>,
    /// Tables that cannot be made without one that is left out: `table X inherits from Y`.
    pub impossible: Vec<LeftOut>,
}

/// An object that is not moved because of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// As an operator would name it: `view public.v`.
    pub object: String,
    /// What it needs.
    pub needs: String,
}

struct Relation {
    name: String,
    kind: char,
    included: bool,
    excluded: bool,
}

impl Scope {
    /// What it comes to on a server; `None` for all of it. A pattern that names nothing names nothing.
    ///
    /// # Errors
    /// `Usage` for a pattern that is none; else whatever the server says.
    pub async fn select(&self, client: &Client) -> Result<Option<Selection>> {
        Ok(self.select_and_name_unmatched(client).await?.map(|(selection, _)| selection))
    }

    /// The same, for the beginning of a migration: each pattern has to name something.
    ///
    /// # Errors
    /// `Usage` with the patterns that do not; as `select` otherwise.
    pub async fn select_strictly(&self, client: &Client) -> Result<Option<Selection>> {
        let Some((selection, unmatched)) = self.select_and_name_unmatched(client).await? else { return Ok(None) };
        if unmatched.is_empty() {
            return Ok(Some(selection));
        }
        let text = format!("nothing in the source's database is named by {}", unmatched.join(", "));
        Err(Error::new(ErrorKind::Usage, text).hint(
            "Patterns are those of pg_dump: a name without a schema is looked for in the role's search_path only, upper case needs \
             double quotes, and * stands for any letters.",
        ))
    }

    async fn select_and_name_unmatched(&self, client: &Client) -> Result<Option<(Selection, Vec<String>)>> {
        if !self.is_part() {
            return Ok(None);
        }
        let database: String = client.query_typed_one("SELECT pg_catalog.current_database()::text", &[]).await?.get(0);
        let of_table = |patterns: &[String]| -> Result<Vec<Pattern>> {
            patterns.iter().map(|pattern| Pattern::of_table(pattern, &database)).collect()
        };
        let of_schema = |patterns: &[String]| -> Result<Vec<Pattern>> {
            patterns.iter().map(|pattern| Pattern::of_schema(pattern, &database)).collect()
        };
        let tables = [of_table(&self.include_tables)?, of_table(&self.exclude_tables)?].concat();
        let schemas = [of_schema(&self.include_schemas)?, of_schema(&self.exclude_schemas)?].concat();

        let mut matched_tables = BTreeSet::new();
        let mut matched_schemas = BTreeSet::new();
        let mut schema_flags: BTreeMap<u32, (bool, bool)> = BTreeMap::new();
        for (oid, matches) in schemas_matching(client, &schemas).await? {
            let included = matches.iter().any(|at| *at < self.include_schemas.len());
            let excluded = matches.iter().any(|at| *at >= self.include_schemas.len());
            matched_schemas.extend(matches);
            schema_flags.insert(oid, (included, excluded));
        }
        let mut relations = BTreeMap::new();
        for row in relations_matching(client, &tables).await? {
            let (in_schema, out_schema) = schema_flags.get(&row.schema).copied().unwrap_or_default();
            let named = row.matches.iter().any(|at| *at < self.include_tables.len());
            let excluded = row.matches.iter().any(|at| *at >= self.include_tables.len());
            matched_tables.extend(row.matches);
            let everything = self.include_tables.is_empty() && self.include_schemas.is_empty();
            relations.insert(
                row.oid,
                Relation {
                    name: row.name,
                    kind: row.kind,
                    included: everything || named || in_schema,
                    excluded: excluded || out_schema,
                },
            );
        }
        let unmatched: Vec<String> =
            unmatched(&tables, &matched_tables).into_iter().chain(unmatched(&schemas, &matched_schemas)).collect();
        let edges = edges(client).await?;
        let by_name = !self.include_tables.is_empty() || !self.include_schemas.is_empty();
        let everything_in_schemas = !by_name;
        let wanted_schemas = schema_flags
            .iter()
            .filter(|(_, (included, excluded))| (*included || everything_in_schemas) && !*excluded)
            .map(|(oid, _)| *oid)
            .collect();
        let mut selection = decide(&relations, &edges);
        (selection.schemas, selection.by_name) = (wanted_schemas, by_name);
        Ok(Some((selection, unmatched)))
    }
}

fn unmatched(patterns: &[Pattern], matched: &BTreeSet<usize>) -> Vec<String> {
    let missing = patterns.iter().enumerate().filter(|(at, _)| !matched.contains(at));
    missing.map(|(_, pattern)| pattern.text.clone()).collect()
}

/// What hangs on what, by OIDs.
#[derive(Default)]
struct Edges {
    /// A child and its parent.
    partitions: Vec<(u32, u32)>,
    inheritance: Vec<(u32, u32)>,
    /// A table, and a sequence that it owns or takes a default from.
    sequences: Vec<(u32, u32)>,
    /// A view, and what it reads.
    views: Vec<(u32, u32)>,
    /// The constraint's name, its table and the one it refers to.
    foreign_keys: Vec<(String, u32, u32)>,
}

/// The rules of this module's table.
fn decide(relations: &BTreeMap<u32, Relation>, edges: &Edges) -> Selection {
    let mut selection = Selection { partition_of: edges.partitions.iter().copied().collect(), ..Selection::default() };
    let ancestors = |relid: u32| {
        std::iter::successors(Some(relid), |relid| selection.partition_of.get(relid).copied()).collect::<Vec<_>>()
    };
    let is_selected = |relid: u32, relation: &Relation| {
        let line: Vec<&Relation> = ancestors(relid).iter().filter_map(|relid| relations.get(relid)).collect();
        (relation.included || line.iter().any(|ancestor| ancestor.included && ancestor.kind == 'p'))
            && !line.iter().any(|ancestor| ancestor.excluded)
    };
    let mut chosen: BTreeSet<u32> =
        relations.iter().filter(|(relid, relation)| is_selected(**relid, relation)).map(|(relid, _)| *relid).collect();
    let needed = edges.sequences.iter().filter(|(table, _)| chosen.contains(table)).map(|(_, sequence)| *sequence);
    let needed: BTreeSet<u32> = needed.filter(|sequence| relations.contains_key(sequence)).collect();
    // A sequence of a table that is left out goes with it.
    let owned_elsewhere: BTreeSet<u32> = edges
        .sequences
        .iter()
        .filter(|(table, sequence)| {
            !chosen.contains(table) && relations.contains_key(table) && !needed.contains(sequence)
        })
        .map(|(_, sequence)| *sequence)
        .collect();
    chosen.retain(|relid| !owned_elsewhere.contains(relid));
    chosen.extend(needed);

    let name = |relid: &u32| relations.get(relid).map_or_else(|| relid.to_string(), |relation| relation.name.clone());
    // A view that reads from a view that is left out is left out too.
    loop {
        let lost = edges
            .views
            .iter()
            .find(|(view, read)| chosen.contains(view) && relations.contains_key(read) && !chosen.contains(read));
        let Some((view, read)) = lost else { break };
        chosen.remove(view);
        let kind = if relations.get(view).is_some_and(|view| view.kind == 'm') { "materialized view" } else { "view" };
        selection.left_out.push(LeftOut { object: format!("{kind} {}", name(view)), needs: name(read) });
    }
    for (constraint, table, referred) in &edges.foreign_keys {
        if chosen.contains(table) && relations.contains_key(referred) && !chosen.contains(referred) {
            let object = format!("foreign key {constraint} of table {}", name(table));
            selection.left_out.push(LeftOut { object, needs: name(referred) });
        } else if chosen.contains(referred) && relations.contains_key(table) && !chosen.contains(table) {
            let object = format!("foreign key {constraint} of table {}", name(table));
            selection.stays.push(LeftOut { object, needs: name(referred) });
        }
    }
    for (child, parent) in &edges.inheritance {
        if chosen.contains(child) && relations.contains_key(parent) && !chosen.contains(parent) {
            let (object, needs) = (format!("table {}", name(child)), name(parent));
            selection.impossible.push(LeftOut { object, needs });
        }
    }
    selection.relations = chosen;
    selection
}

/// Each schema of users with the places of the patterns that name it.
async fn schemas_matching(client: &Client, patterns: &[Pattern]) -> Result<Vec<(u32, Vec<usize>)>> {
    let names: Vec<&str> = patterns.iter().map(|pattern| pattern.name.as_str()).collect();
    let rows = client
        .query_typed(
            "SELECT n.oid, ARRAY(SELECT (p.at - 1)::int4 FROM unnest($1) WITH ORDINALITY p(name, at) \
                                 WHERE n.nspname::text COLLATE pg_catalog.\"default\" OPERATOR(pg_catalog.~) p.name) \
             FROM pg_catalog.pg_namespace n WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
               AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp\\_%'",
            &[(&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "matching the patterns for schemas".into())?;
    Ok(rows.iter().map(|row| (row.get(0), places(row.get(1)))).collect())
}

fn places(numbers: Vec<i32>) -> Vec<usize> {
    numbers.into_iter().filter_map(|number| usize::try_from(number).ok()).collect()
}

struct Matching {
    oid: u32,
    schema: u32,
    name: String,
    kind: char,
    matches: Vec<usize>,
}

/// Each relation of users with the places of the patterns that name it. A name without a schema is looked for in the search path
/// that the role has, as `pg_dump` does.
async fn relations_matching(client: &Client, patterns: &[Pattern]) -> Result<Vec<Matching>> {
    let schemas: Vec<Option<&str>> = patterns.iter().map(|pattern| pattern.schema.as_deref()).collect();
    let names: Vec<&str> = patterns.iter().map(|pattern| pattern.name.as_str()).collect();
    let path: String = client
        .query_typed_one(
            "SELECT coalesce((SELECT substr(c.setting, 13) FROM pg_catalog.pg_db_role_setting s \
                     LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole CROSS JOIN unnest(s.setconfig) c(setting) \
                     WHERE c.setting LIKE 'search_path=%' AND (s.setrole = 0 OR r.rolname = current_user) \
                       AND s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())) \
                     ORDER BY s.setrole <> 0 DESC, s.setdatabase <> 0 DESC LIMIT 1), '\"$user\", public')",
            &[],
        )
        .await
        .context(|| "asking for the role's search_path".into())?
        .get(0);
    let set = |path: String| async move {
        client
            .query_typed("SELECT pg_catalog.set_config('search_path', $1, false)", &[(&path, Type::TEXT)])
            .await
            .context(|| "setting the search_path".into())
            .map(drop)
    };
    set(path).await?;
    let rows = client
        .query_typed(
            &format!(
                "SELECT c.oid, n.oid, pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind::text, \
                        ARRAY(SELECT (p.at - 1)::int4 FROM ROWS FROM (unnest($1), unnest($2)) WITH ORDINALITY p(schema, name, at) \
                              WHERE c.relname::text COLLATE pg_catalog.\"default\" OPERATOR(pg_catalog.~) p.name \
                                AND CASE WHEN p.schema IS NULL THEN pg_catalog.pg_table_is_visible(c.oid) \
                                    ELSE n.nspname::text COLLATE pg_catalog.\"default\" OPERATOR(pg_catalog.~) p.schema END) \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND c.relpersistence <> 't' AND {USER_RELATION}"
            ),
            &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "matching the patterns for tables".into());
    set("pg_catalog".to_owned()).await?;
    let matching = |row: &tokio_postgres::Row| Matching {
        oid: row.get(0),
        schema: row.get(1),
        name: row.get(2),
        kind: row.get::<_, &str>(3).chars().next().unwrap_or(' '),
        matches: places(row.get(4)),
    };
    Ok(rows?.iter().map(matching).collect())
}

async fn edges(client: &Client) -> Result<Edges> {
    let rows = client
        .query_typed(
            "SELECT CASE WHEN c.relispartition THEN 'partition' ELSE 'child' END, i.inhrelid, i.inhparent, NULL::text \
             FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid WHERE c.relkind IN ('r', 'p', 'f') \
             UNION ALL \
             SELECT 'sequence', d.refobjid, d.objid, NULL FROM pg_catalog.pg_depend d \
             JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S' \
             WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass \
               AND d.deptype IN ('a', 'i') \
             UNION ALL \
             SELECT DISTINCT 'sequence', a.adrelid, d.refobjid, NULL FROM pg_catalog.pg_depend d \
             JOIN pg_catalog.pg_attrdef a ON a.oid = d.objid \
             JOIN pg_catalog.pg_class s ON s.oid = d.refobjid AND s.relkind = 'S' \
             WHERE d.classid = 'pg_catalog.pg_attrdef'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass \
             UNION ALL \
             SELECT DISTINCT 'view', w.ev_class, d.refobjid, NULL FROM pg_catalog.pg_depend d \
             JOIN pg_catalog.pg_rewrite w ON w.oid = d.objid AND w.rulename = '_RETURN' \
             WHERE d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass \
               AND d.refobjid <> w.ev_class \
             UNION ALL \
             SELECT 'foreign key', k.conrelid, k.confrelid, pg_catalog.quote_ident(k.conname) FROM pg_catalog.pg_constraint k \
             WHERE k.contype = 'f' AND k.conparentid = 0",
            &[],
        )
        .await
        .context(|| "reading what hangs on what in the catalog".into())?;
    let mut edges = Edges::default();
    for row in rows {
        let (from, to): (u32, u32) = (row.get(1), row.get(2));
        match row.get::<_, &str>(0) {
            "partition" => edges.partitions.push((from, to)),
            "child" => edges.inheritance.push((from, to)),
            "sequence" => edges.sequences.push((from, to)),
            "view" => edges.views.push((from, to)),
            _ => edges.foreign_keys.push((row.get::<_, Option<String>>(3).unwrap_or_default(), from, to)),
        }
    }
    Ok(edges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relation(name: &str, kind: char, included: bool, excluded: bool) -> Relation {
        Relation { name: name.into(), kind, included, excluded }
    }

    #[test]
    fn partitions_come_and_go_with_their_root() {
        let relations = BTreeMap::from([
            (1, relation("root", 'p', true, false)),
            (2, relation("leaf", 'r', false, false)),
            (3, relation("unwanted", 'r', false, true)),
            (4, relation("gone", 'p', true, true)),
            (5, relation("its_leaf", 'r', true, false)),
        ]);
        let edges = Edges { partitions: vec![(2, 1), (3, 1), (5, 4)], ..Edges::default() };
        assert_eq!(decide(&relations, &edges).relations, BTreeSet::from([1, 2]));
    }

    #[test]
    fn a_sequence_comes_with_its_table_and_goes_with_it() {
        let relations = BTreeMap::from([
            (1, relation("kept", 'r', true, false)),
            (2, relation("left", 'r', true, true)),
            (3, relation("of_kept", 'S', true, true)),
            (4, relation("of_left", 'S', true, false)),
            (5, relation("free", 'S', true, false)),
        ]);
        let edges = Edges { sequences: vec![(1, 3), (2, 4)], ..Edges::default() };
        assert_eq!(decide(&relations, &edges).relations, BTreeSet::from([1, 3, 5]));
    }

    #[test]
    fn what_needs_something_that_is_left_out_is_named() {
        let relations = BTreeMap::from([
            (1, relation("s.kept", 'r', true, false)),
            (2, relation("s.left", 'r', false, false)),
            (3, relation("s.v", 'v', true, false)),
            (4, relation("s.w", 'm', true, false)),
        ]);
        let edges = Edges {
            views: vec![(4, 3), (3, 2), (3, 1)],
            foreign_keys: vec![("fk".into(), 1, 2), ("back".into(), 2, 1)],
            inheritance: vec![(1, 2)],
            ..Edges::default()
        };
        let selection = decide(&relations, &edges);
        assert_eq!(selection.relations, BTreeSet::from([1]));
        let left: Vec<&str> = selection.left_out.iter().map(|left| left.object.as_str()).collect();
        assert_eq!(left, ["view s.v", "materialized view s.w", "foreign key fk of table s.kept"]);
        assert_eq!(selection.stays[0].object, "foreign key back of table s.left");
        assert_eq!(selection.impossible, [LeftOut { object: "table s.kept".into(), needs: "s.left".into() }]);
    }
}
