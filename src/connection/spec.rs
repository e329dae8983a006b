//! What a connection string means, checked, with every default filled in.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::Client;

use super::child::ChildEnvironment;
use super::count::ConnectionCount;
use super::environment::{self, Environment};
use super::keywords::{KEYWORDS, Treatment};
use super::login::{self, ChannelBindingPolicy};
use super::stream::Keepalive;
use super::tls::TlsSettings;
use super::{parse, password_command, settings};
use crate::error::{Error, ErrorKind, Result};
use crate::record::Recorded;

const DEFAULT_PORT: u16 = 5432;

/// libpq waits for ever; a server that does not answer should not look like one that is slow.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where packages put the socket: Debian's first, then PostgreSQL's own default.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// How to reach one database of one server (or of several that stand in for each other), and as whom.
///
/// `Debug` and `Display` never show a password.
#[derive(Clone)]
pub struct ConnectionSpec {
    /// libpq's parameters as given or found, without those that hold a secret; what is not there has its default.
    pub(super) parameters: BTreeMap<&'static str, String>,
    pub(super) hosts: Vec<Host>,
    pub(super) database: String,
    pub(super) user: String,
    password: Option<String>,
    password_is_inline: bool,
    password_command: Option<String>,
    password_file: Option<PathBuf>,
    pub(super) tls: TlsSettings,
    pub(super) channel_binding: ChannelBindingPolicy,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) keepalive: Keepalive,
    pub(super) wanted: Wanted,
    /// What is open by this and its clones.
    pub(super) connections: ConnectionCount,
    /// Where what changes the server is written down.
    pub(super) recorded: Option<Recorded>,
}

/// One of the servers to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// A name, an address, or a directory with a socket; empty where only `address` is given.
    pub(super) name: String,
    /// `hostaddr`: used in place of resolving the name.
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
}

impl Host {
    /// Whether it is a Unix socket: a directory, or an abstract name.
    pub(super) fn is_unix(&self) -> bool {
        self.address.is_none() && self.name.starts_with(['/', '@'])
    }

    /// `host:port` for humans.
    pub(super) fn describe(&self) -> String {
        let name = match (&self.address, self.name.as_str()) {
            (Some(address), "") => address.to_string(),
            (_, name) => name.to_owned(),
        };
        if name.contains(':') { format!("[{name}]:{}", self.port) } else { format!("{name}:{}", self.port) }
    }

    /// By what a client reaches it: the address where one was given.
    pub(super) fn reached_by(&self) -> String {
        match &self.address {
            Some(address) => address.to_string(),
            None => self.name.clone(),
        }
    }

    /// What a password file calls it.
    pub(super) fn in_password_file(&self) -> String {
        match (&self.address, self.name.as_str()) {
            (Some(address), "") => address.to_string(),
            (None, name) if SOCKET_DIRECTORIES.contains(&name) => "localhost".to_owned(),
            (_, name) => name.to_owned(),
        }
    }
}

/// `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Any,
    /// `primary` and `read-write`: walferry pins `default_transaction_read_only` to off, so they are one.
    Primary,
    /// `standby` and `read-only`.
    Standby,
    PreferStandby,
}

impl ConnectionSpec {
    /// Reads a connection string as libpq does: a `postgres://` or `postgresql://` URL, or `key=value` pairs; what it
    /// does not say comes from the service file, the PG* variables of the environment, and libpq's defaults.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] with what is wrong and where, without a piece of the string.
    pub fn parse(text: &str) -> Result<ConnectionSpec> {
        Self::parse_in(text, &Environment::of_process()?)
    }

    /// Takes the password from a shell command, run at every connect: what it prints, without the newline at its end.
    ///
    /// A command that fails, or does not end within a minute, is [`ErrorKind::Transient`]: what it asks may be away. One that
    /// cannot be run or prints no password is [`ErrorKind::Usage`].
    #[must_use]
    pub fn with_password_command(mut self, command: String) -> ConnectionSpec {
        self.password_command = Some(command);
        self
    }

