//! What no single value shows: references, clashes, and files that must be there.
//!
//! Every check runs over what could be read, and stays silent where a part it depends on was refused already:
//! one mistake, one problem. Paths in the file are made relative to its folder on the way, and secrets are
//! read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::file::{Admin, AdminAddress, Config, Listener};
use super::key::KeyHash;
use super::report::{Flaw, nearest, suggestion};
use super::strike::Reading;
use super::tree::Path;
use super::upstream::{Backend, Models, Upstream};
use crate::policy::{Policies, PolicyConfig};

/// What Pingora and its parsers read of a URL and of a head whatever we allow, rounded down.
const LONGEST_URL: u64 = 60 << 10;
const LARGEST_HEAD: u64 = 1000 << 10;

/// How long the path of a Unix socket may be, with room for the zero at its end (`sun_path`).
const LONGEST_SOCKET: usize = 107;

/// What a PEM file holds, in words and as the end of a line of it.
const CERTIFICATE: (&str, &str) = ("certificate", "-----BEGIN CERTIFICATE-----");
const PRIVATE_KEY: (&str, &str) = ("private key", "PRIVATE KEY-----");

/// Completes `config`, which `reading` gave, with `folder` as the folder of the file and `policies` as those
/// that may be named; says what is wrong with it.
pub(super) fn complete(
    config: &mut Config,
    reading: &Reading<Config>,
    folder: &std::path::Path,
    policies: &Policies,
) -> Vec<Flaw> {
    let mut check = Check { reading, folder, policies, flaws: Vec::new() };
    if let Some(path) = &mut config.server.pid_file {
        *path = folder.join(&*path);
    }
    check.listeners(config);
    check.limits(config);
    check.keys(config);
    check.routes(config);
    check.upstreams(config);
    check.models(config);
    check.flaws
}

struct Check<'a> {
    reading: &'a Reading<Config>,
    folder: &'a std::path::Path,
    policies: &'a Policies,
    flaws: Vec<Flaw>,
}

