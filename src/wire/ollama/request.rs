//! The bodies of `/api/chat` and `/api/generate`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::answer::Caller;
use super::super::json::parse;
use super::super::lenient::{Float, Int, List, Object, Presence, Raw, Texts, ranged};
use super::super::openai::seed;
use super::super::time::KeepAlive;
use super::super::{fusion, message, schema};
use super::context;
use crate::chat::{
    ChatError, ChatRequestParts, FusionRequest, Input, Limits, Message, ModelName, Role,
    SamplingParams, Tool, ToolCall,
};

/// What a request wants done.
#[derive(Debug)]
pub enum Work {
    /// An answer.
    Answer {
        /// The request.
        parts: Box<ChatRequestParts>,
        /// For `/api/generate`: the conversation so far, to be returned as `context` with the answer in it.
        turns: Option<Vec<Message>>,
    },
    /// Nothing but that the model be loaded.
    Load,
    /// Nothing but that the model be unloaded.
    Unload,
}

/// The body of `/api/chat` as the client wrote it.
#[derive(Debug, Deserialize)]
pub struct ChatBody {
    model: Option<String>,
    messages: Option<List<Object<MessageBody>, { Limits::MESSAGES_MAX }>>,
    tools: Option<List<Object<ToolBody>, { Limits::TOOLS_MAX }>>,
    stream: Option<bool>,
    format: Option<Raw>,
    options: Option<Object<Options>>,
    keep_alive: Option<KeepAlive>,
    think: Option<Think>,
    truncate: Option<bool>,
    logprobs: Option<bool>,
    top_logprobs: Option<Int>,
    fusion: Option<Raw>,
}

/// The body of `/api/generate` as the client wrote it.
#[derive(Debug, Deserialize)]
pub struct GenerateBody {
    model: Option<String>,
    prompt: Option<String>,
    suffix: Option<Presence>,
    system: Option<String>,
    template: Option<Presence>,
    images: Option<Presence>,
    context: Option<List<Int, { 1 << 20 }>>,
    raw: Option<bool>,
    stream: Option<bool>,
    format: Option<Raw>,
    options: Option<Object<Options>>,
    keep_alive: Option<KeepAlive>,
    think: Option<Think>,
    truncate: Option<bool>,
    logprobs: Option<bool>,
    top_logprobs: Option<Int>,
    fusion: Option<Raw>,
}

#[derive(Debug, Deserialize)]
struct MessageBody {
    role: Option<String>,
    content: Option<String>,
    images: Option<Presence>,
    tool_calls: Option<List<Object<CallBody>, { Limits::TOOLS_MAX }>>,
    tool_name: Option<String>,
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct CallBody {
    id: Option<String>,
    function: Option<Object<FunctionCall>>,
}

#[derive(Debug, Deserialize)]
struct FunctionCall {
    name: Option<String>,
    arguments: Option<Raw>,
}

#[derive(Debug, Deserialize)]
struct ToolBody {
    function: Option<Object<FunctionBody>>,
}

#[derive(Debug, Deserialize)]
struct FunctionBody {
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Raw>,
}

/// `options`; those that concern Ollama's runner (threads, batch, GPUs) are ignored.
#[derive(Debug, Default, Deserialize)]
struct Options {
    num_ctx: Option<Int>,
    num_predict: Option<Int>,
    temperature: Option<Float>,
    top_k: Option<Int>,
    top_p: Option<Float>,
    min_p: Option<Float>,
    repeat_penalty: Option<Float>,
    repeat_last_n: Option<Int>,
    presence_penalty: Option<Float>,
    frequency_penalty: Option<Float>,
    seed: Option<Int>,
    stop: Option<Texts<{ Limits::STOPS_MAX }>>,
    fusion: Option<Raw>,
}

/// `think`: a switch or a strength. A model that cannot think ignores it.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Raw")]
struct Think(Value);

impl TryFrom<Raw> for Think {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Think, String> {
        let wrong = "must be true, false, \"low\", \"medium\", \"high\" or \"max\"".to_owned();
        match raw.value("think").map_err(|_| wrong.clone())? {
            Value::Null => Ok(Think(Value::Null)),
            Value::Bool(on) => Ok(Think(on.into())),
            Value::String(word) if matches!(word.as_str(), "low" | "medium" | "high" | "max") => {
                Ok(Think(word.into()))
            }
            _ => Err(wrong),
        }
    }
}

impl ChatBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<ChatBody, ChatError> {
        parse(body).map(|Object(body)| body)
    }

