//! Outgoing HTTP: every address is resolved and checked before it is connected to.
