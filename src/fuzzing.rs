//! The bodies of the fuzz targets in `fuzz/`, each one function of bytes that panics when a promise is broken. The tests below
//! call the same functions with the corpus and with mutations of it, so that every test run fuzzes a little.

use crate::decode::{Message, Tuple};

pub use crate::connection::fuzz::any_bytes as connection_string;
pub use crate::queue::fuzz::any_bytes as queue_recovery;

/// Reads everything a message of the stream offers, and holds it to what its lengths promise.
///
/// # Panics
/// When that does not hold, or a refusal says nothing.
pub fn decode(bytes: &[u8]) {
    let check = |tuple: &Tuple<'_>| assert_eq!(tuple.columns().count(), tuple.len());
    match crate::decode::decode(bytes) {
        Ok(Message::Insert { new, .. }) => check(&new),
        Ok(Message::Update { old, new, .. }) => {
            old.iter().for_each(|old| check(&old.tuple()));
            check(&new);
        }
        Ok(Message::Delete { old, .. }) => check(&old.tuple()),
        Ok(Message::Relation(relation)) => assert_eq!(relation.columns().len(), relation.columns().count()),
        Ok(Message::Truncate { relids, .. }) => assert_eq!(relids.len(), relids.clone().count()),
        Ok(_) => {}
        Err(error) => assert!(error.offset() <= bytes.len() && !error.to_string().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// How many mutated inputs each target gets; `FUZZ_CASES=1000000 cargo test --release --lib fuzzing` for a long run.
    const CASES: u64 = 3000;

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut paths: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{} is empty", directory.display());
        paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
    }

    /// A xorshift generator: a seed is all that has to be told when a case fails.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % (limit.max(1) as u64)) as usize
        }
    }

    /// What libFuzzer does, in small: bits flipped, bytes set to telling values, pieces cut, doubled, or taken from another.
    fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
        const TELLING: [u8; 16] = [0, 1, 2, 4, 10, 0x1e, b'%', b'\'', b'\\', b':', b'@', b'=', 0x7f, 0x80, 0xfe, 0xff];
        for _ in 0..=random.below(6) {
            let at = random.below(input.len());
            let end = (at + 1 + random.below(16)).min(input.len());
            match random.below(7) {
                0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
                1 if !input.is_empty() => input[at] = TELLING[random.below(TELLING.len())],
                2 => input.insert(at, TELLING[random.below(TELLING.len())]),
                3 => input.truncate(at),
                4 if end > at => drop(input.drain(at..end)),
                5 if end > at => {
                    let piece = input[at..end].to_vec();
                    input.splice(at..at, piece);
                }
                6 => {
                    let from = random.below(other.len());
                    let piece = &other[from..(from + 1 + random.below(32)).min(other.len())];
                    input.splice(at..at, piece.iter().copied());
                }
                _ => {}
            }
        }
    }

    fn fuzz(target: &str, body: fn(&[u8])) {
        let corpus = corpus(target);
        let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
        corpus.iter().for_each(|input| body(input));
        let seed = number("FUZZ_SEED").unwrap_or(1);
        let mut random = Random((seed << 1 | 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        for case in 0..number("FUZZ_CASES").unwrap_or(CASES) {
            let mut input = corpus[random.below(corpus.len())].clone();
            mutate(&mut input, &corpus[random.below(corpus.len())].clone(), &mut random);
            let outcome = std::panic::catch_unwind(|| body(&input));
            assert!(outcome.is_ok(), "case {case} of FUZZ_SEED={seed} breaks {target}: {input:?}");
        }
    }

    #[test]
    fn nothing_that_the_stream_can_bring_breaks_the_decoder() {
        fuzz("decode", decode);
    }

    #[test]
    fn nothing_that_is_on_the_disk_breaks_the_queues_recovery() {
        fuzz("queue_recovery", queue_recovery);
    }

    #[test]
    fn nothing_that_is_given_as_a_connection_string_breaks_its_parser_or_shows_the_password() {
        fuzz("connection_string", connection_string);
    }

    /// `cargo test --lib -- --ignored writes_the_queues_corpus`, when its format changes.
    #[test]
    #[ignore = "changes the corpus"]
    fn writes_the_queues_corpus() {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/queue_recovery");
        for transactions in [0, 1, 3, 9] {
            let input = crate::queue::fuzz::as_input(transactions);
            std::fs::write(directory.join(format!("segments-of-{transactions}-transactions")), input).unwrap();
        }
    }
}
