//! Models: weights, KV cache and the forward pass of each architecture.
