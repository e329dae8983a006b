//! From a specification to a session that is logged in: which host, which address, with TLS or without.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding, SslMode as ClientSslMode, SslNegotiation};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::count::Counted;
use super::settings;
use super::spec::{ConnectionSpec, Host, Wanted};
use super::stream::{Address, Negotiated, Stream};
use super::tls::{SslMode, TlsFailure};
use crate::error::{Error, ErrorKind, Result, with_causes};
use crate::record::Recorded;

/// Who logs in, and how.
pub(crate) struct Login {
    /// The role.
    pub(crate) user: String,
    /// The database.
    pub(crate) database: String,
    /// The password, where one is known.
    pub(crate) password: Option<String>,
    /// The start-up parameter `options`.
    pub(crate) options: String,
    /// The name that the session shows in `pg_stat_activity`.
    pub(crate) application_name: String,
    /// Whether SCRAM has to be bound to the TLS session.
    pub(crate) channel_binding: ChannelBindingPolicy,
    /// Counts the session for as long as it is open.
    pub(super) counted: Counted,
    /// Where the server's version is written down.
    pub(super) recorded: Option<Recorded>,
}

/// `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChannelBindingPolicy {
    Disable,
    Prefer,
    Require,
}

/// A protocol client that can take an open stream through the login.
pub(crate) trait Session: Sized + Send {
    /// How long sent data may stay unacknowledged where the operator does not say.
    const TCP_USER_TIMEOUT: Option<Duration>;
    /// Whether a PostgreSQL server answers, with settings to be pinned.
    const IS_A_SERVER: bool = true;

    /// Sends the start-up message and authenticates.
    fn log_in(stream: Stream, login: &Login) -> impl Future<Output = Result<Self>> + Send;

    /// The process that the login named as the one that answers, where the client keeps that.
    fn named_pid(&self) -> Option<i32> {
        None
    }

    /// The first row that a statement answers, as text.
    fn first_row(&mut self, sql: &str) -> impl Future<Output = Result<Vec<Option<String>>>> + Send;
}

impl Session for Client {
    // Linux counts a full receive window as unacknowledged, and COPY into a server that waits for a lock or for its
    // disk fills it: a limit would cut live connections.
    const TCP_USER_TIMEOUT: Option<Duration> = None;

    async fn log_in(stream: Stream, login: &Login) -> Result<Client> {
        client(stream, login, true).await
    }

    async fn first_row(&mut self, sql: &str) -> Result<Vec<Option<String>>> {
        first_row(self, sql).await
    }
}

/// Logs in, with the session's settings or without any.
pub(crate) async fn client(stream: Stream, login: &Login, with_settings: bool) -> Result<Client> {
    let mut config = tokio_postgres::Config::new();
    config.user(&login.user).dbname(&login.database);
    config.application_name(&login.application_name);
    if with_settings {
        config.options(&login.options);
    }
    config.channel_binding(match login.channel_binding {
        ChannelBindingPolicy::Disable => ChannelBinding::Disable,
        ChannelBindingPolicy::Prefer => ChannelBinding::Prefer,
        ChannelBindingPolicy::Require => ChannelBinding::Require,
    });
    if let Some(password) = &login.password {
        config.password(password);
    }
    let client = if stream.is_encrypted() {
        // "Direct" means that the client sends no SSLRequest of its own: the session below it is already there.
        config.ssl_mode(ClientSslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        let (client, connection) = config.connect_raw(stream, Negotiated).await.map_err(|e| refusal(e, login))?;
        note_version(login, connection.parameter("server_version"));
        tokio::spawn(drive(connection));
        client
    } else {
        config.ssl_mode(ClientSslMode::Disable);
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| refusal(e, login))?;
        note_version(login, connection.parameter("server_version"));
        tokio::spawn(drive(connection));
        client
    };
    Ok(client)
}

fn note_version(login: &Login, version: Option<&str>) {
    if let (Some(recorded), Some(version)) = (&login.recorded, version) {
        recorded.server_version(version);
    }
}

