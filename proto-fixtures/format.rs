//! The form of a fixture: every message as the bytes that the server sent and as what they mean. Shared by the
//! program that captures them and the test that reads them.

use std::fmt::Write;

use walferry::decode::{Datum, Message, OldTuple, Tuple};

/// One captured message as it stands in a fixture.
#[derive(Debug, PartialEq, Eq)]
pub struct Captured {
    /// What the server sent.
    pub bytes: Vec<u8>,
    /// What [`describe`] said about it.
    pub description: String,
}

/// The text of one message in a fixture: its bytes, 32 to a line, and its description.
pub fn write(captured: &Captured) -> String {
    let mut text = String::new();
    for line in captured.bytes.chunks(32) {
        text.push_str("hex");
        for byte in line {
            let _ = write!(text, " {byte:02x}");
        }
        text.push('\n');
    }
    text + &captured.description
}

/// The messages of a fixture, in order. Lines that begin with `#` are comments.
pub fn read(fixture: &str) -> Result<Vec<Captured>, String> {
    let mut messages = Vec::new();
    for paragraph in fixture.split("\n\n") {
        let mut captured = Captured { bytes: Vec::new(), description: String::new() };
        for line in paragraph.lines().filter(|line| !line.starts_with('#')) {
            match line.strip_prefix("hex ") {
                Some(hex) => {
                    for byte in hex.split(' ') {
                        let byte = u8::from_str_radix(byte, 16).map_err(|error| format!("{error} in {line:?}"))?;
                        captured.bytes.push(byte);
                    }
                }
                None => {
                    captured.description.push_str(line);
                    captured.description.push('\n');
                }
            }
        }
        if !captured.bytes.is_empty() {
            messages.push(captured);
        }
    }
    Ok(messages)
}

/// What a message says, one field to a line.
pub fn describe(message: &Message<'_>) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    match message {
        Message::Begin { commit_lsn, commit_time, xid } => {
            line("Begin".into());
            line(format!("  commit_lsn   {commit_lsn}"));
            line(format!("  commit_time  {commit_time} µs"));
            line(format!("  xid          {xid}"));
        }
        Message::Commit { commit_lsn, end_lsn, commit_time } => {
            line("Commit".into());
            line(format!("  commit_lsn   {commit_lsn}"));
            line(format!("  end_lsn      {end_lsn}"));
            line(format!("  commit_time  {commit_time} µs"));
        }
        Message::Origin { commit_lsn, name } => {
            line("Origin".into());
            line(format!("  commit_lsn   {commit_lsn}"));
            line(format!("  name         {name:?}"));
        }
        Message::Relation(relation) => {
            line("Relation".into());
            line(format!("  relid        {}", relation.relid));
            line(format!("  schema       {:?}", relation.schema));
            line(format!("  name         {:?}", relation.name));
            line(format!("  identity     {:?}", relation.identity));
            for column in relation.columns() {
                let key = if column.is_key { "key" } else { "   " };
                let (name, type_oid, modifier) = (column.name, column.type_oid, column.type_modifier);
                line(format!("  column {key}   {name:?} type {type_oid} modifier {modifier}"));
            }
        }
        Message::Type { oid, schema, name } => {
            line("Type".into());
            line(format!("  oid          {oid}"));
            line(format!("  schema       {schema:?}"));
            line(format!("  name         {name:?}"));
        }
        Message::Insert { relid, new } => {
            line("Insert".into());
            line(format!("  relid        {relid}"));
            line("  new".into());
            rows(new).into_iter().for_each(&mut line);
        }
        Message::Update { relid, old, new } => {
            line("Update".into());
            line(format!("  relid        {relid}"));
            old.iter().flat_map(old_rows).for_each(&mut line);
            line("  new".into());
            rows(new).into_iter().for_each(&mut line);
        }
        Message::Delete { relid, old } => {
            line("Delete".into());
            line(format!("  relid        {relid}"));
            old_rows(old).into_iter().for_each(&mut line);
        }
        Message::Truncate { relids, cascade, restart_identity } => {
            line("Truncate".into());
            line(format!("  cascade      {cascade}"));
            line(format!("  restart      {restart_identity}"));
            relids.clone().for_each(|relid| line(format!("  relid        {relid}")));
        }
        Message::Logical { transactional, lsn, prefix, content } => {
            line("Logical".into());
            line(format!("  transactional {transactional}"));
            line(format!("  lsn          {lsn}"));
            line(format!("  prefix       {prefix:?}"));
            line(format!("  content      {}", hex(content)));
        }
    }
    text
}

fn old_rows(old: &OldTuple<'_>) -> Vec<String> {
    let kind = match old {
        OldTuple::Key(_) => "  old key",
        OldTuple::Full(_) => "  old row",
    };
    let mut lines = vec![kind.to_owned()];
    lines.extend(rows(&old.tuple()));
    lines
}

fn rows(tuple: &Tuple<'_>) -> Vec<String> {
    let row = |datum| match datum {
        Datum::Null => "    null".to_owned(),
        Datum::Unchanged => "    unchanged".to_owned(),
        Datum::Text(value) => {
            let text = String::from_utf8_lossy(value);
            match text.char_indices().nth(60) {
                Some((end, _)) => format!("    text         {:?} … ({} bytes)", &text[..end], value.len()),
                None => format!("    text         {text:?}"),
            }
        }
        Datum::Binary(value) if value.len() > 60 => {
            format!("    binary       {} … ({} bytes)", hex(&value[..20]), value.len())
        }
        Datum::Binary(value) => format!("    binary       {}", hex(value)),
    };
    tuple.columns().map(row).collect()
}

fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    if digits.is_empty() { "(no bytes)".to_owned() } else { digits.join(" ") }
}
