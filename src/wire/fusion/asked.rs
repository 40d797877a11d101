//! The `fusion` object of a request, and OpenRouter's plugin and tool of that name.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::chat::{
    AnswerForm, ChatError, FusionMode, FusionRequest, Include, JudgeMethod, MergeStyle, NoQuorum,
};

/// What a request asks of a fusion.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in crate::wire) struct Asked {
    pub(in crate::wire) options: FusionRequest,
    /// The model that is asked instead of the one named.
    pub(in crate::wire) model: Option<String>,
    /// For every member, instead of the body's own.
    pub(in crate::wire) temperature: Option<f32>,
    /// For every member, instead of the body's own.
    pub(in crate::wire) max_tokens: Option<u32>,
}

/// # Errors
/// `Invalid`, naming the key.
pub(in crate::wire) fn own(value: Value) -> Result<Option<Asked>, ChatError> {
    if value.is_null() {
        return Ok(None);
    }
    let mut fields = Fields::new("fusion", value)?;
    let mut options = FusionRequest::default();
    fields.word("mode", MODES)?.into_iter().for_each(|mode| options.mode = mode);
    fields.word("style", STYLES)?.into_iter().for_each(|style| options.style = style);
    options.rounds = fields.whole("rounds")?.unwrap_or(options.rounds);
    options.members = fields.texts("members", 64)?.unwrap_or_default();
    options.n = fields.whole("n")?;
    options.samples = fields.whole("samples")?.unwrap_or(options.samples);
    options.quorum = fields.whole("quorum")?;
    options.deadline = fields.duration("deadline_ms", 1)?;
    options.grace = fields.duration("grace_ms", 0)?;
    fields.word("on_no_quorum", POLICIES)?.into_iter().for_each(|p| options.on_no_quorum = p);
    if let Some(answer) = fields.object("answer")? {
        options.answer = answer_form(answer)?;
    }
    if let Some(mut judge) = fields.object("judge")? {
        let choice = &mut options.judge;
        choice.model = judge.text("model")?.unwrap_or_else(|| choice.model.clone());
        judge.word("method", METHODS)?.into_iter().for_each(|method| choice.method = method);
        choice.swap = judge.switch("swap")?.unwrap_or(choice.swap);
        judge.end()?;
    }
    fields.word("include", INCLUDES)?.into_iter().for_each(|i| options.include = i);
    options.analysis = fields.switch("analysis")?.unwrap_or(false);
    options.events = fields.switch("events")?.unwrap_or(false);
    options.seed = fields.whole("seed")?;
    fields.end()?;
    Ok(Some(Asked { options, ..Asked::default() }))
}

/// The parameters of OpenRouter's plugin or tool, read under the name `field`.
///
/// # Errors
/// `Invalid`, naming the key.
pub(in crate::wire) fn openrouter(field: &str, parameters: Value) -> Result<Asked, ChatError> {
    let parameters = if parameters.is_null() { Map::new().into() } else { parameters };
    let mut fields = Fields::new(field, parameters)?;
    fields.take("id");
    let mut asked = Asked { model: Some("fusion".to_owned()), ..Asked::default() };
    if let Some(members) = fields.texts("analysis_models", 8)? {
        asked.options.n = u8::try_from(members.len()).ok().filter(|n| *n > 0);
        asked.options.members = members;
    }
    if let Some(judge) = fields.text("model")? {
        asked.options.judge.model = judge;
    }
    if let Some(pool) = fields.text("preset")? {
        asked.model = Some(format!("fusion:{pool}"));
    }
    asked.max_tokens = fields.whole("max_completion_tokens")?;
    if let Some(value) = fields.take("temperature") {
        let number = value.as_f64().ok_or_else(|| fields.wrong("temperature", "a number"))?;
        asked.temperature = Some(number as f32);
    }
    for ignored in ["max_tool_calls", "reasoning", "enabled"] {
        if fields.take(ignored).is_some() {
            asked.options.ignored.push(ignored.to_owned());
        }
    }
    fields.end()?;
    Ok(asked)
}

/// Options of a fusion mean nothing to a single model.
///
/// # Errors
/// `Invalid` for any other model's name.
pub(in crate::wire) fn check_model(name: &str) -> Result<(), ChatError> {
    let stem = name.split(':').next().unwrap_or("");
    if stem.eq_ignore_ascii_case("fusion") || name.eq_ignore_ascii_case("openrouter/fusion") {
        return Ok(());
    }
    let message = "fusion needs model \"fusion\" or \"fusion:<pool>\"";
    Err(ChatError::invalid("fusion", message))
}

