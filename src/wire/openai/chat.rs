//! The body of `/v1/chat/completions`, which is also the body of a request over MQTT.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::super::answer::Caller;
use super::super::fusion::Asked;
use super::super::json::parse;
use super::super::lenient::{Float, Int, List, LogitBias, Object, Raw, Texts, ranged};
use super::super::message::check_model_name;
use super::super::{fusion, message, schema};
use super::CHOICES_MAX;
use crate::chat::{
    ChatError, ChatRequestParts, Input, Limits, Message, ModelName, SamplingParams, Tool, ToolCall,
    ToolChoice,
};

/// A chat request as the client wrote it: its types are right, its values unchecked.
#[derive(Debug, Deserialize)]
pub struct ChatBody {
    model: Option<String>,
    messages: Option<List<Object<MessageBody>, { Limits::MESSAGES_MAX }>>,
    tools: Option<List<Object<ToolBody>, { Limits::TOOLS_MAX }>>,
    tool_choice: Option<Raw>,
    response_format: Option<Raw>,
    reasoning_effort: Option<String>,
    chat_template_kwargs: Option<Raw>,
    logprobs: Option<bool>,
    top_logprobs: Option<Int>,
    max_tokens: Option<Int>,
    max_completion_tokens: Option<Int>,
    n: Option<Int>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    stop: Option<Texts<{ Limits::STOPS_MAX }>>,
    temperature: Option<Float>,
    top_p: Option<Float>,
    top_k: Option<Int>,
    min_p: Option<Float>,
    repeat_penalty: Option<Float>,
    repeat_last_n: Option<Int>,
    presence_penalty: Option<Float>,
    frequency_penalty: Option<Float>,
    seed: Option<Int>,
    logit_bias: Option<LogitBias>,
    fusion: Option<Raw>,
    plugins: Option<Raw>,
    /// What those two, or a tool, ask of a fusion.
    #[serde(skip)]
    asked: Option<Asked>,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
struct MessageBody {
    role: Option<String>,
    content: Option<Content>,
    tool_calls: Option<List<Object<CallBody>, { Limits::TOOLS_MAX }>>,
    tool_call_id: Option<String>,
    name: Option<String>,
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
    r#type: Option<String>,
    function: Option<Object<FunctionBody>>,
    parameters: Option<Raw>,
}

#[derive(Debug, Deserialize)]
struct FunctionBody {
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Raw>,
}

/// A message's content: a text, or parts of which only texts are understood.
#[derive(Debug, Default)]
struct Content {
    text: String,
    /// The type of the first part that is not text.
    foreign: Option<String>,
}

#[derive(Deserialize)]
struct Part {
    r#type: Option<String>,
    text: Option<String>,
}

impl ChatBody {
    /// Reads a body.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parse(body: &[u8]) -> Result<ChatBody, ChatError> {
        let Object(mut body) = parse::<Object<ChatBody>>(body)?;
        body.asked = body.fusion_asked()?;
        Ok(body)
    }

