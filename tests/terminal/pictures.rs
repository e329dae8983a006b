//! Pictures of the view for the documentation: drawn from a running migration, painted by a browser. Only where somebody asks for them:
//! `SCREENSHOTS=directory cargo test --test terminal whole`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};
use walferry::observe::status::{Direction, Status};
use walferry::observe::watch::{Look, Shown, draw};

use crate::support::Migration;
use crate::support::process::Running;

const COLUMNS: u16 = 112;
const ROWS: u16 = 34;
/// Pixels of a row: as high as the font's blocks, so that they touch.
const HEIGHT: u32 = 17;

/// Whether somebody wants pictures: there is more to copy then.
pub fn are_wanted() -> bool {
    std::env::var_os("SCREENSHOTS").is_some()
}

/// A picture after so many seconds, so that there is something to see in the plots.
pub async fn take(migration: &Migration, running: &mut Running, shown: &mut Shown, name: &str, seconds: u32) {
    let Some(directory) = std::env::var_os("SCREENSHOTS") else { return };
    for _ in 0..seconds {
        let status = migration.wait_for_status(running, "a status", |_| true).await;
        let mut status: Status = serde_json::from_value(status).unwrap();
        let servers = [&mut status.source.description, &mut status.target.description];
        for (description, name) in
            servers.into_iter().zip(if status.direction == Direction::Back { ["new", "old"] } else { ["old", "new"] })
        {
            *description = format!("{name}.example.org:5432/shop");
        }
        shown.take(status);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut terminal = Terminal::new(TestBackend::new(COLUMNS, ROWS)).unwrap();
    terminal.draw(|frame| draw(frame, shown, Look { colour: true, unicode: true })).unwrap();
    let file = Path::new(&directory).join(format!("{name}.html"));
    std::fs::write(&file, html(terminal.backend().buffer())).unwrap();
    let painted = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"])
        .arg(format!("--window-size={},{}", u32::from(COLUMNS) * 9 + 40, u32::from(ROWS) * HEIGHT + 40))
        .arg(format!("--screenshot={}", Path::new(&directory).join(format!("{name}.png")).display()))
        .arg(format!("file://{}", file.display()))
        .output()
        .unwrap();
    assert!(painted.status.success(), "{}", String::from_utf8_lossy(&painted.stderr));
}

fn colour(colour: Color, otherwise: &'static str) -> &'static str {
    match colour {
        Color::Red => "#ff7b72",
        Color::Green => "#56d364",
        Color::Yellow => "#e3b341",
        Color::Blue => "#6cb6ff",
        Color::Magenta => "#d2a8ff",
        Color::Cyan => "#39c5cf",
        Color::DarkGray => "#7d8590",
        _ => otherwise,
    }
}

fn html(buffer: &Buffer) -> String {
    let mut rows = String::new();
    for y in 0..buffer.area.height {
        for x in 0..buffer.area.width {
            let cell = &buffer[(x, y)];
            let weight = if cell.modifier.contains(Modifier::BOLD) { ";font-weight:700" } else { "" };
            let symbol = cell.symbol().replace('&', "&amp;").replace('<', "&lt;");
            // Each in a cell of its own, so that every line stands where it would on a terminal.
            rows.push_str(&format!(
                "<i style=\"left:{}px;top:{}px;color:{}{weight}\">{symbol}</i>",
                u32::from(x) * 9,
                u32::from(y) * HEIGHT,
                colour(cell.fg, "#e6edf3")
            ));
        }
    }
    format!(
        "<!doctype html><meta charset=utf-8><style>body{{margin:0;background:#0d1117}}div{{position:absolute;left:20px;top:20px}}\
         i{{position:absolute;width:9px;height:17px;font:15px/17px 'DejaVu Sans Mono',monospace;white-space:pre;text-align:left}}</style><div>{rows}</div>"
    )
}
