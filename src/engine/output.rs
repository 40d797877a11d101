//! From tokens to events: whole characters, tool calls, stop strings, and log-probabilities beside the text
//! they belong to.

use std::collections::VecDeque;

use super::stop::StopStrings;
use crate::chat::{ChatError, ChatEvent, TokenLogprob, Tool, ToolCall};
use crate::template::{OutputParser, Parsed};
use crate::tokenizer::{Decoder, Tokenizer};
use crate::units::TokenId;

/// The text of one answer as it grows.
#[derive(Debug)]
pub(super) struct Output {
    decoder: Decoder,
    /// Looks for calls where tools were offered.
    parser: Option<OutputParser>,
    stops: StopStrings,
    stopped: bool,
    /// Text that may go out with the next event.
    ready: String,
    /// Bytes of text decoded and given out so far. With a parser they say nothing: it changes the text.
    decoded: usize,
    given: usize,
    /// Tokens whose text has not gone out.
    tokens: VecDeque<PendingToken>,
    calls: usize,
}

#[derive(Debug)]
struct PendingToken {
    logprob: TokenLogprob,
    /// Where its text begins, in bytes of all text.
    start: usize,
    /// Where it ends; `None` while it is part of a character that is not complete.
    end: Option<usize>,
}

type Events = VecDeque<Result<ChatEvent, ChatError>>;

impl Output {
    /// Without `tools` the text is plain: nothing in it is taken for a call. Calls get ids that begin with
    /// `call_prefix`.
    pub(super) fn new(tools: &[Tool], stops: &[String], call_prefix: &str) -> Output {
        Output {
            decoder: Decoder::new(),
            parser: (!tools.is_empty())
                .then(|| OutputParser::new(tools).with_id_prefix(call_prefix)),
            stops: StopStrings::new(stops),
            stopped: false,
            ready: String::new(),
            decoded: 0,
            given: 0,
            tokens: VecDeque::new(),
            calls: 0,
        }
    }

    /// Tool calls so far.
    pub(super) fn calls(&self) -> usize {
        self.calls
    }

