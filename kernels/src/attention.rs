//! Attention of query tokens over a paged cache of keys and values, one KV head at a time.

use std::ops::Range;

use crate::arch::attention_lanes::HEAD_LEN_MAX;
use crate::arch::vector::AttentionTask;
use crate::vector::Vector;

/// The cache of one KV head: page `i` holds `page_tokens` rows of `head_len` values, for the positions from
/// `i * page_tokens`. Pages outside the keys that are asked for may be empty slices, and the last
/// page need only reach to the last key.
#[derive(Clone, Copy)]
pub enum KvPages<'a> {
    F32 {
        keys: &'a [&'a [f32]],
        values: &'a [&'a [f32]],
    },
    /// F16 as its bits.
    F16 {
        keys: &'a [&'a [u16]],
        values: &'a [&'a [u16]],
    },
}

/// One or more consecutive query tokens of the heads that share one KV head.
#[derive(Clone)]
pub struct Attention<'a> {
    /// Row of token t, head h of the group: `head_len` values from `t * query_stride + h * head_len`.
    pub queries: &'a [f32],
    pub query_stride: usize,
    /// Query heads on this KV head.
    pub group: usize,
    pub head_len: usize,
    /// Query tokens: 1 in decode.
    pub tokens: usize,
    pub pages: KvPages<'a>,
    pub page_tokens: usize,
    /// The keys that the *first* query token sees; token t sees t more at the end. Counted in rows of the
    /// pages, so page 0 begins at key 0.
    pub keys: Range<usize>,
    /// Factor of the scores, `1 / sqrt(head_len)`.
    pub scale: f32,
}

impl Vector {
    /// `out = softmax(scale q . k) v` for every token and head, dense: `tokens * group * head_len` values.
    ///
    /// One pass with a running maximum; a block of keys and values is read once for up to 32 rows. Against F64
    /// the error is of the order of 1e-6 of the largest value (tested).
    ///
    /// # Panics
    /// If a length does not fit, if a token sees no key, or if a page that is needed is too short.
    pub fn attend(&self, attention: &Attention<'_>, out: &mut [f32]) {
        let a = attention;
        assert!(a.group > 0 && a.tokens > 0, "attention without queries");
        assert!(
            a.head_len > 0 && a.head_len <= HEAD_LEN_MAX,
            "attention with heads of {} values",
            a.head_len
        );
        assert!(a.keys.start < a.keys.end, "a query token sees no key");
        assert!(
            a.queries.len() >= (a.tokens - 1) * a.query_stride + a.group * a.head_len,
            "too few queries"
        );
        assert!(out.len() == a.tokens * a.group * a.head_len, "attention into another length");
        match a.pages {
            KvPages::F32 { keys, values } => {
                let task = task(a, keys, values);
                if is_whole(a.head_len) {
                    self.table.attend_f32(&task, out);
                } else {
                    crate::arch::attention_scalar::attend(&task, out);
                }
            }
            KvPages::F16 { keys, values } => {
                let task = task(a, keys, values);
                if is_whole(a.head_len) {
                    self.table.attend_f16(&task, out);
                } else {
                    crate::arch::attention_scalar::attend(&task, out);
                }
            }
        }
    }
}

/// The fast forms want whole registers of the widest set. No model here has another head length; one that
/// had would take the reference.
fn is_whole(head_len: usize) -> bool {
    head_len.is_multiple_of(16)
}

fn task<'a, E>(
    a: &Attention<'a>,
    keys: &'a [&'a [E]],
    values: &'a [&'a [E]],
) -> AttentionTask<'a, E> {
    assert!(a.page_tokens > 0, "pages without tokens");
    let last = a.keys.end + a.tokens - 1;
    for page in a.keys.start / a.page_tokens..last.div_ceil(a.page_tokens) {
        let rows = (last - page * a.page_tokens).min(a.page_tokens);
        assert!(
            keys[page].len() >= rows * a.head_len && values[page].len() >= rows * a.head_len,
            "page {page} is shorter than its {rows} tokens"
        );
    }
    AttentionTask {
        queries: a.queries,
        query_stride: a.query_stride,
        group: a.group,
        head_len: a.head_len,
        tokens: a.tokens,
        keys,
        values,
        page_tokens: a.page_tokens,
        start: a.keys.start,
        end: a.keys.end,
        scale: a.scale,
    }
}
