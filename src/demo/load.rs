//! The application of the demo: writers that do what a shop does, on the source until they are told of the switch.
//!
//! Each writer has one session and does one transaction after the other. When the session breaks or the server
//! refuses to write, it tries the same thing again on whichever server is the right one by then. What was
//! acknowledged goes into the [`Book`], after the answer to COMMIT and nowhere earlier.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Transaction};

use super::book::{AFTER_SWITCH, Book, Entity, Fact, Side, Write};
use super::schema::Sizes;
use crate::error::{Error, Result};

/// How long the application waits for a server before it gives a session up.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits before it tries again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// The running application.
#[derive(Debug)]
pub struct Application {
    book: Arc<Mutex<Book>>,
    route: watch::Sender<Route>,
    writers: JoinSet<()>,
}

/// What all writers look at before each transaction.
#[derive(Clone, Copy, Debug)]
struct Route {
    side: Side,
    stop: bool,
}

impl Application {
    /// Starts so many writers at the source. Needs a running tokio runtime.
    pub fn start(source_url: &str, target_url: &str, writers: u32, sizes: Sizes) -> Application {
        let book = Arc::new(Mutex::new(Book::default()));
        let numbers = Arc::new(AtomicI64::new(1));
        let (route, _) = watch::channel(Route { side: Side::Source, stop: false });
        let mut tasks = JoinSet::new();
        for id in 0..writers {
            let writer = Writer {
                id: id.cast_signed(),
                urls: [source_url.to_owned(), target_url.to_owned()],
                sizes,
                book: Arc::clone(&book),
                numbers: Arc::clone(&numbers),
                dice: Dice(u64::from(id) + 1),
                own_orders: Vec::new(),
            };
            tasks.spawn(writer.run(route.subscribe()));
        }
        Application { book, route, writers: tasks }
    }

    /// From now on, every transaction that begins goes to the target.
    pub fn switch(&self) {
        self.route.send_modify(|route| route.side = Side::Target);
    }

    /// How many writes one side has acknowledged.
    pub fn acknowledged_at(&self, side: Side) -> u64 {
        lock(&self.book).acknowledged_at(side)
    }

    /// Lets every writer end its transaction, and hands over what they know.
    pub async fn stop(mut self) -> Book {
        self.route.send_modify(|route| route.stop = true);
        while self.writers.join_next().await.is_some() {}
        std::mem::take(&mut *lock(&self.book))
    }
}

/// A writer that panicked has written nothing by half: the book is good whatever happened to another lock holder.
fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a transaction is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    PlaceOrder,
    ChangeStatus,
    CancelOrder,
    Reprice,
    Describe,
    AddCustomer,
    EditCustomer,
    ViewPages,
    MoveEvent,
    ThinkBetter,
}

/// What became of an attempt.
enum Outcome {
    Acknowledged(Vec<Fact>),
    RolledBack,
    /// COMMIT was not reached, so nothing was written.
    Failed(Error),
    /// COMMIT was sent, and its answer was not a plain yes.
    Unknown(Vec<Fact>, Error),
}

/// An order that a writer placed itself, and so may cancel: nobody else deletes it.
#[derive(Clone, Copy, Debug)]
struct OwnOrder {
    id: i64,
    event: i64,
}

struct Writer {
    id: i32,
    urls: [String; 2],
    sizes: Sizes,
    book: Arc<Mutex<Book>>,
    numbers: Arc<AtomicI64>,
    dice: Dice,
    own_orders: Vec<OwnOrder>,
}

