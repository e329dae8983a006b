//! The settings of every session of walferry, whatever the server, the database or the role says.
//!
//! They go into the `options` parameter of the start-up message, after the user's own options, so that they hold from
//! the first statement on and on replication connections too (H13, H36). A server refuses a start-up that names a
//! setting which it does not know; those that only newer servers have are set by [`AFTER_LOGIN`].

/// Name and value.
const PINNED: &[(&str, &str)] = &[
    // How values look: the same on both servers and in the stream.
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("xmloption", "content"),
    ("lc_monetary", "C"),
    ("array_nulls", "on"),
    ("standard_conforming_strings", "on"),
    // No name is found by chance, and no row is left out in silence.
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    // Nothing ends a session or refuses its writes but what walferry asks for by itself.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_isolation", "read committed"),
];

/// Run right after the login: takes the time limits away that only newer servers know (12: `tcp_user_timeout`, which counts while we
/// do not read; 14: `idle_session_timeout`; 17: `transaction_timeout`), and answers in one row whether the server is a standby, two settings from [`PINNED`]
/// that show whether the options arrived, and last which process of the server answers.
pub(super) const AFTER_LOGIN: &str = "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('IntervalStyle'), \
     pg_catalog.current_setting('extra_float_digits'), (SELECT pg_catalog.count(pg_catalog.set_config(name, '0', false)) \
     FROM pg_catalog.pg_settings WHERE name IN ('idle_session_timeout', 'tcp_user_timeout', 'transaction_timeout')), pg_catalog.pg_backend_pid()";

/// Whether an answer to [`AFTER_LOGIN`] shows that the options arrived.
pub(super) fn have_arrived(interval_style: Option<&str>, float_digits: Option<&str>) -> bool {
    interval_style == Some("postgres") && float_digits == Some("3")
}

/// The value of the start-up parameter `options`: the user's own first, so that ours win.
pub(super) fn options(own: Option<&str>) -> String {
    let mut options = own.unwrap_or_default().to_owned();
    // A lone backslash at the end, which the server drops, would take the space before ours as its own.
    let backslashes = options.chars().rev().take_while(|&letter| letter == '\\').count();
    if backslashes % 2 == 1 {
        options.pop();
    }
    for (name, value) in PINNED {
        if !options.is_empty() {
            options.push(' ');
        }
        options.push_str(&format!("-c {name}={}", value.replace('\\', "\\\\").replace(' ', "\\ ")));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_settings_come_after_the_users_own_and_their_spaces_are_escaped() {
        let options = options(Some("-c work_mem=1GB -c DateStyle=German"));
        assert!(options.starts_with("-c work_mem=1GB -c DateStyle=German -c DateStyle=ISO,\\ YMD "), "{options}");
        assert!(options.ends_with("-c default_transaction_isolation=read\\ committed"), "{options}");
    }

    #[test]
    fn no_option_of_the_users_can_swallow_a_pinned_one() {
        for (own, expected) in
            [("-c a=b\\", "-c a=b -c D"), ("-c a=\\\\", "-c a=\\\\ -c D"), ("-c a=\\ ", "-c a=\\  -c D")]
        {
            assert!(options(Some(own)).starts_with(expected), "{own}");
        }
    }
}
