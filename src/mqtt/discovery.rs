//! The device description for Home Assistant: one retained message that makes every entity.
//!
//! Pure. Rules that cost an entity or the whole device when broken (ids that never change, units that fit their
//! class, domains in `default_entity_id`) are tested below against the golden payload.

use serde_json::{Map, Value, json};

use super::topics::{Setting, Topics};

/// What the description says besides the topics.
#[derive(Clone, Debug, Default)]
pub(super) struct Device {
    /// Of the program.
    pub(super) version: String,
    /// The board, as `Raspberry Pi 5`.
    pub(super) board: Option<String>,
    /// The page to open from the device's card.
    pub(super) url: Option<String>,
    /// Names of the models, the default one first.
    pub(super) models: Vec<String>,
}

/// The payload for [`Topics::discovery`].
pub(super) fn payload(topics: &Topics, device: &Device) -> Value {
    let mut dev = Map::new();
    dev.insert("ids".into(), json!([topics.device_id()]));
    dev.insert("name".into(), format!("Scout {}", topics.node()).into());
    dev.insert("mf".into(), "scoutd".into());
    if let Some(board) = &device.board {
        dev.insert("mdl".into(), board.as_str().into());
    }
    dev.insert("sw".into(), device.version.as_str().into());
    if let Some(url) = &device.url {
        dev.insert("cu".into(), url.as_str().into());
    }
    json!({
        "dev": dev,
        "o": {"name": "scoutd", "sw": device.version},
        "avty": [{"t": topics.own("availability")}],
        "qos": 1,
        "cmps": components(topics, device),
    })
}

fn components(topics: &Topics, device: &Device) -> Map<String, Value> {
    let make = Maker { topics, components: Map::new() };
    make.state_sensors().other_sensors().commands(device).components
}

/// Adds components under their keys; keys and unique ids must never change.
struct Maker<'a> {
    topics: &'a Topics,
    components: Map<String, Value>,
}

