//! Text that fits, and what a terminal cannot show left away.

use ratatui::buffer::Buffer;
use ratatui::style::Color;
use ratatui::text::Span;

use crate::observe::format::printable;
use crate::observe::locale::{ascii, speaks_utf8};

/// What the terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Colours: not where `NO_COLOR` is set.
    pub colour: bool,
    /// More than ASCII: not in a locale of another character set.
    pub unicode: bool,
}

impl Look {
    /// As the environment has it.
    pub fn detect() -> Look {
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Look { colour, unicode: speaks_utf8() }
    }

    /// Takes away what is not to be shown. Bold and reversed text stays.
    pub(super) fn apply(self, buffer: &mut Buffer) {
        for cell in &mut buffer.content {
            if !self.colour {
                (cell.fg, cell.bg) = (Color::Reset, Color::Reset);
            }
            if !self.unicode && !cell.symbol().is_ascii() {
                let letter = cell.symbol().chars().next().map_or(' ', |sign| ascii(sign).unwrap_or('?'));
                cell.set_char(letter);
            }
        }
    }
}

/// Columns that a text takes.
pub(super) fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// A text from anywhere in at most so many columns; its end is cut off.
pub(super) fn cut(text: &str, columns: usize) -> String {
    let text = printable(text);
    if width(&text) <= columns {
        return text;
    }
    let mut kept = String::new();
    let mut taken = 1;
    for letter in text.chars() {
        taken += width(letter.encode_utf8(&mut [0; 4]));
        if taken > columns {
            break;
        }
        kept.push(letter);
    }
    if columns > 0 {
        kept.push('…');
    }
    kept
}

/// A name in at most so many columns: its end tells more than its middle.
pub(super) fn cut_middle(text: &str, columns: usize) -> String {
    let text = printable(text);
    if width(&text) <= columns || columns < 3 {
        return cut(&text, columns);
    }
    let head = (columns - 1) / 2;
    let fits = |letters: &mut dyn Iterator<Item = char>, columns: usize| {
        let mut taken = 0;
        letters
            .take_while(|letter| {
                taken += width(letter.encode_utf8(&mut [0; 4]));
                taken <= columns
            })
            .collect::<Vec<char>>()
    };
    let begin = fits(&mut text.chars(), head);
    let end = fits(&mut text.chars().rev(), columns - 1 - head);
    begin.into_iter().chain(['…']).chain(end.into_iter().rev()).collect()
}

/// A text filled up to so many columns.
pub(super) fn filled(text: &str, columns: usize) -> String {
    format!("{text}{}", " ".repeat(columns.saturating_sub(width(text))))
}

/// A text from anywhere in lines of at most so many columns; a longer word is cut in pieces.
pub(super) fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(1);
    let mut lines: Vec<String> = Vec::new();
    for word in printable(text).split_whitespace() {
        let mut word = word.to_owned();
        match lines.last_mut() {
            Some(line) if width(line) + 1 + width(&word) <= columns => {
                line.push(' ');
                line.push_str(&word);
                continue;
            }
            _ => {}
        }
        while width(&word) > columns {
            let mut taken = 0;
            let at = word.char_indices().find(|(_, letter)| {
                taken += width(letter.encode_utf8(&mut [0; 4]));
                taken > columns
            });
            let rest = word.split_off(at.map_or(word.len(), |(at, _)| at.max(1)));
            lines.push(std::mem::replace(&mut word, rest));
        }
        lines.push(word);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_fit_whatever_is_in_them() {
        for text in ["short", "a much longer name than fits", "表の名前はとても長いです", "a\x1b[2Jb", ""] {
            for columns in 0..20 {
                assert!(width(&cut(text, columns)) <= columns, "{text} in {columns}");
                assert!(width(&cut_middle(text, columns)) <= columns, "{text} in {columns}");
                assert!(
                    wrapped(text, columns.max(2)).iter().all(|line| width(line) <= columns.max(2)),
                    "{text} in {columns}"
                );
            }
        }
        assert_eq!(cut_middle("public.a_long_table_name_2026", 15), "public.…me_2026");
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
    }
}
