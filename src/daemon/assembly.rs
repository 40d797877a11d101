//! What answers: the model, its engine, the ledger, and the router over them. Doors stand in front of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use scoutd_kernels::{Isa, Kernels};

use super::fitting::{Fitted, fit_and_reserve, streaming_without_ledger};
use super::{StartError, built_in};
use crate::chat::{Backend, ModelCard, ModelName, Router};
use crate::config::Config;
use crate::engine::{self, EngineParts, Local};
use crate::gguf::{Gguf, Mapping};
use crate::memory::{self, Conditions, Ledger, MemoryProbe, Permit, ProcProbe, Watch, WatchParts};
use crate::metrics::Metrics;
use crate::model::{self, KvType, Model, ModelOptions, Outline, StreamedExperts};
use crate::store::{Fit, header_digest};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::units::Bytes;

/// A model that is ready to run, without an engine around it.
pub struct OpenModel {
    /// The model.
    pub model: Box<dyn Model>,
    /// Name of the instruction set in use.
    pub isa: &'static str,
    /// Threads that compute.
    pub threads: usize,
    mapping: Arc<Mapping>,
}

impl OpenModel {
    /// The chat template of the model, which knows its tokenizer.
    ///
    /// # Errors
    /// If the file has no usable tokenizer or template.
    pub fn template(&self) -> Result<ChatTemplate, StartError> {
        template(&self.mapping)
    }

    /// Routed experts of each layer that has some; 0 if none has.
    ///
    /// # Errors
    /// If the file is no model.
    pub fn experts(&self) -> Result<usize, StartError> {
        let unusable = |message: String| {
            let path = self.mapping.path().to_owned();
            StartError::Model { path, message }
        };
        let gguf =
            Gguf::parse(self.mapping.bytes()).map_err(|error| unusable(error.to_string()))?;
        let outline = Outline::from_gguf(&gguf, KvType::default())
            .map_err(|error| unusable(error.to_string()))?;
        let layers = outline.needs(0, 0).expert_layers;
        Ok(layers.iter().map(|layer| layer.count as usize).max().unwrap_or(0))
    }

    /// One line: what runs, and how.
    pub fn summary(&self) -> String {
        let spec = self.model.spec();
        format!(
            "{} ({}, {}, {}) on {} with {} threads",
            spec.name,
            spec.architecture,
            spec.quantization,
            Bytes(spec.weights_bytes),
            self.isa,
            self.threads
        )
    }
}

/// Everything that answers, and what keeps it honest.
pub struct Assembly {
    /// All models by name.
    pub router: Router,
    /// The engine behind it.
    pub local: Arc<Local>,
    /// Who holds what.
    pub ledger: Arc<Ledger>,
    /// Every published number.
    pub metrics: Arc<Metrics>,
    /// How tight memory is.
    pub conditions: Arc<Conditions>,
    /// What was planned for the model.
    pub fit: Fit,
    summary: String,
    // Kept for as long as the assembly lives.
    _permits: Vec<Permit>,
    _watch: Watch,
}

impl Assembly {
    /// Opens the configured model and starts the engine and the memory watch.
    ///
    /// # Errors
    /// If the model cannot be used or does not fit, or memory cannot be watched.
    pub fn open(config: &Config) -> Result<Assembly, StartError> {
        check_config(config)?;
        let metrics = Arc::new(Metrics::new());
        let mut probe = ProcProbe::new().map_err(StartError::Memory)?;
        let sample = probe.sample().map_err(StartError::Memory)?;
        let ledger = Ledger::new(sample.available);
        for line in memory::missing(Path::new("/")) {
            log::info!(target: "memory", "{line}");
        }
        let conditions = Conditions::new();
        if config.model.force {
            conditions.set_forced();
        }
        let parts = WatchParts {
            ledger: Arc::clone(&ledger),
            metrics: Arc::clone(&metrics),
            conditions: Arc::clone(&conditions),
        };
        let watch =
            Watch::start(Box::new(probe), parts, &config.memory).map_err(StartError::Memory)?;
        let loading = conditions.loading();

        let mapping = map_model(config)?;
        let label = name(config, mapping.path());
        let Fitted { fit, permits, streaming } =
            fit_and_reserve(config, &mapping, &label, &ledger, &sample)?;
        metrics.set_plan(&fit.figures());
        let sequences = EngineParts::slots_needed(&config.engine);
        let opened = open_mapped(config, mapping, sequences, streaming)?;
        // The first promise is that of the weights; what is locked is no longer called available.
        if let Some(weights) = permits.first() {
            weights.set_touched(Bytes(opened.model.locked_bytes()));
        }
        let template = template(&opened.mapping)?;
        let card = card(config, &opened, &template, fit.context_tokens);
        let summary = opened.summary();
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), opened.isa]).set(1.0);
        metrics
            .model_info
            .with_label_values(&[card.name.as_str(), &card.architecture, &card.quantization])
            .set(1.0);
        let local = engine::start(EngineParts {
            model: opened.model,
            template,
            card,
            ledger: Arc::clone(&ledger),
            metrics: Arc::clone(&metrics),
            conditions: Arc::clone(&conditions),
            config: config.engine.clone(),
        })
        .map_err(|error| StartError::System(error.to_string()))?;
        drop(loading);
        let local = Arc::new(local);
        let router = Router::new(vec![Arc::clone(&local) as Arc<dyn Backend>]);
        let (_permits, _watch) = (permits, watch);
        Ok(Assembly { router, local, ledger, metrics, conditions, fit, summary, _permits, _watch })
    }

    /// Lets the router find another backend, after the local model.
    pub fn join(&mut self, backend: Arc<dyn Backend>) {
        let local = Arc::clone(&self.local) as Arc<dyn Backend>;
        self.router = Router::new(vec![local, backend]);
    }

    /// One line: what runs, and how.
    pub fn summary(&self) -> &str {
        &self.summary
    }
}

