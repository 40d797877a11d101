//! The forward pass against goldens of transformers, against itself in other cuts, and against a plain
//! reference.

mod cache;
mod fixture;
mod goldens;
mod reference;
mod refusals;
mod streaming;

/// What a pass saw on its way, for comparison with goldens.
#[derive(Default)]
pub(super) struct Trace {
    pub(super) enabled: bool,
    /// Name, layer and rows, in the order of the pass.
    pub(super) rows: Vec<(&'static str, Option<usize>, Vec<f32>)>,
    /// Layer, and for each token its expert and score.
    pub(super) experts: Vec<(usize, Vec<(usize, f32)>)>,
}

impl Trace {
    pub(super) fn record(&mut self, name: &'static str, layer: Option<usize>, rows: &[f32]) {
        if self.enabled {
            self.rows.push((name, layer, rows.to_vec()));
        }
    }

    pub(super) fn record_experts(&mut self, layer: usize, chosen: &[(usize, f32)]) {
        if self.enabled {
            self.experts.push((layer, chosen.to_vec()));
        }
    }

    /// All rows recorded under a name and layer.
    fn all(&self, name: &str, layer: Option<usize>) -> Vec<f32> {
        let matching = self.rows.iter().filter(|row| row.0 == name && row.1 == layer);
        matching.flat_map(|row| row.2.iter().copied()).collect()
    }
}