impl Check<'_> {
    fn value(&mut self, path: Path, message: String, hint: impl Into<String>) {
        self.flaws.push(Flaw { path, on_key: false, message, hint: hint.into() });
    }

    fn key(&mut self, path: Path, message: String, hint: impl Into<String>) {
        self.flaws.push(Flaw { path, on_key: true, message, hint: hint.into() });
    }

    /// Complains that `parent` has no `key`, or nothing in it.
    fn empty(&mut self, parent: &Path, key: &str, hint: &str) {
        let path = parent.key(key);
        if self.reading.is_written(&path) {
            self.key(path, format!("`{key}` is empty"), hint);
        } else if self.reading.is_intact(&path) {
            self.key(parent.clone(), format!("missing key `{key}`"), hint);
        }
    }

    fn listeners(&mut self, config: &mut Config) {
        let root = Path::default();
        let path = root.key("listeners");
        if config.listeners.is_empty() && self.reading.is_intact(&path) {
            self.empty(&root, "listeners", "one or more, such as `- address: 0.0.0.0:8080`");
        }
        let mut taken: Vec<(String, String)> = Vec::new();
        for (index, listener) in config.listeners.iter_mut().enumerate() {
            let path = self.reading.item(&path, index);
            self.claim(&mut taken, &listener.address, path.key("address"), path.to_string());
            self.tls_files(listener, &path);
            let trusted = Path::default().key("trusted_proxies");
            if listener.proxy_protocol
                && config.trusted_proxies.is_empty()
                && self.reading.is_intact(&trusted)
            {
                let message =
                    "`proxy_protocol` without `trusted_proxies`: nobody would be believed".to_owned();
                self.value(path.key("proxy_protocol"), message, "name the balancers, such as `[10.0.0.0/8]`");
            }
        }
        if let Some(admin) = &mut config.admin {
            let path = root.key("admin");
            if let AdminAddress::Tcp(address) = &admin.address {
                self.claim(&mut taken, address, path.key("address"), path.to_string());
            }
            self.admin(admin, &path);
        }
    }

    fn admin(&mut self, admin: &mut Admin, path: &Path) {
        if !admin.address.is_local() && admin.token.is_none() && self.reading.is_intact(&path.key("token")) {
            let message = "others can reach this address, and no `token` is asked for".to_owned();
            let hint = "`127.0.0.1:9090`, `unix:/run/plimsoll/admin.sock`, or a `token`";
            self.value(path.key("address"), message, hint);
        }
        if let AdminAddress::Unix(socket) = &mut admin.address {
            *socket = self.folder.join(&*socket);
            if socket.as_os_str().len() > LONGEST_SOCKET {
                let message = format!("`{}` is too long for a socket", socket.display());
                self.value(path.key("address"), message, format!("at most {LONGEST_SOCKET} bytes"));
            }
        }
        if let Some(Err(message)) = admin.token.as_mut().map(|token| token.read(self.folder)) {
            self.value(path.key("token"), message, "");
        }
    }

    /// Takes `address` for `owner`, unless one that listens on the same port of the same host has it.
    fn claim(&mut self, taken: &mut Vec<(String, String)>, address: &str, path: Path, owner: String) {
        if let Some((_, first)) = taken.iter().find(|(other, _)| clash(other, address)) {
            let message = format!("address `{address}` is taken by {first} already");
            self.value(path, message, "");
        }
        taken.push((address.to_owned(), owner));
    }

    fn tls_files(&mut self, listener: &mut Listener, path: &Path) {
        let Some(tls) = &mut listener.tls else { return };
        let path = path.key("tls");
        self.identity(&mut tls.certificate, &mut tls.key, &path);
        for (index, other) in tls.others.iter_mut().enumerate() {
            let path = self.reading.item(&path.key("others"), index);
            self.identity(&mut other.certificate, &mut other.key, &path);
        }
        if let Some(Err(message)) = tls.client_ca.as_mut().map(|file| self.pem(file, CERTIFICATE)) {
            self.value(path.key("client_ca"), message, "");
        }
    }

    fn identity(&mut self, certificate: &mut PathBuf, key: &mut PathBuf, path: &Path) {
        if let Err(message) = self.pem(certificate, CERTIFICATE) {
            self.value(path.key("certificate"), message, "");
        }
        if let Err(message) = self.pem(key, PRIVATE_KEY).and_then(|()| super::not_for_everybody(key)) {
            self.value(path.key("key"), message, "");
        }
    }

    /// Makes `file` relative to our folder and sees whether it holds what is wanted of it.
    fn pem(&self, file: &mut PathBuf, (what, wanted): (&str, &str)) -> Result<(), String> {
        *file = self.folder.join(&*file);
        let shown = file.display();
        let bytes =
            super::read_file(file).map_err(|error| format!("cannot read the {what} `{shown}`: {error}"))?;
        let text = String::from_utf8_lossy(&bytes);
        if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
            return Err(format!("the {what} `{shown}` is encrypted; nobody is there to type its passphrase"));
        }
        let blocks: Vec<&str> =
            text.lines().map(str::trim).filter(|line| line.starts_with("-----BEGIN ")).collect();
        match blocks.first() {
            _ if blocks.iter().any(|line| line.ends_with(wanted)) => Ok(()),
            None => Err(format!("`{shown}` is not a {what}: it holds no PEM block (`-----BEGIN ...-----`)")),
            Some(block) => {
                let other = block.trim_start_matches("-----BEGIN ").trim_end_matches('-');
                Err(format!("`{shown}` is not a {what}: it holds a {}", other.to_lowercase()))
            }
        }
    }

    fn limits(&mut self, config: &Config) {
        let path = Path::default().key("limits");
        let [one, all] = ["body", "buffered_bodies"].map(|key| path.key(key));
        let both_read = self.reading.is_intact(&one) && self.reading.is_intact(&all);
        if both_read && config.limits.buffered_bodies < config.limits.body {
            let at = if self.reading.is_written(&all) { all } else { one };
            let message =
                "`buffered_bodies` is less than `body`: the largest body could never be read".to_owned();
            self.value(at, message, "");
        }
        let [url, head] = ["url", "headers"].map(|key| path.key(key));
        let both_read = self.reading.is_intact(&url) && self.reading.is_intact(&head);
        if both_read && config.limits.headers < config.limits.url + 128 {
            let at = if self.reading.is_written(&head) { head } else { url };
            let message = "`headers` has no room for a URL of `url` bytes".to_owned();
            self.value(at, message, "at least 128 bytes more");
        }
        let bounds =
            [("url", config.limits.url, LONGEST_URL), ("headers", config.limits.headers, LARGEST_HEAD)];
        for (key, _, most) in bounds.into_iter().filter(|(_, size, most)| size > most) {
            self.value(path.key(key), format!("more than the {} KiB that Pingora reads", most >> 10), "");
        }
    }

    fn keys(&mut self, config: &mut Config) {
        let path = Path::default().key("keys");
        let mut seen: BTreeMap<KeyHash, String> = BTreeMap::new();
        for (name, key) in &mut config.keys {
            let path = path.key(name);
            self.name(name, &path, "a key");
            if let Err(message) = key.read(self.folder) {
                self.value(path, message, "");
            } else if let Some(first) = seen.get(&key.hash) {
                self.value(path.clone(), format!("{path} is the same key as {first}"), "");
            } else {
                seen.insert(key.hash, path.to_string());
            }
        }
    }

    /// Complains if `name`, the key at `path`, cannot be the name of `what`.
    fn name(&mut self, name: &str, path: &Path, what: &str) {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            let message = format!("`{name}` is no name for {what}");
            self.key(path.clone(), message, "letters, digits, `-`, `_` and `.`");
        }
    }

    fn routes(&mut self, config: &Config) {
        let path = Path::default().key("routes");
        for (index, route) in config.routes.iter().enumerate() {
            let at = self.reading.item(&path, index);
            let target = Path::default().key("upstreams").key(&route.upstream);
            if !config.upstreams.contains_key(&route.upstream) && self.reading.is_intact(&target) {
                let known: Vec<&str> = config.upstreams.keys().map(String::as_str).collect();
                let message = format!("{at} points to upstream `{}`, which does not exist", route.upstream);
                self.value(at.key("upstream"), message, suggestion(&route.upstream, &known));
            }
            for (number, key) in route.key.iter().enumerate() {
                let holder = Path::default().key("keys").key(key);
                if !config.keys.contains_key(key) && self.reading.is_intact(&holder) {
                    let known: Vec<&str> = config.keys.keys().map(String::as_str).collect();
                    let message = format!("{at} is for key `{key}`, which does not exist");
                    let place = self.reading.item(&at.key("key"), number);
                    self.value(place, message, suggestion(key, &known));
                }
            }
            let earlier = config.routes[..index].iter().enumerate().find(|(before, other)| {
                let whole =
                    self.reading.is_intact(&at) && self.reading.is_intact(&self.reading.item(&path, *before));
                whole && other.covers(route)
            });
            if let Some((before, _)) = earlier {
                let first = self.reading.item(&path, before);
                let message =
                    format!("{at} is never reached: {first} matches all that it does, and comes first");
                self.value(at, message, "put the narrower route first");
            }
        }
    }

    fn upstreams(&mut self, config: &mut Config) {
        let root = Path::default();
        let path = root.key("upstreams");
        if config.upstreams.is_empty() && self.reading.is_intact(&path) {
            self.empty(&root, "upstreams", "one or more, such as `llama: { backends: [10.0.0.1:8000] }`");
        }
        for (name, upstream) in &mut config.upstreams {
            let path = path.key(name);
            self.name(name, &path, "an upstream");
            self.backends(upstream, &path);
            self.discover(upstream, &path);
            self.own_policy(&mut upstream.policy, path.key("policy"));
            self.policy(upstream, &path.key("policy"));
            self.poll(upstream, &path);
            if let Some(Err(message)) = upstream.api_key.as_mut().map(|secret| secret.read(self.folder)) {
                self.value(path.key("api_key"), message, "");
            }
        }
    }

    fn backends(&mut self, upstream: &Upstream, path: &Path) {
        let list = path.key("backends");
        let nobody = upstream.backends.is_empty() && upstream.discover.is_none();
        if nobody && self.reading.is_intact(&list) && self.reading.is_intact(&path.key("discover")) {
            self.empty(
                path,
                "backends",
                "one or more, such as `- 10.0.0.1:8000`, or `discover` in its place",
            );
        }
        self.flaws.extend(listed_twice(&upstream.backends, self.reading, &list));
    }

    fn discover(&mut self, upstream: &mut Upstream, path: &Path) {
        let Some(discover) = &mut upstream.discover else { return };
        let at = path.key("discover");
        if !upstream.backends.is_empty() {
            let message =
                "`discover` beside `backends`: one of them says which backends there are".to_owned();
            self.key(at.clone(), message, "leave one out; a `file` may list fixed backends too");
        }
        let named = [
            ("dns", discover.dns.is_some()),
            ("srv", discover.srv.is_some()),
            ("file", discover.file.is_some()),
        ];
        let mut named = named.into_iter().filter(|(_, is_there)| *is_there).map(|(key, _)| key);
        match (named.next(), named.next()) {
            (None, _) if self.reading.is_intact(&at) => {
                self.key(at.clone(), "`discover` without a source".to_owned(), "`dns`, `srv` or `file`");
            }
            (Some(first), Some(second)) => {
                let message = format!("`{second}` beside `{first}`: backends come from one source");
                self.key(at.key(second), message, "leave one out");
            }
            _ => {}
        }
        if let Some(file) = &mut discover.file {
            *file = self.folder.join(&*file);
            if !discover.servers.is_empty() {
                let message = "`servers` beside `file`: no name server is asked for a file".to_owned();
                self.key(at.key("servers"), message, "it goes with `dns` and `srv`");
            }
        }
    }

    /// Looks a policy that is not built in up among those of this binary.
    fn own_policy(&mut self, policy: &mut PolicyConfig, path: Path) {
        let PolicyConfig::Custom(custom) = &*policy else { return };
        let name = custom.name();
        let options = path.key(name);
        match self.policies.by_name(name) {
            Some(_) if !self.reading.is_empty(&options) => {
                let message = format!("policy `{name}` has no options");
                self.key(options, message, format!("`policy: {name}` is all there is to say"));
            }
            Some(known) => *policy = known,
            None => {
                let message = format!("unknown policy `{name}`");
                let known: Vec<&str> = self.policies.names().collect();
                let mut hint = suggestion(name, &known);
                if nearest(name, &known).is_none() {
                    hint += "; one of your own is known to the binary that it was built into";
                }
                if self.reading.is_written(&options) {
                    self.key(options, message, hint);
                } else {
                    self.value(path, message, hint);
                }
            }
        }
    }

    fn policy(&mut self, upstream: &Upstream, path: &Path) {
        let options = match &upstream.policy {
            PolicyConfig::LeastPendingTokens(options) => vec![
                ("request_tokens", options.request_tokens, 0.0, "0 or more"),
                ("context_factor", options.context_factor, 0.0, "0 or more"),
                ("uncached_factor", options.uncached_factor, 1.0, "1 or more"),
            ],
            PolicyConfig::PrefixHash(options) => {
                vec![("load_factor", options.load_factor, 1.0 + f64::EPSILON, "above 1")]
            }
            PolicyConfig::Blend(options) => {
                let at = path.key("blend");
                let named = options.factors().next().is_some() && self.reading.is_intact(&at);
                if named && options.factors().all(|(_, factor)| factor == 0.0) {
                    let message = "every factor of the blend is 0: nothing is left to choose by".to_owned();
                    self.value(at, message, "give one of them a factor above 0");
                }
                options.factors().map(|(key, factor)| (key, factor, 0.0, "0 or more")).collect()
            }
            PolicyConfig::LeastConnections
            | PolicyConfig::RoundRobin
            | PolicyConfig::RandomTwo
            | PolicyConfig::Lmetric
            | PolicyConfig::Custom(_) => Vec::new(),
        };
        for (key, number, least, range) in options {
            if !(number.is_finite() && number >= least) {
                let message = format!("expected a number {range}, found {number}");
                self.value(path.key(upstream.policy.name()).key(key), message, "");
            }
        }
    }

    fn poll(&mut self, upstream: &Upstream, path: &Path) {
        let written = upstream.poll.as_ref().is_some_and(|poll| poll.path.is_some());
        let engine = upstream.engine;
        if written && engine.preset().metrics_path.is_none() && self.reading.is_intact(&path.key("engine")) {
            let message = format!("engine `{}` has no metrics that could be read", engine.name());
            self.value(
                path.key("poll").key("path"),
                message,
                "say which `engine` the backends run, or `poll: off`",
            );
        }
    }

    /// Without routes the model decides, so it must not be served by two upstreams.
    fn models(&mut self, config: &Config) {
        if !config.routes.is_empty() || !self.reading.is_intact(&Path::default().key("routes")) {
            return;
        }
        let mut served: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, upstream) in &config.upstreams {
            let path = Path::default().key("upstreams").key(name).key("models");
            let models: Vec<(&str, Path)> = match &upstream.models {
                Models::Discover => Vec::new(),
                Models::Any => vec![("any", path)],
                Models::List(list) => list
                    .iter()
                    .enumerate()
                    .map(|(index, model)| (model.as_str(), self.reading.item(&path, index)))
                    .collect(),
            };
            for (model, at) in models {
                match served.get(model) {
                    Some(other) if other != name => {
                        let message = format!(
                            "upstreams `{other}` and `{name}` both serve `{model}`, and no route decides"
                        );
                        self.value(at, message, "");
                    }
                    Some(_) => {}
                    None => {
                        served.insert(model, name);
                    }
                }
            }
        }
    }
}

