//! The table of vector operations: one set of functions per instruction set, called safely.

use super::{attention_scalar, vector_scalar};

/// Attention of some query tokens of one KV head's group, checked by `attention`.
pub(crate) struct AttentionTask<'a, E> {
    pub(crate) queries: &'a [f32],
    pub(crate) query_stride: usize,
    pub(crate) group: usize,
    pub(crate) head_len: usize,
    pub(crate) tokens: usize,
    pub(crate) keys: &'a [&'a [E]],
    pub(crate) values: &'a [&'a [E]],
    pub(crate) page_tokens: usize,
    /// First key seen by all.
    pub(crate) start: usize,
    /// One past the last key that the first token sees; each later token sees one more.
    pub(crate) end: usize,
    pub(crate) scale: f32,
}

impl<E> AttentionTask<'_, E> {
    pub(crate) fn rows(&self) -> usize {
        self.tokens * self.group
    }

    pub(crate) fn query_row(&self, row: usize) -> &[f32] {
        let start = row / self.group * self.query_stride + row % self.group * self.head_len;
        &self.queries[start..start + self.head_len]
    }

    pub(crate) fn query(&self, row: usize) -> *const f32 {
        self.query_row(row).as_ptr()
    }

    pub(crate) fn end(&self, row: usize) -> usize {
        self.end + row / self.group
    }
}

type RmsNorm = unsafe fn(&[f32], Option<&[f32]>, f32, &mut [f32]);

/// The functions of one instruction set. Outside `arch` a table is held by a `Vector` only, which proves
/// that the processor runs it.
///
/// # Safety of the functions
/// The processor has the instruction set; lengths are as the wrappers in `vector` and `attention` assert.
pub(crate) struct VectorTable {
    pub(super) rms_norm: RmsNorm,
    pub(super) rms_norm_heads: unsafe fn(&mut [f32], usize, f32),
    pub(super) rope_interleaved: unsafe fn(&mut [f32], usize, &[f32]),
    pub(super) silu_mul: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) add_assign: unsafe fn(&mut [f32], &[f32]),
    pub(super) scale: unsafe fn(&mut [f32], f32),
    pub(super) softmax: unsafe fn(&mut [f32]),
    pub(super) argmax: unsafe fn(&[f32]) -> usize,
    pub(super) dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub(super) f16_to_f32: unsafe fn(&[u16], &mut [f32]),
    pub(super) f32_to_f16: unsafe fn(&[f32], &mut [u16]),
    pub(super) attend_f32: unsafe fn(&AttentionTask<'_, f32>, &mut [f32]),
    pub(super) attend_f16: unsafe fn(&AttentionTask<'_, u16>, &mut [f32]),
}

pub(crate) static SCALAR: VectorTable = VectorTable {
    rms_norm: vector_scalar::rms_norm,
    rms_norm_heads: vector_scalar::rms_norm_heads,
    rope_interleaved: vector_scalar::rope_interleaved,
    silu_mul: vector_scalar::silu_mul,
    add_assign: vector_scalar::add_assign,
    scale: vector_scalar::scale,
    softmax: vector_scalar::softmax,
    argmax: vector_scalar::argmax,
    dot: vector_scalar::dot,
    f16_to_f32: vector_scalar::f16_to_f32,
    f32_to_f16: vector_scalar::f32_to_f16,
    attend_f32: attention_scalar::attend,
    attend_f16: attention_scalar::attend,
};

/// Safe entries: `wrapper(arguments) -> result` calls the function of the same name.
macro_rules! entries {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl VectorTable {
            $(
                #[inline]
                pub(crate) fn $name(&self, $($argument: $type),*) $(-> $result)? {
                    // SAFETY: whoever holds a `Vector` may call its table.
                    unsafe { (self.$name)($($argument),*) }
                }
            )*
        }
    };
}

entries! {
    rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]);
    rms_norm_heads(x: &mut [f32], head_len: usize, eps: f32);
    rope_interleaved(x: &mut [f32], head_len: usize, cos_sin: &[f32]);
    silu_mul(gate: &[f32], up: &[f32], scale: f32, out: &mut [f32]);
    add_assign(x: &mut [f32], y: &[f32]);
    scale(x: &mut [f32], factor: f32);
    softmax(x: &mut [f32]);
    argmax(x: &[f32]) -> usize;
    dot(a: &[f32], b: &[f32]) -> f32;
    f16_to_f32(x: &[u16], out: &mut [f32]);
    f32_to_f16(x: &[f32], out: &mut [u16]);
    attend_f32(task: &AttentionTask<'_, f32>, out: &mut [f32]);
    attend_f16(task: &AttentionTask<'_, u16>, out: &mut [f32]);
}

/// One table: every operation instantiated for `$lanes` inside functions that enable `$features`.
macro_rules! vector_table {
    ($table:ident, $module:ident, $features:literal, $lanes:ty) => {
        mod $module {
            use $crate::arch::attention_lanes;
            use $crate::arch::vector::AttentionTask;
            use $crate::arch::vector_lanes;

            $crate::arch::vector::instances! { $features, $lanes,
                vector_lanes::rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]);
                vector_lanes::rms_norm_heads(x: &mut [f32], head_len: usize, eps: f32);
                vector_lanes::rope_interleaved(x: &mut [f32], head_len: usize, cos_sin: &[f32]);
                vector_lanes::silu_mul(gate: &[f32], up: &[f32], scale: f32, out: &mut [f32]);
                vector_lanes::add_assign(x: &mut [f32], y: &[f32]);
                vector_lanes::scale(x: &mut [f32], factor: f32);
                vector_lanes::softmax(x: &mut [f32]);
                vector_lanes::argmax(x: &[f32]) -> usize;
                vector_lanes::dot(a: &[f32], b: &[f32]) -> f32;
                vector_lanes::f16_to_f32(x: &[u16], out: &mut [f32]);
                vector_lanes::f32_to_f16(x: &[f32], out: &mut [u16]);
            }

            /// # Safety
            /// The processor has the features; the task was checked.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn attend_f32(task: &AttentionTask<'_, f32>, out: &mut [f32]) {
                // SAFETY: the features are enabled here.
                unsafe { attention_lanes::attend::<$lanes, f32>(task, out) }
            }

            /// # Safety
            /// The processor has the features; the task was checked.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn attend_f16(task: &AttentionTask<'_, u16>, out: &mut [f32]) {
                // SAFETY: the features are enabled here.
                unsafe { attention_lanes::attend::<$lanes, u16>(task, out) }
            }
        }

        pub(crate) static $table: $crate::arch::vector::VectorTable =
            $crate::arch::vector::VectorTable {
                rms_norm: $module::rms_norm,
                rms_norm_heads: $module::rms_norm_heads,
                rope_interleaved: $module::rope_interleaved,
                silu_mul: $module::silu_mul,
                add_assign: $module::add_assign,
                scale: $module::scale,
                softmax: $module::softmax,
                argmax: $module::argmax,
                dot: $module::dot,
                f16_to_f32: $module::f16_to_f32,
                f32_to_f16: $module::f32_to_f16,
                attend_f32: $module::attend_f32,
                attend_f16: $module::attend_f16,
            };
    };
}

macro_rules! instances {
    ($features:literal, $lanes:ty,
     $($from:ident::$name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            /// # Safety
            /// The processor has the features; lengths are as the wrapper asserts.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name($($argument: $type),*) $(-> $result)? {
                // SAFETY: the features are enabled here.
                unsafe { $from::$name::<$lanes>($($argument),*) }
            }
        )*
    };
}

pub(crate) use {instances, vector_table};
