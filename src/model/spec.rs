//! What a model is and what it costs, apart from its tensors.

/// A model's shape and costs.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `general.architecture`: `llama4`, `llama`.
    pub architecture: String,
    /// `general.name`, or the file's name.
    pub name: String,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Values per head.
    pub head_len: u32,
    /// Longest context, in tokens.
    pub context_len: u32,
    /// Entries of the vocabulary.
    pub vocab_len: u32,
    /// Chunk length of the local layers, if it has such layers.
    pub chunk: Option<u32>,
    /// How many layers are local.
    pub local_layers: u32,
    /// Tokens of a page of the KV cache; divides `chunk`.
    pub page_tokens: u32,
    /// Bytes of one token's keys and values in one layer.
    pub kv_token_bytes: u32,
    /// Bytes of the buffers of a pass for each of its tokens, rounded activations included; an upper bound.
    pub scratch_token_bytes: u64,
    /// Bytes of all weights.
    pub weights_bytes: u64,
    /// Weights, all experts counted.
    pub parameters: u64,
    /// The prevailing format of the weights, as `Q4_0`.
    pub quantization: String,
}

impl ModelSpec {
    /// Bytes of the KV cache of one sequence of `tokens` tokens, whole pages counted. It grows with `tokens`;
    /// local layers stop growing at their chunk.
    pub fn kv_bytes(&self, tokens: u32) -> u64 {
        let page = self.page_tokens.max(1);
        let pages = |tokens: u32| u64::from(tokens.div_ceil(page)) * u64::from(page);
        let full = pages(tokens);
        let local = pages(self.chunk.map_or(tokens, |chunk| tokens.min(chunk)));
        let global_layers = u64::from(self.layers - self.local_layers.min(self.layers));
        let per_layer = u64::from(self.kv_token_bytes);
        per_layer * (global_layers * full + u64::from(self.local_layers) * local)
    }
}
