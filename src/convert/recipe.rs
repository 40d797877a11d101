//! Which format each tensor gets.

use std::fmt;
use std::str::FromStr;

use scoutd_kernels::Format;

/// What the user asked for: a base, and exceptions by tensor name.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub base: Base,
    /// The last pattern that matches a tensor decides.
    pub overrides: Vec<Override>,
}

/// The rule for tensors without an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Q4_0 for what is large and tolerant; the formats of [`auto_format`] elsewhere.
    Auto,
    /// One format for every matrix.
    Pure(Format),
}

/// `PATTERN=TYPE`; in the pattern `*` stands for any characters, `?` for one.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    pub pattern: String,
    pub format: Format,
}

/// A tensor as a recipe sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub name: &'a str,
    /// Fastest dimension first.
    pub shape: &'a [u64],
}

/// What a recipe gave a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub format: Format,
    /// The format that was wanted but does not fit the row length.
    pub instead_of: Option<Format>,
}

impl Recipe {
    /// One choice for each tensor, in their order.
    ///
    /// Norms, router, biases and rotation factors are always F32: they are small, and every reader
    /// of GGUF expects it. A row that is no whole number of blocks falls back to Q8_0, or to F16.
    ///
    /// # Errors
    /// If an exception matches no tensor, or one that must be F32.
    pub fn choose(&self, tensors: &[Candidate], layers: u64) -> Result<Vec<Choice>, String> {
        let has_output = tensors.iter().any(|tensor| tensor.name == "output.weight");
        let mut used = vec![false; self.overrides.len()];
        let mut choices = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let exception = self.overrides.iter().enumerate().rev().find(|(_, exception)| {
                matches(exception.pattern.as_bytes(), tensor.name.as_bytes())
            });
            let wanted = match (exception, keeps_f32(tensor)) {
                (Some((at, exception)), stays) => {
                    used[at] = true;
                    // A broad pattern such as `blk.0.*` may touch norms; it leaves them alone.
                    if stays && !exception.pattern.contains('*') && exception.format != Format::F32
                    {
                        return Err(format!("`{}` stays F32", tensor.name));
                    }
                    if stays { Format::F32 } else { exception.format }
                }
                (None, true) => Format::F32,
                (None, false) => match self.base {
                    Base::Pure(format) => format,
                    Base::Auto => auto_format(tensor.name, layers, has_output),
                },
            };
            let format = fitting(wanted, tensor.shape[0]);
            choices.push(Choice { format, instead_of: (format != wanted).then_some(wanted) });
        }
        // An exception that a later one always overrules is as useless as one that matches nothing.
        match self.overrides.iter().zip(used).find(|(_, used)| !used) {
            Some((unused, _)) => Err(format!("`{}` decides about no tensor", unused.pattern)),
            None => Ok(choices),
        }
    }

    /// `general.file_type`: a label, the truth is each tensor's type.
    pub fn file_type(&self) -> u32 {
        match self.base {
            Base::Auto | Base::Pure(Format::Q4_0) => 2,
            Base::Pure(Format::F32) => 0,
            Base::Pure(Format::F16) => 1,
            Base::Pure(Format::Q4_1) => 3,
            Base::Pure(Format::Q8_0) => 7,
            Base::Pure(Format::Q4K) => 14,
            Base::Pure(Format::Q5K) => 16,
            Base::Pure(Format::Q6K) => 18,
            Base::Pure(Format::Bf16) => 32,
        }
    }
}

/// Four bits where they cost nothing, more where they are known to hurt first (tool calls break
/// before perplexity shows it):
/// - the output matrix, or the table that serves as one: Q6_K, as in all usual 4-bit files;
/// - `attn_v`: Q6_K. It is small (grouped heads), and its error goes unweighted into every token;
/// - every down projection (dense, shared, routed) of the first eighth of the layers: Q6_K. Early
///   layers rank highest in importance, and their outliers sit in the input of this matrix;
/// - everything else, also a table that is only looked up: Q4_0.
fn auto_format(name: &str, layers: u64, has_output: bool) -> Format {
    let precise = match parts(name) {
        (None, "output") => true,
        (None, "token_embd") => !has_output,
        (Some(_), "attn_v") => true,
        (Some(layer), "ffn_down" | "ffn_down_exps" | "ffn_down_shexp") => {
            layer < layers.div_ceil(8)
        }
        _ => false,
    };
    if precise { Format::Q6K } else { Format::Q4_0 }
}