impl Writer {
    async fn run(mut self, route: watch::Receiver<Route>) {
        let mut session: Option<(Side, Client)> = None;
        let mut action = self.choose();
        loop {
            let Route { side, stop } = *route.borrow();
            if stop {
                return;
            }
            let connected = session.take().filter(|(of, client)| *of == side && !client.is_closed());
            let client = match connected {
                Some((_, client)) => client,
                None => match self.connect(side).await {
                    Ok(client) => client,
                    Err(error) => {
                        self.note_error(side, &error);
                        tokio::time::sleep(RETRY_PAUSE).await;
                        continue;
                    }
                },
            };
            let (client, again) = self.attempt(side, client, action).await;
            session = client.map(|client| (side, client));
            if again {
                tokio::time::sleep(RETRY_PAUSE).await;
            } else {
                action = self.choose();
                tokio::time::sleep(Duration::from_micros(500 + self.dice.below(3_000).unsigned_abs())).await;
            }
        }
    }

    /// One transaction and what is noted of it. Hands the session back if it is worth keeping, and whether to try again.
    async fn attempt(&mut self, side: Side, mut client: Client, action: Action) -> (Option<Client>, bool) {
        let base = if side == Side::Target { AFTER_SWITCH } else { 0 };
        let number = base + self.numbers.fetch_add(1, Ordering::Relaxed);
        match self.transact(&mut client, number, action).await {
            Outcome::Acknowledged(facts) => {
                self.remember_own(&facts);
                lock(&self.book).acknowledge(Write { number, facts });
                (Some(client), false)
            }
            Outcome::RolledBack => {
                lock(&self.book).rolled_back.push(number);
                (Some(client), false)
            }
            Outcome::Failed(error) => {
                lock(&self.book).rolled_back.push(number);
                self.note_error(side, &error);
                (None, true)
            }
            Outcome::Unknown(facts, error) => {
                self.forget_own(&facts);
                lock(&self.book).unknown.push(Write { number, facts });
                self.note_error(side, &error);
                (None, false)
            }
        }
    }

    async fn connect(&self, side: Side) -> Result<Client> {
        let url = &self.urls[usize::from(side == Side::Target)];
        let connecting = tokio::time::timeout(PATIENCE, tokio_postgres::connect(url, NoTls));
        let (client, connection) = connecting.await.map_err(|_| no_answer())??;
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// The transaction itself, up to the answer to its COMMIT.
    async fn transact(&mut self, client: &mut Client, number: i64, action: Action) -> Outcome {
        let work = async {
            let transaction = client.transaction().await?;
            let facts = self.work(&transaction, number, action).await?;
            let name = format!("{action:?}");
            let entry = "INSERT INTO shop.ledger_entry (number, writer, action) VALUES ($1, $2, $3)";
            transaction.execute(entry, &[&number, &self.id, &name]).await?;
            Ok::<_, Error>((transaction, facts))
        };
        let (transaction, facts) = match tokio::time::timeout(PATIENCE, work).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => return Outcome::Failed(error),
            Err(_) => return Outcome::Failed(no_answer()),
        };
        let rolls_back = action == Action::ThinkBetter;
        let end = async { if rolls_back { transaction.rollback().await } else { transaction.commit().await } };
        match tokio::time::timeout(PATIENCE, end).await {
            Ok(Ok(())) if rolls_back => Outcome::RolledBack,
            Ok(Ok(())) => Outcome::Acknowledged(facts),
            Ok(Err(error)) if rolls_back => Outcome::Failed(error.into()),
            Ok(Err(error)) => Outcome::Unknown(facts, error.into()),
            Err(_) if rolls_back => Outcome::Failed(no_answer()),
            Err(_) => Outcome::Unknown(facts, no_answer()),
        }
    }

