//! A secret, which the file names but does not hold.
//!
//! `{ env: NAME }` or `{ file: PATH }`: a configuration is copied, committed and shown, a secret is not. It
//! is read when the configuration is loaded, and nothing prints it. A file that everybody may read is refused.

use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use subtle::{Choice, ConstantTimeEq as _};

/// A secret and where it came from. Its `Debug` shows the latter only.
#[derive(Clone, PartialEq, Eq, JsonSchema)]
#[schemars(with = "Written")]
pub struct Secret {
    source: Source,
    value: String,
}

/// A secret can only be in one place.
pub(super) struct BothGiven;

/// Where a secret is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Env(String),
    File(PathBuf),
}

impl Secret {
    /// The secret itself: visible ASCII, so it can stand in a header.
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// A secret, not yet read, that is kept in one of the two places; `None` if neither is given, an error if both are.
    pub(super) fn from_source(env: Option<String>, file: Option<PathBuf>) -> Option<Result<Self, BothGiven>> {
        let source = match (env, file) {
            (Some(name), None) => Source::Env(name),
            (None, Some(path)) => Source::File(path),
            (None, None) => return None,
            (Some(_), Some(_)) => return Some(Err(BothGiven)),
        };
        Some(Ok(Self { source, value: String::new() }))
    }

    /// Where it is kept: the key in the file, and what stands there.
    pub(super) fn place(&self) -> (&'static str, String) {
        match &self.source {
            Source::Env(name) => ("env", name.clone()),
            Source::File(path) => ("file", path.display().to_string()),
        }
    }

    /// Whether `presented` is the secret, in a time that depends on the length of `presented` alone.
    pub fn is(&self, presented: &[u8]) -> bool {
        let ours = self.value.as_bytes();
        let pairs = presented.iter().zip(ours.iter().cycle());
        let alike = pairs.fold(Choice::from(1), |alike, (theirs, ours)| alike & theirs.ct_eq(ours));
        (alike & presented.len().ct_eq(&ours.len())).into()
    }

    /// Reads the secret from its source; a relative path is below `folder`. The error is a lowercase fragment
    /// that does not contain the secret.
    pub(super) fn read(&mut self, folder: &Path) -> Result<(), String> {
        let found = match &mut self.source {
            Source::Env(name) => {
                std::env::var(&*name).map_err(|_| format!("the environment variable `{name}` is not set"))?
            }
            Source::File(path) => {
                *path = folder.join(&*path);
                let bytes = super::read_file(path)
                    .map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
                super::not_for_everybody(path)?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let value = found.trim_end();
        if value.is_empty() {
            return Err(format!("{self} is empty"));
        }
        if !value.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("{self} holds blanks or characters that cannot stand in a header"));
        }
        self.value = value.to_owned();
        Ok(())
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Env(name) => write!(f, "the environment variable `{name}`"),
            Source::File(path) => write!(f, "`{}`", path.display()),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({:?})", self.source)
    }
}

/// Where a secret is kept: one of these.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["env"]}, {"required": ["file"]}]))]
struct Written {
    /// The environment variable that holds it.
    env: Option<String>,
    /// The file that holds it; refused if everybody on the machine may read it.
    file: Option<PathBuf>,
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Written { env, file } = Written::deserialize(deserializer)?;
        match Self::from_source(env, file) {
            Some(Ok(secret)) => Ok(secret),
            _ => Err(D::Error::custom("expected either `env` or `file`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Secret { source: Source::Env("KEY".to_owned()), value: "hunter2".to_owned() };
        assert!(!format!("{secret:?} {secret}").contains("hunter2"));
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn only_the_secret_is_the_secret() {
        let secret = Secret { source: Source::Env("KEY".to_owned()), value: "hunter2".to_owned() };
        assert!(secret.is(b"hunter2"));
        for other in ["", "h", "hunter", "hunter3", "Hunter2", "hunter2h", "hunter2hunter2", "2retnuh"] {
            assert!(!secret.is(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_secret_that_is_public_or_cannot_stand_in_a_header_is_refused_without_being_shown() {
        let folder = std::env::temp_dir().join(format!("plimsoll-secret-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str, mode: u32| {
            std::fs::write(folder.join(name), text).unwrap();
            std::fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
        };
        write("good", "sk-1234\n", 0o600);
        write("shared", "sk-1234\n", 0o640);
        write("public", "sk-canary\n", 0o604);
        write("split", "sk-canary\ncanary", 0o600);
        write("empty", "\n", 0o600);
        let read = |name: &str| {
            let mut secret = Secret { source: Source::File(name.into()), value: String::new() };
            secret.read(&folder).map(|()| secret.expose().to_owned())
        };
        assert_eq!(read("good").unwrap(), "sk-1234");
        assert_eq!(read("shared").unwrap(), "sk-1234");
        let public = read("public").unwrap_err();
        assert!(public.contains("(mode 604): `chmod o-rwx /") && !public.contains("canary"), "{public}");
        assert!(!read("split").unwrap_err().contains("canary"));
        assert!(read("empty").unwrap_err().contains("is empty"));
        assert!(read("absent").unwrap_err().contains("cannot read"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
