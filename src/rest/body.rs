//! Reading request bodies within bounds of size, time and memory.

use std::pin::Pin;
use std::time::Duration;

use actix_web::web::{Bytes, Payload};
use futures_core::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::Problem;
use super::{Limits, Shared};

/// A body, and its share of what all bodies together may take.
pub(super) struct Body {
    pub(super) bytes: Vec<u8>,
    _share: Option<OwnedSemaphorePermit>,
}

/// Bodies up to this size are not counted: connections bound them well enough.
const SMALL: usize = 64 * 1024;

/// The unit in which larger ones are.
const UNIT: usize = 1024;

/// What all bodies together may take.
pub(super) fn budget(limits: &Limits) -> Semaphore {
    Semaphore::new((limits.bodies_bytes / UNIT).min(Semaphore::MAX_PERMITS))
}

/// Reads to the end.
///
/// # Errors
/// Too large, too slow, or too much at once.
pub(super) async fn read(
    shared: &Shared,
    mut payload: Payload,
    declared: Option<usize>,
) -> Result<Body, Problem> {
    let limit = shared.limits.body_bytes;
    let patience = Duration::from_millis(shared.limits.body_timeout_ms);
    if declared.is_some_and(|len| len > limit) {
        discard(&mut payload, patience).await;
        return Err(Problem::body_too_large(limit));
    }
    match tokio::time::timeout(patience, read_all(shared, &mut payload)).await {
        Ok(Err(Fault::TooLarge)) => {
            discard(&mut payload, patience).await;
            Err(Problem::body_too_large(limit))
        }
        Ok(Err(Fault::Broken)) => Err(Problem::bad_request("the request body broke off")),
        Ok(Err(Fault::Budget)) => Err(Problem::too_many_bodies()),
        Ok(Ok(body)) => Ok(body),
        Err(_) => Err(Problem::body_too_slow()),
    }
}

enum Fault {
    Broken,
    Budget,
    TooLarge,
}

async fn read_all(shared: &Shared, payload: &mut Payload) -> Result<Body, Fault> {
    let mut bytes = Vec::new();
    let mut share: Option<OwnedSemaphorePermit> = None;
    while let Some(chunk) = next(payload).await {
        let chunk = chunk.map_err(|_| Fault::Broken)?;
        let len = bytes.len() + chunk.len();
        if len > shared.limits.body_bytes {
            return Err(Fault::TooLarge);
        }
        if len > SMALL && bytes.capacity() < len {
            // The vector doubles: what it is about to allocate is asked for first.
            let wanted = (2 * bytes.capacity()).max(len).div_ceil(UNIT);
            let held = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            let more = u32::try_from(wanted.saturating_sub(held)).map_err(|_| Fault::Budget)?;
            let permit = shared
                .body_budget
                .clone()
                .try_acquire_many_owned(more)
                .map_err(|_| Fault::Budget)?;
            match &mut share {
                Some(share) => share.merge(permit),
                None => share = Some(permit),
            }
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Body { bytes, _share: share })
}

/// Takes what a client still sends, so that it finds the time to read the refusal: many read only after they
/// have written everything, and a closed connection would lose them the answer.
async fn discard(payload: &mut Payload, patience: Duration) {
    const MOST: usize = 64 << 20;
    let rest = async {
        let mut taken = 0;
        while taken < MOST
            && let Some(Ok(chunk)) = next(payload).await
        {
            taken += chunk.len();
        }
    };
    let _ = tokio::time::timeout(patience.min(Duration::from_secs(5)), rest).await;
}

async fn next(payload: &mut Payload) -> Option<Result<Bytes, actix_web::error::PayloadError>> {
    std::future::poll_fn(|context| Pin::new(&mut *payload).poll_next(context)).await
}
