//! The items of a dump that a part of the database needs.
//!
//! `pg_dump`'s own filters would leave out what the chosen tables need (their schemas, types, functions), and would bring what
//! cannot be made without the others (foreign keys, views). So all of the schema is dumped, and the dependencies that the dump itself
//! names decide:
//!
//! | | comes |
//! |---|---|
//! | a relation | where it was chosen |
//! | another object (type, function, …) | where its schema was chosen, or something that comes needs it |
//! | what hangs on an object (index, constraint, trigger, comment, grant, …) | with it |
//! | whatever needs a relation that does not come | not at all |

use std::collections::{BTreeSet, HashMap};

use super::dump::{CLASS_RELATION, Dumped};
use crate::error::{Error, ErrorKind, Result};
use crate::source::catalog::Schemas;
use crate::source::scope::Selection;
use crate::target::ledger::SchemaItem;

/// What hangs on an object and is nothing without it.
const HANGING: [&str; 21] = [
    "ACL",
    "CHECK CONSTRAINT",
    "COMMENT",
    "CONSTRAINT",
    "DEFAULT",
    "FK CONSTRAINT",
    "INDEX",
    "INDEX ATTACH",
    "MATERIALIZED VIEW DATA",
    "POLICY",
    "PUBLICATION TABLE",
    "PUBLICATION TABLES IN SCHEMA",
    "ROW SECURITY",
    "RULE",
    "SECURITY LABEL",
    "SEQUENCE OWNED BY",
    "SEQUENCE SET",
    "STATISTICS",
    "STATISTICS DATA",
    "TABLE ATTACH",
    "TRIGGER",
];

/// The items of the part that was selected, in the dump's order; all of them where nothing was. The schemas are those of all objects
/// that are no relations, by the OIDs of their catalog and their own.
///
/// # Errors
/// `Blocked` when a table that was chosen cannot be made without one that was not.
pub fn wanted(dumped: Vec<Dumped>, part: Option<(&Selection, &Schemas)>) -> Result<Vec<SchemaItem>> {
    let Some((selection, schemas)) = part else {
        return Ok(dumped.into_iter().map(|dumped| dumped.item).collect());
    };
    let graph = Graph::of(&dumped, selection);
    let poisoned = graph.poisoned();
    for item in &dumped {
        if graph.is_chosen_table(item) && poisoned.contains(&item.dump_id) {
            let needs = item.dependencies.iter().filter_map(|needed| graph.items.get(needed));
            let missing = needs.filter(|needed| poisoned.contains(&needed.dump_id)).map(|needed| &needed.item);
            let named: Vec<String> =
                missing.map(|item| format!("{} {}", item.kind.to_lowercase(), item.name)).collect();
            let text =
                format!("the table {} cannot be made without what is left out: {}", item.item.name, named.join(", "));
            return Err(Error::new(ErrorKind::Blocked, text).hint("Include that too, or leave the table out."));
        }
    }
    let kept = graph.kept(&dumped, &poisoned, schemas);
    Ok(dumped.into_iter().filter(|item| kept.contains(&item.dump_id)).map(|dumped| dumped.item).collect())
}

/// The items without some relations, by their OIDs, and without everything that needs one of them.
pub fn without(dumped: Vec<Dumped>, relations: &BTreeSet<u32>) -> Vec<Dumped> {
    let mut gone: BTreeSet<u32> = BTreeSet::new();
    // An item can stand before one that it needs.
    loop {
        let before = gone.len();
        for item in &dumped {
            let is_one = item.class == CLASS_RELATION && relations.contains(&item.oid);
            if is_one || item.dependencies.iter().any(|needed| gone.contains(needed)) {
                gone.insert(item.dump_id);
            }
        }
        if gone.len() == before {
            break;
        }
    }
    dumped.into_iter().filter(|item| !gone.contains(&item.dump_id)).collect()
}

struct Graph<'a> {
    items: HashMap<u32, &'a Dumped>,
    needed_by: HashMap<u32, Vec<&'a Dumped>>,
    selection: &'a Selection,
}

