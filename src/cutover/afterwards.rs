//! What is left to do after the decision. Nothing of it takes the decision back; what does not work is said, and where it can be, done
//! again at the next start ([`super::record`]).

use std::time::Duration;

use tokio_postgres::Client;

use super::Cutover;
use super::fence::Fence;
use super::hook::Surroundings;
use super::timer::Timer;
use crate::error::{Error, ErrorKind, Result};
use crate::unstreamed;
use crate::unstreamed::materialized_view::View;

/// How long each thing may take that is left to do after the decision.
const AFTERWARDS_MAX: Duration = Duration::from_secs(10);

impl Cutover<'_> {
    /// After the decision: the applications are told, and let go. Answers what did not work.
    pub(super) async fn go_on(
        &self,
        fence: &mut Fence<'_>,
        around: &Surroundings,
        target: &Client,
        timer: &mut Timer<'_>,
    ) -> Vec<String> {
        let mut warnings = Vec::new();
        // Before anybody is sent to the target: who comes then finds it open, and is not to be ended.
        if let Some(closed) = &self.target_closed
            && let Err(error) = bounded(closed.end_read_only_sessions(target, self.application_name)).await
        {
            warnings.push(format!("sessions of the new primary that are still read-only could not be ended: {error}"));
        }
        let pending = fence.record().pending();
        let (so_far, mut hook_succeeded) = (warnings.len(), true);
        if let Some(pending) = &pending {
            if pending.on_switch.is_some() {
                if let Err(error) = pending.run_hook(around).await {
                    warnings.push(pending.hook_failed(&error));
                    hook_succeeded = false;
                }
                timer.done();
            }
            if pending.pgbouncer.is_some() {
                if let Err(error) = bounded(pending.switch_pooler(self.target, hook_succeeded)).await {
                    warnings.push(error.to_string());
                }
                timer.done();
            }
        }
        if let Err(error) = bounded(fence.release()).await {
            tracing::warn!(%error, "after the decision, sessions that wait for the source's locks could not be ended");
        }
        if let Some(pending) = &pending {
            if let Err(error) = bounded(pending.let_in(self.source)).await {
                warnings.push(error.to_string());
            }
            if let Err(error) = pending.settle(target, warnings.len() == so_far).await {
                tracing::warn!(%error, "what was done after the decision is done again at the next start");
            }
        }
        warnings
    }
}

/// Refreshes what was refreshed on the source during the cutover. Answers what did not work.
pub(super) async fn refresh_late(target: &Client, views: Vec<View>) -> Vec<String> {
    if views.is_empty() {
        return Vec::new();
    }
    let by_hand = views.iter().map(|view| view.object.as_str()).collect::<Vec<_>>().join(", ");
    match bounded(async { Ok(unstreamed::refresh_late(target, views).await) }).await {
        Ok(warnings) => warnings,
        Err(_) => vec![format!(
            "refreshed on the source during the cutover, and not yet on the new primary: {by_hand}; refresh them there"
        )],
    }
}

/// What is done after the decision, when somebody may have gone silent for good: whoever comes next must not wait for it.
async fn bounded<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::new(ErrorKind::Transient, format!("no answer within {} s", AFTERWARDS_MAX.as_secs())));
    tokio::time::timeout(AFTERWARDS_MAX, work).await.unwrap_or_else(late)
}
