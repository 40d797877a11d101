//! Field types that take what clients really send.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde_json::value::RawValue;

use super::schema;
use crate::chat::ChatError;
use crate::units::TokenId;

/// An integer; floats are cut toward zero (Home Assistant sends `8192.0`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Int(pub i128);

/// A finite number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Float(pub f32);

/// A list of at most `MAX` entries; a longer one is refused before it is stored.
#[derive(Debug)]
pub(super) struct List<T, const MAX: usize>(pub Vec<T>);

/// A `T` that is written as an object; serde alone would take a list of its fields as well.
#[derive(Debug)]
pub(super) struct Object<T>(pub T);

/// One text or a list of them.
#[derive(Debug, PartialEq)]
pub(super) struct Texts<const MAX: usize>(pub Vec<String>);

/// Token ids and what to add to their logits.
#[derive(Debug, PartialEq)]
pub(super) struct LogitBias(pub Vec<(TokenId, f32)>);

/// Any JSON, kept as text until its size is known to be harmless.
#[derive(Debug)]
pub(super) struct Raw(Box<RawValue>);

/// Any type or none: a field that is checked elsewhere or only asked whether it says something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    Empty,
    Something,
}

/// Fits `value` into `T`, naming the field if it does not.
pub(super) fn ranged<T: TryFrom<i128>>(
    field: &str,
    value: Option<Int>,
) -> Result<Option<T>, ChatError> {
    let Some(Int(value)) = value else { return Ok(None) };
    match T::try_from(value) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(ChatError::invalid(field, format!("{field} must not be {value}"))),
    }
}

impl Raw {
    /// The value; `field` names it in errors.
    pub(super) fn value(&self, field: &str) -> Result<serde_json::Value, ChatError> {
        let text = self.0.get();
        if text.len() > schema::BYTES_MAX {
            let message = format!("{field} has more than {} bytes", schema::BYTES_MAX);
            return Err(ChatError::invalid(field, message));
        }
        serde_json::from_str(text)
            .map_err(|error| ChatError::invalid(field, format!("{field}: {error}")))
    }
}

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Int, D::Error> {
        struct IntVisitor;
        impl Visitor<'_> for IntVisitor {
            type Value = Int;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Int, E> {
                Ok(Int(value.into()))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Int, E> {
                Ok(Int(value.into()))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Int, E> {
                const BOUND: f64 = 9.2e18; // i64, and every such float is exact in i128
                if value.is_finite() && value.abs() < BOUND {
                    return Ok(Int(value.trunc() as i128));
                }
                Err(E::custom("number out of range"))
            }
        }
        deserializer.deserialize_any(IntVisitor)
    }
}

impl<'de> Deserialize<'de> for Float {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Float, D::Error> {
        struct FloatVisitor;
        impl Visitor<'_> for FloatVisitor {
            type Value = Float;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Float, E> {
                Ok(Float(value as f32))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Float, E> {
                Ok(Float(value as f32))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Float, E> {
                let narrow = value as f32;
                if narrow.is_finite() {
                    return Ok(Float(narrow));
                }
                Err(E::custom("number out of range"))
            }
        }
        deserializer.deserialize_any(FloatVisitor)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for ListVisitor<T, MAX> {
            type Value = List<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                Ok(List(read_list(Vec::new(), &mut seq, MAX)?))
            }
        }
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Texts<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextsVisitor<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for TextsVisitor<MAX> {
            type Value = Texts<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Texts(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                Ok(Texts(read_list(Vec::new(), &mut seq, MAX)?))
            }
        }
        deserializer.deserialize_any(TextsVisitor)
    }
}

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LogitBias, D::Error> {
        struct BiasVisitor;
        impl<'de> Visitor<'de> for BiasVisitor {
            type Value = LogitBias;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids and numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
                let mut biases = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let token = key
                        .parse()
                        .map_err(|_| A::Error::custom("token ids must be whole numbers"))?;
                    let Float(bias) = map.next_value()?;
                    if biases.len() == crate::chat::Limits::LOGIT_BIAS_MAX {
                        return Err(too_many(crate::chat::Limits::LOGIT_BIAS_MAX));
                    }
                    biases.push((TokenId(token), bias));
                }
                Ok(LogitBias(biases))
            }
        }
        deserializer.deserialize_any(BiasVisitor)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Raw, D::Error> {
        Box::<RawValue>::deserialize(deserializer).map(Raw)
    }
}

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Presence, D::Error> {
        let raw = Raw::deserialize(deserializer)?;
        Ok(match raw.0.get() {
            "null" | "\"\"" | "[]" | "false" | "{}" => Presence::Empty,
            _ => Presence::Something,
        })
    }
}

