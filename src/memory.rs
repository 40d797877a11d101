//! How much memory is left, and who holds what.
