//! The engine as a whole, with a scripted model: whoever waits here waits for events or counters.

mod pressure;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::prefix::kv_bytes;
use super::testing::{END, ScriptedModel, Stage, babbles, byte_tokenizer, says};
use super::{Config, EngineParts, Local, start};
use crate::chat::{
    Backend, ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatStream, FinishReason, Input,
    Message, ModelCard, ModelName, Origin, OutputFormat, Reply, Role, ScoreReply, ScoreRequest,
    Tool, ToolChoice,
};
use crate::memory::{Conditions, Ledger, Purpose};
use crate::metrics::Metrics;
use crate::template::ChatTemplate;
use crate::units::{Bytes, TokenId};

/// Contents one after the other, then the token where a scripted answer begins.
const TEMPLATE: &str =
    "{% for message in messages %}{{ message.content }}{% endfor %}<|begin_of_text|>";

/// Long enough for any test machine; only failing tests wait for it.
const LONG: Duration = Duration::from_secs(120);

/// An engine and the handles a test needs.
struct Bench {
    local: Local,
    stage: Stage,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    conditions: Arc<Conditions>,
}

impl Bench {
    fn new(config: Config, rule: impl Fn(&[TokenId], &mut [f32]) + Send + 'static) -> Bench {
        Bench::build(config, Bytes(1 << 30), 256, rule)
    }

    fn build(
        config: Config,
        budget: Bytes,
        context_tokens: u32,
        rule: impl Fn(&[TokenId], &mut [f32]) + Send + 'static,
    ) -> Bench {
        let stage = Stage::default();
        let ledger = Ledger::new(budget);
        let metrics = Arc::new(Metrics::new());
        let conditions = Conditions::new();
        let tokenizer = Arc::new(byte_tokenizer());
        let template = ChatTemplate::new(TEMPLATE, tokenizer).expect("the template is valid");
        let model = Box::new(ScriptedModel::new(&stage, rule));
        let parts = EngineParts {
            model,
            template,
            card: ModelCard { context_tokens, ..card() },
            ledger: Arc::clone(&ledger),
            metrics: Arc::clone(&metrics),
            conditions: Arc::clone(&conditions),
            config,
        };
        let local = start(parts).expect("the configuration is valid");
        Bench { local, stage, ledger, metrics, conditions }
    }

    fn chat(&self, parts: ChatRequestParts) -> ChatStream {
        self.local.chat(ChatRequest::try_from(parts).expect("the test's request is valid"))
    }

    fn reply(&self, parts: ChatRequestParts) -> Result<Reply, ChatError> {
        collect(self.chat(parts))
    }

    fn text(&self, parts: ChatRequestParts) -> String {
        self.reply(parts).expect("the request is answered").text
    }

    fn refusal(&self, parts: ChatRequestParts) -> ChatError {
        self.reply(parts).expect_err("the request is refused")
    }
}

fn card() -> ModelCard {
    ModelCard {
        name: ModelName::new("scripted"),
        architecture: "scripted".to_owned(),
        parameters: 0,
        quantization: "F32".to_owned(),
        file_bytes: 0,
        digest: "0".repeat(64),
        modified_unix_s: 0,
        context_tokens: 256,
        trained_context_tokens: 256,
        embedding_len: 8,
        vocabulary_len: 259,
        template: TEMPLATE.to_owned(),
    }
}

