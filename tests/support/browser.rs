//! A real browser, for pages.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{http, until};

/// A headless browser, led by the WebDriver protocol; ended when it is dropped.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() && !std::thread::panicking() {
            http::send("DELETE", self.port, &format!("/session/{}", self.session), "");
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    pub async fn start(driver: &Path, files: &Path, width: u32, scheme: &str) -> Browser {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(driver)
            .arg(format!("--port={port}"))
            .env("HOME", files)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut browser = Browser { driver: child, port, session: String::new() };
        until("the browser's driver listens", || async {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(())
        })
        .await;
        let profile = files.join(format!("browser-{width}-{scheme}"));
        let arguments = [
            "--headless".to_owned(),
            "--no-sandbox".into(),
            "--disable-gpu".into(),
            "--disable-dev-shm-usage".into(),
            "--no-first-run".into(),
            "--disable-background-networking".into(),
            "--disable-component-update".into(),
            "--disable-sync".into(),
            format!("--window-size={width},900"),
            format!("--user-data-dir={}", profile.display()),
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let answer: Value = serde_json::from_str(&http::send("POST", port, "/session", &wanted.to_string())).unwrap();
        browser.session = answer["value"]["sessionId"].as_str().unwrap().to_owned();
        let emulated = json!({"cmd": "Emulation.setEmulatedMedia",
            "params": {"features": [{"name": "prefers-color-scheme", "value": scheme}]}});
        browser.ask("goog/cdp/execute", &emulated);
        let size = json!({"cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}});
        browser.ask("goog/cdp/execute", &size);
        browser
    }

    pub fn ask(&self, path: &str, json: &Value) -> Value {
        let answer = http::send("POST", self.port, &format!("/session/{}/{path}", self.session), &json.to_string());
        serde_json::from_str::<Value>(&answer).unwrap()["value"].take()
    }

    pub fn open(&self, url: &str) {
        self.ask("url", &json!({"url": url}));
    }

    /// What a script in the page answers with.
    pub fn run(&self, script: &str) -> Value {
        self.ask("execute/sync", &json!({"script": script, "args": []}))
    }

    pub fn text(&self, id: &str) -> String {
        let text = self.run(&format!("return document.getElementById('{id}').innerText"));
        text.as_str().unwrap_or_default().to_owned()
    }

    pub async fn shows(&self, what: &str, script: &str) {
        until(&format!("the page shows {what}"), || async {
            let shown = self.run(script) == true;
            tokio::time::sleep(std::time::Duration::from_millis(if shown { 0 } else { 100 })).await;
            shown.then_some(())
        })
        .await;
    }

    /// What the page complained of.
    pub fn complaints(&self) -> Vec<Value> {
        self.ask("se/log", &json!({"type": "browser"})).as_array().unwrap().clone()
    }

    /// Kept where somebody asks for it, to look at.
    pub fn keep_screenshot(&self, name: &str) {
        let Some(directory) = std::env::var_os("SCREENSHOTS") else { return };
        let shot = json!({"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": true}});
        let encoded = self.ask("goog/cdp/execute", &shot)["data"].as_str().unwrap().to_owned();
        let encoded_file = Path::new(&directory).join(format!("{name}.base64"));
        std::fs::write(&encoded_file, encoded).unwrap();
        let decoded = std::fs::File::create(Path::new(&directory).join(format!("{name}.png"))).unwrap();
        assert!(Command::new("base64").arg("-d").arg(&encoded_file).stdout(decoded).status().unwrap().success());
        std::fs::remove_file(encoded_file).unwrap();
    }

    /// Everything that can be read is far enough from its ground (WCAG 2: 4.5 to 1), nothing is wider than the window, and every bar
    /// and every picture has a name.
    pub fn assert_good_to_read(&self, name: &str) {
        let wide = self.run("return document.documentElement.scrollWidth > innerWidth");
        assert_eq!(wide, false, "{name}: wider than the window");
        let faint = self.run(
            "const parse = (text) => text.match(/[\\d.]+/g).map(Number);
             const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
               return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
             const ground = (element) => { for (let e = element; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
               if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
             return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()
                 && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
               .map((e) => { const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
                 return [e.textContent.slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; })
               .filter(([, contrast]) => contrast < 4.5);",
        );
        assert_eq!(faint, json!([]), "{name}: too faint");
        let nameless = self.run(
            "return [...document.querySelectorAll('progress')].filter((e) => !e.getAttribute('aria-label')).length
                 + (document.documentElement.lang ? 0 : 1) + (document.querySelectorAll('h1').length === 1 ? 0 : 1)",
        );
        assert_eq!(nameless, 0, "{name}");
    }
}
