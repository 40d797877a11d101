//! What waits to be published or acknowledged, and what must survive a reconnect.
//!
//! Three kinds of message, by how they may be lost: a final answer is kept until the broker has it, over
//! reconnects; a retained one is made anew at each connect; a chunk is dropped under pressure, because the final
//! repeats all text. Pure but for the link it writes to.

use std::collections::{HashMap, VecDeque};

use super::link::{AckToken, Link, Outgoing};

/// How a message may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// Kept until the broker acknowledges it.
    Final,
    /// Lost with the connection, never dropped before.
    Retained,
    /// Dropped when too much waits.
    Chunk,
}

/// Where messages are handed over; the link, or a test's double.
pub(super) trait Sink {
    /// `false` if there is no room now.
    fn publish(&self, message: &Outgoing) -> bool;
    /// `false` if there is no room now.
    fn ack(&self, token: &AckToken) -> bool;
}

impl Sink for Link {
    fn publish(&self, message: &Outgoing) -> bool {
        Link::publish(self, message)
    }

    fn ack(&self, token: &AckToken) -> bool {
        Link::ack(self, token)
    }
}

/// The waiting line in front of a link.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: VecDeque<Item>,
    /// Handed to the link, not yet sent: the link reports them in this order.
    handed: VecDeque<Kept>,
    /// Sent under a packet id, not yet acknowledged.
    unacked: HashMap<u16, Kept>,
    published: u64,
}

#[derive(Debug)]
enum Item {
    Ack(AckToken),
    Message(Kept),
}

#[derive(Debug)]
struct Kept {
    message: Outgoing,
    keep: Keep,
}

impl Outbox {
    /// Puts a message into the line. Returns whether one was dropped for it, or it itself.
    pub(super) fn push(&mut self, message: Outgoing, keep: Keep) -> bool {
        if keep == Keep::Chunk && self.waiting.len() >= CHUNKS_WAITING_MAX {
            return true;
        }
        let full = self.waiting.len() >= WAITING_MAX;
        if full {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Item::Message(Kept { message, keep }));
        full
    }

    /// Puts an acknowledgement into the line.
    pub(super) fn ack(&mut self, token: AckToken) {
        self.waiting.push_back(Item::Ack(token));
    }

    /// Hands over as much as there is room for. Messages above `packet_bytes_max` are taken out and returned: a
    /// broker would end the connection.
    pub(super) fn flush(&mut self, sink: &impl Sink, packet_bytes_max: usize) -> Vec<Outgoing> {
        let mut oversize = Vec::new();
        while let Some(item) = self.waiting.front() {
            let fits = match item {
                Item::Message(kept) => kept.message.packet_bytes() <= packet_bytes_max,
                Item::Ack(_) => true,
            };
            let done = match item {
                Item::Message(kept) => !fits || sink.publish(&kept.message),
                Item::Ack(token) => sink.ack(token),
            };
            if !done {
                break;
            }
            match self.waiting.pop_front() {
                Some(Item::Message(kept)) if fits => self.handed.push_back(kept),
                Some(Item::Message(kept)) => oversize.push(kept.message),
                _ => {}
            }
        }
        oversize
    }

    /// The link sent the oldest message handed to it.
    pub(super) fn sent(&mut self, pkid: u16) {
        self.published += 1;
        let Some(kept) = self.handed.pop_front() else { return };
        if pkid != 0 {
            self.unacked.insert(pkid, kept);
        }
    }

    /// The broker has the message of this packet id.
    pub(super) fn acked(&mut self, pkid: u16) {
        self.unacked.remove(&pkid);
    }

    /// The connection is gone: finals go back to the front of the line, the rest is dropped. A message that broke
    /// the connection by its size must not do so again: `drop_handed` leaves the ones not yet sent behind.
    pub(super) fn link_lost(&mut self, drop_handed: bool) {
        let mut again: Vec<(u16, Kept)> = self.unacked.drain().collect();
        again.sort_by_key(|(pkid, _)| *pkid);
        let handed = std::mem::take(&mut self.handed).into_iter().filter(|_| !drop_handed);
        let waiting = std::mem::take(&mut self.waiting).into_iter().filter_map(|item| match item {
            Item::Message(kept) => Some(kept),
            Item::Ack(_) => None,
        });
        self.waiting = again
            .into_iter()
            .map(|(_, kept)| kept)
            .chain(handed)
            .chain(waiting)
            .filter(|kept| kept.keep == Keep::Final)
            .map(Item::Message)
            .collect();
    }

    /// Whether everything has reached the broker.
    pub(super) fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.handed.is_empty() && self.unacked.is_empty()
    }

    /// Messages that have not reached the broker.
    pub(super) fn queued(&self) -> usize {
        self.waiting.len() + self.handed.len() + self.unacked.len()
    }

    /// Messages sent since the start.
    pub(super) fn published(&self) -> u64 {
        self.published
    }
}

