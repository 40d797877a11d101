//! Doubles for the engine's tests: a model that follows a rule, and a vocabulary of bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::model::{Batch, LogitsWanted, Model, ModelError, ModelSpec};
use crate::tokenizer::{Scheme, Splitter, TokenKind, Tokenizer, Vocabulary};
use crate::units::{Bytes, SlotId, TokenId};

/// The token that ends a reply in [`byte_tokenizer`]'s vocabulary.
pub(super) const END: TokenId = TokenId(256);
pub(super) const VOCAB_LEN: usize = 259;

/// A vocabulary whose first 256 tokens are the bytes in order, then an end and a begin token, and the one
/// pair that a vocabulary of pairs must have: two zero bytes.
pub(super) fn byte_tokenizer() -> Tokenizer {
    // GPT-2's alphabet: printable bytes stand for themselves, the others from U+0100 on.
    let mut next = 0x100;
    let mut tokens: Vec<String> = (0..=255_u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if printable { u32::from(byte) } else { next };
            next += u32::from(!printable);
            char::from_u32(code).map(String::from).unwrap_or_default()
        })
        .collect();
    tokens.extend(["<|eot|>".to_owned(), "<|begin_of_text|>".to_owned()]);
    let zero = tokens[0].clone();
    tokens.push(format!("{zero}{zero}"));
    let mut kinds = vec![TokenKind::Normal; 256];
    kinds.extend([TokenKind::Control, TokenKind::Control, TokenKind::Normal]);
    Tokenizer::new(&Vocabulary {
        scheme: Scheme::BytePairs {
            splitter: Splitter::from_name("gpt-2").expect("GPT-2's splitter is built in"),
            merges: vec![format!("{zero} {zero}").into()],
        },
        tokens: tokens.into_iter().map(Into::into).collect(),
        kinds,
        bos: Some(257),
        eos: Some(END.0),
        unknown: None,
        padding: None,
        adds_bos: false,
        ends: Vec::new(),
    })
    .expect("the vocabulary of bytes is complete")
}

/// What a [`ScriptedModel`] does, seen from outside.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Batches run.
    pub(super) forwards: usize,
    /// Tokens of all of them.
    pub(super) tokens: usize,
    /// The largest batch in tokens.
    pub(super) tokens_max: usize,
    /// The most rows of logits of one batch.
    pub(super) logits_rows_max: usize,
    /// Tokens each slot holds.
    pub(super) held: BTreeMap<SlotId, Vec<TokenId>>,
    /// How often its weights were given back.
    pub(super) released: usize,
    /// Batches it may still run before it waits; `None` never waits.
    allowed: Option<usize>,
    /// Panics in the batch after so many.
    panic_after: Option<usize>,
    /// Fails in the batch after so many.
    fail_after: Option<usize>,
}

/// The handle a test keeps of its model.
#[derive(Clone, Debug, Default)]
pub(super) struct Stage {
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Stage {
    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model runs no more batches than these until it is allowed to.
    pub(super) fn allow(&self, batches: usize) {
        let mut seen = self.seen();
        seen.allowed = Some(seen.allowed.unwrap_or(0) + batches);
        self.seen.1.notify_all();
    }

    pub(super) fn allow_all(&self) {
        self.seen().allowed = None;
        self.seen.1.notify_all();
    }

    pub(super) fn panic_after(&self, batches: usize) {
        self.seen().panic_after = Some(batches);
    }

    pub(super) fn fail_after(&self, batches: usize) {
        self.seen().fail_after = Some(batches);
    }
}

/// Fills the logits after a history; they come as zeros.
type Rule = Box<dyn Fn(&[TokenId], &mut [f32]) + Send>;

/// A model whose logits are a rule of the tokens before: deterministic, different for different histories, and
/// blind to what else is in the batch.
pub(super) struct ScriptedModel {
    spec: ModelSpec,
    stage: Stage,
    rule: Rule,
}

impl ScriptedModel {
    pub(super) fn new(
        stage: &Stage,
        rule: impl Fn(&[TokenId], &mut [f32]) + Send + 'static,
    ) -> ScriptedModel {
        let spec = ModelSpec { vocab_len: VOCAB_LEN as u32, ..super::prefix::tests::spec() };
        ScriptedModel { spec, stage: stage.clone(), rule: Box::new(rule) }
    }
}

/// Says `text` and then the end token, whatever the prompt; it counts from the last begin token (257) of the
/// history, so prompts in tests end with one.
pub(super) fn says(text: &str) -> impl Fn(&[TokenId], &mut [f32]) + Send + 'static {
    let script: Vec<u32> = text.bytes().map(u32::from).chain([END.0]).collect();
    move |history, logits| {
        let begin = history.iter().rposition(|token| token.0 == 257).map_or(0, |at| at + 1);
        let next = script.get(history.len() - begin).copied().unwrap_or(END.0);
        logits[next as usize] = 10.0;
    }
}

/// Small letters by a hash of the whole history: a wrong token anywhere changes all that follows.
pub(super) fn babbles(history: &[TokenId], logits: &mut [f32]) {
    let hash = history.iter().fold(17_u64, |hash, token| {
        (hash ^ u64::from(token.0)).wrapping_mul(0x0100_0000_01B3).rotate_left(7)
    });
    for letter in b'a'..=b'z' {
        logits[usize::from(letter)] =
            5.0 + (hash.rotate_left(u32::from(letter)) % 1000) as f32 / 100.0;
    }
}

impl Model for ScriptedModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let mut seen = self.stage.seen();
        while seen.allowed == Some(0) {
            seen = self.stage.seen.1.wait(seen).unwrap_or_else(PoisonError::into_inner);
        }
        seen.allowed = seen.allowed.map(|allowed| allowed - 1);
        if seen.panic_after == Some(seen.forwards) {
            seen.panic_after = None;
            drop(seen);
            panic!("the script says so");
        }
        if seen.fail_after == Some(seen.forwards) {
            seen.fail_after = None;
            return Err(ModelError::Batch("the script says so".to_owned()));
        }
        logits.clear();
        let mut total = 0;
        for row in &batch.rows {
            for (index, token) in row.tokens.iter().enumerate() {
                let history = seen.held.entry(row.slot).or_default();
                history.push(*token);
                total += 1;
                let last = index + 1 == row.tokens.len();
                let wanted = match row.wants_logits {
                    LogitsWanted::None => false,
                    LogitsWanted::Last => last,
                    LogitsWanted::All => true,
                };
                if wanted {
                    let start = logits.len();
                    logits.resize(start + VOCAB_LEN, 0.0);
                    (self.rule)(history, &mut logits[start..]);
                }
            }
        }
        seen.forwards += 1;
        seen.tokens += total;
        seen.tokens_max = seen.tokens_max.max(total);
        seen.logits_rows_max = seen.logits_rows_max.max(logits.len() / VOCAB_LEN);
        Ok(())
    }

    fn clear(&mut self, slot: SlotId) {
        self.stage.seen().held.remove(&slot);
    }

    fn share_prefix(&mut self, from: SlotId, to: SlotId, len: usize) -> usize {
        let mut seen = self.stage.seen();
        let mut tokens = seen.held.get(&from).cloned().unwrap_or_default();
        tokens.truncate(len);
        let held = tokens.len();
        seen.held.insert(to, tokens);
        held
    }

    fn len(&self, slot: SlotId) -> usize {
        self.stage.seen().held.get(&slot).map_or(0, Vec::len)
    }

    fn release_weights(&mut self) -> std::io::Result<Bytes> {
        self.stage.seen().released += 1;
        Ok(Bytes(1000))
    }
}
