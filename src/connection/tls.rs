//! TLS as libpq's sslmode means it, by rustls with the `ring` provider.

use std::collections::BTreeMap;

use super::environment::Environment;
use super::spec::bad_value;
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};

/// `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Everything that says how to speak TLS with a server.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings {
    pub(super) mode: SslMode,
}

/// Why there is no TLS session.
pub(super) enum TlsFailure {
    /// The connection broke, or the settings cannot be used.
    Broken(Error),
    /// One side refused the other; without TLS it may work.
    Refused(Error),
}

impl TlsSettings {
    pub(super) fn from_parameters(parameters: &BTreeMap<&'static str, String>, _: &Environment) -> Result<TlsSettings> {
        let mode = match parameters.get("sslmode").map(String::as_str) {
            None | Some("prefer") => SslMode::Prefer,
            Some("disable") => SslMode::Disable,
            Some("allow") => SslMode::Allow,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            Some(_) => return Err(bad_value("sslmode", "disable, allow, prefer, require, verify-ca or verify-full")),
        };
        Ok(TlsSettings { mode })
    }

    pub(super) async fn negotiate(&self, stream: Stream, _host: &str) -> Result<Stream, TlsFailure> {
        drop(stream);
        Err(TlsFailure::Refused(Error::new(ErrorKind::Usage, "TLS is not in this build")))
    }
}
