//! One pass of the model and what follows from it.

use std::time::Instant;

use super::{Engine, Retired, SequenceId};
use crate::chat::{ChatError, FinishReason};
use crate::engine::request::SamplingTools;
use crate::engine::scheduler::{Ended, Plan, Sampled};
use crate::model::{LogitsWanted, ModelError};

impl Engine {
    /// Runs `plan`, samples, commits, sends.
    pub(super) fn step(&mut self, plan: &Plan) {
        let started = Instant::now();
        let result = self.model.forward(&plan.batch, &mut self.buffers.logits);
        let now = Instant::now();
        let prefill = plan.rows.iter().filter(|row| row.prefill).map(|row| row.len).sum();
        let decodes = plan.rows.iter().filter(|row| !row.prefill).count();
        let vocab_len = self.shared.spec.vocab_len as usize;
        let wanted: usize =
            plan.batch.rows.iter().map(|row| logits_rows(row.wants_logits, row.tokens.len())).sum();
        // Rows whose logits are no numbers fail alone; the others are good.
        let (result, bad_rows) = match result {
            Err(ModelError::NotFinite { rows }) => (Ok(()), rows),
            other => (other, Vec::new()),
        };
        match result {
            Err(error) => {
                // The file of the weights was cut or written to: no later pass can be better.
                self.lost |= matches!(error, ModelError::File(_));
                return self.fail_rows(plan, &format!("forward pass: {error}"), now);
            }
            Ok(()) if self.buffers.logits.len() != wanted * vocab_len => {
                let message = format!(
                    "forward pass gave {} logits instead of {}",
                    self.buffers.logits.len(),
                    wanted * vocab_len
                );
                return self.fail_rows(plan, &message, now);
            }
            Ok(()) => self.rates.note(prefill, decodes, now - started),
        }
        let sampled = self.take_logits(plan, now);
        let ended = self.scheduler.commit(plan, &sampled);
        self.touch_memory(plan);
        for row in bad_rows.iter().filter_map(|index| plan.rows.get(*index)) {
            self.fail_row(
                row.id,
                "the logits are not numbers: the model's weights are damaged",
                now,
            );
        }
        for (retired, reason) in ended {
            self.end_sequence(retired, reason, now);
        }
        for row in &plan.rows {
            self.flush(row.id, now);
        }
    }

    /// Scores prompts and samples tokens; one entry per row that samples.
    fn take_logits(&mut self, plan: &Plan, now: Instant) -> Vec<Sampled> {
        let vocab_len = self.shared.spec.vocab_len as usize;
        let tokenizer = self.shared.preparer.template.tokenizer();
        let mut sampled = Vec::new();
        let mut logits = self.buffers.logits.as_mut_slice();
        for (row, batch_row) in plan.rows.iter().zip(&plan.batch.rows) {
            let count = logits_rows(batch_row.wants_logits, row.len);
            let (own, rest) = std::mem::take(&mut logits).split_at_mut(count * vocab_len);
            logits = rest;
            let Some(request) = self.requests.get_mut(&row.id) else {
                // Every planned row has its request; a row that samples still needs an answer.
                sampled.extend(row.samples.then_some(Sampled::Nothing));
                continue;
            };
            if row.scores
                && let Some((tokens, _)) = self.scheduler.tokens(row.id)
            {
                request.score(tokenizer, tokens, row.first + row.len - count, own, vocab_len);
            }
            let ends_prompt =
                row.prefill && self.scheduler.prompt_len(row.id) == Some(row.first + row.len);
            if ends_prompt {
                request.finish_prompt();
            }
            if row.samples {
                let tools = SamplingTools {
                    tokenizer,
                    metrics: &self.shared.metrics,
                    scratch: &mut self.buffers.scratch,
                    raw: &mut self.buffers.raw,
                    now,
                };
                let last = own.len() - vocab_len;
                sampled.push(request.sample(&mut own[last..], tools));
            }
        }
        sampled
    }

    /// Tells the ledger which promised pages exist now.
    fn touch_memory(&mut self, plan: &Plan) {
        for row in &plan.rows {
            if let Some(memory) = self.requests.get(&row.id).and_then(|r| r.memory.as_ref()) {
                memory.touch(&self.shared.spec, row.first + row.len);
            }
        }
    }

    fn end_sequence(&mut self, retired: Retired, reason: Ended, now: Instant) {
        let Some(mut request) = self.requests.remove(&retired.id) else { return };
        self.rest(retired, request.memory.take());
        match reason {
            Ended::Length => self.finish_request(request, FinishReason::Length, now),
            Ended::Stop => self.finish_request(request, FinishReason::Stop, now),
            Ended::Nothing => {
                let error = ChatError::Internal("no token is possible".to_owned());
                self.fail_request(request, error, now);
            }
        }
    }

    /// The pass failed: its slots are undefined.
    fn fail_rows(&mut self, plan: &Plan, message: &str, now: Instant) {
        for row in &plan.rows {
            self.fail_row(row.id, message, now);
        }
    }

    /// Ends a running request whose slot is undefined.
    fn fail_row(&mut self, id: SequenceId, message: &str, now: Instant) {
        if let Some(retired) = self.scheduler.cancel_running(id) {
            self.model.clear(retired.slot);
            self.free_slots.push(retired.slot);
            if let Some(mut request) = self.requests.remove(&id) {
                drop(request.memory.take());
                self.fail_request(request, ChatError::Internal(message.to_owned()), now);
            }
        }
    }
}

/// How many rows of logits the model gives for a row of `len` tokens.
fn logits_rows(wanted: LogitsWanted, len: usize) -> usize {
    match wanted {
        LogitsWanted::None => 0,
        LogitsWanted::Last => 1,
        LogitsWanted::All => len,
    }
}
