//! A request as a door fills it in, and the validated one that backends get.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ChatError, FusionRequest, Message, Tool, ToolChoice};
use crate::units::TokenId;

/// A model's name as clients write it. Names compare without case, and `x` equals `x:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelName(Arc<str>);

impl ModelName {
    /// Wraps `name` as it is.
    pub fn new(name: &str) -> ModelName {
        ModelName(name.into())
    }

    /// The name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a client means this model by `other`.
    pub fn matches(&self, other: &ModelName) -> bool {
        fn stem(name: &str) -> &str {
            match name.rsplit_once(':') {
                Some((stem, tag)) if tag.eq_ignore_ascii_case("latest") => stem,
                _ => name,
            }
        }
        stem(&self.0).eq_ignore_ascii_case(stem(&other.0))
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A request's name in logs and answers: at most 64 of `[A-Za-z0-9._-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// A new random one.
    pub fn random() -> RequestId {
        use std::fmt::Write;
        let bytes: [u8; 12] = rand::random();
        let mut id = String::with_capacity(4 + 2 * bytes.len());
        id.push_str("req-");
        for byte in bytes {
            let _ = write!(id, "{byte:02x}");
        }
        RequestId(id.into())
    }

    /// A client's own, if it is one.
    pub fn parse(text: &str) -> Option<RequestId> {
        let fits = !text.is_empty()
            && text.len() <= 64
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b));
        fits.then(|| RequestId(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a request came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A fusion asks one of its members.
    Fusion {
        /// How many fusions are around this request, itself included: at least 1.
        depth: u8,
    },
    /// The broker; the topic it arrived on.
    Mqtt {
        /// The request topic.
        topic: String,
    },
    /// HTTP; the client's address.
    Rest {
        /// The client's address.
        client: IpAddr,
    },
    /// The command line.
    Terminal,
}

/// Who goes first when slots are scarce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Background work.
    Low,
    /// Ordinary requests.
    #[default]
    Normal,
    /// Somebody is waiting aloud.
    High,
}

/// What the model is to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A conversation, rendered through the model's chat template.
    Messages(Vec<Message>),
    /// Plain text; the model's begin token is added if the model wants one. Control tokens are not parsed.
    Text(String),
    /// Tokens as they are; nothing is added.
    Tokens(Vec<TokenId>),
}

/// The form the answer must have.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum OutputFormat {
    /// Any text.
    #[default]
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON valid for this schema.
    JsonSchema {
        /// The schema, keys in the client's order.
        schema: serde_json::Value,
        /// Refuse the request if the schema says something that cannot be enforced.
        strict: bool,
    },
}

/// How the next token is chosen. The defaults are OpenAI's and switch every filter off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 chooses the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Only the likeliest tokens that together have this probability; 1 is off.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides the logits of tokens already seen; 1 is off.
    pub repeat_penalty: f32,
    /// How many of the last tokens (prompt included) the penalties look at; -1 is the whole context.
    pub repeat_last_n: i32,
    /// Subtracted once from tokens already seen; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence; 0 is off.
    pub frequency_penalty: f32,
    /// `None` draws one.
    pub seed: Option<u64>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

/// A request as a door fills it in: public and unchecked.
#[derive(Clone, Debug)]
pub struct ChatRequestParts {
    /// The client's id or a random one.
    pub id: RequestId,
    /// Where it came in.
    pub origin: Origin,
    /// Who is asking, for fairness among clients: a key's name, an address, an MQTT client id.
    pub client: Arc<str>,
    /// The model; empty is the default one.
    pub model: ModelName,
    /// What to continue.
    pub input: Input,
    /// Functions the model may call.
    pub tools: Vec<Tool>,
    /// Which of them it may or must call.
    pub tool_choice: ToolChoice,
    /// The form the answer must have.
    pub format: OutputFormat,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// `Some(n)`: log-probabilities of each generated token and of the n likeliest ones.
    pub logprobs: Option<u8>,
    /// With `logprobs`: those of the prompt's tokens too. The prompt's text is not repeated in the deltas.
    pub echo: bool,
    /// At most so many tokens; `None` is the configured default. 0 only scores the prompt.
    pub max_tokens: Option<u32>,
    /// The request's own, smaller context (Ollama's `num_ctx`).
    pub context_tokens: Option<u32>,
    /// Drop the oldest turns (never system messages, never the last turn) if the prompt is too long.
    pub truncate: bool,
    /// When the answer must be there; what is ready then is sent.
    pub deadline: Instant,
    /// Who goes first.
    pub priority: Priority,
    /// Extra values for the chat template.
    pub template_args: serde_json::Map<String, serde_json::Value>,
    /// How several models are to answer together, if a fusion is asked.
    pub fusion: Option<Box<FusionRequest>>,
}