impl Maker<'_> {
    fn add(&mut self, key: &str, domain: &str, name: &str, more: Value) {
        let id = format!("{}_{key}", self.topics.device_id());
        let mut component = Map::new();
        component.insert("p".into(), domain.into());
        component.insert("unique_id".into(), id.as_str().into());
        component.insert("name".into(), name.into());
        let entity_id = format!("{domain}.{}", id.to_lowercase().replace('-', "_"));
        component.insert("default_entity_id".into(), entity_id.into());
        if let Value::Object(more) = more {
            component.extend(more);
        }
        self.components.insert(key.to_owned(), Value::Object(component));
    }

    /// A sensor over a key of `state`.
    fn sensor(&mut self, key: &str, name: &str, template: &str, more: Value) {
        let mut fields = Map::new();
        fields.insert("state_topic".into(), self.topics.own("state").into());
        fields.insert("value_template".into(), template.into());
        if let Value::Object(more) = more {
            fields.extend(more);
        }
        self.add(key, "sensor", name, Value::Object(fields));
    }

    fn state_sensors(mut self) -> Self {
        self.sensor(
            "state",
            "State",
            "{{ value_json.state }}",
            json!({"device_class": "enum", "options": ["starting", "idle", "generating", "degraded", "draining", "error"]}),
        );
        self.sensor(
            "headroom",
            "RAM headroom",
            "{{ (value_json.headroom_bytes/1048576)|round(0) }}",
            json!({"device_class": "data_size", "unit_of_measurement": "MiB", "state_class": "measurement"}),
        );
        self.sensor(
            "generation_speed",
            "Generation speed",
            "{{ value_json.decode_tokens_per_second }}",
            json!({"unit_of_measurement": "tok/s", "state_class": "measurement"}),
        );
        self.sensor(
            "time_to_first_token",
            "Time to first token",
            "{{ (value_json.time_to_first_token_seconds*1000)|round(0) \
             if value_json.time_to_first_token_seconds is not none else None }}",
            json!({"device_class": "duration", "unit_of_measurement": "ms", "state_class": "measurement"}),
        );
        self.sensor(
            "prefix_cache_hits",
            "Prefix cache hits",
            "{{ (100*value_json.prefix_cache_hits_total/value_json.prefix_cache_queries_total)|round(1) \
             if value_json.prefix_cache_queries_total else None }}",
            json!({"unit_of_measurement": "%", "state_class": "measurement",
                "entity_category": "diagnostic", "enabled_by_default": false}),
        );
        self.sensor(
            "queue_length",
            "Queue length",
            "{{ value_json.requests_waiting }}",
            json!({"state_class": "measurement"}),
        );
        self.sensor(
            "soc_temperature",
            "SoC temperature",
            "{{ value_json.soc_temperature_celsius }}",
            json!({"device_class": "temperature", "unit_of_measurement": "°C",
                "state_class": "measurement", "entity_category": "diagnostic"}),
        );
        self
    }

    fn other_sensors(mut self) -> Self {
        let state = self.topics.own("state");
        let last = self.topics.own("last");
        self.add(
            "last_reply",
            "sensor",
            "Last reply",
            json!({"state_topic": last, "value_template": "{{ value_json.summary }}",
                "json_attributes_topic": last, "json_attributes_template":
                "{{ {'text': value_json.text[:12000], 'status': value_json.status, 'id': value_json.id}|to_json }}"}),
        );
        self.add(
            "busy",
            "binary_sensor",
            "Busy",
            json!({"state_topic": state, "device_class": "running",
                "value_template": "{{ 'ON' if value_json.requests_running|int > 0 else 'OFF' }}"}),
        );
        self.add(
            "low_memory",
            "binary_sensor",
            "Low memory",
            json!({"state_topic": state, "device_class": "problem", "entity_category": "diagnostic",
                "value_template": "{{ 'ON' if value_json.headroom_bytes|float < 67108864 else 'OFF' }}"}),
        );
        self.add(
            "completion",
            "event",
            "Completion",
            json!({"state_topic": self.topics.own("completion"),
                "event_types": ["done", "error", "refused", "cancelled"]}),
        );
        self
    }

    fn commands(mut self, device: &Device) -> Self {
        let set = |setting| self.topics.set(setting);
        let state = self.topics.own("state");
        let ask = json!({"command_topic": set(Setting::Ask)});
        let prompt = json!({"command_topic": set(Setting::Prompt), "max": 255,
            "state_topic": self.topics.own("prompt")});
        let cancel = json!({"command_topic": set(Setting::Cancel), "payload_press": "PRESS"});
        let temperature = json!({"command_topic": set(Setting::Temperature), "state_topic": state,
            "value_template": "{{ value_json.ask_temperature }}", "min": 0, "max": 2, "step": 0.05,
            "mode": "box", "entity_category": "config"});
        let max_tokens = json!({"command_topic": set(Setting::MaxTokens), "state_topic": state,
            "value_template": "{{ value_json.ask_max_tokens }}", "min": 1, "max": 4096, "step": 1,
            "mode": "box", "entity_category": "config"});
        let model = json!({"command_topic": set(Setting::Model), "state_topic": state,
            "value_template": "{{ value_json.model }}", "options": device.models});
        self.add("ask", "notify", "Ask", ask);
        self.add("prompt", "text", "Prompt", prompt);
        self.add("cancel", "button", "Cancel", cancel);
        self.add("temperature", "number", "Temperature", temperature);
        self.add("max_tokens", "number", "Max tokens", max_tokens);
        if !device.models.is_empty() {
            self.add("model", "select", "Model", model);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topics() -> Topics {
        Topics::new("scoutd", "pi5", "homeassistant", &[]).expect("the names are valid")
    }

    fn device() -> Device {
        Device {
            version: "0.1.0".into(),
            board: Some("Raspberry Pi 5".into()),
            url: Some("http://pi5.local:11434/".into()),
            models: vec!["scout-nano".into()],
        }
    }

    #[test]
    fn the_payload_is_the_golden_one() {
        let golden = include_str!("../../tests/golden/mqtt_discovery.json");
        let golden: Value = serde_json::from_str(golden).expect("the golden file is JSON");
        let payload = payload(&topics(), &device());
        let shown = serde_json::to_string_pretty(&payload).expect("a value can be written");
        assert_eq!(payload, golden, "now it is:\n{shown}");
    }

    #[test]
    fn every_component_keeps_the_rules() {
        let payload = payload(&topics(), &device());
        let components = payload["cmps"].as_object().expect("components are an object");
        for (key, component) in components {
            let domain = component["p"].as_str().expect("a domain");
            assert_eq!(component["unique_id"], json!(format!("scoutd_pi5_{key}")));
            let entity_id = component["default_entity_id"].as_str().expect("an entity id");
            assert!(entity_id.starts_with(&format!("{domain}.scoutd_pi5_")), "{entity_id}");
            if let Some(unit) = component["unit_of_measurement"].as_str() {
                assert_eq!(component["state_class"], "measurement", "{key}");
                let class = component["device_class"].as_str();
                let fits = matches!(
                    (class, unit),
                    (Some("data_size"), "MiB")
                        | (Some("temperature"), "°C")
                        | (Some("duration"), "ms")
                        | (None, "tok/s" | "%")
                );
                assert!(fits, "{key}: {class:?} with {unit}");
            }
            for topic in ["state_topic", "command_topic", "json_attributes_topic"] {
                let topic = component[topic].as_str().unwrap_or("scoutd/pi5/");
                assert!(topic.starts_with("scoutd/pi5/"), "{topic}");
            }
        }
    }

    #[test]
    fn the_payload_stays_below_every_brokers_default() {
        let mut device = device();
        device.models = (0..20).map(|i| format!("a-rather-long-model-name-{i}")).collect();
        let topics = Topics::new("scoutd", &"n".repeat(64), "homeassistant", &[])
            .expect("the names are valid");
        let bytes = payload(&topics, &device).to_string().len();
        assert!(bytes < 16 << 10, "{bytes} bytes");
    }

    #[test]
    fn nodes_with_capitals_get_lower_case_entity_ids() {
        let topics = Topics::new("scoutd", "Pi-5", "homeassistant", &[]).expect("valid");
        let payload = payload(&topics, &device());
        assert_eq!(payload["cmps"]["ask"]["default_entity_id"], "notify.scoutd_pi_5_ask");
        assert_eq!(payload["cmps"]["ask"]["unique_id"], "scoutd_Pi-5_ask");
    }
}
