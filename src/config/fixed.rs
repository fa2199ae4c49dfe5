//! What a running process cannot change: sockets it has opened, threads it has started, what Pingora was told once.
//!
//! A reload applies everything else, and says which of these keys wait for a restart.

use std::collections::BTreeSet;

use super::file::Config;

impl Config {
    /// The keys that `new` has changed and that only a restart, or an upgrade, applies; in the order of the reference.
    pub fn fixed_differences(&self, new: &Self) -> Vec<&'static str> {
        let addresses = |config: &Self| -> BTreeSet<String> {
            config.listeners.iter().map(|listener| listener.address.clone()).collect()
        };
        let kept = |config: &Self| -> u64 {
            config.upstreams.values().map(|upstream| u64::from(upstream.keepalive.connections)).sum()
        };
        let (server, limits) = (&self.server, &self.limits);
        let differences = [
            ("server.threads", server.threads != new.server.threads),
            ("server.pid_file", server.pid_file != new.server.pid_file),
            ("server.open_files", server.open_files != new.server.open_files),
            ("the addresses of listeners", addresses(self) != addresses(new)),
            ("admin", self.admin != new.admin),
            ("observe.traces", self.observe.traces != new.observe.traces),
            ("limits.headers for HTTP/2", limits.headers != new.limits.headers),
            ("limits.client_idle for HTTP/2", limits.client_idle != new.limits.client_idle),
            ("limits.http2_control_frames", limits.http2_control_frames != new.limits.http2_control_frames),
            ("limits.http2_streams", limits.http2_streams != new.limits.http2_streams),
            ("keepalive.connections", kept(self) != kept(new)),
        ];
        differences.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_change_is_told() {
        let read = |text: &str| serde_yaml::from_str::<Config>(text).unwrap();
        let before = read("listeners: [{address: 'a:1'}]\nupstreams: {u: {backends: ['b:1']}}");
        let live = "limits: {body: 1MiB}\nlisteners: [{address: 'a:1', http2: true}]\n\
                    upstreams: {u: {backends: ['b:2']}}";
        assert_eq!(before.fixed_differences(&read(live)), [""; 0]);
        let fixed = "server: {threads: 77}\nlisteners: [{address: 'a:2'}]\nadmin: {address: '127.0.0.1:1'}";
        let told = ["server.threads", "the addresses of listeners", "admin", "keepalive.connections"];
        assert_eq!(before.fixed_differences(&read(fixed)), told);
    }
}
