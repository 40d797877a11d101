//! The forward pass: tokens of several rows at once, each weight read once for all of them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use scoutd_kernels::vector::sigmoid;
use scoutd_kernels::{Attention, Kernels, Team, Vector};

use super::experts::{Routing, Source, Streamed};
use super::kv::KvCache;
use super::rope::Rope;
use super::scratch::{Arithmetic, AttentionWork, GatedWork, Inputs, Routed, Scratch};
use super::shape::{Layer, Shape};
use super::weights::{FeedForwardWeights, Gated, Tensor, Weights};
use super::{
    Batch, BatchRow, LogitsWanted, Model, ModelError, ModelOptions, ModelSpec, STREAMED_PASS_TOKENS,
};
use crate::gguf::{Gguf, Mapping};
use crate::residency::pager::{self, Guard};
use crate::residency::{ExpertSlots, ExpertStream, Route};
use crate::units::{Bytes, SlotId, TokenId};

/// A model of any supported architecture.
pub(super) struct Transformer {
    /// Before the weights, so that it ends while they are still mapped.
    guard: Option<Guard>,
    spec: ModelSpec,
    shape: Shape,
    weights: Weights,
    /// Where routed experts come from, if not from the mapping.
    streamed: Option<Streamed>,
    routing: Routing,
    rope: Rope,
    kv: KvCache,
    scratch: Scratch,
    arithmetic: Arithmetic,
    vector: Vector,
    plan: PassPlan,
    pass_tokens_max: usize,
    #[cfg(test)]
    pub(super) trace: super::tests::Trace,
}

/// How a batch is cut into passes; kept so that a step allocates nothing.
#[derive(Default)]
struct PassPlan {
    /// For each row of the batch its tokens that are done.
    done: Vec<usize>,
    segments: Vec<Segment>,
    /// For each token of the pass whose logits are wanted: the token, and the row of `logits` they go to.
    wanted: Vec<(usize, usize)>,
}

/// Consecutive tokens of one row in a pass.
#[derive(Clone, Debug)]
struct Segment {
    slot: usize,
    /// Position of the first token in its sequence.
    position: usize,
    /// Its tokens, counted in the pass.
    tokens: Range<usize>,
}

impl Transformer {
    pub(super) fn new(
        mapping: Arc<Mapping>,
        options: &ModelOptions,
    ) -> Result<Transformer, ModelError> {
        let shared = Arc::clone(&mapping);
        let gguf = Gguf::parse(shared.bytes())?;
        let shape = Shape::from_gguf(&gguf)?;
        let weights = Weights::find(mapping, &gguf, &shape)?;
        let streamed = match &options.streaming {
            Some(streaming) => Streamed::open(&shared, &weights, streaming)?,
            None => None,
        };
        let kernels = match options.isa {
            Some(isa) => Kernels::with_isa(isa).ok_or(ModelError::Isa(isa))?,
            None => Kernels::detect(),
        };
        let wanted = if streamed.is_some() { STREAMED_PASS_TOKENS } else { 1 };
        let pass_tokens_max = options.pass_tokens_max.max(wanted.min(shape.context_len));
        let page_tokens = shape.page_tokens();
        Ok(Transformer {
            guard: pager::guard(&shared),
            spec: shape.spec(options.kv_type),
            rope: Rope::new(shape.rope_theta, shape.head_len, weights.rope_factors.as_deref()),
            kv: KvCache::new(&shape, options.kv_type, page_tokens, options.slots),
            scratch: Scratch::new(&shape, pass_tokens_max),
            arithmetic: Arithmetic {
                team: Team::new(options.threads),
                kernels,
                precision: options.precision,
            },
            vector: kernels.vector(),
            plan: PassPlan::default(),
            pass_tokens_max,
            weights,
            streamed,
            routing: Routing::new(&shape),
            shape,
            #[cfg(test)]
            trace: super::tests::Trace::default(),
        })
    }

