//! Each reply is parsed whole and cut at every place, with the same result.

use proptest::prelude::{any, prop_assert_eq, proptest};
use serde_json::Value;

use super::{OutputParser, Parsed};
use crate::chat::Tool;

fn tools() -> Vec<Tool> {
    ["get_weather", "f", "light.turn_on"]
        .map(|name| Tool { name: name.to_owned(), description: None, parameters: None })
        .into()
}

/// Text as it is, calls as `⟨name {arguments}⟩`.
fn show(parts: impl IntoIterator<Item = Parsed>) -> String {
    let show = |part| match part {
        Parsed::Text(text) => text,
        Parsed::Call(call) => format!("⟨{} {}⟩", call.name, Value::Object(call.arguments)),
    };
    parts.into_iter().map(show).collect()
}

fn parse(pieces: &[&str]) -> String {
    let mut parser = OutputParser::new(&tools());
    let mut parts: Vec<Parsed> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    assert!(!parser.is_holding());
    show(parts)
}

fn check(reply: &str, expected: &str) {
    assert_eq!(parse(&[reply]), expected, "{reply:?}");
    for (at, _) in reply.char_indices() {
        let (left, right) = reply.split_at(at);
        assert_eq!(parse(&[left, right]), expected, "{left:?} + {right:?}");
    }
    let chars: Vec<String> = reply.chars().map(String::from).collect();
    let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
    assert_eq!(parse(&chars), expected, "{reply:?} by characters");
}

