//! How a value of the file is written: durations, sizes, ranges, addresses, and the few keys that take two
//! forms.
//!
//! Every form is a visitor, so that what is wrong is refused where it stands and the message names the right
//! form. A number without a unit is refused: 30 of what?
//!
//! | form | examples | rule |
//! |---|---|---|
//! | duration | `250ms` `30s` `5m` `1h` | a whole number and a unit; above zero, at most a year |
//! | size | `512B` `64KiB` `32MiB` `1GiB` `1GB` | the same; `KB` is 1,000 and `KiB` is 1,024 |
//! | address | `10.0.0.1:8000` `gpu-7:8000` `[::1]:8000` | host and port, nothing else |

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use http::Uri;
use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
    Visitor,
};

use super::file::AdminAddress;
use crate::policy::{Custom, PolicyConfig};

/// A duration such as `30s`.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    text(deserializer, DURATION, parse_duration)
}

/// [`duration`], for a key that may be left out.
pub(super) fn some_duration<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

/// A size in bytes such as `64KiB`.
pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    text(deserializer, SIZE, parse_size)
}

/// `host:port`, kept as it is written.
pub(super) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_any(Address)
}

/// [`address`], for a key that may be left out.
pub(super) fn some_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    address(deserializer).map(Some)
}

/// The name of SRV records, for a key that may be left out.
pub(super) fn some_service<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let parse = |name: &str| name.trim_end_matches('.').split('.').all(is_label).then(|| name.to_owned());
    text(deserializer, "a name of SRV records such as `_vllm._tcp.engines.internal`", parse).map(Some)
}

/// `host:port`, or `unix:` and the path of a socket.
pub(super) fn admin_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AdminAddress, D::Error> {
    deserializer.deserialize_any(AddressOrSocket)
}

/// The path of a URL, which begins with `/`.
pub(super) fn url_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let parse = |text: &str| {
        let is_path = text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
        is_path.then(|| text.to_owned())
    };
    text(deserializer, "a path that begins with `/`", parse)
}

/// [`url_path`], for a key that may be left out.
pub(super) fn some_url_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    url_path(deserializer).map(Some)
}

/// The URL of a collector of traces, with its path.
pub(super) fn collector<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uri, D::Error> {
    text(deserializer, "the URL of a collector, such as `http://127.0.0.1:4318`", parse_collector)
}

/// A share of a whole.
pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let share = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(D::Error::invalid_value(Unexpected::Float(share), &"a share from 0 to 1"))
    }
}

/// A whole number from `MIN` to `MAX`.
pub(super) fn between<'de, D: Deserializer<'de>, const MIN: u32, const MAX: u32>(
    deserializer: D,
) -> Result<u32, D::Error> {
    deserializer.deserialize_any(Between { min: MIN, max: MAX })
}

/// [`between`], for a key that may be left out.
pub(super) fn some_between<'de, D: Deserializer<'de>, const MIN: u32, const MAX: u32>(
    deserializer: D,
) -> Result<Option<u32>, D::Error> {
    between::<_, MIN, MAX>(deserializer).map(Some)
}

/// `off` (which some YAML writers turn into `false`) or a map.
pub(super) fn off_or<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_any(OffOr(PhantomData))
}

/// One value or a list of at least one.
pub(super) fn one_or_many<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_any(OneOrMany(PhantomData))
}

/// The name of a policy, or a map of that one name to the policy's options. A name that is not built in is
/// looked up by `check`.
pub(super) fn policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PolicyConfig, D::Error> {
    deserializer.deserialize_any(NameOrMap)
}

/// A duration, or `off` for none at all, which reads as zero.
pub(super) fn duration_or_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let parse = |text: &str| if text == "off" { Some(Duration::ZERO) } else { parse_duration(text) };
    text(deserializer, "a duration such as `30s`, or `off`", parse)
}

/// A text that `parse` understands, and that looks as `expected` says.
pub(super) fn text<'de, T, D: Deserializer<'de>>(
    deserializer: D,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(Text { expected, parse })
}

/// What a duration looks like.
pub(super) const DURATION: &str = "a duration such as `30s` or `250ms`";
const SIZE: &str = "a size such as `64KiB` or `32MiB`";

/// Longer than anything one would wait for, and far from the limits of every timer.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3_600);

/// Reads a duration such as `30s`; on the command line it is written as in the file.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let duration = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.checked_mul(60)?),
        "h" => Duration::from_secs(number.checked_mul(3_600)?),
        _ => return None,
    };
    (duration > Duration::ZERO && duration <= LONGEST).then_some(duration)
}

