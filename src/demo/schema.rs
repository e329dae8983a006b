//! The shop that the demo moves: its schema, its first rows, and what is in it.

use tokio_postgres::Client;

use super::server::ThrowawayServer;
use crate::error::{Context, Result};

/// The database of the shop, on both servers.
pub const DATABASE: &str = "shop";
/// The role that the shop's application connects as: no superuser, as in real life.
pub const APPLICATION_ROLE: &str = "shop_application";

const SCHEMA: &str = include_str!("schema.sql");

/// How many rows the shop's tables have before anybody writes; each number is also the newest id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of `customer`.
    pub customers: i64,
    /// Rows of `product` and of `stock`.
    pub products: i64,
    /// Rows of `"Order"`; `"Order Line"` has two for each.
    pub orders: i64,
    /// Rows of `event`.
    pub events: i64,
    /// Rows of `page_view`.
    pub page_views: i64,
    /// Rows of `archived_order`.
    pub archived_orders: i64,
}

impl Sizes {
    /// Shares about so many rows out over the tables.
    pub fn of_rows(rows: u64) -> Sizes {
        let share = |percent: u64| i64::try_from((rows.saturating_mul(percent) / 100).max(20)).unwrap_or(i64::MAX);
        Sizes {
            customers: share(10),
            products: share(2),
            orders: share(20),
            events: share(15),
            page_views: share(5),
            archived_orders: share(6),
        }
    }
}

/// Makes the database and the application's role, as an administrator does on both servers before a migration:
/// roles belong to no database, so `pg_dump` does not carry them.
///
/// # Errors
/// What the server said.
pub async fn create_database(server: &ThrowawayServer) -> Result<Client> {
    let doing = || format!("making the database {DATABASE:?}");
    let administrator = server.connect("postgres").await?;
    administrator.batch_execute(&format!("CREATE ROLE {APPLICATION_ROLE} LOGIN")).await.context(doing)?;
    administrator.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await.context(doing)?;
    server.connect(DATABASE).await
}

/// Makes the schema and its first rows.
///
/// # Errors
/// What the server said.
pub async fn fill(client: &Client, sizes: Sizes) -> Result<()> {
    client.batch_execute(SCHEMA).await.context(|| "making the shop's schema".to_owned())?;
    for statement in first_rows(sizes) {
        client.batch_execute(&statement).await.context(|| "filling the shop".to_owned())?;
    }
    Ok(())
}

/// How many rows the shop has in its tables, in how many tables, and how many bytes with indexes.
///
/// # Errors
/// What the server said.
pub async fn measure(client: &Client) -> Result<(u64, u64, u64)> {
    let tables = client
        .query(
            "SELECT quote_ident(relname) FROM pg_class WHERE relnamespace = 'shop'::regnamespace AND relkind = 'r'",
            &[],
        )
        .await?;
    let mut rows = 0;
    for table in &tables {
        let count = client.query_one(&format!("SELECT count(*) FROM shop.{}", table.get::<_, &str>(0)), &[]).await?;
        rows += count.get::<_, i64>(0).unsigned_abs();
    }
    let bytes = client
        .query_one(
            "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
             WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('r', 'm')",
            &[],
        )
        .await?;
    Ok((rows, tables.len() as u64, bytes.get::<_, i64>(0).unsigned_abs()))
}