    /// Refuses a batch that contradicts the slots, before anything has changed.
    fn check(&self, batch: &Batch) -> Result<(), ModelError> {
        for (index, row) in batch.rows.iter().enumerate() {
            let slot = usize::from(row.slot.0);
            let refused = |why: String| Err(ModelError::Batch(format!("row {index}: {why}")));
            if slot >= self.kv.slots() {
                return refused(format!("slot {slot} of {}", self.kv.slots()));
            }
            if batch.rows[..index].iter().any(|other| other.slot == row.slot) {
                return refused(format!("slot {slot} has a row already"));
            }
            if row.tokens.is_empty() {
                return refused("no tokens".to_owned());
            }
            let vocab_len = self.shape.vocab_len;
            if let Some(token) = row.tokens.iter().find(|token| token.0 as usize >= vocab_len) {
                return refused(format!("token {} in a vocabulary of {vocab_len}", token.0));
            }
            let end = self.kv.len(slot) + row.tokens.len();
            if end > self.shape.context_len {
                return refused(format!("{end} tokens in a context of {}", self.shape.context_len));
            }
        }
        Ok(())
    }

    /// Refuses a file that was cut or written to: its weights are no longer those of the model.
    fn check_file(&self) -> Result<(), ModelError> {
        self.weights.check_unchanged()?;
        match &self.guard {
            Some(guard) if guard.is_damaged() => Err(self.weights.unreadable()),
            _ => Ok(()),
        }
    }

    /// Embeds the tokens of the pass, runs the layers, and leaves the residual stream in the scratch.
    fn run_layers(&mut self) -> Result<(), ModelError> {
        for segment in &self.plan.segments {
            self.kv.extend(segment.slot, segment.tokens.len());
            let d = self.shape.head_len;
            for (offset, token) in segment.tokens.clone().enumerate() {
                let row = &mut self.scratch.cos_sin[token * d..(token + 1) * d];
                self.rope.cos_sin(segment.position + offset, row);
            }
        }
        let tokens = self.plan.tokens();
        let prompt = self.plan.segments.iter().any(|segment| segment.tokens.len() > 1);
        self.routing.begin(prompt);
        if let Some(streamed) = &mut self.streamed {
            streamed.begin(&self.shape, tokens, prompt);
        }
        for index in 0..self.shape.layers.len() {
            self.attention(index, tokens);
            #[cfg(test)]
            self.trace.record("attn", Some(index), &self.scratch.x[..tokens * self.shape.hidden]);
            self.feed_forward(index, tokens)?;
            #[cfg(test)]
            self.trace.record("layer", Some(index), &self.scratch.x[..tokens * self.shape.hidden]);
        }
        for segment in &self.plan.segments {
            self.kv.advance(segment.slot, segment.tokens.len());
        }
        Ok(())
    }

    /// `x += Wo attention(norm(x))`
    fn attention(&mut self, index: usize, tokens: usize) {
        let Transformer { shape, weights, kv, scratch, arithmetic, vector, plan, .. } = self;
        let (layer, weights_of) = (&shape.layers[index], &weights.layers[index]);
        let (hidden, d) = (shape.hidden, shape.head_len);
        let (q_len, kv_len) = (shape.heads * d, shape.kv_heads * d);
        let Scratch { x, h, q, k, v, sum, cos_sin, attention, inputs, .. } = scratch;
        let (q, k) = (&mut q[..tokens * q_len], &mut k[..tokens * kv_len]);
        let (v, sum) = (&mut v[..tokens * kv_len], &mut sum[..tokens * hidden]);

        norm_rows(vector, shape, &weights_of.attn_norm, &x[..tokens * hidden], h);
        let products = &mut [
            (weights.matrix(&weights_of.attn_q), &mut *q),
            (weights.matrix(&weights_of.attn_k), &mut *k),
            (weights.matrix(&weights_of.attn_v), &mut *v),
        ];
        inputs.multiply(arithmetic, &h[..tokens * hidden], hidden, products);
        for segment in &plan.segments {
            for (offset, token) in segment.tokens.clone().enumerate() {
                let q = &mut q[token * q_len..(token + 1) * q_len];
                let k = &mut k[token * kv_len..(token + 1) * kv_len];
                let turns = &cos_sin[token * d..(token + 1) * d];
                place_token(vector, shape, layer, segment.position + offset, turns, q, k);
            }
            let rows = segment.tokens.start * kv_len..segment.tokens.end * kv_len;
            kv.write(vector, segment.slot, index, &k[rows.clone()], &v[rows]);
        }
        mix_values(
            &mut arithmetic.team,
            &Mix { vector, shape, kv, layer: index, segments: &plan.segments, q },
            attention,
            &mut h[..tokens * q_len],
        );
        let output = weights.matrix(&weights_of.attn_output);
        inputs.multiply(arithmetic, &h[..tokens * q_len], q_len, &mut [(output, &mut *sum)]);
        vector.add_assign(&mut x[..tokens * hidden], sum);
    }

