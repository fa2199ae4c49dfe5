//! A secret, which the file names but does not hold.
//!
//! `{ env: NAME }`, `{ file: PATH }` or `{ credential: NAME }`: a configuration is copied, committed and
//! shown, a secret is not. It is read when the configuration is loaded, and nothing prints it. A file that
//! everybody may read is refused.

use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use subtle::{Choice, ConstantTimeEq as _};

use super::{schema, units};

/// A secret and where it came from. Its `Debug` shows the latter only.
#[derive(Clone, PartialEq, Eq, JsonSchema)]
#[schemars(with = "Written")]
pub struct Secret {
    source: Source,
    value: String,
}

/// A secret can only be in one place.
pub(super) struct SeveralGiven;

/// Where a secret is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Env(String),
    File(PathBuf),
    /// What systemd hands to a service by `LoadCredential=` and the like.
    Credential(String),
}

/// Where systemd puts the credentials of a service.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

impl Secret {
    /// The secret itself: visible ASCII, so it can stand in a header.
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// A secret, not yet read, that is kept in one of these places; `None` if none is given, an error if several are.
    pub(super) fn from_source(
        env: Option<String>,
        file: Option<PathBuf>,
        credential: Option<String>,
    ) -> Option<Result<Self, SeveralGiven>> {
        let places = [env.map(Source::Env), file.map(Source::File), credential.map(Source::Credential)];
        let mut given = places.into_iter().flatten();
        let source = given.next()?;
        let one = given.next().is_none();
        Some(if one { Ok(Self { source, value: String::new() }) } else { Err(SeveralGiven) })
    }

    /// Where it is kept: the key in the file, and what stands there.
    pub(super) fn place(&self) -> (&'static str, String) {
        match &self.source {
            Source::Env(name) => ("env", name.clone()),
            Source::File(path) => ("file", path.display().to_string()),
            Source::Credential(name) => ("credential", name.clone()),
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
                read_secret_file(path)?
            }
            Source::Credential(name) => {
                let given = std::env::var_os(CREDENTIALS).ok_or_else(|| {
                    format!(
                        "no credential `{name}`: {CREDENTIALS} is not set; systemd sets it for a unit with \
                         `LoadCredential={name}:PATH`"
                    )
                })?;
                read_secret_file(&Path::new(&given).join(&*name))?
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

fn read_secret_file(path: &Path) -> Result<String, String> {
    let bytes =
        super::read_file(path).map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
    super::not_for_everybody(path)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The name of a credential: that of a file in a folder that systemd made.
pub(super) fn credential<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let is_name = |text: &str| !matches!(text, "" | "." | "..") && !text.contains('/');
    let parse = |text: &str| is_name(text).then(|| text.to_owned());
    units::text(deserializer, "the name of a credential, as in `LoadCredential=NAME:PATH`", parse).map(Some)
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Env(name) => write!(f, "the environment variable `{name}`"),
            Source::File(path) => write!(f, "`{}`", path.display()),
            Source::Credential(name) => write!(f, "the credential `{name}`"),
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
#[schemars(extend("oneOf" = [{"required": ["env"]}, {"required": ["file"]}, {"required": ["credential"]}]))]
struct Written {
    /// The environment variable that holds it.
    env: Option<String>,
    /// The file that holds it; refused if everybody on the machine may read it.
    file: Option<PathBuf>,
    /// The name of the credential that holds it, by which the unit of systemd has it (`LoadCredential=NAME:PATH`).
    #[serde(default, deserialize_with = "credential")]
    #[schemars(schema_with = "schema::credential")]
    credential: Option<String>,
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Written { env, file, credential } = Written::deserialize(deserializer)?;
        match Self::from_source(env, file, credential) {
            Some(Ok(secret)) => Ok(secret),
            _ => Err(D::Error::custom("expected one of `env`, `file` and `credential`")),
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
