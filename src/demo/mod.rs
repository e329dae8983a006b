//! The demonstration: two throwaway servers, a live write load, a whole migration, a report.

pub mod book;
pub mod load;
pub mod schema;
pub mod server;
