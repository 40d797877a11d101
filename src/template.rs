//! Messages and tools to a prompt, and a model's output back to text and tool calls.
//!
//! A model brings its chat format as a Jinja template. It is rendered by a real engine (minijinja) under
//! limits: a template comes out of a downloaded file. What a client wrote is marked before rendering, so
//! that it never becomes a control token, whatever the template does with it (`marker.rs`).
//!
//! Many small models have templates that ignore tools. They are found by trying (`habits.rs`), and then
//! the tools stand as JSON in the system turn, and earlier calls in the assistant's own words.

mod builtin;
mod context;
mod environment;
mod habits;
mod json;
mod marker;
mod output;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use habits::Habits;
use jiff::ZonedDateTime;
use marker::Marker;
pub use output::{OutputParser, Parsed};
use serde_json::{Map, Value};

use crate::chat::{Message, Tool};
use crate::gguf::{GgufError, Metadata};
use crate::tokenizer::{Specials, Tokenizer, TokenizerError};
use crate::units::TokenId;

/// A model's chat format.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    environment: minijinja::Environment<'static>,
    tokenizer: Arc<Tokenizer>,
    habits: Habits,
}

/// What is the same for all messages of a prompt.
#[derive(Clone, Debug)]
pub struct RenderOptions {
    /// Whether the prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// The time for templates that tell the model the date.
    pub now: ZonedDateTime,
    /// Further variables of the template, as `enable_thinking`. They cannot replace the standard ones.
    pub variables: Map<String, Value>,
}

impl RenderOptions {
    /// A prompt for the assistant to answer, at this time.
    pub fn at(now: ZonedDateTime) -> RenderOptions {
        RenderOptions { add_generation_prompt: true, now, variables: Map::new() }
    }
}

/// A template that cannot be used, or a conversation that it cannot express.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A key that is of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The template refuses these messages by `raise_exception`.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// The template failed.
    #[error("the chat template failed: {0}")]
    Render(String),
    /// The template used up its share of time or memory.
    #[error("the chat template takes too much time or memory")]
    TooCostly,
    /// The source is no template.
    #[error("the chat template cannot be parsed: {0}")]
    Syntax(String),
    /// The texts hold all noncharacters there are, so none can mark them.
    #[error("the messages hold every Unicode noncharacter of U+FDD0..=U+FDEF")]
    Unmarkable,
}

impl ChatTemplate {
    /// The template of a GGUF, or a built-in one that goes with its vocabulary if it has none.
    ///
    /// The private key `scoutd.template.lists_tools` = false says that the model knows its tools from
    /// training: then they are not listed in the prompt of a template that ignores them.
    ///
    /// # Errors
    ///
    /// A template that cannot be parsed, or a key of the wrong type.
    pub fn from_gguf(
        metadata: &Metadata<'_>,
        tokenizer: Arc<Tokenizer>,
    ) -> Result<ChatTemplate, TemplateError> {
        let source =
            metadata.str_opt("tokenizer.chat_template")?.filter(|source| !source.is_empty());
        let source = source.unwrap_or_else(|| builtin::for_vocabulary(&tokenizer));
        let mut template = ChatTemplate::new(source, tokenizer)?;
        if metadata.bool_opt("scoutd.template.lists_tools")? == Some(false) {
            template.habits.lists_tools = true;
        }
        Ok(template)
    }

    /// A template from its source.
    ///
    /// # Errors
    ///
    /// A source that cannot be parsed.
    pub fn new(source: &str, tokenizer: Arc<Tokenizer>) -> Result<ChatTemplate, TemplateError> {
        let environment = environment::new(source)?;
        let mut template = ChatTemplate {
            source: source.to_owned(),
            environment,
            tokenizer,
            habits: Habits::default(),
        };
        template.habits = habits::find(&template);
        Ok(template)
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for these messages and tools.
    ///
    /// # Errors
    ///
    /// What the template refuses or fails at, and costs beyond the limits.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Tool],
        options: &RenderOptions,
    ) -> Result<Prompt, TemplateError> {
        let (messages, tools) = self.habits.adapt(messages, tools);
        let mut messages = context::messages(&messages);
        let mut tools = context::tools(&tools);
        let mut variables = Value::Object(options.variables.clone());
        let marker = Marker::new(&self.source, [&messages, &tools, &variables])?;
        for part in [&mut messages, &mut tools, &mut variables] {
            marker.mark(&self.tokenizer, part);
        }
        let context = context::all(&self.tokenizer, messages, tools, variables, options);
        let marked = environment::render(&self.environment, context, &options.now)?;
        Ok(Prompt { marked, marker })
    }

    /// The tokenizer of the model.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// A rendered prompt that still knows which of its text came from a client.
#[derive(Clone, Debug)]
pub struct Prompt {
    marked: String,
    marker: Marker,
}

impl Prompt {
    /// The prompt as text.
    pub fn text(&self) -> String {
        self.marker.strip(&self.marked)
    }

    /// The prompt as tokens: the template's markup becomes control tokens, the clients' text never does.
    /// It begins with `bos` exactly once if the model wants one, whether or not the template writes it.
    ///
    /// # Errors
    ///
    /// As `Tokenizer::encode`.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(markup) = tokenizer.find_control(&self.marked, at) {
            self.encode_text(tokenizer, &self.marked[at..markup.start], &mut tokens)?;
            tokens.extend(tokenizer.control(&self.marked[markup.clone()]));
            at = markup.end;
        }
        self.encode_text(tokenizer, &self.marked[at..], &mut tokens)?;
        if let Some(bos) = tokenizer.bos() {
            let leading = tokens.iter().take_while(|token| **token == bos).count();
            if leading == 0 && tokenizer.adds_bos() {
                tokens.insert(0, bos);
            } else if leading > 1 {
                tokens.drain(1..leading);
            }
        }
        Ok(tokens)
    }

    fn encode_text(
        &self,
        tokenizer: &Tokenizer,
        marked: &str,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        tokenizer.encode_into(&self.marker.strip(marked), Specials::Text, tokens)
    }
}
