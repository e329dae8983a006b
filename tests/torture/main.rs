//! The torture test: whole migrations while everything breaks, and then every row compared by SQL of the test's own.
//!
//! ```text
//!   writers ──► source ◄── proxy ◄── walferry ──► proxy ──► target
//!                 ▲          ▲           ▲          ▲          ▲
//!                 └──────────┴── faults, from the seed ────────┘
//! ```
//!
//! From one seed come the schema, what each writer decides, and the faults; the interleaving is the machine's, so a seed that
//! failed may have to be run more than once. `make torture SEED=7 MINUTES=30` runs seed after seed from 7 on.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod compare;
mod damage;
mod disk;
mod faults;
mod process;
mod proxy;
mod queue_disk;
mod random;
mod regression;
mod round;
mod schema;
mod stalled;
#[allow(dead_code)] // Shared with other tests, which use more of it.
#[path = "../support/mod.rs"]
mod support;
mod writers;

use std::time::{Duration, Instant};

use faults::Counts;
use round::{Size, Summary};

/// Of the fixed seeds: as much as a test run can bear.
const SMALL: Size = Size { fault_time: Duration::from_secs(20), huge_rows: 60_000 };
const LARGE: Size = Size { fault_time: Duration::from_secs(50), huge_rows: 500_000 };

fn one(seed: u64, size: Size) -> Result<Summary, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(round::run(seed, size));
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

fn fixed(seed: u64) {
    match one(seed, SMALL) {
        Ok(summary) => println!("{summary}"),
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn nothing_is_lost_or_doubled_with_seed_1() {
    fixed(1);
}

#[test]
fn nothing_is_lost_or_doubled_with_seed_2() {
    fixed(2);
}

#[test]
fn nothing_is_lost_or_doubled_with_seed_3() {
    fixed(3);
}

#[test]
fn nothing_is_lost_or_doubled_with_seed_4() {
    fixed(4);
}

/// `make torture`: seeds from SEED on, for MINUTES or ROUNDS, and a summary of all.
#[test]
#[ignore = "runs for as long as it is told to: make torture SEED=1 MINUTES=10"]
fn hunt() {
    let number =
        |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse::<u64>().unwrap());
    let begun = Instant::now();
    let first = number("SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let minutes = number("MINUTES");
    let rounds = number("ROUNDS").unwrap_or(if minutes.is_some() { u64::MAX } else { 1 });
    let end = minutes.map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    let size = Size {
        fault_time: number("FAULT_SECONDS").map_or(LARGE.fault_time, Duration::from_secs),
        huge_rows: number("HUGE_ROWS").unwrap_or(LARGE.huge_rows),
    };
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for seed in first..first.saturating_add(rounds) {
        if end.is_some_and(|end| Instant::now() > end) {
            break;
        }
        match one(seed, size) {
            Ok(summary) => {
                println!("{summary}");
                done.push(summary);
            }
            Err(failure) => {
                println!("seed {seed} FAILED: {failure}\n");
                failed.push(seed);
            }
        }
    }
    let sum = |of: fn(&Summary) -> u64| done.iter().map(of).sum::<u64>();
    let mut faults = Counts::default();
    done.iter().for_each(|summary| faults.merge(&summary.faults));
    println!(
        "{} seeds passed ({first}..) in {:.0} s: {} kills, {} SIGTERMs, {faults}, {} disk calls spoilt, {} transactions; failed seeds: {failed:?}",
        done.len(),
        begun.elapsed().as_secs_f64(),
        sum(|summary| summary.kills),
        sum(|summary| summary.stops),
        sum(|summary| summary.disk_hits),
        sum(|summary| summary.committed),
    );
    assert!(failed.is_empty(), "failed seeds: {failed:?}");
}
