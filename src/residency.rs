//! Which bytes of a model stay in memory, which are cached, and which are read from disk when they are needed.
