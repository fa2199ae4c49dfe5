//! A headless Chromium, driven over the WebDriver protocol: JSON over HTTP, of which this is all that is needed.
//!
//! Each browser has a profile of its own and may reach nobody but what a page asks for; every request and every word on
//! the console is kept, for the test to look at.

use crate::support::proxy::folder;
use plimsoll::demo::client;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const BROWSER: &str = "/usr/bin/chromium";
const DRIVER: &str = "/usr/bin/chromedriver";

/// What any wait may take: a browser on a busy machine is slow to start.
const PATIENCE: Duration = Duration::from_secs(45);

/// A browser with one page.
pub(crate) struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
}

impl Browser {
    /// Starts one. Without the programs there is none: that is said, and in CI it is a failure.
    pub(crate) async fn start() -> Option<Self> {
        if !(Path::new(BROWSER).exists() && Path::new(DRIVER).exists()) {
            let missing = "Debian's packages chromium and chromium-driver are not installed";
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{missing}");
            eprintln!("SKIPPED: {missing}");
            return None;
        }
        let mut driver = Command::new(DRIVER)
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver starts");
        let mut said = BufReader::new(driver.stdout.take().expect("it is piped")).lines();
        let port = said.by_ref().find_map(|line| {
            let line = line.expect("chromedriver speaks UTF-8");
            line.split_once("started successfully on port ")?.1.trim_end_matches('.').parse::<u16>().ok()
        });
        // Nothing more is wanted of what it says, but its pipe must not fill.
        std::thread::spawn(move || said.count());
        let address = SocketAddr::from(([127, 0, 0, 1], port.expect("a port of chromedriver")));
        let mut browser = Self { driver, address, session: String::new() };
        let profile = format!("--user-data-dir={}", folder().join("chromium").display());
        let mut arguments = vec![profile.as_str(), "--headless=new", "--no-sandbox", "--disable-gpu"];
        arguments.extend(["--disable-quic", "--no-first-run", "--disable-background-networking"]);
        arguments.extend(["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]);
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": BROWSER, "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        } } });
        let session = browser.command("POST", "/session", &wanted).await;
        browser.session = format!("/session/{}", session["sessionId"].as_str().expect("a session"));
        // What it asked for before it belonged to us, for the page of a new tab, is not ours.
        browser.open("about:blank").await;
        browser.asked().await;
        browser.console().await;
        Some(browser)
    }

    /// Goes to a page.
    pub(crate) async fn open(&self, url: &str) {
        self.ask("/url", &json!({ "url": url })).await;
    }

    /// What this script returns on the page.
    pub(crate) async fn run(&self, script: &str) -> Value {
        self.ask("/execute/sync", &json!({ "script": script, "args": [] })).await
    }

    /// Waits until this expression is true on the page.
    pub(crate) async fn until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        self.wait(expression, async || self.run(&script).await == true).await;
    }

    /// Waits until `condition` holds; if it never does, says what the page said then.
    pub(crate) async fn wait(&self, what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let poll = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, poll).await.is_err() {
            let page = self.run("return document.body.innerText").await;
            panic!("{what}: not within {PATIENCE:?}; the page says\n{}", page.as_str().unwrap_or_default());
        }
    }

    /// Clicks on what this selector finds, as a person would.
    pub(crate) async fn click(&self, selector: &str) {
        let element = self.find(selector).await;
        self.ask(&format!("/element/{element}/click"), &json!({})).await;
    }

    /// Types into what this selector finds.
    pub(crate) async fn type_into(&self, selector: &str, text: &str) {
        let element = self.find(selector).await;
        self.ask(&format!("/element/{element}/value"), &json!({ "text": text })).await;
    }

    async fn find(&self, selector: &str) -> String {
        let found = self.ask("/element", &json!({ "using": "css selector", "value": selector })).await;
        let id = found.as_object().and_then(|found| found.values().next()).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("no {selector}: {found}")).to_owned()
    }

    /// Makes the page this large, in CSS pixels, and dark or light.
    pub(crate) async fn look(&self, width: u32, height: u32, scheme: &str) {
        let screen =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", &screen).await;
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", &media).await;
    }

    /// A picture of what is in sight, as a PNG.
    pub(crate) async fn picture(&self) -> Vec<u8> {
        use base64::Engine as _;
        let shot = self.devtools("Page.captureScreenshot", &json!({ "format": "png" })).await;
        let png = shot["data"].as_str().expect("a picture");
        base64::prelude::BASE64_STANDARD.decode(png).expect("base64")
    }

    /// What has been written to the console since the last call, by the page or of it: source and message.
    pub(crate) async fn console(&self) -> Vec<(String, String)> {
        let log = self.ask("/se/log", &json!({ "type": "browser" })).await;
        let word = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        log.as_array().expect("a log").iter().map(|e| (word(e, "source"), word(e, "message"))).collect()
    }

    /// Every address that was asked for since the last call.
    pub(crate) async fn asked(&self) -> Vec<String> {
        let log = self.ask("/se/log", &json!({ "type": "performance" })).await;
        let entries = log.as_array().expect("a log").iter();
        let messages = entries.filter_map(|e| serde_json::from_str::<Value>(e["message"].as_str()?).ok());
        let sent = messages.filter(|m| m["message"]["method"] == "Network.requestWillBeSent");
        sent.filter_map(|m| Some(m["message"]["params"]["request"]["url"].as_str()?.to_owned())).collect()
    }

    async fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.ask("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters })).await
    }

    async fn ask(&self, path: &str, body: &Value) -> Value {
        self.command("POST", &format!("{}{path}", self.session), body).await
    }

    async fn command(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = async {
            let reply =
                client::send(self.address, method, path, &body.to_string()).await.expect("chromedriver");
            (reply.status, reply.text().await.expect("an answer of chromedriver"))
        };
        let (status, text) = tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time");
        assert_eq!(status, 200, "{method} {path} {body}: {text}");
        let mut answer: Value = serde_json::from_str(&text).expect("JSON of chromedriver");
        answer["value"].take()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser ends with its session; without a word it would outlive the driver.
        if let Ok(mut stream) = std::net::TcpStream::connect(self.address) {
            let farewell = format!(
                "DELETE {} HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                self.session, self.address
            );
            let _unheard = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let _unheard = stream.write_all(farewell.as_bytes());
            let _unheard = stream.read_to_end(&mut Vec::new());
        }
        let _already_gone = self.driver.kill();
        let _status = self.driver.wait();
    }
}
