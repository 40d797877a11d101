//! Rendered prompts against jinja2.
//!
//! `tests/golden/templates/make.py` rendered the cases; `tests/peers/tokenizers/run` makes more of them from
//! the templates of real models and names the file in `SCOUTD_TEMPLATE_CASES`.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use scoutd::chat::{Message, Role, Tool, ToolCall};
use scoutd::template::{ChatTemplate, RenderOptions};
use scoutd::tokenizer::{Tokenizer, Vocabulary};
use serde::Deserialize;
use serde_json::{Map, Value};

#[test]
fn prompts_are_jinja2s() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates/rendered.json");
    assert!(check_file(&golden) >= 25, "too few cases were compared");
}

#[test]
fn prompts_of_real_templates_are_jinja2s() {
    let Some(file) = std::env::var_os("SCOUTD_TEMPLATE_CASES") else {
        println!("not run: SCOUTD_TEMPLATE_CASES is not set (tests/peers/tokenizers/run sets it)");
        return;
    };
    assert!(check_file(Path::new(&file)) >= 25, "too few cases were compared");
}

#[derive(Deserialize)]
struct Case {
    template: String,
    source: String,
    name: String,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    add_generation_prompt: Option<bool>,
    rendered: Option<String>,
}

/// Compares all cases that both sides express the same way; gives their number.
fn check_file(path: &Path) -> usize {
    let cases = fs::read_to_string(path).expect("the cases can be read");
    let cases: Vec<Case> = serde_json::from_str(&cases).expect("the cases are JSON");
    let tokenizer = tokenizer();
    let (mut compared, mut wrong) = (0, 0);
    for case in &cases {
        let template = ChatTemplate::new(&case.source, Arc::clone(&tokenizer));
        let mut options = RenderOptions::at("2026-03-09T17:05[UTC]".parse().expect("a time"));
        options.add_generation_prompt = case.add_generation_prompt.unwrap_or(true);
        let messages: Vec<Message> = case.messages.iter().map(message).collect();
        let tools: Vec<Tool> = case.tools.iter().flatten().map(tool).collect();
        let prompt = template.and_then(|template| template.render(&messages, &tools, &options));
        // What a template refuses or leaves out is written in another way: `src/template/habits.rs`.
        let Some(expected) = case.rendered.as_ref().filter(|text| is_complete(text, case)) else {
            continue;
        };
        compared += 1;
        match prompt {
            Ok(prompt) if prompt.text() == *expected => {}
            Ok(prompt) => {
                wrong += 1;
                println!(
                    "{}, {}:\n{:?}\njinja2:\n{expected:?}",
                    case.template,
                    case.name,
                    prompt.text()
                );
            }
            Err(error) => {
                wrong += 1;
                println!("{}, {}: {error}", case.template, case.name);
            }
        }
    }
    println!("{}: {compared} of {} cases compared, {wrong} differ", path.display(), cases.len());
    assert_eq!(wrong, 0, "prompts differ from jinja2's");
    compared
}

/// Whether the template wrote the tools and calls of the conversation.
fn is_complete(rendered: &str, case: &Case) -> bool {
    let has_tools = case.tools.is_some();
    let calls = case.messages.iter().any(|message| message["tool_calls"].is_array());
    (!has_tools || rendered.contains("Says <b>")) && (!calls || rendered.contains("\\n"))
}

fn message(value: &Value) -> Message {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let role = match value["role"].as_str().expect("a role") {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        other => panic!("role {other}"),
    };
    let call = |call: &Value| ToolCall {
        id: call["id"].as_str().expect("an id").to_owned(),
        name: call["function"]["name"].as_str().expect("a name").to_owned(),
        arguments: object(&call["function"]["arguments"]),
    };
    Message {
        role,
        content: text("content").expect("content"),
        tool_calls: value["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        tool_call_id: text("tool_call_id"),
        tool_name: text("name"),
    }
}

fn tool(value: &Value) -> Tool {
    let function = &value["function"];
    Tool {
        name: function["name"].as_str().expect("a name").to_owned(),
        description: function["description"].as_str().map(str::to_owned),
        parameters: Some(function["parameters"].clone()),
    }
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// Any vocabulary whose bos and eos are `<s>` and `</s>`, as in the cases.
fn tokenizer() -> Arc<Tokenizer> {
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers/sentencepiece.model");
    let model = fs::read(model).expect("the golden vocabulary can be read");
    let vocabulary = Vocabulary::from_tokenizer_model(&model).expect("it is supported");
    Arc::new(Tokenizer::new(&vocabulary).expect("it is sound"))
}
