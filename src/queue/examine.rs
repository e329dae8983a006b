//! What is wrong with a queue that cannot be read to its end, and what is lost with it.

use std::collections::BTreeSet;
use std::path::Path;

use super::file_system::{File, FileSystem, RealFileSystem};
use super::format::{SEGMENT_HEADER_BYTES, SegmentHeader, VERSION_WITH_LABELS};
use super::segment::{
    disk_error, read_block_header, read_labels, read_payload, read_segment_header, segment_path, sequence_of,
};
use crate::error::Result;
use crate::lsn::Lsn;

/// What a look at every block past a position found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// Whether a block cannot be read. A torn tail is none: what it held was never acknowledged, so that the end tells.
    pub damaged: bool,
    /// What the blocks past the position are about, the damaged ones among them; it can be more than their transactions are.
    /// `None` where it is not known.
    pub labels: Option<BTreeSet<u32>>,
    /// The newest boundary of any block that was found; zero where there is none.
    pub end: Lsn,
}

/// Looks at every block that can hold something past `after`, in a queue that nobody has open.
///
/// # Errors
/// [`ErrorKind::Disk`](crate::error::ErrorKind::Disk) when a file cannot be read at all.
pub fn examine(directory: &Path, after: Lsn) -> Result<Examined> {
    examine_on(&RealFileSystem, directory, after)
}

pub(super) fn examine_on(file_system: &dyn FileSystem, directory: &Path, after: Lsn) -> Result<Examined> {
    let listing = |error| disk_error(error, format!("looking for the queue's segments in {}", directory.display()));
    let names = match file_system.list(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        names => names.map_err(listing)?,
    };
    let mut sequences: Vec<u64> = names.iter().filter_map(|name| sequence_of(name)).collect();
    sequences.sort_unstable();
    let mut examination = Examination { labels: BTreeSet::new(), complete: true, damaged: false, end: Lsn::ZERO };
    let mut segments = Vec::with_capacity(sequences.len());
    for &sequence in &sequences {
        let path = segment_path(directory, sequence);
        let opening = || format!("opening the queue's segment {}", path.display());
        let file = file_system.open(&path).map_err(|error| disk_error(error, opening()))?;
        let length = file.len().map_err(|error| disk_error(error, opening()))?;
        match read_segment_header(&*file, &path, sequence) {
            Ok(Some(header)) => segments.push((header, file, length)),
            // The remains of a creation that was cut short, if nothing comes after it.
            Ok(None) if Some(&sequence) == sequences.last() => {}
            Ok(None) | Err(_) => examination.is_lost(),
        }
    }
    // The first that is left must begin before what is still needed. Of one that begins inside a transaction only what is behind
    // that transaction counts.
    let begins = match segments.first() {
        Some((header, file, length)) if header.continues => first_boundary(header, &**file, *length),
        Some((header, ..)) => Some(header.first_lsn),
        None => Some(after),
    };
    if begins.is_none_or(|begins| begins > after) {
        examination.is_lost();
    }
    for (at, (header, file, length)) in segments.iter().enumerate() {
        let next = segments.get(at + 1).map(|(next, ..)| next);
        if next.is_some_and(|next| next.sequence != header.sequence + 1) {
            examination.is_lost();
        }
        // All of it is applied. A transaction that goes on in the next one may not be.
        if next.is_some_and(|next| next.first_lsn <= after && !next.continues) {
            continue;
        }
        examination.segment(header, &**file, *length, next, after)?;
    }
    let Examination { labels, complete, damaged, end } = examination;
    Ok(Examined { damaged, labels: complete.then_some(labels), end })
}

/// Where a segment's first block ends that holds a boundary, if it has one.
fn first_boundary(header: &SegmentHeader, file: &dyn File, length: u64) -> Option<Lsn> {
    let mut offset = SEGMENT_HEADER_BYTES;
    loop {
        let block = read_block_header(file, header.sequence, offset, length).ok()?;
        if block.ends_at_boundary {
            return Some(block.last_lsn);
        }
        offset += block.block_bytes();
    }
}

struct Examination {
    labels: BTreeSet<u32>,
    /// Whether the labels are all there are.
    complete: bool,
    damaged: bool,
    end: Lsn,
}

impl Examination {
    /// Something that nobody can name any more.
    fn is_lost(&mut self) {
        self.damaged = true;
        self.complete = false;
    }

    fn segment(
        &mut self,
        header: &SegmentHeader,
        file: &dyn File,
        length: u64,
        next: Option<&SegmentHeader>,
        after: Lsn,
    ) -> Result<()> {
        let counted = next.map_or(length, |next| next.previous_bytes);
        if length < counted {
            self.is_lost();
        }
        let limit = counted.min(length);
        let mut offset = SEGMENT_HEADER_BYTES;
        let mut stored = Vec::new();
        while offset < limit {
            let Ok(block) = read_block_header(file, header.sequence, offset, limit) else {
                // In the last segment this can be the tail that a crash tore.
                if next.is_some() {
                    self.is_lost();
                }
                return Ok(());
            };
            offset += block.block_bytes();
            let is_applied = block.ends_at_boundary && block.last_lsn <= after;
            if !is_applied {
                let labels = read_labels(file, &block).ok().flatten();
                match labels.filter(|_| header.version >= VERSION_WITH_LABELS) {
                    Some(labels) => self.labels.extend(labels),
                    None => self.complete = false,
                }
                self.damaged |= read_payload(file, &block, &mut stored).is_err();
            }
            self.end = self.end.max(block.last_lsn);
        }
        Ok(())
    }
}
