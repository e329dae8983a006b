//! What is wrong with bytes that are not a message, without a word of the row values in them.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// Bytes that are not one message of pgoutput's protocol version 1.
///
/// Its text says which message, what was expected, at which offset in bytes from the message's tag, and what was
/// there instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeError {
    message: &'static str,
    mismatch: Mismatch,
}

impl DecodeError {
    /// The kind of message that its tag announced, such as `Insert`; `pgoutput` when the tag itself is wrong.
    pub fn message(&self) -> &'static str {
        self.message
    }

    /// What should have stood there.
    pub fn expected(&self) -> &'static str {
        self.mismatch.expected
    }

    /// Where, in bytes from the message's tag, which is at 0.
    pub fn offset(&self) -> usize {
        self.mismatch.offset
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { expected, offset, found } = &self.mismatch;
        write!(f, "{} message: expected {expected} at offset {offset}, found {found}", self.message)
    }
}

impl std::error::Error for DecodeError {}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Error {
        Error::new(ErrorKind::Other, format!("decoding the stream: {error}")).hint(
            "the stream must come from pgoutput with proto_version 1 and client_encoding UTF8; \
             if it does, report this together with the source's version",
        )
    }
}

/// A place that does not hold what it must, not yet knowing in which message it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    pub expected: &'static str,
    /// In bytes from the tag.
    pub offset: usize,
    pub found: Found,
}

impl Mismatch {
    pub fn of(self, message: &'static str) -> DecodeError {
        DecodeError { message, mismatch: self }
    }
}

/// What stood at a place instead. Tags, flags and lengths only: never the bytes of a value or name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Byte(u8),
    Number(i32),
    /// The message ends after this many more bytes, too few.
    BytesToTheEnd(usize),
    /// A length, and the number of bytes that are left for it.
    Length {
        announced: i32,
        left: usize,
    },
    NoTerminator,
    InvalidUtf8,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Byte(byte) if byte.is_ascii_graphic() => write!(f, "{byte:#04x} ({})", char::from(*byte)),
            Found::Byte(byte) => write!(f, "{byte:#04x}"),
            Found::Number(number) => write!(f, "{number}"),
            Found::BytesToTheEnd(1) => f.write_str("1 byte"),
            Found::BytesToTheEnd(count) => write!(f, "{count} bytes"),
            Found::Length { announced, left } => write!(f, "a length of {announced} with {left} bytes left"),
            Found::NoTerminator => f.write_str("no zero byte up to the end"),
            Found::InvalidUtf8 => f.write_str("bytes that are not UTF-8"),
        }
    }
}
