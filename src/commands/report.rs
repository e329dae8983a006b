//! `walferry report`.

use super::{either_or_known, print};
use crate::cli;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::report;

/// Makes it, on standard output or in a file.
pub(super) async fn report(options: cli::Report) -> Result<()> {
    let directory = &options.directory.dir;
    crate::databases::overview::refuse(directory, "report")?;
    let (source, target) = either_or_known(&options.servers, directory)?;
    let report = report::gather(directory, source.as_ref(), target.as_ref()).await?;
    let text = if options.json {
        let json = serde_json::to_string_pretty(&report);
        json.map_err(|error| Error::new(ErrorKind::Other, error.to_string()))? + "\n"
    } else {
        report::render(&report)
    };
    match &options.output {
        None => print(&text),
        Some(path) => std::fs::write(path, text)
            .context(|| format!("writing {}", path.display()))
            .map_err(|error| error.hint("Give --output a file in a directory that is there and may be written to.")),
    }
}
