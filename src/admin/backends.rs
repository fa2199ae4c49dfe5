//! `/drain`, `/undrain`, `/weight`: what is told about one backend, in one upstream or in all that have it.

use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;

use super::query::Query;
use super::{Admin, Flaw};
use crate::upstream::Upstream;

/// The largest weight, as in the configuration.
const HEAVIEST: u32 = 1_000;

impl Admin {
    /// Drains a backend, and says what it still has in flight.
    pub(super) fn drain(&self, query: Option<&str>) -> Result<String, Flaw> {
        let named = self.named(&Query::parse(query, &["upstream", "backend"])?)?;
        let upstreams = named.each(|upstream, address| upstream.drain(address));
        let states = named.upstreams.iter().filter_map(|upstream| upstream.state(&named.address));
        let in_flight: u32 = states.map(|state| state.account.active_requests).sum();
        Ok(format!("{} gets no new request in {upstreams}; {in_flight} in flight\n", named.address))
    }

    /// Lets a backend serve again.
    pub(super) fn undrain(&self, query: Option<&str>) -> Result<String, Flaw> {
        let named = self.named(&Query::parse(query, &["upstream", "backend"])?)?;
        let upstreams = named.each(|upstream, address| upstream.undrain(address));
        Ok(format!("{} gets requests again in {upstreams}\n", named.address))
    }

    /// Gives a backend another weight.
    pub(super) fn reweigh(&self, query: Option<&str>) -> Result<String, Flaw> {
        let query = Query::parse(query, &["upstream", "backend", "weight"])?;
        query.required("weight")?;
        let weight = query.number("weight")?.filter(|weight| (1..=HEAVIEST).contains(weight));
        let weight = weight.ok_or_else(|| format!("`weight` is a number from 1 to {HEAVIEST}"))?;
        let named = self.named(&query)?;
        let upstreams = named.each(|upstream, address| upstream.reweigh(address, weight).is_some());
        Ok(format!("{} weighs {weight} in {upstreams}, until its configured weight changes\n", named.address))
    }

    /// The backend that a query names, and the upstreams that have it.
    fn named(&self, query: &Query) -> Result<Named, Flaw> {
        let backend = query.required("backend")?;
        let address: SocketAddr = backend
            .parse()
            .map_err(|_| format!("`backend` is an address and a port, and `{backend}` is not"))?;
        let mut upstreams = self.proxy.upstreams();
        if let Some(name) = query.value("upstream") {
            upstreams.retain(|upstream| upstream.name == name);
            if upstreams.is_empty() {
                return Err(Flaw(StatusCode::NOT_FOUND, format!("there is no upstream `{name}`")));
            }
        }
        upstreams.retain(|upstream| upstream.live(&address).is_some());
        if upstreams.is_empty() {
            return Err(Flaw(StatusCode::NOT_FOUND, format!("there is no backend {address}; see /status")));
        }
        Ok(Named { address, upstreams })
    }
}

struct Named {
    address: SocketAddr,
    upstreams: Vec<Arc<Upstream>>,
}

impl Named {
    /// Tells each of the upstreams; the names of those that still have the backend.
    fn each(&self, tell: impl Fn(&Upstream, &SocketAddr) -> bool) -> String {
        let told = self.upstreams.iter().filter(|upstream| tell(upstream, &self.address));
        told.map(|upstream| upstream.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}
