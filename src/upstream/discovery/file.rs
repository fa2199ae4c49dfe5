//! Backends from a file: a list like `backends`, in YAML or JSON, for any orchestrator to write.
//!
//! The content is read at every interval and compared: that notices a file that is replaced by renaming, a symlink that
//! moves (Kubernetes' ConfigMaps) and a file on a network file system alike, where notifications of the kernel would
//! miss one or the other. What has changed counts once two readings agree, so that a file which is written in place is
//! not taken half written; whoever renames a whole file over it is never read too early. Names in it are resolved when
//! it changes.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_load_balancing::Backend;
use pingora_load_balancing::discovery::ServiceDiscovery;

use super::{Member, Source, failed, resolve};
use crate::config;

/// From one reading to the next, until two agree; and after how many we give up for now.
const SETTLING: Duration = Duration::from_millis(100);
const READINGS: usize = 10;

/// The file.
pub(super) struct File {
    path: PathBuf,
    interval: Duration,
    last: Mutex<Option<Arc<Content>>>,
}

/// What the file said.
struct Content {
    text: String,
    members: Result<Vec<Member>, String>,
}

impl File {
    /// The file at `path`, read at every `interval`.
    pub(super) fn new(path: PathBuf, interval: Duration) -> Self {
        Self { path, interval, last: Mutex::new(None) }
    }

    /// What the file says, which is what it said last if nobody has changed it.
    async fn content(&self) -> Result<Arc<Content>, String> {
        let mut text = self.aside(text).await?;
        let last = self.last.lock().clone();
        if let Some(same) = last.filter(|last| last.text == text) {
            return Ok(same);
        }
        for _ in 0..READINGS {
            tokio::time::sleep(SETTLING).await;
            let before = std::mem::replace(&mut text, self.aside(self::text).await?);
            if before == text {
                let content = Arc::new(self.aside(|path| understood(path, text)).await?);
                *self.last.lock() = Some(content.clone());
                return Ok(content);
            }
        }
        Err(format!("{} is being written", self.path.display()))
    }

    /// Does what blocks where nobody waits for it.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || work(&path)).await.unwrap_or_else(|e| Err(e.to_string()))
    }
}

#[async_trait]
impl ServiceDiscovery for File {
    async fn discover(&self) -> pingora::Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        let content = match self.content().await {
            Ok(content) => content,
            Err(why) => return failed(why),
        };
        match &content.members {
            Ok(members) => Ok((members.iter().map(Member::backend).collect(), HashMap::new())),
            Err(why) => failed(why.clone()),
        }
    }
}

impl Source for File {
    fn holds_for(&self) -> Duration {
        self.interval
    }
}

/// What `text`, which is in the file at `path`, means. That a name does not resolve may be otherwise next time, and is
/// no content.
fn understood(path: &Path, text: String) -> Result<Content, String> {
    let members = match config::parse_backends(path, &text) {
        Ok(backends) => Ok(resolve(&backends)?),
        Err(report) => Err(report.to_string()),
    };
    Ok(Content { text, members })
}

/// The text of the file at `path`, which could be a pipe that nobody writes to.
fn text(path: &Path) -> Result<String, String> {
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        return Err(format!("{} is not a file", path.display()));
    }
    config::read_backends(path).map_err(|report| report.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of our own, which goes with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            Self(folder)
        }

        fn path(&self) -> PathBuf {
            self.0.join("backends.yaml")
        }

        fn write(&self, text: &str) {
            std::fs::write(self.0.join("new"), text).unwrap();
            std::fs::rename(self.0.join("new"), self.path()).unwrap();
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _gone = std::fs::remove_dir_all(&self.0);
        }
    }

    async fn said(file: &File) -> Result<Vec<String>, String> {
        match file.discover().await {
            Ok((set, _)) => Ok(set.iter().map(|b| format!("{}*{}", b.addr, b.weight)).collect()),
            Err(e) => Err(e.context.as_ref().unwrap().as_str().to_owned()),
        }
    }

    #[tokio::test]
    async fn a_list_is_read_in_yaml_and_in_json_and_what_is_wrong_is_said_with_its_place() {
        let scratch = Scratch::new("list");
        let file = File::new(scratch.path(), Duration::from_secs(1));
        assert!(said(&file).await.unwrap_err().contains("cannot read the list of backends"));
        scratch.write("# of Slurm\n- 10.0.0.1:8000\n- { address: '10.0.0.2:8000', weight: 3 }\n");
        assert_eq!(said(&file).await.unwrap(), ["10.0.0.1:8000*1", "10.0.0.2:8000*3"]);
        scratch.write(r#"["10.0.0.3:8000", {"address": "[::1]:8000", "weight": 2}]"#);
        assert_eq!(said(&file).await.unwrap(), ["10.0.0.3:8000*1", "[::1]:8000*2"]);
        scratch.write("- 10.0.0.1:8000\n- 10.0.0.2\n");
        let why = said(&file).await.unwrap_err();
        assert!(why.contains("backends.yaml:2:3") && why.contains("the port is missing"), "{why}");
        assert_eq!(said(&file).await.unwrap_err(), why, "as long as nobody changes it");
        scratch.write("- 10.0.0.1:8000\n- { address: '10.0.0.1:8000' }\n");
        assert!(said(&file).await.unwrap_err().contains("listed twice, first as [0]"));
        scratch.write("upstreams: 7\n");
        assert!(said(&file).await.unwrap_err().contains("expected a list, found a map"));
        scratch.write("[]");
        assert_eq!(said(&file).await.unwrap(), [""; 0]);
    }

    #[tokio::test]
    async fn a_pipe_that_nobody_writes_to_is_not_waited_for() {
        let said = said(&File::new("/dev/zero".into(), Duration::from_secs(1))).await;
        assert_eq!(said.unwrap_err(), "/dev/zero is not a file");
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_not_taken_before_it_rests() {
        let scratch = Scratch::new("slow");
        let file = File::new(scratch.path(), Duration::from_secs(1));
        let writer = async {
            for port in (8000..9000).cycle() {
                std::fs::write(scratch.path(), format!("- 10.0.0.1:{port}\n")).unwrap();
                tokio::time::sleep(SETTLING / 5).await;
            }
        };
        let meanwhile = tokio::select! {
            () = writer => unreachable!("it never ends"),
            meanwhile = said(&file) => meanwhile,
        };
        assert!(meanwhile.unwrap_err().ends_with("backends.yaml is being written"));
        assert_eq!(said(&file).await.unwrap().len(), 1);
    }
}
