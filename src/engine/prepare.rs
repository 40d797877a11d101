//! A request's prompt in tokens and its bounds, worked out before the engine thread hears of it.

use jiff::ZonedDateTime;

use super::Config;
use super::admission::output_bound;
use super::grammar::Grammars;
use super::submission::{Continuation, Prepared, Scores};
use crate::chat::{
    ChatError, ChatRequest, ChatRequestParts, Input, Message, Role, Tool, ToolChoice,
};
use crate::template::{ChatTemplate, RenderOptions, TemplateError};
use crate::tokenizer::{Specials, Tokenizer};
use crate::units::TokenId;

/// What preparation needs of a model.
#[derive(Debug)]
pub(super) struct Preparer {
    pub(super) template: ChatTemplate,
    pub(super) grammars: Grammars,
    /// Longest context of one request.
    pub(super) context_tokens: u32,
    /// Tokens the model knows.
    pub(super) vocab_len: u32,
    /// Bytes of the longest of them.
    pub(super) longest_token_bytes: usize,
    pub(super) config: Config,
}

impl Preparer {
    /// Renders, makes tokens, bounds the output.
    ///
    /// # Errors
    /// What is wrong with the request, or too long.
    pub(super) fn prepare(
        &self,
        request: ChatRequest,
        continuation: Option<Continuation>,
    ) -> Result<Prepared, ChatError> {
        let parts = request.into_parts();
        let context =
            parts.context_tokens.map_or(self.context_tokens, |own| own.min(self.context_tokens));
        let (mut prompt, tools) = match &parts.input {
            Input::Messages(messages) => {
                let tools = match parts.tool_choice {
                    ToolChoice::None => &[][..],
                    _ => parts.tools.as_slice(),
                };
                (self.conversation(&parts, messages, tools, context)?, tools.to_vec())
            }
            Input::Text(text) => {
                self.check_length(text.len(), context)?;
                (self.text(text)?, Vec::new())
            }
            Input::Tokens(tokens) => (tokens.clone(), Vec::new()),
        };
        self.check_tokens("prompt", prompt.iter().copied())?;
        self.check_tokens("logit_bias", parts.sampling.logit_bias.iter().map(|(t, _)| *t))?;
        let (scores, asked) = match continuation {
            Some(continuation) => (Some(append(&mut prompt, continuation)), Some(0)),
            None => {
                let echoes = parts.echo && parts.logprobs.is_some();
                let whole = || Scores { from: 0, tail: None, beside: Vec::new() };
                (echoes.then(whole), parts.max_tokens)
            }
        };
        let max_tokens =
            output_bound(prompt.len(), context, asked, self.config.default_max_tokens)?;
        let grammar = match max_tokens {
            0 => None,
            _ => self.grammars.of(&parts, &tools, self.tokenizer())?,
        };
        Ok(Prepared {
            grammar,
            label: parts.id.to_string(),
            client: parts.client,
            priority: parts.priority,
            deadline: parts.deadline,
            prompt,
            max_tokens,
            sampling: parts.sampling,
            stops: parts.stop,
            tools,
            logprobs: parts.logprobs.map(usize::from),
            scores,
        })
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.template.tokenizer()
    }

    fn text(&self, text: &str) -> Result<Vec<TokenId>, ChatError> {
        let tokenizer = self.tokenizer();
        let mut tokens: Vec<TokenId> =
            tokenizer.bos().filter(|_| tokenizer.adds_bos()).into_iter().collect();
        tokenizer
            .encode_into(text, Specials::Text, &mut tokens)
            .map_err(|error| ChatError::invalid("prompt", error.to_string()))?;
        match tokens.is_empty() {
            true => Err(ChatError::invalid("prompt", "prompt must not be empty")),
            false => Ok(tokens),
        }
    }

    /// Refuses what cannot fit however well it compresses, before time goes into making tokens of megabytes.
    fn check_length(&self, bytes: usize, context: u32) -> Result<(), ChatError> {
        let least = bytes / self.longest_token_bytes;
        if least <= context as usize {
            return Ok(());
        }
        Err(ChatError::ContextTooLong { prompt: u32::try_from(least).unwrap_or(u32::MAX), context })
    }

    fn check_tokens(
        &self,
        param: &str,
        mut tokens: impl Iterator<Item = TokenId>,
    ) -> Result<(), ChatError> {
        match tokens.find(|token| token.0 >= self.vocab_len) {
            None => Ok(()),
            Some(token) => {
                let message = format!(
                    "{param}: token {} is not in the vocabulary of {}",
                    token.0, self.vocab_len
                );
                Err(ChatError::invalid(param, message))
            }
        }
    }

