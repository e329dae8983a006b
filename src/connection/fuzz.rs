//! The body of the fuzz target of connection strings.

use std::path::Path;

use super::environment::{Environment, password_file_escaped, password_in, service_section};
use super::keywords::KEYWORDS;
use super::parse;
use super::spec::ConnectionSpec;
use crate::error::ErrorKind;

/// Reads any bytes as a connection string and, behind the character 0x1E, as a service file and a password file. Nothing makes
/// it panic, what is refused is a usage error, a connection reads back as it was written, and its password is shown nowhere.
///
/// # Panics
/// When one of these does not hold.
pub fn any_bytes(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.splitn(3, '\u{1e}');
    let (string, service, passwords) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let surroundings = Environment { user: Some("me".to_owned()), ..Environment::default() };
    match ConnectionSpec::parse_in(string, &surroundings) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}"),
        Ok(spec) => {
            let written = spec.without_password();
            let again = ConnectionSpec::parse_in(&written, &surroundings);
            let again = again.unwrap_or_else(|error| panic!("{error:?}: {written:?}"));
            assert_eq!(again.without_password(), written);
            assert!(!again.has_inline_password());
            assert_eq!((again.user(), again.database()), (spec.user(), spec.database()));
            if let Some(password) = password_of(string).filter(|password| is_unmistakable(password, &spec)) {
                let shown = format!("{written} {spec:?} {spec} {}", spec.describe());
                assert!(!shown.contains(&password), "{shown}");
            }
        }
    }
    if let Some(service) = service
        && let Err(error) = service_section(service, "s", Path::new("file"))
    {
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
    if let Some(passwords) = passwords {
        let _ = password_in(passwords.as_bytes(), ["host", "5432", "db", "me"]);
        // A password of anything but line breaks comes back through the file that a child process gets.
        if !passwords.contains(['\n', '\r']) {
            let line = format!("host:5432:*:*:{}\n", password_file_escaped(passwords));
            assert_eq!(password_in(line.as_bytes(), ["host", "5432", "db", "me"]).as_deref(), Some(passwords));
        }
    }
}

fn password_of(string: &str) -> Option<String> {
    let found = parse::parameters(string).ok()?;
    found.into_iter().rev().find(|(name, _)| *name == "password").map(|(_, value)| value)
}

/// Whether a password, if it were shown, could not be anything else: it is long, has a digit, and is no part of another value.
fn is_unmistakable(password: &str, spec: &ConnectionSpec) -> bool {
    password.len() >= 8
        && password.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && password.bytes().any(|byte| byte.is_ascii_digit())
        && spec.parameters.values().all(|value| !value.contains(password))
        && spec.hosts.iter().all(|host| !host.describe().contains(password))
        && KEYWORDS.iter().all(|keyword| !keyword.name.contains(password))
}
