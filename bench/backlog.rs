//! Workloads: what a source looks like, and the transactions that pile up while nobody applies them.

use futures_util::future::try_join_all;
use walferry::error::{Context, Result};

use crate::setting::Setting;

/// Sessions that write a backlog.
const SESSIONS: u64 = 4;
/// Transactions sent at once by a session.
const PIPELINE: usize = 100;

/// Where the changes come from.
pub enum Writes {
    /// `pgbench`'s TPC-B, so many transactions.
    Tpcb(u64),
    /// So many transactions; each is the SQL for its number, which goes on from round to round.
    Sql { transactions: u64, statement: fn(u64) -> String },
}

/// One kind of backlog.
pub struct Workload {
    /// For names of databases and files.
    pub name: &'static str,
    /// For people.
    pub case: String,
    /// Makes the tables and what they hold before.
    pub setup: Vec<String>,
    /// pgbench's tables at this scale are there before.
    pub pgbench_scale: Option<u32>,
    pub writes: Writes,
    /// Row changes in each transaction.
    pub changes_per_transaction: u64,
}

impl Workload {
    pub fn transactions(&self) -> u64 {
        match self.writes {
            Writes::Tpcb(transactions) | Writes::Sql { transactions, .. } => transactions,
        }
    }

    /// Makes its source database.
    pub async fn prepare(&self, setting: &Setting, database: &str) -> Result<()> {
        setting.new_database(&setting.source, database).await?;
        if let Some(scale) = self.pgbench_scale {
            setting.shell(&format!("pgbench -q -i -s {scale} -d {} 2>&1", setting.source.url_for(database))).await?;
        }
        let client = setting.source.connect(database).await?;
        for statement in &self.setup {
            client.batch_execute(statement).await.context(|| format!("preparing the workload {}", self.name))?;
        }
        client.batch_execute("VACUUM ANALYZE").await?;
        Ok(())
    }

    /// Writes one round's backlog. Not timed, so it need not wait for the disk; the WAL is the same.
    pub async fn pile_up(&self, setting: &Setting, database: &str, round: u64) -> Result<()> {
        let (transactions, statement) = match self.writes {
            Writes::Tpcb(transactions) => {
                let each = transactions / SESSIONS;
                let url = setting.source.url_for(database);
                let script = format!(
                    "PGOPTIONS='-c synchronous_commit=off' pgbench -n -M prepared -c {SESSIONS} -t {each} -d {url} 2>&1"
                );
                return setting.shell(&script).await.map(drop);
            }
            Writes::Sql { transactions, statement } => (transactions, statement),
        };
        let writers = (0..SESSIONS).map(|session| async move {
            let client = setting.source.connect(database).await?;
            client.batch_execute("SET synchronous_commit = off").await?;
            let numbers: Vec<u64> = (0..transactions).filter(|number| number % SESSIONS == session).collect();
            for some in numbers.chunks(PIPELINE) {
                let sql: String = some
                    .iter()
                    .map(|number| format!("BEGIN; {}; COMMIT;", statement(round * transactions + number)))
                    .collect();
                client.batch_execute(&sql).await.context(|| format!("writing the backlog {}", self.name))?;
            }
            Ok(())
        });
        try_join_all(writers).await.map(drop)
    }
}

/// B3: 100 rows in each transaction.
pub fn inserts(transactions: u64) -> Workload {
    Workload {
        name: "inserts",
        case: format!("{} rows in {transactions} insert transactions", transactions * 100),
        setup: vec!["CREATE TABLE entries (id bigint PRIMARY KEY, kind integer, note text, at timestamptz)".into()],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                format!("INSERT INTO entries SELECT n, n % 1000, md5(n::text), now() FROM {}", hundred(number))
            },
        },
        changes_per_transaction: 100,
    }
}

/// B4: three updates and an insert in each transaction.
pub fn tpcb(scale: u32, transactions: u64) -> Workload {
    Workload {
        name: "tpcb",
        case: format!("{transactions} TPC-B transactions, scale {scale}"),
        setup: Vec::new(),
        pgbench_scale: Some(scale),
        writes: Writes::Tpcb(transactions),
        changes_per_transaction: 4,
    }
}

fn hundred(number: u64) -> String {
    format!("generate_series({}, {}) n", number * 100 + 1, number * 100 + 100)
}

/// B6. `size` is 1 in a quick run and more in a full one; `rounds` is how many backlogs there will be.
pub fn small(size: u64, rounds: u64) -> Vec<Workload> {
    vec![
        one_row(size),
        wide(size),
        large_rows(size),
        unchanged_toast(size),
        deletes(size, rounds),
        many_tables(size),
        updated_tables(size),
        keyless(size),
    ]
}

fn one_row(size: u64) -> Workload {
    let transactions = 40_000 * size;
    Workload {
        name: "onerow",
        case: format!("{transactions} one-row insert transactions"),
        setup: vec!["CREATE TABLE entries (id bigint PRIMARY KEY, kind integer, note text)".into()],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| format!("INSERT INTO entries VALUES ({number}, {}, md5('{number}'))", number % 1000),
        },
        changes_per_transaction: 1,
    }
}

