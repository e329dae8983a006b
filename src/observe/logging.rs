//! Log lines to stderr: short ones for people, or JSON, and never through the middle of a progress bar.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, ErrorKind, Result};
use crate::observe::wall_clock;

/// The environment variable with the level (`debug`), or with directives (`walferry::apply=trace,tokio_postgres=info`).
pub const LEVEL_VARIABLE: &str = "WALFERRY_LOG";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people: time, level, message, fields.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends log lines to stderr from now on. Returned is what bars must be drawn with, so that log lines pass above them.
///
/// # Errors
///
/// [`ErrorKind::Usage`] if [`LEVEL_VARIABLE`] cannot be understood, [`ErrorKind::Other`] if logging was set up before.
pub fn init(format: LogFormat) -> Result<MultiProgress> {
    let filter = filter(std::env::var(LEVEL_VARIABLE).ok().as_deref())?;
    let bars = MultiProgress::new();
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let writer = AboveBars { bars: bars.clone(), output: io::stderr };
    tracing::subscriber::set_global_default(subscriber(format, colour, filter, writer))
        .map_err(|error| Error::new(ErrorKind::Other, format!("setting up the log: {error}")))?;
    Ok(bars)
}

/// Our own lines at a level, and warnings of the libraries; directives are taken as they are.
fn filter(setting: Option<&str>) -> Result<EnvFilter> {
    let setting = setting.map(str::trim).filter(|setting| !setting.is_empty()).unwrap_or("info");
    let is_level = setting.parse::<tracing::level_filters::LevelFilter>().is_ok();
    let directives =
        if is_level { format!("warn,walferry={setting}") } else { format!("warn,walferry=info,{setting}") };
    // A bare word that is no level would be taken for the name of a module.
    let understood = is_level || setting.contains('=');
    let invalid = |why: String| {
        Error::new(ErrorKind::Usage, format!("{LEVEL_VARIABLE}={setting}: {why}"))
            .hint("error, warn, info, debug or trace, or directives such as walferry::apply=debug")
    };
    if !understood {
        return Err(invalid("not a level".to_string()));
    }
    EnvFilter::builder().parse(directives).map_err(|error| invalid(error.to_string()))
}

fn subscriber<W>(format: LogFormat, colour: bool, filter: EnvFilter, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match format {
        LogFormat::Text => Box::new(builder.with_ansi(colour).event_format(Short).finish()),
        LogFormat::Json => {
            Box::new(builder.with_ansi(false).json().flatten_event(true).with_timer(UtcMilliseconds).finish())
        }
    }
}

/// The time of a line in JSON.
struct UtcMilliseconds;

impl FormatTime for UtcMilliseconds {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        writer.write_str(&wall_clock::now_rfc3339())
    }
}

/// `2026-11-20T10:16:16Z info  message field=value`.
struct Short;

impl<S, N> FormatEvent<S, N> for Short
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let (name, colour) = match level {
            Level::ERROR => ("error", "31"),
            Level::WARN => ("warn ", "33"),
            Level::INFO => ("info ", "32"),
            Level::DEBUG => ("debug", "34"),
            Level::TRACE => ("trace", "35"),
        };
        let now = wall_clock::now_rfc3339();
        let time = now.get(..19).unwrap_or(&now);
        if writer.has_ansi_escapes() {
            write!(writer, "\x1b[2m{time}Z\x1b[0m \x1b[{colour}m{name}\x1b[0m ")?;
        } else {
            write!(writer, "{time}Z {name} ")?;
        }
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Makes writers that hide the bars while a line is written.
struct AboveBars<F> {
    bars: MultiProgress,
    output: F,
}

impl<'w, F, W> MakeWriter<'w> for AboveBars<F>
where
    F: Fn() -> W + 'w,
    W: Write,
{
    type Writer = LineAboveBars<W>;

    fn make_writer(&'w self) -> Self::Writer {
        LineAboveBars { bars: self.bars.clone(), output: (self.output)() }
    }
}

struct LineAboveBars<W: Write> {
    bars: MultiProgress,
    output: W,
}

/// The formatter writes a whole line at once.
impl<W: Write> Write for LineAboveBars<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let output = &mut self.output;
        self.bars.suspend(|| output.write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