    /// Whether the answer is to come piece by piece, which is the default here.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(true)
    }

    /// Whether log-probabilities are wanted.
    pub fn logprobs(&self) -> bool {
        self.logprobs.unwrap_or(false)
    }

    /// The model's name, not yet checked.
    pub fn model(&self) -> ModelName {
        ModelName::new(self.model.as_deref().unwrap_or(""))
    }

    /// What `caller` wants.
    ///
    /// # Errors
    /// `Invalid` naming the field, or `NotSupported`.
    pub fn into_work(self, caller: &Caller) -> Result<Work, ChatError> {
        let List(bodies) = self.messages.unwrap_or(List(Vec::new()));
        let model = message::model(self.model)?;
        if bodies.is_empty() {
            return Ok(load_or_unload(self.keep_alive));
        }
        let mut messages = Vec::with_capacity(bodies.len());
        for (index, Object(body)) in bodies.into_iter().enumerate() {
            messages.push(turn(&format!("messages[{index}]"), body)?);
        }
        message::pair_tool_results(&mut messages);
        let mut parts = caller.parts(Input::Messages(messages));
        parts.model = model;
        parts.tools = tools(self.tools)?;
        let shared = Shared {
            format: self.format,
            options: self.options,
            think: self.think,
            truncate: self.truncate,
            logprobs: self.logprobs,
            top_logprobs: self.top_logprobs,
            fusion: self.fusion,
        };
        shared.fill(&mut parts)?;
        Ok(Work::Answer { parts: Box::new(parts), turns: None })
    }
}

impl GenerateBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<GenerateBody, ChatError> {
        parse(body).map(|Object(body)| body)
    }

    /// Whether the answer is to come piece by piece, which is the default here.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(true)
    }

    /// Whether log-probabilities are wanted.
    pub fn logprobs(&self) -> bool {
        self.logprobs.unwrap_or(false)
    }

    /// The model's name, not yet checked.
    pub fn model(&self) -> ModelName {
        ModelName::new(self.model.as_deref().unwrap_or(""))
    }

    /// What `caller` wants.
    ///
    /// # Errors
    /// `Invalid` naming the field, or `NotSupported`.
    pub fn into_work(self, caller: &Caller) -> Result<Work, ChatError> {
        for (field, given, word) in [
            ("suffix", &self.suffix, "insert"),
            ("template", &self.template, "a template of the request's own"),
            ("images", &self.images, "images"),
        ] {
            if *given == Some(Presence::Something) {
                return Err(not_supported(field, word));
            }
        }
        let model = message::model(self.model)?;
        let prompt = self.prompt.unwrap_or_default();
        if prompt.is_empty() {
            return Ok(load_or_unload(self.keep_alive));
        }
        let system = self.system.filter(|text| !text.is_empty());
        let List(numbers) = self.context.unwrap_or(List(Vec::new()));
        let raw = self.raw.unwrap_or(false);
        if raw && (system.is_some() || !numbers.is_empty()) {
            let message = "raw mode does not support template, system, or context";
            return Err(ChatError::invalid("raw", message));
        }
        let (input, turns) = if raw {
            (Input::Text(prompt), None)
        } else {
            let turns = conversation(&numbers, system, prompt)?;
            (Input::Messages(turns.clone()), Some(turns))
        };
        let mut parts = caller.parts(input);
        parts.model = model;
        let shared = Shared {
            format: self.format,
            options: self.options,
            think: self.think,
            truncate: self.truncate,
            logprobs: self.logprobs,
            top_logprobs: self.top_logprobs,
            fusion: self.fusion,
        };
        shared.fill(&mut parts)?;
        Ok(Work::Answer { parts: Box::new(parts), turns })
    }
}

fn conversation(
    numbers: &[Int],
    system: Option<String>,
    prompt: String,
) -> Result<Vec<Message>, ChatError> {
    let numbers: Vec<u32> =
        numbers.iter().map(|&Int(number)| u32::try_from(number).unwrap_or(u32::MAX)).collect();
    let mut turns = context::unpack(&numbers)?;
    if let Some(system) = system {
        turns.retain(|turn| turn.role != Role::System);
        turns.insert(0, Message::text(Role::System, system));
    }
    turns.push(Message::text(Role::User, prompt));
    Ok(turns)
}

/// What both bodies say alike.
struct Shared {
    format: Option<Raw>,
    options: Option<Object<Options>>,
    think: Option<Think>,
    truncate: Option<bool>,
    logprobs: Option<bool>,
    top_logprobs: Option<Int>,
    fusion: Option<Raw>,
}

impl Shared {
    fn fill(self, parts: &mut ChatRequestParts) -> Result<(), ChatError> {
        if let Some(format) = self.format {
            parts.format = schema::ollama_format(format.value("format")?)?;
        }
        parts.logprobs = logprobs(self.logprobs, self.top_logprobs)?;
        parts.truncate = self.truncate.unwrap_or(true);
        parts.template_args = template_args(self.think);
        let Object(options) = self.options.unwrap_or(Object(Options::default()));
        parts.context_tokens = ranged("options.num_ctx", options.num_ctx)?;
        parts.max_tokens = num_predict(options.num_predict)?;
        parts.sampling = sampling(&options)?;
        if let Some(fusion) = self.fusion.or(options.fusion) {
            parts.fusion = asked(fusion, &parts.model)?;
        }
        let Texts(stops) = options.stop.unwrap_or(Texts(Vec::new()));
        parts.stop = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Ok(())
    }
}