impl ChatRequestParts {
    /// A request with nothing said beyond what it is and who asks.
    pub fn new(origin: Origin, client: &str, input: Input, deadline: Instant) -> ChatRequestParts {
        ChatRequestParts {
            id: RequestId::random(),
            origin,
            client: client.into(),
            model: ModelName::new(""),
            input,
            tools: Vec::new(),
            tool_choice: ToolChoice::default(),
            format: OutputFormat::default(),
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            logprobs: None,
            echo: false,
            max_tokens: None,
            context_tokens: None,
            truncate: false,
            deadline,
            priority: Priority::default(),
            template_args: serde_json::Map::new(),
            fusion: None,
        }
    }
}

/// Bounds on what one request may carry.
#[derive(Clone, Copy, Debug)]
pub struct Limits;

impl Limits {
    /// Turns of a conversation.
    pub const MESSAGES_MAX: usize = 4096;
    /// Tools offered.
    pub const TOOLS_MAX: usize = 256;
    /// Stop strings.
    pub const STOPS_MAX: usize = 16;
    /// Biased tokens.
    pub const LOGIT_BIAS_MAX: usize = 1024;
    /// Alternatives per token.
    pub const LOGPROBS_MAX: u8 = 20;
    /// The longest a request may wait and run.
    pub const DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);
}

/// A valid request: holding one proves it.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    parts: ChatRequestParts,
}

impl ChatRequest {
    /// Its id.
    pub fn id(&self) -> &RequestId {
        &self.parts.id
    }

    /// The model it is for.
    pub fn model(&self) -> &ModelName {
        &self.parts.model
    }

    /// Everything else, read only.
    pub fn parts(&self) -> &ChatRequestParts {
        &self.parts
    }

    /// The parts back, to rewrite them; the check starts anew.
    pub fn into_parts(self) -> ChatRequestParts {
        self.parts
    }
}

impl TryFrom<ChatRequestParts> for ChatRequest {
    type Error = ChatError;

    fn try_from(parts: ChatRequestParts) -> Result<ChatRequest, ChatError> {
        check_input(&parts)?;
        check_tools(&parts)?;
        check_sampling(&parts.sampling)?;
        check_output(&parts)?;
        if let Some(fusion) = &parts.fusion {
            fusion.check()?;
        }
        Ok(ChatRequest { parts })
    }
}

fn check_input(parts: &ChatRequestParts) -> Result<(), ChatError> {
    match &parts.input {
        Input::Messages(messages) => {
            at_most("messages", messages.len(), Limits::MESSAGES_MAX)?;
            if messages.is_empty() {
                return Err(ChatError::invalid("messages", "messages must not be empty"));
            }
        }
        Input::Text(text) => {
            if text.is_empty() && !parts.echo {
                return Err(ChatError::invalid("prompt", "prompt must not be empty"));
            }
        }
        Input::Tokens(tokens) => {
            if tokens.is_empty() {
                return Err(ChatError::invalid("prompt", "prompt must not be empty"));
            }
        }
    }
    if parts.max_tokens == Some(0) && matches!(parts.input, Input::Messages(_)) {
        return Err(ChatError::invalid("max_tokens", "max_tokens must be at least 1"));
    }
    if parts.context_tokens == Some(0) {
        return Err(ChatError::invalid("num_ctx", "num_ctx must be at least 1"));
    }
    Ok(())
}

fn check_tools(parts: &ChatRequestParts) -> Result<(), ChatError> {
    at_most("tools", parts.tools.len(), Limits::TOOLS_MAX)?;
    for tool in &parts.tools {
        if tool.name.is_empty() || tool.name.len() > 256 {
            return Err(ChatError::invalid("tools", "a tool's name must have 1 to 256 bytes"));
        }
        if !matches!(tool.parameters, None | Some(serde_json::Value::Object(_))) {
            let message = format!("parameters of tool \"{}\" must be an object", tool.name);
            return Err(ChatError::invalid("tools", message));
        }
    }
    match &parts.tool_choice {
        ToolChoice::Function(name) if !parts.tools.iter().any(|tool| tool.name == *name) => {
            let message = format!("tool_choice names \"{name}\", which is not among the tools");
            Err(ChatError::invalid("tool_choice", message))
        }
        ToolChoice::Required if parts.tools.is_empty() => {
            Err(ChatError::invalid("tool_choice", "tool_choice is required but there are no tools"))
        }
        _ => Ok(()),
    }
}

