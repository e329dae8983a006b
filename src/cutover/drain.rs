//! The drain: what proves that all that was committed before is on the target.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio_postgres::Client;

use super::timer::Timer;
use super::{Cutover, record};
use crate::apply::Applied;
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::marker;

/// How far a marker showed the apply to be.
pub(super) struct Drained {
    pub(super) lsn: Lsn,
    /// Row changes that came before the marker.
    pub(super) changes: u64,
}

impl Cutover<'_> {
    /// Sends a marker through the stream, and waits until the apply has committed it (H34).
    pub(super) async fn drain(&self, source: &Client, timer: &Timer<'_>) -> Result<Drained> {
        timer.within(send_and_await_marker(source, &self.applied)).await
    }
}

/// Sends a marker through the stream, and waits until the apply has committed it (H34).
pub(super) async fn send_and_await_marker(source: &Client, applied: &watch::Receiver<Applied>) -> Result<Drained> {
    let content = format!("cutover {}", unique());
    // `local`: with `off` it would not be flushed on return, with `on` a dead standby could hold it up. Sent at once.
    let local = async { source.batch_execute(record::LOCAL_COMMITS).await.map_err(Error::from) };
    let ((), marker::Sent { lsn, content }) = tokio::try_join!(local, marker::send(source, &content))?;
    let mut applied = applied.clone();
    let ours = |applied: &Applied| applied.marker(&content).is_some();
    let changes = match applied.wait_for(ours).await {
        Ok(applied) => applied.marker(&content).map_or(0, |marker| marker.changes),
        Err(_) => {
            return Err(Error::new(ErrorKind::Other, "the apply has ended")
                .hint("`walferry status` says why. Try again when it says that the cutover is ready."));
        }
    };
    Ok(Drained { lsn, changes })
}

/// Waits until the apply has passed this moment of the source.
///
/// # Errors
/// Whatever the source says, or `Other` when the apply has ended.
pub(crate) async fn let_the_apply_pass(source: &Client, applied: &watch::Receiver<Applied>) -> Result<()> {
    send_and_await_marker(source, applied).await.map(drop)
}

/// A text that no other cutover has.
pub(super) fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", std::process::id(), now.as_nanos())
}
