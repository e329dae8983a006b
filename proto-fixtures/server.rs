//! A throwaway PostgreSQL server in a directory of its own, reachable only through a socket in it.

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs until dropped; then it is stopped and its directory removed.
pub struct Server {
    programs: PathBuf,
    directory: PathBuf,
}

impl Server {
    /// Makes a cluster with `wal_level=logical` and starts it.
    pub fn start(programs: PathBuf) -> Result<Server, Box<dyn Error>> {
        Server::start_with(programs, "")
    }

    /// The same, with these options of `postgres` besides.
    pub fn start_with(programs: PathBuf, options: &str) -> Result<Server, Box<dyn Error>> {
        // Made by the user that the server runs as, who must be able to write to it.
        let directory = run(as_server_user("mktemp").args(["-d", "/tmp/walferry-fixtures.XXXXXX"]))?;
        let server = Server { programs, directory: PathBuf::from(directory.trim()) };
        let data = server.data();
        run(as_server_user(server.programs.join("initdb"))
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data))?;
        // Autovacuum's transactions would be in the stream of servers that send empty ones. The last lets a table be made in pg_catalog.
        let settings = format!(
            "-k {} -c listen_addresses= -c wal_level=logical -c fsync=off -c autovacuum=off -c allow_system_table_mods=on {options}",
            server.socket().display()
        );
        run(as_server_user(server.programs.join("pg_ctl"))
            .args(["start", "--wait", "--silent", "--options", &settings, "--log"])
            .arg(server.directory.join("log"))
            .arg("-D")
            .arg(&data))?;
        Ok(server)
    }

    /// The directory of the socket, which stands in a connection string for the host.
    pub fn socket(&self) -> &Path {
        &self.directory
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let mut stop = as_server_user(self.programs.join("pg_ctl"));
            if let Err(error) = run(stop.args(["stop", "--mode=immediate", "--silent", "-D"]).arg(self.data())) {
                // Its directory stays: removing it under a running server would only hide that it runs.
                eprintln!("cannot stop the server in {}: {error}", self.directory.display());
                return;
            }
        }
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

/// A program run by the user that may run a server: PostgreSQL refuses root, whose place `postgres` takes.
fn as_server_user(program: impl AsRef<Path>) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program.as_ref());
        command
    } else {
        Command::new(program.as_ref())
    };
    // The current directory may be closed to that user. A group of its own keeps an interruption at the terminal from
    // the children, so that the server is never left half made or half stopped.
    command.current_dir("/").process_group(0);
    command
}

fn run(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
