//! Whether every acknowledged write is on the target: the application's [`Book`] against what plain SQL reads there.
//!
//! [`observe`] reads what the target holds of everything the book speaks of, and [`judge`] compares, without a server.
//! What would go unseen in a single look is caught by counting: if an update were lost at the switch, the application's next
//! one would make the same version again, so versions are counted, and two writes never share one.

use std::collections::{BTreeSet, HashMap, HashSet};

use tokio_postgres::Client;

use super::book::{Book, Entity, Fact, Side, Write};
use crate::error::{Context, Result};

/// What the target holds of the things that the book speaks of.
#[derive(Debug, Default)]
pub struct Observed {
    /// Numbers of all writes in `ledger_entry`.
    pub entries: HashSet<i64>,
    /// Those of the customers asked for that exist.
    pub customers: HashSet<i64>,
    /// Order → invoice and number of lines. Lines without an order count too, with invoice 0.
    pub orders: HashMap<i64, (i64, i64)>,
    /// Row → how often it was updated, and by which write last.
    pub versions: HashMap<(Entity, i64), (i64, i64)>,
    /// (order, version) → rows in `order_history`.
    pub history: HashMap<(i64, i64), i64>,
    /// Product → MD5 of its description.
    pub descriptions: HashMap<i64, String>,
    /// Event → where it stands; more than one place is one too many.
    pub events: HashMap<i64, Vec<i64>>,
    /// Write → rows in `page_view`.
    pub page_views: HashMap<i64, i64>,
}

/// A claim of the book that the target does not bear out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flaw {
    /// The write that is not there as it should be.
    pub number: i64,
    /// What was looked for and what was found.
    pub text: String,
}

