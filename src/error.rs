//! What can go wrong, what walferry does about it, and what the operator can do.
//!
//! An error says what was being done and with which object, what the server said (with its SQLSTATE), and what to
//! do next. Its [`ErrorKind`] decides between trying again and giving up, and which code the process exits with.
//! The DETAIL of a server's error is left out: it holds row values ([`log_detail`] has it logged).

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::error::SqlState;

/// The result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How an error is dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command line or the configuration is wrong.
    Usage,
    /// A precondition of the migration does not hold; nothing has been changed.
    Blocked,
    /// A server or the connection to it went away or is short of something; trying again can help.
    Transient,
    /// The server refused a statement, and would again.
    Server,
    /// The target does not hold what the source's history says it must (invariant I6).
    Divergence,
    /// The source's schema changed in a way that the running migration cannot follow (invariant I11).
    SchemaChanged,
    /// The stream cannot be continued without a gap: a lost slot, another server, a queue that is not ours.
    Gap,
    /// What the queue holds is corrupt, or not what this walferry can go on with.
    Queue,
    /// The queue's disk refused a call. What was durable before is not harmed, and the rest comes again from the source.
    Disk,
    /// The two sides differ.
    Different,
    /// A cutover was given up before its last step; the migration follows again.
    Aborted,
    /// The operator asked to stop.
    Interrupted,
    /// Anything else: files, child processes, broken assumptions.
    Other,
}

impl ErrorKind {
    /// The exit code of a command that ends with this kind of error.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Usage => 2,
            ErrorKind::Blocked => 3,
            ErrorKind::Different => 4,
            ErrorKind::Aborted => 5,
            ErrorKind::Interrupted => 130,
            _ => 1,
        }
    }
}

/// An error with what was being done, and what to do next.
pub struct Error {
    kind: ErrorKind,
    context: Vec<String>,
    hint: Option<String>,
    sqlstate: Option<SqlState>,
}

