//! The balancer as the demo sees it: a child process with a configuration file, and its page of metrics.
//!
//! The demo runs the same binary a user would, on real sockets, and reads what anybody can read; it takes no
//! short cut through the code. Files live in a private directory that goes when the demo goes, and so does
//! the child.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::client;

/// How long the balancer may take until it knows the model of its engines.
const START_TRIES: u32 = 200;
const START_PAUSE: Duration = Duration::from_millis(50);

/// What the balancer says it owes a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owed {
    pub(super) pending_tokens: u64,
    pub(super) active: u64,
}

/// A running balancer; killed when dropped.
#[derive(Debug)]
pub(super) struct Balancer {
    /// Where clients connect.
    pub(super) address: SocketAddr,
    admin: SocketAddr,
    child: Child,
}

impl Balancer {
    /// Starts a balancer with this policy in front of `engines` and waits until it serves `model`.
    pub(super) async fn start(
        directory: &Directory,
        policy: &str,
        engines: &[SocketAddr],
        model: &str,
    ) -> io::Result<Self> {
        let [address, admin] = free_addresses()?;
        let config = directory.path.join(format!("{policy}.yaml"));
        fs::write(&config, configuration(&directory.path, policy, engines, [address, admin]))?;
        let log = directory.path.join(format!("{policy}.log"));
        let output = File::create(&log)?;
        let child = Command::new(std::env::current_exe()?)
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let mut balancer = Self { address, admin, child };
        match balancer.wait_for(model).await {
            Ok(()) => Ok(balancer),
            Err(error) => {
                let log = fs::read_to_string(&log).unwrap_or_default();
                Err(io::Error::other(format!("the balancer did not start: {error}\n{log}")))
            }
        }
    }

    /// Where its metrics are.
    pub(super) fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// What it owes each backend at the moment.
    pub(super) async fn owed(&self) -> io::Result<Vec<(String, Owed)>> {
        let page = client::send(self.admin, "GET", "/metrics", "").await?.text().await?;
        Ok(read_owed(&page))
    }

    async fn wait_for(&mut self, model: &str) -> io::Result<()> {
        for _ in 0..START_TRIES {
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(status.to_string()));
            }
            if let Ok(reply) = client::send(self.address, "GET", "/v1/models", "").await
                && reply.status == 200
                && reply.text().await?.contains(model)
            {
                return Ok(());
            }
            tokio::time::sleep(START_PAUSE).await;
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // It may have ended by itself: an interrupt from the terminal reaches it too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A private directory, removed with all it holds when dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn create() -> io::Result<Self> {
        let name = format!("plimsoll-demo-{}-{:08x}", std::process::id(), fastrand::u32(..));
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Nothing depends on it; the next boot clears what is left.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn configuration(
    directory: &Path,
    policy: &str,
    engines: &[SocketAddr],
    [address, admin]: [SocketAddr; 2],
) -> String {
    let backends = engines.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let pid = directory.join(format!("{policy}.pid"));
    format!(
        "server: {{ pid_file: {pid:?}, drain_timeout: 1s }}\n\
         listeners:\n  - address: {address}\n\
         admin: {{ address: {admin} }}\n\
         observe: {{ access_log: false, backend_header: true }}\n\
         upstreams:\n  demo:\n    engine: vllm\n    policy: {policy}\n    backends: [{backends}]\n"
    )
}

/// Two addresses on which nobody listens. Somebody may take one before the balancer does; then it says so and
/// exits.
fn free_addresses() -> io::Result<[SocketAddr; 2]> {
    let [one, two] = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([one.local_addr()?, two.local_addr()?])
}

fn read_owed(page: &str) -> Vec<(String, Owed)> {
    let mut owed: Vec<(String, Owed)> = Vec::new();
    for line in page.lines() {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let backend = labels.split("backend=\"").nth(1).and_then(|rest| rest.split('"').next());
        let (Some(backend), Ok(value)) = (backend, value.trim().parse::<f64>()) else { continue };
        let place = owed.iter().position(|(name, _)| name == backend).unwrap_or_else(|| {
            owed.push((backend.to_owned(), Owed::default()));
            owed.len() - 1
        });
        match name {
            "plimsoll_pending_tokens" => owed[place].1.pending_tokens = value as u64,
            "plimsoll_active_requests" => owed[place].1.active = value as u64,
            _ => {}
        }
    }
    owed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gauges_of_each_backend_are_read_from_the_page() {
        let page = "# TYPE plimsoll_pending_tokens gauge\n\
                    plimsoll_pending_tokens{backend=\"a:1\",upstream=\"demo\"} 1200\n\
                    plimsoll_pending_tokens{upstream=\"demo\",backend=\"b:2\"} 0\n\
                    plimsoll_active_requests{backend=\"a:1\",upstream=\"demo\"} 3\n\
                    plimsoll_retries_total{upstream=\"demo\",reason=\"connect\"} 9\n\
                    plimsoll_buffered_body_bytes 5\n";
        let a = ("a:1".to_owned(), Owed { pending_tokens: 1200, active: 3 });
        assert_eq!(read_owed(page), [a, ("b:2".to_owned(), Owed::default())]);
    }

    #[test]
    fn a_directory_is_gone_with_its_owner() {
        let directory = Directory::create().unwrap();
        let path = directory.path.clone();
        fs::write(path.join("file"), "x").unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}
