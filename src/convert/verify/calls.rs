//! Whether an answer is the expected one: tool calls by name and arguments, text by its words.

use serde_json::{Deserializer, Map, Value};

use super::report::{Share, ToolCalls};
use crate::chat::Tool;
use crate::template::{OutputParser, Parsed};

/// What an answer says: calls in their order, and the text around them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) calls: Vec<(String, Map<String, Value>)>,
    pub(super) text: String,
}

impl Said {
    /// Reads an answer as the daemon does: only calls of `tools` are calls.
    pub(super) fn parse(answer: &str, tools: &[Tool]) -> Said {
        let mut parser = OutputParser::new(tools);
        let mut parts = parser.push(answer);
        parts.extend(parser.finish());
        let mut said = Said::default();
        for part in parts {
            match part {
                Parsed::Text(text) => said.text.push_str(&text),
                Parsed::Call(call) => said.calls.push((call.name, call.arguments)),
            }
        }
        said.text = said.text.trim().to_owned();
        said
    }

    /// The same calls in the same order, and the same text.
    pub(super) fn is(&self, other: &Said) -> bool {
        let same_call = |(a, b): (&(String, Map<_, _>), &(String, Map<_, _>))| {
            a.0 == b.0 && same_fields(&a.1, &b.1)
        };
        self.text == other.text
            && self.calls.len() == other.calls.len()
            && self.calls.iter().zip(&other.calls).all(same_call)
    }
}

/// Equal as JSON: the order of keys says nothing, and 22 is 22.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => same_fields(a, b),
        _ => a == b,
    }
}

fn same_fields(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    let has = |(key, value): (&String, &Value)| b.get(key).is_some_and(|other| same(value, other));
    a.len() == b.len() && a.iter().all(has)
}

/// Whether an answer sets out to be a call or other JSON, and if so whether it is well-formed to its end.
pub(super) fn json_validity(answer: &str, tools: &[Tool]) -> Option<bool> {
    let answer = answer.trim();
    if !answer.starts_with(['{', '['])
        && !["<function", "<tool_call"].iter().any(|s| answer.starts_with(s))
    {
        return None;
    }
    let said = Said::parse(answer, tools);
    let is_calls = !said.calls.is_empty() && said.text.is_empty();
    let is_json = || {
        let mut values = Deserializer::from_str(answer).into_iter::<Value>();
        values.all(|value| value.is_ok())
    };
    Some(is_calls || is_json())
}

/// What both models answered to one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Judged {
    /// The expected answer is a call.
    pub(super) wants_call: bool,
    pub(super) reference_right: bool,
    pub(super) file_right: bool,
    /// `None`: the answer is text.
    pub(super) reference_json: Option<bool>,
    pub(super) file_json: Option<bool>,
}

/// Adds up.
pub(super) fn tally(judged: &[Judged]) -> ToolCalls {
    let calls: Vec<&Judged> = judged.iter().filter(|one| one.wants_call).collect();
    let count = |of: &dyn Fn(&Judged) -> bool| calls.iter().filter(|one| of(one)).count();
    let lost = count(&|one| one.reference_right && !one.file_right);
    let gained = count(&|one| !one.reference_right && one.file_right);
    let valid = |of: &dyn Fn(&Judged) -> Option<bool>| {
        let tried = judged.iter().filter_map(of);
        Share::new(tried.clone().filter(|valid| *valid).count(), tried.count())
    };
    let texts = judged.iter().filter(|one| !one.wants_call);
    let right = |of: &dyn Fn(&Judged) -> bool| {
        Share::new(texts.clone().filter(|one| of(one)).count(), texts.clone().count())
    };
    ToolCalls {
        requests: judged.len(),
        reference_exact: Share::new(count(&|one| one.reference_right), calls.len()),
        file_exact: Share::new(count(&|one| one.file_right), calls.len()),
        lost,
        gained,
        p_value: mcnemar(lost, gained),
        reference_json_valid: valid(&|one| one.reference_json),
        file_json_valid: valid(&|one| one.file_json),
        reference_texts: right(&|one| one.reference_right),
        file_texts: right(&|one| one.file_right),
    }
}

