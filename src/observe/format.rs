//! Sizes, times and counts as people read them.

/// Bytes with a binary unit: `0 B`, `1.5 MiB`, `20.0 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be written as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Bytes per second: `85.0 MiB/s`.
pub fn size_rate(bytes_per_second: f64) -> String {
    format!("{}/s", size(bytes_per_second.max(0.0) as u64))
}

/// Seconds in the two units that matter: `45 ms`, `12.3 s`, `3m 05s`, `1h 02m`, `2d 03h`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds < 0.9995 {
        return format!("{:.0} ms", seconds * 1000.0);
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {:02}s", whole % 60),
        (0, _) => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours:02}h"),
    }
}

/// A count with its thousands apart: `12,345,678`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count and its noun: `1 table`, `2 tables`.
pub fn counted(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {noun}{ending}", count(number))
}

/// How much of a whole is done, in whole percent: 100 only when all is.
pub fn percent(done: u64, total: u64) -> u64 {
    if done >= total {
        return 100;
    }
    // total > done ≥ 0 here, so it is not 0; u128 so that petabytes do not overflow.
    (u128::from(done) * 100 / u128::from(total)) as u64
}

/// Text from a database or a server, safe to print: no control characters, so no escape sequences.
pub fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        let sizes = [0, 1023, 1024, 1536, 1 << 20, (1 << 30) - 1, 20 << 30, u64::MAX];
        let texts = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "20.0 GiB", "16.0 EiB"];
        assert_eq!(sizes.map(size), texts);
        assert_eq!(size_rate(2048.0), "2.0 KiB/s");
    }

    #[test]
    fn durations_have_the_two_units_that_matter() {
        let seconds = [0.0, 0.0454, 0.9999, 12.34, 59.96, 185.0, 3720.0, 3599.7, 183_600.0, -1.0];
        let texts = ["0 ms", "45 ms", "1.0 s", "12.3 s", "1m 00s", "3m 05s", "1h 02m", "1h 00m", "2d 03h", "0 ms"];
        assert_eq!(seconds.map(duration), texts);
    }

    #[test]
    fn counts_have_their_thousands_apart() {
        assert_eq!([0, 999, 1000, 12_345_678].map(count), ["0", "999", "1,000", "12,345,678"]);
        assert_eq!([0, 1, 2].map(|number| counted(number, "table")), ["0 tables", "1 table", "2 tables"]);
    }

    #[test]
    fn a_hundred_percent_is_all_of_it() {
        assert_eq!([percent(0, 0), percent(999, 1000), percent(1000, 1000), percent(2, 1)], [100, 99, 100, 100]);
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
    }

    #[test]
    fn a_name_from_a_database_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc\u{9b}ü"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}ü");
    }
}
