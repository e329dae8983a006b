#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walferry::fuzzing::connection_string(bytes));