    /// Allows at most so many connections at once by this and its clones, from now on.
    #[must_use]
    pub fn with_connections_max(mut self, max: Option<usize>) -> ConnectionSpec {
        self.connections = ConnectionCount::new(max);
        self
    }

    /// Has every statement that changes the server written down before it is sent, from now on.
    #[must_use]
    pub fn recorded(mut self, recorded: Recorded) -> ConnectionSpec {
        self.recorded = Some(recorded);
        self
    }

    /// Where what changes the server is written down, if anywhere.
    pub fn record(&self) -> Option<&Recorded> {
        self.recorded.as_ref()
    }

    /// How many connections are open by this and its clones.
    pub fn connections(&self) -> &ConnectionCount {
        &self.connections
    }

    /// Whether the password stood in the connection string itself, where the process list shows it.
    pub fn has_inline_password(&self) -> bool {
        self.password_is_inline
    }

    /// The database's name.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The same server, another database.
    #[must_use]
    pub fn with_database(&self, database: &str) -> ConnectionSpec {
        let mut spec = self.clone();
        spec.database = database.to_owned();
        spec.parameters.insert("dbname", database.to_owned());
        spec
    }

    /// The role that logs in.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// `user@host:port/database` for humans; several hosts are joined by commas.
    pub fn describe(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(Host::describe).collect();
        format!("{}@{}/{}", self.user, hosts.join(","), self.database)
    }

    /// The same connection as `key=value` pairs that [`ConnectionSpec::parse`] reads back, without any password.
    pub fn without_password(&self) -> String {
        let pairs: Vec<String> =
            self.parameters.iter().map(|(name, value)| format!("{name}={}", parse::quote(value))).collect();
        pairs.join(" ")
    }

    /// Logs in, with the pinned settings; the driver's task runs until the client is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Transient`] where the server cannot be reached or is not ready, [`ErrorKind::Blocked`] where a
    /// connection pooler is in the way, and otherwise what the server says: a wrong password is final.
    pub async fn connect(&self, application_name: &str) -> Result<Client> {
        login::open(self, application_name).await
    }

    /// What a child process such as `pg_dump` needs to make the same connection.
    ///
    /// # Errors
    /// What [`ConnectionSpec::with_password_command`] says of the command, [`ErrorKind::Other`] when the memory file cannot be made.
    pub async fn child_environment(&self, application_name: &str) -> Result<ChildEnvironment> {
        ChildEnvironment::new(self, application_name).await
    }

    /// The password for one of the hosts, from the command, the parameters or the password file, in that order.
    pub(super) fn password_for(&self, host: &Host, from_command: Option<&str>) -> Option<String> {
        if let Some(password) = from_command.or(self.password.as_deref()) {
            return Some(password.to_owned());
        }
        let path = self.password_file.as_deref()?;
        let (name, port) = (host.in_password_file(), host.port.to_string());
        environment::password_from_file(path, [&name, &port, &self.database, &self.user])
    }

    /// Runs the password command, if there is one; what can go wrong says [`password_command::run`].
    pub(super) async fn password_from_command(&self) -> Result<Option<String>> {
        let Some(command) = &self.password_command else { return Ok(None) };
        let password = password_command::run(command, password_command::TIMEOUT).await;
        password.map(Some).map_err(|error| error.context(format!("the password command for {}", self.describe())))
    }

    /// The start-up parameter `options`.
    pub(super) fn options(&self) -> String {
        settings::options(self.parameters.get("options").map(String::as_str))
    }

