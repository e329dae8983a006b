//! The values of options: sizes, durations, rates, moments, addresses.

use std::net::SocketAddr;
use std::time::Duration;

use crate::care::tune::Limit;
use crate::queue;
use crate::timescale::declaration::{self, Hypertable};

/// Where HTTP is served, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpAddress(pub Option<SocketAddr>);

/// What a file of `--hypertables` declares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hypertables(pub Vec<Hypertable>);

pub(super) fn parse_hypertables(path: &str) -> Result<Hypertables, String> {
    declaration::read(std::path::Path::new(path)).map(Hypertables).map_err(|error| {
        let next = error.next_step().map_or(String::new(), |next| format!("\n{next}"));
        format!("{error}{next}")
    })
}

pub(super) fn parse_http_address(text: &str) -> Result<HttpAddress, String> {
    if text == "off" {
        return Ok(HttpAddress(None));
    }
    let address =
        text.parse().map_err(|_| "expected an address and a port such as 127.0.0.1:9617, or `off`".to_owned())?;
    Ok(HttpAddress(Some(address)))
}

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=1000) => Ok(number),
        _ => Err("expected a number from 1 to 1000".into()),
    }
}

/// Bytes with a unit: `512MiB`, `2GB`, `1048576`.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err("expected a size such as 512MiB or 2GiB".into()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a size such as 512MiB or 2GiB".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "that is too large".to_owned())
}

/// What the queue may take: no less than it can work with.
pub(super) fn parse_queue_size(text: &str) -> Result<u64, String> {
    let least = queue::Options::MAX_BYTES_LEAST;
    match parse_bytes(text)? {
        bytes if bytes >= least => Ok(bytes),
        _ => Err(format!("the queue could never make room in that; {}MiB is the least", least >> 20)),
    }
}

/// A share of a whole: `10%`, `0.5`.
pub(super) fn parse_percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').trim_end().parse() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent),
        _ => Err("expected a percentage such as 10%".to_owned()),
    }
}

/// Bytes a second, or `off`.
pub(super) fn parse_rate(text: &str) -> Result<Limit<u64>, String> {
    match text {
        "off" => Ok(Limit::Off),
        _ => match parse_bytes(text)? {
            0 => Err("nothing would be copied; `walferry pause copy` holds the copy".to_owned()),
            rate => Ok(Limit::Max(rate)),
        },
    }
}

/// How far a standby may be behind, or `off`.
pub(super) fn parse_lag(text: &str) -> Result<Limit<Duration>, String> {
    match text {
        "off" => Ok(Limit::Off),
        _ => match parse_duration(text)? {
            Duration::ZERO => Err("every standby lags a little; `off` lets it lag".to_owned()),
            lag => Ok(Limit::Max(lag)),
        },
    }
}

/// A duration with a unit: `500ms`, `30s`, `5m`, `1h`, `2d`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a duration such as 500ms, 30s, 5m or 1h".to_owned();
    let (number, unit) = split_unit(text);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(expected()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(|| "that is too long".to_owned())
}

fn split_unit(text: &str) -> (&str, &str) {
    let at = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.trim_start())
}

/// A moment: milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(pub i64);

pub(super) fn parse_time(text: &str) -> Result<Time, String> {
    let time = crate::observe::wall_clock::parse_rfc3339(text);
    time.map(Time).ok_or_else(|| "expected a time such as 2026-11-21T02:00:00Z or 2026-11-21T03:00:00+01:00".to_owned())
}

/// `old=new`: two names of roles, as they are and without quotes.
pub(super) fn parse_role_map(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("it has to be OLD=NEW, with the names of two roles".to_owned()),
    }
}

/// Two names of a schema: the one that it has, and the one that it gets.
pub(super) fn parse_schemas(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() && old != new => Ok((old.to_owned(), new.to_owned())),
        _ => Err("two different names are expected, such as app=shop".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_have_units() {
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("17"), Ok(17));
        assert_eq!(parse_bytes("2 mb"), Ok(2 << 20));
        assert!(parse_bytes("GiB").is_err());
        assert!(parse_bytes("99999999999999TiB").is_err());
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        assert!(parse_duration("-1s").is_err());
        assert!(parse_duration("1y").is_err());
    }

    #[test]
    fn a_queue_that_could_not_make_room_is_refused_with_the_least_that_works() {
        for little in ["0", "10", "1023KiB"] {
            let refused = parse_queue_size(little).unwrap_err();
            assert!(refused.contains("1MiB is the least"), "{refused}");
        }
        assert_eq!(parse_queue_size("1MiB"), Ok(1 << 20));
        assert!(parse_queue_size("much").unwrap_err().contains("512MiB"));
    }

    #[test]
    fn a_sample_is_a_percentage() {
        assert_eq!((parse_percent("10%"), parse_percent("0.5")), (Ok(0.5 * 20.0), Ok(0.5)));
        for wrong in ["0", "101%", "-1", "NaN", "much"] {
            assert!(parse_percent(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn limits_can_be_switched_off_and_are_never_nothing() {
        assert_eq!(parse_rate("20MiB"), Ok(Limit::Max(20 << 20)));
        assert_eq!(parse_rate("off"), Ok(Limit::Off));
        assert!(parse_rate("0").unwrap_err().contains("pause copy"));
        assert_eq!(parse_lag("30s"), Ok(Limit::Max(Duration::from_secs(30))));
        assert_eq!(parse_lag("off"), Ok(Limit::Off));
        assert!(parse_lag("0s").is_err());
    }

    #[test]
    fn http_can_be_switched_off() {
        assert_eq!(parse_http_address("off"), Ok(HttpAddress(None)));
        assert!(parse_http_address("9617").is_err());
    }
}
