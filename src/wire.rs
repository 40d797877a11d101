//! JSON shapes of the doors, and nothing else.
