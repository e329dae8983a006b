//! H23: rows are written without `session_replication_role`.