/// Longest line. While the broker is away only finals grow it, and there are at most as many as requests.
const WAITING_MAX: usize = 512;

/// Above this chunks are dropped; their final repeats what they said.
const CHUNKS_WAITING_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use bytes::Bytes;

    use super::*;

    /// Takes `room` messages and remembers them.
    struct Taker {
        room: RefCell<usize>,
        taken: RefCell<Vec<String>>,
    }

    impl Taker {
        fn new(room: usize) -> Taker {
            Taker { room: RefCell::new(room), taken: RefCell::default() }
        }

        fn take(&self, what: &str) -> bool {
            let mut room = self.room.borrow_mut();
            if *room == 0 {
                return false;
            }
            *room -= 1;
            self.taken.borrow_mut().push(what.to_owned());
            true
        }
    }

    impl Sink for Taker {
        fn publish(&self, message: &Outgoing) -> bool {
            self.take(&message.topic)
        }

        fn ack(&self, _: &AckToken) -> bool {
            self.take("ack")
        }
    }

    fn message(topic: &str) -> Outgoing {
        Outgoing {
            topic: topic.to_owned(),
            payload: Bytes::from_static(b"{}"),
            assured: true,
            retain: false,
            correlation: None,
            json: true,
            expiry: None,
        }
    }

    fn token() -> AckToken {
        AckToken::V311(rumqttc::Publish::new("t", rumqttc::QoS::AtLeastOnce, "x"))
    }

    #[test]
    fn the_line_is_handed_over_in_order_as_far_as_there_is_room() {
        let mut outbox = Outbox::default();
        outbox.push(message("a"), Keep::Final);
        outbox.ack(token());
        outbox.push(message("b"), Keep::Final);
        let taker = Taker::new(2);
        assert!(outbox.flush(&taker, usize::MAX).is_empty());
        assert_eq!(*taker.taken.borrow(), ["a", "ack"]);
        assert_eq!(outbox.queued(), 2);
        let taker = Taker::new(9);
        outbox.flush(&taker, usize::MAX);
        assert_eq!(*taker.taken.borrow(), ["b"]);
    }

    #[test]
    fn only_unacknowledged_finals_survive_a_lost_link() {
        let mut outbox = Outbox::default();
        for topic in ["first", "second", "third"] {
            outbox.push(message(topic), Keep::Final);
        }
        outbox.push(message("state"), Keep::Retained);
        outbox.push(message("chunk"), Keep::Chunk);
        outbox.flush(&Taker::new(3), usize::MAX);
        outbox.sent(1);
        outbox.sent(2);
        outbox.acked(1);
        outbox.ack(token());
        outbox.link_lost(false);
        let taker = Taker::new(9);
        outbox.flush(&taker, usize::MAX);
        assert_eq!(*taker.taken.borrow(), ["second", "third"]);
        outbox.sent(1);
        outbox.sent(2);
        outbox.acked(1);
        assert!(!outbox.is_settled());
        outbox.acked(2);
        assert!(outbox.is_settled());
    }

    #[test]
    fn what_is_too_large_is_never_handed_over() {
        let mut outbox = Outbox::default();
        let mut large = message("large");
        large.payload = Bytes::from(vec![b'x'; 1000]);
        outbox.push(large, Keep::Final);
        outbox.push(message("small"), Keep::Final);
        let taker = Taker::new(9);
        let oversize = outbox.flush(&taker, 1000);
        assert_eq!(oversize.len(), 1);
        assert_eq!(oversize[0].topic, "large");
        assert_eq!(*taker.taken.borrow(), ["small"]);
    }

    #[test]
    fn a_message_that_broke_the_link_is_not_sent_again() {
        let mut outbox = Outbox::default();
        outbox.push(message("breaks"), Keep::Final);
        outbox.flush(&Taker::new(9), usize::MAX);
        outbox.push(message("waits"), Keep::Final);
        outbox.link_lost(true);
        let taker = Taker::new(9);
        outbox.flush(&taker, usize::MAX);
        assert_eq!(*taker.taken.borrow(), ["waits"]);
    }

    #[test]
    fn the_line_is_bounded_and_chunks_give_way_first() {
        let mut outbox = Outbox::default();
        for _ in 0..CHUNKS_WAITING_MAX {
            assert!(!outbox.push(message("chunk"), Keep::Chunk));
        }
        assert!(outbox.push(message("chunk"), Keep::Chunk));
        for _ in CHUNKS_WAITING_MAX..WAITING_MAX {
            assert!(!outbox.push(message("final"), Keep::Final));
        }
        assert!(outbox.push(message("final"), Keep::Final));
        assert_eq!(outbox.queued(), WAITING_MAX);
    }
}