    /// The conversation's prompt; with `truncate`, without as many of its oldest turns as it takes to leave
    /// room for the answer.
    fn conversation(
        &self,
        parts: &ChatRequestParts,
        messages: &[Message],
        tools: &[Tool],
        context: u32,
    ) -> Result<Vec<TokenId>, ChatError> {
        let now = ZonedDateTime::now();
        let mut options = RenderOptions::at(now);
        options.variables = parts.template_args.clone();
        let render = |messages: &[Message]| -> Result<Vec<TokenId>, ChatError> {
            self.check_length(messages.iter().map(|message| message.content.len()).sum(), context)?;
            let prompt = self.template.render(messages, tools, &options).map_err(refusal)?;
            let tokens = prompt
                .tokens(self.tokenizer())
                .map_err(|error| ChatError::invalid("messages", error.to_string()))?;
            match tokens.is_empty() {
                true => Err(ChatError::invalid("messages", "messages give an empty prompt")),
                false => Ok(tokens),
            }
        };
        let too_long = |error: &ChatError| matches!(error, ChatError::ContextTooLong { .. });
        let whole = match render(messages) {
            Err(error) if parts.truncate && too_long(&error) => None,
            other => Some(other?),
        };
        let wanted = parts.max_tokens.unwrap_or(self.config.default_max_tokens);
        let room = wanted.min(context / 4).max(1) as usize;
        let fits = |tokens: &[TokenId]| tokens.len() + room <= context as usize;
        if let Some(whole) = whole.filter(|tokens| !parts.truncate || fits(tokens)) {
            return Ok(whole);
        }
        // The fewest turns dropped that make it fit; a shorter conversation is never longer in tokens.
        let turns = turns(messages);
        let (mut too_few, mut enough) = (0, turns.len().saturating_sub(1));
        let mut best = render(&without(messages, &turns, enough))?;
        while enough - too_few > 1 {
            let middle = usize::midpoint(too_few, enough);
            match render(&without(messages, &turns, middle)) {
                Ok(tokens) if fits(&tokens) => (enough, best) = (middle, tokens),
                Err(error) if !too_long(&error) => return Err(error),
                _ => too_few = middle,
            }
        }
        Ok(best)
    }
}

/// Lets `continuation` follow the prompt; its last token is only asked about, so the model need not read it.
fn append(prompt: &mut Vec<TokenId>, continuation: Continuation) -> Scores {
    let Continuation { mut tokens, beside } = continuation;
    let from = prompt.len() - 1;
    let tail = tokens.pop();
    prompt.append(&mut tokens);
    Scores { from, tail, beside }
}

/// Where the turns begin that may be dropped: each from a user's message to the next one's. The last of them
/// is never dropped.
fn turns(messages: &[Message]) -> Vec<usize> {
    let spoken: Vec<usize> =
        (0..messages.len()).filter(|&index| messages[index].role != Role::System).collect();
    let mut turns: Vec<usize> =
        spoken.iter().copied().filter(|&index| messages[index].role == Role::User).collect();
    // An assistant's greeting before the first user is a turn of its own.
    if let Some(first) = spoken.first()
        && turns.first() != Some(first)
    {
        turns.insert(0, *first);
    }
    turns
}

/// The messages without the first `dropped` turns; system messages stay.
fn without(messages: &[Message], turns: &[usize], dropped: usize) -> Vec<Message> {
    let from = turns.get(dropped).copied().unwrap_or(messages.len());
    let kept = |index: usize, message: &Message| index >= from || message.role == Role::System;
    let messages = messages.iter().enumerate().filter(|(index, message)| kept(*index, message));
    messages.map(|(_, message)| message.clone()).collect()
}

/// The client's messages are at fault where the template says so; a broken template is the model's fault, but
/// no other request of this shape would do better.
fn refusal(error: TemplateError) -> ChatError {
    ChatError::invalid("messages", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(roles: &[Role]) -> Vec<Message> {
        roles.iter().enumerate().map(|(i, role)| Message::text(*role, i.to_string())).collect()
    }

    fn kept(roles: &[Role], dropped: usize) -> String {
        let messages = conversation(roles);
        let turns = turns(&messages);
        without(&messages, &turns, dropped).iter().map(|m| m.content.as_str()).collect()
    }

    #[test]
    fn whole_turns_are_dropped_from_the_front() {
        use Role::{Assistant, System, Tool, User};
        let roles = [System, User, Assistant, Tool, Assistant, User, Assistant, User];
        assert_eq!(turns(&conversation(&roles)), [1, 5, 7]);
        assert_eq!(kept(&roles, 0), "01234567");
        assert_eq!(kept(&roles, 1), "0567");
        assert_eq!(kept(&roles, 2), "07");
    }

    #[test]
    fn a_greeting_is_a_turn_of_its_own() {
        use Role::{Assistant, System, User};
        let roles = [Assistant, User, System, Assistant, User];
        assert_eq!(turns(&conversation(&roles)), [0, 1, 4]);
        assert_eq!(kept(&roles, 1), "1234");
        assert_eq!(kept(&roles, 2), "24");
    }
}
