//! Requests being answered: counted so that a stop can wait for them, and told when it no longer will.

use std::sync::Arc;

use tokio::sync::watch;

/// How many answers are under way, and whether they must end now.
#[derive(Debug)]
pub(super) struct Active {
    count: watch::Sender<usize>,
    cut: watch::Sender<bool>,
}

/// One answer under way.
#[derive(Debug)]
pub(super) struct ActiveGuard(Arc<Active>);

impl Default for Active {
    fn default() -> Active {
        Active { count: watch::Sender::new(0), cut: watch::Sender::new(false) }
    }
}

impl Active {
    /// Counts one more until the guard falls.
    pub(super) fn enter(self: &Arc<Active>) -> ActiveGuard {
        self.count.send_modify(|count| *count += 1);
        ActiveGuard(Arc::clone(self))
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

    /// Waits until they must end.
    pub(super) fn until_cut(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut cut = self.cut.subscribe();
        async move {
            if cut.wait_for(|&cut| cut).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}
