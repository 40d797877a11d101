//! The plan of a conversion: keys, tensors and their places, before anything is written.

use std::path::{Path, PathBuf};

use super::checkpoint::Checkpoint;
use super::config::{ConfigError, Family, ModelConfig};
use super::error::ConvertError;
use super::input::{GgufInput, Input};
use super::mapping::{self, MappingError, Source};
use super::pieces::Tensor;
use super::recipe::Candidate;
use super::run::Options;
use super::vocabulary::{self, Wanted};
use crate::gguf::{GgufHeader, Mapping};

/// What a conversion will write. Made from headers alone: no weight is read.
#[derive(Clone, Debug)]
pub struct Plan {
    pub architecture: String,
    pub name: String,
    pub recipe: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Tensors of the source that are left out.
    pub skipped: Vec<String>,
    pub notes: Vec<String>,
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<Tensor>,
}

/// A tensor of the plan.
#[derive(Clone, Copy, Debug)]
pub struct Planned<'a> {
    pub name: &'a str,
    pub shape: &'a [u64],
    pub format: scoutd_kernels::Format,
    pub bytes: u64,
}

impl Plan {
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Planned<'_>> {
        self.tensors.iter().map(|tensor| Planned {
            name: &tensor.name,
            shape: &tensor.shape,
            format: tensor.format,
            bytes: tensor.bytes,
        })
    }

    pub fn parameters(&self) -> u64 {
        let weights = self.tensors.iter().filter(|tensor| tensor.name != "rope_freqs.weight");
        weights.map(Tensor::values).sum()
    }
}

/// Opens a source, plans it, and hands both to `then`. A source is a folder with a checkpoint or a
/// GGUF file.
pub fn plan<R>(
    options: &Options,
    then: impl FnOnce(Plan, &dyn Input) -> Result<R, ConvertError>,
) -> Result<R, ConvertError> {
    let source = options.source.as_path();
    let info = std::fs::metadata(source).map_err(ConvertError::io(source))?;
    if info.is_dir() {
        let (plan, checkpoint) = of_checkpoint(source, options)?;
        return then(plan, &checkpoint);
    }
    if source.extension().is_some_and(|extension| extension == "safetensors") {
        return Err(ConvertError::Config {
            path: source.to_path_buf(),
            reason: "give the folder that holds it, with config.json and tokenizer".to_owned(),
        });
    }
    let mapping = Mapping::open(source).map_err(|error| ConvertError::Config {
        path: source.to_path_buf(),
        reason: error.to_string(),
    })?;
    let input = GgufInput::new(source, &mapping)?;
    let plan = of_gguf(&input, source, options)?;
    then(plan, &input)
}

fn of_checkpoint(dir: &Path, options: &Options) -> Result<(Plan, Checkpoint), ConvertError> {
    let path = dir.join("config.json");
    let json = std::fs::read(&path).map_err(ConvertError::io(&path))?;
    let config = ModelConfig::parse(&json).map_err(|error| match error {
        ConfigError::Architecture(found) => ConvertError::Architecture { path, found },
        ConfigError::Other(reason) => ConvertError::Config { path, reason },
    })?;
    let checkpoint = Checkpoint::open(dir)?;
    let names = checkpoint.names();
    let shapes: Vec<(&str, &[u64])> = names
        .iter()
        .filter_map(|name| Some((*name, checkpoint.entry(name)?.shape.as_slice())))
        .collect();
    let layout =
        mapping::lay_out(&config, &shapes).map_err(|MappingError { tensor, reason }| {
            let file = checkpoint.file_of(&tensor).unwrap_or(dir).to_path_buf();
            ConvertError::Tensor { file, tensor, reason }
        })?;
    let wanted =
        Wanted { len: config.vocab_len, bos: config.bos, eos: config.eos, pad: config.pad };
    let language = vocabulary::load(dir, wanted)?;

    let name = options.name.clone().unwrap_or_else(|| folder_name(dir));
    let mut header = GgufHeader::new(options.alignment);
    general_keys(&mut header, config.family.name(), &name, options);
    model_keys(&mut header, &config);
    language.write(&mut header);

    let targets = layout.targets.into_iter();
    let wanted = targets.map(|target| (target.name, target.shape, target.source)).collect();
    let mut plan = assemble(header, wanted, options, config.layers, &checkpoint)?;
    config.family.name().clone_into(&mut plan.architecture);
    plan.name = name;
    if !layout.skipped.is_empty() {
        let count = layout.skipped.len();
        plan.notes.push(format!("vision tensors left out: {count}; the file is text only"));
    }
    if language.chat_template.is_none() {
        plan.notes.push("no chat template: the model will not know how a chat looks".to_owned());
    }
    plan.skipped = layout.skipped;
    Ok((plan, checkpoint))
}

