//! The sending side of one answer. The engine thread never waits for a reader: what does not fit is kept, and
//! the channel wakes the thread when there is room again or nobody reads any more.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::{SendError, TrySendError};

use crate::chat::{ChatError, ChatEvent, ChatSender};

type Item = Result<ChatEvent, ChatError>;
type Room = Pin<Box<dyn Future<Output = Result<OwnedPermit<Item>, SendError<()>>> + Send>>;

/// Events on their way to a reader.
pub(super) struct Outlet {
    sender: ChatSender,
    pending: VecDeque<Item>,
    /// Resolves when the full channel has room.
    room: Option<Room>,
    /// Resolves when the reader is gone; kept only because it wakes.
    _gone: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// How far the events got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// All are in the channel.
    Open,
    /// Some are kept back until the reader has read.
    Full,
    /// Nobody reads.
    Closed,
}

impl Outlet {
    /// `waker` is woken when the reader goes away, and when a full channel has room.
    pub(super) fn new(sender: ChatSender, waker: &Waker) -> Outlet {
        let watched = sender.clone();
        let mut gone: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(async move { watched.closed().await });
        // The first poll registers the waker; if the reader has gone already, `is_closed` says so.
        let _ = gone.as_mut().poll(&mut Context::from_waker(waker));
        Outlet { sender, pending: VecDeque::new(), room: None, _gone: gone }
    }

    /// Whether nobody reads any more.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Adds an event; [`flush`](Outlet::flush) sends it.
    pub(super) fn push(&mut self, item: Item) {
        self.pending.push_back(item);
    }

    /// Where events go.
    pub(super) fn pending(&mut self) -> &mut VecDeque<Item> {
        &mut self.pending
    }

    /// Whether everything kept back would go out now: only this end sends, so room is not lost again.
    pub(super) fn has_room(&self) -> bool {
        self.room.is_none() && self.sender.capacity() >= self.pending.len()
    }

    /// Sends what the channel takes.
    pub(super) fn flush(&mut self, waker: &Waker) -> Flow {
        while let Some(item) = self.pending.pop_front() {
            if let Some(room) = &mut self.room {
                match room.as_mut().poll(&mut Context::from_waker(waker)) {
                    Poll::Ready(Ok(permit)) => {
                        permit.send(item);
                        self.room = None;
                        continue;
                    }
                    Poll::Ready(Err(_)) => return Flow::Closed,
                    Poll::Pending => {
                        self.pending.push_front(item);
                        return if self.is_closed() { Flow::Closed } else { Flow::Full };
                    }
                }
            }
            match self.sender.try_send(item) {
                Ok(()) => {}
                Err(TrySendError::Closed(_)) => return Flow::Closed,
                Err(TrySendError::Full(item)) => {
                    self.pending.push_front(item);
                    self.room = Some(Box::pin(self.sender.clone().reserve_owned()));
                }
            }
        }
        if self.is_closed() { Flow::Closed } else { Flow::Open }
    }
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").field("pending", &self.pending.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;
    use crate::chat::ChatStream;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Wakes>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn delta(text: &str) -> Item {
        Ok(ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() })
    }

    #[test]
    fn a_full_channel_keeps_events_and_wakes_when_read() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let (sender, mut stream) = ChatStream::channel(1);
        let mut outlet = Outlet::new(sender, &waker);
        for text in ["a", "b", "c"] {
            outlet.push(delta(text));
        }
        assert_eq!(outlet.flush(&waker), Flow::Full);
        assert_eq!(outlet.flush(&waker), Flow::Full);
        assert_eq!(wakes.0.load(Ordering::SeqCst), 0);
        for (text, flow) in [("a", Flow::Full), ("b", Flow::Open), ("c", Flow::Open)] {
            assert_eq!(stream.blocking_next(), Some(delta(text)));
            assert_eq!(outlet.flush(&waker), flow);
        }
        assert_eq!(wakes.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_dropped_stream_wakes() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let (sender, stream) = ChatStream::channel(1);
        let mut outlet = Outlet::new(sender, &waker);
        assert!(!outlet.is_closed());
        drop(stream);
        assert!(outlet.is_closed());
        assert_eq!(wakes.0.load(Ordering::SeqCst), 1);
        assert_eq!(outlet.flush(&waker), Flow::Closed);
    }

    #[test]
    fn a_dropped_stream_wakes_while_the_channel_is_full() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let (sender, stream) = ChatStream::channel(1);
        let mut outlet = Outlet::new(sender, &waker);
        outlet.push(delta("a"));
        outlet.push(delta("b"));
        assert_eq!(outlet.flush(&waker), Flow::Full);
        drop(stream);
        assert!(wakes.0.load(Ordering::SeqCst) >= 1);
        assert_eq!(outlet.flush(&waker), Flow::Closed);
    }
}