/// Complains of backends that the list at `path` names twice.
pub(super) fn listed_twice<T>(backends: &[Backend], reading: &Reading<T>, path: &Path) -> Vec<Flaw> {
    let mut seen = BTreeMap::new();
    let mut flaws = Vec::new();
    for (index, backend) in backends.iter().enumerate() {
        let at = reading.item(path, index);
        match seen.get(&backend.address) {
            Some(first) => flaws.push(Flaw {
                path: at.key("address"),
                on_key: false,
                message: format!("backend `{}` is listed twice, first as {first}", backend.address),
                hint: "give it a `weight` to send it more".to_owned(),
            }),
            None => {
                seen.insert(&backend.address, at);
            }
        }
    }
    flaws
}

/// Whether two addresses cannot be listened on at once: the same port of the same host, or of all hosts.
fn clash(a: &str, b: &str) -> bool {
    let (Some((a_host, a_port)), Some((b_host, b_port))) = (a.rsplit_once(':'), b.rsplit_once(':')) else {
        return false;
    };
    let is_every = |host: &str| matches!(host, "0.0.0.0" | "[::]");
    a_port.parse::<u16>() == b_port.parse::<u16>()
        && (a_host.eq_ignore_ascii_case(b_host) || is_every(a_host) || is_every(b_host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_clash_on_the_same_port_of_the_same_or_of_every_host() {
        assert!(clash("127.0.0.1:80", "127.0.0.1:80"));
        assert!(clash("0.0.0.0:80", "127.0.0.1:80"));
        assert!(clash("[::1]:80", "[::]:080"));
        assert!(!clash("127.0.0.1:80", "127.0.0.2:80"));
        assert!(!clash("0.0.0.0:80", "0.0.0.0:81"));
    }
}
