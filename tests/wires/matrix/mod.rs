//! The failure matrix: what a client gets, and what an engine is spared, when either of them fails.
//!
//! Each row is a test of the real binary with an engine or a client that misbehaves on order. A row says what
//! is expected as data ([`row::Row`]); [`run`] plays it three times in a row over HTTP/1.1 and over HTTP/2
//! and checks every word of it; [`table`] writes the rows down as the table of `docs/failures.md` and fails
//! if the file says anything else. So the table cannot claim what no test has seen.

mod backend;
mod clients;
mod engines;
mod fleet;
mod kinds;
mod leaver;
mod row;
mod run;
mod statuses;
mod table;

/// The rows of a group: one test for each, called by its sentence, and all of them for the table.
macro_rules! rows {
    ($($name:ident => $row:expr;)+) => {
        pub(super) fn rows() -> Vec<(&'static str, $crate::matrix::row::Row)> {
            vec![$((stringify!($name), $row)),+]
        }

        $(
            #[tokio::test]
            async fn $name() {
                $crate::matrix::run::keep($row).await;
            }
        )+
    };
}
use rows;
