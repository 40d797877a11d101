//! Activations of some tokens in the form that their weights ask for.

use crate::format::ActivationForm;
use crate::table::Kernels;

/// `tokens` rows of `cols` activations, rounded once for all the weights they meet.
///
/// The buffers are kept: filling again with no more tokens and columns allocates nothing.
pub struct Activations {
    form: ActivationForm,
    tokens: usize,
    cols: usize,
    pub(crate) values: Vec<f32>,
    pub(crate) levels: Vec<i8>,
    /// For each block its `d`. Q8_0: as a half holds it. Q8_K: F32.
    pub(crate) scales: Vec<f32>,
    /// Q8_0 only, for each block: the sum of its levels.
    pub(crate) sums: Vec<i32>,
    /// Q8_0 only, for each block: `d` times the sum, as a half holds it (the `s` of Q8_1).
    pub(crate) scaled_sums: Vec<f32>,
    /// Q8_K only, for each 16 values: the sum of their levels.
    pub(crate) group_sums: Vec<i16>,
}

/// Where the blocks of a row of Q8_0 activations go.
pub(crate) struct Q8Row<'a> {
    pub(crate) levels: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) sums: &'a mut [i32],
    pub(crate) scaled_sums: &'a mut [f32],
}

/// Where the blocks of a row of Q8_K activations go.
pub(crate) struct Q8KRow<'a> {
    pub(crate) levels: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) group_sums: &'a mut [i16],
}

impl Activations {
    /// No activations yet: zero tokens.
    pub fn new() -> Activations {
        Activations {
            form: ActivationForm::F32,
            tokens: 0,
            cols: 0,
            values: Vec::new(),
            levels: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
            scaled_sums: Vec::new(),
            group_sums: Vec::new(),
        }
    }

    /// Takes `x`, rows of `cols` values.
    ///
    /// # Panics
    /// If `x` is no whole number of rows, or a row no whole number of blocks of the form.
    pub fn fill(&mut self, kernels: &Kernels, form: ActivationForm, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} values in rows of {cols}", x.len());
        assert!(cols.is_multiple_of(form.block_len()), "rows of {cols} values as {form:?}");
        (self.form, self.tokens, self.cols) = (form, x.len() / cols, cols);
        match form {
            ActivationForm::F32 => {
                self.values.clear();
                self.values.extend_from_slice(x);
            }
            ActivationForm::Q8_0 => {
                let blocks = x.len() / 32;
                self.levels.resize(x.len(), 0);
                self.scales.resize(blocks, 0.0);
                self.sums.resize(blocks, 0);
                self.scaled_sums.resize(blocks, 0.0);
                let row = Q8Row {
                    levels: &mut self.levels,
                    scales: &mut self.scales,
                    sums: &mut self.sums,
                    scaled_sums: &mut self.scaled_sums,
                };
                kernels.quantize_q8_0(x, row);
            }
            ActivationForm::Q8K => {
                self.levels.resize(x.len(), 0);
                self.scales.resize(x.len() / 256, 0.0);
                self.group_sums.resize(x.len() / 16, 0);
                let row = Q8KRow {
                    levels: &mut self.levels,
                    scales: &mut self.scales,
                    group_sums: &mut self.group_sums,
                };
                kernels.quantize_q8_k(x, row);
            }
        }
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn form(&self) -> ActivationForm {
        self.form
    }

    /// F32: the values of a token.
    #[inline(always)]
    pub(crate) fn values_of(&self, token: usize) -> &[f32] {
        &self.values[token * self.cols..][..self.cols]
    }

    /// Q8_0 and Q8_K: the levels of a token.
    #[inline(always)]
    pub(crate) fn levels_of(&self, token: usize) -> &[i8] {
        &self.levels[token * self.cols..][..self.cols]
    }

    /// Q8_0 and Q8_K: the scales of a token's blocks.
    #[inline(always)]
    pub(crate) fn scales_of(&self, token: usize) -> &[f32] {
        let blocks = self.cols / self.form.block_len();
        &self.scales[token * blocks..][..blocks]
    }

    /// Q8_0: the sums of the levels of a token's blocks.
    #[inline(always)]
    pub(crate) fn sums_of(&self, token: usize) -> &[i32] {
        let blocks = self.cols / 32;
        &self.sums[token * blocks..][..blocks]
    }

    /// Q8_0: the scaled sums of a token's blocks.
    #[inline(always)]
    pub(crate) fn scaled_sums_of(&self, token: usize) -> &[f32] {
        let blocks = self.cols / 32;
        &self.scaled_sums[token * blocks..][..blocks]
    }

    /// Q8_K: the sums of each 16 levels of a token.
    #[inline(always)]
    pub(crate) fn group_sums_of(&self, token: usize) -> &[i16] {
        let groups = self.cols / 16;
        &self.group_sums[token * groups..][..groups]
    }
}

impl Default for Activations {
    fn default() -> Activations {
        Activations::new()
    }
}
