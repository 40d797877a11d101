//! Times as clients write and read them.

use std::time::{Duration, SystemTime};

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// How long a client wishes a model to stay loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// For ever: any negative number or duration.
    Forever,
    /// So long; zero unloads afterwards.
    For(Duration),
}

impl KeepAlive {
    /// A Go duration (`5m`, `1h30m`, `-1.0s`), `0`, or a bare number of seconds.
    pub fn parse(text: &str) -> Option<KeepAlive> {
        if let Ok(seconds) = text.parse::<f64>() {
            return KeepAlive::seconds(seconds);
        }
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let seconds = go_duration_seconds(rest)?;
        KeepAlive::seconds(if negative { -seconds } else { seconds })
    }

    fn seconds(seconds: f64) -> Option<KeepAlive> {
        if seconds < 0.0 {
            return Some(KeepAlive::Forever);
        }
        Duration::try_from_secs_f64(seconds).ok().map(KeepAlive::For)
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<KeepAlive, D::Error> {
        struct KeepAliveVisitor;
        impl Visitor<'_> for KeepAliveVisitor {
            type Value = KeepAlive;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number of seconds or a duration as \"5m\"")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<KeepAlive, E> {
                self.visit_f64(value as f64)
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<KeepAlive, E> {
                self.visit_f64(value as f64)
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<KeepAlive, E> {
                KeepAlive::seconds(value).ok_or_else(|| E::custom("number out of range"))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<KeepAlive, E> {
                KeepAlive::parse(text)
                    .ok_or_else(|| E::custom("must be a number of seconds or a duration as \"5m\""))
            }
        }
        deserializer.deserialize_any(KeepAliveVisitor)
    }
}

/// `time` as RFC 3339 in UTC with six fraction digits, which every client's parser takes.
pub fn rfc3339(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(timestamp) => format!("{timestamp:.6}"),
        Err(_) => format!("{:.6}", jiff::Timestamp::UNIX_EPOCH),
    }
}

/// `<decimal><unit>`, one or more times.
fn go_duration_seconds(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, from) = rest.split_at(digits);
        let end = from.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(from.len());
        let (unit, after) = from.split_at(end);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    Some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_keep_alive() {
        let seconds = |s: f64| Some(KeepAlive::For(Duration::from_secs_f64(s)));
        let cases = [
            ("300", seconds(300.0)),
            ("300.0", seconds(300.0)),
            ("0", seconds(0.0)),
            ("\"0\"", seconds(0.0)),
            ("-1", Some(KeepAlive::Forever)),
            ("-1.0", Some(KeepAlive::Forever)),
            ("\"-1\"", Some(KeepAlive::Forever)),
            ("\"-1s\"", Some(KeepAlive::Forever)),
            ("\"-1.0s\"", Some(KeepAlive::Forever)),
            ("\"5m\"", seconds(300.0)),
            ("\"1h30m\"", seconds(5400.0)),
            ("\"+1.5h\"", seconds(5400.0)),
            ("\"500ms\"", seconds(0.5)),
            ("\"10µs\"", seconds(1e-5)),
            ("\"300\"", seconds(300.0)),
            ("\"5 m\"", None),
            ("\"m\"", None),
            ("\"5x\"", None),
            ("\"5m3\"", None),
            ("\"\"", None),
            ("\"-\"", None),
            ("\"inf\"", None),
            ("\"NaN\"", None),
            ("1e300", None),
            ("true", None),
        ];
        for (text, expected) in cases {
            assert_eq!(serde_json::from_str(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn times_are_written_for_every_parser() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_793_534_400_250_000);
        assert_eq!(rfc3339(time), "2026-11-01T12:00:00.250000Z");
    }
}
