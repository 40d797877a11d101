//! The pool with members that sleep instead of thinking, on a clock that does not wait.

mod accounts;
mod faults;
mod judging;
mod modes;
mod stubs;
mod timing;
