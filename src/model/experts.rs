//! Where the routed experts of a pass come from: the mapping, or expert slots.

use scoutd_kernels::Matrix;

use super::shape::Shape;
use super::weights::{FeedForwardWeights, Gated, Tensor, Weights};
use super::{ModelError, StreamedExperts};
use crate::gguf::Mapping;
use crate::residency::{ExpertSlots, ExpertStream, LayerFile, PartFile, Pinned, Route, Step};

/// The experts of a model that reads them when they are needed.
pub(super) struct Streamed {
    pub(super) stream: ExpertStream,
    /// For each layer of the model its number among those with experts.
    numbers: Vec<Option<usize>>,
    /// What the present pass is.
    step: Step,
    /// The part that is not streamed.
    pinned: Pinned,
}

impl Streamed {
    /// None if the model has no experts: then there is nothing to stream.
    pub(super) fn open(
        mapping: &Mapping,
        weights: &Weights,
        streaming: &StreamedExperts,
    ) -> Result<Option<Streamed>, ModelError> {
        let mut numbers = Vec::new();
        let mut layers = Vec::new();
        for layer in &weights.layers {
            numbers.push(match &layer.feed_forward {
                FeedForwardWeights::Dense(_) => None,
                FeedForwardWeights::Experts { router, routed, .. } => {
                    layers.push(routed.file(router.rows));
                    Some(layers.len() - 1)
                }
            });
        }
        if layers.is_empty() {
            return Ok(None);
        }
        let ledger = streaming.ledger.as_ref().map(|ledger| (ledger, streaming.label.as_str()));
        let slots = ExpertSlots::open(mapping, layers, &streaming.slots, ledger)?;
        let stream = slots.stream(streaming.slots.ahead);
        let pinned = weights.pin(streaming.slots.lock)?;
        Ok(Some(Streamed { stream, numbers, step: Step::Decode, pinned }))
    }

    /// Bytes of weights that are locked in memory.
    pub(super) fn locked_bytes(&self) -> u64 {
        self.pinned.locked().0
    }

    /// Says of what kind the next pass is.
    pub(super) fn begin(&mut self, shape: &Shape, tokens: usize, prompt: bool) {
        self.step = match prompt {
            false => Step::Decode,
            true if tokens >= SWEEP_TOKENS_PER_EXPERT * shape.experts_max() => Step::Sweep,
            true => Step::Prompt,
        };
    }

    /// The experts that the tokens of a pass chose in `layer` begin to arrive. `order` are the tokens in the order
    /// of their experts.
    pub(super) fn start(
        &mut self,
        layer: usize,
        chosen: &[(usize, f32)],
        order: &[usize],
    ) -> Result<(), ModelError> {
        let Some(number) = self.numbers[layer] else { return Ok(()) };
        let wanted = groups(chosen, order).map(|group| chosen[group[0]].0);
        Ok(self.stream.start(number, wanted, self.step)?)
    }

    /// Says what `layer` will probably need.
    pub(super) fn expect(&mut self, layer: usize, guesses: &[usize]) {
        if let Some(number) = self.numbers[layer] {
            self.stream.expect(number, guesses.iter().copied());
        }
    }
}

/// What routers choose: for guesses at the next layer, and for whoever wants to know.
pub(super) struct Routing {
    /// For each layer of the model its number among those with experts.
    numbers: Vec<Option<usize>>,
    prompt: bool,
    recorded: Option<Vec<Route>>,
    /// For each token of the pass, what the last layer with experts guesses for the next one.
    pub(super) guesses: Vec<usize>,
}

impl Routing {
    pub(super) fn new(shape: &Shape) -> Routing {
        let mut next = 0;
        let numbers = shape.layers.iter().map(|layer| {
            let has_experts = layer.feed_forward.experts() > 0;
            next += usize::from(has_experts);
            has_experts.then(|| next - 1)
        });
        Routing { numbers: numbers.collect(), prompt: false, recorded: None, guesses: Vec::new() }
    }

    /// Begins a pass.
    pub(super) fn begin(&mut self, prompt: bool) {
        self.prompt = prompt;
        self.guesses.clear();
    }

