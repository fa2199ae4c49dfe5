//! Slow start: a backend that comes back takes its share step by step.
//!
//! The first requests of a fresh engine are its slowest (kernels compile, graphs are captured, the cache is
//! empty), and to a policy that looks for the least work it is the most attractive of all. So its weight
//! grows in a straight line from a tenth to the whole within `slow_start`, counted from the moment it came
//! into rotation. As in HAProxy that holds only for a backend that joins others or returns, never for the
//! fleet as it starts.

use std::time::Duration;

use crate::clock::Time;

/// Where the weight starts, as a part of itself.
const LEAST: f64 = 0.1;

/// The part of its weight, 0.1 to 1, that a backend has at `now` which came into rotation at `since`.
pub fn part(since: Time, slow_start: Duration, now: Time) -> f64 {
    let age = now.since(since);
    if age >= slow_start { 1.0 } else { (age.as_secs_f64() / slow_start.as_secs_f64()).max(LEAST) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_grows_in_a_straight_line_from_a_tenth_to_the_whole() {
        let since = Time::ZERO + Duration::from_secs(100);
        let at = |ms| part(since, Duration::from_secs(10), since + Duration::from_millis(ms));
        assert_eq!([0, 999, 5_000, 10_000, 99_000].map(at), [0.1, 0.1, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn no_time_to_start_in_is_no_slow_start() {
        assert_eq!(part(Time::ZERO, Duration::ZERO, Time::ZERO), 1.0);
    }
}