    /// `x += feed_forward(norm(x))`
    ///
    /// Router first: while missing experts are on their way, the shared one is computed.
    fn feed_forward(&mut self, index: usize, tokens: usize) -> Result<(), ModelError> {
        let Transformer { shape, weights, streamed, routing, scratch, arithmetic, vector, .. } =
            self;
        let (hidden, weights_of) = (shape.hidden, &weights.layers[index]);
        let Scratch { x, h, sum, gated, routed, inputs, .. } = scratch;
        let (x, h) = (&mut x[..tokens * hidden], &mut h[..tokens * hidden]);
        let sum = &mut sum[..tokens * hidden];
        norm_rows(vector, shape, &weights_of.ffn_norm, x, h);
        let mut pass = Gating { weights, arithmetic, vector, hidden };
        match &weights_of.feed_forward {
            FeedForwardWeights::Dense(dense) => {
                pass.dense(inputs, dense, h, gated, sum);
            }
            FeedForwardWeights::Experts { router, routed: experts, shared } => {
                pass.route(inputs, router, h, routed);
                #[cfg(test)]
                self.trace.record_experts(index, &routed.chosen);
                if let Some(streamed) = streamed {
                    streamed.start(index, &routed.chosen, &routed.order)?;
                }
                routing.record(index, &routed.chosen);
                if let Some(next) = routing.guess_at(index, streamed.is_some()) {
                    routing.guesses.clear();
                    let logits = &mut routed.logits;
                    routing.guesses.extend(pass.guess(shape, next, inputs, x, logits, sum));
                    if let Some(streamed) = streamed {
                        streamed.expect(next, &routing.guesses);
                    }
                }
                pass.dense(inputs, shared, h, gated, sum);
                let stream = streamed.as_mut().map(|streamed| &mut streamed.stream);
                pass.experts(experts, stream, h, routed, sum)?;
            }
        }
        vector.add_assign(x, sum);
        Ok(())
    }

    /// Writes the wanted logits of the pass to their rows.
    fn head(&mut self, logits: &mut [f32]) {
        let Transformer { shape, weights, scratch, arithmetic, vector, plan, .. } = self;
        let (hidden, vocab) = (shape.hidden, shape.vocab_len);
        let Scratch { x, h, inputs, .. } = scratch;
        // Rows of logits that follow each other are one product.
        let follow = |a: &(usize, usize), b: &(usize, usize)| a.1 + 1 == b.1;
        for run in plan.wanted.chunk_by(follow) {
            for (row, &(token, _)) in run.iter().enumerate() {
                let h = &mut h[row * hidden..(row + 1) * hidden];
                let x = &x[token * hidden..(token + 1) * hidden];
                vector.rms_norm(x, Some(&weights.output_norm), shape.norm_eps, h);
            }
            let h = &h[..run.len() * hidden];
            #[cfg(test)]
            self.trace.record("final", None, h);
            let (first, last) = (run[0].1, run[run.len() - 1].1);
            let out = &mut logits[first * vocab..(last + 1) * vocab];
            let output = weights.matrix(&weights.output);
            inputs.multiply(arithmetic, h, hidden, &mut [(output, out)]);
        }
    }

    /// Copies the embeddings of the pass into the residual stream.
    fn embed(&mut self, token: usize, id: TokenId) {
        let hidden = self.shape.hidden;
        let row = &mut self.scratch.x[token * hidden..(token + 1) * hidden];
        self.weights.matrix(&self.weights.token_embd).row_to_f32(id.0 as usize, row);
    }

    /// Plans the next pass over `batch` and embeds its tokens; false if nothing is left.
    ///
    /// A pass ends a row's piece at the border of a chunk, so that local layers need the pages of one chunk.
    fn next_pass(&mut self, batch: &Batch) -> bool {
        self.plan.segments.clear();
        self.plan.wanted.clear();
        let (mut used, mut logits_row) = (0, 0);
        for (index, row) in batch.rows.iter().enumerate() {
            let slot = usize::from(row.slot.0);
            let position = self.kv.len(slot);
            let first = self.plan.done[index];
            let mut count = (row.tokens.len() - first).min(self.pass_tokens_max - used);
            if let Some(chunk) = self.shape.chunk {
                count = count.min(chunk - position % chunk);
            }
            for offset in 0..count {
                self.embed(used + offset, row.tokens[first + offset]);
                if let Some(row) = wanted_row(row, first + offset) {
                    self.plan.wanted.push((used + offset, logits_row + row));
                }
            }
            if count > 0 {
                let tokens = used..used + count;
                self.plan.segments.push(Segment { slot, position, tokens });
            }
            self.plan.done[index] += count;
            used += count;
            logits_row += logits_rows(row);
        }
        used > 0
    }
}