impl<'a> Graph<'a> {
    fn of(dumped: &'a [Dumped], selection: &'a Selection) -> Graph<'a> {
        let mut needed_by: HashMap<u32, Vec<&Dumped>> = HashMap::new();
        for item in dumped {
            for needed in &item.dependencies {
                needed_by.entry(*needed).or_default().push(item);
            }
        }
        Graph { items: dumped.iter().map(|item| (item.dump_id, item)).collect(), needed_by, selection }
    }

    fn is_relation(item: &Dumped) -> bool {
        item.class == CLASS_RELATION && !is_hanging(item)
    }

    fn is_chosen_table(&self, item: &Dumped) -> bool {
        item.item.kind == "TABLE" && item.class == CLASS_RELATION && self.selection.relations.contains(&item.oid)
    }

    /// Whether an item cannot be there without another that it names. A partition is made as a table of its own, and so is its key;
    /// both are attached by items of their own.
    fn stands_on(&self, item: &Dumped, needed: &Dumped) -> bool {
        let is_partition =
            item.class == CLASS_RELATION && self.selection.partition_of.get(&item.oid) == Some(&needed.oid);
        let is_key = |item: &Dumped| matches!(item.item.kind.as_str(), "CONSTRAINT" | "INDEX");
        !(is_partition || is_key(item) && is_key(needed))
    }

    /// Everything that cannot be there because a relation is left out.
    fn poisoned(&self) -> BTreeSet<u32> {
        let is_left = |item: &&&Dumped| Self::is_relation(item) && !self.selection.relations.contains(&item.oid);
        let mut open: Vec<&Dumped> = self.items.values().filter(is_left).copied().collect();
        let mut poisoned: BTreeSet<u32> = open.iter().map(|item| item.dump_id).collect();
        while let Some(left) = open.pop() {
            for item in self.needed_by.get(&left.dump_id).into_iter().flatten() {
                if self.stands_on(item, left) && poisoned.insert(item.dump_id) {
                    open.push(item);
                }
            }
        }
        poisoned
    }

    /// What was chosen, what that needs, what hangs on it, and what that needs.
    fn kept(&self, dumped: &'a [Dumped], poisoned: &BTreeSet<u32>, schemas: &Schemas) -> BTreeSet<u32> {
        let is_chosen = |item: &Dumped| {
            if Self::is_relation(item) {
                self.selection.relations.contains(&item.oid)
            } else if is_hanging(item) {
                // On something that is in no dump, as the schema public.
                !self.selection.by_name && !item.dependencies.iter().any(|needed| self.items.contains_key(needed))
            } else {
                match schemas.get(&(item.class, item.oid)) {
                    Some(0) | None => !self.selection.by_name,
                    Some(schema) => self.selection.schemas.contains(schema),
                }
            }
        };
        let mut open: Vec<&Dumped> =
            dumped.iter().filter(|item| !poisoned.contains(&item.dump_id) && is_chosen(item)).collect();
        let mut kept: BTreeSet<u32> = open.iter().map(|item| item.dump_id).collect();
        while let Some(item) = open.pop() {
            let needed = item.dependencies.iter().filter_map(|needed| self.items.get(needed)).copied();
            let hanging =
                self.needed_by.get(&item.dump_id).into_iter().flatten().copied().filter(|item| is_hanging(item));
            for other in needed.chain(hanging) {
                if !poisoned.contains(&other.dump_id) && kept.insert(other.dump_id) {
                    open.push(other);
                }
            }
        }
        kept
    }
}

