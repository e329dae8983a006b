//! A dump of which some objects do not come, and others come in another form, with all that stands on those behind them.

use std::collections::{BTreeSet, HashMap};

use super::dump::{CLASS_RELATION, Dumped};
use super::wanted::is_hanging;
use crate::target::ledger::{SchemaItem, Section};

/// What comes instead of what was dumped.
#[derive(Debug, Default)]
pub struct Instead {
    /// Relations that do not come, nor what hangs on them.
    pub without: BTreeSet<u32>,
    /// Items that come when all is there but what follows.
    pub then: Vec<SchemaItem>,
    /// Views that come in another form, in this order behind those items; and behind them what needs them.
    pub views: Vec<View>,
    /// Triggers that do not come either, by a part of their text.
    pub without_triggers: &'static [&'static str],
    /// An extension that is made otherwise.
    pub without_extension: &'static str,
    /// The views are made by their owners, and not given to them: our role is no superuser, and they may not have what is made with it.
    pub by_owners: bool,
}

/// A view in another form.
#[derive(Debug)]
pub struct View {
    /// Its OID.
    pub relid: u32,
    /// As items call it.
    pub name: String,
    /// The statement that makes it; its owner is that of the dump.
    pub create: String,
    /// What follows.
    pub after: Vec<String>,
}

/// The items with what comes instead of some of them.
pub fn instead(dumped: Vec<Dumped>, instead: Instead) -> Vec<Dumped> {
    let is_relation = |item: &Dumped, oid: u32| item.class == CLASS_RELATION && item.oid == oid && !is_hanging(item);
    let is_without =
        |item: &&Dumped| item.class == CLASS_RELATION && instead.without.contains(&item.oid) && !is_hanging(item);
    let without = reached(&dumped, dumped.iter().filter(is_without), true);
    let of_view = |view: &View| dumped.iter().find(|item| is_relation(item, view.relid));
    let stands_on_views = reached(&dumped, instead.views.iter().filter_map(of_view), false);
    let views = instead.views.iter().map(|view| {
        let text = of_view(view).map_or("", |item| item.item.statement.as_str());
        let statements = match owner(text).filter(|_| instead.by_owners) {
            Some(owner) => {
                let begin = vec![format!("SET LOCAL ROLE {owner}"), view.create.clone()];
                [begin, view.after.clone(), vec!["RESET ROLE".to_owned()]].concat()
            }
            None => [vec![view.create.clone()], given_to_owner(text), view.after.clone()].concat(),
        };
        made("CONTINUOUS AGGREGATE", &view.name, statements.join(";\n"))
    });
    let then: Vec<Dumped> = instead.then.iter().cloned().map(dumped_as).chain(views).collect();
    let is_view = |item: &Dumped| instead.views.iter().any(|view| is_relation(item, view.relid));
    let is_own = |item: &SchemaItem| match item.kind.as_str() {
        "TRIGGER" => instead.without_triggers.iter().any(|text| item.statement.contains(text)),
        "EXTENSION" => item.name == instead.without_extension,
        _ => false,
    };
    let comes = |item: &Dumped| !without.contains(&item.dump_id) && !is_view(item) && !is_own(&item.item);
    let (before, rest): (Vec<Dumped>, Vec<Dumped>) = dumped
        .iter()
        .filter(|item| comes(item))
        .cloned()
        .partition(|item| item.item.section == Section::PreData && !stands_on_views.contains(&item.dump_id));
    before.into_iter().chain(then).chain(rest).collect()
}

/// The items that need some items, directly or not: those that hang on them, or all.
fn reached<'a>(dumped: &'a [Dumped], from: impl Iterator<Item = &'a Dumped>, hanging_only: bool) -> BTreeSet<u32> {
    let mut needed_by: HashMap<u32, Vec<&Dumped>> = HashMap::new();
    for item in dumped {
        for needed in &item.dependencies {
            needed_by.entry(*needed).or_default().push(item);
        }
    }
    let mut open: Vec<&Dumped> = from.collect();
    let mut reached: BTreeSet<u32> = open.iter().map(|item| item.dump_id).collect();
    while let Some(item) = open.pop() {
        for other in needed_by.get(&item.dump_id).into_iter().flatten() {
            if (!hanging_only || is_hanging(other)) && reached.insert(other.dump_id) {
                open.push(other);
            }
        }
    }
    reached
}