/// The first row that statements answer, as text.
pub(crate) async fn first_row(client: &Client, sql: &str) -> Result<Vec<Option<String>>> {
    let messages = client.simple_query(sql).await?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.ok_or_else(|| Error::new(ErrorKind::Other, "the server answered no row"))?;
    Ok((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
}

/// Runs a connection until its client is dropped; how it ended, every pending query learns by itself.
async fn drive(connection: impl Future<Output = Result<(), tokio_postgres::Error>>) {
    if let Err(error) = connection.await {
        tracing::debug!(error = %with_causes(&error), "a connection ended");
    }
}

fn refusal(error: tokio_postgres::Error, login: &Login) -> Error {
    if login.password.is_none() && error.as_db_error().is_none() && with_causes(&error).contains("password missing") {
        return no_password();
    }
    error.into()
}

/// The server asks for a password, and none is known.
pub(crate) fn no_password() -> Error {
    Error::new(ErrorKind::Usage, "the server asks for a password, and none was given")
        .hint("give it by a password command, PGPASSWORD, or a line in ~/.pgpass (mode 0600)")
}

/// An attempt that failed, and whether the other way (with TLS, or without it) is worth trying.
struct Failure {
    error: Error,
    try_other: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        // Entries of pg_hba.conf can ask for TLS or for none; this is what the server says when none fits.
        let try_other = error.sqlstate() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        Failure { error, try_other }
    }
}

/// Opens a session: tries the hosts in order, and logs in to the first that is what `target_session_attrs` wants.
///
/// As in libpq, a server that cannot be reached or is not ready is passed over, and one that refuses the login ends it.
///
/// A password that a command printed may have been replaced between its run and the login: a refused one is asked for again,
/// and tried again where it is another.
pub(crate) async fn open<S: Session>(spec: &ConnectionSpec, application_name: &str) -> Result<S> {
    let from_command = spec.password_from_command().await?;
    let counted = spec.connections.admit().await;
    let refused = match open_with(spec, application_name, from_command.as_deref(), &counted).await {
        Err(error) if from_command.is_some() && error.sqlstate() == Some(&SqlState::INVALID_PASSWORD) => error,
        outcome => return outcome,
    };
    let newer = spec.password_from_command().await?;
    if newer == from_command {
        return Err(refused);
    }
    open_with(spec, application_name, newer.as_deref(), &counted).await
}

async fn open_with<S: Session>(
    spec: &ConnectionSpec,
    application_name: &str,
    from_command: Option<&str>,
    counted: &Counted,
) -> Result<S> {
    let passes: &[Wanted] = match spec.wanted {
        Wanted::PreferStandby => &[Wanted::Standby, Wanted::Any],
        Wanted::Any => &[Wanted::Any],
        Wanted::Primary => &[Wanted::Primary],
        Wanted::Standby => &[Wanted::Standby],
    };
    let mut failed: Vec<Error> = Vec::new();
    for &wanted in passes {
        failed.clear();
        for host in &spec.hosts {
            let login = Login {
                user: spec.user.clone(),
                database: spec.database.clone(),
                password: spec.password_for(host, from_command),
                options: spec.options(),
                application_name: application_name.to_owned(),
                channel_binding: spec.channel_binding,
                counted: counted.clone(),
                recorded: spec.recorded.clone(),
            };
            match at_host(spec, host, &login, wanted).await {
                Ok(session) => return Ok(session),
                Err(error) => {
                    let whom = format!("connecting to {}@{}/{}", spec.user, host.describe(), spec.database);
                    let error = error.context(whom);
                    if !error.is_transient() {
                        return Err(error);
                    }
                    failed.push(error);
                }
            }
        }
    }
    match failed.pop() {
        Some(only) if failed.is_empty() => Err(only),
        Some(last) => {
            let all: Vec<String> = failed.iter().chain([&last]).map(ToString::to_string).collect();
            let error = Error::new(ErrorKind::Transient, all.join("; "));
            Err(match last.next_step() {
                Some(hint) => error.hint(hint),
                None => error,
            })
        }
        None => Err(Error::new(ErrorKind::Usage, "the connection string names no host")),
    }
}

async fn at_host<S: Session>(spec: &ConnectionSpec, host: &Host, login: &Login, wanted: Wanted) -> Result<S> {
    let mut last = None;
    for address in addresses(spec, host).await? {
        let attempt = at_address(spec, host, &address, login, wanted);
        let outcome = match spec.connect_timeout {
            None => attempt.await,
            Some(limit) => timeout(limit, attempt).await.unwrap_or_else(|_| {
                let message = format!("no answer within {} s", limit.as_secs());
                Err(Error::new(ErrorKind::Transient, message).hint(
                    "check the address, the port and the firewalls between; connect_timeout sets how long to wait",
                ))
            }),
        };
        match outcome {
            Err(error) if error.is_transient() => last = Some(error),
            outcome => return outcome,
        }
    }
    Err(last.unwrap_or_else(|| Error::new(ErrorKind::Transient, "the host's name has no address")))
}

/// Where a host can be reached; a name may have several addresses.
async fn addresses(spec: &ConnectionSpec, host: &Host) -> Result<Vec<Address>> {
    if let Some(address) = host.address {
        return Ok(vec![Address::Tcp((address, host.port).into())]);
    }
    if host.is_unix() {
        let file = format!("{}/.s.PGSQL.{}", host.name.trim_end_matches('/'), host.port);
        let path = match file.strip_prefix('@') {
            Some(name) => format!("\0{name}"),
            None => file,
        };
        return Ok(vec![Address::Unix(PathBuf::from(path))]);
    }
    let lookup = tokio::net::lookup_host((host.name.as_str(), host.port));
    let found = match spec.connect_timeout {
        None => lookup.await,
        Some(limit) => timeout(limit, lookup).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
    };
    let found = found.map_err(|error| {
        Error::new(ErrorKind::Transient, format!("the name of the host {:?} cannot be resolved: {error}", host.name))
            .hint("check the spelling of the host, and the name service of this machine (getent hosts)")
    })?;
    Ok(found.map(Address::Tcp).collect())
}

async fn at_address<S: Session>(
    spec: &ConnectionSpec,
    host: &Host,
    address: &Address,
    login: &Login,
    wanted: Wanted,
) -> Result<S> {
    let ways: &[bool] = match (address, spec.tls.mode) {
        // libpq knows no TLS on Unix sockets.
        (Address::Unix(_), _) | (_, SslMode::Disable) => &[false],
        (_, SslMode::Allow) => &[false, true],
        (_, SslMode::Prefer) => &[true, false],
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[true],
    };
    let mut first: Option<Error> = None;
    for (position, &with_tls) in ways.iter().enumerate() {
        match attempt(spec, host, address, login, with_tls).await {
            Ok(mut session) => {
                if S::IS_A_SERVER {
                    after_login(&mut session, wanted).await?;
                }
                return Ok(session);
            }
            Err(failure) if failure.try_other && position + 1 < ways.len() => first = Some(failure.error),
            // The other way was a second choice; what the first one met says more.
            Err(failure) if failure.try_other => return Err(first.unwrap_or(failure.error)),
            Err(failure) => return Err(failure.error),
        }
    }
    Err(first.unwrap_or_else(|| Error::new(ErrorKind::Other, "no way to connect was tried")))
}

async fn attempt<S: Session>(
    spec: &ConnectionSpec,
    host: &Host,
    address: &Address,
    login: &Login,
    with_tls: bool,
) -> Result<S, Failure> {
    let mut keepalive = spec.keepalive;
    keepalive.user_timeout = keepalive.user_timeout.or(S::TCP_USER_TIMEOUT);
    let mut stream = Stream::open(address, &keepalive).await.map_err(|error| unreachable(host, address, &error))?;
    if with_tls {
        stream = spec.tls.negotiate(stream, &host.name).await.map_err(|failure| match failure {
            TlsFailure::Broken(error) => Failure { error, try_other: false },
            TlsFailure::Refused(error) => Failure { error, try_other: true },
        })?;
    }
    stream.count(login.counted.clone());
    if S::IS_A_SERVER
        && let Some(recorded) = &spec.recorded
    {
        stream.record(recorded.clone());
    }
    S::log_in(stream, login).await.map_err(|error| Failure::from(explain(error)))
}

fn unreachable(host: &Host, address: &Address, error: &io::Error) -> Error {
    let (place, hint) = match address {
        Address::Tcp(address) => (
            address.to_string(),
            "check that the server runs, its listen_addresses, and the firewalls between".to_owned(),
        ),
        Address::Unix(_) => (
            format!("the socket {}/.s.PGSQL.{}", host.name.trim_end_matches('/'), host.port),
            "check that the server runs, its unix_socket_directories, and that this user may enter the directory"
                .to_owned(),
        ),
    };
    // A file that may not be entered stays so; a server that is not there may come back.
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied => ErrorKind::Other,
        _ => ErrorKind::Transient,
    };
    Error::new(kind, format!("cannot reach {place}: {error}")).hint(hint)
}

