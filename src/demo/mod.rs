//! The demonstration: two throwaway servers, a live write load, a whole migration, a report.

pub mod book;
pub mod compare;
pub mod load;
pub mod migration;
pub mod proof;
pub mod schema;
pub mod server;