fn collect(mut stream: ChatStream) -> Result<Reply, ChatError> {
    let mut reply = Reply {
        text: String::new(),
        tool_calls: Vec::new(),
        prompt: Vec::new(),
        logprobs: Vec::new(),
        completion: crate::chat::Completion {
            finish: FinishReason::Length,
            usage: crate::chat::Usage::default(),
            timings: crate::chat::Timings::default(),
            fusion: None,
        },
    };
    while let Some(item) = stream.blocking_next() {
        match item? {
            ChatEvent::Accepted { .. } | ChatEvent::Progress(_) => {}
            ChatEvent::Prompt(tokens) => reply.prompt = tokens,
            ChatEvent::Delta { text, mut logprobs } => {
                reply.text.push_str(&text);
                reply.logprobs.append(&mut logprobs);
            }
            ChatEvent::ToolCall(call) => reply.tool_calls.push(call),
            ChatEvent::Done(completion) => {
                reply.completion = completion;
                assert_eq!(stream.blocking_next(), None, "nothing comes after the end");
                return Ok(reply);
            }
        }
    }
    panic!("the answer broke off without an end");
}

/// Reads on until some text has come.
fn wait_for_text(stream: &mut ChatStream) -> String {
    loop {
        match stream.blocking_next() {
            Some(Ok(ChatEvent::Delta { text, .. })) => return text,
            Some(Ok(ChatEvent::Accepted { .. })) => {}
            other => panic!("text was expected, not {other:?}"),
        }
    }
}

fn request(input: Input) -> ChatRequestParts {
    let deadline = Instant::now() + LONG;
    let mut parts = ChatRequestParts::new(Origin::Terminal, "client", input, deadline);
    parts.sampling.temperature = 0.0;
    parts
}

/// A prompt of these bytes and the token where a scripted answer begins.
fn prompt(text: &str) -> ChatRequestParts {
    let bytes = text.bytes().map(|byte| TokenId(byte.into()));
    request(Input::Tokens(bytes.chain([TokenId(257)]).collect()))
}

fn messages(contents: &[(Role, &str)]) -> ChatRequestParts {
    let messages = contents.iter().map(|(role, text)| Message::text(*role, *text)).collect();
    request(Input::Messages(messages))
}

fn small() -> Config {
    Config { slots: 2, resting_slots: 2, waiting_max: 4, ..Config::default() }
}

#[test]
fn an_answer_ends_with_the_end_token() {
    let bench = Bench::new(small(), says("h\u{E9}llo"));
    let reply = bench.reply(messages(&[(Role::User, "hi")])).expect("it is answered");
    assert_eq!(reply.text, "h\u{E9}llo");
    let completion = reply.completion;
    assert_eq!(completion.finish, FinishReason::Stop);
    assert_eq!((completion.usage.prompt_tokens, completion.usage.completion_tokens), (3, 7));
    let done = bench.metrics.requests.with_label_values(&["terminal", "stop"]).get();
    assert_eq!((done, bench.metrics.generated_tokens.get()), (1, 7));
}

#[test]
fn max_tokens_and_context_bound_the_answer() {
    let bench = Bench::new(Config { default_max_tokens: 3, ..small() }, says("abcdefghij"));
    let mut parts = prompt("x");
    assert_eq!(bench.text(parts.clone()), "abc");
    parts.max_tokens = Some(5);
    let reply = bench.reply(parts.clone()).expect("it is answered");
    assert_eq!((reply.text.as_str(), reply.completion.finish), ("abcde", FinishReason::Length));
    parts.context_tokens = Some(4);
    assert_eq!(bench.text(parts.clone()), "ab");
    parts.context_tokens = Some(2);
    assert_eq!(bench.refusal(parts), ChatError::ContextTooLong { prompt: 2, context: 2 });
}

#[test]
fn text_is_the_same_alone_and_beside_others() {
    let alone = Bench::new(Config { resting_slots: 0, ..small() }, babbles);
    let together = Bench::new(Config { slots: 3, prefill_tokens_max: 7, ..small() }, babbles);
    let parts = |index: usize| {
        let mut parts = prompt(&"the same beginning ".repeat(2 + index / 3));
        parts.client = format!("client {index}").into();
        parts.max_tokens = Some(20 + index as u32);
        if index % 2 == 1 {
            parts.sampling.temperature = 0.8;
            parts.sampling.seed = Some(index as u64);
        }
        parts
    };
    let streams: Vec<ChatStream> = (0..7).map(|index| together.chat(parts(index))).collect();
    let texts: Vec<String> =
        streams.into_iter().map(|stream| collect(stream).expect("it is answered").text).collect();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(text.len(), 20 + index);
        assert_eq!(*text, alone.text(parts(index)), "request {index}");
    }
    assert!(together.stage.seen().tokens_max <= 7 + 3);
}