    /// Whether the progress of a fusion is to come as named events.
    pub fn events(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.options.events)
    }

    /// What is asked of a fusion, in one of three shapes; two at once contradict each other.
    fn fusion_asked(&mut self) -> Result<Option<Asked>, ChatError> {
        let own = match self.fusion.take() {
            Some(raw) => fusion::own(raw.value("fusion")?)?,
            None => None,
        };
        if own.is_some() {
            fusion::check_model(self.model.as_deref().unwrap_or(""))?;
        }
        let foreign = self.plugin()?.into_iter().chain(self.fusion_tool()?);
        let mut all = own.into_iter().chain(foreign);
        match (all.next(), all.next()) {
            (_, Some(_)) => {
                let message = "fusion, the plugin and the tool of that name exclude each other";
                Err(ChatError::invalid("fusion", message))
            }
            (asked, None) => Ok(asked),
        }
    }

    /// OpenRouter's plugin; others are for services that we are not.
    fn plugin(&mut self) -> Result<Option<Asked>, ChatError> {
        let Some(raw) = self.plugins.take() else { return Ok(None) };
        let Value::Array(plugins) = raw.value("plugins")? else { return Ok(None) };
        let found = plugins.into_iter().enumerate().find(|(_, plugin)| plugin["id"] == "fusion");
        found
            .map(|(index, plugin)| fusion::openrouter(&format!("plugins[{index}]"), plugin))
            .transpose()
    }

    /// OpenRouter's server-side tool, which must stand alone: a panel calls no tools.
    fn fusion_tool(&mut self) -> Result<Option<Asked>, ChatError> {
        let is_fusion =
            |Object(tool): &Object<ToolBody>| tool.r#type.as_deref() == Some("openrouter:fusion");
        let tools = self.tools.as_ref().map_or(&[][..], |List(tools)| tools.as_slice());
        if !tools.iter().any(is_fusion) {
            return Ok(None);
        }
        if tools.len() > 1 {
            let message = "tools: openrouter:fusion must be the only tool";
            return Err(ChatError::invalid("tools", message));
        }
        let field = "tools[0].parameters";
        let mut tools = self.tools.take().map(|List(tools)| tools).unwrap_or_default();
        let parameters = tools.pop().and_then(|Object(tool)| tool.parameters);
        let value = parameters.map_or(Ok(Value::Null), |raw| raw.value(field))?;
        fusion::openrouter(field, value).map(Some)
    }

    /// Whether the answer is to come piece by piece; the default is at once.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the token counts.
    pub fn include_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .and_then(|Object(options)| options.include_usage)
            .unwrap_or(false)
    }

    /// Whether log-probabilities are wanted.
    pub fn logprobs(&self) -> bool {
        self.logprobs.unwrap_or(false)
    }

    /// How many answers are wanted.
    ///
    /// # Errors
    /// `Invalid` outside 1 to [`CHOICES_MAX`].
    pub fn choices(&self) -> Result<usize, ChatError> {
        choices(self.n)
    }

    /// Whether there are no messages at all.
    pub fn has_messages(&self) -> bool {
        self.messages.as_ref().is_some_and(|List(messages)| !messages.is_empty())
    }

    /// Adds a turn of the user: the MQTT door's shorthand `prompt`.
    pub fn push_user(&mut self, text: String) {
        self.messages.get_or_insert_with(|| List(Vec::new())).0.push(Object(MessageBody {
            role: Some("user".to_owned()),
            content: Some(Content { text, foreign: None }),
            ..MessageBody::default()
        }));
    }

    /// The request that `caller` means.
    ///
    /// # Errors
    /// `Invalid` naming the field, or `NotSupported`.
    pub fn into_parts(self, caller: &Caller) -> Result<ChatRequestParts, ChatError> {
        let logprobs = self.logprobs_wanted()?;
        let model = self.model();
        let max_tokens = max_tokens(
            ("max_completion_tokens", self.max_completion_tokens),
            ("max_tokens", self.max_tokens),
        )?;
        let sampling = sampling(Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            logit_bias: self.logit_bias,
        })?;
        let mut parts = caller.parts(Input::Messages(messages(self.messages)?));
        check_model_name(&model)?;
        parts.model = model;
        parts.tools = tools(self.tools)?;
        parts.tool_choice = tool_choice(self.tool_choice)?;
        if let Some(format) = self.response_format {
            parts.format = schema::response_format(format.value("response_format")?)?;
        }
        parts.template_args = template_args(self.chat_template_kwargs, self.reasoning_effort)?;
        parts.stop = stops(self.stop);
        parts.max_tokens = max_tokens;
        parts.logprobs = logprobs;
        parts.sampling = sampling;
        if let Some(asked) = self.asked {
            parts.max_tokens = asked.max_tokens.or(parts.max_tokens);
            parts.sampling.temperature = asked.temperature.unwrap_or(parts.sampling.temperature);
            parts.fusion = Some(Box::new(asked.options));
        }
        Ok(parts)
    }

    /// The model's name, not yet checked.
    pub fn model(&self) -> ModelName {
        let instead = self.asked.as_ref().and_then(|asked| asked.model.as_deref());
        ModelName::new(instead.or(self.model.as_deref()).unwrap_or(""))
    }

    fn logprobs_wanted(&self) -> Result<Option<u8>, ChatError> {
        let out_of_range = || {
            let message = format!("top_logprobs must be between 0 and {}", Limits::LOGPROBS_MAX);
            ChatError::invalid("top_logprobs", message)
        };
        let top: Option<u8> =
            ranged("top_logprobs", self.top_logprobs).map_err(|_| out_of_range())?;
        match (self.logprobs(), top) {
            (false, Some(1..)) => {
                Err(ChatError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"))
            }
            (false, _) => Ok(None),
            (true, Some(top)) if top > Limits::LOGPROBS_MAX => Err(out_of_range()),
            (true, top) => Ok(Some(top.unwrap_or(0))),
        }
    }
}

