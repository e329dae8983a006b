//! The comparison as a picture: a bar for each case, as long as walferry is faster than its peer.

use std::fmt::Write as _;

use crate::results::{Bar, Row};

const WIDTH: u32 = 1160;
/// Where the bars begin, and how long the longest is.
const LEFT: f64 = 700.0;
const LENGTH: f64 = 360.0;
const LINE: u32 = 26;
const TOP: u32 = 64;

/// One line for each row that has a peer. Colours are such that both light and dark pages can be behind it.
pub fn svg(rows: &[Row]) -> String {
    let compared: Vec<(&Row, f64)> = rows
        .iter()
        .filter_map(|row| Some((row, row.speed.as_ref()?.median())))
        .filter(|(_, speed)| speed.is_finite())
        .collect();
    let longest = compared.iter().map(|(row, speed)| speed.max(least(row).unwrap_or(1.0))).fold(2.0, f64::max);
    let scale = LENGTH / longest;
    let bottom = TOP + LINE * compared.len() as u32;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#888\">\n\
         <text x=\"16\" y=\"24\" font-size=\"15\">How many times as fast as its peer walferry is</text>\n\
         <text x=\"16\" y=\"44\">longer is better; the line is the peer, the mark is the bar; green where it is reached</text>\n",
        bottom + 16
    );
    for (place, (row, speed)) in (0u32..).zip(&compared) {
        let y = TOP + LINE * place;
        let colour = match row.reached() {
            Some(true) => "#2e9e5b",
            Some(false) => "#d9822b",
            None => "#6b8fb3",
        };
        let peer = row.peer.as_ref().map_or("", |(name, _)| name.as_str());
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} {} / {}</text>\n\
             <rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"16\" rx=\"2\" fill=\"{colour}\"/>\n\
             <text x=\"{:.1}\" y=\"{}\">{speed:.2} ×</text>",
            LEFT - 8.0,
            y + 13,
            row.id,
            escaped(&row.case),
            escaped(peer),
            y + 1,
            speed * scale,
            LEFT + speed.max(least(row).unwrap_or(0.0)) * scale + 6.0,
            y + 13,
        );
        if let Some(least) = least(row) {
            let x = LEFT + least * scale;
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"#888\" stroke-width=\"3\"/>",
                y - 1,
                y + 19
            );
        }
    }
    let x = LEFT + scale;
    let _ = writeln!(
        out,
        "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#888\" stroke-dasharray=\"3 3\"/>",
        TOP - 8
    );
    out.push_str("</svg>\n");
    out
}

/// The speed that is asked for.
fn least(row: &Row) -> Option<f64> {
    match row.bar {
        Bar::Speed(least) => Some(least),
        Bar::AtMost(_) | Bar::AtLeast(_) | Bar::Reported => None,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
