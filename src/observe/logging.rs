//! Log lines to stderr: short ones for people, or JSON, and never through the middle of a progress bar.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, ErrorKind, Result};
use crate::observe::{locale, wall_clock};

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
    let colour = io::stderr().is_terminal() && wants_colour();
    let writer = AboveBars { bars: bars.clone(), output: io::stderr };
    tracing::subscriber::set_global_default(subscriber(format, colour, filter, writer))
        .map_err(|error| Error::new(ErrorKind::Other, format!("setting up the log: {error}")))?;
    Ok(bars)
}

/// Whether colours are wanted where there is a terminal: `NO_COLOR` and a terminal that knows only lines say no.
pub fn wants_colour() -> bool {
    let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    unset("NO_COLOR") && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// Our own lines at a level, and warnings of the libraries; directives are taken as they are.
pub(super) fn filter(setting: Option<&str>) -> Result<EnvFilter> {
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

pub(super) fn subscriber<W>(
    format: LogFormat,
    colour: bool,
    filter: EnvFilter,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
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
        // A name of a database may hold line breaks: what looks like a line of the log must be one.
        let mut fields = String::new();
        // Of several migrations of one process, which it is.
        for span in context.event_scope().into_iter().flatten() {
            if let Some(of_span) = span.extensions().get::<FormattedFields<N>>() {
                fields.push_str(&format!("{of_span} "));
            }
        }
        context.format_fields(Writer::new(&mut fields), event)?;
        for letter in locale::shown(&fields).chars() {
            if letter.is_control() {
                write!(writer, "{}", letter.escape_default())?
            } else {
                writer.write_char(letter)?
            }
        }
        writeln!(writer)
    }
}

/// Makes writers that hide the bars while a line is written.
pub(super) struct AboveBars<F> {
    pub bars: MultiProgress,
    pub output: F,
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

pub(super) struct LineAboveBars<W: Write> {
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged by `work` in a format.
    fn logged(format: LogFormat, colour: bool, setting: Option<&str>, work: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let output = buffer.clone();
        let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let writer = AboveBars { bars, output: move || output.clone() };
        tracing::subscriber::with_default(subscriber(format, colour, filter(setting).unwrap(), writer), work);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_for_people_is_time_level_message_and_fields() {
        let text = logged(LogFormat::Text, false, None, || tracing::warn!(table = "orders", rows = 3, "copied"));
        let (time, rest) = text.split_at(20);
        assert_eq!(rest, " warn  copied table=\"orders\" rows=3\n");
        assert!(time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
    }

    #[test]
    fn colours_come_only_when_asked_for() {
        let log = || tracing::error!("text");
        assert!(logged(LogFormat::Text, true, None, log).contains("\x1b[31merror\x1b[0m"));
        assert!(!logged(LogFormat::Text, false, None, log).contains('\x1b'));
        assert!(!logged(LogFormat::Json, true, None, log).contains('\x1b'));
    }

    #[test]
    fn a_json_line_is_one_object_with_time_level_and_message() {
        let text = logged(LogFormat::Json, false, None, || tracing::info!(table = "a\nb", "copied"));
        assert_eq!(text.lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&json["level"], &json["message"], &json["table"]),
            (&"INFO".into(), &"copied".into(), &"a\nb".into())
        );
        assert!(json["timestamp"].as_str().is_some_and(|time| time.ends_with('Z') && time.len() == 24), "{json}");
    }

    #[test]
    fn a_name_from_a_database_cannot_steer_the_terminal() {
        let name = "a\x1b[2Jb\u{9b}c";
        let text = logged(LogFormat::Text, false, None, || tracing::info!(name, "copied {name}"));
        assert!(!text.contains(['\x1b', '\u{9b}']), "{text:?}");
    }

    #[test]
    fn a_name_from_a_database_cannot_write_a_line_of_the_log() {
        let name = "a\n2026-11-20T10:16:16Z info  cut over\r";
        let text = logged(LogFormat::Text, true, None, || tracing::info!("copied {name}"));
        assert_eq!(text.lines().count(), 1, "{text:?}");
    }

    #[test]
    fn libraries_only_warn_and_the_level_is_ours() {
        let work = || {
            tracing::info!(target: "hyper::proto", "library");
            tracing::warn!(target: "hyper::proto", "library warns");
            tracing::info!("ours");
            tracing::debug!("details");
        };
        let lines = |setting| {
            logged(LogFormat::Text, false, setting, work).lines().map(|line| line[27..].to_string()).collect::<Vec<_>>()
        };
        assert_eq!(lines(None), ["library warns", "ours"]);
        assert_eq!(lines(Some("debug")), ["library warns", "ours", "details"]);
        assert_eq!(lines(Some("error")), ["library warns"]);
        assert_eq!(lines(Some("hyper=info")), ["library", "library warns", "ours"]);
    }

    #[test]
    fn a_setting_that_means_nothing_is_refused_by_name() {
        for setting in ["verbose", "walferry=loud", "=,="] {
            let error = filter(Some(setting)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{setting}");
            assert!(error.to_string().contains("WALFERRY_LOG"), "{error}");
        }
        for setting in ["", " ", "off", "TRACE", "walferry::apply=debug,warn"] {
            assert!(filter(Some(setting)).is_ok(), "{setting:?}");
        }
    }
}
