//! Whether the processor is too warm to work at full width. Pure.

use super::MemorySample;

/// Remembers between samples, so that a degree does not switch it back and forth.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heat {
    hot: bool,
}

/// The firmware halves the clock from 80 °C on; less work before that keeps it up.
const HOT_CELSIUS: f32 = 78.0;
/// Cool enough to go back to full width.
const COOL_CELSIUS: f32 = 74.0;
/// Bits of the firmware's state that mean a lower clock now: capped, throttled, soft limit.
const THROTTLED: u32 = 0b1110;

impl Heat {
    /// Takes in a sample; whether prompts should be read in smaller pieces.
    pub(super) fn step(&mut self, sample: &MemorySample) -> bool {
        let throttled = sample.throttled.is_some_and(|bits| bits & THROTTLED != 0);
        let limit = if self.hot { COOL_CELSIUS } else { HOT_CELSIUS };
        let warm = sample.temperature_celsius.is_some_and(|celsius| celsius >= limit);
        self.hot = throttled || warm;
        self.hot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(celsius: Option<f32>, throttled: Option<u32>) -> MemorySample {
        MemorySample { temperature_celsius: celsius, throttled, ..MemorySample::default() }
    }

    #[test]
    fn heat_has_two_limits_and_the_firmware_the_last_word() {
        let mut heat = Heat::default();
        let script = [
            (Some(77.9), None, false),
            (Some(78.0), None, true),
            (Some(75.0), None, true),
            (Some(73.9), None, false),
            (Some(60.0), Some(0x4), true),
            // The same since boot, but not now.
            (Some(60.0), Some(0x40000), false),
            (None, None, false),
            (None, Some(0x2), true),
        ];
        for (celsius, throttled, hot) in script {
            assert_eq!(heat.step(&sample(celsius, throttled)), hot, "{celsius:?} {throttled:?}");
        }
    }
}
