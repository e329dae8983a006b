//! Segments as files: their names, and reading their headers and blocks with every check there is.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::file_system::{File, FileSystem};
use super::format::{
    BLOCK_HEADER_BYTES, BlockHeader, Codec, DATA_BYTES_MAX, DATA_FRAME_BYTES, FORMAT_VERSION, HeaderFault,
    LABELS_UNKNOWN, Labels, SEGMENT_HEADER_BYTES, SegmentHeader,
};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

const EXTENSION: &str = ".segment";

/// What is known of a segment while the queue is open.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub sequence: u64,
    /// The newest boundary before it.
    pub first_lsn: Lsn,
    /// Whether it starts inside a transaction.
    pub continues: bool,
    /// How much of the file counts.
    pub bytes: u64,
    /// Once this is applied nobody needs the segment: an upper bound of the end LSN of the last transaction that has
    /// frames in it. `None` while that transaction has not ended, or the segment is still written.
    pub release: Option<Lsn>,
    /// For `--queue-keep`.
    pub last_write: SystemTime,
}

/// A place between two blocks, or at the end of the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub sequence: u64,
    pub offset: u64,
}

/// Why a block could not be read.
#[derive(Debug)]
pub(super) enum BlockFault {
    /// The bytes are there and are not a block, or are fewer than one.
    Damaged(&'static str),
    /// The system refused the read.
    Unreadable(io::Error),
}

impl BlockFault {
    fn from_read(error: io::Error) -> BlockFault {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => BlockFault::Damaged("the file ends inside the block"),
            _ => BlockFault::Unreadable(error),
        }
    }

    /// As an error that names the place and what is in danger.
    pub fn into_error(self, path: &Path, offset: u64, after: Lsn, up_to: Lsn) -> Error {
        match self {
            BlockFault::Damaged(what) => corrupt(path, offset, after, up_to, what),
            BlockFault::Unreadable(error) => {
                disk_error(error, format!("reading the queue's segment {} at offset {offset}", path.display()))
            }
        }
    }
}

/// The file of a segment.
pub(super) fn segment_path(directory: &Path, sequence: u64) -> PathBuf {
    directory.join(format!("{sequence:020}{EXTENSION}"))
}

/// The sequence number in a file's name; `None` where it is no segment's.
pub(super) fn sequence_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(EXTENSION)?;
    let plain = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

/// An error of the disk.
pub(super) fn disk_error(error: io::Error, doing: String) -> Error {
    Error::new(ErrorKind::Disk, error.to_string())
        .context(doing)
        .hint("look at the disk that holds the state directory (space, permissions, the kernel's log)")
}

/// Corruption, by name: what is missing lies after the first LSN and at or below the second.
pub(super) fn corrupt(path: &Path, offset: u64, after: Lsn, up_to: Lsn, what: &str) -> Error {
    let range = if up_to == Lsn::MAX { format!("from {after} on") } else { format!("from {after} to {up_to}") };
    let text = format!(
        "the queue's segment {} is corrupt at offset {offset}: {what}; in danger are the transactions {range}",
        path.display()
    );
    Error::new(ErrorKind::Queue, text).hint(
        "Restore the file if there is a copy. Else `walferry resync` with the options of `migrate` makes a new slot, compares every \
         table and copies only what differs; then the migration goes on.",
    )
}

/// Reads and checks a segment's header. `Ok(None)` where the file is too short to hold one, or what it holds cannot be
/// more than the remains of its creation.
pub(super) fn read_segment_header(file: &dyn File, path: &Path, sequence: u64) -> Result<Option<SegmentHeader>> {
    let doing = || format!("reading the header of the queue's segment {}", path.display());
    let length = file.len().map_err(|error| disk_error(error, doing()))?;
    if length < SEGMENT_HEADER_BYTES {
        return Ok(None);
    }
    let mut bytes = [0; SEGMENT_HEADER_BYTES as usize];
    file.read_at(&mut bytes, 0).map_err(|error| disk_error(error, doing()))?;
    match SegmentHeader::decode(&bytes) {
        Ok(header) if header.sequence == sequence => Ok(Some(header)),
        Ok(_) => Err(corrupt(path, 0, Lsn::ZERO, Lsn::MAX, "it is another segment under this one's name")),
        Err(HeaderFault::Newer(version)) => {
            let text = format!(
                "the queue's segment {} has format version {version}, and this walferry knows versions up to {FORMAT_VERSION}",
                path.display()
            );
            Err(Error::new(ErrorKind::Queue, text).hint("go on with the newer walferry that wrote it"))
        }
        // The header is durable before the first block follows it.
        Err(HeaderFault::Damaged(_)) if length == SEGMENT_HEADER_BYTES => Ok(None),
        Err(HeaderFault::Damaged(what)) => Err(corrupt(path, 0, Lsn::ZERO, Lsn::MAX, what)),
    }
}

