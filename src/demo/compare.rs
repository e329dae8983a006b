//! Whether both servers hold the same, by plain SQL of the demo's own: rows, objects, sequences.
//!
//! The application has written on at the target, so a row that it touched there is left out on both sides; the
//! numbers of its writes say which. Every other row must be equal in every column, generated ones included.

use std::collections::BTreeSet;

use serde::Serialize;
use tokio_postgres::Client;

use super::book::{AFTER_SWITCH, Book, Fact, Side};
use super::server::ThrowawayServer;
use crate::error::{Context, Result};
use crate::sql;

/// How the rows of one table compare, those left out that were written after the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableComparison {
    /// The table's name, without its schema.
    pub table: String,
    /// Rows compared on the source.
    pub source_rows: i64,
    /// Rows compared on the target.
    pub target_rows: i64,
    /// Whether counts and hashes are equal.
    pub equal: bool,
}

/// A table, its key, and how to find the rows written after the switch.
struct Table {
    name: &'static str,
    /// The column whose values are left out, when some are.
    key: Option<&'static str>,
    /// Has the column `mark`.
    marked: bool,
}

/// All but the ledger, which the proof reads, and the materialized view: restoring one refreshes it, so the target's is newer.
const TABLES: [Table; 10] = [
    Table { name: "country", key: None, marked: false },
    Table { name: "archived_order", key: None, marked: false },
    Table { name: "customer", key: Some("id"), marked: true },
    Table { name: "product", key: Some("id"), marked: true },
    Table { name: "stock", key: Some("product_id"), marked: true },
    Table { name: "Order", key: Some("id"), marked: true },
    Table { name: "Order Line", key: Some("order_id"), marked: true },
    Table { name: "order_history", key: None, marked: true },
    Table { name: "event", key: Some("id"), marked: true },
    Table { name: "page_view", key: None, marked: true },
];

/// Compares every table of the shop on both sides, each by number of rows and a hash over all columns of all rows.
///
/// # Errors
/// What a server said.
pub async fn tables(source: &Client, target: &Client, book: &Book) -> Result<Vec<TableComparison>> {
    // What was deleted after the switch is on the source still, and no row of the target says so.
    let deleted: Vec<i64> = book
        .acknowledged
        .iter()
        .chain(&book.unknown)
        .filter(|write| Side::of(write.number) == Side::Target)
        .flat_map(|write| &write.facts)
        .filter_map(|fact| if let Fact::OrderDeleted { id } = fact { Some(*id) } else { None })
        .collect();
    let mut comparisons = Vec::with_capacity(TABLES.len() + 1);
    for table in &TABLES {
        let name = sql::qualified("shop", table.name);
        let doing = || format!("comparing the table {name}");
        let mut left_out: Vec<i64> = match table.key {
            Some("id" | "order_id") if table.name.starts_with("Order") => deleted.clone(),
            _ => Vec::new(),
        };
        if let Some(key) = table.key {
            let touched = format!("SELECT {key}::bigint FROM {name} WHERE mark >= {AFTER_SWITCH}");
            left_out.extend(target.query(&touched, &[]).await.context(doing)?.iter().map(|row| row.get::<_, i64>(0)));
        }
        let key = table.key.map_or_else(|| "NULL".to_owned(), |key| format!("t.{}", sql::identifier(key)));
        let mark = if table.marked { "mark" } else { "0" };
        let statement = format!(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)), 0)::text FROM {name} t
             WHERE {mark} < {AFTER_SWITCH} AND NOT EXISTS (SELECT FROM unnest($1::bigint[]) u (left_out) WHERE u.left_out = {key}::bigint)"
        );
        let on_source = source.query_one(&statement, &[&left_out]).await.context(doing)?;
        let on_target = target.query_one(&statement, &[&left_out]).await.context(doing)?;
        let (source_rows, target_rows): (i64, i64) = (on_source.get(0), on_target.get(0));
        let equal = source_rows == target_rows && on_source.get::<_, &str>(1) == on_target.get::<_, &str>(1);
        comparisons.push(TableComparison { table: table.name.to_owned(), source_rows, target_rows, equal });
    }
    Ok(comparisons)
}

/// Objects of the schema that only one side has, or has otherwise, each as one line of text.
///
/// # Errors
/// What a server said.
pub async fn objects(source: &Client, target: &Client) -> Result<Vec<String>> {
    let (on_source, on_target) = (definitions(source).await?, definitions(target).await?);
    let only_source = on_source.difference(&on_target).map(|object| format!("only on the source: {object}"));
    let only_target = on_target.difference(&on_source).map(|object| format!("only on the target: {object}"));
    Ok(only_source.chain(only_target).collect())
}

