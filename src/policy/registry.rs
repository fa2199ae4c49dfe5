//! The policies that a binary knows by name: the built-in ones, and those of its author.
//!
//! A name in YAML or on the command line means a policy only if this registry holds it. It is a value that
//! `main` makes and hands to [`crate::cli::main_with`], so two binaries on this library, or two tests in one
//! process, know different policies. The built-in ones are always there and cannot be replaced: a file that
//! says `round_robin` means the same to every binary.

use std::fmt;
use std::sync::Arc;

use super::{Policy, PolicyConfig};

/// The policies that a binary knows by name. The default is the built-in ones.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    own: Vec<Custom>,
}

impl Policies {
    /// These and one more: `name`, as written in YAML, is what `new` makes. It is called once per upstream
    /// that uses the policy, and once per run of a simulation.
    ///
    /// # Errors
    /// If the name is taken, by a built-in policy too, or is not made of small letters, digits and `_`.
    pub fn with<P: Policy + 'static>(
        mut self,
        name: &str,
        new: impl Fn() -> P + Send + Sync + 'static,
    ) -> Result<Self, NameRefused> {
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.bytes().all(is_plain) {
            return Err(NameRefused::Malformed(name.to_owned()));
        }
        if self.names().any(|taken| taken == name) {
            return Err(NameRefused::Taken(name.to_owned()));
        }
        self.own.push(Custom { name: name.to_owned(), new: Arc::new(move || Box::new(new())) });
        Ok(self)
    }

    /// The names of all policies, as written in YAML: the built-in ones, then the others as they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        PolicyConfig::NAMES.iter().copied().chain(self.own.iter().map(Custom::name))
    }

    /// The policy of that name with its default options; `None` if there is none.
    pub fn by_name(&self, name: &str) -> Option<PolicyConfig> {
        let own = || self.own.iter().find(|own| own.name == name).cloned().map(PolicyConfig::Custom);
        PolicyConfig::by_name(name).or_else(own)
    }
}

/// A policy that is not built in. Two of them are equal if their names are.
#[derive(Clone)]
pub struct Custom {
    name: String,
    new: Arc<dyn Fn() -> Box<dyn Policy> + Send + Sync>,
}

impl Custom {
    /// A name that was read where no registry is at hand. Until [`Policies::by_name`] was asked for it, it
    /// stands for the default policy; [`crate::config`] lets none of them out.
    pub(crate) fn unregistered(name: &str) -> Self {
        Self { name: name.to_owned(), new: Arc::new(|| PolicyConfig::default().build()) }
    }

    /// Its name, as written in YAML.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The policy itself.
    pub fn build(&self) -> Box<dyn Policy> {
        (self.new)()
    }
}

impl PartialEq for Custom {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Custom({})", self.name)
    }
}

/// Why a policy was not registered under a name. Its `Debug` is the sentence too, since that is what Rust
/// prints of an error that `main` returns.
#[derive(Clone, PartialEq, Eq)]
pub enum NameRefused {
    /// A policy of that name is built in, or was registered before.
    Taken(String),
    /// It could not be written in YAML and on the command line without quotes.
    Malformed(String),
}

impl fmt::Display for NameRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken(name) if PolicyConfig::NAMES.contains(&name.as_str()) => {
                write!(f, "the policy `{name}` is built in, and a file that names it means that one")
            }
            Self::Taken(name) => write!(f, "a policy `{name}` is registered already"),
            Self::Malformed(name) => write!(
                f,
                "`{name}` is no name for a policy: a small letter, then small letters, digits and `_`"
            ),
        }
    }
}

impl fmt::Debug for NameRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for NameRefused {}

#[cfg(test)]
mod tests {
    use super::super::tests::{idle, plain};
    use super::super::{Candidate, Fleet, Request};
    use super::*;

    /// Always the backend of the highest slot.
    struct Last;

    impl Policy for Last {
        fn cost(&self, _request: &Request<'_>, candidate: &Candidate, _fleet: &Fleet) -> f64 {
            -f64::from(candidate.slot.0)
        }
    }

    fn policies() -> Policies {
        Policies::default().with("last", || Last).unwrap()
    }

    #[test]
    fn a_registered_policy_is_found_by_its_name_and_decides() {
        let last = policies().by_name("last").unwrap();
        assert_eq!(last.name(), "last");
        let mut rng = fastrand::Rng::with_seed(1);
        let candidates: Vec<_> = (0..9).map(idle).collect();
        assert_eq!(last.build().choose(&plain(), &candidates, &mut rng).index, 8);
    }

    #[test]
    fn the_built_in_policies_are_known_first_and_to_every_binary() {
        let names: Vec<String> = policies().names().map(str::to_owned).collect();
        assert_eq!(names[..names.len() - 1], *PolicyConfig::NAMES);
        assert_eq!(names.last().map(String::as_str), Some("last"));
        for name in PolicyConfig::NAMES {
            assert_eq!(policies().by_name(name), PolicyConfig::by_name(name));
        }
        assert_eq!(Policies::default().by_name("last"), None);
    }

    #[test]
    fn a_name_that_is_taken_or_malformed_is_refused_in_a_sentence() {
        let refused = |name: &str| format!("{:?}", policies().with(name, || Last).unwrap_err());
        assert_eq!(
            refused("round_robin"),
            "the policy `round_robin` is built in, and a file that names it means that one"
        );
        assert_eq!(refused("last"), "a policy `last` is registered already");
        for name in ["", "Last", "my policy", "my-policy", "a,b", "2nd", "_x", "é"] {
            let said = refused(name);
            assert!(said.starts_with(&format!("`{name}` is no name for a policy: ")), "{said}");
        }
    }
}