/// The sampling fields that chat and completions share.
pub(super) struct Sampling {
    pub(super) temperature: Option<Float>,
    pub(super) top_p: Option<Float>,
    pub(super) top_k: Option<Int>,
    pub(super) min_p: Option<Float>,
    pub(super) repeat_penalty: Option<Float>,
    pub(super) repeat_last_n: Option<Int>,
    pub(super) presence_penalty: Option<Float>,
    pub(super) frequency_penalty: Option<Float>,
    pub(super) seed: Option<Int>,
    pub(super) logit_bias: Option<LogitBias>,
}

pub(super) fn sampling(asked: Sampling) -> Result<SamplingParams, ChatError> {
    let plain = SamplingParams::default();
    let or = |value: Option<Float>, default: f32| value.map_or(default, |Float(value)| value);
    Ok(SamplingParams {
        temperature: or(asked.temperature, plain.temperature),
        top_k: ranged("top_k", asked.top_k)?.unwrap_or(plain.top_k),
        top_p: or(asked.top_p, plain.top_p),
        min_p: or(asked.min_p, plain.min_p),
        repeat_penalty: or(asked.repeat_penalty, plain.repeat_penalty),
        repeat_last_n: ranged("repeat_last_n", asked.repeat_last_n)?.unwrap_or(plain.repeat_last_n),
        presence_penalty: or(asked.presence_penalty, plain.presence_penalty),
        frequency_penalty: or(asked.frequency_penalty, plain.frequency_penalty),
        seed: seed("seed", asked.seed)?,
        logit_bias: asked.logit_bias.map(|LogitBias(biases)| biases).unwrap_or_default(),
    })
}

/// -1 is the clients' word for "any".
pub(in crate::wire) fn seed(field: &str, asked: Option<Int>) -> Result<Option<u64>, ChatError> {
    match asked {
        Some(Int(-1)) => Ok(None),
        Some(Int(value)) if (i64::MIN.into()..0).contains(&value) => Ok(Some(value as u64)),
        other => ranged(field, other),
    }
}

/// The first of the two that is given; -1 is llama-server's word for "no limit".
pub(super) fn max_tokens(
    first: (&str, Option<Int>),
    second: (&str, Option<Int>),
) -> Result<Option<u32>, ChatError> {
    let (field, value) = if first.1.is_some() { first } else { second };
    match value {
        Some(Int(-1)) => Ok(None),
        value => ranged(field, value),
    }
}

pub(super) fn choices(n: Option<Int>) -> Result<usize, ChatError> {
    match n {
        None => Ok(1),
        Some(Int(n)) if (1..=CHOICES_MAX as i128).contains(&n) => Ok(n as usize),
        Some(_) => Err(ChatError::invalid("n", format!("n must be between 1 and {CHOICES_MAX}"))),
    }
}

