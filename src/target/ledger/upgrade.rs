//! What an older walferry wrote, brought to the form of this one (H18).

use tokio_postgres::Client;

use crate::error::{Context, Result};

/// From format 1, whose snapshots all had to follow that of the slot, number 0, or 2, which knew no way back, or 3, which wrote in the
/// replica role only, or 4, which moved only whole databases. Any number of processes
/// may do it, once.
pub(super) async fn to_newest(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "BEGIN; LOCK TABLE walferry.migration IN ACCESS EXCLUSIVE MODE; \
             ALTER TABLE walferry.migration ADD COLUMN IF NOT EXISTS snapshot_floor bigint NOT NULL DEFAULT 0, \
                 ADD COLUMN IF NOT EXISTS queue text NOT NULL DEFAULT 'queue', \
                 ADD COLUMN IF NOT EXISTS way_back text, \
                 ADD COLUMN IF NOT EXISTS apply_role text NOT NULL DEFAULT 'replica', \
                 ADD COLUMN IF NOT EXISTS scope text; \
             ALTER TABLE walferry.source_table ADD COLUMN IF NOT EXISTS compared boolean NOT NULL DEFAULT false; \
             UPDATE walferry.migration SET snapshot_floor = coalesce((SELECT next FROM walferry.snapshot WHERE id = 0), 0) \
                 WHERE format = 1; \
             UPDATE walferry.migration SET format = 5 WHERE format < 5; \
             COMMIT",
        )
        .await
        .context(|| "bringing the ledger of an older walferry up to date".into())
}
