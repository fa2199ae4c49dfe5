//! The trace that a request belongs to: W3C Trace Context, passed on.
//!
//! We record no spans, and a hop that does not take part passes `traceparent` and `tracestate` on unchanged, so that
//! the engine's span is a child of the client's. What cannot be read is dropped, the state with it: an engine that read
//! it in another way would join a trace that nobody else sees. None is begun here either. The id of the trace is in the
//! access line, so that a slow trace leads to its request and back.

use http::HeaderMap;
use pingora::http::RequestHeader;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";

/// A `traceparent` of version 00: version, trace, span, flags.
const LENGTH: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;

/// The id of the trace that `request` is part of, if it is part of one; else no header of it claims so any more.
pub(super) fn trace(request: &mut RequestHeader) -> Option<u128> {
    let trace = read(&request.headers);
    if trace.is_none() {
        request.remove_header(PARENT);
        request.remove_header(STATE);
    }
    trace
}

/// The trace, if there is exactly one parent and it is well-formed.
fn read(headers: &HeaderMap) -> Option<u128> {
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
    let span = u64::from_str_radix(span, 16).ok()?;
    u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0 && span != 0)
}

const fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const WHOLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// The trace, and whether both headers are still there.
    fn taken(parents: &[&str]) -> (Option<u128>, bool) {
        let mut request = RequestHeader::build("POST", b"/", None).unwrap();
        for parent in parents {
            request.append_header(PARENT, *parent).unwrap();
        }
        request.append_header(STATE, "a=1").unwrap();
        let trace = trace(&mut request);
        let left = [PARENT, STATE].map(|name| request.headers.contains_key(name));
        assert_eq!(left[0], left[1], "one without the other");
        (trace, left[0])
    }

    #[test]
    fn a_parent_of_this_or_a_later_version_stays() {
        let later =
            [WHOLE.replacen("00", "01", 1), WHOLE.replacen("00", "cc", 1) + "-what-the-future-will-be-like"];
        for parent in [WHOLE, &WHOLE.replace("-01", "-00"), &later[0], &later[1]] {
            assert_eq!(taken(&[parent]), (Some(TRACE), true), "{parent}");
        }
    }

    #[test]
    fn what_is_no_parent_goes_and_its_state_with_it() {
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
            assert_eq!(taken(&[parent]), (None, false), "{parent}");
        }
        assert_eq!(taken(&[WHOLE, WHOLE]), (None, false));
        assert_eq!(taken(&[]), (None, false), "a state without a parent");
    }
}
