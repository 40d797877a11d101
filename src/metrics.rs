//! One registry: every published number is born here.
//!
//! `/metrics`, the MQTT telemetry and the start-up lines read the same values under the same names. Names
//! follow Prometheus' rules: base units, `_total` on counters. No label ever holds a prompt or a client.

use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

/// Every metric of the process. Cloning is not offered: one exists, behind an `Arc`.
pub struct Metrics {
    registry: Registry,
    /// Requests being answered.
    pub requests_running: IntGauge,
    /// Requests in line.
    pub requests_waiting: IntGauge,
    /// Ended requests by door and reason: stop, length, tool_calls, deadline, cancelled, or an error's code.
    pub requests: IntCounterVec,
    /// Tokens of admitted prompts, cached ones included.
    pub prompt_tokens: IntCounter,
    /// Tokens generated.
    pub generated_tokens: IntCounter,
    /// Prompt tokens looked up in kept prefixes.
    pub prefix_cache_queries: IntCounter,
    /// Prompt tokens found there.
    pub prefix_cache_hits: IntCounter,
    /// Promised KV bytes ÷ bytes that could be promised.
    pub kv_cache_usage_ratio: Gauge,
    /// Arrival to first token.
    pub time_to_first_token_seconds: Histogram,
    /// Between tokens of one answer.
    pub time_per_output_token_seconds: Histogram,
    /// Arrival to end.
    pub request_duration_seconds: Histogram,
    /// Arrival to first prefill step.
    pub request_queue_seconds: Histogram,
    /// First prefill step to first token.
    pub request_prefill_seconds: Histogram,
    /// First token to last.
    pub request_decode_seconds: Histogram,
    /// Moving average of prefill speed; 0 until measured.
    pub prefill_tokens_per_s: Gauge,
    /// Moving average of decode speed of one sequence; 0 until measured.
    pub decode_tokens_per_s: Gauge,
    /// What the kernel calls available, under every limit above us.
    pub memory_available_bytes: Gauge,
    /// What may still be promised.
    pub headroom_bytes: Gauge,
    /// Promised bytes by purpose.
    pub reserved_bytes: GaugeVec,
    /// Bytes of the model's weights.
    pub resident_weight_bytes: Gauge,
    /// Share of the last ten seconds in which some task stalled on memory; NaN where the kernel does not say.
    pub psi_memory_some_ratio: Gauge,
    /// The same for all tasks at once.
    pub psi_memory_full_ratio: Gauge,
    /// Temperature of the processor; NaN where it has no sensor.
    pub soc_temperature_celsius: Gauge,
    /// The rung of memory pressure: 0 green, 1 yellow, 2 orange, 3 red, 4 critical.
    pub memory_rung: IntGauge,
    /// Changes of the rung, by the rung that was entered.
    pub memory_rung_changes: IntCounterVec,
    /// What was done or undone for want of memory or for heat.
    pub memory_acts: IntCounterVec,
    /// Tasks that the kernel killed for memory.
    pub oom_kills: IntGauge,
    /// Swap in use.
    pub swap_used_bytes: Gauge,
    /// Memory that compressed swap takes.
    pub zram_bytes: Gauge,
    /// The firmware's throttling state; NaN where it does not say.
    pub soc_throttled: Gauge,
    /// The processor's clock as a share of its highest; NaN where it does not say.
    pub soc_clock_ratio: Gauge,
    /// The fit plan of the loaded model, in the order of [`PLAN`]; NaN where it does not apply.
    plan: Vec<Gauge>,
    /// Requests under way at other machines.
    pub peer_requests_running: IntGauge,
    /// Faults of other machines by member and reason.
    pub peer_faults: IntCounterVec,
    /// Other machines by what they can be asked.
    pub fusion_members: GaugeVec,
    /// Connections outside the LAN that were refused.
    pub fusion_egress_refused: IntCounter,
    /// Times that a step needed a routed expert of a layer, in a model that streams its experts.
    pub expert_uses: IntCounter,
    /// Times that it was in a slot.
    pub expert_hits: IntCounter,
    /// Experts that began to be read on a guess.
    pub expert_ahead_reads: IntCounter,
    /// Times that such a guess came true.
    pub expert_ahead_hits: IntCounter,
    /// Bytes of experts read from disk.
    pub expert_read_bytes: IntCounter,
    /// Time that steps waited for experts.
    pub expert_wait_seconds: Counter,
    /// Expert slots that may exist.
    pub expert_slots: Gauge,
    /// Bytes that expert slots and read buffers take.
    pub expert_slot_bytes: Gauge,
    /// Answers of the pool by how they were made and whether they are less than was asked for.
    pub fusion_requests: IntCounterVec,
    /// Time to an answer of the pool ÷ time of the slowest answer in it.
    pub fusion_overhead_ratio: Histogram,
    /// Members' failures by member and reason.
    pub fusion_member_faults: IntCounterVec,
    /// Tokens read and written for the pool: of the member whose words were used, and of the others.
    pub fusion_tokens: IntCounterVec,
    /// Answers of the pool that did not wait for all members because nothing could change them.
    pub fusion_early_stops: IntCounter,
    /// 1 while the broker is connected.
    pub mqtt_connected: IntGauge,
    /// 1, labelled with version and instruction set.
    pub build_info: GaugeVec,
    /// 1, labelled with the model.
    pub model_info: GaugeVec,
}

