//! What happens to the queue's files while walferry is down: torn tails, cut files, flipped bits.
//!
//! The format is read here by a reader of the test's own, from its description in `src/queue/format.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use walferry::lsn::Lsn;

use super::random::Random;

/// The version that is read here.
const FORMAT_VERSION: u32 = 2;
const SEGMENT_HEADER_BYTES: u64 = 64;
const BLOCK_HEADER_BYTES: u64 = 64;

/// A block of a segment.
#[derive(Clone, Debug)]
pub struct Block {
    pub segment: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    /// Of its labels, which stand between header and payload.
    label_bytes: u64,
    pub ends_at_boundary: bool,
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
}

/// What was done, and what has to come of it.
#[derive(Clone, Debug)]
pub struct Damage {
    pub text: String,
    /// The damaged block, where it was acknowledged: walferry must stop there. Otherwise it must go on as if nothing were.
    pub stops_at: Option<Block>,
}

/// Whether a segment's header reached the disk: one that was never synced can be all zeros.
fn has_header(content: &[u8]) -> bool {
    content.len() as u64 >= SEGMENT_HEADER_BYTES && u32_at(content, 8) != 0
}

/// Segments in order, each with its blocks.
fn segments(queue: &Path) -> Vec<(PathBuf, Vec<Block>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(queue).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "segment"));
    paths.sort();
    let contents: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let mut all = Vec::new();
    for (at, (path, content)) in paths.into_iter().zip(&contents).enumerate() {
        // The next one's header says how much of this one counts.
        let next = contents.get(at + 1).filter(|next| has_header(next));
        let limit = next.map_or(content.len() as u64, |next| u64_at(next, 32));
        if has_header(content) {
            // Blocks that it does not understand would look to this reader like a tail that was never acknowledged.
            assert_eq!(
                u32_at(content, 8),
                FORMAT_VERSION,
                "the queue's format has changed: its reader here has to follow"
            );
        }
        let mut blocks = Vec::new();
        let mut offset = SEGMENT_HEADER_BYTES;
        while offset + BLOCK_HEADER_BYTES <= limit {
            let header = &content[offset as usize..(offset + BLOCK_HEADER_BYTES) as usize];
            if &header[..4] != b"wfBK" || crc32c::crc32c(&header[..60]) != u32_at(header, 60) {
                break;
            }
            // Labels, with a checksum of their own, where there are any and not too many.
            let labels = match u16::from_le_bytes([header[6], header[7]]) {
                0 | u16::MAX => 0,
                count => (u64::from(count) + 1) * 4,
            };
            let bytes = BLOCK_HEADER_BYTES + labels + u64::from(u32_at(header, 8));
            if offset + bytes > limit {
                break;
            }
            blocks.push(Block {
                segment: path.clone(),
                offset,
                bytes,
                label_bytes: labels,
                ends_at_boundary: header[5] & 1 != 0,
                first_lsn: Lsn(u64_at(header, 32)),
                last_lsn: Lsn(u64_at(header, 40)),
            });
            offset += bytes;
        }
        all.push((path, blocks));
    }
    all
}

/// Tears what was never acknowledged: everything past the last block that ends at or below `confirmed`.
pub fn tear(queue: &Path, confirmed: Lsn, random: &mut Random) -> Option<Damage> {
    let segments = segments(queue);
    let (path, blocks) = segments.last()?;
    let length = fs::metadata(path).unwrap().len();
    let acknowledged = blocks.iter().rev().find(|block| block.ends_at_boundary && block.last_lsn <= confirmed);
    let safe = acknowledged.map_or(SEGMENT_HEADER_BYTES, |block| block.offset + block.bytes);
    let last = blocks.last().filter(|block| block.offset >= safe);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let text = match (random.between(0, 3), last) {
        (0 | 1, Some(_)) => {
            let at = random.between(safe, length);
            cut(path, at);
            format!("{name} torn at {at} of {length}, acknowledged up to {safe}")
        }
        // Behind it nothing says that it was durable: it can be torn.
        (2, Some(block)) => {
            let at = random.between(block.offset, block.offset + block.bytes - 1);
            flip(path, at, random);
            format!("a bit flipped at {at} of {name}, in its last block, not acknowledged")
        }
        (kind, _) => {
            let mut tail = vec![0; random.between(1, 5000) as usize];
            if kind % 2 == 0 {
                tail.iter_mut().for_each(|byte| *byte = random.next() as u8);
            }
            let mut content = fs::read(path).unwrap();
            content.extend_from_slice(&tail);
            fs::write(path, content).unwrap();
            format!("{} bytes that are no block behind the end of {name}, {length}", tail.len())
        }
    };
    Some(Damage { text, stops_at: None })
}

/// Damages what was acknowledged, and not applied by anybody: a block that ends past `applied`, at or below `confirmed`.
///
/// A bit flipped in a block's labels harms nobody, for they only name tables in an error: walferry goes on.
pub fn corrupt(queue: &Path, confirmed: Lsn, applied: Lsn, random: &mut Random) -> Option<Damage> {
    let segments = segments(queue);
    let wanted = |block: &&Block| block.ends_at_boundary && block.last_lsn <= confirmed && block.first_lsn >= applied;
    let all: Vec<&Block> = segments.iter().flat_map(|(_, blocks)| blocks).filter(wanted).collect();
    if all.is_empty() {
        return None;
    }
    let block = (*random.pick(&all)).clone();
    let name = block.segment.file_name().unwrap().to_string_lossy().into_owned();
    let at = random.between(block.offset, block.offset + block.bytes - 1);
    let labels = block.offset + BLOCK_HEADER_BYTES..block.offset + BLOCK_HEADER_BYTES + block.label_bytes;
    let (text, harmless) = if random.chance(30) {
        cut(&block.segment, at);
        (format!("{name} cut at {at}"), false)
    } else {
        flip(&block.segment, at, random);
        (format!("a bit flipped at {at} of {name}"), labels.contains(&at))
    };
    let text = format!(
        "{text}, in the acknowledged block at {} after {}, up to {}; confirmed {confirmed}, applied {applied}",
        block.offset, block.first_lsn, block.last_lsn
    );
    Some(Damage { text, stops_at: (!harmless).then_some(block) })
}

/// A copy of a queue's files.
pub struct Kept(Vec<(PathBuf, Vec<u8>)>);

impl Kept {
    pub fn of(queue: &Path) -> Kept {
        let paths = fs::read_dir(queue).unwrap().map(|entry| entry.unwrap().path());
        Kept(paths.map(|path| (path.clone(), fs::read(&path).unwrap())).collect())
    }

    /// The files as they were, and no others.
    pub fn put_back(&self, queue: &Path) {
        for entry in fs::read_dir(queue).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for (path, content) in &self.0 {
            fs::write(path, content).unwrap();
        }
    }
}

fn cut(path: &Path, length: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

fn flip(path: &Path, at: u64, random: &mut Random) {
    let mut content = fs::read(path).unwrap();
    content[at as usize] ^= 1 << random.between(0, 7);
    fs::write(path, content).unwrap();
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