fn of_gguf(input: &GgufInput, path: &Path, options: &Options) -> Result<Plan, ConvertError> {
    let metadata = input.gguf().metadata();
    let wrong = |reason| ConvertError::Config { path: path.to_path_buf(), reason };
    let architecture =
        metadata.str("general.architecture").map_err(|error| wrong(error.to_string()))?;
    if !["llama", "llama4"].contains(&architecture) {
        return Err(wrong(format!("architecture `{architecture}`; known are llama, llama4")));
    }
    let layers = metadata
        .u64(&format!("{architecture}.block_count"))
        .map_err(|error| wrong(error.to_string()))?;
    let own = metadata.str_opt("general.name").map_err(|error| wrong(error.to_string()))?;
    let name = options.name.as_deref().or(own).map_or_else(|| folder_name(path), str::to_owned);
    let mut header = GgufHeader::new(options.alignment);
    general_keys(&mut header, architecture, &name, options);
    for (key, value) in metadata.iter() {
        let rewritten = key == LISTS_TOOLS && options.knows_tools;
        if !rewritten && !OWN_KEYS.contains(&key) {
            header.value(key, value);
        }
    }
    let tensors = input.gguf().tensors();
    let wanted = tensors.iter().map(|tensor| {
        let source = Source::Plain { name: tensor.name.clone() };
        (tensor.name.clone(), tensor.shape.clone(), source)
    });
    let mut plan = assemble(header, wanted.collect(), options, layers, input)?;
    architecture.clone_into(&mut plan.architecture);
    plan.name = name;
    let twice = tensors
        .iter()
        .zip(&plan.tensors)
        .filter(|(from, to)| from.format.block_len() > 1 && from.format != to.format);
    let twice = twice.count();
    if twice > 0 {
        plan.notes.push(format!(
            "tensors rounded a second time, as they were quantized already: {twice}; \
             the original checkpoint gives a better file"
        ));
    }
    Ok(plan)
}

/// Gives every tensor its format and place.
fn assemble(
    mut header: GgufHeader,
    wanted: Vec<(String, Vec<u64>, Source)>,
    options: &Options,
    layers: u64,
    input: &dyn Input,
) -> Result<Plan, ConvertError> {
    let candidates: Vec<Candidate> =
        wanted.iter().map(|(name, shape, _)| Candidate { name, shape }).collect();
    let choices = options.recipe.choose(&candidates, layers).map_err(ConvertError::Recipe)?;
    let mut tensors = Vec::with_capacity(wanted.len());
    for ((name, shape, source), choice) in wanted.into_iter().zip(choices) {
        check_types(&source, input)?;
        header.tensor(&name, choice.format, &shape);
        let row_bytes = choice.format.row_bytes(shape[0] as usize).unwrap_or(0) as u64;
        let bytes = row_bytes * shape[1..].iter().product::<u64>();
        let (format, instead_of) = (choice.format, choice.instead_of);
        tensors.push(Tensor { name, shape, format, instead_of, source, offset: 0, bytes });
    }
    let mut bytes = Vec::new();
    header.start(&mut bytes).map_err(|error| ConvertError::Recipe(error.to_string()))?;
    let mut at = bytes.len() as u64;
    for tensor in &mut tensors {
        tensor.offset = at;
        at = (at + tensor.bytes).next_multiple_of(u64::from(options.alignment));
    }
    let fallbacks = tensors.iter().filter(|tensor| tensor.instead_of.is_some()).count();
    let mut notes = Vec::new();
    if fallbacks > 0 {
        notes.push(format!(
            "tensors of another type, as their rows fill no whole blocks: {fallbacks}"
        ));
    }
    Ok(Plan {
        architecture: String::new(),
        name: String::new(),
        recipe: options.recipe.to_string(),
        bytes: at,
        skipped: Vec::new(),
        notes,
        header: bytes,
        tensors,
    })
}

