//! The primitives of the wire: big-endian integers, strings that end with a zero byte, counted bytes.

use super::error::{Found, Mismatch};
use crate::lsn::Lsn;

/// What is left of a message. Every method takes its bytes from the front, or says why it cannot.
///
/// The `expected` of each is what the error will say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reader<'a> {
    /// Always a tail of the message.
    rest: &'a [u8],
    /// Of the whole message, for the offset.
    length: usize,
}

impl<'a> Reader<'a> {
    pub fn new(message: &'a [u8]) -> Reader<'a> {
        Reader { rest: message, length: message.len() }
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Mismatch> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.ends_wrongly("the end of the message")) }
    }

    pub fn byte(&mut self, expected: &'static str) -> Result<u8, Mismatch> {
        let [byte] = self.array(expected)?;
        Ok(byte)
    }

    pub fn u32(&mut self, expected: &'static str) -> Result<u32, Mismatch> {
        self.array(expected).map(u32::from_be_bytes)
    }

    pub fn i32(&mut self, expected: &'static str) -> Result<i32, Mismatch> {
        self.array(expected).map(i32::from_be_bytes)
    }

    pub fn i64(&mut self, expected: &'static str) -> Result<i64, Mismatch> {
        self.array(expected).map(i64::from_be_bytes)
    }

    pub fn lsn(&mut self, expected: &'static str) -> Result<Lsn, Mismatch> {
        self.array(expected).map(u64::from_be_bytes).map(Lsn)
    }

    /// A byte in which only the bits of `known` may be set.
    pub fn flags(&mut self, known: u8, expected: &'static str) -> Result<u8, Mismatch> {
        let flags = self.byte(expected)?;
        if flags & !known == 0 { Ok(flags) } else { Err(self.unexpected_byte(flags, expected)) }
    }

    /// A 16-bit number of columns; the server counts in a signed integer.
    pub fn column_count(&mut self) -> Result<u16, Mismatch> {
        let expected = "a number of columns";
        let count = self.array(expected).map(i16::from_be_bytes)?;
        u16::try_from(count).map_err(|_| self.before(2, expected, Found::Number(i32::from(count))))
    }

    /// A 32-bit number `n`, and the `n` bytes after it, which are returned.
    #[inline]
    pub fn counted(&mut self, expected: &'static str) -> Result<&'a [u8], Mismatch> {
        let announced = self.i32(expected)?;
        self.items(announced, 1).map_err(|found| self.before(4, expected, found))
    }

    /// As many 32-bit numbers as were announced before, as bytes.
    pub fn u32s(&mut self, announced: i32, expected: &'static str) -> Result<&'a [u8], Mismatch> {
        self.items(announced, size_of::<u32>()).map_err(|found| self.before(0, expected, found))
    }

    #[inline]
    fn items(&mut self, announced: i32, item_size: usize) -> Result<&'a [u8], Found> {
        let size = usize::try_from(announced).ok().and_then(|count| count.checked_mul(item_size));
        let (items, rest) = size
            .and_then(|size| self.rest.split_at_checked(size))
            .ok_or(Found::Length { announced, left: self.rest.len() })?;
        self.rest = rest;
        Ok(items)
    }

    /// A string up to its zero byte.
    pub fn string(&mut self, expected: &'static str) -> Result<&'a str, Mismatch> {
        let Some(end) = self.rest.iter().position(|byte| *byte == 0) else {
            return Err(self.before(0, expected, Found::NoTerminator));
        };
        let (text, zero_and_rest) = self.rest.split_at(end);
        let text = str::from_utf8(text).map_err(|_| self.before(0, expected, Found::InvalidUtf8))?;
        self.rest = &zero_and_rest[1..];
        Ok(text)
    }

    /// The schema of a relation or type: the wire's empty string stands for `pg_catalog`.
    pub fn schema(&mut self) -> Result<&'a str, Mismatch> {
        let schema = self.string("a schema name in UTF-8")?;
        Ok(if schema.is_empty() { "pg_catalog" } else { schema })
    }

    /// The bytes between an earlier state of this same reader and now.
    pub fn since(&self, earlier: &Reader<'a>) -> &'a [u8] {
        // A reader only moves forward, so what is left now is a tail of what was left then.
        &earlier.rest[..earlier.rest.len() - self.rest.len()]
    }

    /// The byte just read is not what it must be.
    #[cold]
    pub fn unexpected_byte(&self, byte: u8, expected: &'static str) -> Mismatch {
        self.before(1, expected, Found::Byte(byte))
    }

    fn array<const N: usize>(&mut self, expected: &'static str) -> Result<[u8; N], Mismatch> {
        match self.rest.split_first_chunk() {
            Some((array, rest)) => {
                self.rest = rest;
                Ok(*array)
            }
            None => Err(self.ends_wrongly(expected)),
        }
    }

    #[cold]
    fn ends_wrongly(&self, expected: &'static str) -> Mismatch {
        self.before(0, expected, Found::BytesToTheEnd(self.rest.len()))
    }

    /// A mismatch that begins `back` bytes before the place that has been reached.
    #[cold]
    fn before(&self, back: usize, expected: &'static str, found: Found) -> Mismatch {
        Mismatch { expected, offset: self.length - self.rest.len() - back, found }
    }
}