/// (layer, what) of `blk.LAYER.WHAT.weight`.
fn parts(name: &str) -> (Option<u64>, &str) {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let in_layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    match in_layer.and_then(|(layer, what)| Some((layer.parse().ok()?, what))) {
        Some((layer, what)) => (Some(layer), what),
        None => (None, name),
    }
}

fn keeps_f32(tensor: &Candidate) -> bool {
    tensor.shape.len() < 2 || tensor.name.ends_with(".ffn_gate_inp.weight")
}

/// The wanted format, or the nearest one whose blocks fill a row of `cols` values.
fn fitting(wanted: Format, cols: u64) -> Format {
    [wanted, Format::Q8_0, Format::F16]
        .into_iter()
        .find(|format| cols.is_multiple_of(format.block_len() as u64))
        .unwrap_or(Format::F16)
}

/// Whether `text` matches a pattern with `*` and `?`. Linear but for one remembered star.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                p = at + 1;
                t = from + 1;
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl FromStr for Base {
    type Err = String;

    fn from_str(text: &str) -> Result<Base, String> {
        if text.eq_ignore_ascii_case("auto") {
            return Ok(Base::Auto);
        }
        format_named(text).map(Base::Pure).ok_or_else(|| {
            format!("unknown type `{text}`; known are auto, {}", format_names().join(", "))
        })
    }
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Override, String> {
        let (pattern, format) =
            text.rsplit_once('=').ok_or_else(|| format!("`{text}` is not PATTERN=TYPE"))?;
        let format = format_named(format).ok_or_else(|| {
            format!("unknown type `{format}`; known are {}", format_names().join(", "))
        })?;
        if pattern.is_empty() {
            return Err(format!("`{text}` has no pattern"));
        }
        Ok(Override { pattern: pattern.to_owned(), format })
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.base {
            Base::Auto => f.write_str("auto")?,
            Base::Pure(format) => f.write_str(&format.name().to_lowercase())?,
        }
        for exception in &self.overrides {
            write!(f, " {}={}", exception.pattern, exception.format.name().to_lowercase())?;
        }
        Ok(())
    }
}

fn format_named(text: &str) -> Option<Format> {
    Format::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(text))
}

