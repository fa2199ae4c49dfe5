//! What systemd is told, one datagram each (sd_notify(3)); nothing without `NOTIFY_SOCKET`.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Tells systemd `state`, if it asked for it.
pub(super) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = (|| {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    })();
    if let Err(e) = sent {
        log::warn!("systemd not notified state={state:?} error={e}");
    }
}

/// Tells systemd that something is going on, which ends with `READY=1`. With the time, as units of the type
/// `notify-reload` want it.
pub(super) fn reloading() {
    let now = clock_gettime(ClockId::Monotonic);
    let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
}

/// How long systemd waits for a sign of life, if it does (sd_watchdog_enabled(3)).
pub(super) fn watchdog_timeout() -> Option<Duration> {
    let of = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = of("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let timeout = of("WATCHDOG_USEC").filter(|timeout| ours && *timeout > 0)?;
    Some(Duration::from_micros(timeout))
}
