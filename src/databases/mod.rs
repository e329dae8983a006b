//! Several databases of one server (`--all-databases`): one migration each, under one status.
//!
//! ```text
//!  the source's server ──► list ──► members ──► check of all ──► roles ──► create what is missing ──► run ──► one migration each
//!                                     │                                                               │        │ board, state directory
//!                                  overview (databases.json, the lock)                             share       ▼
//!  status, cutover, pause … ◄─────────┴──── by the state directories of the members ◄──────────────────── summary, served
//! ```
//!
//! Each member is a migration like any other, with a ledger, a slot and a state directory of its own, in a directory below the one that
//! all share. So whatever the commands do for one directory they do for each, and one member can be gone on with, or resynced, by
//! itself. All run in one process: when it dies, all of them stop, and the next start takes all of them up.

pub mod create;
pub mod list;
pub mod overview;
pub mod run;
pub mod served;
pub mod share;
pub mod summary;

use crate::error::{Error, ErrorKind};

/// What some of several migrations came to, as one error: the gravest exit code, and each by name. `None` where none failed.
///
/// A failure (1) is graver than a difference (4), that than what could not begin (3), that than a cutover that was given up (5), and
/// that than an interruption (130).
pub fn worst(errors: &[(String, Error)]) -> Option<Error> {
    let gravity = |kind: ErrorKind| match kind.exit_code() {
        1 => 0,
        2 => 1,
        4 => 2,
        3 => 3,
        5 => 4,
        _ => 5,
    };
    let (_, worst) = errors.iter().min_by_key(|(_, error)| gravity(error.kind()))?;
    let all: Vec<String> = errors.iter().map(|(database, error)| format!("{database:?}: {error}")).collect();
    let error = Error::new(worst.kind(), all.join("; "));
    Some(match worst.next_step() {
        Some(next) => error.hint(next),
        None => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_several_decides_the_exit_code_and_all_are_named() {
        let error = |kind| ("a\n".to_owned(), Error::new(kind, "x"));
        let code = |kinds: &[ErrorKind]| {
            let errors: Vec<_> = kinds.iter().copied().map(error).collect();
            worst(&errors).map_or(0, |error| error.kind().exit_code())
        };
        assert_eq!(code(&[]), 0);
        assert_eq!(code(&[ErrorKind::Interrupted, ErrorKind::Blocked]), 3);
        assert_eq!(code(&[ErrorKind::Blocked, ErrorKind::Different]), 4);
        assert_eq!(code(&[ErrorKind::Aborted, ErrorKind::Gap, ErrorKind::Different]), 1);
        let all = worst(&[error(ErrorKind::Blocked), error(ErrorKind::Blocked)]);
        assert_eq!(all.map(|error| error.to_string()).as_deref(), Some("\"a\\n\": x; \"a\\n\": x"));
    }
}
