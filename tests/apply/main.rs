//! The apply against real servers: what is in the queue gets onto the target once, in order, or not at all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bed;
mod conflict;
mod crash;
mod held;
mod large;
mod refusal;
mod schema_change;
mod shapes;
mod single;
mod snapshot;

#[tokio::test(flavor = "multi_thread")]
async fn any_history_of_any_table_ends_as_on_the_source_in_text() {
    for workers in [1, 2, 4] {
        shapes::random_histories(false, workers).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_history_of_any_table_ends_as_on_the_source_in_binary() {
    for workers in [1, 2, 4] {
        shapes::random_histories(true, workers).await;
    }
}