/// Finds a tensor of a wrong type before anything is written.
fn check_types(source: &Source, input: &dyn Input) -> Result<(), ConvertError> {
    match source {
        Source::Plain { name }
        | Source::Interleaved { name, .. }
        | Source::Experts { name, .. } => input.format(name).map(drop),
        Source::Stack { names } => names.iter().try_for_each(|name| input.format(name).map(drop)),
        Source::Values(_) => Ok(()),
    }
}

fn general_keys(header: &mut GgufHeader, architecture: &str, name: &str, options: &Options) {
    header.str("general.architecture", architecture);
    header.str("general.type", "model");
    header.str("general.name", name);
    header.u32("general.file_type", options.recipe.file_type());
    header.u32("general.quantization_version", 2);
    header.str("scoutd.convert.recipe", &options.recipe.to_string());
    header.str("scoutd.convert.version", env!("CARGO_PKG_VERSION"));
    if options.knows_tools {
        header.bool(LISTS_TOOLS, false);
    }
}

/// Read by `template`: whether tools are listed in the prompt of a template that ignores them.
const LISTS_TOOLS: &str = "scoutd.template.lists_tools";

/// The keys that [`general_keys`] and the header write; not taken over from a source file.
const OWN_KEYS: [&str; 8] = [
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.name",
    "general.quantization_version",
    "general.type",
    "scoutd.convert.recipe",
    "scoutd.convert.version",
];

fn model_keys(header: &mut GgufHeader, config: &ModelConfig) {
    let family = config.family.name();
    let mut size = |key: &str, value: u64| {
        // Sizes are below 2³¹ by `ModelConfig::parse`.
        header.u32(&format!("{family}.{key}"), u32::try_from(value).unwrap_or(u32::MAX));
    };
    size("block_count", config.layers);
    size("context_length", config.context_len);
    size("embedding_length", config.hidden);
    size("feed_forward_length", config.ffn_len);
    size("attention.head_count", config.heads);
    size("attention.head_count_kv", config.kv_heads);
    size("attention.key_length", config.head_len);
    size("attention.value_length", config.head_len);
    size("rope.dimension_count", config.head_len);
    size("vocab_size", config.vocab_len);
    if let Family::Llama4(llama4) = &config.family {
        size("expert_count", llama4.experts);
        size("expert_used_count", 1);
        size("expert_feed_forward_length", llama4.expert_ffn_len);
        size("interleave_moe_layer_step", llama4.moe_step);
        size("attention.sliding_window", llama4.chunk_len);
    }
    header.f32(&format!("{family}.attention.layer_norm_rms_epsilon"), config.norm_eps);
    header.f32(&format!("{family}.rope.freq_base"), config.rope_theta);
    if let Family::Llama4(llama4) = &config.family {
        // Other readers take 8192 and 0.1 as given; ours honours these.
        header.f32("scoutd.attn_floor_scale", llama4.floor_scale);
        header.f32("scoutd.attn_scale", llama4.attn_scale);
    }
}

fn folder_name(path: &Path) -> String {
    let absolute: PathBuf = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    absolute.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