fn answer_form(mut answer: Fields) -> Result<AnswerForm, ChatError> {
    let kind = answer.word("type", FORMS)?.unwrap_or("text");
    let choices = answer.texts("choices", FusionRequest::CHOICES_MAX)?;
    let pattern = answer.text("pattern")?;
    let form = match (kind, choices, pattern) {
        ("choice", choices, None) => AnswerForm::Choice(choices.unwrap_or_default()),
        ("regex", None, pattern) => AnswerForm::Regex(pattern.unwrap_or_default()),
        ("json", None, None) => AnswerForm::Json,
        ("number", None, None) => AnswerForm::Number,
        ("text", None, None) => AnswerForm::Text,
        (_, Some(_), _) => return Err(answer.error("choices", "goes with type \"choice\"")),
        (_, _, Some(_)) => return Err(answer.error("pattern", "goes with type \"regex\"")),
        _ => AnswerForm::Text,
    };
    answer.end()?;
    Ok(form)
}

type Words<T> = &'static [(&'static str, T)];

const MODES: Words<FusionMode> = &[
    ("auto", FusionMode::Auto),
    ("best_of", FusionMode::BestOf),
    ("merge", FusionMode::Merge),
    ("debate", FusionMode::Debate),
];
const STYLES: Words<MergeStyle> = &[
    ("auto", MergeStyle::Auto),
    ("extractive", MergeStyle::Extractive),
    ("generative", MergeStyle::Generative),
];
const POLICIES: Words<NoQuorum> = &[
    ("best_available", NoQuorum::BestAvailable),
    ("local", NoQuorum::Local),
    ("error", NoQuorum::Error),
];
const METHODS: Words<JudgeMethod> = &[
    ("auto", JudgeMethod::Auto),
    ("vote", JudgeMethod::Vote),
    ("logprob", JudgeMethod::Logprob),
    ("pairwise", JudgeMethod::Pairwise),
    ("none", JudgeMethod::None),
];
const INCLUDES: Words<Include> = &[
    ("none", Include::None),
    ("summary", Include::Summary),
    ("answers", Include::Answers),
    ("sentences", Include::Sentences),
];
const FORMS: Words<&str> = &[
    ("text", "text"),
    ("choice", "choice"),
    ("number", "number"),
    ("json", "json"),
    ("regex", "regex"),
];

/// An object whose keys are taken out one by one; `null` is absent, and what is left over is refused.
struct Fields {
    path: String,
    fields: Map<String, Value>,
}

impl Fields {
    fn new(path: &str, value: Value) -> Result<Fields, ChatError> {
        match value {
            Value::Object(fields) => Ok(Fields { path: path.to_owned(), fields }),
            _ => Err(ChatError::invalid(path, format!("{path} must be an object"))),
        }
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.fields.remove(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, what: &str) -> ChatError {
        let path = format!("{}.{key}", self.path);
        ChatError::invalid(&path, format!("{path} {what}"))
    }

    fn wrong(&self, key: &str, expected: &str) -> ChatError {
        self.error(key, &format!("must be {expected}"))
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, ChatError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>, ChatError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A whole number; Home Assistant's templates write `3.0` as easily as `3`.
    fn whole<T: TryFrom<u64>>(&mut self, key: &str) -> Result<Option<T>, ChatError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let float = || value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n));
        let whole = value.as_u64().or_else(|| float().map(|n| n as u64));
        let fits = whole.and_then(|whole| T::try_from(whole).ok());
        fits.map(Some).ok_or_else(|| self.wrong(key, "a small whole number"))
    }

    fn duration(&mut self, key: &str, least: u64) -> Result<Option<Duration>, ChatError> {
        const DAY_MS: u64 = 86_400_000;
        match self.whole::<u64>(key)? {
            Some(ms) if (least..=DAY_MS).contains(&ms) => Ok(Some(Duration::from_millis(ms))),
            Some(_) => Err(self.wrong(key, &format!("from {least} to {DAY_MS}"))),
            None => Ok(None),
        }
    }

    fn word<T: Copy>(&mut self, key: &str, words: Words<T>) -> Result<Option<T>, ChatError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let known = value.as_str().and_then(|text| words.iter().find(|(word, _)| *word == text));
        known.map(|(_, meaning)| Some(*meaning)).ok_or_else(|| {
            let all: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            self.wrong(key, &format!("one of {}", all.join(", ")))
        })
    }

    fn texts(&mut self, key: &str, max: usize) -> Result<Option<Vec<String>>, ChatError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let wrong = || self.wrong(key, &format!("a list of at most {max} texts"));
        let Value::Array(items) = value else { return Err(wrong()) };
        if items.len() > max {
            return Err(wrong());
        }
        let texts = items.into_iter().map(|item| match item {
            Value::String(text) => Ok(text),
            _ => Err(wrong()),
        });
        texts.collect::<Result<Vec<String>, ChatError>>().map(Some)
    }

    fn object(&mut self, key: &str) -> Result<Option<Fields>, ChatError> {
        let path = format!("{}.{key}", self.path);
        self.take(key).map(|value| Fields::new(&path, value)).transpose()
    }

    fn end(self) -> Result<(), ChatError> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(key) => {
                let key: String = key.chars().take(64).collect();
                Err(self.error(&key, "is not known"))
            }
        }
    }
}