pub(super) fn is_hanging(item: &Dumped) -> bool {
    HANGING.contains(&item.item.kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::ledger::Section;

    const TYPE: u32 = 1247;
    const FUNCTION: u32 = 1255;

    fn item(dump_id: u32, (class, oid): (u32, u32), kind: &str, dependencies: &[u32]) -> Dumped {
        let item = SchemaItem {
            section: Section::PreData,
            kind: kind.into(),
            name: dump_id.to_string(),
            relid: None,
            statement: "SELECT".into(),
        };
        Dumped { dump_id, class, oid, dependencies: dependencies.to_vec(), item }
    }

    fn kept(dumped: &[Dumped], selection: &Selection, schemas: &[((u32, u32), u32)]) -> Vec<u32> {
        let schemas = schemas.iter().copied().collect();
        let items = wanted(dumped.to_vec(), Some((selection, &schemas))).unwrap();
        items.iter().map(|item| item.name.parse().unwrap()).collect()
    }

    fn relations(oids: &[u32]) -> Selection {
        Selection { relations: oids.iter().copied().collect(), by_name: true, ..Selection::default() }
    }

    #[test]
    fn a_table_brings_what_it_needs_and_what_hangs_on_it_and_nothing_else() {
        let dumped = [
            item(1, (2615, 50), "SCHEMA", &[]),
            item(2, (TYPE, 60), "TYPE", &[1]),
            item(3, (TYPE, 61), "TYPE", &[1]),
            item(4, (FUNCTION, 70), "FUNCTION", &[1]),
            item(5, (CLASS_RELATION, 100), "TABLE", &[1, 2]),
            item(6, (CLASS_RELATION, 101), "TABLE", &[1]),
            item(7, (0, 0), "COMMENT", &[5]),
            item(8, (2620, 80), "TRIGGER", &[4, 5]),
            item(9, (0, 0), "COMMENT", &[8]),
            item(10, (0, 0), "ACL", &[6]),
            item(11, (2606, 90), "CONSTRAINT", &[6]),
            item(12, (2606, 91), "FK CONSTRAINT", &[11, 5, 6]),
            item(13, (0, 0), "ACL", &[999]),
        ];
        assert_eq!(kept(&dumped, &relations(&[100]), &[((TYPE, 60), 50), ((TYPE, 61), 50)]), [1, 2, 4, 5, 7, 8, 9]);
    }

    #[test]
    fn relations_are_left_out_with_all_that_hangs_on_them() {
        let dumped = [
            item(1, (CLASS_RELATION, 100), "TABLE", &[]),
            item(2, (2606, 90), "FK CONSTRAINT", &[4, 3]),
            item(3, (CLASS_RELATION, 101), "TABLE", &[1]),
            item(4, (2606, 91), "CONSTRAINT", &[1]),
            item(5, (0, 0), "ACL", &[3]),
            item(6, (2606, 92), "FK CONSTRAINT", &[1, 4]),
        ];
        let left: Vec<u32> = without(dumped.to_vec(), &BTreeSet::from([101])).iter().map(|item| item.dump_id).collect();
        assert_eq!(left, [1, 4, 6]);
    }

    #[test]
    fn without_a_name_only_what_needs_the_excluded_is_left_out() {
        let dumped = [
            item(1, (FUNCTION, 70), "FUNCTION", &[]),
            item(2, (FUNCTION, 71), "FUNCTION", &[4]),
            item(3, (CLASS_RELATION, 100), "TABLE", &[]),
            item(4, (CLASS_RELATION, 101), "TABLE", &[]),
            item(5, (CLASS_RELATION, 102), "VIEW", &[4]),
            item(6, (0, 0), "ACL", &[999]),
            item(7, (3466, 5), "EVENT TRIGGER", &[1]),
        ];
        let mut selection = relations(&[100, 102]);
        (selection.by_name, selection.schemas) = (false, BTreeSet::from([50]));
        assert_eq!(kept(&dumped, &selection, &[((FUNCTION, 70), 50), ((FUNCTION, 71), 50)]), [1, 3, 6, 7]);
    }

    #[test]
    fn a_partition_can_come_without_its_root_and_is_then_attached_to_nothing() {
        let dumped = [
            item(1, (CLASS_RELATION, 100), "TABLE", &[]),
            item(2, (CLASS_RELATION, 101), "TABLE", &[1]),
            item(3, (0, 0), "TABLE ATTACH", &[2, 1]),
            item(4, (2606, 90), "CONSTRAINT", &[1]),
            item(5, (2606, 91), "CONSTRAINT", &[2, 4]),
            item(6, (0, 0), "INDEX ATTACH", &[5, 4, 1, 2]),
        ];
        let mut selection = relations(&[101]);
        selection.partition_of.insert(101, 100);
        assert_eq!(kept(&dumped, &selection, &[]), [2, 5]);
    }

    #[test]
    fn a_table_that_needs_one_that_is_left_out_is_refused_by_name() {
        let dumped = [item(1, (CLASS_RELATION, 100), "TABLE", &[]), item(2, (CLASS_RELATION, 101), "TABLE", &[1])];
        let error = wanted(dumped.to_vec(), Some((&relations(&[101]), &Schemas::new()))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Blocked);
        assert!(
            error.to_string().contains("table 2 cannot be made") && error.to_string().contains("table 1"),
            "{error}"
        );
    }
}
