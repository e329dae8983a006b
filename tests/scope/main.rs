//! What of a database is moved: filters, rows alone, the schema alone, and databases of very many tables; through the real program.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod data_only;
mod filters;
mod many_tables;
mod map_schema;
mod schema_only;

use std::collections::BTreeSet;

use tokio_postgres::Client;

/// The relations of users on a server.
async fn relations(client: &Client) -> BTreeSet<String> {
    let query = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND n.nspname NOT LIKE 'pg\\_%' \
           AND n.nspname NOT IN ('information_schema', 'walferry')";
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// One value of a query.
async fn number(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// Both sides hold the same rows of these tables.
async fn assert_same_rows(source: &Client, target: &Client, tables: &[&str]) {
    for table in tables {
        let query = format!(
            "SELECT count(*) || '/' || coalesce(md5(string_agg(h, '' ORDER BY h)), '') \
             FROM (SELECT md5(t::text) COLLATE \"C\" FROM {table} t) hashes(h)"
        );
        let (here, there) =
            (source.query_one(&query, &[]).await.unwrap(), target.query_one(&query, &[]).await.unwrap());
        assert_eq!(here.get::<_, &str>(0), there.get::<_, &str>(0), "{table}");
        assert!(!here.get::<_, &str>(0).starts_with("0/"), "{table} has rows");
    }
}