fn wide(size: u64) -> Workload {
    let transactions = 400 * size;
    let columns: Vec<String> = (0..49)
        .map(|at| format!("c{at} {}", ["integer", "bigint", "text", "timestamptz", "boolean"][at % 5]))
        .collect();
    Workload {
        name: "wide",
        case: format!("{} rows of 50 columns, 100 in a transaction", transactions * 100),
        setup: vec![format!("CREATE TABLE wide (id bigint PRIMARY KEY, {})", columns.join(", "))],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                let values: Vec<&str> = (0..49)
                    .map(|at| ["n % 77", "n * 3", "'text of row ' || n", "now()", "n % 2 = 0"][at % 5])
                    .collect();
                format!("INSERT INTO wide SELECT n, {} FROM {}", values.join(", "), hundred(number))
            },
        },
        changes_per_transaction: 100,
    }
}

fn large_rows(size: u64) -> Workload {
    let transactions = 500 * size;
    Workload {
        name: "large",
        case: format!("{transactions} rows of 100 kB"),
        setup: vec![
            "CREATE TABLE large (id bigint PRIMARY KEY, body text); ALTER TABLE large ALTER body SET STORAGE EXTERNAL"
                .into(),
        ],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                format!(
                    "INSERT INTO large SELECT {number}, string_agg(md5((n * {number})::text), '') FROM generate_series(1, 3125) n"
                )
            },
        },
        changes_per_transaction: 1,
    }
}

fn unchanged_toast(size: u64) -> Workload {
    let transactions = 2_000 * size;
    Workload {
        name: "toast",
        case: format!("{} updates that leave 20 kB of TOAST unchanged, 10 in a transaction", transactions * 10),
        setup: vec![
            "CREATE TABLE documents (id bigint PRIMARY KEY, seen bigint, body text);
             ALTER TABLE documents ALTER body SET STORAGE EXTERNAL;
             INSERT INTO documents SELECT d, 0, (SELECT string_agg(md5((n * d)::text), '') FROM generate_series(1, 640) n) \
                 FROM generate_series(0, 1999) d"
                .into(),
        ],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            // Sessions write at the same time: each has rows of its own (its numbers are equal modulo 4), so that none waits.
            statement: |number| {
                let first = number % SESSIONS * 500 + number / SESSIONS * 7 % 490;
                format!("UPDATE documents SET seen = {number} WHERE id BETWEEN {first} AND {}", first + 9)
            },
        },
        changes_per_transaction: 10,
    }
}

fn deletes(size: u64, rounds: u64) -> Workload {
    let transactions = 2_000 * size;
    let rows = transactions * 100 * rounds;
    Workload {
        name: "deletes",
        case: format!("{} deletes, 100 in a transaction", transactions * 100),
        setup: vec![format!(
            "CREATE TABLE entries (id bigint PRIMARY KEY, kind integer, note text);
             INSERT INTO entries SELECT n, n % 1000, md5(n::text) FROM generate_series(1, {rows}) n"
        )],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                format!("DELETE FROM entries WHERE id BETWEEN {} AND {}", number * 100 + 1, number * 100 + 100)
            },
        },
        changes_per_transaction: 100,
    }
}

fn many_tables(size: u64) -> Workload {
    let transactions = 2_000 * size;
    let tables: Vec<String> =
        (0..500).map(|table| format!("CREATE TABLE t{table} (id bigint PRIMARY KEY, note text)")).collect();
    Workload {
        name: "tables",
        case: format!("{} inserts spread over 500 tables, 10 in a transaction", transactions * 10),
        setup: vec![tables.join(";")],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                let inserts: Vec<String> = (0..10)
                    .map(|at| format!("INSERT INTO t{} VALUES ({number}, 'row {number}')", (number * 10 + at) % 500))
                    .collect();
                inserts.join("; ")
            },
        },
        changes_per_transaction: 10,
    }
}

fn updated_tables(size: u64) -> Workload {
    let transactions = 2_000 * size;
    let tables: Vec<String> = (0..500)
        .map(|table| {
            format!(
                "CREATE TABLE t{table} (id bigint PRIMARY KEY, note text);
                 INSERT INTO t{table} SELECT n, 'row ' || n FROM generate_series(0, 999) n"
            )
        })
        .collect();
    Workload {
        name: "updates",
        case: format!("{} updates spread over 500 tables, 10 in a transaction", transactions * 10),
        setup: vec![tables.join(";")],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            // Sessions write at the same time: their numbers are equal modulo 4, so each has rows of its own, and none waits.
            statement: |number| {
                let updates: Vec<String> = (0..10)
                    .map(|at| {
                        let (table, row) = ((number * 10 + at) % 500, number % SESSIONS + number / 50 % 250 * SESSIONS);
                        format!("UPDATE t{table} SET note = 'changed by {number}' WHERE id = {row}")
                    })
                    .collect();
                updates.join("; ")
            },
        },
        changes_per_transaction: 10,
    }
}

fn keyless(size: u64) -> Workload {
    let transactions = 2_000 * size;
    Workload {
        name: "keyless",
        case: format!("{} rows into a table without a key, 100 in a transaction", transactions * 100),
        setup: vec!["CREATE TABLE log (at timestamptz, kind integer, note text)".into()],
        pgbench_scale: None,
        writes: Writes::Sql {
            transactions,
            statement: |number| {
                format!("INSERT INTO log SELECT now(), n % 1000, md5(n::text) FROM {}", hundred(number))
            },
        },
        changes_per_transaction: 100,
    }
}
