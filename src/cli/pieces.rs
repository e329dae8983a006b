//! `walferry migrate` with a range of tables is `walferry backfill`: it needs no slot, and has options of its own.

use std::ffi::OsString;

/// The options that only a backfill has.
const OF_A_RANGE: [&str; 4] = ["--tables", "--from", "--until", "--time-column"];

/// What was typed, as `backfill` where it is `migrate` with a range: then clap, the settings file and the help speak of that command.
pub fn by_pieces(mut typed: Vec<OsString>) -> Vec<OsString> {
    let is_of_range = |word: &OsString| {
        let word = word.to_string_lossy();
        OF_A_RANGE.contains(&word.split_once('=').map_or(&*word, |(option, _)| option))
    };
    // Before the command there are options of the program only, none of which has such a value.
    let command = typed.iter().position(|word| word == "migrate");
    if let Some(command) = command
        && typed[command + 1..].iter().any(is_of_range)
    {
        typed[command] = "backfill".into();
    }
    typed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrate_with_a_range_is_a_backfill_and_without_one_it_is_not() {
        let becomes = |text: &str| {
            let typed = by_pieces(text.split_whitespace().map(OsString::from).collect());
            typed.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        assert_eq!(
            becomes("walferry --log-format json migrate --dir d --tables public.t --until=2026-01-01"),
            "walferry --log-format json backfill --dir d --tables public.t --until=2026-01-01"
        );
        assert_eq!(becomes("walferry migrate --from 5"), "walferry backfill --from 5");
        for same in ["walferry migrate --dir d", "walferry verify --tables a.b", "walferry migrate --include-table t"] {
            assert_eq!(becomes(same), same);
        }
    }
}