#[test]
fn a_client_that_disconnects_frees_its_permit_within_one_step() {
    let bench = Bench::new(Config { slots: 1, resting_slots: 0, ..small() }, babbles);
    bench.stage.allow(2);
    let mut parts = prompt("first");
    parts.max_tokens = Some(100);
    let mut stream = bench.chat(parts);
    wait_for_text(&mut stream);
    wait_for_text(&mut stream);
    let promised = bench.ledger.promised_for(Purpose::Kv);
    assert!(promised > Bytes(0));
    drop(stream);
    let mut second = bench.chat(prompt("second"));
    // The third step may have been planned before the client left; there must be no fourth for it.
    bench.stage.allow(1);
    assert!(matches!(second.blocking_next(), Some(Ok(ChatEvent::Accepted { position: 0, .. }))));
    assert!(bench.stage.seen().forwards <= 3);
    bench.stage.allow_all();
    drop(second);
    assert!(bench.local.drain(LONG));
    assert_eq!(bench.ledger.promised_for(Purpose::Kv), Bytes(0));
    assert_eq!(bench.metrics.requests.with_label_values(&["terminal", "cancelled"]).get(), 2);
}

#[test]
fn a_client_that_does_not_read_pauses_alone() {
    let bench = Bench::new(Config { unread_events_max: 1, ..small() }, says("abcdefghij"));
    let slow = bench.chat(prompt("slow"));
    let text = bench.text(prompt("quick"));
    assert_eq!(text, "abcdefghij");
    assert_eq!(collect(slow).expect("it goes on when it is read").text, "abcdefghij");
}

#[test]
fn a_paused_client_that_leaves_wakes_the_idle_engine() {
    let bench = Bench::new(Config { unread_events_max: 1, ..small() }, says("abcdefghij"));
    let slow = bench.chat(prompt("slow"));
    // The other's answer is complete: the slow one has been paused long ago, and nothing else runs.
    assert_eq!(bench.text(prompt("quick")), "abcdefghij");
    assert!(bench.local.in_hand() >= 1);
    drop(slow);
    assert!(bench.local.drain(LONG));
    assert_eq!(bench.ledger.promised_for(Purpose::Kv), Bytes(0));
}

#[test]
fn stop_strings_end_the_answer_across_tokens() {
    let bench = Bench::new(small(), says("one STOP two"));
    let mut parts = prompt("x");
    parts.stop = vec!["STOP".to_owned(), "never".to_owned()];
    let reply = bench.reply(parts).expect("it is answered");
    assert_eq!((reply.text.as_str(), reply.completion.finish), ("one ", FinishReason::Stop));
}

