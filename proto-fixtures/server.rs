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
    pub fn start() -> Result<Server, Box<dyn Error>> {
        let programs =
            find_programs().ok_or("initdb and pg_ctl are neither in PATH nor in /usr/lib/postgresql/*/bin")?;
        // Made by the user that the server runs as, who must be able to write to it.
        let directory = run(as_server_user("mktemp").args(["-d", "/tmp/walferry-fixtures.XXXXXX"]))?;
        let server = Server { programs, directory: PathBuf::from(directory.trim()) };
        let data = server.data();
        run(as_server_user(server.programs.join("initdb"))
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data))?;
        let settings =
            format!("-k {} -c listen_addresses= -c wal_level=logical -c fsync=off", server.socket().display());
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

/// The directory of the server's programs: that in PATH, else the newest of Debian's.
fn find_programs() -> Option<PathBuf> {
    let complete = |directory: &PathBuf| ["initdb", "pg_ctl"].iter().all(|program| directory.join(program).is_file());
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).find(complete).or_else(|| {
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
        let numbered = versions.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry)));
        let directories = numbered.map(|(version, entry)| (version, entry.path().join("bin")));
        directories.filter(|(_, directory)| complete(directory)).max().map(|(_, directory)| directory)
    })
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
