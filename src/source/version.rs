//! What a server's version knows, and what is said to it instead: everything that depends on the version of PostgreSQL is here.
//!
//! Either server can be asked: on the way back the old one is written to.

use tokio_postgres::Client;

use crate::error::{Context, Result};

/// The major version of a server, such as 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl Version {
    /// Asks a server.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn of(client: &Client) -> Result<Version> {
        let row = client
            .query_typed_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[])
            .await
            .context(|| "asking a server for its version".into())?;
        Ok(Version(u32::try_from(row.get::<_, i32>(0) / 10_000).unwrap_or_default()))
    }

    /// Whether the stream can carry logical messages and binary values (pgoutput's `messages` and `binary`, 14).
    pub fn streams_messages(self) -> bool {
        self.0 >= 14
    }

    /// Whether a publication can have TRUNCATE (11).
    pub fn streams_truncate(self) -> bool {
        self.0 >= 11
    }

    /// Whether a range of `ctid` is read without reading the rest of the table (TID range scans, 14).
    pub fn scans_page_ranges(self) -> bool {
        self.0 >= 14
    }

    /// Whether floats print as the shortest text that reads as the same bits (12); before, with more digits.
    pub fn prints_floats_shortest(self) -> bool {
        self.0 >= 12
    }

    /// Whether a slot can be made on a standby (16), and the primary be asked to log what that waits for.
    pub fn logs_standby_snapshots(self) -> bool {
        self.0 >= 16
    }

    /// How `CREATE_REPLICATION_SLOT … LOGICAL pgoutput` is told to have our transaction use the slot's snapshot (another grammar
    /// since 15: H7).
    pub fn use_snapshot(self) -> &'static str {
        if self.0 >= 15 { "(SNAPSHOT 'use')" } else { "USE_SNAPSHOT" }
    }

    /// The same for no snapshot at all.
    pub fn no_snapshot(self) -> &'static str {
        if self.0 >= 15 { "(SNAPSHOT 'nothing')" } else { "NOEXPORT_SNAPSHOT" }
    }

    /// What tells a generated column (12) by a row `a` of `pg_attribute`.
    pub(crate) fn generated(self) -> &'static str {
        if self.0 >= 12 { "a.attgenerated" } else { "''::\"char\"" }
    }

    /// What the rows have that were there when the column `a` was added with a default (11), as text, and whether there is such.
    pub(crate) fn missing_value(self) -> (&'static str, &'static str) {
        if self.0 >= 11 { ("a.attmissingval::text", "a.atthasmissing") } else { ("NULL::text", "false") }
    }

    /// How many columns of an index `i` are its key, without those that it only includes (11).
    pub(crate) fn key_columns(self) -> &'static str {
        if self.0 >= 11 { "i.indnkeyatts" } else { "i.indnatts" }
    }

    /// Whether a collation `l` takes only equal bytes for equal (12: others can be made).
    pub(crate) fn deterministic(self) -> &'static str {
        if self.0 >= 12 { "l.collisdeterministic" } else { "true" }
    }
}
