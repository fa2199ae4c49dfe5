//! A real Prometheus with a folder and a port of its own, which scrapes one target and evaluates `conf/alerts.yaml`.

use super::alerts::conf;
use crate::support::client::{Client, Line, Request};
use crate::support::port::Port;
use crate::support::proxy::folder;
use crate::support::wait_until;
use serde_json::Value;
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use tokio::net::TcpStream;

pub(super) struct Prometheus {
    child: Child,
    folder: PathBuf,
    port: Port,
}

impl Prometheus {
    /// Starts one whose job `plimsoll` is `target`, and waits until it answers.
    pub(super) async fn start(target: SocketAddr) -> Self {
        let (folder, port) = (folder(), Port::take());
        let config = format!(
            "global: {{ scrape_interval: 250ms, evaluation_interval: 500ms }}\nrule_files: ['{}']\n\
             scrape_configs: [{{ job_name: plimsoll, static_configs: [{{ targets: ['{target}'] }}] }}]\n",
            conf("alerts.yaml").display()
        );
        std::fs::write(folder.join("prometheus.yml"), config).expect("a writable folder");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={}", port.address()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("stderr")).expect("a writable folder"))
            .spawn()
            .expect("prometheus starts");
        let started = Self { child, folder, port };
        let address = started.port.address();
        wait_until("Prometheus to listen", async || TcpStream::connect(address).await.is_ok()).await;
        wait_until("Prometheus to be ready", async || started.get("/-/ready").await.0 == 200).await;
        started
    }

    /// Status and body of the answer to a GET.
    async fn get(&self, path: &str) -> (u16, String) {
        let mut client = Client::connect(self.port.address(), Line::Http1).await;
        let answer = client.ask(&Request::get(path)).await;
        (answer.status, answer.text())
    }

    /// The `data` of an answer of its API, which has to be a success.
    pub(super) async fn api(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let pairs: Vec<_> =
            parameters.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
        let (status, body) = self.get(&format!("/api/v1/{path}?{}", pairs.join("&"))).await;
        let value: Value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}"));
        assert_eq!((status, &value["status"]), (200, &Value::from("success")), "{parameters:?}: {body}");
        value["data"].clone()
    }

    /// The values of an instant query, without those that are no numbers.
    pub(super) async fn query(&self, expression: &str) -> Vec<f64> {
        let data = self.api("query", &[("query", expression)]).await;
        let samples = data["result"].as_array().cloned().unwrap_or_default();
        let values = samples.iter().filter_map(|sample| sample["value"][1].as_str()?.parse::<f64>().ok());
        values.filter(|value| value.is_finite()).collect()
    }

    /// The alerts that are pending or fire: name and severity.
    pub(super) async fn alerts(&self) -> Vec<(String, String)> {
        let data = self.api("alerts", &[]).await;
        let word = |value: &Value| value.as_str().expect("a word").to_owned();
        let alerts = data["alerts"].as_array().cloned().unwrap_or_default();
        alerts.iter().map(|a| (word(&a["labels"]["alertname"]), word(&a["labels"]["severity"]))).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
        if std::thread::panicking() {
            let said = std::fs::read_to_string(self.folder.join("stderr")).unwrap_or_default();
            eprintln!("stderr of Prometheus:\n{said}");
        } else {
            let _left_behind = std::fs::remove_dir_all(&self.folder);
        }
    }
}

fn encoded(value: &str) -> String {
    value
        .bytes()
        .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") })
        .collect()
}
