//! The PROXY protocol, versions 1 and 2: a TCP balancer in front of us says first whose connection this is.
//!
//! It is read from those alone whom the configuration trusts: whoever may send it may call himself anything.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use pingora::protocols::l4::socket::SocketAddr as AnyAddr;
use pingora::protocols::l4::stream::Stream as TcpStream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use ppp::v2::Command;
use ppp::{HeaderResult, PartialResult, v1, v2};
use tokio::io::AsyncReadExt;

use super::chunks::Malformed;

/// Longer ones, with kilobytes of extensions, are nobody's.
const LONGEST: usize = 4 * 1024;

/// The longest line of version 1, by its specification.
const LONGEST_LINE: usize = 107;

/// Reads the header and makes `tcp` the connection of the client it names; the client's address, or `None` if
/// there is no such header. A balancer that speaks for itself (its health check) is the client.
pub(super) async fn read(tcp: &mut TcpStream, peer: IpAddr) -> Option<IpAddr> {
    let mut bytes = Vec::new();
    let (length, client) = loop {
        if tcp.read_buf(&mut bytes).await.ok()? == 0 || bytes.len() > LONGEST {
            return None;
        }
        if let Some(found) = header(&bytes).ok()? {
            break found;
        }
    };
    tcp.rewind(&bytes[length..]);
    let Some(client) = client else { return Some(peer) };
    let digest = SocketDigest::from_raw_fd(tcp.as_raw_fd());
    // It is new: nobody has asked it for an address yet.
    let _is_first = digest.peer_addr.set(Some(AnyAddr::Inet(client)));
    tcp.set_socket_digest(digest);
    Some(client.ip())
}

/// The length of the header that `bytes` begin with, and the client it names, if it names one; `None` if its end is
/// not there yet.
///
/// # Errors
/// There is no such header.
pub fn header(bytes: &[u8]) -> Result<Option<(usize, Option<SocketAddr>)>, Malformed> {
    if !bytes.starts_with(b"PROXY ") {
        let header = HeaderResult::parse(bytes);
        return if header.is_complete() { parsed(&header).map(Some).ok_or(Malformed) } else { Ok(None) };
    }
    // Version 1 is a line, for whose end the parser neither waits nor insists on CRLF.
    let Some(end) = bytes.iter().take(LONGEST_LINE).position(|&b| b == b'\n') else {
        return if bytes.len() < LONGEST_LINE { Ok(None) } else { Err(Malformed) };
    };
    let line = &bytes[..=end];
    let is_line = line.strip_suffix(b"\r\n").is_some_and(|text| !text.contains(&b'\r'));
    let found = parsed(&HeaderResult::parse(line)).filter(|(length, _)| is_line && *length == line.len());
    found.map(Some).ok_or(Malformed)
}

fn parsed(header: &HeaderResult<'_>) -> Option<(usize, Option<SocketAddr>)> {
    match header {
        HeaderResult::V1(header) => {
            let header = header.as_ref().ok()?;
            let client = match &header.addresses {
                v1::Addresses::Tcp4(ip) => Some((ip.source_address, ip.source_port).into()),
                v1::Addresses::Tcp6(ip) => Some((ip.source_address, ip.source_port).into()),
                v1::Addresses::Unknown => None,
            };
            Some((header.header.len(), client))
        }
        HeaderResult::V2(header) => {
            let header = header.as_ref().ok()?;
            let client = match &header.addresses {
                _ if header.command == Command::Local => None,
                v2::Addresses::IPv4(ip) => Some((ip.source_address, ip.source_port).into()),
                v2::Addresses::IPv6(ip) => Some((ip.source_address, ip.source_port).into()),
                v2::Addresses::Unix(_) | v2::Addresses::Unspecified => None,
            };
            Some((header.len(), client))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Option<(usize, Option<SocketAddr>)> {
        header(bytes).ok().flatten()
    }

    #[test]
    fn both_versions_name_the_client_and_end_where_they_say() {
        let v1 = b"PROXY TCP4 192.0.2.1 10.0.0.1 4000 80\r\n";
        let with_more = [&v1[..], b"\xff\xfeGET"].concat();
        assert_eq!(read(&with_more), Some((v1.len(), Some("192.0.2.1:4000".parse().unwrap()))));
        let unknown = b"PROXY UNKNOWN\r\n";
        assert_eq!(read(unknown), Some((unknown.len(), None)));
        let signature = b"\r\n\r\n\0\r\nQUIT\n";
        let addresses = [192, 0, 2, 1, 10, 0, 0, 1, 0x0f, 0xa0, 0, 80];
        let v2 = [&signature[..], &[0x21, 0x11, 0, 12], &addresses].concat();
        assert_eq!(
            read(&[&v2[..], b"GET"].concat()),
            Some((v2.len(), Some("192.0.2.1:4000".parse().unwrap())))
        );
        let local = [&signature[..], &[0x20, 0x00, 0, 0]].concat();
        assert_eq!(read(&local), Some((local.len(), None)));
        for whole in [&v1[..], &unknown[..], &v2[..]] {
            for cut in 0..whole.len() {
                assert_eq!(header(&whole[..cut]), Ok(None), "cut at {cut}");
            }
        }
        assert_eq!(header(&[&b"PROXY "[..], &[b'x'; 101]].concat()), Err(Malformed), "too long for a line");
        for odd in ["PROXY UNKNOWN x \n", "PROXY TCP4 192.0.2.1\r10.0.0.1 4000 80\r\n", "PROXY UNKNOWN\n"] {
            assert_eq!(header(odd.as_bytes()), Err(Malformed), "{odd:?}");
        }
        assert_eq!(header(b"GET / HTTP/1.1\r\n\r\n"), Err(Malformed));
    }
}