impl Model for Transformer {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.check(batch)?;
        self.check_file()?;
        let rows: usize = batch.rows.iter().map(logits_rows).sum();
        logits.clear();
        logits.resize(rows * self.shape.vocab_len, 0.0);
        self.plan.done.clear();
        self.plan.done.resize(batch.rows.len(), 0);
        while self.next_pass(batch) {
            self.run_layers()?;
            self.head(logits);
        }
        // What was lost while the pass ran was read as zeros.
        if self.guard.as_ref().is_some_and(Guard::is_damaged) {
            self.check_file()?;
        }
        refuse_not_finite(batch, logits, self.shape.vocab_len)
    }

    fn clear(&mut self, slot: SlotId) {
        self.kv.clear(slot.0.into());
    }

    fn share_prefix(&mut self, from: SlotId, to: SlotId, len: usize) -> usize {
        self.kv.share_prefix(from.0.into(), to.0.into(), len)
    }

    fn len(&self, slot: SlotId) -> usize {
        self.kv.len(slot.0.into())
    }

    fn kv_bytes_in_use(&self) -> u64 {
        self.kv.bytes_in_use()
    }

    fn release_weights(&mut self) -> std::io::Result<Bytes> {
        self.weights.release()
    }

    fn expert_slots(&self) -> Option<Arc<ExpertSlots>> {
        self.streamed.as_ref().map(|streamed| Arc::clone(streamed.stream.slots()))
    }

    fn record_routes(&mut self, on: bool) -> Vec<Route> {
        self.routing.record_from_now(on)
    }

    fn locked_bytes(&self) -> u64 {
        self.streamed.as_ref().map_or(0, Streamed::locked_bytes)
    }

    fn prefill_tokens_wanted(&self) -> usize {
        if self.streamed.is_some() { self.pass_tokens_max } else { 1 }
    }
}

impl PassPlan {
    fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.tokens.end)
    }
}

/// Rows of logits that a row of the batch wants.
fn logits_rows(row: &BatchRow) -> usize {
    match row.wants_logits {
        LogitsWanted::None => 0,
        LogitsWanted::Last => 1,
        LogitsWanted::All => row.tokens.len(),
    }
}

/// Which of its rows of logits a token of `row` fills.
fn wanted_row(row: &BatchRow, token: usize) -> Option<usize> {
    match row.wants_logits {
        LogitsWanted::None => None,
        LogitsWanted::Last => (token + 1 == row.tokens.len()).then_some(0),
        LogitsWanted::All => Some(token),
    }
}

fn refuse_not_finite(batch: &Batch, logits: &[f32], vocab_len: usize) -> Result<(), ModelError> {
    let mut left = logits;
    let mut rows = Vec::new();
    for (index, row) in batch.rows.iter().enumerate() {
        let (own, rest) = left.split_at(logits_rows(row) * vocab_len);
        left = rest;
        // Without branches, so that it costs nothing beside the product.
        if own.iter().fold(false, |bad, value| bad | !value.is_finite()) {
            rows.push(index);
        }
    }
    if rows.is_empty() { Ok(()) } else { Err(ModelError::NotFinite { rows }) }
}

fn norm_rows(vector: &Vector, shape: &Shape, weight: &[f32], x: &[f32], out: &mut [f32]) {
    let hidden = shape.hidden;
    for (x, out) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)) {
        vector.rms_norm(x, Some(weight), shape.norm_eps, out);
    }
}

/// What a layer does to the queries and keys of one token because of its position.
fn place_token(
    vector: &Vector,
    shape: &Shape,
    layer: &Layer,
    position: usize,
    turns: &[f32],
    q: &mut [f32],
    k: &mut [f32],
) {
    if layer.rope {
        vector.rope_interleaved(q, shape.head_len, turns);
        vector.rope_interleaved(k, shape.head_len, turns);
    }
    if layer.qk_norm {
        vector.rms_norm_heads(q, shape.head_len, shape.norm_eps);
        vector.rms_norm_heads(k, shape.head_len, shape.norm_eps);
    }
    if layer.temperature
        && let Some(temperature) = shape.temperature
    {
        let floor = ((position + 1) as f32 / temperature.floor).floor();
        let factor = 1.0 + temperature.scale * floor.ln_1p();
        if factor != 1.0 {
            vector.scale(q, factor);
        }
    }
}

