//! Everything that a database holds besides the rows of its tables: it arrives, or `check` says by name that it will not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod dump;
mod everything;
mod extension;
mod fingerprint;
mod harmless;
mod large_object;
mod materialized_view;
mod roles;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;

use support::Migration;
use tokio_postgres::{Client, SimpleQueryMessage};

/// The rows of a query as text, columns joined by `|`.
async fn rows(client: &Client, query: &str) -> Vec<String> {
    let messages = client.simple_query(query).await.unwrap_or_else(|error| panic!("{query}: {error:?}"));
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect::<Vec<_>>().join("|"))
        }
        _ => None,
    };
    messages.iter().filter_map(row).collect()
}

/// Asserts that a query gives the same rows on both sides, and answers with them.
async fn same(migration: &Migration, query: &str) -> Vec<String> {
    let (source, target) = (migration.source().await, migration.target().await);
    let (source, target) = (rows(&source, query).await, rows(&target, query).await);
    assert_eq!(source, target, "{query}");
    source
}

/// A shell command that runs a statement in the source's database: for hooks, which run while the fence stands.
fn on_source(migration: &Migration, statement: &str) -> String {
    let psql = support::programs().bin("psql");
    format!("'{}' -X -q -v ON_ERROR_STOP=1 -c \"{statement}\" '{}'", psql.display(), migration.source_url)
}