/// The figures of a fit plan: names, as `scoutd plan --json` has them too, and what they say.
pub const PLAN: [(&str, &str); 14] = [
    ("plan_pinned_bytes", "Weights that the plan keeps in memory."),
    ("plan_cached_bytes", "Embedding table that has room in the page cache."),
    ("plan_on_disk_bytes", "Weights that are read when they are needed."),
    ("plan_kv_bytes", "Keys and values of one whole context."),
    ("plan_scratch_bytes", "Buffers of the largest pass."),
    ("plan_left_bytes", "Headroom that the plan leaves."),
    ("plan_missing_bytes", "Headroom that is missing for the model."),
    ("plan_expert_slots", "Slots for routed experts, all layers together."),
    ("plan_expert_slot_bytes", "Bytes of these slots."),
    ("plan_staging_bytes", "Buffers that experts are read into."),
    ("plan_expert_hit_ratio", "Expected share of experts found in slots."),
    ("plan_read_bytes_per_token", "Expected bytes read from disk for each token."),
    ("plan_decode_tokens_per_second", "Expected decode speed of one sequence."),
    ("plan_prefill_tokens_per_second", "Expected prefill speed."),
];

/// vLLM's buckets, so that dashboards made for it fit.
const FIRST_TOKEN_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN_BUCKETS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];