/// What attention of one layer reads.
struct Mix<'a> {
    vector: &'a Vector,
    shape: &'a Shape,
    kv: &'a KvCache,
    layer: usize,
    segments: &'a [Segment],
    q: &'a [f32],
}

/// Some tokens of a segment against one KV head.
struct MixTask<'a> {
    segment: &'a Segment,
    head: usize,
    /// Counted in the pass.
    tokens: Range<usize>,
}

impl<'a> Mix<'a> {
    /// The pieces of work: every segment cut into blocks of tokens, every block for every KV head.
    fn tasks(&self) -> impl Iterator<Item = MixTask<'a>> + use<'a> {
        let group = self.shape.heads / self.shape.kv_heads;
        let block = (QUERY_ROWS / group).max(1);
        let kv_heads = self.shape.kv_heads;
        let segments = self.segments;
        segments.iter().flat_map(move |segment| {
            segment.tokens.clone().step_by(block).flat_map(move |start| {
                let tokens = start..(start + block).min(segment.tokens.end);
                (0..kv_heads).map(move |head| MixTask { segment, head, tokens: tokens.clone() })
            })
        })
    }

    fn compute(&self, task: &MixTask, work: &mut AttentionWork) {
        let Mix { vector, shape, kv, layer, q, .. } = self;
        let (d, group) = (shape.head_len, shape.heads / shape.kv_heads);
        let q_len = shape.heads * d;
        let AttentionWork { out, lists } = work;
        out.resize(task.tokens.len() * group * d, 0.0);
        kv.with_pages(task.segment.slot, *layer, task.head, lists, |pages, before| {
            let first = before + task.tokens.start - task.segment.tokens.start;
            let attention = Attention {
                queries: &q[task.tokens.start * q_len + task.head * group * d..],
                query_stride: q_len,
                group,
                head_len: d,
                tokens: task.tokens.len(),
                pages,
                page_tokens: kv.page_tokens(),
                keys: 0..first + 1,
                scale: 1.0 / (d as f32).sqrt(),
            };
            vector.attend(&attention, out);
        });
    }
}

/// Attention of all queries into `out`, rows of `heads * head_len`, on the threads of the team.
fn mix_values(team: &mut Team, mix: &Mix, works: &mut Vec<Mutex<AttentionWork>>, out: &mut [f32]) {
    let count = mix.tasks().count();
    if works.len() < count {
        works.resize_with(count, Mutex::default);
    }
    let next = AtomicUsize::new(0);
    let part = |_: usize| {
        let mut tasks = mix.tasks().enumerate();
        let mut passed = 0;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((_, task)) = tasks.nth(number - passed) else { return };
            passed = number + 1;
            let mut work = works[number].lock().unwrap_or_else(PoisonError::into_inner);
            mix.compute(&task, &mut work);
        }
    };
    team.run(&part);
    let (d, group) = (mix.shape.head_len, mix.shape.heads / mix.shape.kv_heads);
    let q_len = mix.shape.heads * d;
    for (task, work) in mix.tasks().zip(works) {
        let work = work.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (token, row) in task.tokens.zip(work.out.chunks_exact(group * d)) {
            let at = token * q_len + task.head * group * d;
            out[at..at + group * d].copy_from_slice(row);
        }
    }
}

/// Query rows (tokens times heads of a group) of one piece of attention.
const QUERY_ROWS: usize = 64;

/// The gated products of the second half of a layer.
struct Gating<'a> {
    weights: &'a Weights,
    arithmetic: &'a mut Arithmetic,
    vector: &'a Vector,
    hidden: usize,
}

