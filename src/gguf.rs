//! GGUF v3: a total parser, the mapping of a file, and a writer.
