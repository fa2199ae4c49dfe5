//! How many connections each client has.
//!
//! A client is an IPv4 address, or the /64 of an IPv6 address: nobody gets less than that, so nobody may
//! count for more.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

/// The connections of all clients.
#[derive(Clone, Default)]
pub(super) struct Clients(Arc<Mutex<HashMap<IpAddr, u32>>>);

/// One connection of a client, until dropped.
pub(super) struct Connected {
    clients: Clients,
    client: IpAddr,
}

impl Clients {
    /// One more connection from `address`; `None` if it has `limit` already.
    pub(super) fn enter(&self, address: IpAddr, limit: u32) -> Option<Connected> {
        let client = client(address);
        let mut counts = self.0.lock();
        let count = counts.entry(client).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Connected { clients: self.clone(), client })
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.clients.0.lock().entry(self.client) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_count_and_leaves_nothing_behind() {
        let clients = Clients::default();
        let enter = |address: &str| clients.enter(address.parse().unwrap(), 2);
        let first = enter("10.0.0.1");
        let second = enter("::ffff:10.0.0.1");
        assert!(first.is_some() && second.is_some() && enter("10.0.0.1").is_none());
        assert!(enter("10.0.0.2").is_some());
        drop(first);
        assert!(enter("10.0.0.1").is_some());
        let same = (enter("2001:db8::1"), enter("2001:db8::2:0:0:1"));
        assert!(same.0.is_some() && same.1.is_some() && enter("2001:db8::3").is_none());
        drop((second, same));
        assert!(clients.0.lock().is_empty());
    }
}