/// Empty stop strings, which some clients send, would end every answer at once: they are dropped.
pub(super) fn stops<const MAX: usize>(stop: Option<Texts<MAX>>) -> Vec<String> {
    let Texts(stops) = stop.unwrap_or(Texts(Vec::new()));
    stops.into_iter().filter(|stop| !stop.is_empty()).collect()
}

fn messages(
    messages: Option<List<Object<MessageBody>, { Limits::MESSAGES_MAX }>>,
) -> Result<Vec<Message>, ChatError> {
    let List(bodies) = messages.unwrap_or(List(Vec::new()));
    let mut messages = Vec::with_capacity(bodies.len());
    for (index, Object(body)) in bodies.into_iter().enumerate() {
        messages.push(message(&format!("messages[{index}]"), body)?);
    }
    message::pair_tool_results(&mut messages);
    Ok(messages)
}

fn message(field: &str, body: MessageBody) -> Result<Message, ChatError> {
    let role = message::role(&format!("{field}.role"), body.role.as_deref())?;
    let content = body.content.unwrap_or_default();
    if let Some(foreign) = content.foreign {
        return Err(ChatError::NotSupported(format!(
            "{field}.content: parts of type \"{foreign}\" are not supported, only text"
        )));
    }
    let List(calls) = body.tool_calls.unwrap_or(List(Vec::new()));
    let mut message = Message::text(role, content.text);
    for (index, Object(call)) in calls.into_iter().enumerate() {
        message.tool_calls.push(tool_call(&format!("{field}.tool_calls[{index}]"), call)?);
    }
    message.tool_call_id = body.tool_call_id.filter(|id| !id.is_empty());
    if role == crate::chat::Role::Tool {
        message.tool_name = body.name.filter(|name| !name.is_empty());
    }
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
                let message = format!("{field}.function is missing: only functions are tools");
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

fn tool_choice(choice: Option<Raw>) -> Result<ToolChoice, ChatError> {
    const FIELD: &str = "tool_choice";
    let Some(choice) = choice else { return Ok(ToolChoice::Auto) };
    let wrong = || {
        let message = "tool_choice must be \"none\", \"auto\", \"required\" or one function";
        ChatError::invalid(FIELD, message)
    };
    match choice.value(FIELD)? {
        Value::String(word) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" | "any" => Ok(ToolChoice::Required),
            _ => Err(wrong()),
        },
        object @ Value::Object(_) => match object["function"]["name"].as_str() {
            Some(name) => Ok(ToolChoice::Function(name.to_owned())),
            None => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

fn template_args(
    kwargs: Option<Raw>,
    reasoning_effort: Option<String>,
) -> Result<Map<String, Value>, ChatError> {
    const FIELD: &str = "chat_template_kwargs";
    let mut args = match kwargs.map(|raw| raw.value(FIELD)).transpose()? {
        None => Map::new(),
        Some(Value::Object(args)) => args,
        Some(_) => return Err(ChatError::invalid(FIELD, format!("{FIELD} must be an object"))),
    };
    if let Some(effort) = reasoning_effort {
        if effort.len() > 16 {
            let message = "reasoning_effort must be a word";
            return Err(ChatError::invalid("reasoning_effort", message));
        }
        args.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(args)
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of parts")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content { text: text.to_owned(), foreign: None })
            }
            fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
                Ok(Content { text, foreign: None })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut content = Content::default();
                while let Some(Object(part)) = parts.next_element::<Object<Part>>()? {
                    content.add(part);
                }
                Ok(content)
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

impl Content {
    fn add(&mut self, part: Part) {
        match part.r#type.as_deref() {
            None | Some("text" | "input_text" | "output_text") => {
                if !self.text.is_empty() {
                    self.text.push('\n');
                }
                self.text.push_str(part.text.as_deref().unwrap_or(""));
            }
            Some(other) => {
                self.foreign.get_or_insert_with(|| other.chars().take(32).collect());
            }
        }
    }
}