/// A URL of a host and perhaps a port and a path; without a path it is OTLP's own.
fn parse_collector(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let authority = uri.authority().filter(|authority| !authority.host().is_empty())?;
    let is_plain = !text.contains(['@', '#']) && uri.query().is_none();
    let is_bare = authority.as_str() == authority.host();
    let is_address = is_bare || authority.port_u16().is_some_and(|port| port > 0);
    if !matches!(uri.scheme_str(), Some("http" | "https")) || !is_plain || !is_address {
        return None;
    }
    if uri.path() != "/" {
        return Some(uri);
    }
    format!("{}/v1/traces", text.trim_end_matches('/')).parse().ok()
}

fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let bytes = match unit {
        "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(bytes).filter(|size| *size > 0)
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    Some((text[..unit_at].parse().ok()?, &text[unit_at..]))
}

/// What is wrong with an address, in words that follow "an address such as ..."; `None` if nothing is.
fn address_flaw(text: &str) -> Option<&'static str> {
    if text.contains("://") {
        return Some(": no scheme (for TLS there is the key `tls`)");
    }
    if text.contains('/') {
        return Some(": no path");
    }
    let Some((host, port)) = text.rsplit_once(':') else { return Some(": the port is missing") };
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let is_ip = inner.parse::<std::net::Ipv6Addr>().is_ok();
        return if is_ip { port_flaw(port) } else { Some(": no IPv6 address in the brackets") };
    }
    if host.contains(':') {
        return Some(": an IPv6 address needs brackets, as in `[::1]:8000`");
    }
    if host.is_empty() || host == "*" {
        return Some(": the host is missing (`0.0.0.0` is all of IPv4, `[::]` all of IPv6)");
    }
    let looks_like_ip = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if !host.split('.').all(is_label) || (looks_like_ip && host.parse::<std::net::Ipv4Addr>().is_err()) {
        return Some(": no such host name or IP address can be");
    }
    port_flaw(port)
}

/// Whether this can stand between the dots of a host name.
fn is_label(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn port_flaw(port: &str) -> Option<&'static str> {
    let is_port = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    (!is_port).then_some(": the port is a number from 1 to 65535")
}

/// A string that `parse` understands.
struct Text<F> {
    expected: &'static str,
    parse: F,
}

impl<T, F: Fn(&str) -> Option<T>> Visitor<'_> for Text<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

struct Address;

impl Visitor<'_> for Address {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address such as `10.0.0.1:8000`")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        check_address(text)?;
        Ok(text.to_owned())
    }
}

struct AddressOrSocket;

impl Visitor<'_> for AddressOrSocket {
    type Value = AdminAddress;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address such as `127.0.0.1:9090` or `unix:/run/plimsoll/admin.sock`")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<AdminAddress, E> {
        match text.strip_prefix("unix:") {
            Some("") => Err(E::invalid_value(Unexpected::Str(text), &self)),
            Some(path) => Ok(AdminAddress::Unix(path.into())),
            None if text.starts_with('/') => Err(E::invalid_value(Unexpected::Str(text), &self)),
            None => Address.visit_str(text).map(AdminAddress::Tcp),
        }
    }
}

/// Refuses what is not `host:port`, and says why.
pub(super) fn check_address<E: Error>(text: &str) -> Result<(), E> {
    match address_flaw(text) {
        None => Ok(()),
        Some(flaw) => {
            let found = if text.is_empty() { "an empty string".to_owned() } else { format!("`{text}`") };
            Err(E::custom(format!("expected an address such as `10.0.0.1:8000`, found {found}{flaw}")))
        }
    }
}

struct Between {
    min: u32,
    max: u32,
}

impl Visitor<'_> for Between {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {} to {}", self.min, self.max)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u32, E> {
        match u32::try_from(number) {
            Ok(small) if (self.min..=self.max).contains(&small) => Ok(small),
            _ => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
        }
    }
}

struct OffOr<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OffOr<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`off` or a map of options")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Option<T>, E> {
        if text == "off" { Ok(None) } else { Err(E::invalid_value(Unexpected::Str(text), &self)) }
    }

    fn visit_bool<E: Error>(self, on: bool) -> Result<Option<T>, E> {
        if on { Err(E::invalid_value(Unexpected::Bool(on), &self)) } else { Ok(None) }
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        T::deserialize(MapDeserializer::new(std::iter::empty::<(&str, &str)>())).map(Some)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}

struct OneOrMany<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMany<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name or a list of names")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        T::deserialize(text.into_deserializer()).map(|one| vec![one])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut many = Vec::new();
        while let Some(one) = list.next_element()? {
            many.push(one);
        }
        if many.is_empty() {
            Err(A::Error::custom("expected at least one name, found none"))
        } else {
            Ok(many)
        }
    }
}

