//! Which replica has which request, and what a rule wrote down about it.
//!
//! Every rule counts what it has sent and takes it back at the end; this is that count.

/// The requests in flight, each with a note of type `T`.
pub struct Flights<T> {
    /// By number of the request.
    flights: Vec<Option<(usize, T)>>,
    active: Vec<u64>,
}

impl<T> Flights<T> {
    /// None in flight on any of `replicas`.
    pub fn new(replicas: usize) -> Self {
        Self { flights: Vec::new(), active: vec![0; replicas] }
    }

    /// Request `id` goes to replica `to`.
    pub fn send(&mut self, id: usize, to: usize, note: T) {
        if self.flights.len() <= id {
            self.flights.resize_with(id + 1, || None);
        }
        self.flights[id] = Some((to, note));
        self.active[to] += 1;
    }

    /// Where request `id` is and what was noted; nothing if it is not in flight.
    pub fn find(&mut self, id: usize) -> Option<(usize, &mut T)> {
        self.flights.get_mut(id)?.as_mut().map(|(to, note)| (*to, note))
    }

    /// Request `id` has ended; where it was and what was noted.
    pub fn end(&mut self, id: usize) -> Option<(usize, T)> {
        let flight = self.flights.get_mut(id)?.take()?;
        self.active[flight.0] -= 1;
        Some(flight)
    }

    /// Requests in flight on each replica.
    pub fn active(&self) -> &[u64] {
        &self.active
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_in_flight_until_it_ends_and_ends_once() {
        let mut flights = Flights::new(2);
        flights.send(7, 1, "seven");
        flights.send(3, 1, "three");
        assert_eq!(flights.active(), [0, 2]);
        assert_eq!(flights.find(7), Some((1, &mut "seven")));
        assert_eq!((flights.end(7), flights.end(7), flights.end(99)), (Some((1, "seven")), None, None));
        assert_eq!(flights.active(), [0, 1]);
        assert_eq!(flights.find(7), None);
    }
}
