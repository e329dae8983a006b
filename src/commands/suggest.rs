//! `walferry suggest-hypertables`.

use super::{either, print};
use crate::cli;
use crate::error::{Error, ErrorKind, Result};
use crate::timescale::suggest;

pub(super) async fn suggest_hypertables(options: cli::SuggestHypertables) -> Result<()> {
    let (source, target) = either(&options.servers)?;
    let missing = |what: &str, hint: &str| Error::new(ErrorKind::Usage, what).hint(hint);
    let source = source.ok_or_else(|| missing("--source is missing", "Give --source or set WALFERRY_SOURCE."))?;
    let memory = match (options.memory, target) {
        (Some(memory), _) => memory,
        (None, Some(target)) => suggest::shared_buffers(&target.connect(SUGGESTING).await?).await?,
        (None, None) => {
            let hint = "Give --target, whose shared_buffers say it, or --memory, such as --memory 4GiB.";
            return Err(missing("how large a chunk may be is not known", hint));
        }
    };
    print(&suggest::suggest(&source.connect(SUGGESTING).await?, &options.filters.scope(None), memory).await?)
}

/// What a session of `suggest-hypertables` calls itself.
const SUGGESTING: &str = "walferry suggest-hypertables";