    /// Records from now on, or no more; returns what was recorded before.
    pub(super) fn record_from_now(&mut self, on: bool) -> Vec<Route> {
        std::mem::replace(&mut self.recorded, on.then(Vec::new)).unwrap_or_default()
    }

    /// Notes what `layer` chose.
    pub(super) fn record(&mut self, layer: usize, chosen: &[(usize, f32)]) {
        if let (Some(routes), Some(number)) = (&mut self.recorded, self.numbers[layer]) {
            routes.push(Route {
                layer: number,
                experts: chosen.iter().map(|(expert, _)| *expert).collect(),
                guesses: self.guesses.clone(),
                prompt: self.prompt,
            });
        }
    }

    /// The layer at whose experts a guess is worth making after `layer`: the next one that has some, while tokens
    /// are written, and if anybody makes use of it.
    pub(super) fn guess_at(&self, layer: usize, streams: bool) -> Option<usize> {
        if self.prompt || !(streams || self.recorded.is_some()) {
            return None;
        }
        (layer + 1..self.numbers.len()).find(|&later| self.numbers[later].is_some())
    }
}

/// Tokens for each expert from which on a piece of a prompt needs nearly all of them: an even router leaves one in
/// seven out with two.
const SWEEP_TOKENS_PER_EXPERT: usize = 2;

impl Gated {
    /// Where the matrices of `experts` experts lie.
    fn file(&self, experts: usize) -> LayerFile {
        let parts = [&self.gate, &self.up, &self.down]
            .map(|tensor| PartFile { offset: tensor.offset() as u64, bytes: tensor.bytes() });
        LayerFile { experts, parts }
    }
}

/// The experts of one layer, one after the other, with the tokens of each.
pub(super) struct Source<'a> {
    weights: &'a Weights,
    gated: &'a Gated,
    chosen: &'a [(usize, f32)],
    /// Tokens in the order of their experts.
    order: &'a [usize],
    /// Without it experts are taken from the mapping in the order of their numbers.
    stream: Option<&'a mut ExpertStream>,
    expert: usize,
    /// The first of `order` that has not been given.
    at: usize,
}

impl<'a> Source<'a> {
    /// The experts of `gated` that the tokens in `order` chose. A stream must have been started with them.
    pub(super) fn new(
        weights: &'a Weights,
        gated: &'a Gated,
        chosen: &'a [(usize, f32)],
        order: &'a [usize],
        stream: Option<&'a mut ExpertStream>,
    ) -> Source<'a> {
        Source { weights, gated, chosen, order, stream, expert: 0, at: 0 }
    }

    /// The tokens of the next expert, whose gate and up can be used now.
    pub(super) fn next_tokens(&mut self) -> Result<Option<&'a [usize]>, ModelError> {
        let next = match &mut self.stream {
            Some(stream) => stream.next_expert()?,
            None => self.order.get(self.at).map(|&token| self.chosen[token].0),
        };
        let Some(expert) = next else { return Ok(None) };
        let start = self.order.partition_point(|&token| self.chosen[token].0 < expert);
        self.at = self.order.partition_point(|&token| self.chosen[token].0 <= expert);
        self.expert = expert;
        Ok(Some(&self.order[start..self.at]))
    }

    pub(super) fn gate(&self) -> Matrix<'_> {
        self.there(&self.gated.gate, 0)
    }

    pub(super) fn up(&self) -> Matrix<'_> {
        self.there(&self.gated.up, 1)
    }

    /// The down matrix, which may have to be waited for.
    pub(super) fn down(&mut self) -> Result<Matrix<'_>, ModelError> {
        if let Some(stream) = &mut self.stream {
            stream.part(2)?;
        }
        Ok(self.there(&self.gated.down, 2))
    }

    fn there(&self, tensor: &Tensor, part: usize) -> Matrix<'_> {
        match &self.stream {
            Some(stream) => tensor.matrix(stream.arrived(part)),
            None => self.weights.expert(tensor, self.expert),
        }
    }
}

/// The tokens of each expert.
fn groups<'a>(chosen: &'a [(usize, f32)], order: &'a [usize]) -> impl Iterator<Item = &'a [usize]> {
    order.chunk_by(|&a, &b| chosen[a].0 == chosen[b].0)
}
