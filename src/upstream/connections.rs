//! The open connections to one backend, so that those to a process which is gone can be ended.
//!
//! vLLM that is told to stop may leave a stream open and silent for ever (research/engines.md s.3.1), and Pingora
//! waits in a read that nothing of ours can interrupt. So each connection is also known here, by a second
//! descriptor of its socket: shutting that down ends the read, as if the engine had closed. It is let go as Pingora
//! closes its own, or the engine would never see the end of the connection. Nothing of this is touched between
//! the making of a connection and its end.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pingora::upstreams::peer::{PeerOptions, Tracer, Tracing};
use tokio::net::TcpSocket;

/// The connections to one backend.
#[derive(Debug, Default)]
pub struct Connections {
    open: Mutex<Vec<Weak<Handle>>>,
}

/// A second descriptor of one connection, while that is open.
#[derive(Debug, Default)]
struct Handle {
    socket: Mutex<Option<TcpStream>>,
}

impl Connections {
    /// The connection that is made with `options`, if one is made, will be known here.
    pub fn follow(self: &Arc<Self>, options: &mut PeerOptions) {
        let (connections, handle) = (self.clone(), Arc::<Handle>::default());
        options.tracer = Some(Tracer(Box::new(Follower(handle.clone()))));
        options.upstream_tcp_sock_tweak_hook = Some(Arc::new(move |socket| {
            connections.add(&handle, socket);
            Ok(())
        }));
    }

    /// Ends every connection; how many there were.
    pub fn hang_up(&self) -> usize {
        let open: Vec<_> = self.open.lock().iter().filter_map(Weak::upgrade).collect();
        open.iter().filter(|handle| handle.hang_up()).count()
    }

    /// Without a descriptor to spare the connection is as good, and ends with its own timeout.
    fn add(&self, handle: &Arc<Handle>, socket: &TcpSocket) {
        let Ok(second) = socket.as_fd().try_clone_to_owned() else { return };
        *handle.socket.lock() = Some(second.into());
        let mut open = self.open.lock();
        open.retain(|known| known.strong_count() > 0);
        open.push(Arc::downgrade(handle));
    }
}

impl Handle {
    fn hang_up(&self) -> bool {
        self.socket.lock().as_ref().is_some_and(|socket| socket.shutdown(Shutdown::Both).is_ok())
    }
}

/// Told by Pingora when the connection ends.
#[derive(Clone, Debug)]
struct Follower(Arc<Handle>);

impl Tracing for Follower {
    fn on_connected(&self) {}

    fn on_disconnected(&self) {
        *self.0.socket.lock() = None;
    }

    fn boxed_clone(&self) -> Box<dyn Tracing> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn hanging_up_ends_a_read_and_a_connection_that_has_ended_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connections = Arc::new(Connections::default());
        let mut options = PeerOptions::new();
        connections.follow(&mut options);
        let socket = TcpSocket::new_v4().unwrap();
        options.upstream_tcp_sock_tweak_hook.as_ref().unwrap()(&socket).unwrap();
        let mut near = socket.connect(listener.local_addr().unwrap()).await.unwrap();
        let (_far, _) = listener.accept().await.unwrap();
        let (read, ended) = tokio::join!(near.read_u8(), async { connections.hang_up() });
        assert!(read.is_err());
        assert_eq!(ended, 1);
        options.tracer.as_ref().unwrap().0.on_disconnected();
        assert_eq!(connections.hang_up(), 0);
    }

    #[tokio::test]
    async fn a_connection_that_was_never_made_is_forgotten() {
        let connections = Arc::new(Connections::default());
        for _ in 0..3 {
            let mut options = PeerOptions::new();
            connections.follow(&mut options);
            options.upstream_tcp_sock_tweak_hook.as_ref().unwrap()(&TcpSocket::new_v4().unwrap()).unwrap();
        }
        assert_eq!(connections.hang_up(), 0);
        assert_eq!(connections.open.lock().len(), 1);
    }
}