    async fn work(&mut self, t: &Transaction<'_>, number: i64, action: Action) -> Result<Vec<Fact>> {
        let sizes = self.sizes;
        match action {
            Action::PlaceOrder => self.place_order(t, number).await,
            Action::ChangeStatus => {
                // Half of the time the order that was placed last: changes that fall into one batch with the insert.
                let order = match self.own_orders.last() {
                    Some(own) if self.dice.below(2) == 0 => own.id,
                    _ => 1 + self.dice.skewed(sizes.orders),
                };
                change_status(t, number, order).await
            }
            Action::CancelOrder => match self.dice.pick(&self.own_orders) {
                Some(own) => cancel_order(t, own.id).await,
                None => self.place_order(t, number).await,
            },
            Action::MoveEvent => match self.dice.pick(&self.own_orders) {
                Some(own) => move_event(t, number, own.event, self.dice.below(900)).await,
                None => self.place_order(t, number).await,
            },
            Action::Reprice => {
                let key = 1 + self.dice.skewed(sizes.products);
                let change =
                    "price = price + 0.01, attributes = attributes || '{\"sale\": true}', sizes = sizes[2:] || price";
                update(t, Entity::Product, change, key, number).await.map(|fact| vec![fact])
            }
            Action::Describe => describe(t, number, 1 + self.dice.skewed(sizes.products)).await,
            Action::AddCustomer => {
                let statement = "INSERT INTO shop.customer (email, name, country, tags, mark)
                                 VALUES ($1 || '@example.com', 'Jürgen ' || $1, 'AB', ARRAY['live', NULL], $2) RETURNING id";
                let row = t.query_one(statement, &[&format!("w{number}"), &number]).await?;
                Ok(vec![Fact::CustomerAdded { id: row.get(0) }])
            }
            Action::EditCustomer => {
                let key = 1 + self.dice.below(sizes.customers);
                let change = "preferences = preferences || jsonb_build_object('visits', version), tags = array_append(tags[1:3], 'edited')";
                update(t, Entity::Customer, change, key, number).await.map(|fact| vec![fact])
            }
            Action::ViewPages | Action::ThinkBetter => {
                let rows = 1 + self.dice.below(5);
                let statement = "INSERT INTO shop.page_view (path, session, mark)
                                 SELECT '/live/' || i, md5($1::bigint::text)::uuid, $1 FROM generate_series(1, $2::bigint) i";
                t.execute(statement, &[&number, &rows]).await?;
                Ok(vec![Fact::PagesViewed { rows }])
            }
        }
    }

    async fn place_order(&mut self, t: &Transaction<'_>, number: i64) -> Result<Vec<Fact>> {
        let customer = 1 + self.dice.below(self.sizes.customers);
        let mut products: Vec<i64> =
            (0..=self.dice.below(4)).map(|_| 1 + self.dice.skewed(self.sizes.products)).collect();
        // In one order for all writers, so that two of them cannot wait for each other.
        products.sort_unstable();
        products.dedup();
        let order = "INSERT INTO shop.\"Order\" (customer_id, mark) VALUES ($1, $2) RETURNING id, invoice";
        let order = t.query_one(order, &[&customer, &number]).await?;
        let (id, invoice): (i64, i64) = (order.get(0), order.get(1));
        let lines = "INSERT INTO shop.\"Order Line\" (order_id, \"Line No\", product_id, quantity, price, mark)
                     SELECT $1, u.n, p.id, 1 + p.id % 9, p.price, $3
                     FROM unnest($2::bigint[]) WITH ORDINALITY u (id, n) JOIN shop.product p ON p.id = u.id";
        let lines = t.execute(lines, &[&id, &products, &number]).await?.cast_signed();
        let mut facts = vec![Fact::OrderPlaced { id, invoice, lines }];
        for product in products {
            facts.push(update(t, Entity::Stock, "on_hand = on_hand - 1", product, number).await?);
        }
        let event = "INSERT INTO shop.event (happened, kind, payload, mark)
                     VALUES (timestamptz '2024-06-01 00:00Z' + $1::bigint % 500 * interval '1 day', 'placed',
                             jsonb_build_object('order', $1::bigint), $2)
                     RETURNING id, extract(epoch FROM happened)::bigint";
        let event = t.query_one(event, &[&id, &number]).await?;
        facts.push(Fact::EventAt { id: event.get(0), happened: event.get(1) });
        Ok(facts)
    }

