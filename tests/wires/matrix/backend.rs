//! The far side of a row: scripted engines, and ports behind which there is none.

use super::row::{GOOD_BODY, Ill, Scene};
use crate::support::engine::{Answer, Engine, Gate, Seen, delta};
use crate::support::port::Port;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

/// A backend of the configuration.
pub(super) enum Backend {
    /// A scripted engine, listening or not.
    Engine(Engine),
    /// A port that accepts and closes.
    Door(Port, JoinHandle<()>),
    /// A port whose backlog is full: it answers no connection.
    Hole(TcpListener, #[expect(dead_code, reason = "it is held, not used")] TcpStream),
}

impl Backend {
    /// An engine that is asked for nothing but good answers.
    pub(super) fn well(gate: &Gate) -> Self {
        let gate = gate.clone();
        Self::Engine(Engine::start(move |seen| match seen.head.header("x-well") {
            Some(_) => good(seen),
            None => good(seen).held_at(&gate),
        }))
    }

    /// An engine that does this, unless it is asked for a good answer.
    pub(super) fn doing(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        Self::Engine(Engine::start(move |seen| match seen.head.header("x-well") {
            Some(_) => good(seen),
            None => script(seen),
        }))
    }

    async fn ill(ill: Ill, gate: &Gate) -> Self {
        let gate = gate.clone();
        match ill {
            Ill::Refuses => Self::Engine(Engine::dead(|_| Answer::nothing())),
            Ill::Does(script) => Self::doing(move |_| script(&gate)),
            Ill::ClosesAtOnce => {
                let port = Port::take();
                let listener = port.listen();
                Self::Door(port, tokio::spawn(async move { while listener.accept().await.is_ok() {} }))
            }
            Ill::BlackHole => {
                let socket = TcpSocket::new_v4().expect("a socket");
                socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
                // One connection that nobody accepts, and there is room for no other.
                let listener = socket.listen(0).expect("a listener");
                let address = listener.local_addr().expect("a bound socket has an address");
                let only = TcpStream::connect(address).await.expect("the first finds room");
                Self::Hole(listener, only)
            }
        }
    }

    /// The backends of a scene; the first is the one that is asked first.
    pub(super) async fn of(scene: &Scene, gate: &Gate) -> Vec<Self> {
        match scene {
            Scene::One(ill) => vec![Self::ill(*ill, gate).await, Self::well(gate)],
            Scene::Both(ill) => vec![Self::ill(*ill, gate).await, Self::ill(*ill, gate).await],
            Scene::Goes(..) => {
                let gate = gate.clone();
                vec![Self::doing(move |seen| match seen.head.header("x-opened") {
                    Some(_) => Answer::stream().wait(&gate).event(&delta("a")).end(),
                    None => streaming(&gate),
                })]
            }
            Scene::Play(backends, _) => backends(gate),
        }
    }

    /// The engine, if there is one.
    pub(super) fn engine(&self) -> Option<&Engine> {
        match self {
            Self::Engine(engine) => Some(engine),
            Self::Door(..) | Self::Hole(..) => None,
        }
    }

    /// Where it is, as in the configuration and in the metrics.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Engine(engine) => engine.address(),
            Self::Door(port, _) => port.address().to_string(),
            Self::Hole(listener, _) => listener.local_addr().expect("a bound socket").to_string(),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Self::Door(_, accepting) = self {
            accepting.abort();
        }
    }
}

/// A good answer to what was asked for.
pub(super) fn good(seen: &Seen) -> Answer {
    let text = String::from_utf8_lossy(&seen.body);
    match text.contains("\"stream\":true") {
        true => Answer::stream_of(&[&delta("hello")]),
        false => Answer::json(200, GOOD_BODY),
    }
}

/// A stream that waits before its header and after its first event.
fn streaming(gate: &Gate) -> Answer {
    Answer::stream().event(&delta("a")).wait(gate).event("[DONE]").end().held_at(gate)
}
