//! One registry: every published number is born here.
