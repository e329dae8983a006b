//! The bytes on disk: the header of a segment, the header of a block, and the frames inside a block.
//!
//! All integers are little-endian. A change of any of it raises [`FORMAT_VERSION`] (H18).

use bytes::Bytes;

use crate::lsn::Lsn;

/// The version that this program writes, and the newest that it reads (H18). Since 2, blocks carry labels.
pub(super) const FORMAT_VERSION: u32 = 2;
/// The first version whose blocks say what they are about.
pub(super) const VERSION_WITH_LABELS: u32 = 2;
/// Bytes of a segment's header, at offset 0; the first block follows.
pub(super) const SEGMENT_HEADER_BYTES: u64 = 64;
/// Bytes of a block's header; its payload follows.
pub(super) const BLOCK_HEADER_BYTES: usize = 64;
/// The most that one message may have. pgoutput's largest is PostgreSQL's largest allocation, 1 GiB; twice that also
/// keeps a block's lengths within 32 bits.
pub(super) const DATA_BYTES_MAX: usize = 2 << 30;

const SEGMENT_MAGIC: [u8; 8] = *b"walferry";
const BLOCK_MAGIC: [u8; 4] = *b"wfBK";
const SEGMENT_CONTINUES: u32 = 1;
const BLOCK_ENDS_AT_BOUNDARY: u8 = 1;
const BLOCK_STARTS_INSIDE: u8 = 2;
const FRAME_BEGIN: u8 = 1;
const FRAME_DATA: u8 = 2;
const FRAME_COMMIT: u8 = 3;
const FRAME_POSITION: u8 = 4;

/// What a transaction begins with, as pgoutput's Begin message tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionHead {
    /// The source's transaction id, its lower 32 bits.
    pub xid: u32,
    /// Where the commit record starts.
    pub commit_lsn: Lsn,
    /// When it was committed, in microseconds since 2000-01-01 00:00 UTC.
    pub commit_time: i64,
}

/// What a reader gets, in the order in which it was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A transaction begins; its data and its commit follow and are complete on disk.
    Begin(TransactionHead),
    /// One message, as it was appended: a slice of the block, which lives as long as the slice.
    Data(Bytes),
    /// The transaction is complete.
    Commit {
        /// Where the commit record ends: what may be acknowledged, and what the ledger records.
        end_lsn: Lsn,
    },
    /// The source had nothing for us up to here.
    Position(Lsn),
}

/// What stands at the start of a segment.
///
/// ```text
/// 0      8        12     16        24         32              40        60    64
/// │ magic│ version│ flags│ sequence│ first LSN│ previous bytes│ reserved│ CRC │
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    /// 1 for a queue's first segment; without holes.
    pub sequence: u64,
    /// The newest boundary (end of a transaction, or a position) before this segment.
    pub first_lsn: Lsn,
    /// Whether the segment starts inside a transaction that began in an earlier one.
    pub continues: bool,
    /// How much of the segment before this one counts; what it has beyond that was taken back.
    pub previous_bytes: u64,
    /// What it was written by; [`FORMAT_VERSION`] in a new one.
    pub version: u32,
}