    /// [`ConnectionSpec::parse`] in given surroundings.
    pub(super) fn parse_in(text: &str, surroundings: &Environment) -> Result<ConnectionSpec> {
        let mut given: HashMap<&'static str, String> = parse::parameters(text)?.into_iter().collect();
        let password_is_inline = given.get("password").is_some_and(|password| !password.is_empty());
        surroundings.fill(&mut given)?;
        // To libpq an empty value is one that was not given.
        given.retain(|_, value| !value.is_empty());
        for keyword in KEYWORDS {
            let value = given.get(keyword.name).map(String::as_str);
            if let (Some(value), Treatment::Only(allowed)) = (value, keyword.treatment)
                && !allowed.contains(&value)
            {
                let allowed = match allowed {
                    [] => "leave it out".to_owned(),
                    allowed => format!("only {} can be given", allowed.join(", ")),
                };
                return Err(usage(format!("the connection parameter {} is not supported", keyword.name)).hint(allowed));
            }
        }
        let password = given.remove("password");
        let mut parameters: BTreeMap<&'static str, String> = KEYWORDS
            .iter()
            .filter(|keyword| keyword.treatment == Treatment::Used && !keyword.name.starts_with("service"))
            .filter_map(|keyword| Some((keyword.name, given.remove(keyword.name)?)))
            .collect();

        let user = match parameters.get("user") {
            Some(user) => user.clone(),
            None => surroundings.user.clone().ok_or_else(|| usage("the connection string names no user"))?,
        };
        let database = parameters.get("dbname").unwrap_or(&user).clone();
        let hosts = hosts(&parameters)?;
        let password_file = parameters.get("passfile").map(PathBuf::from).or_else(|| surroundings.in_home(".pgpass"));
        let spec = ConnectionSpec {
            tls: TlsSettings::from_parameters(&parameters, surroundings)?,
            channel_binding: channel_binding(&parameters)?,
            connect_timeout: connect_timeout(&parameters)?,
            keepalive: keepalive(&parameters)?,
            wanted: wanted(&parameters)?,
            connections: ConnectionCount::new(None),
            recorded: None,
            password,
            password_is_inline,
            password_command: None,
            password_file,
            parameters: BTreeMap::new(),
            database,
            user,
            hosts,
        };
        // What was a default here has to be the same when it is read back elsewhere.
        parameters.insert("user", spec.user.clone());
        parameters.insert("dbname", spec.database.clone());
        if spec.hosts.iter().any(|host| !host.name.is_empty()) {
            let names: Vec<&str> = spec.hosts.iter().map(|host| host.name.as_str()).collect();
            parameters.insert("host", names.join(","));
        }
        let ports: Vec<String> = spec.hosts.iter().map(|host| host.port.to_string()).collect();
        parameters.insert("port", ports.join(","));
        Ok(ConnectionSpec { parameters, ..spec })
    }
}

impl fmt::Debug for ConnectionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectionSpec({})", self.without_password())
    }
}

impl fmt::Display for ConnectionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

/// An error that names a parameter and never its value: half a password may stand where a port should.
pub(super) fn bad_value(name: &str, expected: &str) -> Error {
    usage(format!("the connection parameter {name} has a value that it cannot have: expected {expected}"))
}

fn hosts(parameters: &BTreeMap<&'static str, String>) -> Result<Vec<Host>> {
    let list = |name: &str| -> Vec<&str> {
        parameters.get(name).map(|value| value.split(',').map(str::trim).collect()).unwrap_or_default()
    };
    let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = names.len().max(addresses.len()).max(1);
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err(usage(format!("{} hosts and {} values in hostaddr do not match", names.len(), addresses.len())));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(usage(format!("{} ports and {count} hosts do not match", ports.len())));
    }
    let host = |position: usize| {
        let port = match ports.get(position).or(ports.first()) {
            None | Some(&"") => DEFAULT_PORT,
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(bad_value("port", "a number between 1 and 65535")),
            },
        };
        let address = match addresses.get(position) {
            None | Some(&"") => None,
            Some(address) => {
                Some(address.parse().map_err(|_| bad_value("hostaddr", "an IP address, or a list of them"))?)
            }
        };
        let name = match names.get(position) {
            Some(name) if !name.is_empty() => (*name).to_owned(),
            _ if address.is_some() => String::new(),
            _ => socket_directory(port),
        };
        Ok(Host { name, address, port })
    };
    (0..count).map(host).collect()
}