/// Checks the configuration and the model file without starting anything.
///
/// # Errors
/// As [`Assembly::open`].
pub fn check(config: &Config) -> Result<(), StartError> {
    check_config(config)?;
    let opened = open_mapped(config, map_model(config)?, 1, None)?;
    template(&opened.mapping)?;
    Ok(())
}

/// The tokenizer and the chat template of a model file.
fn template(mapping: &Mapping) -> Result<ChatTemplate, StartError> {
    let unusable = |message: String| StartError::Model { path: mapping.path().to_owned(), message };
    let gguf = Gguf::parse(mapping.bytes()).map_err(|error| unusable(error.to_string()))?;
    let tokenizer =
        Tokenizer::from_gguf(gguf.metadata()).map_err(|error| unusable(error.to_string()))?;
    ChatTemplate::from_gguf(gguf.metadata(), Arc::new(tokenizer))
        .map_err(|error| unusable(error.to_string()))
}

fn check_config(config: &Config) -> Result<(), StartError> {
    let errors = config.check();
    if errors.is_empty() { Ok(()) } else { Err(StartError::Config(errors.join("\n"))) }
}

/// Opens the configured model for `slots` sequences at once; one that would stream in the daemon streams here.
///
/// # Errors
/// If the file is no model that can be run here, or the configured instruction set is missing.
pub fn open_model(config: &Config, slots: u16) -> Result<OpenModel, StartError> {
    let mapping = map_model(config)?;
    let sample = ProcProbe::new().and_then(|mut probe| probe.sample());
    let sample = sample.map_err(StartError::Memory)?;
    let streaming = streaming_without_ledger(config, &mapping, &sample);
    open_mapped(config, mapping, slots, streaming)
}

/// The bytes of the configured model, none of them read yet.
fn map_model(config: &Config) -> Result<Arc<Mapping>, StartError> {
    let mapping = match &config.model.path {
        Some(path) => Mapping::open(path).map_err(|error| StartError::Model {
            path: path.clone(),
            message: error.to_string(),
        })?,
        None => Mapping::built_in(built_in::NAME, built_in::file()),
    };
    Ok(Arc::new(mapping))
}

fn open_mapped(
    config: &Config,
    mapping: Arc<Mapping>,
    slots: u16,
    streaming: Option<StreamedExperts>,
) -> Result<OpenModel, StartError> {
    let kernels = kernels(config)?;
    let threads = threads(config);
    let options = ModelOptions {
        threads,
        isa: Some(kernels.isa()),
        precision: config.model.precision.into(),
        kv_type: KvType::from(config.model.kv),
        slots: usize::from(slots),
        pass_tokens_max: config.engine.prefill_tokens_max,
        streaming,
    };
    let model = model::open(Arc::clone(&mapping), &options).map_err(|error| StartError::Model {
        path: mapping.path().to_owned(),
        message: error.to_string(),
    })?;
    Ok(OpenModel { model, isa: kernels.isa().name(), threads, mapping })
}

fn kernels(config: &Config) -> Result<Kernels, StartError> {
    let Some(name) = &config.model.isa else { return Ok(Kernels::detect()) };
    let unknown = |detail: String| StartError::Config(format!("model.isa: {detail}"));
    let isa: Isa = name.parse().map_err(|error| unknown(format!("{error}")))?;
    let missing = || unknown(format!("this processor has no {}", isa.name()));
    Kernels::with_isa(isa).ok_or_else(missing)
}

/// Threads that compute, where the configuration leaves it to us: all cores where there are few; on four and more, one is left to the doors and to reading.
pub fn threads(config: &Config) -> usize {
    if config.model.threads > 0 {
        return config.model.threads;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores >= 4 { cores - 1 } else { cores }
}

fn card(
    config: &Config,
    opened: &OpenModel,
    template: &ChatTemplate,
    context_tokens: u32,
) -> ModelCard {
    let spec = opened.model.spec();
    let path = opened.mapping.path();
    ModelCard {
        name: ModelName::new(&name(config, path)),
        architecture: spec.architecture.clone(),
        parameters: spec.parameters,
        quantization: spec.quantization.clone(),
        file_bytes: opened.mapping.bytes().len() as u64,
        digest: digest(&opened.mapping),
        modified_unix_s: modified_unix_s(path),
        context_tokens,
        trained_context_tokens: spec.context_len,
        embedding_len: spec.hidden,
        vocabulary_len: spec.vocab_len,
        template: template.source().to_owned(),
    }
}

/// The configured name, else the file's without `.gguf`.
fn name(config: &Config, path: &Path) -> String {
    if let Some(name) = &config.model.name {
        return name.clone();
    }
    let stem = PathBuf::from(path.file_name().unwrap_or(path.as_os_str()));
    let stem =
        if stem.extension().is_some_and(|e| e == "gguf") { stem.with_extension("") } else { stem };
    stem.to_string_lossy().into_owned()
}

/// Names the model; the file was parsed before, so there is one.
fn digest(mapping: &Mapping) -> String {
    let bytes = mapping.bytes();
    Gguf::parse(bytes).map(|gguf| header_digest(&gguf, bytes)).unwrap_or_default()
}

/// When the file was last changed; the built-in model is as old as its build, which nobody knows: 0.
fn modified_unix_s(path: &Path) -> u64 {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_secs())
}