impl Metrics {
    /// A fresh registry with every metric at zero.
    pub fn new() -> Metrics {
        let registry = Registry::new();
        let make = Maker { registry: &registry };
        Metrics {
            requests_running: make.int_gauge("requests_running", "Requests being answered."),
            requests_waiting: make.int_gauge("requests_waiting", "Requests in line."),
            requests: make.counters(
                "requests_total",
                "Ended requests by door and by why they ended.",
                &["door", "reason"],
            ),
            prompt_tokens: make.counter("prompt_tokens_total", "Tokens of admitted prompts."),
            generated_tokens: make.counter("generated_tokens_total", "Tokens generated."),
            prefix_cache_queries: make
                .counter("prefix_cache_queries_total", "Prompt tokens looked up in kept prefixes."),
            prefix_cache_hits: make
                .counter("prefix_cache_hits_total", "Prompt tokens found in kept prefixes."),
            kv_cache_usage_ratio: make.gauge(
                "kv_cache_usage_ratio",
                "Promised KV bytes as a share of what could be promised.",
            ),
            time_to_first_token_seconds: make.histogram(
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                &FIRST_TOKEN_BUCKETS,
            ),
            time_per_output_token_seconds: make.histogram(
                "time_per_output_token_seconds",
                "Between tokens of one answer.",
                &PER_TOKEN_BUCKETS,
            ),
            request_duration_seconds: make.histogram(
                "request_duration_seconds",
                "From arrival to the end.",
                &REQUEST_BUCKETS,
            ),
            request_queue_seconds: make.histogram(
                "request_queue_seconds",
                "From arrival to the first prefill step.",
                &REQUEST_BUCKETS,
            ),
            request_prefill_seconds: make.histogram(
                "request_prefill_seconds",
                "From the first prefill step to the first token.",
                &REQUEST_BUCKETS,
            ),
            request_decode_seconds: make.histogram(
                "request_decode_seconds",
                "From the first token to the last.",
                &REQUEST_BUCKETS,
            ),
            prefill_tokens_per_s: make.gauge(
                "prefill_tokens_per_second",
                "Moving average of prefill speed; 0 until measured.",
            ),
            decode_tokens_per_s: make.gauge(
                "decode_tokens_per_second",
                "Moving average of one sequence's decode speed; 0 until measured.",
            ),
            memory_available_bytes: make.gauge(
                "memory_available_bytes",
                "Memory the kernel calls available, under every limit above this process.",
            ),
            headroom_bytes: make.gauge("headroom_bytes", "Memory that may still be promised."),
            reserved_bytes: make.gauges(
                "reserved_bytes",
                "Promised memory by purpose.",
                &["purpose"],
            ),
            resident_weight_bytes: make
                .gauge("resident_weight_bytes", "Bytes of the model's weights."),
            psi_memory_some_ratio: make.gauge(
                "psi_memory_some_ratio",
                "Share of the last ten seconds in which some task stalled on memory.",
            ),
            psi_memory_full_ratio: make.gauge(
                "psi_memory_full_ratio",
                "Share of the last ten seconds in which all tasks stalled on memory.",
            ),
            soc_temperature_celsius: make
                .gauge("soc_temperature_celsius", "Temperature of the processor."),
            memory_rung: make.int_gauge(
                "memory_rung",
                "Memory pressure: 0 green, 1 yellow, 2 orange, 3 red, 4 critical.",
            ),
            memory_rung_changes: make.counters(
                "memory_rung_changes_total",
                "Changes of memory pressure by the rung that was entered.",
                &["rung"],
            ),
            memory_acts: make.counters(
                "memory_acts_total",
                "What was done or undone for want of memory or for heat.",
                &["act"],
            ),
            oom_kills: make.int_gauge(
                "oom_kills",
                "Tasks killed for memory since start, of our cgroup or of the machine.",
            ),
            swap_used_bytes: make.gauge("swap_used_bytes", "Swap in use."),
            zram_bytes: make.gauge("zram_bytes", "Memory that compressed swap takes."),
            soc_throttled: make.unknown(
                "soc_throttled",
                "The firmware's throttling bits: 1 under-voltage, 2 capped, 4 throttled, 8 soft limit.",
            ),
            soc_clock_ratio: make
                .unknown("soc_clock_ratio", "The processor's clock as a share of its highest."),
            plan: PLAN.iter().map(|(name, help)| make.unknown(name, help)).collect(),
            peer_requests_running: make
                .int_gauge("peer_requests_running", "Requests under way at other machines."),
            peer_faults: make.counters(
                "peer_faults_total",
                "Faults of other machines by member and reason.",
                &["member", "reason"],
            ),
            fusion_members: make.gauges(
                "fusion_members",
                "Other machines by whether they can be asked.",
                &["state"],
            ),
            fusion_egress_refused: make.counter(
                "fusion_egress_refused_total",
                "Connections outside the LAN that were refused.",
            ),
            expert_uses: make.counter(
                "expert_uses_total",
                "Times a step needed a routed expert of a layer, where experts are streamed.",
            ),
            expert_hits: make
                .counter("expert_hits_total", "Times the needed expert was in a slot."),
            expert_ahead_reads: make
                .counter("expert_ahead_reads_total", "Experts that began to be read on a guess."),
            expert_ahead_hits: make
                .counter("expert_ahead_hits_total", "Times such a guess came true."),
            expert_read_bytes: make
                .counter("expert_read_bytes_total", "Bytes of experts read from disk."),
            expert_wait_seconds: make
                .seconds("expert_wait_seconds_total", "Time that steps waited for experts."),
            expert_slots: make.gauge("expert_slots", "Expert slots that may exist."),
            expert_slot_bytes: make
                .gauge("expert_slot_bytes", "Bytes that expert slots and read buffers take."),
            fusion_requests: make.counters(
                "fusion_requests_total",
                "Answers of the pool by how they were made.",
                &["mode", "degraded"],
            ),
            fusion_overhead_ratio: make.histogram(
                "fusion_overhead_ratio",
                "Time to an answer of the pool as a share of its slowest used answer's.",
                &[0.5, 0.75, 0.9, 1.0, 1.03, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0],
            ),
            fusion_member_faults: make.counters(
                "fusion_member_faults_total",
                "Failures of members of the pool.",
                &["member", "reason"],
            ),
            fusion_tokens: make.counters(
                "fusion_tokens_total",
                "Tokens read and written for answers of the pool.",
                &["use"],
            ),
            fusion_early_stops: make.counter(
                "fusion_early_stops_total",
                "Answers of the pool that were decided before all members had answered.",
            ),
            mqtt_connected: make.int_gauge("mqtt_connected", "1 while the broker is connected."),
            build_info: make.gauges(
                "build_info",
                "Always 1; version and instruction set are labels.",
                &["version", "isa"],
            ),
            model_info: make.gauges(
                "model_info",
                "Always 1; the loaded model is a label.",
                &["model", "architecture", "quantization"],
            ),
            registry,
        }
    }

