//! Attention in plain Rust: the reference of the faster paths. Everything but the cache is F64.

use super::lanes::Widen;
use super::vector::AttentionTask;

/// As `Kernels::attend`: one pass over the keys of each row, with a running maximum.
pub(crate) fn attend<E: Widen>(task: &AttentionTask<'_, E>, out: &mut [f32]) {
    let d = task.head_len;
    let mut mixed = vec![0.0f64; d];
    for (row, out) in out.chunks_exact_mut(d).enumerate() {
        let query = task.query_row(row);
        let (mut largest, mut sum) = (f64::NEG_INFINITY, 0.0);
        mixed.fill(0.0);
        for position in task.start..task.end(row) {
            let (page, offset) = (position / task.page_tokens, position % task.page_tokens);
            let key = &task.keys[page][offset * d..][..d];
            let value = &task.values[page][offset * d..][..d];
            let dot: f64 = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * k.widen()).sum();
            let score = dot * f64::from(task.scale);
            let raised = largest.max(score);
            let (correction, weight) = ((largest - raised).exp(), (score - raised).exp());
            sum = sum * correction + weight;
            for (mixed, &value) in mixed.iter_mut().zip(value) {
                *mixed = *mixed * correction + weight * value.widen();
            }
            largest = raised;
        }
        for (out, mixed) in out.iter_mut().zip(&mixed) {
            *out = (mixed / sum) as f32;
        }
    }
}
