//! The buffers of a pass, sized once.

use std::sync::Mutex;

use scoutd_kernels::{ActivationForm, Activations, Kernels, Matrix, Precision, Team, matmul_many};

use super::kv::PageLists;
use super::shape::Shape;

/// Buffers for passes of at most `tokens` tokens. Rows stand one behind the other.
pub(super) struct Scratch {
    /// The residual stream.
    pub(super) x: Vec<f32>,
    /// What a matrix reads: the normed stream, or the mixed values of the heads.
    pub(super) h: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// What a part adds to the residual stream.
    pub(super) sum: Vec<f32>,
    pub(super) gated: GatedWork,
    pub(super) routed: Routed,
    pub(super) cos_sin: Vec<f32>,
    pub(super) attention: Vec<Mutex<AttentionWork>>,
    pub(super) inputs: Inputs,
}

/// Buffers of the routed experts.
pub(super) struct Routed {
    /// Router logits, a row for each token.
    pub(super) logits: Vec<f32>,
    /// For each token its expert and score.
    pub(super) chosen: Vec<(usize, f32)>,
    /// Tokens in the order of their experts.
    pub(super) order: Vec<usize>,
    /// Rows of one expert's tokens.
    pub(super) h: Vec<f32>,
    pub(super) gated: GatedWork,
    pub(super) sum: Vec<f32>,
    pub(super) inputs: Inputs,
}

/// Buffers of a gated product: gate, up, and their product.
pub(super) struct GatedWork([Vec<f32>; 3]);

impl GatedWork {
    /// The first `len` values of each.
    pub(super) fn rows(&mut self, len: usize) -> [&mut [f32]; 3] {
        self.0.each_mut().map(|buffer| &mut buffer[..len])
    }
}

/// A piece of attention: some tokens of one row against one KV head. A task is worked on by one thread at
/// a time, so its lock is never waited for.
#[derive(Default)]
pub(super) struct AttentionWork {
    pub(super) out: Vec<f32>,
    pub(super) lists: PageLists,
}

impl Scratch {
    pub(super) fn new(shape: &Shape, tokens: usize) -> Scratch {
        let zeros = |width: usize| vec![0.0; width * tokens];
        let has_experts = shape.experts_max() > 0;
        let routed = |width: usize| if has_experts { zeros(width) } else { Vec::new() };
        let (hidden, width) = (shape.hidden, shape.width_max());
        let (q_len, kv_len) = (shape.heads * shape.head_len, shape.kv_heads * shape.head_len);
        Scratch {
            x: zeros(hidden),
            h: zeros(hidden.max(q_len)),
            q: zeros(q_len),
            k: zeros(kv_len),
            v: zeros(kv_len),
            sum: zeros(hidden),
            gated: GatedWork([zeros(width), zeros(width), zeros(width)]),
            routed: Routed {
                logits: routed(shape.experts_max()),
                chosen: Vec::with_capacity(tokens),
                order: Vec::with_capacity(tokens),
                h: routed(hidden),
                gated: GatedWork([routed(width), routed(width), routed(width)]),
                sum: routed(hidden),
                inputs: Inputs::default(),
            },
            cos_sin: zeros(shape.head_len),
            attention: Vec::new(),
            inputs: Inputs::default(),
        }
    }
}

/// Activations in each form that some matrix asks for.
#[derive(Default)]
pub(super) struct Inputs {
    f32: Activations,
    q8_0: Activations,
    q8_k: Activations,
}

/// What every product needs.
pub(super) struct Arithmetic {
    pub(super) team: Team,
    pub(super) kernels: Kernels,
    pub(super) precision: Precision,
}

impl Inputs {
    /// Multiplies rows `x` of `cols` values by each matrix. Matrices whose formats want the same form of
    /// activations share one parallel region and one rounding; `products` are reordered for that.
    pub(super) fn multiply(
        &mut self,
        arithmetic: &mut Arithmetic,
        x: &[f32],
        cols: usize,
        products: &mut [(Matrix<'_>, &mut [f32])],
    ) {
        let precision = arithmetic.precision;
        let form =
            |product: &(Matrix<'_>, &mut [f32])| product.0.format().activation_form(precision);
        products.sort_unstable_by_key(|product| form(product) as usize);
        for group in products.chunk_by_mut(|a, b| form(a) == form(b)) {
            let form = form(&group[0]);
            let activations = match form {
                ActivationForm::F32 => &mut self.f32,
                ActivationForm::Q8_0 => &mut self.q8_0,
                ActivationForm::Q8K => &mut self.q8_k,
            };
            activations.fill(&arithmetic.kernels, form, x, cols);
            matmul_many(&mut arithmetic.team, &arithmetic.kernels, group, activations);
        }
    }
}
