//! Newtypes that keep bytes, tokens, slots and experts apart.
