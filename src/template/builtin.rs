//! Templates for models that bring none, chosen by the control tokens of the vocabulary.

use crate::tokenizer::Tokenizer;

/// The template whose markup the vocabulary has.
pub(super) fn for_vocabulary(tokenizer: &Tokenizer) -> &'static str {
    let has = |text| tokenizer.control(text).is_some();
    match () {
        () if has("<|header_start|>") => LLAMA4,
        () if has("<|start_header_id|>") => LLAMA3,
        () if has("<|im_start|>") => CHATML,
        () if has("<s>") && has("</s>") => LLAMA2,
        () => PLAIN,
    }
}

pub(super) const LLAMA4: &str = include_str!("builtin/llama4.jinja");
pub(super) const LLAMA3: &str = include_str!("builtin/llama3.jinja");
pub(super) const CHATML: &str = include_str!("builtin/chatml.jinja");
pub(super) const LLAMA2: &str = include_str!("builtin/llama2.jinja");
pub(super) const PLAIN: &str = include_str!("builtin/plain.jinja");