impl Gating<'_> {
    /// `out = down (silu(gate h) * (up h))` for all rows.
    fn dense(
        &mut self,
        inputs: &mut Inputs,
        gated: &Gated,
        h: &[f32],
        work: &mut GatedWork,
        out: &mut [f32],
    ) {
        let width = gated.gate.rows;
        let [gate, up, product] = work.rows(h.len() / self.hidden * width);
        let products = &mut [
            (self.weights.matrix(&gated.gate), &mut *gate),
            (self.weights.matrix(&gated.up), &mut *up),
        ];
        inputs.multiply(self.arithmetic, h, self.hidden, products);
        self.vector.silu_mul(gate, up, 1.0, product);
        let down = self.weights.matrix(&gated.down);
        inputs.multiply(self.arithmetic, product, width, &mut [(down, out)]);
    }

    /// Chooses each token's expert: the largest router logit, the first of equals, and its sigmoid.
    fn route(&mut self, inputs: &mut Inputs, router: &Tensor, h: &[f32], routed: &mut Routed) {
        let Routed { logits, chosen, .. } = routed;
        let logits = self.router_logits(inputs, router, h, logits);
        chosen.clear();
        for row in logits.chunks_exact(router.rows) {
            let expert = self.vector.argmax(row);
            chosen.push((expert, sigmoid(row[expert])));
        }
        routed.order.clear();
        routed.order.extend(0..routed.chosen.len());
        // Stable by the second key, without the allocation of a stable sort.
        routed.order.sort_unstable_by_key(|&token| (routed.chosen[token].0, token));
    }

    fn router_logits<'l>(
        &mut self,
        inputs: &mut Inputs,
        router: &Tensor,
        h: &[f32],
        logits: &'l mut [f32],
    ) -> &'l [f32] {
        let logits = &mut logits[..h.len() / self.hidden * router.rows];
        let matrix = self.weights.matrix(router);
        inputs.multiply(self.arithmetic, h, self.hidden, &mut [(matrix, &mut *logits)]);
        logits
    }

    /// The experts that the router of `layer` chooses for the present stream `x`, which lacks what this layer's
    /// experts and that layer's attention will add: guesses, to begin reading with. `free` is overwritten.
    fn guess<'l>(
        &mut self,
        shape: &Shape,
        layer: usize,
        inputs: &mut Inputs,
        x: &[f32],
        logits: &'l mut [f32],
        free: &mut [f32],
    ) -> impl Iterator<Item = usize> + use<'l> {
        let weights_of = &self.weights.layers[layer];
        let router = match &weights_of.feed_forward {
            FeedForwardWeights::Dense(_) => None,
            FeedForwardWeights::Experts { router, .. } => Some(router),
        };
        let vector = *self.vector;
        let (rows, experts) = match router {
            None => (&logits[..0], 1),
            Some(router) => {
                norm_rows(self.vector, shape, &weights_of.ffn_norm, x, free);
                (self.router_logits(inputs, router, free, logits), router.rows)
            }
        };
        rows.chunks_exact(experts).map(move |row| vector.argmax(row))
    }

    /// `out += down (silu(s gate h) * (s up h))`, each token through its expert, each expert once.
    ///
    /// The score s scales the expert's input; as `gate (s h) = s (gate h)`, the rounding of h is shared.
    fn experts(
        &mut self,
        gated: &Gated,
        stream: Option<&mut ExpertStream>,
        h: &[f32],
        routed: &mut Routed,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let (hidden, width) = (self.hidden, gated.gate.rows);
        let Routed { chosen, order, h: rows, gated: work, sum, inputs, .. } = routed;
        let mut source = Source::new(self.weights, gated, chosen, order, stream);
        while let Some(group) = source.next_tokens()? {
            let count = group.len();
            for (row, &token) in rows.chunks_exact_mut(hidden).zip(group) {
                row.copy_from_slice(&h[token * hidden..(token + 1) * hidden]);
            }
            let [gate, up, product] = work.rows(count * width);
            let sum = &mut sum[..count * hidden];
            let products = &mut [(source.gate(), &mut *gate), (source.up(), &mut *up)];
            inputs.multiply(self.arithmetic, &rows[..count * hidden], hidden, products);
            for (row, &token) in group.iter().enumerate() {
                let own = row * width..(row + 1) * width;
                let (gate, up) = (&gate[own.clone()], &up[own.clone()]);
                self.vector.silu_mul(gate, up, chosen[token].1, &mut product[own]);
            }
            let down = source.down()?;
            inputs.multiply(self.arithmetic, product, width, &mut [(down, &mut *sum)]);
            for (&token, sum) in group.iter().zip(sum.chunks_exact(hidden)) {
                self.vector.add_assign(&mut out[token * hidden..(token + 1) * hidden], sum);
            }
        }
        Ok(())
    }
}
