//! Rows as they are on the wire: a number of columns, then each column by its kind.

use std::fmt;
use std::iter::FusedIterator;

use bytes::Bytes;

use super::error::Mismatch;
use super::reader::Reader;

/// One row, or the part of a row that identifies it. Valid as a whole, so reading its columns cannot fail.
///
/// It has one entry per column of the [`Relation`](super::Relation) that was announced last under the same relid, in
/// the same order. Its `Debug` shows kinds and lengths, never values, so that a message may be logged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    /// Exactly `count` columns that have been read once without error.
    columns: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// How many columns it has.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether it is the row of a table without columns.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The columns in the order of the relation's.
    pub fn columns(&self) -> TupleColumns<'a> {
        TupleColumns { left: self.count, reader: Reader::new(self.columns) }
    }

    /// The columns as they are on the wire, without their number: what [`Tuple::of_encoded`] reads again.
    pub fn encoded(&self) -> &'a [u8] {
        self.columns
    }

    /// A tuple that was read before and kept as [`Tuple::encoded`]. Bytes that never were one read as a shorter tuple.
    pub fn of_encoded(count: u16, columns: &'a [u8]) -> Tuple<'a> {
        Tuple { count, columns }
    }

    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Tuple<'a>, Mismatch> {
        let count = reader.column_count()?;
        let start = *reader;
        for _ in 0..count {
            Datum::read(reader)?;
        }
        Ok(Tuple { count, columns: reader.since(&start) })
    }
}

impl fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for datum in self.columns() {
            match datum {
                Datum::Null => list.entry(&format_args!("null")),
                Datum::Unchanged => list.entry(&format_args!("unchanged")),
                Datum::Text(value) => list.entry(&format_args!("text of {} bytes", value.len())),
                Datum::Binary(value) => list.entry(&format_args!("binary of {} bytes", value.len())),
            };
        }
        list.finish()
    }
}

/// A [`Tuple`] that outlives its message: a slice of the same bytes, which it keeps alive.
#[derive(Clone, Debug)]
pub struct KeptTuple {
    count: u16,
    columns: Bytes,
}

impl KeptTuple {
    /// A tuple of a message, without copying it.
    pub fn of(message: &Bytes, tuple: Tuple<'_>) -> KeptTuple {
        KeptTuple { count: tuple.count, columns: message.slice_ref(tuple.columns) }
    }

    /// One that was made anew, by the same rules as [`Tuple::of_encoded`].
    pub fn new(count: u16, columns: Bytes) -> KeptTuple {
        KeptTuple { count, columns }
    }

    /// To read it.
    pub fn tuple(&self) -> Tuple<'_> {
        Tuple::of_encoded(self.count, &self.columns)
    }

    /// Positions of the columns that have no value here: TOASTed and left unchanged.
    pub fn unchanged(&self) -> Vec<u16> {
        (0u16..).zip(self.tuple().columns()).filter(|(_, datum)| *datum == Datum::Unchanged).map(|(at, _)| at).collect()
    }
}

/// What identifies the row that an update or a delete found, as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldTuple<'a> {
    /// The columns of the replica identity's index; all others are null. An update has it only when it changed one
    /// of them, or when one of them is TOASTed.
    Key(Tuple<'a>),
    /// The whole old row, under `REPLICA IDENTITY FULL`.
    Full(Tuple<'a>),
}

impl<'a> OldTuple<'a> {
    /// The tuple, whichever it is.
    pub fn tuple(&self) -> Tuple<'a> {
        match self {
            OldTuple::Key(tuple) | OldTuple::Full(tuple) => *tuple,
        }
    }

    /// Reads the tuple that follows a `K` or an `O`; `None` when `kind` is neither.
    pub(super) fn read(kind: u8, reader: &mut Reader<'a>) -> Result<Option<OldTuple<'a>>, Mismatch> {
        match kind {
            b'K' => Tuple::read(reader).map(|tuple| Some(OldTuple::Key(tuple))),
            b'O' => Tuple::read(reader).map(|tuple| Some(OldTuple::Full(tuple))),
            _ => Ok(None),
        }
    }
}

/// One column of a [`Tuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// NULL, and every column outside of the key in an [`OldTuple::Key`].
    Null,
    /// A TOASTed value that the update left as it was, and that the stream does not carry: keep what is there.
    Unchanged,
    /// The type's output text, in the session's `client_encoding` and other settings, without a zero byte at its end.
    Text(&'a [u8]),
    /// What the type's send function returns: a field of binary COPY without its length.
    Binary(&'a [u8]),
}

impl<'a> Datum<'a> {
    #[inline]
    fn read(reader: &mut Reader<'a>) -> Result<Datum<'a>, Mismatch> {
        let expected = "a column kind (n, u, t or b)";
        match reader.byte(expected)? {
            b'n' => Ok(Datum::Null),
            b'u' => Ok(Datum::Unchanged),
            b't' => reader.counted("the length of a text value").map(Datum::Text),
            b'b' => reader.counted("the length of a binary value").map(Datum::Binary),
            unknown => Err(reader.unexpected_byte(unknown, expected)),
        }
    }
}

/// The columns of a [`Tuple`], in order.
#[derive(Clone, Debug)]
pub struct TupleColumns<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for TupleColumns<'a> {
    type Item = Datum<'a>;

    #[inline]
    fn next(&mut self) -> Option<Datum<'a>> {
        self.left = self.left.checked_sub(1)?;
        // Never an error: the same bytes were read when the tuple was made.
        Datum::read(&mut self.reader).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for TupleColumns<'_> {}
impl FusedIterator for TupleColumns<'_> {}
