//! The fusion pool: one question goes to several members at once, and one answer comes back.
//!
//! The pool knows no sockets: whoever wires the process hands it members, each with the backend that reaches it
//! and what is known of its health and speed.

mod member;

pub use member::{Health, Member, MemberKind, Roster, ScoreKind, Tier, Vitals};