/// What the dump says of a view's owner, as it is said of a materialized one.
fn given_to_owner(statement: &str) -> Vec<String> {
    let line = |line: &str| {
        let (_, rest) = line.strip_prefix("ALTER ")?.split_once(' ')?;
        line.contains(" OWNER TO ").then(|| format!("ALTER MATERIALIZED VIEW {}", rest.trim_end_matches(';')))
    };
    statement.lines().filter_map(line).collect()
}

/// The owner by what the dump says, quoted as it is there.
fn owner(statement: &str) -> Option<&str> {
    let of = |line: &'_ str| -> Option<usize> { line.starts_with("ALTER ").then(|| line.find(" OWNER TO "))? };
    let line = statement.lines().find(|line| of(line).is_some())?;
    line.split_once(" OWNER TO ").map(|(_, owner)| owner.trim_end_matches(';'))
}

fn made(kind: &str, name: &str, statement: String) -> Dumped {
    dumped_as(SchemaItem {
        section: Section::PreData,
        kind: kind.to_owned(),
        name: name.to_owned(),
        relid: None,
        statement,
    })
}

fn dumped_as(item: SchemaItem) -> Dumped {
    Dumped { dump_id: 0, class: 0, oid: 0, dependencies: Vec::new(), item }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(dump_id: u32, oid: u32, kind: &str, dependencies: &[u32], statement: &str) -> Dumped {
        let section = if kind == "INDEX" { Section::PostData } else { Section::PreData };
        let item = SchemaItem {
            section,
            kind: kind.into(),
            name: dump_id.to_string(),
            relid: None,
            statement: statement.into(),
        };
        let class = if matches!(kind, "TABLE" | "VIEW" | "INDEX") { CLASS_RELATION } else { 0 };
        Dumped { dump_id, class, oid, dependencies: dependencies.to_vec(), item }
    }

    #[test]
    fn a_view_in_another_form_comes_behind_all_tables_and_before_what_needs_it() {
        let dumped = vec![
            item(1, 11, "VIEW", &[2], "CREATE VIEW a.d AS SELECT 1;\n\n\nALTER TABLE a.d OWNER TO \"O\";"),
            item(6, 0, "ACL", &[1], "GRANT"),
            item(5, 0, "FUNCTION", &[1], "of the view's row"),
            item(2, 12, "TABLE", &[], "inner"),
            item(3, 13, "TABLE", &[], "raw"),
            item(4, 14, "INDEX", &[2], "of the inner"),
            item(7, 15, "INDEX", &[3], "of the raw"),
            item(8, 0, "TRIGGER", &[3], "EXECUTE FUNCTION own.x()"),
        ];
        let view = View { relid: 11, name: "d".into(), create: "CREATE".into(), after: vec!["AFTER".into()] };
        let then = vec![SchemaItem {
            section: Section::PreData,
            kind: "H".into(),
            name: "h".into(),
            relid: None,
            statement: "make".into(),
        }];
        let without_triggers = &["EXECUTE FUNCTION own."];
        let made = instead(
            dumped,
            Instead {
                without: [12].into(),
                then,
                views: vec![view],
                without_triggers,
                without_extension: "x",
                by_owners: false,
            },
        );
        let statements: Vec<&str> = made.iter().map(|item| item.item.statement.as_str()).collect();
        let view = "CREATE;\nALTER MATERIALIZED VIEW a.d OWNER TO \"O\";\nAFTER";
        assert_eq!(statements, ["raw", "make", view, "GRANT", "of the view's row", "of the raw"]);
        assert_eq!(owner("CREATE VIEW a.d AS SELECT 1;\n\nALTER TABLE a.d OWNER TO \"O\";"), Some("\"O\""));
    }
}