    fn choose(&mut self) -> Action {
        match self.dice.below(100) {
            0..30 => Action::PlaceOrder,
            30..50 => Action::ChangeStatus,
            50..56 => Action::CancelOrder,
            56..68 => Action::Reprice,
            68..73 => Action::Describe,
            73..80 => Action::AddCustomer,
            80..88 => Action::EditCustomer,
            88..93 => Action::ViewPages,
            93..97 => Action::MoveEvent,
            _ => Action::ThinkBetter,
        }
    }

    fn remember_own(&mut self, facts: &[Fact]) {
        let placed =
            facts.iter().find_map(|fact| if let Fact::OrderPlaced { id, .. } = fact { Some(*id) } else { None });
        let event = facts.iter().find_map(|fact| if let Fact::EventAt { id, .. } = fact { Some(*id) } else { None });
        if let (Some(id), Some(event)) = (placed, event) {
            self.own_orders.push(OwnOrder { id, event });
        }
        self.forget_own(facts);
    }

    /// An order that is deleted, or that may be, is not worked on again.
    fn forget_own(&mut self, facts: &[Fact]) {
        for fact in facts {
            if let Fact::OrderDeleted { id } = fact {
                self.own_orders.retain(|own| own.id != *id);
            }
        }
    }

    fn note_error(&self, side: Side, error: &Error) {
        let mut book = lock(&self.book);
        if error.sqlstate() == Some(&SqlState::UNIQUE_VIOLATION) {
            book.unique_violations += 1;
        }
        // A server that goes away or is fenced is part of a move; a target that says no to what the source did is not.
        if side == Side::Target && !error.is_transient() {
            book.refused_at_target += 1;
        }
        book.error(side, error.to_string());
    }
}

/// `UPDATE … SET …, version = version + 1, mark = …`, and which version that made.
async fn update(t: &Transaction<'_>, entity: Entity, change: &str, key: i64, mark: i64) -> Result<Fact> {
    let (table, key_column) = entity.table_and_key();
    let statement = format!(
        "UPDATE {table} SET {change}, version = version + 1, mark = $2 WHERE {key_column} = $1::bigint RETURNING version"
    );
    let row = t.query_one(&statement, &[&key, &mark]).await?;
    Ok(Fact::Updated { entity, key, version: row.get(0) })
}

async fn change_status(t: &Transaction<'_>, number: i64, order: i64) -> Result<Vec<Fact>> {
    let next = "status = (enum_range(NULL::shop.order_status))[1 + (version + 1) % 5]";
    let updated = update(t, Entity::Order, next, order, number).await?;
    let mut facts = Vec::with_capacity(2);
    if let Fact::Updated { version, .. } = updated {
        facts.push(Fact::StatusChanged { order, version });
    }
    facts.push(updated);
    Ok(facts)
}

async fn cancel_order(t: &Transaction<'_>, id: i64) -> Result<Vec<Fact>> {
    t.execute("DELETE FROM shop.\"Order\" WHERE id = $1", &[&id]).await?;
    Ok(vec![Fact::OrderDeleted { id }])
}

async fn move_event(t: &Transaction<'_>, number: i64, event: i64, day: i64) -> Result<Vec<Fact>> {
    let statement =
        "UPDATE shop.event SET happened = timestamptz '2024-01-01 00:00Z' + $2::bigint * interval '1 day', mark = $3
                     WHERE id = $1 RETURNING extract(epoch FROM happened)::bigint";
    let row = t.query_one(statement, &[&event, &day, &number]).await?;
    Ok(vec![Fact::EventAt { id: event, happened: row.get(0) }])
}