/// Makes a segment's file with its header, durable with its name. On an error no part of it stays, as far as the disk
/// lets us; an older file under the name, left by such a failure, is replaced.
pub(super) fn create_segment(
    file_system: &dyn FileSystem,
    directory: &Path,
    header: &SegmentHeader,
) -> io::Result<Arc<dyn File>> {
    let path = segment_path(directory, header.sequence);
    let file = match file_system.create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_segment(file_system, directory, header.sequence)?;
            file_system.create(&path)?
        }
        result => result?,
    };
    let written = file
        .write_at(&header.encode(), 0)
        .and_then(|()| file.sync_data())
        .and_then(|()| file_system.sync_directory(directory));
    match written {
        Ok(()) => Ok(file),
        Err(error) => {
            // The first error is the one to tell; a file that stays is replaced at the next try.
            let _ = remove_segment(file_system, directory, header.sequence);
            Err(error)
        }
    }
}

/// Removes a segment's file, durably. Segments go one at a time, each made durable, so that no crash can leave a hole
/// among them.
pub(super) fn remove_segment(file_system: &dyn FileSystem, directory: &Path, sequence: u64) -> io::Result<()> {
    match file_system.remove(&segment_path(directory, sequence)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => file_system.sync_directory(directory),
    }
}

/// Reads and checks the header of the block at a place; the block ends at or before `limit`.
pub(super) fn read_block_header(
    file: &dyn File,
    sequence: u64,
    offset: u64,
    limit: u64,
) -> Result<BlockHeader, BlockFault> {
    if limit.saturating_sub(offset) < BLOCK_HEADER_BYTES as u64 {
        return Err(BlockFault::Damaged("the file ends inside a block's header"));
    }
    let mut bytes = [0; BLOCK_HEADER_BYTES];
    file.read_at(&mut bytes, offset).map_err(BlockFault::from_read)?;
    let header = BlockHeader::decode(&bytes, sequence, offset).map_err(BlockFault::Damaged)?;
    if offset + header.block_bytes() > limit {
        return Err(BlockFault::Damaged("the file ends inside the block"));
    }
    Ok(header)
}

/// What a block is about, also where its payload is damaged; `None` where that is not known.
pub(super) fn read_labels(file: &dyn File, header: &BlockHeader) -> Result<Option<Vec<u32>>, BlockFault> {
    if header.labels == LABELS_UNKNOWN {
        return Ok(None);
    }
    let mut bytes = vec![0; header.labels_bytes() as usize];
    file.read_at(&mut bytes, header.offset + BLOCK_HEADER_BYTES as u64).map_err(BlockFault::from_read)?;
    Ok(Labels::decode(&bytes))
}

/// Reads a block's payload as it is stored into `stored`, and checks it.
pub(super) fn read_payload(file: &dyn File, header: &BlockHeader, stored: &mut Vec<u8>) -> Result<(), BlockFault> {
    stored.resize(header.stored_bytes as usize, 0);
    file.read_at(stored, header.payload_offset()).map_err(BlockFault::from_read)?;
    if crc32c::crc32c(stored) != header.payload_crc {
        return Err(BlockFault::Damaged("the checksum of the block's payload is wrong"));
    }
    Ok(())
}

/// The frames of a payload that [`read_payload`] has checked.
pub(super) fn unpack(
    header: &BlockHeader,
    stored: &mut Vec<u8>,
    decompressor: &mut zstd::bulk::Decompressor<'static>,
) -> Result<Bytes, BlockFault> {
    let raw_bytes = header.raw_bytes as usize;
    let frames = match header.codec {
        Codec::Raw => std::mem::take(stored),
        Codec::Zstd if raw_bytes > DATA_BYTES_MAX + DATA_FRAME_BYTES => {
            return Err(BlockFault::Damaged("the block is larger than any"));
        }
        Codec::Zstd => decompressor
            .decompress(stored, raw_bytes)
            .map_err(|_| BlockFault::Damaged("the block's payload cannot be decompressed"))?,
    };
    if frames.len() != raw_bytes {
        return Err(BlockFault::Damaged("the block's payload has another length than its header says"));
    }
    Ok(Bytes::from(frames))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_segments() {
        let path = segment_path(Path::new("/q"), 42);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(sequence_of(name), Some(42));
        for name in ["lock", "1.segment", "00000000000000000042.segment~", "+0000000000000000042.segment", ".segment"] {
            assert_eq!(sequence_of(name), None, "{name}");
        }
    }
}
