//! The pictures of the documentation: page and terminal in each phase of one migration. Made again by `scripts/pictures.sh`.
//!
//! The view in the terminal is the program's own, on a pseudo terminal; a browser paints what stands there. The servers are called as no
//! machine is: by `hostaddr`, through a port that is passed on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::screen::{Screen, Terminal};
use crate::support::browser::Browser;
use crate::support::process::Running;
use crate::support::{self, Migration, Servers, tools};

/// Pixels of a cell: as high as the font's blocks, so that they touch.
const WIDTH: usize = 9;
const HEIGHT: usize = 17;

/// A shop that is neither small nor large.
const SHOP: &str = "
    CREATE TABLE customers (id bigserial PRIMARY KEY, name text NOT NULL, city text, since date DEFAULT current_date);
    CREATE TABLE products (id bigserial PRIMARY KEY, title text NOT NULL, price numeric(9,2), stock int DEFAULT 1000);
    CREATE TABLE orders (id bigserial PRIMARY KEY, customer bigint REFERENCES customers, placed timestamptz DEFAULT now(), state text DEFAULT 'new');
    CREATE TABLE order_lines (order_id bigint REFERENCES orders, line int, product bigint, amount int, price numeric(9,2), PRIMARY KEY (order_id, line));
    CREATE TABLE payments (id bigserial PRIMARY KEY, order_id bigint, cents bigint, at timestamptz DEFAULT now(), note text);
    CREATE TABLE sessions (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), customer bigint, data jsonb);
    INSERT INTO customers (name, city) SELECT 'customer ' || g, 'city ' || g % 97 FROM generate_series(1, 60000) g;
    INSERT INTO products (title, price) SELECT repeat('product ', 5) || g, g % 300 FROM generate_series(1, 8000) g;
    INSERT INTO orders (customer) SELECT 1 + g % 60000 FROM generate_series(1, 150000) g;
    INSERT INTO order_lines SELECT 1 + g / 3, 1 + g % 3, 1 + g % 8000, 1 + g % 4, g % 300 FROM generate_series(0, 449999) g;
    INSERT INTO payments (order_id, cents, note) SELECT g, g % 9000, repeat('paid ', 12) FROM generate_series(1, 150000) g;
    INSERT INTO sessions (customer, data) SELECT g, jsonb_build_object('cart', repeat(md5(g::text), 8)) FROM generate_series(1, 60000) g;
    CREATE INDEX ON orders (customer); CREATE INDEX ON payments (order_id); CREATE INDEX ON order_lines (product); ANALYZE";

const ORDER: &str = "
    WITH placed AS (INSERT INTO orders (customer) VALUES (1 + floor(random() * 60000)) RETURNING id)
        INSERT INTO order_lines SELECT id, n, 1 + floor(random() * 8000), 1, 9.99 FROM placed, generate_series(1, 3) n;
    UPDATE products SET stock = stock - 1 WHERE id = 1 + floor(random() * 8000);
    INSERT INTO payments (order_id, cents, note) VALUES (1, 999, 'paid')";

/// Passes connections to an address on to a server's port.
async fn pass_on(address: &'static str, port: u16) -> JoinSet<()> {
    let listener = TcpListener::bind(address).await.unwrap_or_else(|error| panic!("{address}: {error}"));
    let mut passing = JoinSet::new();
    passing.spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    passing
}