/// Says what to do about refusals that have a known cause.
fn explain(error: Error) -> Error {
    let text = error.to_string();
    if text.contains("unsupported startup parameter") {
        return pooler().context(text);
    }
    // With TLS 1.3 the server judges our certificate after the handshake is over for us.
    if error.sqlstate().is_none() && text.contains("received fatal alert") {
        return error.with_kind(ErrorKind::Other).hint(
            "the server refuses our TLS session: compare sslcert with the authorities in the server's ssl_ca_file",
        );
    }
    match error.sqlstate() {
        // A database that takes no connections, as behind a cutover's fence; at a login nothing else says so.
        Some(state) if *state == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => error
            .with_kind(ErrorKind::Transient)
            .hint("ALTER DATABASE … ALLOW_CONNECTIONS true, in another database, lets it take connections again"),
        Some(state) if *state == SqlState::INVALID_PASSWORD => error
            .hint("check the user and the password; a line in ~/.pgpass has the form host:port:database:user:password"),
        Some(state) if *state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => error
            .hint("check that the role exists and may log in, and that a line of the server's pg_hba.conf lets it in"),
        Some(state) if *state == SqlState::INVALID_CATALOG_NAME => error.hint("check the name of the database"),
        _ => error,
    }
}

fn pooler() -> Error {
    Error::new(ErrorKind::Blocked, "a connection pooler is in the way; connect to the server itself")
        .hint("give the address and the port of the PostgreSQL server, not those of PgBouncer or another pooler")
}