    /// Takes in a token; returns whether a stop string ends the answer here.
    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: TokenId,
        logprob: Option<TokenLogprob>,
        events: &mut Events,
    ) -> bool {
        let start = self.decoded;
        let mut text = String::new();
        self.decoder.push(tokenizer, token, &mut text);
        self.decoded += text.len();
        if !text.is_empty() {
            for pending in self.tokens.iter_mut().filter(|pending| pending.end.is_none()) {
                pending.end = Some(self.decoded);
            }
        }
        if let Some(logprob) = logprob {
            let end = (!self.decoder.is_holding()).then_some(self.decoded);
            self.tokens.push_back(PendingToken { logprob, start, end });
        }
        match &mut self.parser {
            None => self.take_text(&text),
            Some(parser) => {
                let mut parsed = if text.is_empty() { Vec::new() } else { parser.push(&text) };
                if tokenizer.is_control(token) {
                    parsed.extend(parser.push_control(&tokenizer.text_of(token)));
                }
                self.take_parsed(parsed, events);
            }
        }
        self.emit(events);
        self.stopped
    }

    /// Adds a token that ends the answer and has no text, where it is wanted among the log-probabilities.
    pub(super) fn push_end(&mut self, logprob: TokenLogprob) {
        let end = Some(self.decoded);
        self.tokens.push_back(PendingToken { logprob, start: self.decoded, end });
    }

    /// The answer ends: whatever was held back goes out.
    pub(super) fn finish(&mut self, events: &mut Events) {
        if !self.stopped {
            let mut text = String::new();
            self.decoder.finish(&mut text);
            self.decoded += text.len();
            match &mut self.parser {
                None => self.take_text(&text),
                Some(parser) => {
                    let mut parsed = if text.is_empty() { Vec::new() } else { parser.push(&text) };
                    parsed.extend(parser.finish());
                    self.take_parsed(parsed, events);
                }
            }
            self.stops.finish(&mut self.ready);
        }
        for pending in &mut self.tokens {
            pending.end = Some(0);
        }
        self.emit(events);
    }

    fn take_parsed(&mut self, parsed: Vec<Parsed>, events: &mut Events) {
        for part in parsed {
            match part {
                Parsed::Text(text) => self.take_text(&text),
                Parsed::Call(call) => self.take_call(call, events),
            }
        }
    }

    fn take_text(&mut self, text: &str) {
        if self.stopped || !self.stops.push(text, &mut self.ready) {
            return;
        }
        self.stopped = true;
        if self.parser.is_none() {
            // The stop string and what follows are no part of the answer, and neither are their tokens.
            let cut = self.given + self.ready.len();
            self.tokens.retain(|pending| pending.start < cut);
        }
    }

    fn take_call(&mut self, call: ToolCall, events: &mut Events) {
        if self.stopped {
            return;
        }
        // What was held back stands before the call, so it was no beginning of a stop string.
        self.stops.finish(&mut self.ready);
        self.emit(events);
        self.calls += 1;
        events.push_back(Ok(ChatEvent::ToolCall(call)));
    }

    /// Gives out the text that is ready with the tokens it came from.
    fn emit(&mut self, events: &mut Events) {
        self.given += self.ready.len();
        let whole = self.parser.is_some() || self.stopped;
        let mut logprobs = Vec::new();
        while let Some(pending) = self.tokens.front() {
            let out = pending.end.is_some_and(|end| whole || end <= self.given);
            if !out {
                break;
            }
            logprobs.extend(self.tokens.pop_front().map(|pending| pending.logprob));
        }
        if !self.ready.is_empty() || !logprobs.is_empty() {
            let text = std::mem::take(&mut self.ready);
            events.push_back(Ok(ChatEvent::Delta { text, logprobs }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::byte_tokenizer;

    fn logprob(token: TokenId) -> TokenLogprob {
        TokenLogprob { token, bytes: Vec::new(), logprob: Some(0.0), top: Vec::new() }
    }

    /// The deltas of an answer of these bytes, each as text and the tokens beside it.
    fn deltas(stops: &[&str], bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let tokenizer = byte_tokenizer();
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut output = Output::new(&[], &stops, "");
        let mut events = Events::new();
        for &byte in bytes {
            let token = TokenId(u32::from(byte));
            if output.push(&tokenizer, token, Some(logprob(token)), &mut events) {
                break;
            }
        }
        output.finish(&mut events);
        events
            .into_iter()
            .map(|event| match event {
                Ok(ChatEvent::Delta { text, logprobs }) => {
                    (text, logprobs.iter().map(|entry| entry.token.0 as u8).collect())
                }
                other => panic!("only text was expected, not {other:?}"),
            })
            .collect()
    }

    fn delta(text: &str, tokens: &[u8]) -> (String, Vec<u8>) {
        (text.to_owned(), tokens.to_vec())
    }

    #[test]
    fn tokens_go_out_with_their_text() {
        assert_eq!(deltas(&[], b"ab"), [delta("a", b"a"), delta("b", b"b")]);
        let euro = "a\u{20AC}b".as_bytes();
        let expected = [delta("a", b"a"), delta("\u{20AC}", &euro[1..4]), delta("b", b"b")];
        assert_eq!(deltas(&[], euro), expected);
    }

    #[test]
    fn tokens_of_a_stop_string_do_not_go_out() {
        assert_eq!(deltas(&["END"], b"aENDb"), [delta("a", b"a")]);
        assert_eq!(deltas(&["END"], b"aENx"), [delta("a", b"a"), delta("ENx", b"ENx")]);
        assert_eq!(deltas(&["END"], b"EN"), [delta("EN", b"EN")]);
    }

    #[test]
    fn half_a_character_at_the_end_is_replaced() {
        assert_eq!(deltas(&[], &[b'a', 0xE2]), [delta("a", b"a"), delta("\u{FFFD}", &[0xE2])]);
    }

    #[test]
    fn the_end_token_goes_out_last() {
        let tokenizer = byte_tokenizer();
        let mut output = Output::new(&[], &[], "");
        let mut events = Events::new();
        output.push(&tokenizer, TokenId(97), Some(logprob(TokenId(97))), &mut events);
        output.push_end(logprob(TokenId(256)));
        output.finish(&mut events);
        let last = ChatEvent::Delta { text: String::new(), logprobs: vec![logprob(TokenId(256))] };
        assert_eq!(events.pop_back(), Some(Ok(last)));
    }
}
