//! Rendering as a whole.
