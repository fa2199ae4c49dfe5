//! The sockets that we listen on: opened here, given by systemd, or taken over from the process before us.
//!
//! Pingora opens its own inside a task, after the start, where nobody hears of a failure, and hands them over to a
//! successor of which it does not know whether it lives. Ours are open before anything runs. A socket stays the same
//! through any number of processes: what waits in its queue is accepted by the next one.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use listenfd::ListenFd;
use pingora::protocols::l4::listener::Listener;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, getsockname};
use rustix::process::umask;
use socket2::{Domain, Protocol, Type};

use super::StartError;
use crate::config::{AdminAddress, Config};

/// Connections that may wait to be accepted; the kernel has a limit of its own (`net.core.somaxconn`).
const BACKLOG: i32 = 65_535;

/// Nobody but us and root talks to a socket of ours.
const SOCKET_MODE: u32 = 0o600;

/// A socket that listens.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The sockets of a configuration.
#[derive(Debug)]
pub(super) struct Sockets {
    /// In the order of the configuration.
    pub(super) listeners: Vec<Socket>,
    pub(super) admin: Option<Socket>,
}

impl Sockets {
    /// The sockets of `config`: those of `inherited` that are bound to its addresses, which are taken from it, and new
    /// ones for the rest.
    ///
    /// # Errors
    /// The first address that cannot be listened on.
    pub(super) fn open(config: &Config, inherited: &mut Vec<Socket>) -> Result<Self, StartError> {
        let mut tcp = |address: &str| {
            let opened = resolve(address).and_then(|at| match take(inherited, |s| s.is_bound_to(at)) {
                Some(socket) => Ok(socket),
                None => listen(at).map(Socket::Tcp),
            });
            opened.map_err(|e| StartError(format!("cannot listen on {address}: {e}")))
        };
        let listeners = config.listeners.iter().map(|listener| tcp(&listener.address));
        let listeners = listeners.collect::<Result<_, _>>()?;
        let admin = match config.admin.as_ref().map(|admin| &admin.address) {
            None => None,
            Some(AdminAddress::Tcp(address)) => Some(tcp(address)?),
            Some(AdminAddress::Unix(path)) => {
                let opened = match take(inherited, |s| s.is_at(path)) {
                    Some(socket) => Ok(socket),
                    None => listen_unix(path).map(Socket::Unix),
                };
                Some(
                    opened
                        .map_err(|e| StartError(format!("cannot listen on unix:{}: {e}", path.display())))?,
                )
            }
        };
        Ok(Self { listeners, admin })
    }

    /// The same sockets once more, for whoever comes after us.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn again(&self) -> io::Result<Vec<Socket>> {
        self.listeners.iter().chain(&self.admin).map(Socket::again).collect()
    }
}

impl Socket {
    /// What systemd opened for us (sd_listen_fds(3)).
    ///
    /// # Errors
    /// One of them is no listening stream socket.
    pub(super) fn from_systemd() -> Result<Vec<Self>, StartError> {
        let mut given = ListenFd::from_env();
        let count = given.len();
        let mut taken = |index| {
            let tcp = given.take_tcp_listener(index);
            tcp.map(|s| s.map(Self::Tcp))
                .or_else(|_| given.take_unix_listener(index).map(|s| s.map(Self::Unix)))
        };
        let sockets = (0..count).filter_map(|index| taken(index).transpose());
        sockets.collect::<io::Result<_>>().map_err(|e| StartError(format!("a socket from systemd: {e}")))
    }

    /// The socket behind a descriptor that was passed to us.
    ///
    /// # Errors
    /// It is none.
    pub(super) fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Ok(match getsockname(&descriptor)?.address_family() {
            AddressFamily::INET | AddressFamily::INET6 => Self::Tcp(descriptor.into()),
            AddressFamily::UNIX => Self::Unix(descriptor.into()),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// As Pingora accepts from it. On a thread of a tokio runtime.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn into_listener(self) -> io::Result<Listener> {
        // A socket from systemd blocks, unless its unit says otherwise.
        Ok(match self {
            Self::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(socket)?.into()
            }
            Self::Unix(socket) => {
                socket.set_nonblocking(true)?;
                tokio::net::UnixListener::from_std(socket)?.into()
            }
        })
    }

    fn again(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(socket) => socket.try_clone().map(Self::Tcp),
            Self::Unix(socket) => socket.try_clone().map(Self::Unix),
        }
    }

    fn is_bound_to(&self, address: SocketAddr) -> bool {
        matches!(self, Self::Tcp(socket) if socket.local_addr().is_ok_and(|bound| bound == address))
    }

    fn is_at(&self, path: &Path) -> bool {
        let Self::Unix(socket) = self else { return false };
        socket.local_addr().is_ok_and(|bound| bound.as_pathname() == Some(path))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

fn take(sockets: &mut Vec<Socket>, is_it: impl Fn(&Socket) -> bool) -> Option<Socket> {
    let place = sockets.iter().position(is_it)?;
    Some(sockets.swap_remove(place))
}

/// The address to listen on: the first one of a name.
fn resolve(address: &str) -> io::Result<SocketAddr> {
    address.to_socket_addrs()?.next().ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of the process before us may still wait for their last packets.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Listens at `path`, where there may be nothing, or a socket that a dead process has left.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    match path.symlink_metadata() {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file, and it is no socket"));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(e) => return Err(e),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    // Nobody else may connect, not even between two calls of ours.
    let before = umask(Mode::from_raw_mode(!SOCKET_MODE & 0o777));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens_on_it() {
        let folder = std::env::temp_dir().join(format!("plimsoll-socket-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("admin.sock");
        let listener = listen_unix(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert_eq!(listen_unix(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(path.exists(), "a dead process leaves its socket");
        drop(listen_unix(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(listen_unix(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        assert!(listen_unix(&folder.join("absent/admin.sock")).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
