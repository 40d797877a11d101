//! Blocks and the arithmetic over them.