/// Completes the settings, and checks that the session is one that we want.
async fn after_login<S: Session>(session: &mut S, wanted: Wanted) -> Result<()> {
    let row = session.first_row(settings::AFTER_LOGIN).await.map_err(|error| error.context("preparing the session"))?;
    let column = |position: usize| row.get(position).and_then(Option::as_deref);
    if !settings::have_arrived(column(1), column(2)) {
        return Err(pooler().context("the server did not take the session's settings"));
    }
    // A pooler names numbers of its own, also one that keeps a server session for as long as ours.
    if let (Some(named), Some(answers)) = (session.named_pid(), column(4))
        && named.to_string() != answers
    {
        return Err(pooler().context("another process of the server answers than the one that the login named"));
    }
    let is_standby = column(0) == Some("t");
    let unwanted = match wanted {
        Wanted::Primary if is_standby => "the server is a standby, and target_session_attrs asks for a primary",
        Wanted::Standby if !is_standby => "the server is a primary, and target_session_attrs asks for a standby",
        _ => return Ok(()),
    };
    // It may be promoted, or another host may be what is asked for.
    Err(Error::new(ErrorKind::Transient, unwanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A session that answers what a pooler lets through.
    struct Answering(&'static [&'static str], Option<i32>);

    impl Session for Answering {
        const TCP_USER_TIMEOUT: Option<Duration> = None;

        async fn log_in(_: Stream, _: &Login) -> Result<Answering> {
            Err(Error::new(ErrorKind::Other, "is never logged in"))
        }

        fn named_pid(&self) -> Option<i32> {
            self.1
        }

        async fn first_row(&mut self, _: &str) -> Result<Vec<Option<String>>> {
            Ok(self.0.iter().map(|&value| Some(value.to_owned())).collect())
        }
    }

    #[tokio::test]
    async fn h36_a_pooler_that_drops_the_settings_in_silence_is_named() {
        after_login(&mut Answering(&["f", "postgres", "3", "1"], None), Wanted::Any).await.unwrap();
        let error = after_login(&mut Answering(&["f", "postgres", "1", "1"], None), Wanted::Any).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Blocked);
        assert!(error.to_string().contains("pooler"), "{error}");
    }

    #[tokio::test]
    async fn h36_a_pooler_that_names_a_process_of_its_own_is_named() {
        const ANSWER: [&str; 5] = ["f", "postgres", "3", "1", "4711"];
        after_login(&mut Answering(&ANSWER, Some(4711)), Wanted::Any).await.unwrap();
        let error = after_login(&mut Answering(&ANSWER, Some(4712)), Wanted::Any).await.unwrap_err();
        assert!(error.to_string().contains("pooler"), "{error}");
    }

    #[tokio::test]
    async fn a_session_is_taken_only_where_it_is_what_is_wanted() {
        const PRIMARY: [&str; 4] = ["f", "postgres", "3", "0"];
        const STANDBY: [&str; 4] = ["t", "postgres", "3", "0"];
        for (wanted, on_primary, on_standby) in
            [(Wanted::Any, true, true), (Wanted::Primary, true, false), (Wanted::Standby, false, true)]
        {
            assert_eq!(after_login(&mut Answering(&PRIMARY, None), wanted).await.is_ok(), on_primary, "{wanted:?}");
            assert_eq!(after_login(&mut Answering(&STANDBY, None), wanted).await.is_ok(), on_standby, "{wanted:?}");
        }
    }
}