    /// Publishes the figures of a fit plan; those it leaves out are not known.
    pub fn set_plan(&self, figures: &[(&str, f64)]) {
        for ((name, _), gauge) in PLAN.iter().zip(&self.plan) {
            let figure = figures.iter().find(|(own, _)| own == name);
            gauge.set(figure.map_or(f64::NAN, |(_, value)| *value));
        }
    }

    /// Every metric without labels by its name without prefix, for telemetry: counters and gauges as they are, of
    /// histograms the mean. What was never measured is NaN.
    pub fn values(&self) -> Vec<(String, f64)> {
        let families = self.registry.gather();
        let value = |family: &MetricFamily| {
            let metric = family.get_metric().first().filter(|m| m.get_label().is_empty())?;
            let value = match family.get_field_type() {
                MetricType::COUNTER => metric.get_counter().get_value(),
                MetricType::GAUGE => metric.get_gauge().get_value(),
                MetricType::HISTOGRAM => {
                    let histogram = metric.get_histogram();
                    histogram.get_sample_sum() / histogram.get_sample_count() as f64
                }
                MetricType::SUMMARY | MetricType::UNTYPED => return None,
            };
            let name = family.name();
            Some((name.strip_prefix("scoutd_").unwrap_or(name).to_owned(), value))
        };
        families.iter().filter_map(value).collect()
    }

    /// All metrics in Prometheus' text format 0.0.4.
    pub fn render(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        TextEncoder::new()
            .encode_utf8(&self.registry.gather(), &mut text)
            .expect("writing into a string cannot fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

/// Makes metrics with our prefix and registers them.
struct Maker<'a> {
    registry: &'a Registry,
}

impl Maker<'_> {
    fn register<M: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: prometheus::Result<M>,
    ) -> M {
        let metric = metric.expect("the names below are valid");
        self.registry.register(Box::new(metric.clone())).expect("the names below differ");
        metric
    }

    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(format!("scoutd_{name}"), help)
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn seconds(&self, name: &str, help: &str) -> Counter {
        self.register(Counter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Self::opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(Self::opts(name, help)))
    }

    /// A gauge that says nothing until it is set.
    fn unknown(&self, name: &str, help: &str) -> Gauge {
        let gauge = self.gauge(name, help);
        gauge.set(f64::NAN);
        gauge
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Self::opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::new(format!("scoutd_{name}"), help).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_appear_in_the_text() {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["rest", "stop"]).inc();
        metrics.headroom_bytes.set(1e9);
        let text = metrics.render();
        assert!(text.contains("scoutd_requests_total{door=\"rest\",reason=\"stop\"} 1"), "{text}");
        assert!(text.contains("scoutd_headroom_bytes 1000000000"), "{text}");
        assert!(
            text.contains("scoutd_time_to_first_token_seconds_bucket{le=\"2560\"} 0"),
            "{text}"
        );
    }
    #[test]
    fn values_leave_labels_out_and_average_histograms() {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["rest", "stop"]).inc();
        metrics.generated_tokens.inc_by(7);
        metrics.time_to_first_token_seconds.observe(0.25);
        metrics.time_to_first_token_seconds.observe(0.75);
        let values = metrics.values();
        let value = |name: &str| values.iter().find(|(n, _)| n == name).map(|(_, value)| *value);
        assert_eq!(value("generated_tokens_total"), Some(7.0));
        assert_eq!(value("time_to_first_token_seconds"), Some(0.5));
        assert!(value("request_duration_seconds").is_some_and(f64::is_nan));
        assert_eq!(value("requests_total"), None);
        assert_eq!(value("build_info"), None);
    }
}