/// Reads the rest of a list of which `items` were read, refusing to store more than `max` entries in all.
pub(super) fn read_list<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut items: Vec<T>,
    seq: &mut A,
    max: usize,
) -> Result<Vec<T>, A::Error> {
    while let Some(item) = seq.next_element()? {
        if items.len() == max {
            return Err(too_many(max));
        }
        items.push(item);
    }
    Ok(items)
}

fn too_many<E: Error>(max: usize) -> E {
    E::custom(format!("more than {max} entries"))
}

/// The error of a visitor that wants `expected`.
pub(super) fn wrong_type<E: Error>(found: Unexpected<'_>, expected: &'static str) -> E {
    E::invalid_type(found, &expected)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::json::parse;
    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only whether it parses is asked")]
    struct Fields {
        int: Option<Int>,
        float: Option<Float>,
        list: Option<List<Int, 2>>,
        texts: Option<Texts<2>>,
        bias: Option<LogitBias>,
    }

    #[test]
    fn numbers_are_lenient() {
        let cases = [
            ("8192", Some(8192)),
            ("8192.0", Some(8192)),
            ("-1.9", Some(-1)),
            ("1e3", Some(1000)),
            ("18446744073709551615", Some(u64::MAX.into())),
            ("null", None),
        ];
        for (text, expected) in cases {
            let fields: Fields = parse(format!("{{\"int\":{text}}}").as_bytes()).expect("valid");
            assert_eq!(fields.int.map(|Int(value)| value), expected, "{text}");
        }
    }

    #[test]
    fn wrong_values_name_the_field() {
        let cases = [
            (r#"{"int":"5"}"#, "int must be an integer, not a text"),
            (r#"{"int":true}"#, "int must be an integer, not true"),
            (r#"{"int":[5]}"#, "int must be an integer, not a list"),
            (r#"{"int":1e308}"#, "int: number out of range"),
            (r#"{"int":1e999}"#, "int: number out of range"),
            (r#"{"float":{}}"#, "float must be a number, not an object"),
            (r#"{"float":1e300}"#, "float: number out of range"),
            (r#"{"list":5}"#, "list must be a list, not the number 5"),
            (r#"{"list":[1,2,3]}"#, "list: more than 2 entries"),
            (r#"{"list":[1,"x"]}"#, "list[1] must be an integer, not a text"),
            (r#"{"texts":5.5}"#, "texts must be a string or a list of strings, not the number 5.5"),
            (r#"{"texts":["a",null]}"#, "texts[1] must be a string, not null"),
            (r#"{"bias":{"x":1}}"#, "bias: token ids must be whole numbers"),
            (r#"{"bias":[]}"#, "bias must be an object of token ids and numbers, not a list"),
        ];
        for (body, message) in cases {
            let error = parse::<Fields>(body.as_bytes()).expect_err(body);
            assert_eq!(error.to_string(), message, "{body}");
        }
    }

    #[test]
    fn bodies_that_are_not_json_say_so() {
        for body in ["", " \n", "{", "hello", "{}}", "{\"int\":NaN}", "\u{feff}{}"] {
            let error = parse::<Fields>(body.as_bytes()).expect_err(body).to_string();
            let expected =
                if body.trim().is_empty() { "missing request body" } else { "not valid JSON" };
            assert!(error.contains(expected), "{body}: {error}");
        }
        assert!(parse::<Fields>(b"{\"texts\":\"\xff\"}").is_err());
        assert!(parse::<Fields>(br#"{"texts":"\ud800"}"#).is_err());
    }

    #[test]
    fn the_body_itself_must_be_an_object() {
        for (body, found) in [("[1]", "a list"), ("[]", "a list"), ("5", "the number 5")] {
            let error = parse::<Object<Fields>>(body.as_bytes()).expect_err(body).to_string();
            assert_eq!(error, format!("request body must be an object, not {found}"));
        }
    }
}