/// What is asked of a fusion; most clients of this API pass unknown keys only within `options`.
fn asked(raw: Raw, model: &ModelName) -> Result<Option<Box<FusionRequest>>, ChatError> {
    let Some(asked) = fusion::own(raw.value("fusion")?)? else { return Ok(None) };
    fusion::check_model(model.as_str())?;
    Ok(Some(Box::new(asked.options)))
}

fn logprobs(wanted: Option<bool>, top: Option<Int>) -> Result<Option<u8>, ChatError> {
    let top = top.unwrap_or(Int(0)).0;
    let Ok(top) = u8::try_from(top)
        .map_err(drop)
        .and_then(|top| if top <= Limits::LOGPROBS_MAX { Ok(top) } else { Err(()) })
    else {
        let message = format!("top_logprobs must be between 0 and {}", Limits::LOGPROBS_MAX);
        return Err(ChatError::invalid("top_logprobs", message));
    };
    Ok(wanted.unwrap_or(false).then_some(top))
}

/// The names under which chat templates look for it (Qwen 3 and its kind; gpt-oss).
fn template_args(think: Option<Think>) -> Map<String, Value> {
    let mut args = Map::new();
    match think {
        None | Some(Think(Value::Null)) => {}
        Some(Think(Value::String(strength))) => {
            args.insert("enable_thinking".to_owned(), true.into());
            args.insert("reasoning_effort".to_owned(), strength.into());
        }
        Some(Think(on)) => {
            args.insert("enable_thinking".to_owned(), on);
        }
    }
    args
}

/// Zero and every negative number mean "no limit" to Ollama; ours is the configured one.
fn num_predict(asked: Option<Int>) -> Result<Option<u32>, ChatError> {
    match asked {
        Some(Int(count)) if count <= 0 && count >= i64::MIN.into() => Ok(None),
        asked => ranged("options.num_predict", asked),
    }
}

fn sampling(options: &Options) -> Result<SamplingParams, ChatError> {
    let or = |value: Option<Float>, default: f32| value.map_or(default, |Float(value)| value);
    Ok(SamplingParams {
        temperature: or(options.temperature, 0.8),
        top_k: ranged("options.top_k", options.top_k)?.unwrap_or(40),
        top_p: or(options.top_p, 0.9),
        min_p: or(options.min_p, 0.0),
        repeat_penalty: or(options.repeat_penalty, 1.0),
        repeat_last_n: ranged("options.repeat_last_n", options.repeat_last_n)?.unwrap_or(64),
        presence_penalty: or(options.presence_penalty, 0.0),
        frequency_penalty: or(options.frequency_penalty, 0.0),
        seed: seed("options.seed", options.seed)?,
        logit_bias: Vec::new(),
    })
}

fn turn(field: &str, body: MessageBody) -> Result<Message, ChatError> {
    if body.images == Some(Presence::Something) {
        return Err(not_supported(&format!("{field}.images"), "images"));
    }
    let role = message::role(&format!("{field}.role"), body.role.as_deref())?;
    let mut message = Message::text(role, body.content.unwrap_or_default());
    let List(calls) = body.tool_calls.unwrap_or(List(Vec::new()));
    for (index, Object(call)) in calls.into_iter().enumerate() {
        message.tool_calls.push(tool_call(&format!("{field}.tool_calls[{index}]"), call)?);
    }
    message.tool_call_id = body.tool_call_id.filter(|id| !id.is_empty());
    message.tool_name = body.tool_name.filter(|name| !name.is_empty());
    Ok(message)
}

fn tool_call(field: &str, body: CallBody) -> Result<ToolCall, ChatError> {
    let Some(Object(FunctionCall { name: Some(name), arguments })) = body.function else {
        let field = format!("{field}.function.name");
        return Err(ChatError::invalid(&field, format!("{field} is missing")));
    };
    let field = format!("{field}.function.arguments");
    let arguments = arguments.map_or(Ok(Value::Null), |raw| raw.value(&field))?;
    let arguments = message::arguments(&field, arguments)?;
    Ok(ToolCall { id: body.id.unwrap_or_default(), name, arguments })
}

fn tools(
    tools: Option<List<Object<ToolBody>, { Limits::TOOLS_MAX }>>,
) -> Result<Vec<Tool>, ChatError> {
    let List(bodies) = tools.unwrap_or(List(Vec::new()));
    bodies
        .into_iter()
        .enumerate()
        .map(|(index, Object(body))| {
            let field = format!("tools[{index}]");
            let Some(Object(function)) = body.function else {
                let message = format!("{field}.function is missing");
                return Err(ChatError::invalid(&field, message));
            };
            let parameters = function
                .parameters
                .map(|raw| raw.value(&format!("{field}.function.parameters")))
                .transpose()?;
            message::tool(&field, function.name, function.description, parameters)
        })
        .collect()
}

fn load_or_unload(keep_alive: Option<KeepAlive>) -> Work {
    match keep_alive {
        Some(KeepAlive::For(Duration::ZERO)) => Work::Unload,
        _ => Work::Load,
    }
}

fn not_supported(field: &str, what: &str) -> ChatError {
    ChatError::NotSupported(format!("{field}: this server does not support {what}"))
}
