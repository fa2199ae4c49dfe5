//! A port that stays ours: a socket that is bound but never listens holds it for as long as the value lives.
//!
//! "Bind port 0, read, release" races with every other test of the run. A bound socket that does not listen
//! refuses connections, which is exactly a dead engine, and with SO_REUSEADDR on both sides another socket
//! may still listen on the port: the proxy under test, or an engine that comes back.

use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpSocket};

/// A port of 127.0.0.1 that nobody else is given.
pub struct Port {
    address: SocketAddr,
    _held: TcpSocket,
}

impl Port {
    /// Takes a free port. Connecting to it is refused until somebody listens.
    pub fn take() -> Self {
        let held = reusable();
        held.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        Self { address: held.local_addr().expect("a bound socket has an address"), _held: held }
    }

    /// The same port of `127.0.0.host`, another address of this machine.
    pub fn beside(&self, host: u8) -> Self {
        let held = reusable();
        let address = SocketAddr::from(([127, 0, 0, host], self.address.port()));
        held.bind(address).expect("nobody else listens on other addresses of ours");
        Self { address, _held: held }
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Listens on it. Dropping the listener makes the port refuse again.
    pub fn listen(&self) -> TcpListener {
        let socket = reusable();
        socket.bind(self.address).expect("the port is held for us");
        socket.listen(1024).expect("nobody else listens on a held port")
    }
}

fn reusable() -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("SO_REUSEADDR");
    socket
}
