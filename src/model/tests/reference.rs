//! The forward pass once more, plainly and in F64, from the tensors of a made-up model: no cache, no
//! batches, no kernels.

use super::fixture::{Parts, all_logits, assert_close, exact, tokens};
use crate::gguf::Gguf;
use crate::model::forward::Transformer;
use crate::model::shape::Shape;

type Rows = Vec<Vec<f64>>;

struct Reference<'a> {
    parts: &'a Parts,
    shape: Shape,
}

impl Reference<'_> {
    fn tensor(&self, name: &str) -> (usize, &[f32]) {
        let (shape, values) = &self.parts.tensors[&format!("{name}.weight")];
        (shape[0] as usize, values)
    }

    /// Rows of `x` by a matrix, or by the one of several.
    fn multiply(&self, name: &str, expert: Option<(usize, usize)>, x: &[f64]) -> Vec<f64> {
        let (cols, values) = self.tensor(name);
        let values = match expert {
            Some((expert, experts)) => {
                let each = values.len() / experts;
                &values[expert * each..(expert + 1) * each]
            }
            None => values,
        };
        let dot = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        values.chunks_exact(cols).map(dot).collect()
    }

    fn norm(&self, name: Option<&str>, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(self.shape.norm_eps)).sqrt();
        let weight = name.map(|name| self.tensor(name).1);
        let scaled = |(i, x): (usize, &f64)| x * factor * weight.map_or(1.0, |w| w[i].into());
        x.iter().enumerate().map(scaled).collect()
    }

    fn gated(&self, names: [String; 3], expert: Option<(usize, usize)>, h: &[f64]) -> Vec<f64> {
        let gate = self.multiply(&names[0], expert, h);
        let up = self.multiply(&names[1], expert, h);
        let product: Vec<f64> =
            gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
        self.multiply(&names[2], expert, &product)
    }

    fn attention(&self, index: usize, x: &Rows) -> Rows {
        let layer = self.shape.layers[index];
        let d = self.shape.head_len;
        let group = self.shape.heads / self.shape.kv_heads;
        let freqs = self.tensor("rope_freqs").1;
        let heads = |part: &str, position: usize, x: &[f64], placed: bool| -> Rows {
            let h = self.norm(Some(&format!("blk.{index}.attn_norm")), x);
            let rows = self.multiply(&format!("blk.{index}.{part}"), None, &h);
            let place = |head: &[f64]| {
                let mut head = head.to_vec();
                for (i, pair) in
                    head.chunks_exact_mut(2).enumerate().filter(|_| placed && layer.rope)
                {
                    let theta = f64::from(self.shape.rope_theta);
                    let frequency = theta.powf(-2.0 * i as f64 / d as f64) / f64::from(freqs[i]);
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    let (a, b) = (pair[0], pair[1]);
                    pair.copy_from_slice(&[a * cos - b * sin, a * sin + b * cos]);
                }
                if placed && layer.qk_norm { self.norm(None, &head) } else { head }
            };
            rows.chunks_exact(d).map(place).collect()
        };
        let keys: Vec<Rows> = rows(x, |p, x| heads("attn_k", p, x, true));
        let values: Vec<Rows> = rows(x, |p, x| heads("attn_v", p, x, false));
        rows(x, |position, x| {
            let queries = heads("attn_q", position, x, true);
            let mut mixed = Vec::new();
            for (head, query) in queries.iter().enumerate() {
                let mut temperature = 1.0;
                if let (true, Some(t)) = (layer.temperature, self.shape.temperature) {
                    let floor = ((position + 1) as f64 / f64::from(t.floor)).floor();
                    temperature += f64::from(t.scale) * floor.ln_1p();
                }
                let chunk = if layer.local { self.shape.chunk } else { None };
                let first = chunk.map_or(0, |chunk| position / chunk * chunk);
                let scores: Vec<f64> = (first..=position)
                    .map(|key| {
                        let key = &keys[key][head / group];
                        let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                        (dot * temperature / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                let value = |i: usize| {
                    let of = |(key, score): (usize, &f64)| {
                        score / sum * values[first + key][head / group][i]
                    };
                    scores.iter().enumerate().map(of).sum::<f64>()
                };
                mixed.extend((0..d).map(value));
            }
            add(x, &self.multiply(&format!("blk.{index}.attn_output"), None, &mixed))
        })
    }

    fn feed_forward(&self, index: usize, x: &[f64]) -> Vec<f64> {
        let h = self.norm(Some(&format!("blk.{index}.ffn_norm")), x);
        let names = |suffix: &str| {
            ["gate", "up", "down"].map(|part| format!("blk.{index}.ffn_{part}{suffix}"))
        };
        if !self.parts.tensors.contains_key(&format!("blk.{index}.ffn_gate_inp.weight")) {
            return add(x, &self.gated(names(""), None, &h));
        }
        let router = self.multiply(&format!("blk.{index}.ffn_gate_inp"), None, &h);
        let largest = router.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let expert = router.iter().position(|&r| r == largest).expect("experts");
        let score = 1.0 / (1.0 + (-largest).exp());
        // Here the score scales the expert's input, as the formula says.
        let scaled: Vec<f64> = h.iter().map(|h| h * score).collect();
        let routed = self.gated(names("_exps"), Some((expert, router.len())), &scaled);
        add(&add(x, &self.gated(names("_shexp"), None, &h)), &routed)
    }

    fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let (hidden, embeddings) = self.tensor("token_embd");
        let embed = |&id: &u32| {
            let row = &embeddings[id as usize * hidden..(id as usize + 1) * hidden];
            row.iter().map(|&value| f64::from(value)).collect()
        };
        let mut x: Rows = ids.iter().map(embed).collect();
        for index in 0..self.shape.layers.len() {
            x = self.attention(index, &x);
            x = rows(&x, |_, x| self.feed_forward(index, x));
        }
        let head = if self.shape.tied { "token_embd" } else { "output" };
        let last = |x: &Vec<f64>| self.multiply(head, None, &self.norm(Some("output_norm"), x));
        x.iter().flat_map(last).map(|logit| logit as f32).collect()
    }
}

fn rows<T>(x: &Rows, each: impl Fn(usize, &[f64]) -> T) -> Vec<T> {
    x.iter().enumerate().map(|(position, x)| each(position, x)).collect()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

#[test]
fn made_up_models_equal_the_plain_form() {
    for architecture in ["llama", "llama4"] {
        let parts = Parts::random(architecture);
        let mapping = parts.mapping();
        let gguf = Gguf::parse(mapping.bytes()).expect("made by our writer");
        let shape = Shape::from_gguf(&gguf).expect("a good model");
        let ids = tokens(3, 21, 96);
        let wanted = Reference { parts: &parts, shape }.logits(&ids);
        let mut model = Transformer::new(mapping, &exact(1)).expect("a good model");
        let largest = wanted.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        assert!(largest > 1.0, "logits that differ: {largest}");
        assert_close(&all_logits(&mut model, &ids), &wanted, 2e-5 * largest.max(1.0), architecture);
    }
}
