//! A connection for a child process of PostgreSQL's own tools, with the password in neither argv nor environment.

use std::fmt;
use std::io::Write;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, Mode, fchmod, memfd_create};

use super::count::Counted;
use super::environment::password_file_escaped;
use super::keywords::KEYWORDS;
use super::spec::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};

/// The environment of a child process that connects by libpq.
///
/// Keep it alive until the child has ended: the password is in an anonymous file in memory which goes with it.
pub struct ChildEnvironment {
    variables: Vec<(&'static str, String)>,
    /// What PGPASSFILE points at.
    password_file: Option<std::fs::File>,
    /// Counts the child's connection, which is one.
    _counted: Counted,
}

impl ChildEnvironment {
    pub(super) async fn new(spec: &ConnectionSpec, application_name: &str) -> Result<ChildEnvironment> {
        let mut variables: Vec<(&'static str, String)> = Vec::new();
        for keyword in KEYWORDS {
            let value = spec.parameters.get(keyword.name);
            if let (Some(variable), Some(value)) = (keyword.variable, value)
                && !matches!(keyword.name, "passfile" | "options")
            {
                variables.push((variable, value.clone()));
            }
        }
        variables.push(("PGAPPNAME", application_name.to_owned()));
        variables.push(("PGOPTIONS", spec.options()));
        variables.push(("PGCLIENTENCODING", "UTF8".to_owned()));
        // As we connect: a Kerberos ticket that happens to be there must not make a difference.
        variables.push(("PGGSSENCMODE", "disable".to_owned()));
        if let (None, Some(limit)) = (spec.parameters.get("connect_timeout"), spec.connect_timeout) {
            variables.push(("PGCONNECT_TIMEOUT", limit.as_secs().to_string()));
        }
        let _counted = spec.connections.admit().await;
        let mut environment = ChildEnvironment { variables, password_file: None, _counted };
        environment.add_password(spec).await?;
        Ok(environment)
    }

    async fn add_password(&mut self, spec: &ConnectionSpec) -> Result<()> {
        let from_command = spec.password_from_command().await?;
        let mut lines = String::new();
        for host in &spec.hosts {
            let Some(password) = spec.password_for(host, from_command.as_deref()) else { continue };
            if password.contains(['\n', '\r']) {
                let message = "a password with a line break cannot be handed to PostgreSQL's own tools";
                return Err(Error::new(ErrorKind::Usage, message));
            }
            let name = password_file_escaped(&host.in_password_file());
            lines.push_str(&format!("{name}:{}:*:*:{}\n", host.port, password_file_escaped(&password)));
        }
        // Without any password the child must not find another file either than the one that we looked into.
        let file = memory_file(&lines).context(|| "making a password file in memory".to_owned())?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        self.variables.push(("PGPASSFILE", path));
        self.password_file = Some(file);
        Ok(())
    }

    /// Names and values to set; [`ChildEnvironment::apply`] also takes the others of libpq away.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// Gives a command this environment, and none of the parent's own variables for libpq.
    pub fn apply<'a>(&self, command: &'a mut tokio::process::Command) -> &'a mut tokio::process::Command {
        without_secrets(command);
        for variable in KEYWORDS.iter().filter_map(|keyword| keyword.variable) {
            command.env_remove(variable);
        }
        // Not parameters of a connection, but libpq and its tools read them.
        for variable in ["PGSYSCONFDIR", "PGDATESTYLE", "PGTZ", "PGGEQO", "PGREQUIRESSL", "PGLOCALEDIR"] {
            command.env_remove(variable);
        }
        command.envs(self.variables())
    }
}

/// Variables of our own environment that can hold a password.
pub(crate) const SECRET_VARIABLES: [&str; 4] =
    ["PGPASSWORD", "WALFERRY_SOURCE", "WALFERRY_TARGET", "WALFERRY_PGBOUNCER"];

/// Takes away what the parent's environment may hold of passwords: a child that needs one gets it in another way (I10).
pub(crate) fn without_secrets(command: &mut tokio::process::Command) -> &mut tokio::process::Command {
    for variable in SECRET_VARIABLES {
        command.env_remove(variable);
    }
    command
}

/// An anonymous file that only this user can open, through `/proc`.
pub(crate) fn memory_file(text: &str) -> std::io::Result<std::fs::File> {
    let descriptor = memfd_create("walferry-passwords", MemfdFlags::CLOEXEC)?;
    fchmod(&descriptor, Mode::RUSR | Mode::WUSR)?;
    let mut file = std::fs::File::from(descriptor);
    file.write_all(text.as_bytes())?;
    Ok(file)
}

impl fmt::Debug for ChildEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildEnvironment").field("variables", &self.variables).finish_non_exhaustive()
    }
}