fn check_sampling(sampling: &SamplingParams) -> Result<(), ChatError> {
    in_range("temperature", sampling.temperature, 0.0, 100.0)?;
    in_range("top_p", sampling.top_p, 0.0, 1.0)?;
    in_range("min_p", sampling.min_p, 0.0, 1.0)?;
    in_range("repeat_penalty", sampling.repeat_penalty, 1e-3, 1e3)?;
    in_range("presence_penalty", sampling.presence_penalty, -100.0, 100.0)?;
    in_range("frequency_penalty", sampling.frequency_penalty, -100.0, 100.0)?;
    if sampling.repeat_last_n < -1 {
        return Err(ChatError::invalid("repeat_last_n", "repeat_last_n must be at least -1"));
    }
    at_most("logit_bias", sampling.logit_bias.len(), Limits::LOGIT_BIAS_MAX)?;
    for &(_, bias) in &sampling.logit_bias {
        in_range("logit_bias", bias, -100.0, 100.0)?;
    }
    Ok(())
}

fn check_output(parts: &ChatRequestParts) -> Result<(), ChatError> {
    at_most("stop", parts.stop.len(), Limits::STOPS_MAX)?;
    if parts.stop.iter().any(|stop| stop.len() > 1024) {
        return Err(ChatError::invalid("stop", "a stop string must have at most 1024 bytes"));
    }
    if let Some(count) = parts.logprobs
        && count > Limits::LOGPROBS_MAX
    {
        let message = format!("top_logprobs must be between 0 and {}", Limits::LOGPROBS_MAX);
        return Err(ChatError::invalid("top_logprobs", message));
    }
    Ok(())
}

fn at_most(param: &str, len: usize, max: usize) -> Result<(), ChatError> {
    if len <= max {
        return Ok(());
    }
    Err(ChatError::invalid(param, format!("{param} has {len} entries, more than {max}")))
}

fn in_range(param: &str, value: f32, min: f32, max: f32) -> Result<(), ChatError> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(ChatError::invalid(param, format!("{param} must be between {min} and {max}, not {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Role;

    fn parts() -> ChatRequestParts {
        let input = Input::Messages(vec![Message::text(Role::User, "hello")]);
        ChatRequestParts::new(Origin::Terminal, "test", input, Instant::now())
    }

    fn refusal(change: impl FnOnce(&mut ChatRequestParts)) -> String {
        let mut parts = parts();
        change(&mut parts);
        ChatRequest::try_from(parts).expect_err("the change makes it invalid").to_string()
    }

    #[test]
    fn a_plain_request_is_valid() {
        assert!(ChatRequest::try_from(parts()).is_ok());
    }

    #[test]
    fn refusals_name_the_field() {
        assert_eq!(
            refusal(|p| p.input = Input::Messages(Vec::new())),
            "messages must not be empty"
        );
        assert_eq!(
            refusal(|p| p.sampling.temperature = f32::NAN),
            "temperature must be between 0 and 100, not NaN"
        );
        assert_eq!(refusal(|p| p.stop = vec!["x".into(); 17]), "stop has 17 entries, more than 16");
        assert_eq!(refusal(|p| p.logprobs = Some(21)), "top_logprobs must be between 0 and 20");
        assert_eq!(
            refusal(|p| p.tool_choice = ToolChoice::Function("f".into())),
            "tool_choice names \"f\", which is not among the tools"
        );
    }

    #[test]
    fn names_match_without_case_and_latest() {
        let name = ModelName::new("Scout-Nano");
        for same in ["scout-nano", "scout-nano:latest", "SCOUT-NANO:LATEST"] {
            assert!(name.matches(&ModelName::new(same)), "{same}");
        }
        for other in ["scout", "scout-nano:q8", ""] {
            assert!(!name.matches(&ModelName::new(other)), "{other}");
        }
    }

    #[test]
    fn request_ids_of_clients_are_bounded() {
        assert!(RequestId::parse("a-1._B").is_some());
        for bad in ["", "a b", "ü", &"x".repeat(65)] {
            assert!(RequestId::parse(bad).is_none(), "{bad}");
        }
        assert!(RequestId::parse(RequestId::random().as_str()).is_some());
    }
}
