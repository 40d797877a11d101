//! Checkpoints to GGUF, and quantization.