/// Why a header was not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// A newer walferry wrote it.
    Newer(u32),
    /// It is not a header, or not as it was written.
    Damaged(&'static str),
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES as usize] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES as usize];
        bytes[0..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        let flags = if self.continues { SEGMENT_CONTINUES } else { 0 };
        bytes[12..16].copy_from_slice(&flags.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first_lsn.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.previous_bytes.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The version is looked at before the checksum: a newer format may keep its checksum elsewhere.
    pub fn decode(bytes: &[u8; SEGMENT_HEADER_BYTES as usize]) -> Result<SegmentHeader, HeaderFault> {
        if bytes[0..8] != SEGMENT_MAGIC {
            return Err(HeaderFault::Damaged("it does not start like a segment"));
        }
        let version = u32_at(bytes, 8);
        if version > FORMAT_VERSION {
            return Err(HeaderFault::Newer(version));
        }
        if crc32c::crc32c(&bytes[..60]) != u32_at(bytes, 60) {
            return Err(HeaderFault::Damaged("the checksum of its header is wrong"));
        }
        Ok(SegmentHeader {
            sequence: u64_at(bytes, 16),
            first_lsn: Lsn(u64_at(bytes, 24)),
            continues: u32_at(bytes, 12) & SEGMENT_CONTINUES != 0,
            previous_bytes: u64_at(bytes, 32),
            version,
        })
    }
}

/// How a payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// What stands before a payload. The header's checksum covers the payload's, so it vouches for both; its own place is
/// in it, so that a block is valid in that place alone.
///
/// ```text
/// 0      4      5      6       8       12   16       24      32         40        48              56           60          64
/// │ magic│ codec│ flags│ labels│ stored│ raw│ segment│ offset│ first LSN│ last LSN │ durable offset│ payload CRC│ header CRC│ labels, payload…
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockHeader {
    pub codec: Codec,
    /// Whether the block holds a boundary; if so, its last frame is one.
    pub ends_at_boundary: bool,
    /// Whether the block's first frame belongs to a transaction that began in an earlier block.
    pub starts_inside: bool,
    /// How many labels stand between the header and the payload; [`LABELS_UNKNOWN`] for none, because they were too many.
    pub labels: u16,
    /// Bytes of the payload in the file.
    pub stored_bytes: u32,
    /// Bytes of the payload's frames.
    pub raw_bytes: u32,
    /// The segment's sequence number.
    pub segment: u64,
    /// Where in the segment the block starts.
    pub offset: u64,
    /// The newest boundary before this block.
    pub first_lsn: Lsn,
    /// The newest boundary in this block, or before it where it holds none.
    pub last_lsn: Lsn,
    /// How much of this segment was known to be durable when the block was written: what tells a torn tail from
    /// corruption at recovery.
    pub durable_offset: u64,
    pub payload_crc: u32,
}

impl BlockHeader {
    pub fn encode(&self) -> [u8; BLOCK_HEADER_BYTES] {
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&BLOCK_MAGIC);
        bytes[4] = self.codec as u8;
        bytes[5] = if self.ends_at_boundary { BLOCK_ENDS_AT_BOUNDARY } else { 0 }
            | if self.starts_inside { BLOCK_STARTS_INSIDE } else { 0 };
        bytes[6..8].copy_from_slice(&self.labels.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.segment.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.first_lsn.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.last_lsn.0.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.durable_offset.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks that it belongs at this place.
    pub fn decode(bytes: &[u8; BLOCK_HEADER_BYTES], segment: u64, offset: u64) -> Result<BlockHeader, &'static str> {
        if bytes[0..4] != BLOCK_MAGIC {
            return Err("no block starts here");
        }
        if crc32c::crc32c(&bytes[..60]) != u32_at(bytes, 60) {
            return Err("the checksum of the block's header is wrong");
        }
        let codec = match bytes[4] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err("the block's codec is not known"),
        };
        let header = BlockHeader {
            codec,
            ends_at_boundary: bytes[5] & BLOCK_ENDS_AT_BOUNDARY != 0,
            starts_inside: bytes[5] & BLOCK_STARTS_INSIDE != 0,
            labels: u16::from_le_bytes([bytes[6], bytes[7]]),
            stored_bytes: u32_at(bytes, 8),
            raw_bytes: u32_at(bytes, 12),
            segment: u64_at(bytes, 16),
            offset: u64_at(bytes, 24),
            first_lsn: Lsn(u64_at(bytes, 32)),
            last_lsn: Lsn(u64_at(bytes, 40)),
            durable_offset: u64_at(bytes, 48),
            payload_crc: u32_at(bytes, 56),
        };
        if header.segment != segment || header.offset != offset {
            return Err("the block belongs elsewhere");
        }
        Ok(header)
    }

    /// Bytes of header, labels and payload in the file.
    pub fn block_bytes(&self) -> u64 {
        BLOCK_HEADER_BYTES as u64 + self.labels_bytes() + u64::from(self.stored_bytes)
    }

    /// Bytes of the labels, with their checksum.
    pub fn labels_bytes(&self) -> u64 {
        match self.labels {
            0 | LABELS_UNKNOWN => 0,
            count => (u64::from(count) + 1) * LABEL_BYTES as u64,
        }
    }

    /// Where in the segment the payload starts.
    pub fn payload_offset(&self) -> u64 {
        self.offset + BLOCK_HEADER_BYTES as u64 + self.labels_bytes()
    }
}

/// What a block is about, by the numbers that the appender was told: it says what is lost where the payload cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Labels {
    /// In order, each once.
    numbers: Vec<u32>,
    too_many: bool,
}

