//! A settings file as it was written: keys, values and the lines where they stand. What they mean is not known here.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::usage;
use crate::error::{Error, Result};

/// A settings file is a page or two; more is another file that was taken for one.
const BYTES_MAX: u64 = 1 << 20;

/// A file.
#[derive(Debug)]
pub(super) struct File {
    pub path: PathBuf,
    /// Whether others than its owner can read it.
    pub readable_by_others: bool,
    /// In the order of the file.
    pub entries: Vec<Entry>,
    /// Tables and the lines where they begin.
    pub tables: Vec<(String, usize)>,
}

/// A key with its value.
#[derive(Debug)]
pub(super) struct Entry {
    /// The table it stands in; `None` at the top.
    pub table: Option<String>,
    /// As it is written.
    pub key: String,
    pub value: Value,
    /// From 1.
    pub line: usize,
    path: PathBuf,
}

/// A value, as far as options know values.
#[derive(Debug)]
pub(super) enum Value {
    /// A string, a number or a time, as it is written.
    Text(String),
    Flag(bool),
    List(Vec<Value>),
    Table,
}

impl Value {
    /// For a message.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "a text or a number",
            Value::Flag(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table => "a table",
        }
    }
}

impl Entry {
    /// The error of a value that cannot be.
    pub fn wrong(&self, why: &str) -> Error {
        usage(format!("{}, line {}: {}: {why}", self.path.display(), self.line, self.name())).hint(format!(
            "Mend the file; `walferry config check {}` says all that is wrong with it.",
            self.path.display()
        ))
    }

    /// For a message: with the table.
    pub fn name(&self) -> String {
        self.table.as_ref().map_or_else(|| self.key.clone(), |table| format!("[{table}] {}", self.key))
    }
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    /// `Usage` when it cannot be read or is no TOML, with the line.
    pub fn read(path: &Path) -> Result<File> {
        let shown = path.display();
        let reading = |error: std::io::Error| {
            usage(format!("reading the settings file {shown}: {error}"))
                .hint("--config or WALFERRY_CONFIG names it; `walferry config example` prints one to begin with.")
        };
        let metadata = std::fs::metadata(path).map_err(reading)?;
        if metadata.len() > BYTES_MAX {
            return Err(usage(format!("{shown} is no settings file: it has {} bytes", metadata.len())));
        }
        let text = std::fs::read_to_string(path).map_err(reading)?;
        let mut file = File::of(path, &text)?;
        file.readable_by_others = metadata.mode() & 0o077 != 0;
        Ok(file)
    }

    /// A file with this text.
    pub fn of(path: &Path, text: &str) -> Result<File> {
        let line = |span: Range<usize>| {
            text.as_bytes()[..span.start.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
        };
        let parsed = DeTable::parse(text).map_err(|error| {
            let line = error.span().map_or(1, line);
            usage(format!("{}, line {line}: this is no TOML: {}", path.display(), error.message()))
                .hint("Texts stand in quotes, lists in brackets: include-table = [\"public.orders\"]. `walferry config example` prints all keys.")
        })?;
        let mut file =
            File { path: path.to_owned(), readable_by_others: false, entries: Vec::new(), tables: Vec::new() };
        for (key, value) in parsed.get_ref() {
            let (name, line_of_key) = (key.get_ref().to_string(), line(key.span()));
            let DeValue::Table(table) = value.get_ref() else {
                file.add(None, name, value.get_ref(), line_of_key);
                continue;
            };
            for (key, value) in table {
                file.add(Some(name.clone()), key.get_ref().to_string(), value.get_ref(), line(key.span()));
            }
            file.tables.push((name, line_of_key));
        }
        file.entries.sort_by_key(|entry| entry.line);
        file.tables.sort_by_key(|(_, line)| *line);
        Ok(file)
    }

    fn add(&mut self, table: Option<String>, key: String, value: &DeValue<'_>, line: usize) {
        self.entries.push(Entry { table, key, value: value_of(value), line, path: self.path.clone() });
    }
}

fn value_of(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        // Underscores between digits are TOML's own; other bases are nothing that an option takes.
        DeValue::Integer(number) => Value::Text(number.as_str().replace('_', "")),
        DeValue::Float(number) => Value::Text(number.as_str().replace('_', "")),
        DeValue::Datetime(time) => Value::Text(time.to_string()),
        DeValue::Boolean(flag) => Value::Flag(*flag),
        DeValue::Array(values) => Value::List(values.iter().map(|value| value_of(value.get_ref())).collect()),
        DeValue::Table(_) => Value::Table,
    }
}