#[test]
fn python_lists() {
    check(r#"[get_weather(city="SF")]"#, r#"⟨get_weather {"city":"SF"}⟩"#);
    check(
        r#"[get_weather(city="SF", days=3), f(user_id=7890, special='black', on=True, x=None,)]"#,
        r#"⟨get_weather {"city":"SF","days":3}⟩⟨f {"user_id":7890,"special":"black","on":true,"x":null}⟩"#,
    );
    check("[f()]", "⟨f {}⟩");
    check(
        "[ light.turn_on( a = [1, 'x', (2.5,)], b={'k': false} ) ]",
        r#"⟨light.turn_on {"a":[1,"x",[2.5]],"b":{"k":false}}⟩"#,
    );
    check(r"[f(a='it\'s \u00e9 \U0001F600 \d')]", r#"⟨f {"a":"it's é 😀 \\d"}⟩"#);
    check("Of course. [f(a=1)] Done.", r#"Of course. ⟨f {"a":1}⟩ Done."#);
}

#[test]
fn json_objects() {
    check(
        r#"{"name":"light.turn_on","parameters":{"entity_id":"light.kitchen","brightness_pct":45}}"#,
        r#"⟨light.turn_on {"entity_id":"light.kitchen","brightness_pct":45}⟩"#,
    );
    check(
        r#"{"type": "function", "name": "f", "parameters": {"z": 1, "a": 1.0, "m": -2e3}}"#,
        r#"⟨f {"z":1,"a":1.0,"m":-2000.0}⟩"#,
    );
    check(r#"{"parameters": {"a": 1}, "name": "f"}"#, r#"⟨f {"a":1}⟩"#);
    check(r#"{"name": "f", "arguments": "{\"a\": 1}"}"#, r#"⟨f {"a":1}⟩"#);
    check(r#"{"type":"function","function":{"name":"f","arguments":{"a":1}}}"#, r#"⟨f {"a":1}⟩"#);
    check(r#"{"function":"f","parameters":null}"#, "⟨f {}⟩");
    check(r#"{'name': 'f', 'arguments': {'a': True}}"#, r#"⟨f {"a":true}⟩"#);
    check(
        r#"[{"name":"f","arguments":{}}, {"name":"f","arguments":{"b":2}}]"#,
        r#"⟨f {}⟩⟨f {"b":2}⟩"#,
    );
    check(
        r#"{"name":"f","parameters":{"a":"\ud83d\ude00 \ud83d x"}}"#,
        "⟨f {\"a\":\"😀 \u{FFFD} x\"}⟩",
    );
}

#[test]
fn several_calls_and_text_around_them() {
    check(
        "{\"name\":\"f\",\"parameters\":{\"a\":1}}\n{\"name\":\"f\",\"parameters\":{\"a\":2}}\n",
        r#"⟨f {"a":1}⟩⟨f {"a":2}⟩"#,
    );
    check(r#" {"name":"f"}; {"name":"f"}"#, "⟨f {}⟩⟨f {}⟩");
    check(r#"Sure: {"name":"f"} and [f()]"#, "Sure: ⟨f {}⟩ and ⟨f {}⟩");
    check("  \n just text ", "  \n just text ");
    check(" \n ", " \n ");
    check("{\"name\":\"f\"}\n\nIt is on.", "⟨f {}⟩\n\nIt is on.");
}

#[test]
fn tags() {
    check(r#"<function=f>{"n": 10}</function>"#, r#"⟨f {"n":10}⟩"#);
    check(
        r#"<function=f>{"n": 10}</function><function=f>{}</function>!"#,
        r#"⟨f {"n":10}⟩⟨f {}⟩!"#,
    );
    check(r#"Yes <tool_call>{"name":"f","arguments":{"a":1}}</tool_call>"#, r#"Yes ⟨f {"a":1}⟩"#);
    check("<tool_call>\n[{\"name\":\"f\",\"arguments\":{}}]\n</tool_call>\n", "⟨f {}⟩");
    check("<tool_call>{\"name\":\"f\"}\n{\"name\":\"f\"}</tool_call>", "⟨f {}⟩⟨f {}⟩");
    // The closing tag is missing, at the end and before other text.
    check(r#"<tool_call>{"name":"f"}"#, "⟨f {}⟩");
    check(r#"<function=f>{"n":1}  x"#, "⟨f {\"n\":1}⟩  x");
    check(r#"<function=f>{"n":1}</func"#, "⟨f {\"n\":1}⟩</func");
}

#[test]
fn what_is_no_call_is_text() {
    for text in [
        "[link](http://x) and [1, 2] and {braces} < 3 <b>",
        r#"{"name":"Bob","age":3}"#,
        r#"{"name":"g","parameters":{}}"#,
        "[g(a=1)]",
        "[f(1)]",
        "[f(a=1]",
        "[f(a=1)",
        "[f",
        "[]",
        "{}",
        r#"{"name":"f","parameters":[1]}"#,
        r#"{"name":"f","parameters":{"a":nul}}"#,
        r#"{"name":"f","parameters":{"a":1}"#,
        r#"{"name":"f","extra":1}"#,
        r#"{"parameters":{}}"#,
        "<function=g>{}</function>",
        "<tool_call>{\"name\":\"g\"}</tool_call>",
        "<tool_call>",
        "<func",
        // A call inside of other JSON is part of it.
        r#"{"result": {"name":"f","parameters":{}}, "x": "}"}"#,
        r#"[{"x": [{"name":"f"}]}]"#,
        "it's [don't",
        "a, b; c",
        "Příliš 😀 {ž",
    ] {
        check(text, text);
    }
    // Broken JSON does not swallow the call after it.
    check("{\"a\": \"b\n[f()]", "{\"a\": \"b\n⟨f {}⟩");
    check("{\"a\": 1\n \n[f()]", "{\"a\": 1\n \n⟨f {}⟩");
    check(r#"{"a": "\"{"} [f()]"#, r#"{"a": "\"{"} ⟨f {}⟩"#);
}

#[test]
fn control_tokens_bound_calls() {
    let mut parser = OutputParser::new(&tools()).with_id_prefix("r7_");
    let mut parts = parser.push_control("<|python_start|>");
    parts.extend(parser.push(" {\"name\": \"f\", "));
    parts.extend(parser.push("\"parameters\": {}}"));
    parts.extend(parser.push_control("<|python_end|>"));
    parts.extend(parser.push("\n"));
    parts.extend(parser.push_control("<|python_start|>"));
    parts.extend(parser.push("[f(a=1"));
    parts.extend(parser.push_control("<|eom|>"));
    parts.extend(parser.finish());
    let Some(Parsed::Call(call)) = parts.first() else { panic!("{parts:?}") };
    assert_eq!(call.id, "r7_0");
    assert_eq!(show(parts), "⟨f {}⟩\n[f(a=1");
}

#[test]
fn without_tools_nothing_is_held_back() {
    let mut parser = OutputParser::new(&[]);
    assert_eq!(parser.push(" {\"na"), [Parsed::Text(" {\"na".to_owned())]);
    assert!(!parser.is_holding());
    assert_eq!(parser.push_control("<|python_start|>"), []);
    assert_eq!(parser.finish(), []);
}

#[test]
fn text_is_held_back_only_as_long_as_it_may_be_a_call() {
    let mut parser = OutputParser::new(&tools());
    let cases = [
        ("Hi {", "Hi "),
        ("\"ty", ""),
        ("x", "{\"tyx"),
        ("\": 1} [", "\": 1} "),
        ("li", ""),
        ("s", "[lis"),
        ("t] <", "t] "),
        ("b", "<b"),
    ];
    for (piece, expected) in cases {
        assert_eq!(show(parser.push(piece)), expected, "{piece:?}");
    }
}

#[test]
fn what_is_held_back_is_bounded() {
    let mut parser = OutputParser::new(&tools());
    let mut reply = "{\"name\":\"f\",\"parameters\":{\"a\":\"".to_owned();
    let mut text = show(parser.push(&reply));
    for _ in 0..30_000 {
        reply.push_str("xyz ");
        text.push_str(&show(parser.push("xyz ")));
    }
    assert!(text.len() >= 64 << 10);
    text.push_str(&show(parser.finish()));
    assert_eq!(text, reply);
}

proptest! {
    #[test]
    fn cuts_do_not_matter(picks in proptest::collection::vec(0..PARTS.len(), 0..24),
                          cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6)) {
        let reply: String = picks.iter().map(|at| PARTS[*at]).collect();
        let mut places: Vec<usize> = reply.char_indices().map(|(at, _)| at).collect();
        places.push(reply.len());
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| places[cut.index(places.len())]).collect();
        cuts.push(reply.len());
        cuts.sort_unstable();
        let mut from = 0;
        let pieces: Vec<&str> = cuts.iter().map(|cut| &reply[std::mem::replace(&mut from, *cut)..*cut]).collect();
        prop_assert_eq!(parse(&pieces), parse(&[&reply]));
    }
}

/// What calls are made of, whole and in parts.
const PARTS: [&str; 32] = [
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "\"",
    "'",
    ",",
    ":",
    "=",
    "\\",
    "\n",
    " ",
    "name",
    "f",
    "parameters",
    "a",
    "1",
    "-",
    "true",
    "<function=f>",
    "</function>",
    "<tool_call>",
    "</tool_call>",
    "{\"name\":\"f\"}",
    "[f()]",
    "[f(a=",
    "{\"name\":\"f\",\"parameters\":{",
    "é",
    "text ",
    "{\"x\":",
];
