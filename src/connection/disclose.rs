//! A connection in words, for a command of the operator's: the one place where a password leaves as text.

use super::ConnectionSpec;

/// How to reach a server, with the password. Never logged, never in an environment (I10).
pub(crate) struct Disclosed {
    /// Host names or addresses, separated by commas.
    pub(crate) host: String,
    /// Their ports.
    pub(crate) port: String,
    /// The database.
    pub(crate) database: String,
    /// The role.
    pub(crate) user: String,
    /// That of the first host, where one is known.
    pub(crate) password: Option<String>,
    /// All of it as a `postgresql://` URL.
    pub(crate) url: String,
}

impl ConnectionSpec {
    /// The connection in words. A password that cannot be had, because its command fails, is left out.
    pub(crate) async fn disclosed(&self) -> Disclosed {
        let from_command = match self.password_from_command().await {
            Ok(password) => password,
            Err(error) => {
                tracing::warn!(%error, "a command of the cutover gets no password");
                None
            }
        };
        let password = self.hosts.first().and_then(|host| self.password_for(host, from_command.as_deref()));
        let names: Vec<String> = self.hosts.iter().map(|host| host.reached_by()).collect();
        let ports: Vec<String> = self.hosts.iter().map(|host| host.port.to_string()).collect();
        let places: Vec<String> = names
            .iter()
            .zip(&ports)
            .map(|(name, port)| match name.contains(':') {
                true => format!("[{name}]:{port}"),
                false => format!("{}:{port}", escaped(name)),
            })
            .collect();
        let secret = password.as_ref().map(|password| format!(":{}", escaped(password))).unwrap_or_default();
        let mut url =
            format!("postgresql://{}{secret}@{}/{}", escaped(&self.user), places.join(","), escaped(&self.database));
        let said = ["host", "port", "user", "dbname", "hostaddr", "passfile"];
        let others = self.parameters.iter().filter(|(name, _)| !said.contains(name));
        for (number, (name, value)) in others.enumerate() {
            url.push_str(&format!("{}{name}={}", if number == 0 { '?' } else { '&' }, escaped(value)));
        }
        Disclosed {
            host: names.join(","),
            port: ports.join(","),
            database: self.database.clone(),
            user: self.user.clone(),
            password,
            url,
        }
    }
}

/// Percent-encoded, but for what RFC 3986 calls unreserved.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disclosed_url_reads_back_as_the_same_connection() {
        for text in [
            "postgres://me:p%40ss%2Fw%25@server:6543/shop?sslmode=require",
            "host=a,b port=1,2 user='o\\'neil' dbname='my shop' password='it\\'s'",
            "host=/var/run/postgresql user=me dbname=a/b",
            "hostaddr=::1 user=me dbname=d",
        ] {
            let spec = ConnectionSpec::parse(text).unwrap();
            let disclosed = spec.disclosed().await;
            let again = ConnectionSpec::parse(&disclosed.url).unwrap();
            let same = |spec: &ConnectionSpec| {
                let ports: Vec<u16> = spec.hosts.iter().map(|host| host.port).collect();
                let hosts: Vec<String> = spec.hosts.iter().map(|host| host.reached_by()).collect();
                (hosts, ports, spec.user().to_owned(), spec.database().to_owned())
            };
            assert_eq!(same(&again), same(&spec), "{text}");
            assert_eq!(again.disclosed().await.password, disclosed.password, "{text}");
        }
    }
}
