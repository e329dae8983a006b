//! libpq's connection parameters: which exist, which environment variable fills each, and what walferry does with it.

/// What walferry does with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// It takes effect.
    Used,
    /// It changes nothing that matters here, whatever its value.
    Ignored,
    /// Only values that ask for nothing are taken; any other is refused, since leaving it out would break a promise.
    Only(&'static [&'static str]),
}

/// One connection parameter of libpq ("Parameter Key Words" in the manual).
#[derive(Debug)]
pub(super) struct Keyword {
    /// Its name.
    pub(super) name: &'static str,
    /// The environment variable that fills it ("Environment Variables" in the manual).
    pub(super) variable: Option<&'static str>,
    /// What becomes of it.
    pub(super) treatment: Treatment,
}

const fn used(name: &'static str, variable: &'static str) -> Keyword {
    Keyword { name, variable: Some(variable), treatment: Treatment::Used }
}

const fn unnamed(name: &'static str, treatment: Treatment) -> Keyword {
    Keyword { name, variable: None, treatment }
}

const fn ignored(name: &'static str, variable: &'static str) -> Keyword {
    Keyword { name, variable: Some(variable), treatment: Treatment::Ignored }
}

const fn only(name: &'static str, variable: &'static str, values: &'static [&'static str]) -> Keyword {
    Keyword { name, variable: Some(variable), treatment: Treatment::Only(values) }
}

/// Every parameter of libpq up to version 18.
pub(super) const KEYWORDS: &[Keyword] = &[
    used("host", "PGHOST"),
    used("hostaddr", "PGHOSTADDR"),
    used("port", "PGPORT"),
    used("dbname", "PGDATABASE"),
    used("user", "PGUSER"),
    used("password", "PGPASSWORD"),
    used("passfile", "PGPASSFILE"),
    used("service", "PGSERVICE"),
    used("servicefile", "PGSERVICEFILE"),
    used("options", "PGOPTIONS"),
    used("sslmode", "PGSSLMODE"),
    used("sslrootcert", "PGSSLROOTCERT"),
    used("sslcert", "PGSSLCERT"),
    used("sslkey", "PGSSLKEY"),
    used("sslcertmode", "PGSSLCERTMODE"),
    used("sslsni", "PGSSLSNI"),
    used("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    used("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    used("channel_binding", "PGCHANNELBINDING"),
    used("connect_timeout", "PGCONNECT_TIMEOUT"),
    used("target_session_attrs", "PGTARGETSESSIONATTRS"),
    unnamed("keepalives", Treatment::Used),
    unnamed("keepalives_idle", Treatment::Used),
    unnamed("keepalives_interval", Treatment::Used),
    unnamed("keepalives_count", Treatment::Used),
    unnamed("tcp_user_timeout", Treatment::Used),
    // Every session names itself, speaks UTF-8 and needs no Kerberos.
    ignored("application_name", "PGAPPNAME"),
    unnamed("fallback_application_name", Treatment::Ignored),
    ignored("client_encoding", "PGCLIENTENCODING"),
    ignored("krbsrvname", "PGKRBSRVNAME"),
    ignored("gsslib", "PGGSSLIB"),
    ignored("sslcompression", "PGSSLCOMPRESSION"),
    unnamed("authtype", Treatment::Ignored),
    unnamed("tty", Treatment::Ignored),
    only("gssencmode", "PGGSSENCMODE", &["disable", "prefer"]),
    only("gssdelegation", "PGGSSDELEGATION", &["0"]),
    only("sslnegotiation", "PGSSLNEGOTIATION", &["postgres"]),
    only("sslcrl", "PGSSLCRL", &[]),
    only("sslcrldir", "PGSSLCRLDIR", &[]),
    only("requirepeer", "PGREQUIREPEER", &[]),
    only("require_auth", "PGREQUIREAUTH", &[]),
    only("load_balance_hosts", "PGLOADBALANCEHOSTS", &["disable"]),
    only("min_protocol_version", "PGMINPROTOCOLVERSION", &["3.0"]),
    only("max_protocol_version", "PGMAXPROTOCOLVERSION", &["3.0", "3.2", "latest"]),
    unnamed("sslpassword", Treatment::Only(&[])),
    unnamed("sslkeylogfile", Treatment::Only(&[])),
    unnamed("replication", Treatment::Only(&["false", "off", "no", "0"])),
    unnamed("scram_client_key", Treatment::Only(&[])),
    unnamed("scram_server_key", Treatment::Only(&[])),
    unnamed("oauth_issuer", Treatment::Only(&[])),
    unnamed("oauth_client_id", Treatment::Only(&[])),
    unnamed("oauth_client_secret", Treatment::Only(&[])),
    unnamed("oauth_scope", Treatment::Only(&[])),
];

/// The parameter of that name.
pub(super) fn find(name: &str) -> Option<&'static Keyword> {
    KEYWORDS.iter().find(|keyword| keyword.name == name)
}

/// The known name that a misspelled one most likely means.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    let alias = match name {
        "database" | "db" => Some("dbname"),
        "username" => Some("user"),
        "hostname" | "server" => Some("host"),
        "pass" | "pwd" => Some("password"),
        _ => None,
    };
    alias.or_else(|| {
        let distances = KEYWORDS.iter().map(|keyword| (distance(name, keyword.name), keyword.name));
        distances.filter(|&(distance, _)| distance <= 2).min().map(|(_, name)| name)
    })
}

/// How many single-character edits lie between two names; large for names too long to be a slip.
fn distance(left: &str, right: &str) -> usize {
    if left.len() > right.len() + 2 || right.len() > left.len() + 2 {
        return usize::MAX;
    }
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (above, from) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = above + 1;
        for (position, to) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[position + 1];
            row[position + 1] = replaced.min(row[position] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_a_stranger_is_not() {
        assert_eq!(nearest("sslmod"), Some("sslmode"));
        assert_eq!(nearest("pasword"), Some("password"));
        assert_eq!(nearest("database"), Some("dbname"));
        assert_eq!(nearest("correcthorsebatterystaple"), None);
    }
}
