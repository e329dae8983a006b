//! What is asked by HTTP, byte by byte.

use std::io::{BufRead, BufReader, Read, Write};
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
    body(ask(port, &format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")), path)
}

/// The same after sending JSON, of a server that says how long its answer is and may keep the connection open.
pub fn send(method: &str, port: u16, path: &str, json: &str) -> String {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let head = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json";
    let request = format!("{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{json}", json.len());
    connection.write_all(request.as_bytes()).unwrap();
    let mut reader = BufReader::new(connection);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "{path}: {head}");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head += &line;
    }
    let mut content = vec![0; length];
    reader.read_exact(&mut content).unwrap();
    body(head + std::str::from_utf8(&content).unwrap(), path)
}

fn body(answer: String, path: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer}"));
    assert!(head.starts_with("HTTP/1.") && head[8..].starts_with(" 200"), "{path}: {answer}");
    body.to_owned()
}
