//! A connection string, URL or `key=value`, as a list of libpq's parameters.
//!
//! Follows `conninfo_parse` and `conninfo_uri_parse` of libpq ("Connection Strings" in the manual). A message never
//! shows a piece of the string: what cannot be parsed can be a piece of a password.

use super::keywords;
use crate::error::{Error, ErrorKind, Result};

/// Parameters in the order in which they were given; a later one of the same name wins.
pub(super) type Parameters = Vec<(&'static str, String)>;

const PERCENT_ENCODE: &str = "in a URL, every : / ? # @ [ ] % and space of a user, password or database name has to be \
     percent-encoded (@ is %40); the key=value form needs no such encoding";

/// Takes a connection string apart.
///
/// # Errors
/// [`ErrorKind::Usage`], with what is wrong and the character where it is.
pub(super) fn parameters(text: &str) -> Result<Parameters> {
    if text.contains('\0') {
        return Err(wrong("a connection string cannot contain a NUL character"));
    }
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => Url { text, rest, found: Vec::new() }.parse(),
        None if looks_like_another_url(text) => Err(wrong(
            "the connection string is a URL of another kind: it has to begin with postgresql:// or postgres://",
        )
        .hint("A URL such as postgres://user@host:5432/database, or pairs such as host=… port=5432 user=… dbname=…")),
        None => key_values(text),
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

/// Whether something like `mysql://` or `jdbc:postgresql://` comes before any parameter.
fn looks_like_another_url(text: &str) -> bool {
    text.find("://")
        .is_some_and(|end| text[..end].chars().all(|letter| letter.is_ascii_alphanumeric() || letter == ':'))
}

/// Where a rest of the text begins, counted in characters from 1.
fn character_at(text: &str, rest: &str) -> usize {
    text[..text.len() - rest.len()].chars().count() + 1
}

/// A parameter's own name, or an error that suggests one.
fn keyword(name: &str, position: usize) -> Result<&'static str> {
    if let Some(keyword) = keywords::find(name) {
        return Ok(keyword.name);
    }
    let mut message = format!("there is no connection parameter of the name given at character {position}");
    if let Some(nearest) = keywords::nearest(name) {
        message.push_str(&format!("; is {nearest:?} meant?"));
    }
    Err(wrong(message))
}

/// `key = value`, `key='a b\'c'`, separated by white space.
fn key_values(text: &str) -> Result<Parameters> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let begin = character_at(text, rest);
        let end = rest.find(|letter: char| letter == '=' || letter.is_ascii_whitespace()).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let Some(value) = after.trim_start().strip_prefix('=') else {
            return Err(wrong(format!("the word at character {begin} of the connection string has no \"=\" after it"))
                .hint(
                    "write key=value pairs, with values that contain spaces in single quotes, or a postgresql:// URL",
                ));
        };
        let name = keyword(name, begin)?;
        let (value, after) = value_of(text, value.trim_start())?;
        found.push((name, value));
        rest = after.trim_start();
    }
    Ok(found)
}

/// The value at the beginning of `rest`, and what comes after it.
fn value_of<'a>(text: &str, rest: &'a str) -> Result<(String, &'a str)> {
    let quoted = rest.starts_with('\'');
    let begin = character_at(text, rest);
    let mut value = String::new();
    let mut letters = rest.char_indices().skip(usize::from(quoted));
    while let Some((position, letter)) = letters.next() {
        match letter {
            // libpq takes a backslash at the very end as nothing.
            '\\' => value.extend(letters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &rest[position + 1..])),
            _ if !quoted && letter.is_ascii_whitespace() => return Ok((value, &rest[position..])),
            _ => value.push(letter),
        }
    }
    if quoted {
        return Err(wrong(format!("the quoted value that begins at character {begin} has no closing quote")));
    }
    Ok((value, ""))
}

/// `postgresql://user:password@host:port,host:port/database?key=value&key=value`.
struct Url<'a> {
    text: &'a str,
    rest: &'a str,
    found: Parameters,
}

impl<'a> Url<'a> {
    fn parse(mut self) -> Result<Parameters> {
        self.credentials()?;
        self.hosts()?;
        if let Some(rest) = self.rest.strip_prefix('/') {
            self.rest = rest;
            let database = self.take_until(&['?']);
            self.put("dbname", database)?;
        }
        if let Some(rest) = self.rest.strip_prefix('?') {
            self.rest = rest;
            self.query()?;
        }
        Ok(self.found)
    }

    /// The text up to one of `ends`, which stays.
    fn take_until(&mut self, ends: &[char]) -> &'a str {
        let (taken, rest) = self.rest.split_at(self.rest.find(ends).unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }

    fn position(&self) -> usize {
        character_at(self.text, self.rest)
    }

    /// Keeps a percent-encoded value; an empty one counts as not given.
    fn put(&mut self, name: &'static str, encoded: &str) -> Result<()> {
        let value = decode(encoded).map_err(|problem| {
            wrong(format!("the {name} that ends before character {} of the URL {problem}", self.position()))
                .hint(PERCENT_ENCODE)
        })?;
        if !value.is_empty() {
            self.found.push((name, value));
        }
        Ok(())
    }

    fn credentials(&mut self) -> Result<()> {
        let Some(at) = self.rest.find(['@', '/']).filter(|&at| self.rest[at..].starts_with('@')) else {
            return Ok(());
        };
        let user = self.take_until(&[':', '@']);
        self.put("user", user)?;
        if let Some(rest) = self.rest.strip_prefix(':') {
            self.rest = rest;
            let password = self.take_until(&['@']);
            self.put("password", password)?;
        }
        debug_assert!(at > 0 || user.is_empty());
        self.rest = &self.rest[1..];
        Ok(())
    }

    fn hosts(&mut self) -> Result<()> {
        let (mut hosts, mut ports) = (Vec::new(), Vec::new());
        loop {
            let begin = self.position();
            let host = match self.rest.strip_prefix('[') {
                Some(rest) => {
                    self.rest = rest;
                    let address = self.take_until(&[']']);
                    if address.is_empty() || !self.rest.starts_with(']') {
                        return Err(wrong(format!(
                            "the IPv6 address at character {begin} of the URL is empty or has no ]"
                        )));
                    }
                    self.rest = &self.rest[1..];
                    if !self.rest.is_empty() && !self.rest.starts_with([':', '/', '?', ',']) {
                        return Err(wrong(format!(
                            "after the IPv6 address, at character {} of the URL, only : / ? or , can follow",
                            self.position()
                        )));
                    }
                    address
                }
                None => self.take_until(&[':', '/', '?', ',']),
            };
            if host.contains('@') {
                return Err(
                    wrong(format!("the host at character {begin} of the URL contains an @")).hint(PERCENT_ENCODE)
                );
            }
            hosts.push(host);
            let mut port = "";
            if let Some(rest) = self.rest.strip_prefix(':') {
                self.rest = rest;
                let begin = self.position();
                port = self.take_until(&['/', '?', ',']);
                if !port.bytes().all(|digit| digit.is_ascii_digit()) {
                    return Err(
                        wrong(format!("the port at character {begin} of the URL is not a number")).hint(PERCENT_ENCODE)
                    );
                }
            }
            ports.push(port);
            match self.rest.strip_prefix(',') {
                Some(rest) => self.rest = rest,
                None => break,
            }
        }
        self.put("host", &hosts.join(","))?;
        if ports.iter().any(|port| !port.is_empty()) {
            self.put("port", &ports.join(","))?;
        }
        Ok(())
    }

    fn query(&mut self) -> Result<()> {
        while !self.rest.is_empty() {
            let begin = self.position();
            let pair = self.take_until(&['&']);
            self.rest = self.rest.strip_prefix('&').unwrap_or(self.rest);
            let Some((name, value)) = pair.split_once('=').filter(|(_, value)| !value.contains('=')) else {
                return Err(wrong(format!(
                    "the parameter at character {begin} of the URL has no or more than one \"=\""
                ))
                .hint(PERCENT_ENCODE));
            };
            let problem = |problem| wrong(format!("the parameter at character {begin} of the URL {problem}"));
            let (name, value) = (decode(name).map_err(problem)?, decode(value).map_err(problem)?);
            // As libpq does for those who come from JDBC.
            match (name.as_str(), value.as_str()) {
                ("ssl", "true") => self.found.push(("sslmode", "require".to_owned())),
                _ => self.found.push((keyword(&name, begin)?, value)),
            }
        }
        Ok(())
    }
}

/// `%41` is `A`; a plus sign is itself.
fn decode(encoded: &str) -> std::result::Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |position: usize| after.get(position).and_then(|digit| char::from(*digit).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err("has a % that two hexadecimal digits do not follow");
        };
        if (high, low) == (0, 0) {
            return Err("contains %00, which cannot be in a value");
        }
        // Both digits are below 16.
        bytes.push((high * 16 + low) as u8);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8 after percent-decoding")
}

/// A value as it stands in the `key=value` form, in quotes where it needs them.
pub(super) fn quote(value: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-./:,@%+*~".contains(letter);
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}