/// Reads what the target holds, when the application has stopped.
///
/// # Errors
/// What the server said.
pub async fn observe(client: &Client, book: &Book) -> Result<Observed> {
    let doing = || "reading the application's writes on the target".to_owned();
    let mut observed = Observed::default();
    let subjects = Subjects::of(book);
    for row in client.query("SELECT number FROM shop.ledger_entry", &[]).await.context(doing)? {
        observed.entries.insert(row.get(0));
    }
    let statement = "SELECT id FROM shop.customer WHERE id = ANY ($1)";
    for row in client.query(statement, &[&subjects.customers]).await.context(doing)? {
        observed.customers.insert(row.get(0));
    }
    let statement = "SELECT coalesce(o.id, l.order_id), coalesce(o.invoice, 0), coalesce(l.lines, 0)
                     FROM (SELECT id, invoice FROM shop.\"Order\" WHERE id = ANY ($1)) o
                     FULL JOIN (SELECT order_id, count(*) AS lines FROM shop.\"Order Line\" WHERE order_id = ANY ($1)
                                GROUP BY order_id) l ON l.order_id = o.id";
    for row in client.query(statement, &[&subjects.orders]).await.context(doing)? {
        observed.orders.insert(row.get(0), (row.get(1), row.get(2)));
    }
    for entity in Entity::ALL {
        let (table, key) = entity.table_and_key();
        let keys = subjects.updated.get(&entity).cloned().unwrap_or_default();
        let statement = format!("SELECT {key}::bigint, version, mark FROM {table} WHERE {key}::bigint = ANY ($1)");
        for row in client.query(&statement, &[&keys]).await.context(doing)? {
            observed.versions.insert((entity, row.get(0)), (row.get(1), row.get(2)));
        }
    }
    let statement = "SELECT order_id, version, count(*) FROM shop.order_history GROUP BY order_id, version";
    for row in client.query(statement, &[]).await.context(doing)? {
        observed.history.insert((row.get(0), row.get(1)), row.get(2));
    }
    let statement = "SELECT id::bigint, md5(description) FROM shop.product";
    for row in client.query(statement, &[]).await.context(doing)? {
        observed.descriptions.insert(row.get(0), row.get(1));
    }
    let statement = "SELECT id, extract(epoch FROM happened)::bigint FROM shop.event WHERE id = ANY ($1)";
    for row in client.query(statement, &[&subjects.events]).await.context(doing)? {
        observed.events.entry(row.get(0)).or_default().push(row.get(1));
    }
    let statement = "SELECT mark, count(*) FROM shop.page_view WHERE mark > 0 GROUP BY mark";
    for row in client.query(statement, &[]).await.context(doing)? {
        observed.page_views.insert(row.get(0), row.get(1));
    }
    Ok(observed)
}

/// The keys that the book speaks of, known outcome or not.
#[derive(Default)]
struct Subjects {
    customers: Vec<i64>,
    orders: Vec<i64>,
    events: Vec<i64>,
    updated: HashMap<Entity, Vec<i64>>,
}

impl Subjects {
    fn of(book: &Book) -> Subjects {
        let mut subjects = Subjects::default();
        let mut updated: BTreeSet<(Entity, i64)> = BTreeSet::new();
        for fact in book.acknowledged.iter().chain(&book.unknown).flat_map(|write| &write.facts) {
            match fact {
                Fact::CustomerAdded { id } => subjects.customers.push(*id),
                Fact::OrderPlaced { id, .. } | Fact::OrderDeleted { id } => subjects.orders.push(*id),
                Fact::EventAt { id, .. } => subjects.events.push(*id),
                Fact::Updated { entity, key, .. } => {
                    updated.insert((*entity, *key));
                }
                Fact::StatusChanged { .. } | Fact::Described { .. } | Fact::PagesViewed { .. } => {}
            }
        }
        for (entity, key) in updated {
            subjects.updated.entry(entity).or_default().push(key);
        }
        subjects
    }
}

/// Every claim of the book that does not hold on the target, once per write and claim, by write number.
pub fn judge(book: &Book, observed: &Observed) -> Vec<Flaw> {
    let mut flaws = BTreeSet::new();
    let doubt = Doubt::of(&book.unknown);
    for number in book.rolled_back.iter().filter(|number| observed.entries.contains(number)) {
        flaws.insert(Flaw { number: *number, text: "it was rolled back, but it is on the target".to_owned() });
    }
    let mut history = History::default();
    for write in &book.acknowledged {
        if !observed.entries.contains(&write.number) {
            flaws.insert(Flaw { number: write.number, text: "its row in shop.ledger_entry is missing".to_owned() });
        }
        for fact in &write.facts {
            if let Some(text) = history.note(write.number, fact).or_else(|| judge_fact(write.number, fact, observed)) {
                flaws.insert(Flaw { number: write.number, text });
            }
        }
    }
    history.judge(observed, &doubt, &mut flaws);
    flaws.into_iter().collect()
}

/// How many acknowledged writes of one side have a flaw.
pub fn missing(book: &Book, flaws: &[Flaw], side: Side) -> u64 {
    let flawed: HashSet<i64> = flaws.iter().map(|flaw| flaw.number).collect();
    let of_side = book.acknowledged.iter().filter(|write| Side::of(write.number) == side);
    of_side.filter(|write| flawed.contains(&write.number)).count() as u64
}

/// What can be judged of a fact without knowing of later ones.
fn judge_fact(number: i64, fact: &Fact, observed: &Observed) -> Option<String> {
    match fact {
        Fact::CustomerAdded { id } if !observed.customers.contains(id) => Some(format!("customer {id} is missing")),
        Fact::StatusChanged { order, version } => {
            let rows = observed.history.get(&(*order, *version)).copied().unwrap_or_default();
            (rows != 1).then(|| format!("version {version} of order {order} is {rows} times in the history, not once"))
        }
        Fact::PagesViewed { rows } => {
            let found = observed.page_views.get(&number).copied().unwrap_or_default();
            (found != *rows).then(|| format!("{found} of its {rows} page views are there"))
        }
        _ => None,
    }
}

/// What the acknowledged writes did to each thing, taken together.
#[derive(Default)]
struct History {
    /// Order → (the write, invoice, lines).
    placed: HashMap<i64, (i64, i64, i64)>,
    /// Order → the write that deleted it.
    deleted: HashMap<i64, i64>,
    /// Row → its updates: how many, and version and write of the last.
    updates: HashMap<(Entity, i64), (i64, i64, i64)>,
    /// Every version made.
    versions: HashSet<(Entity, i64, i64)>,
    /// Product → version, write and MD5 of the newest description.
    described: HashMap<i64, (i64, i64, String)>,
    /// Event → (the write, where it put it); one writer works on an event, so its answers come in order.
    events: HashMap<i64, (i64, i64)>,
}

impl History {
    fn note(&mut self, number: i64, fact: &Fact) -> Option<String> {
        match fact {
            Fact::OrderPlaced { id, invoice, lines } => {
                let earlier = self.placed.insert(*id, (number, *invoice, *lines));
                return earlier.map(|(other, ..)| format!("order {id} was placed twice, by write {other} as well"));
            }
            Fact::OrderDeleted { id } => {
                self.deleted.insert(*id, number);
            }
            Fact::EventAt { id, happened } => {
                self.events.insert(*id, (number, *happened));
            }
            Fact::Updated { entity, key, version } => {
                let (count, newest, by) = self.updates.entry((*entity, *key)).or_default();
                *count += 1;
                if *version > *newest {
                    (*newest, *by) = (*version, number);
                }
                if !self.versions.insert((*entity, *key, *version)) {
                    let (table, _) = entity.table_and_key();
                    return Some(format!(
                        "version {version} of {table} {key} was made twice: an update before it is lost"
                    ));
                }
            }
            Fact::Described { product, version, md5 } => {
                let newest = self.described.entry(*product).or_default();
                if *version > newest.0 {
                    *newest = (*version, number, md5.clone());
                }
            }
            Fact::CustomerAdded { .. } | Fact::StatusChanged { .. } | Fact::PagesViewed { .. } => {}
        }
        None
    }

    fn judge(&self, observed: &Observed, doubt: &Doubt, flaws: &mut BTreeSet<Flaw>) {
        let mut flaw = |number: i64, text: String| {
            flaws.insert(Flaw { number, text });
        };
        for (id, (number, invoice, lines)) in &self.placed {
            let found = observed.orders.get(id);
            if !self.deleted.contains_key(id) && !doubt.deleted.contains(id) && found != Some(&(*invoice, *lines)) {
                flaw(*number, format!("order {id} should have invoice {invoice} and {lines} lines, found {found:?}"));
            }
        }
        for (id, number) in &self.deleted {
            if observed.orders.contains_key(id) {
                flaw(*number, format!("order {id} was deleted, but it or a line of it is there"));
            }
        }
        for ((entity, key), (count, newest, by)) in &self.updates {
            let gone = *entity == Entity::Order && (self.deleted.contains_key(key) || doubt.deleted.contains(key));
            if gone {
                continue;
            }
            let (table, _) = entity.table_and_key();
            let in_doubt = doubt.updates.get(&(*entity, *key)).copied().unwrap_or_default();
            match observed.versions.get(&(*entity, *key)) {
                None => flaw(*by, format!("{table} {key} is missing")),
                Some((version, _)) if !(*count..=count + in_doubt).contains(version) => {
                    flaw(*by, format!("{table} {key} was updated {count} times, but it is at version {version}"));
                }
                Some((version, mark)) if version == newest && mark != by => {
                    flaw(*by, format!("version {version} of {table} {key} is that of write {mark}"));
                }
                Some(_) => {}
            }
        }
        for (product, (version, number, md5)) in &self.described {
            if observed.descriptions.get(product) != Some(md5) && !doubt.described.contains(product) {
                flaw(*number, format!("product {product} does not have the description of its version {version}"));
            }
        }
        for (id, (number, happened)) in &self.events {
            let found = observed.events.get(id).map(Vec::as_slice).unwrap_or_default();
            let right = if doubt.events.contains(id) { found.len() == 1 } else { found == [*happened] };
            if !right {
                flaw(*number, format!("event {id} should be once, at {happened}, found {found:?}"));
            }
        }
    }
}

/// What writes with an unknown outcome may have changed.
#[derive(Default)]
struct Doubt {
    deleted: HashSet<i64>,
    updates: HashMap<(Entity, i64), i64>,
    described: HashSet<i64>,
    events: HashSet<i64>,
}

impl Doubt {
    fn of(unknown: &[Write]) -> Doubt {
        let mut doubt = Doubt::default();
        for fact in unknown.iter().flat_map(|write| &write.facts) {
            match fact {
                Fact::OrderDeleted { id } => {
                    doubt.deleted.insert(*id);
                }
                Fact::Updated { entity, key, .. } => *doubt.updates.entry((*entity, *key)).or_default() += 1,
                Fact::Described { product, .. } => {
                    doubt.described.insert(*product);
                }
                Fact::EventAt { id, .. } => {
                    doubt.events.insert(*id);
                }
                _ => {}
            }
        }
        doubt
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::book::AFTER_SWITCH;

    /// Four writes as the application knows them, and a target that has them all.
    fn a_small_world() -> (Book, Observed) {
        let mut book = Book::default();
        let stock = |version| Fact::Updated { entity: Entity::Stock, key: 7, version };
        let order = |version| Fact::Updated { entity: Entity::Order, key: 50, version };
        let writes = [
            (
                1,
                vec![
                    Fact::OrderPlaced { id: 50, invoice: 900, lines: 2 },
                    stock(1),
                    Fact::EventAt { id: 3, happened: 10 },
                ],
            ),
            (2, vec![Fact::StatusChanged { order: 50, version: 1 }, order(1), Fact::CustomerAdded { id: 5 }]),
            (4, vec![stock(2), Fact::PagesViewed { rows: 3 }, Fact::EventAt { id: 3, happened: 20 }]),
            (AFTER_SWITCH, vec![stock(3), Fact::Described { product: 7, version: 1, md5: "m".to_owned() }]),
        ];
        for (number, facts) in writes {
            book.acknowledge(Write { number, facts });
        }
        book.rolled_back.push(3);
        let observed = Observed {
            entries: HashSet::from([1, 2, 4, AFTER_SWITCH]),
            customers: HashSet::from([5]),
            orders: HashMap::from([(50, (900, 2))]),
            versions: HashMap::from([((Entity::Stock, 7), (3, AFTER_SWITCH)), ((Entity::Order, 50), (1, 2))]),
            history: HashMap::from([((50, 1), 1)]),
            descriptions: HashMap::from([(7, "m".to_owned())]),
            events: HashMap::from([(3, vec![20])]),
            page_views: HashMap::from([(4, 3)]),
        };
        (book, observed)
    }

    #[test]
    fn a_target_with_every_write_has_no_flaw() {
        let (book, observed) = a_small_world();
        assert_eq!(judge(&book, &observed), []);
        assert_eq!(book.acknowledged_at(Side::Source), 3);
        assert_eq!(book.acknowledged_at(Side::Target), 1);
    }

    #[test]
    fn whatever_is_missing_or_too_much_is_laid_at_the_door_of_its_write() {
        type Harm = fn(&mut Observed);
        let harms: [(i64, &str, Harm); 13] = [
            (2, "ledger_entry is missing", |o| {
                o.entries.remove(&2);
            }),
            (3, "was rolled back", |o| {
                o.entries.insert(3);
            }),
            (2, "customer 5 is missing", |o| {
                o.customers.remove(&5);
            }),
            (1, "order 50 should have", |o| {
                o.orders.remove(&50);
            }),
            (1, "and 2 lines", |o| {
                o.orders.insert(50, (900, 1));
            }),
            (2, "Order\" 50 is missing", |o| {
                o.versions.remove(&(Entity::Order, 50));
            }),
            (AFTER_SWITCH, "at version 2", |o| {
                o.versions.insert((Entity::Stock, 7), (2, 4));
            }),
            (AFTER_SWITCH, "that of write 4", |o| {
                o.versions.insert((Entity::Stock, 7), (3, 4));
            }),
            (2, "2 times in the history", |o| {
                o.history.insert((50, 1), 2);
            }),
            (AFTER_SWITCH, "description of its version 1", |o| {
                o.descriptions.insert(7, "x".to_owned());
            }),
            (4, "should be once, at 20", |o| {
                o.events.insert(3, vec![10]);
            }),
            (4, "found [10, 20]", |o| {
                o.events.insert(3, vec![10, 20]);
            }),
            (4, "2 of its 3 page views", |o| {
                o.page_views.insert(4, 2);
            }),
        ];
        for (number, words, harm) in harms {
            let (book, mut observed) = a_small_world();
            harm(&mut observed);
            let flaws = judge(&book, &observed);
            assert_eq!(flaws.len(), 1, "{words}: {flaws:?}");
            assert_eq!(flaws[0].number, number, "{flaws:?}");
            assert!(flaws[0].text.contains(words), "{flaws:?} does not say {words:?}");
        }
    }

    #[test]
    fn an_update_lost_at_the_switch_shows_although_the_application_wrote_on() {
        let (mut book, mut observed) = a_small_world();
        // The target had only version 1 of the stock when the application came, so it made version 2 once more.
        book.acknowledged[3].facts[0] = Fact::Updated { entity: Entity::Stock, key: 7, version: 2 };
        observed.versions.insert((Entity::Stock, 7), (2, AFTER_SWITCH));
        let flaws = judge(&book, &observed);
        assert!(flaws.iter().any(|flaw| flaw.text.contains("was made twice")), "{flaws:?}");
        assert!(flaws.iter().any(|flaw| flaw.text.contains("updated 3 times")), "{flaws:?}");
    }

    #[test]
    fn a_deleted_order_must_stay_away() {
        let (mut book, mut observed) = a_small_world();
        book.acknowledge(Write { number: 9, facts: vec![Fact::OrderDeleted { id: 50 }] });
        observed.entries.insert(9);
        let flaws = judge(&book, &observed);
        assert_eq!((flaws.len(), missing(&book, &flaws, Side::Source)), (1, 1), "{flaws:?}");
        observed.orders.clear();
        observed.versions.remove(&(Entity::Order, 50));
        assert_eq!(judge(&book, &observed), []);
    }

    #[test]
    fn a_write_whose_answer_never_came_may_be_there_or_not() {
        let (mut book, mut observed) = a_small_world();
        let facts = vec![
            Fact::Updated { entity: Entity::Stock, key: 7, version: 4 },
            Fact::EventAt { id: 3, happened: 99 },
            Fact::OrderDeleted { id: 50 },
        ];
        book.unknown.push(Write { number: AFTER_SWITCH + 1, facts });
        assert_eq!(judge(&book, &observed), [], "it is not there");
        observed.entries.insert(AFTER_SWITCH + 1);
        observed.versions.insert((Entity::Stock, 7), (4, AFTER_SWITCH + 1));
        observed.events.insert(3, vec![99]);
        observed.orders.clear();
        assert_eq!(judge(&book, &observed), [], "it is there");
        observed.versions.insert((Entity::Stock, 7), (5, AFTER_SWITCH + 1));
        assert_eq!(judge(&book, &observed).len(), 1, "but not twice");
    }
}
