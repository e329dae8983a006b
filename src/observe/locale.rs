//! What the terminal can show besides ASCII, as the locale says.

use std::borrow::Cow;
use std::sync::LazyLock;

static UTF8: LazyLock<bool> = LazyLock::new(|| {
    let set = |name: &&str| std::env::var(name).ok().filter(|value| !value.is_empty());
    is_utf8(["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(set).as_deref())
});

/// Whether what is written to the terminal is taken for UTF-8: unless the locale says otherwise by name.
pub fn speaks_utf8() -> bool {
    *UTF8
}

fn is_utf8(locale: Option<&str>) -> bool {
    // Containers and services mostly have none set, and terminals that show UTF-8.
    locale.is_none_or(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// A text for people: where the locale has another character set, our own signs are replaced by what comes nearest. Names out of the databases
/// stay as they are: cut short they would be other names.
pub fn shown(text: &str) -> Cow<'_, str> {
    if speaks_utf8() || text.is_ascii() { Cow::Borrowed(text) } else { Cow::Owned(in_ascii(text)) }
}

fn in_ascii(text: &str) -> String {
    text.chars().map(|letter| ascii(letter).unwrap_or(letter)).collect()
}

/// What comes nearest to a sign of ours in ASCII, in the same room.
pub(super) fn ascii(sign: char) -> Option<char> {
    Some(match sign {
        '─' | '–' | '—' | '•' => '-',
        '│' => '|',
        '╭' | '╮' | '╰' | '╯' | '├' | '┤' => '+',
        '━' | '█' | '▇' | '▆' | '▅' => '#',
        '→' | '╸' => '>',
        '▄' | '▃' => '=',
        '▂' | '▁' => '_',
        '…' => '~',
        '·' => '.',
        '✔' => 'x',
        '●' => '*',
        '○' => 'o',
        '✘' => '!',
        '≥' => '>',
        '≤' => '<',
        ascii if ascii.is_ascii() => ascii,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locale_that_names_another_character_set_gets_ascii() {
        for (locale, utf8) in [
            (None, true),
            (Some("en_US.UTF-8"), true),
            (Some("C.utf8"), true),
            (Some("C"), false),
            (Some("POSIX"), false),
            (Some("de_DE.ISO-8859-1"), false),
        ] {
            assert_eq!(is_utf8(locale), utf8, "{locale:?}");
        }
        assert_eq!(in_ascii("a → b … größe"), "a > b ~ größe", "our signs, and nobody's names");
    }
}
