//! An API key: how a client shows that it may ask, and how much it may ask for.
//!
//! The file holds a key's SHA-256 or says where the key itself is kept (`env`, `file`, `credential`); only
//! the hash is kept in memory. Keys are long and random, so that a plain hash cannot be turned back into one.

use std::fmt;
use std::path::Path;

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::{Secret, schema, units};

/// A client's key.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(with = "Written")]
pub struct Key {
    /// The key's hash; of a key that is kept elsewhere, once that has been read.
    pub hash: KeyHash,
    /// Where the key is kept, until it has been read.
    secret: Option<Secret>,
    /// Most requests per minute.
    pub requests_per_minute: Option<u32>,
    /// Most tokens per minute, of prompts and answers together.
    pub tokens_per_minute: Option<u32>,
}

impl Key {
    /// Reads a key that is kept elsewhere, and forgets all of it but its hash. The error is a lowercase fragment
    /// that does not contain the key.
    pub(super) fn read(&mut self, folder: &Path) -> Result<(), String> {
        if let Some(mut secret) = self.secret.take() {
            secret.read(folder)?;
            self.hash = KeyHash::of(secret.expose().as_bytes());
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Written { env, file, credential, sha256, requests_per_minute, tokens_per_minute } =
            Written::deserialize(deserializer)?;
        let (hash, secret) = match (sha256, Secret::from_source(env, file, credential)) {
            (Some(hash), None) => (hash, None),
            (None, Some(Ok(secret))) => (KeyHash::default(), Some(secret)),
            _ => return Err(D::Error::custom("expected one of `env`, `file`, `credential` and `sha256`")),
        };
        Ok(Self { hash, secret, requests_per_minute, tokens_per_minute })
    }
}

/// A client's key: one of `env`, `file`, `credential` and `sha256`, and its limits.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [
    {"required": ["env"]}, {"required": ["file"]}, {"required": ["credential"]}, {"required": ["sha256"]},
]))]
struct Written {
    /// The environment variable that holds the key.
    env: Option<String>,
    /// The file that holds the key; refused if everybody on the machine may read it.
    file: Option<std::path::PathBuf>,
    /// The name of the credential that holds the key, by which the unit of systemd has it (`LoadCredential=NAME:PATH`).
    #[serde(default, deserialize_with = "super::secret::credential")]
    #[schemars(schema_with = "schema::credential")]
    credential: Option<String>,
    /// The key's SHA-256, as `plimsoll key` prints it.
    sha256: Option<KeyHash>,
    /// Most requests per minute, 1 to 1000000; beyond it 429. Absent: no limit.
    #[serde(default, deserialize_with = "units::some_between::<_, 1, 1_000_000>")]
    #[schemars(schema_with = "schema::between::<1, 1_000_000>")]
    requests_per_minute: Option<u32>,
    /// Most tokens per minute, of prompts and answers together, 1 to 4000000000. A request is let in while the
    /// last minute's tokens are fewer, so that a prompt longer than what is left is answered too; beyond it
    /// 429. Absent: no limit.
    #[serde(default, deserialize_with = "units::some_between::<_, 1, 4_000_000_000>")]
    #[schemars(schema_with = "schema::between::<1, 4_000_000_000>")]
    tokens_per_minute: Option<u32>,
}

/// The SHA-256 of a key.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(with = "String", extend("title" = "SHA-256", "pattern" = "^[0-9A-Fa-f]{64}$"))]
pub struct KeyHash([u8; SHA256_OUTPUT_LEN]);

impl KeyHash {
    /// The hash of `key`.
    pub fn of(key: &[u8]) -> Self {
        let mut hash = Self::default();
        hash.0.copy_from_slice(digest(&SHA256, key).as_ref());
        hash
    }

    /// Its first eight bytes, as a number.
    pub fn start(&self) -> u64 {
        self.0.first_chunk().map_or(0, |start| u64::from_le_bytes(*start))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads 64 hexadecimal digits.
    fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text
            .chars()
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect::<Option<_>>()?;
        let mut hash = Self::default();
        if digits.len() != 2 * hash.0.len() {
            return None;
        }
        for (byte, pair) in hash.0.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Some(hash)
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl<'de> Deserialize<'de> for KeyHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        units::text(
            deserializer,
            "the 64 hexadecimal digits of a SHA-256, as `plimsoll key` prints",
            Self::parse,
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Of the empty text, as every implementation prints it.
    const OF_NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_hash_is_written_as_every_other_program_writes_it() {
        assert_eq!(KeyHash::of(b"").to_string(), OF_NOTHING);
        assert_eq!(KeyHash::parse(&OF_NOTHING.to_uppercase()), Some(KeyHash::of(b"")));
        for wrong in
            ["", "e3b0", &OF_NOTHING[1..], &OF_NOTHING.replace('e', "g"), &OF_NOTHING.replace('e', "é")]
        {
            assert_eq!(KeyHash::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_key_is_forgotten_when_it_has_been_read() {
        let folder = std::env::temp_dir().join(format!("plimsoll-key-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("a"), "sk-canary\n").unwrap();
        std::fs::set_permissions(folder.join("a"), std::fs::Permissions::from_mode(0o600)).unwrap();
        let mut key: Key = serde_yaml::from_str("{ file: a, requests_per_minute: 7 }").unwrap();
        key.read(&folder).unwrap();
        assert_eq!((key.hash, key.requests_per_minute), (KeyHash::of(b"sk-canary"), Some(7)));
        assert!(key.secret.is_none() && !format!("{key:?}").contains("canary"));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_key_is_in_one_place() {
        let read = |text: &str| serde_yaml::from_str::<Key>(text);
        assert!(read("{ env: A }").is_ok() && read(&format!("{{ sha256: {OF_NOTHING} }}")).is_ok());
        for wrong in ["{}", "{ env: A, file: b }", &format!("{{ env: A, sha256: {OF_NOTHING} }}")] {
            assert!(read(wrong).unwrap_err().to_string().contains("expected one of"), "{wrong}");
        }
    }
}
