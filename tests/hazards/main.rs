//! One test for each rule that was found by losing rows on a real server (the numbers are those of the rules). Every test
//! fails when its rule is taken out, and talks to throwaway servers through the program itself, or through the library where
//! the rule is one part's own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod apply;
mod copy;
mod failover;
mod resume;
mod schema;
mod snapshot;
mod source;
mod support;
mod values;
