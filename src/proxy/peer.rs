//! The peer: how Pingora shall connect to a backend, and for how long it may keep the connection.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use pingora::protocols::TcpKeepalive;
use pingora::upstreams::peer::HttpPeer;

use crate::config;
use crate::upstream::Live;

/// A host that is gone without a word is noticed within half a minute, whatever its engine was doing.
const TCP_KEEPALIVE: TcpKeepalive = TcpKeepalive {
    idle: Duration::from_secs(15),
    interval: Duration::from_secs(5),
    count: 3,
    user_timeout: Duration::from_secs(30),
};

/// The peer for a backend; `fresh` if no pooled connection may be used. Whoever asks for that must close it
/// afterwards.
pub(super) fn peer(config: &config::Upstream, live: &Live, fresh: bool) -> HttpPeer {
    let tls = config.tls.is_some();
    let mut peer =
        HttpPeer::new(live.address, tls, if tls { live.server_name.clone() } else { String::new() });
    // A group of its own, into which nothing is ever put back: an idle time of zero would be too late for that.
    peer.group_key = u64::from(fresh);
    let options = &mut peer.options;
    options.connection_timeout = Some(config.timeouts.connect);
    // TCP and TLS each get `connect`; together they may not take more than both.
    options.total_connection_timeout = Some(config.timeouts.connect * 2);
    options.read_timeout = Some(config.timeouts.read);
    options.write_timeout = Some(config.timeouts.send);
    options.tcp_keepalive = Some(TCP_KEEPALIVE);
    live.connections.follow(options);
    options.idle_timeout = Some(config.keepalive.idle_timeout);
    peer
}

/// Counts the requests on each upstream connection, to close it after `keepalive.requests`, which Pingora
/// cannot.
///
/// A connection is known by its descriptor and the time it was made; the map is as small as the number of
/// descriptors.
#[derive(Default)]
pub(super) struct ConnectionUses(Mutex<HashMap<RawFd, (SystemTime, u32)>>);

impl ConnectionUses {
    /// Counts a request on the connection `fd` made at `established`; how many it has had.
    pub(super) fn count(&self, fd: RawFd, established: SystemTime) -> u32 {
        let mut uses = self.0.lock();
        let entry = uses.entry(fd).or_insert((established, 0));
        if entry.0 != established {
            *entry = (established, 0);
        }
        entry.1 += 1;
        entry.1
    }
}

/// The wait that an engine asks for in `Retry-After`, in seconds; dates are not understood.
pub(super) fn retry_after(header: &pingora::http::ResponseHeader) -> Option<Duration> {
    header.headers.get("retry-after")?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_used_again_by_a_new_connection_starts_over() {
        let uses = ConnectionUses::default();
        let (first, second) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        assert_eq!([uses.count(7, first), uses.count(7, first), uses.count(8, first)], [1, 2, 1]);
        assert_eq!([uses.count(7, second), uses.count(7, second)], [1, 2]);
    }
}
