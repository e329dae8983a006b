#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walferry::fuzzing::queue_recovery(bytes));