/// The statements that load the first rows, without checking what is right by construction.
fn first_rows(sizes: Sizes) -> Vec<String> {
    let Sizes { customers, products, orders, events, page_views, archived_orders } = sizes;
    vec![
        "SET search_path = shop; SET session_replication_role = replica; SET synchronous_commit = off".to_owned(),
        "INSERT INTO country SELECT chr(65 + i / 26) || chr(65 + i % 26), 'Country ' || i, i % 25
         FROM generate_series(0, 199) i"
            .to_owned(),
        format!(
            "INSERT INTO customer (email, name, country, tags, preferences, joined)
             SELECT 'c' || i || '@example.org', 'Zoë ' || initcap(substr(md5(i::text), 1, 9)),
                    chr(65 + i % 200 / 26) || chr(65 + i % 200 % 26), ARRAY['new', 'it''s \"' || i % 7 || '\"'],
                    jsonb_build_object('theme', i % 3, 'nested', jsonb_build_object('a', ARRAY[i, NULL])),
                    '2020-01-01 00:00Z'::timestamptz + i * interval '1 minute'
             FROM generate_series(1, {customers}) i"
        ),
        format!(
            "INSERT INTO product (sku, title, price, attributes, sizes, description)
             SELECT 'SKU-' || i, 'Product ' || i, 1 + i % 500 + 0.99, jsonb_build_object('colour', i % 9), ARRAY[i, i / 3.0],
                    (SELECT string_agg(md5(i || '/' || part), '') FROM generate_series(1, 80 + i % 100) part)
             FROM generate_series(1, {products}) i"
        ),
        format!("INSERT INTO stock (product_id, on_hand) SELECT i, 1000000 FROM generate_series(1, {products}) i"),
        format!(
            "INSERT INTO \"Order\" (customer_id, status, \"Gift?\", placed)
             SELECT 1 + i % {customers}, (enum_range(NULL::order_status))[1 + i % 5], i % 11 = 0,
                    '2024-01-01 00:00Z'::timestamptz + i * interval '7 minutes'
             FROM generate_series(1, {orders}) i"
        ),
        format!(
            "INSERT INTO \"Order Line\" (order_id, \"Line No\", product_id, quantity, price)
             SELECT i, n, 1 + (i * 7 + n * 13) % {products}, 1 + i % 9, 1 + (i + n) % 500
             FROM generate_series(1, {orders}) i, generate_series(1, 2) n"
        ),
        format!(
            "INSERT INTO event (happened, kind, payload)
             SELECT '2024-01-01 00:00Z'::timestamptz + i * interval '1 day' * 1000 / {events}, 'kind ' || i % 5,
                    jsonb_build_object('order', i, 'note', NULL)
             FROM generate_series(1, {events}) i"
        ),
        format!(
            "INSERT INTO page_view (path, address, session)
             SELECT '/p/' || i, '10.0.0.0'::inet + i, md5((i / 10)::text)::uuid FROM generate_series(1, {page_views}) i"
        ),
        format!(
            "INSERT INTO archived_order
             SELECT md5('archived ' || i)::uuid, daterange(date '2019-01-01' + i % 900, date '2019-01-05' + i % 900),
                    i * interval '1 month 1 day 1.000001 seconds', sqrt(i::float8), i / 7.0, decode(md5(i::text), 'hex'),
                    (i % 1024)::bit(10), (time '00:00' + i * interval '1 second') AT TIME ZONE '+05:45', point(i, -i),
                    CASE WHEN i % 3 > 0 THEN E'tab\\tand \\\\ and\\nline ' || repeat(i::text, i % 50) END
             FROM generate_series(1, {archived_orders}) i"
        ),
        "REFRESH MATERIALIZED VIEW best_seller".to_owned(),
        "RESET session_replication_role; RESET synchronous_commit; RESET search_path".to_owned(),
        "ANALYZE".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::ServerPrograms;

    #[tokio::test]
    async fn the_shop_has_what_a_migration_must_carry_over() {
        let programs = ServerPrograms::find(None).unwrap();
        let server = ThrowawayServer::start(&programs, "schema", &[("fsync", "off")]).await.unwrap();
        let client = create_database(&server).await.unwrap();
        fill(&client, Sizes::of_rows(5_000)).await.unwrap();

        let (rows, tables, bytes) = measure(&client).await.unwrap();
        assert!((4_500..6_000).contains(&rows), "about as many rows as asked for: {rows}");
        assert!(tables >= 12 && bytes > 1_000_000, "{tables} tables, {bytes} bytes");
        // A promise of schema.sql each; every one of them must be true.
        for claim in [
            "SELECT count(*) FROM shop.product WHERE pg_column_size(description) > 2000",
            "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'shop.product'::regclass",
            "SELECT count(*) FROM shop.event_2024 HAVING count(*) > 100",
            "SELECT count(*) FROM shop.event_2025_odd HAVING count(*) > 100",
            "SELECT count(*) FROM shop.\"event, other\" HAVING count(*) > 100",
            "SELECT count(*) FROM shop.best_seller",
            "SELECT count(*) FROM shop.order_total",
            "SELECT count(*) FROM pg_attribute WHERE attidentity = 'a'",
            "SELECT count(*) FROM pg_attribute WHERE attidentity = 'd'",
            "SELECT count(*) FROM pg_attribute WHERE attgenerated = 's'",
            "SELECT last_value FROM shop.invoice_number WHERE is_called",
            "SELECT count(*) FROM shop.archived_order WHERE receipt LIKE '%\\\\ and%'",
        ] {
            let row = client.query_opt(claim, &[]).await.unwrap_or_else(|error| panic!("{claim}: {error}"));
            assert!(row.is_some_and(|row| row.get::<_, i64>(0) > 0), "{claim}");
        }
        // The rows were loaded without foreign-key checks; they must satisfy them all the same.
        client
            .batch_execute(
                "DO $$ DECLARE c record; BEGIN
                   FOR c IN SELECT conrelid::regclass AS t, quote_ident(conname) AS n, pg_get_constraintdef(oid) AS d
                            FROM pg_constraint WHERE contype = 'f' LOOP
                     EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %s', c.t, c.n);
                     EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %s %s', c.t, c.n, c.d);
                   END LOOP; END $$",
            )
            .await
            .unwrap();
    }
}