/// Customers who order, on whichever server takes it.
fn customers(urls: [String; 2], stop: &Arc<AtomicBool>) -> JoinSet<()> {
    let mut sessions = JoinSet::new();
    for _ in 0..3 {
        let (urls, stop) = (urls.clone(), Arc::clone(stop));
        sessions.spawn(async move {
            for url in urls.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok((client, connection)) = tokio_postgres::connect(url, tokio_postgres::NoTls).await {
                    tokio::spawn(connection);
                    while !stop.load(Ordering::Relaxed) && client.batch_execute(ORDER).await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(12)).await;
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    sessions
}

/// All that is looked at while the migration goes on.
struct Camera {
    directory: PathBuf,
    light: Browser,
    dark: Browser,
    phone: Browser,
    terminal: Terminal,
}

impl Camera {
    async fn take(&self, phase: &str, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        self.light.keep_screenshot(&format!("page-{phase}"));
        if ["ready", "copying"].contains(&phase) {
            self.dark.keep_screenshot(&format!("page-{phase}-dark"));
            self.phone.keep_screenshot(&format!("page-{phase}-phone"));
        }
        let name = format!("terminal-{phase}");
        let (file, screen) = (self.directory.join(format!("{name}.html")), self.terminal.screen());
        std::fs::write(&file, html(&screen)).unwrap();
        let (width, height) = (screen.lines[0].len() * WIDTH + 40, screen.lines.len() * HEIGHT + 40);
        let painted = Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"])
            .arg(format!("--window-size={width},{height}"))
            .arg(format!("--screenshot={}", self.directory.join(format!("{name}.png")).display()))
            .arg(format!("file://{}", file.display()))
            .output()
            .unwrap();
        assert!(painted.status.success(), "{}", String::from_utf8_lossy(&painted.stderr));
        std::fs::remove_file(file).unwrap();
    }
}

fn colour(colour: Option<u8>) -> &'static str {
    match colour {
        Some(1 | 9) => "#ff7b72",
        Some(2 | 10) => "#56d364",
        Some(3 | 11) => "#e3b341",
        Some(4 | 12) => "#6cb6ff",
        Some(5 | 13) => "#d2a8ff",
        Some(6 | 14) => "#39c5cf",
        Some(8) => "#7d8590",
        _ => "#e6edf3",
    }
}

fn html(screen: &Screen) -> String {
    let mut cells = String::new();
    for (y, line) in screen.lines.iter().enumerate() {
        for (x, cell) in line.iter().enumerate().filter(|(_, cell)| cell.symbol != ' ') {
            let weight = if cell.bold { ";font-weight:700" } else { "" };
            let symbol = cell.symbol.to_string().replace('&', "&amp;").replace('<', "&lt;");
            let (left, top, colour) = (x * WIDTH, y * HEIGHT, colour(cell.colour));
            // Each in a place of its own, so that every line stands where it would on a terminal.
            cells.push_str(&format!("<i style=\"left:{left}px;top:{top}px;color:{colour}{weight}\">{symbol}</i>"));
        }
    }
    format!(
        "<!doctype html><meta charset=utf-8><style>body{{margin:0;background:#0d1117}}div{{position:absolute;left:20px;top:20px}}\
         i{{position:absolute;width:{WIDTH}px;height:{HEIGHT}px;font:15px/{HEIGHT}px 'DejaVu Sans Mono',monospace;white-space:pre}}</style><div>{cells}</div>"
    )
}

async fn is(migration: &Migration, running: &mut Running, phase: &str) {
    migration.wait_for_phase(running, phase).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it makes the pictures of the documentation: scripts/pictures.sh"]
async fn of_every_phase() {
    let directory = PathBuf::from(std::env::var_os("SCREENSHOTS").expect("SCREENSHOTS says where to"));
    let (Some(driver), Some(_)) = (tools::program("chromedriver"), tools::program("chromium")) else { return };
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let real = [migration.source_url.clone(), migration.target_url.clone()];
    for url in &real {
        support::connect(url).await.batch_execute("CREATE ROLE admin SUPERUSER LOGIN").await.unwrap();
    }
    migration.source().await.batch_execute(SHOP).await.unwrap();
    let _source = pass_on("127.0.0.2:5432", servers.source.port()).await;
    let _target = pass_on("127.0.0.3:5432", servers.target.port()).await;
    migration.source_url = "host=old-server hostaddr=127.0.0.2 port=5432 user=admin dbname=shop".into();
    migration.target_url = "host=new-server hostaddr=127.0.0.3 port=5432 user=admin dbname=shop".into();
    migration.state = "shop".into();
    let stop = Arc::new(AtomicBool::new(false));
    let mut customers = customers(real.clone(), &stop);

    let dump = support::hold_pg_dump(&mut migration);
    let careful =
        ["--http-addr", "127.0.0.1:9617", "--queue-max-bytes", "20GiB", "--copy-rate", "3MiB", "--copy-jobs", "3"];
    let mut running = migration.migrate(&careful);
    dump.is_reached().await;
    let files = migration.files();
    let program = Path::new(env!("CARGO_BIN_EXE_walferry")).display();
    let watch = format!("cd '{}' && '{program}' status --watch --dir shop", files.display());
    let camera = Camera {
        directory,
        light: Browser::start(&driver, &files, 1280, "light").await,
        dark: Browser::start(&driver, &files, 1280, "dark").await,
        phone: Browser::start(&driver, &files, 390, "light").await,
        terminal: Terminal::start(&watch, &[("LC_ALL", "C.UTF-8")], &files),
    };
    for browser in [&camera.light, &camera.dark, &camera.phone] {
        browser.open("http://127.0.0.1:9617/");
    }
    camera.take("preparing", 6).await;
    dump.release();

    is(&migration, &mut running, "copying").await;
    camera.take("copying", 16).await;
    migration.with_directory("tune", &["--copy-rate", "off"]).await;
    is(&migration, &mut running, "following").await;
    migration.with_directory("pause", &["apply"]).await;
    camera.take("paused", 20).await;
    migration.with_directory("resume", &[]).await;
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let verified = migration.with_directory("verify", &[]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
    camera.take("ready", 35).await;

    let slow = ["--yes", "--on-fence", "sleep 8", "--max-write-stall", "25s"];
    let cutover = migration.start("cutover", &slow);
    is(&migration, &mut running, "cutting_over").await;
    camera.take("cutting-over", 4).await;
    let cutover = cutover.wait().await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    let there = |status: &serde_json::Value| status["direction"] == "back" && status["ready_to_cutover"] == true;
    migration.wait_for_status(&mut running, "the way back", there).await;
    camera.take("cut-over", 20).await;

    // Somebody writes to the server that was left.
    let old = support::connect(&real[0]).await;
    old.batch_execute("SET default_transaction_read_only = off").await.unwrap();
    old.batch_execute("INSERT INTO payments (id, note) SELECT max(id) + 60, 'by hand' FROM payments").await.unwrap();
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    camera.take("failed", 8).await;
    stop.store(true, Ordering::Relaxed);
    while customers.join_next().await.is_some() {}
}
