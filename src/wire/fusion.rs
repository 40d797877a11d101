//! A fusion in JSON: what a request may ask of it, in our shape and in OpenRouter's, and the report that comes back.
//!
//! Unlike the rest of a body this object is read strictly: a key that nobody knows is refused by name, because a
//! judge or a bound that is silently ignored costs time and trust.

mod asked;
mod told;

#[cfg(test)]
mod tests;

pub(super) use asked::{Asked, check_model, openrouter, own};
pub(super) use told::{progress, report};
