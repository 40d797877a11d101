//! One question to several backends, one answer.
