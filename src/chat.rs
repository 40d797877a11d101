//! The one vocabulary of every door and every backend.
