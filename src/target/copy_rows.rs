//! Rows of the stream as COPY takes them, in text or in binary ("COPY", file formats, in the manual).

use bytes::{BufMut, Bytes, BytesMut};

use crate::decode::Datum;
use crate::error::{Error, ErrorKind, Result};

const BINARY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Rows for one COPY.
#[derive(Debug, Default)]
pub struct CopyRows {
    bytes: BytesMut,
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
        self.rows += 1;
        if self.binary { self.push_binary(columns) } else { self.push_text(columns) }
    }

    /// The whole COPY, ready to send.
    pub fn finish(&mut self) -> Bytes {
        if self.binary {
            self.bytes.put_i16(-1);
        }
        self.rows = 0;
        self.bytes.split().freeze()
    }

    fn push_binary<'a>(&mut self, columns: impl ExactSizeIterator<Item = Datum<'a>>) -> Result<()> {
        if self.bytes.is_empty() {
            self.bytes.put_slice(BINARY_HEADER);
        }
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

    #[test]
    fn text_rows_are_escaped_as_copy_wants() {
        let mut rows = CopyRows::new(false);
        rows.push([Datum::Text(b"a\tb\\c\nd\re"), Datum::Null, Datum::Text(b"")].into_iter()).unwrap();
        rows.push([].into_iter()).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(&rows.finish()[..], b"a\\tb\\\\c\\nd\\re\t\\N\t\n\n");
        assert!(rows.is_empty());
    }

    #[test]
    fn binary_rows_have_header_lengths_and_trailer() {
        let mut rows = CopyRows::new(true);
        rows.push([Datum::Binary(&[1, 2]), Datum::Null].into_iter()).unwrap();
        let mut expected = BINARY_HEADER.to_vec();
        expected.extend_from_slice(&[0, 2, 0, 0, 0, 2, 1, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(&rows.finish()[..], &expected[..]);
    }

    #[test]
    fn a_value_in_the_other_format_is_refused() {
        assert!(CopyRows::new(true).push([Datum::Text(b"1")].into_iter()).is_err());
        assert!(CopyRows::new(false).push([Datum::Binary(b"1")].into_iter()).is_err());
        assert!(CopyRows::new(false).push([Datum::Unchanged].into_iter()).is_err());
    }
}
