//! The retained `state`: the metrics under their own names, and when a change is worth a message.
//!
//! Pure: values come as arguments.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// Decides when `state` is published: on a change that matters, at most once a second, at least every minute.
#[derive(Default)]
pub(super) struct Telemetry {
    last: Option<(Instant, Map<String, Value>)>,
}

impl Telemetry {
    /// Whether `state` is due; what is due counts as published.
    pub(super) fn due(&mut self, state: &Map<String, Value>, now: Instant) -> bool {
        let due = match &self.last {
            None => true,
            Some((at, last)) => {
                let age = now.saturating_duration_since(*at);
                age >= PERIOD_MAX || (age >= PERIOD_MIN && differs(last, state))
            }
        };
        if due {
            self.last = Some((now, state.clone()));
        }
        due
    }

    /// Makes the next state due: a new connection, or Home Assistant came back.
    pub(super) fn reset(&mut self) {
        self.last = None;
    }
}

/// The state out of the metrics' values: what is not known is `null`, so that every key is always there.
pub(super) fn state(values: &[(String, f64)], more: Map<String, Value>) -> Map<String, Value> {
    let mut state = more;
    for (name, value) in values {
        state.insert(name.clone(), number(*value));
    }
    state
}

/// Whole numbers are written as such; NaN is `null`.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return Value::from(value as i64);
    }
    let rounded = (value * 1e4).round() / 1e4;
    serde_json::Number::from_f64(rounded).map_or(Value::Null, Value::Number)
}

fn differs(old: &Map<String, Value>, new: &Map<String, Value>) -> bool {
    old.len() != new.len()
        || new.iter().any(|(name, value)| old.get(name).is_none_or(|old| matters(name, old, value)))
}

/// Whether a change is more than the noise of a gauge that never stands still.
fn matters(name: &str, old: &Value, new: &Value) -> bool {
    let (Some(old), Some(new)) = (old.as_f64(), new.as_f64()) else { return old != new };
    let change = (new - old).abs();
    let crosses_zero = (old == 0.0) != (new == 0.0);
    match noise(name) {
        Noise::None => change > 0.0,
        Noise::Absolute(step) => change >= step,
        Noise::Relative(share) => crosses_zero || change > share * old.abs(),
    }
}

enum Noise {
    None,
    Absolute(f64),
    Relative(f64),
}

fn noise(name: &str) -> Noise {
    match name {
        "soc_temperature_celsius" => Noise::Absolute(1.0),
        "uptime_seconds" => Noise::Absolute(f64::INFINITY),
        name if name.starts_with("psi_") => Noise::Absolute(0.01),
        name if name.ends_with("_bytes") => Noise::Relative(0.02),
        name if name.ends_with("_per_second") || name.ends_with("_seconds") => {
            Noise::Relative(0.02)
        }
        _ => Noise::None,
    }
}

const PERIOD_MIN: Duration = Duration::from_secs(1);
const PERIOD_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state_of(headroom: f64, running: f64) -> Map<String, Value> {
        let values =
            [("headroom_bytes".to_owned(), headroom), ("requests_running".to_owned(), running)];
        state(&values, Map::new())
    }

    #[test]
    fn unknown_values_are_null_and_whole_ones_whole() {
        let values = [
            ("a".to_owned(), f64::NAN),
            ("b".to_owned(), 3.0),
            ("c".to_owned(), 0.123456),
            ("d".to_owned(), f64::INFINITY),
        ];
        let more = Map::from_iter([("state".to_owned(), "idle".into())]);
        let expected = json!({"state": "idle", "a": null, "b": 3, "c": 0.1235, "d": null});
        assert_eq!(Value::Object(state(&values, more)), expected);
    }

    #[test]
    fn a_state_is_due_on_change_but_not_too_often_and_at_least_every_minute() {
        let mut telemetry = Telemetry::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert!(telemetry.due(&state_of(1e9, 0.0), at(0)));
        assert!(!telemetry.due(&state_of(1e9, 0.0), at(5_000)));
        assert!(telemetry.due(&state_of(1e9, 1.0), at(6_000)));
        assert!(!telemetry.due(&state_of(1e9, 2.0), at(6_900)), "at most once a second");
        assert!(telemetry.due(&state_of(1e9, 2.0), at(7_000)));
        assert!(!telemetry.due(&state_of(1e9, 2.0), at(66_999)));
        assert!(telemetry.due(&state_of(1e9, 2.0), at(67_000)), "at least every minute");
        telemetry.reset();
        assert!(telemetry.due(&state_of(1e9, 2.0), at(67_001)));
    }

    #[test]
    fn gauges_that_never_stand_still_do_not_flood() {
        let cases = [
            ("headroom_bytes", 1e9, 1.01e9, false),
            ("headroom_bytes", 1e9, 1.03e9, true),
            ("headroom_bytes", 1e9, 0.0, true),
            ("headroom_bytes", 0.0, 1.0, true),
            ("soc_temperature_celsius", 50.0, 50.9, false),
            ("soc_temperature_celsius", 50.0, 51.0, true),
            ("requests_waiting", 1.0, 2.0, true),
            ("uptime_seconds", 1.0, 2000.0, false),
        ];
        for (name, old, new, expected) in cases {
            assert_eq!(matters(name, &number(old), &number(new)), expected, "{name} {old} {new}");
        }
        assert!(matters("soc_temperature_celsius", &Value::Null, &number(50.0)));
        assert!(matters("state", &"idle".into(), &"generating".into()));
    }
}
