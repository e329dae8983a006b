//! What the application knows of its own writes: the evidence that the proof goes by.
//!
//! A write is a transaction with a number of its own. It counts as acknowledged from the moment at which the answer
//! to its COMMIT came, not before; it is then only in this memory and, so the claim, in the database. A COMMIT
//! whose answer never came may have happened or not: neither is wrong, so it is kept apart.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

/// Write numbers from here on were given at the target, after the switch.
pub const AFTER_SWITCH: i64 = 1 << 40;

/// The server that a write went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The old server.
    Source,
    /// The new server.
    Target,
}

impl Side {
    /// Where a write with this number went.
    pub fn of(number: i64) -> Side {
        if number >= AFTER_SWITCH { Side::Target } else { Side::Source }
    }
}

/// A table whose rows count their own updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entity {
    /// `shop.customer`.
    Customer,
    /// `shop.product`.
    Product,
    /// `shop.stock`.
    Stock,
    /// `shop."Order"`.
    Order,
}

impl Entity {
    /// All of them.
    pub const ALL: [Entity; 4] = [Entity::Customer, Entity::Product, Entity::Stock, Entity::Order];

    /// The table and its key column, quoted.
    pub fn table_and_key(self) -> (&'static str, &'static str) {
        match self {
            Entity::Customer => ("shop.customer", "id"),
            Entity::Product => ("shop.product", "id"),
            Entity::Stock => ("shop.stock", "product_id"),
            Entity::Order => ("shop.\"Order\"", "id"),
        }
    }
}

/// One thing that is true in the database once a write has been committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A customer with this identity value was added.
    CustomerAdded {
        /// Its key, from a GENERATED ALWAYS identity.
        id: i64,
    },
    /// An order was placed.
    OrderPlaced {
        /// Its key, from an owned sequence.
        id: i64,
        /// Its number, from a sequence of its own.
        invoice: i64,
        /// How many rows of `"Order Line"` it has.
        lines: i64,
    },
    /// An order and, by cascade, its lines were deleted.
    OrderDeleted {
        /// Its key.
        id: i64,
    },
    /// A row was updated for the `version`-th time; two writes can never both have made the same version.
    Updated {
        /// Its table.
        entity: Entity,
        /// Its key.
        key: i64,
        /// How often it has been updated, this time included.
        version: i64,
    },
    /// An order's status changed, which a trigger noted in `order_history`.
    StatusChanged {
        /// The order's key.
        order: i64,
        /// The order's version.
        version: i64,
    },
    /// A product got a new, long description.
    Described {
        /// The product's key.
        product: i64,
        /// The product's version.
        version: i64,
        /// The description's MD5.
        md5: String,
    },
    /// An event is at a time, which decides its partition.
    EventAt {
        /// Its key.
        id: i64,
        /// Seconds since 1970.
        happened: i64,
    },
    /// So many rows without a key were added.
    PagesViewed {
        /// How many.
        rows: i64,
    },
}

/// A transaction of the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Unique; at or past [`AFTER_SWITCH`] when it went to the target.
    pub number: i64,
    /// What it did.
    pub facts: Vec<Fact>,
}

/// All writes of all writers, in the order in which their answers came.
#[derive(Debug, Default)]
pub struct Book {
    /// Their COMMIT was answered.
    pub acknowledged: Vec<Write>,
    /// Their COMMIT was sent and not answered: they may be there or not.
    pub unknown: Vec<Write>,
    /// Numbers of transactions that the application rolled back: they must not be there.
    pub rolled_back: Vec<i64>,
    /// What the application was told instead of an answer, and how often.
    pub errors: BTreeMap<(Side, String), u64>,
    /// SQLSTATE 23505: what a sequence that was left behind would cause.
    pub unique_violations: u64,
    /// Statements or sessions that the target refused for a reason that does not pass by itself.
    pub refused_at_target: u64,
    /// When the newest write at the source was acknowledged.
    pub newest_at_source: Option<Instant>,
    /// When the first write at the target was acknowledged.
    pub first_at_target: Option<Instant>,
}

impl Book {
    /// Notes a write whose COMMIT has just been answered.
    pub fn acknowledge(&mut self, write: Write) {
        let now = Instant::now();
        match Side::of(write.number) {
            Side::Source => self.newest_at_source = Some(now),
            Side::Target => self.first_at_target = self.first_at_target.or(Some(now)),
        }
        self.acknowledged.push(write);
    }

    /// Notes what the application was told.
    pub fn error(&mut self, side: Side, text: String) {
        *self.errors.entry((side, text)).or_default() += 1;
    }

    /// How many writes one side acknowledged.
    pub fn acknowledged_at(&self, side: Side) -> u64 {
        self.acknowledged.iter().filter(|write| Side::of(write.number) == side).count() as u64
    }

    /// For how many milliseconds around the switch no write was acknowledged: the downtime as the application saw it.
    pub fn gap_ms(&self) -> Option<u64> {
        let gap = self.first_at_target?.checked_duration_since(self.newest_at_source?)?;
        u64::try_from(gap.as_millis()).ok()
    }
}
