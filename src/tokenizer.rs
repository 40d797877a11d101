//! Tokens from a GGUF vocabulary: byte-pair encoding and SentencePiece, and incremental decoding.
