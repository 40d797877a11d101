//! Requests being answered: counted so that a stop can wait for them, told when they must end, and known by
//! what they ask, so that a client's retry takes the place of its first try instead of running beside it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// How many answers are under way, and which of them must end now.
#[derive(Debug, Default)]
pub(super) struct Active {
    count: watch::Sender<usize>,
    cut: watch::Sender<bool>,
    /// By what they ask: who answers, to be told when somebody else does.
    asked: Mutex<HashMap<Fingerprint, watch::Sender<bool>>>,
}

/// Who asks what where.
pub(super) type Fingerprint = [u8; 32];

/// One answer under way.
#[derive(Debug)]
pub(super) struct ActiveGuard {
    active: Arc<Active>,
    replaced: watch::Sender<bool>,
    asked: Option<Fingerprint>,
}

/// The fingerprint of a request; none for bodies so large that computing it would hold others up.
pub(super) fn fingerprint(client: &str, path: &str, body: &[u8]) -> Option<Fingerprint> {
    const LARGEST: usize = 1 << 20;
    if body.len() > LARGEST {
        return None;
    }
    let mut digest = Sha256::new();
    for part in [client.as_bytes(), path.as_bytes(), body] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    Some(digest.finalize().into())
}

impl Active {
    /// Counts one more until the guard falls.
    pub(super) fn enter(self: &Arc<Active>) -> ActiveGuard {
        self.count.send_modify(|count| *count += 1);
        ActiveGuard { active: Arc::clone(self), replaced: watch::Sender::new(false), asked: None }
    }

    /// Waits until none is under way.
    pub(super) async fn idle(&self) {
        let mut count = self.count.subscribe();
        let _ = count.wait_for(|&count| count == 0).await;
    }

    /// Tells all of them to end.
    pub(super) fn cut(&self) {
        self.cut.send_replace(true);
    }
}

impl ActiveGuard {
    /// Notes what is asked. If `retry`, whoever answers the same for the same client is told to end.
    pub(super) fn note(&mut self, asked: Fingerprint, retry: bool) {
        let mut others = self.active.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = others.get(&asked).filter(|_| retry) {
            first.send_replace(true);
        }
        others.insert(asked, self.replaced.clone());
        self.asked = Some(asked);
    }

    /// Waits until this answer must end; true if another one takes its place.
    pub(super) fn until_cut(&self) -> impl Future<Output = bool> + Send + 'static {
        let (cut, replaced) = (self.active.cut.subscribe(), self.replaced.subscribe());
        async move {
            tokio::select! {
                () = told(cut) => false,
                () = told(replaced) => true,
            }
        }
    }
}

/// Waits until `signal` holds true; for ever if nobody is left to say so.
async fn told(mut signal: watch::Receiver<bool>) {
    if signal.wait_for(|&told| told).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        if let Some(asked) = self.asked {
            let mut others = self.active.asked.lock().unwrap_or_else(PoisonError::into_inner);
            if others.get(&asked).is_some_and(|other| other.same_channel(&self.replaced)) {
                others.remove(&asked);
            }
        }
        self.active.count.send_modify(|count| *count -= 1);
    }
}