/// The number of labels of a block that has too many of them.
pub(super) const LABELS_UNKNOWN: u16 = u16::MAX;
/// More labels than this are not written down: such a block is about everything.
const LABELS_MAX: usize = 512;
const LABEL_BYTES: usize = 4;

impl Labels {
    pub fn insert(&mut self, number: u32) {
        if let Err(place) = self.numbers.binary_search(&number) {
            self.too_many |= self.numbers.len() >= LABELS_MAX;
            if !self.too_many {
                self.numbers.insert(place, number);
            }
        }
    }

    pub fn extend(&mut self, more: &Labels) {
        self.too_many |= more.too_many;
        for number in &more.numbers {
            self.insert(*number);
        }
    }

    pub fn clear(&mut self) {
        self.numbers.clear();
        self.too_many = false;
    }

    /// As the header counts them.
    pub fn count(&self) -> u16 {
        // LABELS_MAX is below LABELS_UNKNOWN.
        if self.too_many { LABELS_UNKNOWN } else { self.numbers.len() as u16 }
    }

    /// What stands between header and payload.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        if self.too_many || self.numbers.is_empty() {
            return;
        }
        let begin = bytes.len();
        for number in &self.numbers {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[begin..]);
        bytes.extend_from_slice(&crc.to_le_bytes());
    }

    /// The numbers in what [`Labels::encode`] wrote; `None` where it is damaged.
    pub fn decode(bytes: &[u8]) -> Option<Vec<u32>> {
        let Some((numbers, crc)) = bytes.split_last_chunk::<LABEL_BYTES>() else { return Some(Vec::new()) };
        if crc32c::crc32c(numbers) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (numbers, rest) = numbers.as_chunks::<LABEL_BYTES>();
        rest.is_empty().then(|| numbers.iter().map(|number| u32::from_le_bytes(*number)).collect())
    }
}

/// Where a block's header could start in these bytes, from a position on.
pub(super) fn find_block_magic(bytes: &[u8], from: usize) -> Option<usize> {
    let found = bytes.get(from..)?.windows(BLOCK_MAGIC.len()).position(|window| window == BLOCK_MAGIC);
    found.map(|position| from + position)
}

/// Bytes that a Data frame takes besides the message.
pub(super) const DATA_FRAME_BYTES: usize = 5;

pub(super) fn put_begin(frames: &mut Vec<u8>, head: &TransactionHead) {
    frames.push(FRAME_BEGIN);
    frames.extend_from_slice(&head.xid.to_le_bytes());
    frames.extend_from_slice(&head.commit_lsn.0.to_le_bytes());
    frames.extend_from_slice(&head.commit_time.to_le_bytes());
}

/// The message has at most [`DATA_BYTES_MAX`] bytes; the caller has checked it.
pub(super) fn put_data(frames: &mut Vec<u8>, message: &[u8]) {
    frames.push(FRAME_DATA);
    frames.extend_from_slice(&(message.len() as u32).to_le_bytes());
    frames.extend_from_slice(message);
}

pub(super) fn put_commit(frames: &mut Vec<u8>, end_lsn: Lsn) {
    frames.push(FRAME_COMMIT);
    frames.extend_from_slice(&end_lsn.0.to_le_bytes());
}

pub(super) fn put_position(frames: &mut Vec<u8>, lsn: Lsn) {
    frames.push(FRAME_POSITION);
    frames.extend_from_slice(&lsn.0.to_le_bytes());
}

