//! What is asked by HTTP, byte by byte.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::process::Running;

/// Where it says that metrics are.
pub fn port(running: &Running) -> u16 {
    let log = running.log();
    let (_, rest) = log.split_once("http://127.0.0.1:").unwrap_or_else(|| panic!("no address of HTTP in:\n{log}"));
    rest.split('/').next().unwrap().parse().unwrap()
}

/// The whole answer to a request.
pub fn ask(port: u16, request: &str) -> String {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

/// The body of what a path answers with; panics unless it answers with 200.
pub fn get(port: u16, path: &str) -> String {
    let answer = ask(port, &format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer}"));
    assert!(head.starts_with("HTTP/1.") && head[8..].starts_with(" 200"), "{path}: {answer}");
    body.to_owned()
}