/// A new description of some kilobytes; all other updates of a product leave it alone, so the stream does not carry it.
async fn describe(t: &Transaction<'_>, number: i64, product: i64) -> Result<Vec<Fact>> {
    let statement = "UPDATE shop.product SET version = version + 1, mark = $2, description =
                         (SELECT string_agg(md5($2::bigint || '/' || part), '') FROM generate_series(1, 100) part)
                     WHERE id = $1::bigint RETURNING version, md5(description)";
    let parameters: [&(dyn ToSql + Sync); 2] = [&product, &number];
    let row = t.query_one(statement, &parameters).await?;
    let (version, md5) = (row.get(0), row.get(1));
    let updated = Fact::Updated { entity: Entity::Product, key: product, version };
    Ok(vec![updated, Fact::Described { product, version, md5 }])
}

fn no_answer() -> Error {
    Error::new(crate::error::ErrorKind::Transient, format!("no answer within {PATIENCE:?}"))
}

/// Pseudo-random numbers that are the same in every run (SplitMix64 of Steele, Lea and Flood).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to one below the bound, which is at least 1.
    fn below(&mut self, bound: i64) -> i64 {
        (self.roll() % bound.max(1).unsigned_abs()).cast_signed()
    }

    /// Like [`Dice::below`], with small numbers much more often: every shop has its best sellers.
    fn skewed(&mut self, bound: i64) -> i64 {
        self.below(bound).min(self.below(bound)).min(self.below(bound))
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let position = self.below(i64::try_from(from.len()).unwrap_or(i64::MAX));
        from.get(usize::try_from(position).unwrap_or_default()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::proof;
    use crate::demo::schema::{self, APPLICATION_ROLE, DATABASE};
    use crate::demo::server::{ServerPrograms, StopMode, ThrowawayServer};

    /// A server with a shop, the application's connection string, and a session of our own.
    async fn a_shop(name: &str, sizes: Sizes) -> (ThrowawayServer, String, Client) {
        let programs = ServerPrograms::find(None).unwrap();
        let server = ThrowawayServer::start(&programs, name, &[]).await.unwrap();
        let client = schema::create_database(&server).await.unwrap();
        schema::fill(&client, sizes).await.unwrap();
        let url = format!("postgres://{APPLICATION_ROLE}@127.0.0.1:{}/{DATABASE}", server.port());
        (server, url, client)
    }

    async fn wait_for(application: &Application, side: Side, writes: u64) {
        while application.acknowledged_at(side) < writes {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_writers_do_everything_a_shop_does_and_nothing_is_refused() {
        let sizes = Sizes::of_rows(2_000);
        let (_server, url, client) = a_shop("load", sizes).await;
        let application = Application::start(&url, "postgres://127.0.0.1:1/nowhere", 3, sizes);
        wait_for(&application, Side::Source, 600).await;
        let book = application.stop().await;
        assert!(book.errors.is_empty(), "{:?}", book.errors);
        assert!(book.unknown.is_empty() && book.newest_at_source.is_some());
        assert_eq!(proof::judge(&book, &proof::observe(&client, &book).await.unwrap()), []);
        let actions = client.query("SELECT action, count(*) FROM shop.ledger_entry GROUP BY 1", &[]).await.unwrap();
        // All ten but the one that is always rolled back.
        assert_eq!(actions.len(), 9, "{actions:?}");
        assert!(!book.rolled_back.is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_acknowledged_write_survives_crashes_of_the_server_under_load() {
        let sizes = Sizes::of_rows(2_000);
        let (mut server, url, _) = a_shop("crash", sizes).await;
        let application = Application::start(&url, "postgres://127.0.0.1:1/nowhere", 3, sizes);
        for round in 1..=2 {
            wait_for(&application, Side::Source, round * 150).await;
            server.stop(StopMode::Immediate).await.unwrap();
            server.restart().await.unwrap();
        }
        wait_for(&application, Side::Source, 400).await;
        let book = application.stop().await;
        assert!(!book.errors.is_empty(), "the application noticed");
        assert!(book.unknown.len() < 20, "most outcomes are known: {}", book.unknown.len());
        let client = server.connect(DATABASE).await.unwrap();
        assert_eq!(proof::judge(&book, &proof::observe(&client, &book).await.unwrap()), []);
    }
}
