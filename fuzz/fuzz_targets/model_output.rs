//! Any text as a model's output, cut at any places: never a panic, the same text and calls as uncut, and without
//! tools the text as it came. The first byte says where to cut.

#![no_main]

use libfuzzer_sys::fuzz_target;
use scoutd::chat::Tool;
use scoutd::template::{OutputParser, Parsed};

/// The parts, neighbouring texts joined.
fn parse(tools: &[Tool], pieces: &[&str]) -> Vec<Parsed> {
    let mut parser = OutputParser::new(tools);
    let mut parts: Vec<Parsed> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    let mut joined: Vec<Parsed> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Parsed::Text(before)), Parsed::Text(text)) => before.push_str(&text),
            (_, part) => joined.push(part),
        }
    }
    joined
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&step, rest)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    let step = usize::from(step % 16) + 1;
    let mut cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).step_by(step).collect();
    cuts.push(text.len());
    let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
    let tool = |name: &str| Tool { name: name.to_owned(), description: None, parameters: None };
    let tools = [tool("f"), tool("light.turn_on")];
    assert_eq!(parse(&tools, &pieces), parse(&tools, &[text]));
    let whole = if text.is_empty() { Vec::new() } else { vec![Parsed::Text(text.to_owned())] };
    assert_eq!(parse(&[], &pieces), whole);
});