impl Error {
    /// An error of a kind, with a sentence that says what happened to which object.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, context: vec![message.into()], hint: None, sqlstate: None }
    }

    /// What a server said, where the client is not tokio-postgres: its SQLSTATE decides the kind.
    pub fn from_server(sqlstate: &str, message: &str) -> Error {
        let state = SqlState::from_code(sqlstate);
        let kind = if is_transient(&state, message) { ErrorKind::Transient } else { ErrorKind::Server };
        Error { kind, context: vec![format!("{message} (SQLSTATE {sqlstate})")], hint: None, sqlstate: Some(state) }
    }

    /// Adds what the operator can do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what was being done when it happened, in front of what is there.
    #[must_use]
    pub fn context(mut self, doing: impl Into<String>) -> Error {
        self.context.push(doing.into());
        self
    }

    /// The same error as another kind, where the caller knows better what to do about it.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Error {
        self.kind = kind;
        self
    }

    /// How to deal with it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether trying again can help.
    pub fn is_transient(&self) -> bool {
        self.kind == ErrorKind::Transient
    }

    /// The server's SQLSTATE, when a server said no.
    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.sqlstate.as_ref()
    }

    /// What to do next, when there is something to do.
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, part) in self.context.iter().rev().enumerate() {
            if position > 0 {
                f.write_str(": ")?;
            }
            f.write_str(part)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({:?})", self.kind)?;
        match &self.hint {
            Some(hint) => write!(f, "; next: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Whether the DETAIL of servers' errors is logged.
static LOG_DETAIL: AtomicBool = AtomicBool::new(false);

/// Has the DETAIL of servers' errors logged from now on (`--log-detail`). It holds values of rows; errors themselves never have it, so it
/// comes into no status, no ledger and no report.
pub fn log_detail() {
    LOG_DETAIL.store(true, Ordering::Relaxed);
}

/// Logs what a server said beside its message, where that was asked for.
pub(crate) fn say_detail(message: &str, detail: Option<&str>) {
    if let (true, Some(detail)) = (LOG_DETAIL.load(Ordering::Relaxed), detail) {
        tracing::warn!("DETAIL of \"{message}\": {detail}");
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Error {
        if let Some(server) = error.as_db_error() {
            say_detail(server.message(), server.detail());
        }
        let (message, sqlstate) = match error.as_db_error() {
            Some(server) => {
                (format!("{} (SQLSTATE {})", server.message(), server.code().code()), Some(server.code().clone()))
            }
            None => (with_causes(&error), None),
        };
        let transient = match error.as_db_error() {
            Some(server) => is_transient(server.code(), server.message()),
            None => error.is_closed() || has_io_cause(&error),
        };
        let kind = if transient { ErrorKind::Transient } else { ErrorKind::Server };
        Error { kind, context: vec![message], hint: None, sqlstate }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        Error::new(ErrorKind::Other, error.to_string())
    }
}

/// Adds to a result what was being done.
pub trait Context<T> {
    /// Says what was being done, with which object: `copying table "public"."orders"`.
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().context(doing()))
    }
}

/// An error and its causes in one line, without saying the same thing twice.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

/// Whether the same statement can succeed later without anybody's doing (appendix A of the manual, "Error Codes").
fn is_transient(state: &SqlState, message: &str) -> bool {
    match state.code().get(..2).unwrap_or_default() {
        // Connection exceptions, insufficient resources (disk full, too many connections), operator intervention
        // (shutdown, terminated), system errors, and serialization failures and deadlocks.
        "08" | "53" | "58" | "40" => true,
        "57" => *state != SqlState::QUERY_CANCELED && *state != SqlState::DATABASE_DROPPED,
        // A target that is a standby for the moment, or fenced by somebody else.
        "25" => *state == SqlState::READ_ONLY_SQL_TRANSACTION,
        "55" => *state == SqlState::LOCK_NOT_AVAILABLE || *state == SqlState::OBJECT_IN_USE,
        // A writer looks up a table's publications without a lock, so one that is dropped meanwhile (ours of the way back, when it is
        // made anew) fails an UPDATE. It is an internal error of the server's, which has no translations.
        "XX" => message.starts_with("cache lookup failed for publication "),
        _ => false,
    }
}

fn has_io_cause(error: &tokio_postgres::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if inner.is::<std::io::Error>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_from_the_outside_in() {
        let error = Error::new(ErrorKind::Server, "permission denied (SQLSTATE 42501)")
            .context("copying table \"public\".\"t\"")
            .hint("GRANT SELECT");
        assert_eq!(error.to_string(), "copying table \"public\".\"t\": permission denied (SQLSTATE 42501)");
        assert_eq!(error.next_step(), Some("GRANT SELECT"));
    }

    #[test]
    fn a_publication_dropped_under_a_writer_is_tried_again_and_no_other_internal_error() {
        assert!(Error::from_server("XX000", "cache lookup failed for publication 20460").is_transient());
        assert!(!Error::from_server("XX000", "cache lookup failed for relation 20460").is_transient());
    }

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes = [ErrorKind::Other, ErrorKind::Usage, ErrorKind::Blocked, ErrorKind::Different];
        assert_eq!(codes.map(ErrorKind::exit_code), [1, 2, 3, 4]);
        assert_eq!(ErrorKind::Aborted.exit_code(), 5);
        assert_eq!(ErrorKind::Interrupted.exit_code(), 130);
    }

    #[test]
    fn only_what_can_pass_is_tried_again() {
        assert!(is_transient(&SqlState::ADMIN_SHUTDOWN, ""));
        assert!(is_transient(&SqlState::DISK_FULL, ""));
        assert!(!is_transient(&SqlState::QUERY_CANCELED, ""));
        assert!(!is_transient(&SqlState::UNIQUE_VIOLATION, ""));
        assert!(!is_transient(&SqlState::INVALID_PASSWORD, ""));
    }
}
