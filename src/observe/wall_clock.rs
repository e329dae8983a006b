//! The time of day as RFC 3339 writes it, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, such as `2026-11-20T10:16:16.123Z`: always UTC, always milliseconds.
pub fn now_rfc3339() -> String {
    rfc3339(now_milliseconds())
}

/// Now, in milliseconds since 1970.
pub fn now_milliseconds() -> i64 {
    // A clock before 1970 is a machine without a clock; its times mean nothing anyway.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// Milliseconds since 1970 of a time as RFC 3339 writes it: `2026-11-20T23:30:00Z`, `2026-11-21T00:30:00+01:00`. `None` for anything
/// else, and for a time without its place in the world.
pub fn parse_rfc3339(text: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let separators: Vec<u8> = [4, 7, 10, 13, 16].iter().filter_map(|&at| text.as_bytes().get(at).copied()).collect();
    let are_right = separators.starts_with(b"--") && separators.ends_with(b"::") && b"Tt ".contains(&separators[2]);
    let days = days_from_civil(year, month, day);
    if !are_right || hour > 23 || minute > 59 || second > 60 || civil_from_days(days) != (year, month, day) {
        return None;
    }
    let rest = text.get(19..)?;
    let fraction = rest.strip_prefix('.').map_or(0, |digits| digits.bytes().take_while(u8::is_ascii_digit).count());
    let place = if fraction > 0 { rest.get(fraction + 1..)? } else { rest };
    let offset_minutes = match place {
        "Z" | "z" => 0,
        _ => {
            let at = text.len() - place.len();
            let sign = match place.as_bytes().first()? {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (hours, minutes) = (number(at + 1..at + 3)?, number(at + 4..at + 6)?);
            if place.len() != 6 || place.as_bytes().get(3) != Some(&b':') || hours > 23 || minutes > 59 {
                return None;
            }
            sign * (hours * 60 + minutes)
        }
    };
    let milliseconds: i64 = (0..3).fold(0, |value, at| {
        let digit = rest.as_bytes().get(at + 1).filter(|_| at < fraction).map_or(0, |digit| i64::from(digit - b'0'));
        value * 10 + digit
    });
    let seconds = ((days * 24 + hour) * 60 + minute - offset_minutes) * 60 + second;
    Some(seconds * 1000 + milliseconds)
}

/// The day, counted from 1970-01-01, of year, month and day; the other way of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Milliseconds since 1970-01-01T00:00:00Z (no leap seconds, as Unix counts) as RFC 3339, for the years 0 to 9999.
pub fn rfc3339(unix_milliseconds: i64) -> String {
    const DAY_MILLISECONDS: i64 = 86_400_000;
    let (year, month, day) = civil_from_days(unix_milliseconds.div_euclid(DAY_MILLISECONDS));
    let milliseconds = unix_milliseconds.rem_euclid(DAY_MILLISECONDS);
    let (hour, minute) = (milliseconds / 3_600_000, milliseconds / 60_000 % 60);
    let (second, millisecond) = (milliseconds / 1000 % 60, milliseconds % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millisecond:03}Z")
}

/// Year, month and day in the proleptic Gregorian calendar of a day counted from 1970-01-01.
///
/// The year is taken to begin on 1 March, so that a leap day is the last of its year; 400 years have 146,097 days.
/// From H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn civil_from_days(days_since_1970: i64) -> (i64, i64, i64) {
    let days = days_since_1970 + 719_468; // since 0000-03-01
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instants_are_written_as_rfc_3339() {
        for (milliseconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599_001, "2024-12-31T23:59:59.001Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(milliseconds), text);
            assert_eq!(parse_rfc3339(text), Some(milliseconds));
        }
    }

    #[test]
    fn a_time_is_read_with_its_place_in_the_world_and_not_without() {
        let noon = parse_rfc3339("2026-11-20T12:00:00Z");
        assert!(noon.is_some());
        for same in ["2026-11-20T13:30:00+01:30", "2026-11-20t12:00:00.000z", "2026-11-20 07:00:00-05:00"] {
            assert_eq!(parse_rfc3339(same), noon, "{same}");
        }
        assert_eq!(parse_rfc3339("2026-11-20T12:00:00.25Z"), noon.map(|noon| noon + 250));
        assert_eq!(parse_rfc3339("2026-11-20T12:00:00.1239Z"), noon.map(|noon| noon + 123));
        for wrong in [
            "2026-11-20T12:00:00",
            "2026-11-20",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-11-20T24:00:00Z",
            "2026-11-20T12:00:00+0100",
            "2026-11-20T12:00:00.Z",
            "",
            "now",
            "+026-11-20T12:00:00Z",
            "2026-11-20T12:00:00Zé",
        ] {
            assert_eq!(parse_rfc3339(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_day_of_four_hundred_years_follows_the_one_before_it() {
        let days_of = |year: i64, month: i64| match month {
            2 if (year % 4 == 0 && year % 100 != 0) || year % 400 == 0 => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for number in 0..146_097 {
            assert_eq!(civil_from_days(number), (year, month, day));
            day += 1;
            if day > days_of(year, month) {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }
}