struct NameOrMap;

impl<'de> Visitor<'de> for NameOrMap {
    type Value = PolicyConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a policy such as `least_pending_tokens`, or a map of one policy to its options")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<PolicyConfig, E> {
        Ok(named(name))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PolicyConfig, A::Error> {
        let Some(named) = map.next_key_seed(PolicyName)? else {
            return Err(A::Error::invalid_type(Unexpected::Other("an empty map"), &self));
        };
        let policy = match named {
            PolicyConfig::LeastPendingTokens(_) => PolicyConfig::LeastPendingTokens(map.next_value()?),
            PolicyConfig::PrefixHash(_) => PolicyConfig::PrefixHash(map.next_value()?),
            PolicyConfig::Blend(_) => PolicyConfig::Blend(map.next_value()?),
            plain @ (PolicyConfig::LeastConnections
            | PolicyConfig::RoundRobin
            | PolicyConfig::RandomTwo
            | PolicyConfig::Lmetric) => {
                let NoOptions {} = map.next_value()?;
                plain
            }
            custom @ PolicyConfig::Custom(_) => {
                let IgnoredAny = map.next_value()?;
                custom
            }
        };
        match map.next_key_seed(PolicyName)? {
            None => Ok(policy),
            Some(_) => Err(A::Error::custom("expected one policy, found several")),
        }
    }
}

/// The options of a policy that has none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoOptions {}

/// The key of a policy map.
struct PolicyName;

impl<'de> DeserializeSeed<'de> for PolicyName {
    type Value = PolicyConfig;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<PolicyConfig, D::Error> {
        String::deserialize(deserializer).map(|name| named(&name))
    }
}

fn named(name: &str) -> PolicyConfig {
    PolicyConfig::by_name(name).unwrap_or_else(|| PolicyConfig::Custom(Custom::unregistered(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_and_are_longer_than_nothing() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("5m"), Some(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h"), Some(Duration::from_secs(3_600)));
        let wrong =
            ["30", "0s", "s", "", "1.5s", "-1s", "30 s", "30sec", "9000h", "99999999999999999999s", "٣s"];
        for text in wrong {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        assert_eq!(parse_duration(&format!("{}h", u64::MAX)), None, "must not overflow");
    }

    #[test]
    fn a_collector_is_a_url_without_secrets_and_its_path_may_be_left_out() {
        for (text, whole) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("HTTP://otel/", "http://otel/v1/traces"),
            ("https://[::1]:4318/", "https://[::1]:4318/v1/traces"),
            ("https://otel:443/otlp/v1/traces", "https://otel:443/otlp/v1/traces"),
        ] {
            assert_eq!(parse_collector(text).map(|uri| uri.to_string()).as_deref(), Some(whole), "{text}");
        }
        let wrong = [
            "otel:4318",
            "ftp://otel",
            "http://",
            "http://:4318",
            "http://otel:",
            "http://otel:0",
            "http://o:99999",
            "http://u:p@otel",
            "http://u@otel:1",
            "http://otel/?key=1",
            "http://otel/#a",
            "",
        ];
        for text in wrong {
            assert_eq!(parse_collector(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_tell_thousands_from_powers_of_two() {
        assert_eq!(parse_size("512B"), Some(512));
        assert_eq!(parse_size("64KiB"), Some(65_536));
        assert_eq!(parse_size("64KB"), Some(64_000));
        assert_eq!(parse_size("2GB"), Some(2_000_000_000));
        for text in ["64", "0B", "64K", "64kib", "1TiB", "18446744073709551615GiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for text in ["10.0.0.1:8000", "localhost:1", "gpu-7.rack_2.internal:65535", "[::1]:8000"] {
            assert_eq!(address_flaw(text), None, "{text}");
        }
        let wrong = [
            ("10.0.0.1", "port is missing"),
            ("http://10.0.0.1:8000", "no scheme"),
            ("10.0.0.1:8000/v1", "no path"),
            (":8000", "host is missing"),
            ("*:8000", "host is missing"),
            ("::1:8000", "needs brackets"),
            ("[gpu]:8000", "IPv6"),
            ("gpu:0", "1 to 65535"),
            ("gpu:65536", "1 to 65535"),
            ("gpu:+80", "1 to 65535"),
            ("gpu:", "1 to 65535"),
            ("10.0.0.300:80", "no such host"),
            ("10.0.0:80", "no such host"),
            ("a..b:80", "no such host"),
            ("a b:80", "no such host"),
        ];
        for (text, why) in wrong {
            assert!(
                address_flaw(text).is_some_and(|flaw| flaw.contains(why)),
                "{text}: {:?}",
                address_flaw(text)
            );
        }
    }
}