fn format_names() -> Vec<String> {
    Format::ALL.iter().map(|format| format.name().to_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::config::ModelConfig;
    use super::super::config::tests::SCOUT;
    use super::super::mapping::tests::{borrowed, scout_tensors};
    use super::super::mapping::{Target, lay_out};
    use super::*;

    fn recipe(base: &str, overrides: &[&str]) -> Recipe {
        let overrides = overrides.iter().map(|text| text.parse().unwrap()).collect();
        Recipe { base: base.parse().unwrap(), overrides }
    }

    fn scout() -> Vec<Target> {
        let config = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
        lay_out(&config, &borrowed(&scout_tensors("language_model."))).unwrap().targets
    }

    fn choose(recipe: &Recipe, targets: &[Target], layers: u64) -> Result<Vec<Choice>, String> {
        let candidates: Vec<Candidate> =
            targets.iter().map(|t| Candidate { name: &t.name, shape: &t.shape }).collect();
        recipe.choose(&candidates, layers)
    }

    fn bytes(targets: &[Target], choices: &[Choice]) -> u64 {
        let sizes = targets.iter().zip(choices).map(|(target, choice)| {
            let row = choice.format.row_bytes(target.shape[0] as usize).unwrap() as u64;
            row * target.shape[1..].iter().product::<u64>()
        });
        sizes.sum()
    }

    #[test]
    fn scout_has_the_sizes_of_the_design() {
        let scout = scout();
        let check = |recipe: Recipe, wanted: u64| {
            let choices = choose(&recipe, &scout, 48).unwrap();
            assert_eq!(bytes(&scout, &choices), wanted, "{recipe}");
            assert!(choices.iter().all(|choice| choice.instead_of.is_none()));
        };
        check(recipe("q4_0", &[]), 60_635_771_136);
        check(recipe("q4_k", &[]), 60_635_771_136);
        check(recipe("q8_0", &[]), 114_518_487_296);
        let head = 848_601_600 - 581_898_240;
        check(recipe("q4_0", &["output.weight=q6_k"]), 60_635_771_136 + head);
        // Each Q6_K block of 256 has 66 bytes more than eight of Q4_0.
        let more = |values: u64| values / 256 * 66;
        let values_v = more(48 * 1024 * 5120);
        let downs = more(6 * 17 * 5120 * 8192);
        check(recipe("auto", &[]), 60_635_771_136 + head + values_v + downs);
    }

    #[test]
    fn auto_protects_what_breaks_first() {
        let scout = scout();
        let choices = choose(&recipe("auto", &[]), &scout, 48).unwrap();
        let check = |name: &str, wanted: Format| {
            let at = scout.iter().position(|t| t.name == name).unwrap();
            assert_eq!(choices[at].format, wanted, "{name}");
        };
        check("output.weight", Format::Q6K);
        check("token_embd.weight", Format::Q4_0);
        check("rope_freqs.weight", Format::F32);
        check("blk.40.ffn_gate_inp.weight", Format::F32);
        check("blk.40.attn_norm.weight", Format::F32);
        check("blk.40.attn_v.weight", Format::Q6K);
        check("blk.5.ffn_down_exps.weight", Format::Q6K);
        check("blk.6.ffn_down_exps.weight", Format::Q4_0);
        check("blk.5.ffn_down_shexp.weight", Format::Q6K);
        check("blk.5.ffn_up_exps.weight", Format::Q4_0);
        assert_eq!(auto_format("token_embd.weight", 6, false), Format::Q6K, "tied");
    }

    #[test]
    fn exceptions_win_and_must_match() {
        let scout = scout();
        let chosen = |overrides: &[&str], name: &str| {
            let choices = choose(&recipe("q4_0", overrides), &scout, 48)?;
            Ok::<_, String>(choices[scout.iter().position(|t| t.name == name).unwrap()].format)
        };
        let v = "blk.12.attn_v.weight";
        assert_eq!(chosen(&["blk.*.attn_v.weight=Q8_0"], v), Ok(Format::Q8_0));
        assert_eq!(chosen(&["*=q8_0", "blk.1?.attn_v.*=f16"], v), Ok(Format::F16));
        assert_eq!(chosen(&["blk.12.*=q8_0"], "blk.12.attn_norm.weight"), Ok(Format::F32));
        assert!(chosen(&["blk.48.*=q8_0"], v).unwrap_err().contains("no tensor"));
        assert!(chosen(&["blk.0.ffn_gate_inp.weight=q8_0"], v).unwrap_err().contains("stays F32"));
        assert!("attn_v".parse::<Override>().is_err());
        assert!("attn_v=q3_k".parse::<Override>().unwrap_err().contains("q6_k"));
        assert!("int3".parse::<Base>().unwrap_err().contains("auto"));
        assert_eq!(recipe("Q4_K", &["a*=Q8_0"]).to_string(), "q4_k a*=q8_0");
    }

    #[test]
    fn short_rows_fall_back() {
        let check = |wanted, cols, found| assert_eq!(fitting(wanted, cols), found);
        check(Format::Q4K, 512, Format::Q4K);
        check(Format::Q4K, 576, Format::Q8_0);
        check(Format::Q4_0, 576, Format::Q4_0);
        check(Format::Q4_0, 40, Format::F16);
        check(Format::F32, 40, Format::F32);
    }

    #[test]
    fn patterns() {
        let check = |pattern: &str, text: &str, wanted: bool| {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), wanted, "{pattern} {text}");
        };
        check("a*c", "abbc", true);
        check("a*c", "abcd", false);
        check("*b*", "abc", true);
        check("a?c", "ac", false);
        check("*a*a*a*b", &"a".repeat(200), false);
        check("", "", true);
        check("*", "", true);
    }
}