/// The directory where the server's socket is, when no host is given.
fn socket_directory(port: u16) -> String {
    let with_socket = |directory: &&str| Path::new(directory).join(format!(".s.PGSQL.{port}")).exists();
    let found = SOCKET_DIRECTORIES.iter().copied().find(with_socket);
    found
        .or_else(|| SOCKET_DIRECTORIES.iter().copied().find(|&path| Path::new(path).is_dir()))
        .unwrap_or("/tmp")
        .to_owned()
}

fn channel_binding(parameters: &BTreeMap<&'static str, String>) -> Result<ChannelBindingPolicy> {
    match parameters.get("channel_binding").map(String::as_str) {
        None | Some("prefer") => Ok(ChannelBindingPolicy::Prefer),
        Some("disable") => Ok(ChannelBindingPolicy::Disable),
        Some("require") => Ok(ChannelBindingPolicy::Require),
        Some(_) => Err(bad_value("channel_binding", "disable, prefer or require")),
    }
}

fn wanted(parameters: &BTreeMap<&'static str, String>) -> Result<Wanted> {
    match parameters.get("target_session_attrs").map(String::as_str) {
        None | Some("any") => Ok(Wanted::Any),
        Some("primary" | "read-write") => Ok(Wanted::Primary),
        Some("standby" | "read-only") => Ok(Wanted::Standby),
        Some("prefer-standby") => Ok(Wanted::PreferStandby),
        Some(_) => {
            Err(bad_value("target_session_attrs", "any, read-write, read-only, primary, standby or prefer-standby"))
        }
    }
}

/// A whole number, possibly negative.
fn number(parameters: &BTreeMap<&'static str, String>, name: &'static str) -> Result<Option<i64>> {
    let Some(value) = parameters.get(name) else { return Ok(None) };
    let number = value.trim().parse::<i32>().map_err(|_| bad_value(name, "a whole number"))?;
    Ok(Some(i64::from(number)))
}

/// As in libpq: zero or less waits for ever, and one second becomes two.
fn connect_timeout(parameters: &BTreeMap<&'static str, String>) -> Result<Option<Duration>> {
    Ok(match number(parameters, "connect_timeout")? {
        None => Some(DEFAULT_CONNECT_TIMEOUT),
        Some(seconds) if seconds <= 0 => None,
        Some(seconds) => Some(Duration::from_secs(seconds.max(2).unsigned_abs())),
    })
}

fn keepalive(parameters: &BTreeMap<&'static str, String>) -> Result<Keepalive> {
    // The kernel takes at most these (tcp(7)).
    const SECONDS_MAX: i64 = 32_767;
    const PROBES_MAX: i64 = 127;
    let mut keepalive = Keepalive::default();
    if let Some(enabled) = number(parameters, "keepalives")? {
        keepalive.enabled = enabled != 0;
    }
    let seconds = |name| {
        let positive = number(parameters, name)?.filter(|&seconds| seconds > 0);
        Ok::<_, Error>(positive.map(|seconds| Duration::from_secs(seconds.min(SECONDS_MAX).unsigned_abs())))
    };
    keepalive.idle = seconds("keepalives_idle")?.unwrap_or(keepalive.idle);
    keepalive.interval = seconds("keepalives_interval")?.unwrap_or(keepalive.interval);
    if let Some(count) = number(parameters, "keepalives_count")?.filter(|&count| count > 0) {
        keepalive.count = u32::try_from(count.min(PROBES_MAX)).unwrap_or(keepalive.count);
    }
    if let Some(milliseconds) = number(parameters, "tcp_user_timeout")? {
        keepalive.user_timeout = Some(Duration::from_millis(milliseconds.max(0).unsigned_abs()));
    }
    Ok(keepalive)
}