#[test]
fn tool_calls_come_out_as_events() {
    let bench = Bench::new(
        Config { default_max_tokens: 100, ..small() },
        says(r#"{"name": "light", "parameters": {"room": "hall"}}"#),
    );
    let mut parts = messages(&[(Role::User, "on")]);
    parts.tools = vec![Tool { name: "light".to_owned(), description: None, parameters: None }];
    let reply = bench.reply(parts.clone()).expect("it is answered");
    assert_eq!(reply.text, "");
    assert_eq!(reply.completion.finish, FinishReason::ToolCalls);
    assert_eq!(reply.tool_calls.len(), 1);
    assert_eq!(reply.tool_calls[0].name, "light");
    assert_eq!(reply.tool_calls[0].arguments["room"], "hall");
    parts.tool_choice = ToolChoice::None;
    let reply = bench.reply(parts).expect("it is answered");
    assert!(reply.text.contains("light") && reply.tool_calls.is_empty());
}

#[test]
fn logprobs_of_the_chosen_token_are_among_the_top() {
    let bench = Bench::new(small(), babbles);
    let mut parts = prompt("x");
    parts.max_tokens = Some(6);
    parts.logprobs = Some(3);
    parts.sampling.repeat_penalty = 1.5;
    let reply = bench.reply(parts).expect("it is answered");
    assert_eq!(reply.logprobs.len(), 6);
    for token in &reply.logprobs {
        assert_eq!(token.top.len(), 3);
        assert!(token.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        let same = token.top.iter().find(|other| other.token == token.token);
        if let Some(same) = same {
            assert_eq!(Some(same.logprob), token.logprob);
        }
    }
    let bytes: Vec<u8> = reply.logprobs.iter().flat_map(|token| token.bytes.clone()).collect();
    assert_eq!(bytes, reply.text.as_bytes());
}

#[test]
fn a_prompt_is_scored_in_pieces() {
    let row = (super::testing::VOCAB_LEN * size_of::<f32>()) as u64;
    let bench = Bench::new(Config { score_logits_bytes: 5 * row, ..small() }, babbles);
    let mut parts = prompt("a prompt to be scored");
    let Input::Tokens(tokens) = parts.input.clone() else { panic!("it is made of tokens") };
    parts.echo = true;
    parts.logprobs = Some(1);
    parts.max_tokens = Some(0);
    // Twice: what is already there must not be skipped.
    for _ in 0..2 {
        let reply = bench.reply(parts.clone()).expect("it is answered");
        assert_eq!((reply.text.as_str(), reply.completion.usage.cached_tokens), ("", 0));
        let scored: Vec<TokenId> = reply.prompt.iter().map(|entry| entry.token).collect();
        assert_eq!(scored, tokens);
        for (index, entry) in reply.prompt.iter().enumerate() {
            assert_eq!(entry.logprob.is_none(), index == 0);
            if index > 0 {
                let mut logits = vec![0.0; super::testing::VOCAB_LEN];
                babbles(&tokens[..index], &mut logits);
                let expected = super::logprobs::Logprobs::new(&logits).of(entry.token);
                assert_eq!(entry.logprob, Some(expected), "position {index}");
            }
        }
    }
    assert!(bench.stage.seen().logits_rows_max <= 5);
}

#[test]
fn scoring_yields_one_output_entry_even_for_the_end() {
    let bench = Bench::new(small(), says(""));
    let mut parts = prompt("x");
    parts.echo = true;
    parts.logprobs = Some(1);
    parts.max_tokens = Some(1);
    let reply = bench.reply(parts).expect("it is answered");
    assert_eq!(reply.prompt.len(), 2);
    let output: Vec<TokenId> = reply.logprobs.iter().map(|entry| entry.token).collect();
    assert_eq!((output, reply.text.as_str()), (vec![END], ""));
    assert_eq!(reply.logprobs[0].logprob, Some(reply.logprobs[0].top[0].logprob));
}

#[test]
fn nothing_to_compute_is_answered_at_once() {
    let bench = Bench::new(small(), babbles);
    let mut parts = prompt("x");
    parts.max_tokens = Some(0);
    let reply = bench.reply(parts).expect("it is answered");
    assert_eq!((reply.completion.usage.prompt_tokens, bench.stage.seen().forwards), (2, 0));
}

#[test]
fn a_conversation_that_goes_on_reads_only_what_is_new() {
    let bench = Bench::new(small(), babbles);
    let alone = Bench::new(Config { resting_slots: 0, ..small() }, babbles);
    let mut first = prompt("a long beginning of a conversation");
    first.max_tokens = Some(10);
    let answer = bench.text(first.clone());
    let Input::Tokens(mut tokens) = first.input else { panic!("it is made of tokens") };
    tokens.extend(answer.bytes().map(|byte| TokenId(byte.into())));
    tokens.extend(" and more".bytes().map(|byte| TokenId(byte.into())));
    let mut second = request(Input::Tokens(tokens.clone()));
    second.max_tokens = Some(10);
    let reply = bench.reply(second.clone()).expect("it is answered");
    // The last token of an answer is sampled but never run.
    assert_eq!(reply.completion.usage.cached_tokens as usize, tokens.len() - 9 - 1);
    assert_eq!(reply.text, alone.text(second.clone()));
    // The very same prompt again: its last token is computed again.
    let again = bench.reply(second.clone()).expect("it is answered");
    assert_eq!(again.completion.usage.cached_tokens as usize, tokens.len() - 1);
    assert_eq!(again.text, reply.text);
    assert!(bench.metrics.prefix_cache_hits.get() > 0);
    // A prompt that only begins alike leaves the other's tokens where they are.
    let mut other = prompt("a long beginning of something else altogether");
    other.max_tokens = Some(10);
    let reply = bench.reply(other.clone()).expect("it is answered");
    assert_eq!(reply.completion.usage.cached_tokens, "a long beginning of ".len() as u32);
    assert_eq!(reply.text, alone.text(other));
    let again = bench.reply(second).expect("it is answered");
    assert_eq!(again.completion.usage.cached_tokens as usize, tokens.len() - 1);
}

#[test]
fn a_running_sequence_shares_its_prefix() {
    let config = Config { resting_slots: 0, unread_events_max: 1, ..small() };
    let bench = Bench::new(config, babbles);
    let mut parts = prompt("a beginning that both have in common");
    parts.max_tokens = Some(30);
    // Unread, the first one pauses in its slot.
    let mut first = bench.chat(parts.clone());
    let begun = wait_for_text(&mut first);
    let second = collect(bench.chat(parts)).expect("it is answered");
    let first = collect(first).expect("it is answered");
    assert_eq!(begun + &first.text, second.text);
    assert_eq!(second.completion.usage.cached_tokens, 36);
    assert!(bench.local.drain(LONG));
    assert_eq!(bench.ledger.promised_for(Purpose::Kv), Bytes(0));
    assert_eq!(bench.ledger.promised_for(Purpose::Prefix), Bytes(0));
}

#[test]
fn what_does_not_fit_is_refused_and_what_rests_gives_way() {
    let scratch = {
        let probe = Bench::new(small(), babbles);
        probe.ledger.promised_for(Purpose::Scratch)
    };
    let spec = super::prefix::tests::spec();
    let room = Bytes(kv_bytes(&spec, 60));
    let bench = Bench::build(small(), scratch.saturating_add(room), 256, babbles);
    let sized = |text: &str, max_tokens: u32| {
        let mut parts = prompt(text);
        parts.max_tokens = Some(max_tokens);
        parts
    };
    let refused = bench.refusal(sized(&"x".repeat(40), 40));
    let ChatError::NoHeadroom { needed, free, .. } = refused else {
        panic!("no headroom was expected, not {refused:?}")
    };
    assert_eq!((needed, free), (Bytes(kv_bytes(&spec, 81)), room));
    assert_eq!(bench.text(sized(&"y".repeat(39), 20)).len(), 20);
    assert!(bench.ledger.promised_for(Purpose::Prefix) > Bytes(0));
    // This one needs the room of what rests.
    assert_eq!(bench.text(sized(&"z".repeat(39), 20)).len(), 20);
    assert_eq!(bench.stage.seen().held.len(), 1);

    // While one runs, a second does not fit; it is told when to come again.
    bench.stage.allow(1);
    let mut running = bench.chat(sized(&"v".repeat(29), 20));
    wait_for_text(&mut running);
    let refused = bench.refusal(sized("w", 20));
    assert!(matches!(refused, ChatError::NoHeadroom { .. }), "{refused:?}");
    assert!(refused.retry_after().is_some_and(|after| after >= Duration::from_secs(1)));
    bench.stage.allow_all();
    assert!(collect(running).is_ok());
}

#[test]
fn a_full_line_is_refused() {
    let bench = Bench::new(Config { slots: 1, waiting_max: 1, ..small() }, babbles);
    bench.stage.allow(1);
    let mut running = bench.chat(prompt("runs"));
    wait_for_text(&mut running);
    let waiting = bench.chat(prompt("waits"));
    let refused = bench.refusal(prompt("too many"));
    assert!(matches!(refused, ChatError::QueueFull { .. }), "{refused:?}");
    bench.stage.allow_all();
    assert!(collect(running).is_ok() && collect(waiting).is_ok());
    assert!(collect(bench.chat(prompt("fits again"))).is_ok());
}

#[test]
fn wrong_requests_are_refused_by_name() {
    let bench = Bench::new(small(), babbles);
    let mut parts = prompt("x");
    parts.model = ModelName::new("another");
    assert_eq!(bench.refusal(parts), ChatError::UnknownModel(ModelName::new("another")));
    let unknown = request(Input::Tokens(vec![TokenId(5000)]));
    let message = bench.refusal(unknown).to_string();
    assert_eq!(message, "prompt: token 5000 is not in the vocabulary of 259");
    let long = prompt(&"x".repeat(300));
    assert_eq!(bench.refusal(long), ChatError::ContextTooLong { prompt: 301, context: 256 });
    // A byte is a token here, but the longest token has more: the count tells that none were made.
    for huge in [
        Input::Text("x".repeat(1 << 20)),
        Input::Messages(vec![Message::text(Role::User, "x".repeat(1 << 20))]),
    ] {
        let refused = bench.refusal(request(huge));
        let ChatError::ContextTooLong { prompt, .. } = refused else { panic!("{refused:?}") };
        assert!((257..1 << 20).contains(&prompt), "{prompt}");
    }
}

#[test]
fn old_turns_are_dropped_only_if_asked_for() {
    let bench = Bench::new(small(), says("ok"));
    let (old, new) = ("o".repeat(200), "n".repeat(100));
    let turns = [
        (Role::System, "rules"),
        (Role::User, old.as_str()),
        (Role::Assistant, "yes"),
        (Role::User, new.as_str()),
    ];
    let mut parts = messages(&turns);
    assert_eq!(
        bench.refusal(parts.clone()),
        ChatError::ContextTooLong { prompt: 309, context: 256 }
    );
    parts.truncate = true;
    let reply = bench.reply(parts).expect("it is answered");
    assert_eq!((reply.text.as_str(), reply.completion.usage.prompt_tokens), ("ok", 106));
}

#[test]
fn draining_finishes_what_runs_and_refuses_the_rest() {
    let bench = Bench::new(small(), says("abc"));
    bench.stage.allow(1);
    let mut running = bench.chat(prompt("x"));
    wait_for_text(&mut running);
    assert!(!bench.local.drain(Duration::ZERO));
    let refused = bench.refusal(prompt("y"));
    assert!(matches!(refused, ChatError::Draining { .. }), "{refused:?}");
    bench.stage.allow_all();
    assert_eq!(collect(running).expect("it is answered").text, "bc");
    assert!(bench.local.drain(LONG));
}

#[test]
fn a_panic_costs_the_running_requests_only() {
    let bench = Bench::new(small(), says("abc"));
    assert_eq!(bench.text(prompt("a prompt that rests")), "abc");
    let forwards = bench.stage.seen().forwards;
    bench.stage.panic_after(forwards + 1);
    let failed = bench.refusal(prompt("x"));
    assert!(matches!(failed, ChatError::Internal(_)), "{failed:?}");
    assert_eq!(bench.text(prompt("a prompt that rests")), "abc");
    assert!(bench.local.is_usable());
    let ledger = Arc::clone(&bench.ledger);
    drop(bench);
    assert_eq!(ledger.promised(), Bytes(0));
}

#[test]
fn a_failing_pass_costs_its_requests_only() {
    let bench = Bench::new(small(), says("abc"));
    bench.stage.fail_after(0);
    let failed = bench.refusal(prompt("x"));
    assert!(matches!(failed, ChatError::Internal(_)), "{failed:?}");
    assert_eq!(bench.text(prompt("x")), "abc");
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    let bench = Bench::new(small(), |history, logits| {
        match history.first() == Some(&TokenId(u32::from(b'n'))) {
            true => logits.fill(f32::NAN),
            false => says("abc")(history, logits),
        }
    });
    let failed = bench.refusal(prompt("nan"));
    assert!(matches!(failed, ChatError::Internal(_)), "{failed:?}");
    assert_eq!(bench.text(prompt("x")), "abc");
}

#[test]
fn a_deadline_that_runs_out_ends_with_what_is_there() {
    let deadline = Instant::now() + Duration::from_millis(300);
    let bench = Bench::new(small(), move |history, logits| {
        // A model that takes until the deadline for its fourth token.
        let slow = history.len() == 5;
        while slow && Instant::now() < deadline {
            std::thread::yield_now();
        }
        babbles(history, logits);
    });
    let mut parts = prompt("x");
    parts.deadline = deadline;
    parts.max_tokens = Some(100);
    let reply = bench.reply(parts).expect("it is answered in part");
    assert_eq!(reply.completion.finish, FinishReason::Deadline);
    assert!(!reply.text.is_empty() && reply.text.len() <= 5, "{}", reply.text);
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused() {
    let bench = Bench::new(small(), babbles);
    let mut parts = prompt("x");
    parts.deadline = Instant::now();
    let refused = bench.refusal(parts);
    assert!(matches!(refused, ChatError::DeadlineUnmeetable { .. }), "{refused:?}");
    assert_eq!(bench.stage.seen().forwards, 0);
}

#[test]
fn dropping_the_engine_ends_its_streams() {
    let bench = Bench::new(small(), babbles);
    bench.stage.allow(1);
    let mut parts = prompt("x");
    parts.max_tokens = Some(20);
    let mut stream = bench.chat(parts);
    wait_for_text(&mut stream);
    let Bench { local, stage, ledger, .. } = bench;
    stage.allow_all();
    drop(local);
    let mut last = None;
    while let Some(item) = stream.blocking_next() {
        last = Some(item);
    }
    let ended = matches!(last, Some(Err(ChatError::Draining { .. }) | Ok(ChatEvent::Done(_))));
    assert!(ended, "{last:?}");
    assert_eq!(ledger.promised(), Bytes(0));
}

/// Any token at all, by a hash of the whole history: only a grammar makes sense of it.
fn rambles(history: &[TokenId], logits: &mut [f32]) {
    for (token, logit) in logits.iter_mut().enumerate() {
        let hash = history.iter().fold(token as u64 + 1, |hash, token| {
            (hash ^ u64::from(token.0)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31)
        });
        *logit = (hash % 1000) as f32 / 100.0;
    }
}

#[test]
fn a_forced_form_is_kept_whatever_the_model_wants() {
    let bench = Bench::build(small(), Bytes(1 << 30), 1024, rambles);
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "room": { "enum": ["hall", "kitchen"] },
            "level": { "type": "integer", "minimum": 0, "maximum": 100 },
        },
        "required": ["room", "level"],
        "additionalProperties": false,
    });
    for index in 0..4 {
        let mut parts = prompt(&format!("prompt {index}"));
        parts.max_tokens = Some(600);
        parts.format = OutputFormat::JsonSchema { schema: schema.clone(), strict: true };
        let reply = bench.reply(parts).expect("it is answered");
        assert_eq!(reply.completion.finish, FinishReason::Stop, "{}", reply.text);
        let value: serde_json::Value = serde_json::from_str(&reply.text).expect("it is JSON");
        assert!(value["level"].as_u64().is_some_and(|level| level <= 100), "{value}");

        let mut parts = messages(&[(Role::User, "do it")]);
        parts.max_tokens = Some(600);
        parts.tools = vec![Tool {
            name: "set".to_owned(),
            description: None,
            parameters: Some(serde_json::json!({
                "properties": { "room": { "enum": ["hall", "den"] } },
                "required": ["room"],
                "additionalProperties": false,
            })),
        }];
        parts.tool_choice = ToolChoice::Required;
        parts.sampling.temperature = 1.0;
        parts.sampling.seed = Some(index);
        let reply = bench.reply(parts).expect("it is answered");
        assert_eq!(reply.completion.finish, FinishReason::ToolCalls, "{}", reply.text);
        assert_eq!((reply.text.as_str(), reply.tool_calls[0].name.as_str()), ("", "set"));
        assert!(reply.tool_calls[0].arguments.contains_key("room"));
    }
}

