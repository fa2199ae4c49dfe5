//! The trace that a request belongs to: W3C Trace Context, taken part in or passed on.
//!
//! Without a collector (`observe.traces`) we record no spans, and a hop that does not take part passes `traceparent`
//! and `tracestate` on unchanged, so that the engine's span is a child of the client's; none is begun either. With one,
//! a request that comes without a trace begins one, and whether it is recorded is decided once, by whoever began it:
//! engines see our decision as we see the client's. What cannot be read is dropped, the state with it: an engine that
//! read it in another way would join a trace that nobody else sees. The id of the trace is in the access line, so that
//! a slow trace leads to its request and back.

use http::HeaderMap;
use pingora::Result;
use pingora::http::RequestHeader;

use super::Proxy;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";

/// A `traceparent` of version 00: version, trace, span, flags.
const LENGTH: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;

/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;

/// The trace of one request.
pub(super) struct Trace {
    /// Not zero.
    pub(super) id: u128,
    /// What is told of it at its end, if anything is.
    pub(super) recorded: Option<Recorded>,
}

/// What the spans of a request are bound together by.
#[derive(Clone, Copy)]
pub(super) struct Recorded {
    /// The span of the request; not zero.
    pub(super) request: u64,
    /// The client's span.
    pub(super) parent: Option<u64>,
}

impl Trace {
    /// What the span of the next attempt goes by, if there will be one.
    pub(super) fn attempt(&self) -> Option<u64> {
        self.recorded.map(|_| new_span())
    }

    /// Tells an engine that what it does is part of `span`.
    pub(super) fn announce(&self, request: &mut RequestHeader, span: u64) -> Result<()> {
        request.insert_header(PARENT, parent(self.id, span, SAMPLED))
    }
}

impl Proxy {
    /// The trace that `request` is part of, from now on if not before. If it is part of none, no header of it claims
    /// so any more.
    pub(super) fn trace(&self, request: &mut RequestHeader) -> Result<Option<Trace>> {
        let known = read(&request.headers);
        if known.is_none() {
            request.remove_header(PARENT);
            request.remove_header(STATE);
        }
        let Some(traces) = &self.records.traces else {
            return Ok(known.map(|parent| Trace { id: parent.trace, recorded: None }));
        };
        let (id, sampled) = match &known {
            Some(parent) => (parent.trace, parent.sampled),
            None => (fastrand::u128(1..), traces.samples(fastrand::f64())),
        };
        let span = new_span();
        if known.is_none() && !sampled {
            request.insert_header(PARENT, parent(id, span, 0))?;
        }
        let parent = known.map(|parent| parent.span);
        Ok(Some(Trace { id, recorded: sampled.then_some(Recorded { request: span, parent }) }))
    }
}

fn new_span() -> u64 {
    fastrand::u64(1..)
}

fn parent(trace: u128, span: u64, flags: u8) -> String {
    format!("00-{trace:032x}-{span:016x}-{flags:02x}")
}

/// The span that a request was sent in.
#[derive(Debug, PartialEq, Eq)]
struct Parent {
    trace: u128,
    span: u64,
    sampled: bool,
}

/// The parent, if there is exactly one and it is well-formed.
fn read(headers: &HeaderMap) -> Option<Parent> {
    let mut parents = headers.get_all(PARENT).iter();
    let parent = parents.next()?.to_str().ok()?;
    if parents.next().is_some() {
        return None;
    }
    let (known, rest) = parent.split_at_checked(LENGTH)?;
    let mut fields = known.split('-');
    let [version, trace, span, flags] = [fields.next()?, fields.next()?, fields.next()?, fields.next()?];
    let widths = [version.len(), trace.len(), span.len(), flags.len()];
    // A later version may say more, behind another dash.
    let may_go_on = version != "00" && rest.starts_with('-');
    let is_hex = [version, trace, span, flags].iter().all(|field| field.bytes().all(is_lower_hex));
    if widths != [2, 32, 16, 2] || !is_hex || version == "ff" || !(rest.is_empty() || may_go_on) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some(Parent { trace, span, sampled: flags & SAMPLED != 0 })
}

const fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const WHOLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// The trace that a request with these parents is part of.
    fn taken(parents: &[&str]) -> Option<u128> {
        let mut headers = HeaderMap::new();
        for parent in parents {
            headers.append(PARENT, parent.parse().unwrap());
        }
        read(&headers).map(|parent| parent.trace)
    }

    #[test]
    fn a_parent_of_this_or_a_later_version_is_understood() {
        let later =
            [WHOLE.replacen("00", "01", 1), WHOLE.replacen("00", "cc", 1) + "-what-the-future-will-be-like"];
        for parent in [WHOLE, &WHOLE.replace("-01", "-00"), &later[0], &later[1]] {
            assert_eq!(taken(&[parent]), Some(TRACE), "{parent}");
        }
    }

    #[test]
    fn what_is_no_parent_is_none() {
        let nothing = "0".repeat(32);
        for parent in [
            "",
            "00",
            &WHOLE[..WHOLE.len() - 1],
            &format!("{WHOLE}-"),
            &format!("{WHOLE}-more"),
            &WHOLE.to_uppercase(),
            &WHOLE.replacen("00", "ff", 1),
            &(WHOLE.replacen("00", "01", 1) + "0"),
            &WHOLE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &nothing),
            &WHOLE.replace("00f067aa0ba902b7", &nothing[..16]),
            &WHOLE.replace("4bf9", "4b_9"),
            &WHOLE.replace("4bf9", "+bf9"),
            "00-4bf92f3577b34da6a3ce929d0e0e47-3600f067aa0ba902b7-01",
            "0-04bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba9\u{e9}2b7-01",
        ] {
            assert_eq!(taken(&[parent]), None, "{parent}");
        }
        assert_eq!(taken(&[WHOLE, WHOLE]), None);
        assert_eq!(taken(&[]), None);
    }

    #[test]
    fn what_we_write_is_what_we_read_and_only_the_last_flag_says_recorded() {
        for (flags, sampled) in [(0, false), (1, true), (2, false), (3, true)] {
            let headers =
                HeaderMap::from_iter([(PARENT.parse().unwrap(), parent(TRACE, 7, flags).parse().unwrap())]);
            assert_eq!(read(&headers), Some(Parent { trace: TRACE, span: 7, sampled }), "{flags}");
        }
    }
}
