//! Rows of the stream as COPY takes them, in text or in binary ("COPY", file formats, in the manual).

use bytes::{BufMut, Bytes, BytesMut};

use crate::decode::Datum;
use crate::error::{Error, ErrorKind, Result};

const BINARY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// A message of the COPY is ended after so many bytes; a row is never cut, so it can be longer by one. The server holds a
/// message at once.
const MESSAGE_BYTES: usize = 64 * 1024;

/// Bytes of a message's head: its tag, and its length, which counts itself.
const HEAD_BYTES: usize = 5;

/// Rows for one COPY, written down as the messages that carry them: nothing has to be copied again to be sent.
#[derive(Debug, Default)]
pub struct CopyRows {
    bytes: BytesMut,
    /// Where the message in the making begins.
    message: usize,
    rows: u64,
    binary: bool,
}

impl CopyRows {
    /// None yet; all of them in one format.
    pub fn new(binary: bool) -> CopyRows {
        CopyRows { binary, ..CopyRows::default() }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.rows
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Adds a row.
    ///
    /// # Errors
    /// `Other` for a column in the other format, or one without a value: then the stream is not what it was agreed to be.
    pub fn push<'a>(&mut self, columns: impl ExactSizeIterator<Item = Datum<'a>>) -> Result<()> {
        if self.bytes.is_empty() {
            self.begin_message();
            if self.binary {
                self.bytes.put_slice(BINARY_HEADER);
            }
        } else if self.bytes.len() - self.message > MESSAGE_BYTES {
            self.end_message();
            self.begin_message();
        }
        self.rows += 1;
        if self.binary { self.push_binary(columns) } else { self.push_text(columns) }
    }

    /// The messages of the whole COPY, ready to send: CopyData with the rows, then CopyDone ("Message Formats" in the manual).
    pub fn finish(&mut self) -> Bytes {
        if self.bytes.is_empty() {
            self.begin_message();
        }
        if self.binary {
            self.bytes.put_i16(-1);
        }
        self.end_message();
        self.bytes.put_slice(b"c\0\0\0\x04");
        self.rows = 0;
        self.bytes.split().freeze()
    }

    fn begin_message(&mut self) {
        self.message = self.bytes.len();
        self.bytes.put_slice(b"d\0\0\0\0");
    }

    fn end_message(&mut self) {
        let length = (self.bytes.len() - self.message - 1) as u32;
        self.bytes[self.message + 1..self.message + HEAD_BYTES].copy_from_slice(&length.to_be_bytes());
    }

    fn push_binary<'a>(&mut self, columns: impl ExactSizeIterator<Item = Datum<'a>>) -> Result<()> {
        self.bytes.put_i16(columns.len() as i16);
        for datum in columns {
            match datum {
                Datum::Null => self.bytes.put_i32(-1),
                Datum::Binary(value) => {
                    self.bytes.put_i32(value.len() as i32);
                    self.bytes.put_slice(value);
                }
                Datum::Text(_) | Datum::Unchanged => return Err(unexpected(datum)),
            }
        }
        Ok(())
    }

    fn push_text<'a>(&mut self, columns: impl ExactSizeIterator<Item = Datum<'a>>) -> Result<()> {
        for (at, datum) in columns.enumerate() {
            if at > 0 {
                self.bytes.put_u8(b'\t');
            }
            match datum {
                Datum::Null => self.bytes.put_slice(b"\\N"),
                Datum::Text(value) => self.push_escaped(value),
                Datum::Binary(_) | Datum::Unchanged => return Err(unexpected(datum)),
            }
        }
        self.bytes.put_u8(b'\n');
        Ok(())
    }

    fn push_escaped(&mut self, value: &[u8]) {
        let mut rest = value;
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\t' | b'\n' | b'\r')) {
            self.bytes.put_slice(&rest[..at]);
            let escaped: &[u8] = match rest[at] {
                b'\t' => b"\\t",
                b'\n' => b"\\n",
                b'\r' => b"\\r",
                _ => b"\\\\",
            };
            self.bytes.put_slice(escaped);
            rest = &rest[at + 1..];
        }
        self.bytes.put_slice(rest);
    }
}

fn unexpected(datum: Datum<'_>) -> Error {
    let kind = match datum {
        Datum::Text(_) => "a text value in a binary stream",
        Datum::Binary(_) => "a binary value in a text stream",
        Datum::Null | Datum::Unchanged => "a column without a value",
    };
    Error::new(ErrorKind::Other, format!("the stream has {kind} where none can be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a COPY's messages carry, and how many carry it.
    fn carried(mut messages: &[u8]) -> (Vec<u8>, usize) {
        let (mut rows, mut count) = (Vec::new(), 0);
        while let Some((head, rest)) = messages.split_first_chunk::<HEAD_BYTES>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4;
            if head[0] == b'c' {
                assert_eq!((length, rest), (0, &[][..]), "CopyDone is the last");
                return (rows, count);
            }
            assert_eq!(head[0], b'd');
            rows.extend_from_slice(&rest[..length]);
            count += 1;
            messages = &rest[length..];
        }
        panic!("no CopyDone");
    }

    #[test]
    fn text_rows_are_escaped_as_copy_wants() {
        let mut rows = CopyRows::new(false);
        rows.push([Datum::Text(b"a\tb\\c\nd\re"), Datum::Null, Datum::Text(b"")].into_iter()).unwrap();
        rows.push([].into_iter()).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(carried(&rows.finish()), (b"a\\tb\\\\c\\nd\\re\t\\N\t\n\n".to_vec(), 1));
        assert!(rows.is_empty());
    }

    #[test]
    fn binary_rows_have_header_lengths_and_trailer() {
        let mut rows = CopyRows::new(true);
        let mut expected = BINARY_HEADER.to_vec();
        expected.extend_from_slice(&[0, 2, 0, 0, 0, 2, 1, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        // Again and again: what was sent leaves nothing behind.
        for _ in 0..2 {
            rows.push([Datum::Binary(&[1, 2]), Datum::Null].into_iter()).unwrap();
            assert_eq!(carried(&rows.finish()), (expected.clone(), 1));
        }
    }

    #[test]
    fn many_rows_are_carried_by_messages_that_the_server_can_hold() {
        let mut rows = CopyRows::new(false);
        let value = [b'x'; 999];
        for _ in 0..1000 {
            rows.push([Datum::Text(&value)].into_iter()).unwrap();
        }
        let (bytes, messages) = carried(&rows.finish());
        assert_eq!(bytes.len(), 1_000_000);
        assert!((14..=16).contains(&messages), "{messages}");
    }

    #[test]
    fn a_value_in_the_other_format_is_refused() {
        assert!(CopyRows::new(true).push([Datum::Text(b"1")].into_iter()).is_err());
        assert!(CopyRows::new(false).push([Datum::Binary(b"1")].into_iter()).is_err());
        assert!(CopyRows::new(false).push([Datum::Unchanged].into_iter()).is_err());
    }
}