/// McNemar's exact test: how likely it is that of `lost` + `gained` requests, on which the two disagree, so
/// many or more fall on one side, if both models were equally good.
pub(super) fn mcnemar(lost: usize, gained: usize) -> f64 {
    let count = lost + gained;
    let fewer = lost.min(gained);
    // The binomial coefficients of row `count`, each over 2^count, from their logarithms.
    let mut log = -(count as f64) * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for k in 0..=fewer {
        sum += log.exp();
        log += (((count - k) as f64) / ((k + 1) as f64)).ln();
    }
    (2.0 * sum).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Vec<Tool> {
        let tool = |name: &str| Tool { name: name.to_owned(), description: None, parameters: None };
        vec![tool("light.turn_on"), tool("climate.set_temperature")]
    }

    #[test]
    fn calls_are_equal_by_meaning() {
        let check = |a: &str, b: &str, equal: bool| {
            let (a, b) = (Said::parse(a, &tools()), Said::parse(b, &tools()));
            assert_eq!(a.is(&b), equal, "{a:?} {b:?}");
        };
        let set =
            r#"{"name":"climate.set_temperature","parameters":{"entity_id":"c","temperature":22}}"#;
        let other = r#"{"name": "climate.set_temperature", "parameters": {"temperature": 22.0, "entity_id": "c"}}"#;
        let colder =
            r#"{"name":"climate.set_temperature","parameters":{"entity_id":"c","temperature":21}}"#;
        let on = r#"{"name":"light.turn_on","parameters":{"entity_id":"l"}}"#;
        check(set, other, true);
        check(set, colder, false);
        check(set, &format!("{set}\n{on}"), false);
        check(&format!("{set}\n{on}"), &format!("{other} {on}"), true);
        check(&format!("{set}\n{on}"), &format!("{on}\n{set}"), false);
        check(set, &format!("Gladly: {set}"), false);
        check(" It is on.", "It is on.\n", true);
        check("It is on.", "It is off.", false);
    }

    #[test]
    fn json_that_breaks_off_is_invalid() {
        let on = r#"{"name":"light.turn_on","parameters":{"entity_id":"l"}}"#;
        let check = |answer: &str, wanted| {
            assert_eq!(json_validity(answer, &tools()), wanted, "{answer}");
        };
        check(on, Some(true));
        check(&format!("{on}\n{on}"), Some(true));
        check(r#"{"name":"unknown","parameters":{}}"#, Some(true));
        check(r#"[light.turn_on(entity_id="l")]"#, Some(true));
        check(&on[..on.len() - 1], Some(false));
        check(&on.replace(":{", ":"), Some(false));
        check(&format!("{on} and more"), Some(false));
        check("It is on.", None);
    }

    #[test]
    fn mcnemar_is_the_binomial() {
        let check = |lost, gained, wanted: f64| {
            assert!((mcnemar(lost, gained) - wanted).abs() < 1e-12, "{lost} {gained}");
        };
        check(0, 0, 1.0);
        check(5, 5, 1.0);
        check(1, 0, 1.0);
        check(5, 0, 2.0 / 32.0);
        check(1, 9, 2.0 * 11.0 / 1024.0);
        // R: binom.test(40, 100)$p.value
        assert!((mcnemar(40, 60) - 0.056_887_9).abs() < 1e-6);
    }

    #[test]
    fn tally_counts_each_kind() {
        let one = |wants_call, reference_right, file_right, file_json| Judged {
            wants_call,
            reference_right,
            file_right,
            reference_json: Some(true),
            file_json,
        };
        let judged = [
            one(true, true, true, Some(true)),
            one(true, true, false, Some(false)),
            one(true, false, true, Some(true)),
            one(true, false, false, None),
            one(false, true, true, None),
        ];
        let found = tally(&judged);
        assert_eq!((found.reference_exact.count, found.file_exact.count), (2, 2));
        assert_eq!((found.file_exact.of, found.lost, found.gained), (4, 1, 1));
        assert_eq!((found.file_json_valid.count, found.file_json_valid.of), (2, 3));
        assert_eq!((found.file_texts.count, found.file_texts.of), (1, 1));
    }
}
