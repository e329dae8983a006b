//! A plot as inline SVG: no script, no colour of its own but what the page's style gives its classes.

use std::fmt::Write;

use super::html::escape;
use crate::observe::wall_clock::rfc3339;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 190.0;
/// Room for the numbers at the left and the times below.
const LEFT: f64 = 78.0;
const BOTTOM: f64 = 26.0;
const TOP: f64 = 10.0;
/// As many points are drawn.
const POINTS_MAX: usize = 360;

/// One line: milliseconds since 1970 and value, in order.
pub(super) type Series = Vec<(i64, Option<f64>)>;

/// A plot with a title, a unit's writer for its axis, and times at which something happened.
pub(super) fn plot(
    id: &str,
    title: &str,
    series: &Series,
    unit: impl Fn(f64) -> String,
    marks: &[(i64, String)],
) -> String {
    let known: Vec<f64> = series.iter().filter_map(|(_, value)| *value).collect();
    let (Some((begin, _)), Some((end, _))) = (series.first(), series.last()) else { return String::new() };
    if known.is_empty() {
        return String::new();
    }
    let most = known.iter().copied().fold(0.0, f64::max);
    // Bytes are shown by powers of two.
    let top = if unit(1024.0).contains("KiB") { most.max(1.0).log2().ceil().exp2() } else { nice(most) };
    let span = (end - begin).max(1) as f64;
    let x = |time: i64| LEFT + (time - begin) as f64 / span * (WIDTH - LEFT - 8.0);
    let y = |value: f64| TOP + (1.0 - value / top) * (HEIGHT - TOP - BOTTOM);
    let said = format!("{title}: at most {}, from {} to {}", unit(most), time(*begin), time(*end));
    let mut svg = format!(
        "<figure><figcaption id=\"{id}\">{} <span class=\"muted\">at most {}</span></figcaption>\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escape(title),
        escape(&unit(most)),
        escape(&said)
    );
    for part in [0.0, 0.5, 1.0] {
        let at = y(top * part);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            at + 4.0,
            escape(&unit(top * part))
        );
    }
    for (at, label) in marks.iter().filter(|(at, _)| (begin..=end).contains(&at)) {
        let _ = write!(
            svg,
            "<line class=\"mark\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{1}\"><title>{2}</title></line>",
            x(*at),
            HEIGHT - BOTTOM,
            escape(label)
        );
    }
    for line in lines(series) {
        let points: Vec<String> =
            line.iter().map(|(time, value)| format!("{:.1},{:.1}", x(*time), y(*value))).collect();
        let _ = match points.as_slice() {
            [one] => {
                let (x, y) = one.split_once(',').unwrap_or((one, "0"));
                write!(svg, "<circle class=\"dot\" r=\"2.5\" cx=\"{x}\" cy=\"{y}\"/>")
            }
            _ => write!(svg, "<polyline class=\"line\" points=\"{}\"/>", points.join(" ")),
        };
    }
    let _ = writeln!(
        svg,
        "<text class=\"tick\" x=\"{LEFT}\" y=\"{0}\">{1}</text><text class=\"tick\" x=\"{2}\" y=\"{0}\" text-anchor=\"end\">{3}</text>\
         </svg></figure>",
        HEIGHT - 6.0,
        escape(&time(*begin)),
        WIDTH - 2.0,
        escape(&time(*end))
    );
    svg
}

/// Of many points the highest of each stretch; broken where nothing is known or nobody looked.
fn lines(series: &Series) -> Vec<Vec<(i64, f64)>> {
    let stretch = series.len().div_ceil(POINTS_MAX).max(1);
    let thinned: Vec<(i64, Option<f64>)> = series
        .chunks(stretch)
        .filter_map(|chunk| {
            let highest =
                chunk.iter().filter_map(|(time, value)| Some((*time, (*value)?))).max_by(|a, b| a.1.total_cmp(&b.1));
            highest
                .map_or_else(|| chunk.first().map(|(time, _)| (*time, None)), |(time, value)| Some((time, Some(value))))
        })
        .collect();
    let mut apart: Vec<i64> = thinned.windows(2).map(|two| two[1].0 - two[0].0).collect();
    apart.sort_unstable();
    let usual = apart.get(apart.len() / 2).copied().unwrap_or(1000).max(1000);
    let mut lines: Vec<Vec<(i64, f64)>> = vec![Vec::new()];
    let mut before = None;
    for (time, value) in thinned {
        let is_gap = before.is_some_and(|before| time - before > 5 * usual);
        if (is_gap || value.is_none()) && lines.last().is_some_and(|line| !line.is_empty()) {
            lines.push(Vec::new());
        }
        if let (Some(value), Some(line)) = (value, lines.last_mut()) {
            line.push((time, value));
        }
        before = Some(time);
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// A round number that is not below it.
fn nice(most: f64) -> f64 {
    if most <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(most.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|round| *round >= most).unwrap_or(most)
}

/// `11-21 02:17:10`.
fn time(milliseconds: i64) -> String {
    let text = rfc3339(milliseconds);
    text.get(5..19).map_or(text.clone(), |time| time.replace('T', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_breaks_where_nothing_is_known() {
        let second = |at: i64, value| (at * 1000, value);
        let series = vec![
            second(0, Some(1.0)),
            second(1, Some(2.0)),
            second(2, None),
            second(3, Some(1.0)),
            second(900, Some(7.0)),
        ];
        let lines = lines(&series);
        assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 1]);
        let svg = plot("a", "<b>", &series, |value| format!("{value}"), &[(1000, "\"x\"".into())]);
        assert!(svg.contains("&lt;b&gt;") && svg.contains("&quot;x&quot;") && svg.contains("at most 7"), "{svg}");
        assert_eq!((nice(0.0), nice(3.0), nice(1000.0)), (1.0, 5.0, 1000.0));
    }
}
