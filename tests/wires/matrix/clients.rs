//! Clients that go, at every stage and in every way, and one that does not read.

use super::row::{Charged, End, Gets, Next, Row, Stage, Way};
use super::rows;

const LEFT: End = End::gone(Gets::Gone, Some(1));
const LEFT_EARLY: End = End::gone(Gets::Gone, None);

fn uploading(way: Way) -> Row {
    Row::goes(Stage::Uploading, way, LEFT_EARLY, Charged::Nothing)
}

fn queued(way: Way) -> Row {
    Row::goes(Stage::Queued, way, LEFT_EARLY, Charged::Nothing).upstream("max_requests: 1")
}

fn waiting(way: Way) -> Row {
    Row::goes(Stage::Waiting, way, LEFT, Charged::Prompt)
}

fn opened(way: Way) -> Row {
    Row::goes(Stage::Opened, way, LEFT, Charged::Prompt)
}

fn streaming(way: Way) -> Row {
    Row::goes(Stage::Streaming, way, LEFT, Charged::Place).next(Next::Same)
}

rows! {
    it_closes_its_connection_while_it_sends_its_body => uploading(Way::Fin);
    it_resets_its_connection_while_it_sends_its_body => uploading(Way::Rst);
    it_closes_its_sending_side_while_it_sends_its_body => uploading(Way::HalfClose);
    it_resets_its_http2_stream_while_it_sends_its_body => uploading(Way::RstStream);
    it_says_goaway_and_closes_while_it_sends_its_body => uploading(Way::GoAway);
    it_closes_its_connection_in_the_queue => queued(Way::Fin);
    it_resets_its_connection_in_the_queue => queued(Way::Rst);
    it_closes_its_sending_side_in_the_queue => queued(Way::HalfClose);
    it_resets_its_http2_stream_in_the_queue => queued(Way::RstStream);
    it_says_goaway_and_closes_in_the_queue => queued(Way::GoAway);
    it_closes_its_connection_before_the_header => waiting(Way::Fin);
    it_resets_its_connection_before_the_header => waiting(Way::Rst);
    it_closes_its_sending_side_before_the_header => waiting(Way::HalfClose);
    it_resets_its_http2_stream_before_the_header => waiting(Way::RstStream);
    it_says_goaway_and_closes_before_the_header => waiting(Way::GoAway);
    it_closes_its_connection_before_the_first_event => opened(Way::Fin);
    it_resets_its_connection_before_the_first_event => opened(Way::Rst);
    it_closes_its_sending_side_before_the_first_event => opened(Way::HalfClose);
    it_resets_its_http2_stream_before_the_first_event => opened(Way::RstStream);
    it_says_goaway_and_closes_before_the_first_event => opened(Way::GoAway);
    it_closes_its_connection_in_the_middle_of_a_stream => streaming(Way::Fin);
    it_resets_its_connection_in_the_middle_of_a_stream => streaming(Way::Rst);
    it_closes_its_sending_side_in_the_middle_of_a_stream => streaming(Way::HalfClose);
    it_resets_its_http2_stream_in_the_middle_of_a_stream => streaming(Way::RstStream);
    it_says_goaway_and_closes_in_the_middle_of_a_stream => streaming(Way::GoAway);

    it_says_goaway_in_the_middle_of_a_stream_and_stays =>
        Row::goes(Stage::Streaming, Way::GoAwayAndStays, End::good(1), Charged::Place);
}
