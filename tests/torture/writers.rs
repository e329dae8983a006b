//! The application: sessions that write to the source all the time, whatever happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::random::Random;
use super::schema::{Schema, Table, Trait};

/// What the writers are told, and what they have done.
#[derive(Default)]
pub struct Control {
    pub stop: AtomicBool,
    /// No new two-phase commits: they would stand in the way of a cutover.
    pub no_prepared: AtomicBool,
    /// A rest after every transaction, besides the writers' own: a machine under load has to be able to catch up at last.
    pub calm_ms: AtomicU64,
    pub committed: AtomicU64,
    pub aborted: AtomicU64,
    pub prepared: AtomicU64,
    pub truncated: AtomicU64,
    /// Transactions of very many rows.
    pub huge: AtomicU64,
}

/// One session's life, through restarts of the server, until it is told to stop.
pub struct Writer {
    pub number: u64,
    pub url: String,
    pub schema: Arc<Schema>,
    pub control: Arc<Control>,
    pub random: Random,
    /// Longest rest between two transactions.
    pub rest_ms: u64,
    /// Rows of the huge transactions, and how many of them are to come.
    pub huge_rows: u64,
    pub huge_left: u64,
}

type Result<T> = std::result::Result<T, tokio_postgres::Error>;

impl Writer {
    pub async fn run(mut self) {
        let mut client: Option<Client> = None;
        while !self.control.stop.load(Ordering::Relaxed) {
            let Some(session) = &client else {
                client = self.connect().await.ok();
                if client.is_none() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                continue;
            };
            let outcome = self.transaction(session).await;
            let committed = *outcome.as_ref().unwrap_or(&false);
            let counter = if committed { &self.control.committed } else { &self.control.aborted };
            counter.fetch_add(1, Ordering::Relaxed);
            if session.is_closed() {
                client = None;
            } else if outcome.is_err() {
                let _ = session.batch_execute("ROLLBACK").await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let rest = self.control.calm_ms.load(Ordering::Relaxed) + self.random.between(0, self.rest_ms);
            tokio::time::sleep(Duration::from_millis(rest)).await;
        }
    }

    async fn connect(&mut self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await?;
        tokio::spawn(async move { drop(connection.await) });
        let commit = self.random.pick(&["on", "off", "local"]);
        client
            .batch_execute(&format!(
                "SET synchronous_commit = {commit}; SET lock_timeout = '2s'; SET statement_timeout = '30s'; \
                 SET idle_in_transaction_session_timeout = '30s'"
            ))
            .await?;
        // What a crash left behind holds locks.
        let left =
            client.query("SELECT gid FROM pg_prepared_xacts WHERE gid LIKE $1 || '%'", &[&self.prefix()]).await?;
        for row in left {
            let gid: String = row.get(0);
            client.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?;
        }
        Ok(client)
    }

    fn prefix(&self) -> String {
        format!("w{}/", self.number)
    }

    /// Answers whether it was committed.
    async fn transaction(&mut self, client: &Client) -> Result<bool> {
        let calm = self.control.no_prepared.load(Ordering::Relaxed);
        if self.huge_left > 0 && !calm && self.random.chance(2) {
            self.huge_left -= 1;
            return self.huge(client).await;
        }
        let statements = self.random.weighted(&[(50, 1), (30, 4), (15, 20), (4, 100), (1, 600)]);
        if statements == 1 && self.random.chance(50) {
            // In autocommit.
            self.change(client).await?;
            return Ok(true);
        }
        let isolation =
            self.random.pick(&["", "", " ISOLATION LEVEL REPEATABLE READ", " ISOLATION LEVEL SERIALIZABLE"]);
        client.batch_execute(&format!("BEGIN{isolation}")).await?;
        for _ in 0..self.random.between(1, statements) {
            if self.random.chance(35) {
                self.in_savepoint(client).await?;
            } else {
                self.change(client).await?;
            }
            if self.random.chance(2) {
                tokio::time::sleep(Duration::from_millis(self.random.between(1, 300))).await;
            }
        }
        if self.random.chance(6) {
            client.batch_execute("ROLLBACK").await?;
            return Ok(false);
        }
        if self.random.chance(5) && !self.control.no_prepared.load(Ordering::Relaxed) {
            return self.two_phases(client).await;
        }
        client.batch_execute("COMMIT").await?;
        Ok(true)
    }

    async fn two_phases(&mut self, client: &Client) -> Result<bool> {
        let gid = format!("{}{}", self.prefix(), self.random.next());
        client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
        self.control.prepared.fetch_add(1, Ordering::Relaxed);
        // Something else in between, as other applications would.
        let in_between = self.random.chance(50);
        if in_between {
            let _ = self.change(client).await;
        }
        tokio::time::sleep(Duration::from_millis(self.random.between(0, 700))).await;
        let commits = self.random.chance(80);
        client.batch_execute(&format!("{} PREPARED '{gid}'", if commits { "COMMIT" } else { "ROLLBACK" })).await?;
        Ok(commits)
    }

    /// A statement whose failure does not fail the transaction, or whose success is taken back.
    async fn in_savepoint(&mut self, client: &Client) -> Result<()> {
        client.batch_execute("SAVEPOINT a").await?;
        let mut outcome = self.change(client).await;
        if outcome.is_ok() && self.random.chance(30) {
            client.batch_execute("SAVEPOINT b").await?;
            outcome = self.change(client).await;
        }
        if outcome.is_err() || self.random.chance(30) {
            client.batch_execute("ROLLBACK TO a").await
        } else {
            client.batch_execute("RELEASE a").await
        }
    }

    async fn huge(&mut self, client: &Client) -> Result<bool> {
        let schema = Arc::clone(&self.schema);
        let narrow: Vec<&Table> =
            schema.tables.iter().filter(|table| table.is != Trait::Partitioned && table.initial_rows >= 1000).collect();
        let (table, rows) = (*self.random.pick(&narrow), self.huge_rows);
        let from = table.span * 2 + self.random.between(0, 3) * rows;
        let statement = match self.random.between(0, 5) {
            // The stream does not carry these for a table without a key.
            0 if table.is != Trait::InsertOnly => format!("DELETE FROM {}", table.name),
            1 if table.is != Trait::InsertOnly && !table.columns.is_empty() => self.update(table, "true"),
            _ if table.key.is_empty() => {
                let values = table.values("g", &mut self.random);
                format!(
                    "INSERT INTO {} ({}) SELECT {values} FROM generate_series(1, {rows}) g",
                    table.name,
                    table.insert_columns()
                )
            }
            _ => self.insert_many(table, from, from + rows - 1),
        };
        client.batch_execute(&statement).await?;
        self.control.huge.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// One change, of any kind.
    async fn change(&mut self, client: &Client) -> Result<()> {
        let schema = Arc::clone(&self.schema);
        let table = self.random.pick(&schema.tables);
        if self.random.chance(3) {
            let sequence = self.random.pick(&schema.sequences);
            return client.batch_execute(&format!("SELECT nextval('{sequence}')")).await;
        }
        if table.truncated_sometimes && self.random.next().is_multiple_of(500) {
            self.control.truncated.fetch_add(1, Ordering::Relaxed);
            let restart = self.random.pick(&["", " RESTART IDENTITY"]);
            return client.batch_execute(&format!("TRUNCATE {}{restart} CASCADE", table.name)).await;
        }
        if table.key.is_empty() {
            return self.change_without_key(client, table).await;
        }
        if table.has_unique() && self.random.chance(15) {
            return self.swap_values(client, table).await;
        }
        // Some rows are written all the time, others seldom.
        let number =
            if self.random.chance(30) { self.random.between(0, 15) } else { self.random.between(0, table.span) };
        let other = self.random.between(0, table.span);
        let key = table.where_key(&number.to_string(), &mut self.random);
        let several = self.random.between(1, 40);
        let keys = format!(
            "({}) IN (SELECT {} FROM generate_series({number}, {number} + {several}) g)",
            table.key.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", "),
            table.key.iter().map(|(_, kind)| kind.value("g", 0)).collect::<Vec<_>>().join(", ")
        );
        let name = &table.name;
        let statement = match self.random.between(0, 99) {
            0..=19 => self.insert(table, number),
            20..=27 => self.insert_many(table, number, number + several),
            28..=49 => self.update(table, &key),
            50..=57 => self.update(table, &keys),
            58..=69 => format!("DELETE FROM {name} WHERE {key}"),
            70..=73 => format!("DELETE FROM {name} WHERE {keys}"),
            74..=83 if table.is != Trait::Identity => self.change_key(table, &key, other),
            84..=87 if table.is != Trait::Identity => {
                // The same key, written otherwise where its type allows it.
                let same = table.set_key(&number.to_string(), &mut self.random);
                format!("UPDATE {name} SET {same} WHERE {key}")
            }
            88..=92 if table.is != Trait::Identity => return self.swap_keys(client, table, number, other).await,
            _ => format!("DELETE FROM {name} WHERE {key}; {}", self.insert(table, number)),
        };
        client.batch_execute(&statement).await
    }

    fn insert(&mut self, table: &Table, number: u64) -> String {
        let (values, columns) = (table.values(&number.to_string(), &mut self.random), table.insert_columns());
        let key = table.key.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        let (mut columns, mut values) = (columns, values);
        let mut overriding = "OVERRIDING SYSTEM VALUE ";
        if table.is == Trait::Identity && self.random.chance(60) {
            // The server gives the number.
            columns = columns.split_once(", ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            values = values.split_once(", ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            overriding = "";
        }
        let conflict = match (self.random.between(0, 2), table.columns.is_empty()) {
            (0, _) => String::new(),
            (1, false) => {
                let column = &self.random.pick(&table.columns).name;
                format!(" ON CONFLICT ({key}) DO UPDATE SET {column} = EXCLUDED.{column}")
            }
            _ => format!(" ON CONFLICT ({key}) DO NOTHING"),
        };
        let overriding = if table.is == Trait::Identity { overriding } else { "" };
        format!("INSERT INTO {} ({columns}) {overriding}VALUES ({values}){conflict}", table.name)
    }

    fn insert_many(&mut self, table: &Table, from: u64, until: u64) -> String {
        let overriding = if table.is == Trait::Identity { "OVERRIDING SYSTEM VALUE " } else { "" };
        let key = table.key.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        format!(
            "INSERT INTO {} ({}) {overriding}SELECT {} FROM generate_series({from}, {until}) g ON CONFLICT ({key}) DO NOTHING",
            table.name,
            table.insert_columns(),
            table.values("g", &mut self.random),
        )
    }

    /// Sets some columns; those that are wide often stay as they are.
    fn update(&mut self, table: &Table, condition: &str) -> String {
        let mut set = Vec::new();
        for column in &table.columns {
            if self.random.chance(45) {
                let null = column.nullable && self.random.chance(10);
                let number = self.random.between(0, 999).to_string();
                let value = if null { "NULL".into() } else { column.kind.value(&number, &mut self.random) };
                set.push(format!("{} = {value}", column.name));
            }
        }
        if set.is_empty() {
            // Writes a new row that is equal to the old one.
            let (name, _) = &table
                .key
                .first()
                .cloned()
                .unwrap_or_else(|| (table.columns[0].name.clone(), super::schema::KeyKind::Int));
            let column = table.columns.first().map_or(name, |column| &column.name);
            set.push(format!("{column} = {column}"));
        }
        format!("UPDATE {} SET {} WHERE {condition}", table.name, set.join(", "))
    }

    /// Moves a row to another key; often together with other columns.
    fn change_key(&mut self, table: &Table, key: &str, other: u64) -> String {
        let mut set = table.set_key(&other.to_string(), &mut self.random);
        if let Some(column) = table.columns.first().filter(|_| self.random.chance(50)) {
            set = format!("{set}, {} = {}", column.name, column.kind.value(&other.to_string(), &mut self.random));
        }
        format!("UPDATE {} SET {set} WHERE {key}", table.name)
    }

    /// Two rows change keys, by way of a third key.
    async fn swap_keys(&mut self, client: &Client, table: &Table, one: u64, other: u64) -> Result<()> {
        let aside = 10_000_000 + self.random.between(0, 1000);
        let mut statements = Vec::new();
        for (from, to) in [(one, aside), (other, one), (aside, other)] {
            let set = table.set_key(&to.to_string(), &mut self.random);
            let key = table.where_key(&from.to_string(), &mut self.random);
            statements.push(format!("UPDATE {} SET {set} WHERE {key}", table.name));
        }
        client.batch_execute(&statements.join("; ")).await
    }

    /// Two rows change the values of their second unique column.
    async fn swap_values(&mut self, client: &Client, table: &Table) -> Result<()> {
        let (one, other) = (self.random.between(0, table.span), self.random.between(0, table.span));
        let (one, other) = (
            table.where_key(&one.to_string(), &mut self.random),
            table.where_key(&other.to_string(), &mut self.random),
        );
        let name = &table.name;
        if table.is == Trait::DeferrableUnique {
            let statement = format!(
                "UPDATE {name} t SET u = (SELECT s.u FROM {name} s WHERE (({one}) OR ({other})) AND s.\"Id\" <> t.\"Id\") \
                 WHERE ({one}) OR ({other})"
            );
            return client.batch_execute(&statement).await;
        }
        let value = |messages: Vec<SimpleQueryMessage>| {
            messages.iter().find_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
        };
        let a = value(client.simple_query(&format!("SELECT u FROM {name} WHERE {one} FOR UPDATE")).await?);
        let b = value(client.simple_query(&format!("SELECT u FROM {name} WHERE {other} FOR UPDATE")).await?);
        let (Some(a), Some(b)) = (a, b) else { return Ok(()) };
        client
            .batch_execute(&format!(
                "UPDATE {name} SET u = NULL WHERE {one}; UPDATE {name} SET u = {a} WHERE {other}; UPDATE {name} SET u = {b} WHERE {one}"
            ))
            .await
    }

    async fn change_without_key(&mut self, client: &Client, table: &Table) -> Result<()> {
        let number = self.random.between(0, 12);
        let name = &table.name;
        let insert = |random: &mut Random, count: u64| {
            format!(
                "INSERT INTO {name} ({}) SELECT {} FROM generate_series({number}, {number} + {count}) g",
                table.insert_columns(),
                table.values("(g % 5)", random)
            )
        };
        if table.is == Trait::InsertOnly {
            let count = self.random.between(0, 9);
            let statement = insert(&mut self.random, count);
            return client.batch_execute(&statement).await;
        }
        let limit = self.random.between(1, 5);
        let some = format!(
            "ctid = ANY (ARRAY(SELECT ctid FROM {name} WHERE a IS NOT DISTINCT FROM {} LIMIT {limit}))",
            self.random.pick(&["true", "false", "NULL"])
        );
        let statement = match self.random.between(0, 9) {
            0..=4 => insert(&mut self.random, limit),
            5..=7 => self.update(table, &some),
            _ => format!("DELETE FROM {name} WHERE {some}"),
        };
        client.batch_execute(&statement).await
    }
}
