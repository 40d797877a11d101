//! Shapes of a few well-known models, to plan them without a file and to name what would fit instead. Published
//! numbers of their `config.json`; nothing here says where to get them.

use crate::model::{Blueprint, ExpertsOutline};

/// The models by the word they are asked for, largest first.
pub fn catalogue() -> Vec<(&'static str, Blueprint)> {
    ENTRIES.iter().map(|entry| (entry.word, entry.blueprint())).collect()
}

/// The model that a word names.
pub fn find(word: &str) -> Option<Blueprint> {
    let entry = ENTRIES.iter().find(|entry| entry.word.eq_ignore_ascii_case(word))?;
    Some(entry.blueprint())
}

/// A line of the table.
struct Entry {
    word: &'static str,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_len: usize,
    width: usize,
    vocab_len: usize,
    context_len: usize,
    tied: bool,
    rope_factors: bool,
    experts: Option<ExpertsOutline>,
}

impl Entry {
    fn blueprint(&self) -> Blueprint {
        Blueprint {
            name: self.word.to_owned(),
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_len: self.head_len,
            width: self.width,
            vocab_len: self.vocab_len,
            context_len: self.context_len,
            tied: self.tied,
            rope_factors: self.rope_factors,
            experts: self.experts,
        }
    }
}

const LLAMA_3: Entry = Entry {
    word: "llama-3.1-8b",
    layers: 32,
    hidden: 4096,
    heads: 32,
    kv_heads: 8,
    head_len: 128,
    width: 14_336,
    vocab_len: 128_256,
    context_len: 131_072,
    tied: false,
    rope_factors: true,
    experts: None,
};

const SMOLLM2: Entry = Entry {
    word: "smollm2-1.7b",
    layers: 24,
    hidden: 2048,
    heads: 32,
    kv_heads: 32,
    head_len: 64,
    width: 8192,
    vocab_len: 49_152,
    context_len: 8192,
    tied: true,
    rope_factors: false,
    experts: None,
};

const ENTRIES: [Entry; 8] = [
    Entry {
        word: "scout",
        layers: 48,
        hidden: 5120,
        heads: 40,
        kv_heads: 8,
        head_len: 128,
        width: 16_384,
        vocab_len: 202_048,
        context_len: 10_485_760,
        tied: false,
        rope_factors: true,
        experts: Some(ExpertsOutline { count: 16, width: 8192, step: 1, chunk: 8192 }),
    },
    LLAMA_3,
    Entry {
        word: "llama-3.2-3b",
        layers: 28,
        hidden: 3072,
        heads: 24,
        width: 8192,
        tied: true,
        ..LLAMA_3
    },
    SMOLLM2,
    Entry {
        word: "llama-3.2-1b",
        layers: 16,
        hidden: 2048,
        head_len: 64,
        width: 8192,
        tied: true,
        ..LLAMA_3
    },
    Entry {
        word: "tinyllama-1.1b",
        layers: 22,
        hidden: 2048,
        kv_heads: 4,
        width: 5632,
        vocab_len: 32_000,
        context_len: 2048,
        tied: false,
        ..SMOLLM2
    },
    Entry {
        word: "smollm2-360m",
        layers: 32,
        hidden: 960,
        heads: 15,
        kv_heads: 5,
        width: 2560,
        ..SMOLLM2
    },
    Entry {
        word: "smollm2-135m",
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        width: 1536,
        ..SMOLLM2
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters as the models' cards count them; of Scout the text part.
    #[test]
    fn shapes_add_up_to_the_published_number_of_parameters() {
        let published = [
            ("scout", 107_769_861_120_u64),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.2-3b", 3_212_749_824),
            ("smollm2-1.7b", 1_711_376_384),
            ("llama-3.2-1b", 1_235_814_400),
            ("tinyllama-1.1b", 1_100_048_384),
            ("smollm2-360m", 361_821_120),
            ("smollm2-135m", 134_515_008),
        ];
        assert_eq!(catalogue().len(), published.len());
        for ((word, blueprint), (expected_word, expected)) in catalogue().into_iter().zip(published)
        {
            assert_eq!(word, expected_word);
            let tensors = blueprint.tensors().into_iter();
            let weights = tensors.filter(|(name, ..)| name != "rope_freqs.weight");
            let parameters: u64 =
                weights.map(|(_, lengths, _)| lengths.iter().product::<u64>()).sum();
            assert_eq!(parameters, expected, "{word}");
        }
        assert!(find("Scout").is_some() && find("scouts").is_none());
    }
}