/// Sequences of the target that are behind the source, or missing.
///
/// # Errors
/// What a server said.
pub async fn sequences(source: &Client, target: &Client) -> Result<Vec<String>> {
    let statement =
        "SELECT sequencename::text, coalesce(last_value, 0) FROM pg_sequences WHERE schemaname = 'shop' ORDER BY 1";
    let on_target = target.query(statement, &[]).await.context(|| "reading the target's sequences".to_owned())?;
    let mut behind = Vec::new();
    for row in source.query(statement, &[]).await.context(|| "reading the source's sequences".to_owned())? {
        let (name, value): (&str, i64) = (row.get(0), row.get(1));
        match on_target.iter().find(|other| other.get::<_, &str>(0) == name).map(|other| other.get::<_, i64>(1)) {
            Some(other) if other >= value => {}
            found => behind.push(format!("the sequence {name} is at {value} on the source, {found:?} on the target")),
        }
    }
    Ok(behind)
}

/// What a finished and cleaned migration has left behind on a server; nothing, if it did as it promises.
///
/// # Errors
/// What the server said.
pub async fn leftovers(server: &ThrowawayServer, database: &str) -> Result<Vec<String>> {
    let client = server.connect(database).await?;
    let statement = "SELECT 'the replication slot ' || slot_name FROM pg_replication_slots
                     UNION ALL SELECT 'the publication ' || pubname FROM pg_publication
                     UNION ALL SELECT 'the event trigger ' || evtname FROM pg_event_trigger
                     UNION ALL SELECT 'the schema ' || nspname FROM pg_namespace WHERE nspname ~ '^_?walferry'
                     ORDER BY 1";
    let rows = client.query(statement, &[]).await.context(|| "looking for what is left over".to_owned())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn definitions(client: &Client) -> Result<BTreeSet<String>> {
    // Constraint triggers are part of their constraint; a partition's index has its parent's text with its own name.
    let statement = "
        SELECT 'constraint ' || quote_ident(conname) || ' on ' || conrelid::regclass || ': ' || pg_get_constraintdef(oid)
               || CASE WHEN convalidated THEN '' ELSE ' NOT VALID' END
        FROM pg_constraint WHERE connamespace = 'shop'::regnamespace AND contype <> 't' AND conrelid <> 0
        UNION ALL
        SELECT 'index ' || pg_get_indexdef(indexrelid) || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
        FROM pg_index JOIN pg_class ON oid = indexrelid WHERE relnamespace = 'shop'::regnamespace
        UNION ALL
        SELECT 'trigger ' || pg_get_triggerdef(t.oid) || ' ' || tgenabled::text
        FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid WHERE relnamespace = 'shop'::regnamespace AND NOT tgisinternal
        UNION ALL
        SELECT 'view ' || oid::regclass || pg_get_viewdef(oid) FROM pg_class
        WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('v', 'm')
        UNION ALL
        SELECT 'function ' || pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'shop'::regnamespace
        UNION ALL
        SELECT 'relation ' || oid::regclass || ' ' || relkind::text || relpersistence::text || relispopulated || ' of ' || pg_get_userbyid(relowner) || ' '
               || coalesce(pg_get_expr(relpartbound, oid), '') || coalesce(relacl::text, '')
        FROM pg_class WHERE relnamespace = 'shop'::regnamespace
        UNION ALL
        SELECT 'column ' || attrelid::regclass || '.' || quote_ident(attname) || ' ' || format_type(atttypid, atttypmod)
               || attnotnull || attidentity::text || attgenerated::text || attstorage::text || coalesce(pg_get_expr(adbin, adrelid), '')
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = 'shop'::regnamespace AND attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p', 'v', 'm')
        UNION ALL
        SELECT 'type ' || typname || ' ' || typtype::text || coalesce((SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder)
                                                                FROM pg_enum WHERE enumtypid = t.oid), '')
        FROM pg_type t WHERE typnamespace = 'shop'::regnamespace AND typtype IN ('e', 'd')";
    let rows = client.query(statement, &[]).await.context(|| "reading the objects of the schema shop".to_owned())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::book::Write;
    use crate::demo::schema::{self, DATABASE, Sizes};
    use crate::demo::server::ServerPrograms;

    /// Two servers that were filled alike, in place of a migration.
    async fn twins(name: &str) -> ([ThrowawayServer; 2], [Client; 2]) {
        let programs = ServerPrograms::find(None).unwrap();
        let start = async |side: &str| {
            let server =
                ThrowawayServer::start(&programs, &format!("{name}{side}"), &[("fsync", "off")]).await.unwrap();
            let client = schema::create_database(&server).await.unwrap();
            schema::fill(&client, Sizes::of_rows(2_000)).await.unwrap();
            // The times of the load differ; everything else is the same by construction.
            client.batch_execute("UPDATE shop.page_view SET seen = timestamptz '2025-01-01 00:00Z'").await.unwrap();
            (server, client)
        };
        let (source, target) = (start("source").await, start("target").await);
        ([source.0, target.0], [source.1, target.1])
    }

    #[tokio::test]
    async fn every_difference_between_two_servers_is_seen() {
        let (servers, [source, target]) = twins("compare").await;
        let mut book = Book::default();
        let different = async |book: &Book| -> Vec<String> {
            let all = tables(&source, &target, book).await.unwrap();
            assert_eq!(all.len(), 10);
            all.into_iter().filter(|table| !table.equal).map(|table| table.table).collect()
        };
        assert_eq!(different(&book).await, [""; 0]);
        assert_eq!(objects(&source, &target).await.unwrap(), [""; 0]);
        assert_eq!(sequences(&source, &target).await.unwrap(), [""; 0]);
        assert_eq!(leftovers(&servers[0], DATABASE).await.unwrap(), [""; 0]);

        // What the application writes after the switch is not a difference.
        let after = AFTER_SWITCH + 1;
        for statement in [
            format!("UPDATE shop.stock SET on_hand = 3, mark = {after} WHERE product_id = 7"),
            format!("UPDATE shop.event SET happened = happened + interval '1 year', mark = {after} WHERE id = 9"),
            format!("INSERT INTO shop.page_view (path, session, mark) VALUES ('/', md5('')::uuid, {after})"),
            "DELETE FROM shop.\"Order\" WHERE id = 5".to_owned(),
        ] {
            target.batch_execute(&statement).await.unwrap();
        }
        assert_eq!(different(&book).await, ["Order", "Order Line"], "nobody says yet who deleted it");
        book.acknowledge(Write { number: after, facts: vec![Fact::OrderDeleted { id: 5 }] });
        assert_eq!(different(&book).await, [""; 0]);

        // Everything else is.
        for (table, statement) in [
            ("country", "UPDATE shop.country SET vat = 1.5 WHERE code = 'AB'"),
            (
                "archived_order",
                "UPDATE shop.archived_order SET took = took + interval '1 us' WHERE id = md5('archived 3')::uuid",
            ),
            ("product", "UPDATE shop.product SET description = description || '.' WHERE id = 3"),
            ("Order Line", "DELETE FROM shop.\"Order Line\" WHERE order_id = 8 AND \"Line No\" = 2"),
            ("page_view", "INSERT INTO shop.page_view SELECT * FROM shop.page_view WHERE mark = 0 LIMIT 1"),
            ("event", "UPDATE shop.event SET payload = payload - 'note' WHERE id = 11"),
        ] {
            target.batch_execute(&format!("BEGIN; {statement}")).await.unwrap();
            assert_eq!(different(&book).await, [table]);
            target.batch_execute("ROLLBACK").await.unwrap();
        }
        for (words, statement) in [
            ("touch it", "ALTER TABLE shop.\"Order\" DISABLE TRIGGER \"touch it\""),
            ("open_order", "DROP INDEX shop.open_order"),
            ("shop.customer.id", "ALTER TABLE shop.customer ALTER id SET GENERATED BY DEFAULT"),
            ("shop_application", "REVOKE DELETE ON shop.\"Order\" FROM shop_application"),
        ] {
            target.batch_execute(&format!("BEGIN; {statement}")).await.unwrap();
            let found = objects(&source, &target).await.unwrap();
            assert!(!found.is_empty() && found.iter().all(|object| object.contains(words)), "{words}: {found:?}");
            target.batch_execute("ROLLBACK").await.unwrap();
        }
        source.batch_execute("SELECT nextval('shop.invoice_number')").await.unwrap();
        let behind = sequences(&source, &target).await.unwrap();
        assert!(behind.len() == 1 && behind[0].contains("invoice_number"), "{behind:?}");
        target.batch_execute("CREATE PUBLICATION left_over; CREATE SCHEMA walferry").await.unwrap();
        let left = leftovers(&servers[1], DATABASE).await.unwrap();
        assert_eq!(left, ["the publication left_over", "the schema walferry"]);
    }
}