/// The frame at the cursor, which moves behind it. `None` where the bytes are no frame.
pub(super) fn next_frame(frames: &Bytes, cursor: &mut usize) -> Option<Entry> {
    let rest = frames.get(*cursor..)?;
    let (kind, body) = rest.split_first()?;
    let (entry, body_bytes) = match *kind {
        FRAME_BEGIN => {
            let body: &[u8; 20] = body.first_chunk()?;
            let commit_time = u64_at(body, 12).cast_signed();
            let head = TransactionHead { xid: u32_at(body, 0), commit_lsn: Lsn(u64_at(body, 4)), commit_time };
            (Entry::Begin(head), 20)
        }
        FRAME_DATA => {
            let length = u32_at(body.first_chunk::<4>()?, 0) as usize;
            body.get(4..4 + length)?;
            let from = *cursor + DATA_FRAME_BYTES;
            (Entry::Data(frames.slice(from..from + length)), 4 + length)
        }
        FRAME_COMMIT => (Entry::Commit { end_lsn: Lsn(u64_at(body.first_chunk::<8>()?, 0)) }, 8),
        FRAME_POSITION => (Entry::Position(Lsn(u64_at(body.first_chunk::<8>()?, 0))), 8),
        _ => return None,
    };
    *cursor += 1 + body_bytes;
    Some(entry)
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_header() -> BlockHeader {
        BlockHeader {
            codec: Codec::Zstd,
            ends_at_boundary: true,
            starts_inside: false,
            labels: 2,
            stored_bytes: 7,
            raw_bytes: 9,
            segment: 3,
            offset: 64,
            first_lsn: Lsn(10),
            last_lsn: Lsn(20),
            durable_offset: 64,
            payload_crc: 0xDEAD_BEEF,
        }
    }

    #[test]
    fn headers_read_back_as_they_were_written() {
        let segment = SegmentHeader {
            sequence: 7,
            first_lsn: Lsn(0x16_B374_D848),
            continues: true,
            previous_bytes: 99,
            version: 1,
        };
        assert_eq!(SegmentHeader::decode(&segment.encode()), Ok(segment));
        assert_eq!(BlockHeader::decode(&block_header().encode(), 3, 64), Ok(block_header()));
        assert!(BlockHeader::decode(&block_header().encode(), 3, 65).is_err());
        assert!(BlockHeader::decode(&block_header().encode(), 4, 64).is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_seen() {
        let segment = SegmentHeader { sequence: 7, first_lsn: Lsn(5), continues: false, previous_bytes: 0, version: 2 };
        for bit in 0..64 * 8 {
            let mut bytes = segment.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&bytes).is_err(), "bit {bit} of the segment's header");
            let mut bytes = block_header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(BlockHeader::decode(&bytes, 3, 64).is_err(), "bit {bit} of the block's header");
        }
    }

    #[test]
    fn h18_a_newer_format_is_told_from_damage() {
        let version = FORMAT_VERSION + 1;
        let newer = SegmentHeader { sequence: 1, first_lsn: Lsn(5), continues: false, previous_bytes: 0, version };
        assert_eq!(SegmentHeader::decode(&newer.encode()), Err(HeaderFault::Newer(version)));
    }

    #[test]
    fn labels_read_back_until_they_are_too_many_or_damaged() {
        let mut labels = Labels::default();
        for number in [7, 3, u32::MAX, 3] {
            labels.insert(number);
        }
        let mut bytes = Vec::new();
        labels.encode(&mut bytes);
        assert_eq!(Labels::decode(&bytes), Some(vec![3, 7, u32::MAX]));
        let header = BlockHeader { labels: labels.count(), ..block_header() };
        assert_eq!(header.labels_bytes(), bytes.len() as u64);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Labels::decode(&damaged), None, "bit {bit}");
        }
        for number in 0..=LABELS_MAX as u32 {
            labels.insert(number);
        }
        assert_eq!(labels.count(), LABELS_UNKNOWN);
        assert_eq!(BlockHeader { labels: labels.count(), ..block_header() }.labels_bytes(), 0);
        let mut others = Labels::default();
        others.extend(&labels);
        assert_eq!(others.count(), LABELS_UNKNOWN);
    }

    #[test]
    fn frames_read_back_and_cut_frames_are_none() {
        let head = TransactionHead { xid: u32::MAX, commit_lsn: Lsn(u64::MAX - 1), commit_time: -5 };
        let mut frames = Vec::new();
        put_begin(&mut frames, &head);
        put_data(&mut frames, b"");
        put_data(&mut frames, b"row");
        put_commit(&mut frames, Lsn(u64::MAX));
        put_position(&mut frames, Lsn(1));
        let expected = [
            Entry::Begin(head),
            Entry::Data(Bytes::new()),
            Entry::Data(Bytes::from_static(b"row")),
            Entry::Commit { end_lsn: Lsn(u64::MAX) },
            Entry::Position(Lsn(1)),
        ];
        let whole = Bytes::from(frames);
        let mut cursor = 0;
        for entry in &expected {
            assert_eq!(next_frame(&whole, &mut cursor).as_ref(), Some(entry));
        }
        assert_eq!(cursor, whole.len());
        for length in 0..whole.len() {
            let cut = whole.slice(..length);
            let mut cursor = 0;
            while next_frame(&cut, &mut cursor).is_some() {}
            assert!(cursor <= length);
        }
    }
}