fn scored(bench: &Bench, text: &str, candidates: &[&str]) -> Result<ScoreReply, ChatError> {
    let request = ScoreRequest {
        id: crate::chat::RequestId::random(),
        origin: Origin::Fusion { depth: 1 },
        client: "judge".into(),
        model: ModelName::new(""),
        digest: Some("0".repeat(64)),
        messages: vec![Message::text(Role::User, text)],
        candidates: candidates.iter().map(|text| (*text).to_owned()).collect(),
        deadline: Instant::now() + LONG,
        priority: crate::chat::Priority::Normal,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(bench.local.score(request))
}

#[test]
fn continuations_are_scored_by_what_the_model_finds_likely() {
    let bench = Bench::new(small(), babbles);
    let reply = scored(&bench, "is it on?", &["y", "no", "nay"]).expect("it is scored");
    assert_eq!((reply.tokens.as_slice(), reply.prompt_tokens), (&[1, 2, 3][..], 10));
    let prompt: Vec<TokenId> =
        b"is it on?".iter().map(|b| TokenId(u32::from(*b))).chain([TokenId(257)]).collect();
    for (candidate, logprob) in ["y", "no", "nay"].iter().zip(&reply.logprobs) {
        let mut history = prompt.clone();
        let mut expected = 0.0;
        for byte in candidate.bytes() {
            let mut logits = vec![0.0; super::testing::VOCAB_LEN];
            babbles(&history, &mut logits);
            let token = TokenId(u32::from(byte));
            expected += f64::from(super::logprobs::Logprobs::new(&logits).of(token));
            history.push(token);
        }
        assert!((logprob - expected).abs() < 1e-5, "{candidate}: {logprob} {expected}");
    }
}

#[test]
fn scoring_reads_only_what_is_new() {
    let bench = Bench::new(small(), babbles);
    let text = "a long answer that two phrasings share";
    scored(&bench, &format!("{text} one"), &["y", "n"]).expect("it is scored");
    let forwards = bench.stage.seen().forwards;
    let tokens = bench.stage.seen().tokens;
    let reply = scored(&bench, &format!("{text} two"), &["y", "n"]).expect("it is scored");
    assert_eq!(bench.stage.seen().forwards - forwards, 1, "candidates of one token need one pass");
    assert!(reply.cached_tokens as usize > text.len(), "{reply:?}");
    assert_eq!(bench.stage.seen().tokens - tokens, "two".len() + 1);
    assert_eq!(bench.local.in_hand(), 0);
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let bench = Bench::new(small(), babbles);
    for (candidates, names) in [
        (&[][..], "candidates must be 1 to 16 texts"),
        (&["y", ""][..], "a candidate must have 1 to 256 bytes"),
    ] {
        let error = scored(&bench, "x", candidates).expect_err("refused").to_string();
        assert_eq!(error, names);
    }
    let long = scored(&bench, &"x".repeat(300), &["y"]).expect_err("too long");
    assert!(matches!(long, ChatError::ContextTooLong { .. }), "{long}");
}
