//! The ladder of memory pressure: which rung we stand on, from samples over time. Pure; time is an argument.
//!
//! Headroom decides and stalls confirm. A rung is entered at once and rungs may be skipped; it is left one at a
//! time, after its conditions have been false for a while with room to spare. The times to leave are short where
//! clients are refused or wait, and long where only caches are smaller, so that service is back within seconds
//! while caches do not swing.

use std::fmt;
use std::time::Duration;

use super::MemorySample;
use crate::units::Bytes;

/// How tight memory is. Each rung adds acts to the ones above it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rung {
    /// Nothing is held back.
    #[default]
    Green,
    /// Nothing grows.
    Yellow,
    /// Caches are given back, prompts are read in smaller pieces, the line is shorter.
    Orange,
    /// New requests are refused.
    Red,
    /// Running requests pause; weights may leave memory. The doors stay up.
    Critical,
}

impl Rung {
    /// All of them, from the best.
    pub const ALL: [Rung; 5] = [Rung::Green, Rung::Yellow, Rung::Orange, Rung::Red, Rung::Critical];

    /// The word in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Rung::Green => "green",
            Rung::Yellow => "yellow",
            Rung::Orange => "orange",
            Rung::Red => "red",
            Rung::Critical => "critical",
        }
    }

    /// From 0, green.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The rung of a number; what is beyond the last is the last.
    pub fn from_number(number: u8) -> Rung {
        Rung::ALL[usize::from(number).min(Rung::ALL.len() - 1)]
    }

    /// How long calm must last before it is left upwards.
    fn hold(self) -> Duration {
        match self {
            Rung::Green => Duration::ZERO,
            Rung::Yellow => Duration::from_secs(30),
            Rung::Orange => Duration::from_secs(10),
            Rung::Red => Duration::from_secs(2),
            Rung::Critical => Duration::from_secs(1),
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What made the rung change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Little may be promised.
    Headroom,
    /// Tasks wait for memory.
    Stalls,
    /// Pages of files are read again soon after they were dropped.
    Refaults,
    /// Allocations have to free pages first.
    Reclaim,
    /// Swap is filling, or pages go out and in.
    Swap,
    /// None of these holds any more.
    Relief,
}

impl Cause {
    /// The word in logs.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Headroom => "headroom",
            Cause::Stalls => "stalls",
            Cause::Refaults => "refaults",
            Cause::Reclaim => "reclaim",
            Cause::Swap => "swap",
            Cause::Relief => "relief",
        }
    }
}

/// A change of rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The rung before.
    pub from: Rung,
    /// The rung now.
    pub to: Rung,
    /// Why.
    pub cause: Cause,
    /// Headroom at that moment.
    pub headroom: Bytes,
}

/// What the ladder sees at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// Time since any fixed moment.
    pub at: Duration,
    /// Memory.
    pub sample: &'a MemorySample,
    /// What may be promised, before anything is kept free.
    pub headroom: Bytes,
    /// Stalls, refaults and reclaim do not count: a model is being loaded, or runs from disk by the operator's
    /// wish.
    pub exempt: bool,
}

/// The state between readings.
#[derive(Clone, Debug, Default)]
pub struct Ladder {
    rung: Rung,
    /// Since when the conditions of this rung have been false with room to spare.
    calm_since: Option<Duration>,
    /// When this rung was entered.
    entered: Duration,
    /// What the last reading asked for.
    demands: Rung,
    history: History,
}

/// Percent of all memory below which a rung is entered for lack of headroom.
const HEADROOM_PERCENT: [(Rung, f64); 4] =
    [(Rung::Critical, 3.0), (Rung::Red, 5.0), (Rung::Orange, 7.0), (Rung::Yellow, 10.0)];

/// How far headroom is from where caches may rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// What must come back before orange can be left.
    pub missing: Bytes,
    /// What may be taken without coming close to yellow.
    pub spare: Bytes,
    /// Whether something asks for orange or worse now. On a rung that is only held until calm has lasted, nothing
    /// does.
    pub pressing: bool,
    /// Number of the look at memory that found this: who has acted on it waits for the next.
    pub look: u64,
}

impl Room {
    /// Of a headroom in `total`.
    pub fn of(total: Bytes, headroom: Bytes) -> Room {
        let percent = |percent: f64| Bytes((total.0 as f64 * percent / 100.0) as u64);
        let limit = |wanted: Rung| {
            let limit = HEADROOM_PERCENT.iter().find(|(rung, _)| *rung == wanted);
            percent(limit.map_or(0.0, |(_, limit)| limit + SPARE_PERCENT))
        };
        Room {
            missing: limit(Rung::Orange).saturating_sub(headroom),
            spare: headroom.saturating_sub(limit(Rung::Yellow)),
            ..Room::default()
        }
    }
}

/// Percent of all memory below which stalls and their substitutes count for a rung. Above, they are those of
/// somebody else at a limit of his own, or of a disk being copied.
const STALLS_COUNT_PERCENT: [(Rung, f64); 4] =
    [(Rung::Critical, 7.0), (Rung::Red, 12.0), (Rung::Orange, 20.0), (Rung::Yellow, 20.0)];

/// Points of headroom that must be to spare before a rung is left.
const SPARE_PERCENT: f64 = 2.0;

impl Ladder {
    /// The rung now.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// The rung that the last reading asked for, be it above or below the one we stand on.
    pub fn demands(&self) -> Rung {
        self.demands
    }

    /// Takes in a reading, which must not be older than the one before. Returns the change, if there is one.
    pub fn step(&mut self, reading: &Reading<'_>) -> Option<Change> {
        self.history.push(reading.at, reading.sample);
        let (demanded, cause) = self.demanded(reading, Margin::None);
        self.demands = demanded;
        let (from, headroom) = (self.rung, reading.headroom);
        if demanded > self.rung {
            self.enter(demanded, reading.at);
            return Some(Change { from, to: demanded, cause, headroom });
        }
        if self.rung == Rung::Green || self.demanded(reading, Margin::ToLeave).0 >= self.rung {
            self.calm_since = None;
            return None;
        }
        let since = *self.calm_since.get_or_insert(reading.at);
        if reading.at.saturating_sub(since) < self.rung.hold() {
            return None;
        }
        let to = Rung::from_number(self.rung.number() - 1);
        self.enter(to, reading.at);
        // Calm on this rung is calm on the next one, but each is held for its own time.
        self.calm_since = Some(reading.at);
        Some(Change { from, to, cause: Cause::Relief, headroom })
    }

    fn enter(&mut self, rung: Rung, at: Duration) {
        self.rung = rung;
        self.entered = at;
        self.calm_since = None;
    }

    /// The lowest rung that some condition asks for.
    fn demanded(&self, reading: &Reading<'_>, margin: Margin) -> (Rung, Cause) {
        let total = (reading.sample.total.0 as f64).max(1.0);
        let percent = 100.0 * reading.headroom.0 as f64 / total;
        let spare = if margin == Margin::None { 0.0 } else { SPARE_PERCENT };
        let by_headroom = HEADROOM_PERCENT.iter().find(|(_, limit)| percent < limit + spare);
        let mut worst = (by_headroom.map_or(Rung::Green, |(rung, _)| *rung), Cause::Headroom);
        if reading.exempt {
            return worst;
        }
        for (rung, limit) in STALLS_COUNT_PERCENT {
            if rung <= worst.0 || percent >= limit {
                continue;
            }
            if let Some(cause) = self.stalls_ask_for(rung, reading, margin) {
                worst = (rung, cause);
            }
        }
        worst
    }

    fn stalls_ask_for(&self, rung: Rung, reading: &Reading<'_>, margin: Margin) -> Option<Cause> {
        let history = &self.history;
        let scale = if margin == Margin::None { 1.0 } else { 0.5 };
        let has_pressure = reading.sample.pressure.is_some();
        let found = match rung {
            Rung::Green => return None,
            Rung::Yellow => {
                let file_pages = reading.sample.file_cache.0 as f64 / PAGE_BYTES;
                let refaults = history.per_s(SECOND * 3, |m| m.refaults);
                if file_pages > 0.0 && refaults > scale * REFAULTS_OF_CACHE * file_pages {
                    return Some(Cause::Refaults);
                }
                history.stalled(SECOND * 3, |m| m.some_us) > scale * 0.05
            }
            Rung::Orange => match has_pressure {
                true => history.stalled(SECOND, |m| m.some_us) >= scale * 0.07,
                false if history.grew_in_each(2, |m| m.stalls) => return Some(Cause::Reclaim),
                false => false,
            },
            Rung::Red => {
                let used =
                    reading.sample.swap_total.saturating_sub(reading.sample.swap_free).0 as f64;
                let filled = used > SWAP_USED * reading.sample.swap_total.0 as f64;
                let out = history.per_s(SECOND * 5, |m| m.swapped_out) > 0.0;
                if filled && out {
                    return Some(Cause::Swap);
                }
                match has_pressure {
                    true => history.stalled(SECOND * 3, |m| m.full_us) > scale * 0.05,
                    false if history.grew_in_each(5, |m| m.swapped_out.min(m.swapped_in)) => {
                        return Some(Cause::Swap);
                    }
                    false => false,
                }
            }
            Rung::Critical => match has_pressure {
                true => history.stalled(SECOND, |m| m.full_us) >= scale * 0.10,
                false => {
                    let long = reading.at.saturating_sub(self.entered) >= SECOND * 5;
                    let red = self.rung == Rung::Critical || (self.rung == Rung::Red && long);
                    if red && history.grew_in_each(5, |m| m.stalls) {
                        return Some(Cause::Reclaim);
                    }
                    false
                }
            },
        };
        found.then_some(Cause::Stalls)
    }
}

/// Whether a condition is looked at to enter a rung or to stay on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Margin {
    None,
    ToLeave,
}

const SECOND: Duration = Duration::from_secs(1);
/// Refaulted pages a second as a share of the pages of files in memory.
const REFAULTS_OF_CACHE: f64 = 0.3;
/// Share of the swap that is a lot, if it is still filling.
const SWAP_USED: f64 = 0.55;
/// The counters count in pages; 4 KiB errs on the safe side where pages are larger.
const PAGE_BYTES: f64 = 4096.0;

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    at: Duration,
    some_us: u64,
    full_us: u64,
    refaults: u64,
    stalls: u64,
    swapped_in: u64,
    swapped_out: u64,
}

/// The last moments, the newest last; a ring, so that a sample allocates nothing.
#[derive(Clone, Debug)]
struct History {
    ring: [Moment; MOMENTS],
    len: usize,
    next: usize,
}

/// At ten samples a second more than the longest window.
const MOMENTS: usize = 64;

impl Default for History {
    fn default() -> History {
        History { ring: [Moment::default(); MOMENTS], len: 0, next: 0 }
    }
}

impl History {
    fn push(&mut self, at: Duration, sample: &MemorySample) {
        let (some_us, full_us) =
            sample.pressure.map_or((0, 0), |p| (p.some.total_us, p.full.total_us));
        let reclaim = sample.reclaim;
        self.ring[self.next] = Moment {
            at,
            some_us,
            full_us,
            refaults: reclaim.refaults,
            stalls: reclaim.stalls,
            swapped_in: reclaim.swapped_in,
            swapped_out: reclaim.swapped_out,
        };
        self.next = (self.next + 1) % MOMENTS;
        self.len = (self.len + 1).min(MOMENTS);
    }

    /// From the newest to the oldest.
    fn backwards(&self) -> impl Iterator<Item = &Moment> {
        (1..=self.len).map(|back| &self.ring[(self.next + MOMENTS - back) % MOMENTS])
    }

    /// The newest moment that is at least `age` older than the last, else the oldest.
    fn before(&self, age: Duration) -> Option<&Moment> {
        let newest = self.backwards().next()?;
        let old = |moment: &&Moment| newest.at.saturating_sub(moment.at) >= age;
        self.backwards().find(old).or_else(|| self.backwards().last())
    }

    /// Growth of a counter per second over `window`.
    fn per_s(&self, window: Duration, counter: impl Fn(&Moment) -> u64) -> f64 {
        let (Some(newest), Some(old)) = (self.backwards().next(), self.before(window)) else {
            return 0.0;
        };
        let seconds = newest.at.saturating_sub(old.at).as_secs_f64();
        if seconds == 0.0 {
            return 0.0;
        }
        // A window that has only begun counts as whole: one short stall is not pressure.
        let grown = counter(newest).saturating_sub(counter(old)) as f64;
        grown / seconds.max(window.as_secs_f64().min(1.0))
    }

    /// Share of the window in which tasks were stalled.
    fn stalled(&self, window: Duration, counter: impl Fn(&Moment) -> u64) -> f64 {
        self.per_s(window, counter) / 1e6
    }

    /// Whether a counter grew in each of the last `seconds` seconds.
    fn grew_in_each(&self, seconds: u32, counter: impl Fn(&Moment) -> u64) -> bool {
        let Some(newest) = self.backwards().next() else { return false };
        let reaches = self
            .backwards()
            .last()
            .is_some_and(|oldest| newest.at.saturating_sub(oldest.at) >= SECOND * seconds);
        let value = |age: u32| match age {
            0 => Some(counter(newest)),
            age => self.before(SECOND * age).map(&counter),
        };
        reaches && (0..seconds).all(|age| value(age) > value(age + 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Pressure, Reclaim, Stall};
    use super::*;

    const TOTAL: u64 = 1_000_000;

    /// A moment of a script: headroom in percent of all memory, and what stalls do from here on.
    #[derive(Clone, Copy, Debug)]
    struct Scene {
        percent: f64,
        /// Shares of time; `None` where the kernel does not count stalls.
        stalls: Option<(f64, f64)>,
        /// Pages a second: refaults, direct reclaim, swapped in and out.
        pages: [u64; 4],
    }

    fn calm(percent: f64) -> Scene {
        Scene { percent, stalls: Some((0.0, 0.0)), pages: [0; 4] }
    }

    /// Runs a script on a clock of its own.
    #[derive(Default)]
    struct Theatre {
        ladder: Ladder,
        at: Duration,
        some_us: f64,
        full_us: f64,
        reclaim: Reclaim,
        exempt: bool,
        swap_used: u64,
    }

    impl Theatre {
        /// `seconds` of a scene in steps of a quarter of a second; the changes with their times.
        fn play(&mut self, scene: Scene, seconds: f64) -> Vec<(f64, Rung, Rung, Cause)> {
            const STEP: f64 = 0.25;
            let mut changes = Vec::new();
            for _ in 0..(seconds / STEP) as usize {
                self.at += Duration::from_secs_f64(STEP);
                let (some, full) = scene.stalls.unwrap_or_default();
                self.some_us += some * STEP * 1e6;
                self.full_us += full * STEP * 1e6;
                let pages = scene.pages.map(|per_s| per_s / 4);
                self.reclaim.refaults += pages[0];
                self.reclaim.stalls += pages[1];
                self.reclaim.swapped_in += pages[2];
                self.reclaim.swapped_out += pages[3];
                let stall = |us: f64| Stall { avg10: 0.0, total_us: us as u64 };
                let sample = MemorySample {
                    total: Bytes(TOTAL),
                    file_cache: Bytes(4096 * 1000),
                    swap_total: Bytes(1000),
                    swap_free: Bytes(1000 - self.swap_used),
                    pressure: scene
                        .stalls
                        .map(|_| Pressure { some: stall(self.some_us), full: stall(self.full_us) }),
                    reclaim: self.reclaim,
                    ..MemorySample::default()
                };
                let reading = Reading {
                    at: self.at,
                    sample: &sample,
                    headroom: Bytes((scene.percent / 100.0 * TOTAL as f64) as u64),
                    exempt: self.exempt,
                };
                if let Some(change) = self.ladder.step(&reading) {
                    changes.push((self.at.as_secs_f64(), change.from, change.to, change.cause));
                }
            }
            changes
        }

        fn rung_after(&mut self, scene: Scene, seconds: f64) -> Rung {
            self.play(scene, seconds);
            self.ladder.rung()
        }
    }

    #[test]
    fn headroom_alone_leads_down_at_once_and_may_skip() {
        let cases = [
            (12.0, Rung::Green),
            (9.9, Rung::Yellow),
            (6.9, Rung::Orange),
            (4.9, Rung::Red),
            (2.9, Rung::Critical),
        ];
        for (percent, rung) in cases {
            let mut theatre = Theatre::default();
            let changes = theatre.play(calm(percent), 0.25);
            assert_eq!(theatre.ladder.rung(), rung, "{percent}");
            assert_eq!(changes.len(), usize::from(rung != Rung::Green));
        }
    }

    #[test]
    fn relief_leads_up_one_by_one_and_service_is_back_within_five_seconds() {
        let mut theatre = Theatre::default();
        theatre.play(calm(1.0), 10.0);
        let start = theatre.at.as_secs_f64();
        let changes = theatre.play(calm(50.0), 60.0);
        let climbs: Vec<(Rung, Rung)> = changes.iter().map(|c| (c.1, c.2)).collect();
        let expected: Vec<(Rung, Rung)> =
            Rung::ALL.windows(2).rev().map(|pair| (pair[1], pair[0])).collect();
        assert_eq!(climbs, expected);
        assert!(changes.iter().all(|c| c.3 == Cause::Relief));
        let times: Vec<f64> = changes.iter().map(|c| c.0 - start).collect();
        assert!(times[1] <= 4.0, "requests are admitted again: {times:?}");
        assert!(times[3] >= 43.0, "caches grow again much later: {times:?}");
    }

    #[test]
    fn room_is_counted_from_where_orange_ends_and_yellow_begins() {
        let room = |headroom| Room::of(Bytes(1000), Bytes(headroom));
        assert_eq!((room(50).missing, room(50).spare), (Bytes(40), Bytes(0)));
        assert_eq!((room(100).missing, room(100).spare), (Bytes(0), Bytes(0)));
        assert_eq!((room(200).missing, room(200).spare), (Bytes(0), Bytes(80)));
    }

    #[test]
    fn a_rung_is_left_only_with_room_to_spare() {
        let mut theatre = Theatre::default();
        theatre.play(calm(4.0), 1.0);
        assert_eq!(theatre.rung_after(calm(6.5), 60.0), Rung::Red);
        assert_eq!(theatre.rung_after(calm(7.5), 5.0), Rung::Orange);
        assert_eq!(theatre.rung_after(calm(8.5), 60.0), Rung::Orange);
        assert_eq!(theatre.rung_after(calm(9.5), 60.0), Rung::Yellow);
        assert_eq!(theatre.rung_after(calm(11.5), 60.0), Rung::Yellow);
        assert_eq!(theatre.rung_after(calm(12.5), 60.0), Rung::Green);
    }

    #[test]
    fn a_new_fall_starts_the_calm_anew() {
        let mut theatre = Theatre::default();
        theatre.play(calm(4.0), 1.0);
        theatre.play(calm(50.0), 1.5);
        theatre.play(calm(4.0), 0.25);
        assert_eq!(theatre.rung_after(calm(50.0), 1.5), Rung::Red);
        assert_eq!(theatre.rung_after(calm(50.0), 1.0), Rung::Orange);
    }

    #[test]
    fn stalls_confirm_what_headroom_suspects() {
        let scene = |percent, some, full| Scene { stalls: Some((some, full)), ..calm(percent) };
        let cases = [
            // Plenty of room: somebody stalls at his own limit.
            (scene(50.0, 0.9, 0.9), Rung::Green),
            (scene(19.0, 0.06, 0.0), Rung::Yellow),
            (scene(19.0, 0.10, 0.09), Rung::Orange),
            (scene(11.0, 0.10, 0.09), Rung::Red),
            (scene(6.5, 0.10, 0.09), Rung::Red),
            (scene(6.5, 0.20, 0.15), Rung::Critical),
        ];
        for (scene, rung) in cases {
            let mut theatre = Theatre::default();
            assert_eq!(theatre.rung_after(scene, 5.0), rung, "{scene:?}");
        }
    }

    #[test]
    fn without_stall_counters_reclaim_and_swap_stand_in() {
        let scene = |percent, pages| Scene { percent, stalls: None, pages };
        let cases = [
            (scene(50.0, [9999, 999, 99, 99]), Rung::Green),
            (scene(19.0, [400, 0, 0, 0]), Rung::Yellow),
            (scene(19.0, [0, 40, 0, 0]), Rung::Orange),
            (scene(11.0, [0, 0, 40, 40]), Rung::Red),
            (scene(11.0, [0, 0, 0, 40]), Rung::Green),
            (scene(6.0, [0, 40, 40, 40]), Rung::Critical),
        ];
        for (scene, rung) in cases {
            let mut theatre = Theatre::default();
            assert_eq!(theatre.rung_after(scene, 20.0), rung, "{scene:?}");
        }
    }

    #[test]
    fn a_full_swap_counts_only_while_it_fills() {
        let mut theatre = Theatre { swap_used: 900, ..Theatre::default() };
        assert_eq!(theatre.rung_after(calm(11.5), 60.0), Rung::Green);
        let filling = Scene { pages: [0, 0, 0, 40], ..calm(11.5) };
        assert_eq!(theatre.rung_after(filling, 2.0), Rung::Red);
    }

    #[test]
    fn loading_is_exempt_from_stalls_but_not_from_headroom() {
        let mut theatre = Theatre { exempt: true, ..Theatre::default() };
        let loading = Scene { stalls: Some((0.9, 0.9)), pages: [9999; 4], ..calm(11.0) };
        assert_eq!(theatre.rung_after(loading, 10.0), Rung::Green);
        assert_eq!(theatre.rung_after(Scene { percent: 6.0, ..loading }, 1.0), Rung::Orange);
    }

    fn scene() -> impl Strategy<Value = (Scene, f64)> {
        let stalls = proptest::option::of((0.0..0.3_f64, 0.0..0.2_f64));
        let pages = proptest::array::uniform4(prop_oneof![Just(0_u64), 0..2000_u64]);
        (0.0..30.0_f64, stalls, pages, 0.25..40.0_f64).prop_map(
            |(percent, stalls, pages, seconds)| (Scene { percent, stalls, pages }, seconds),
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_ladder_neither_swings_nor_sticks(scenes in proptest::collection::vec(scene(), 1..20)) {
            let mut theatre = Theatre::default();
            let mut rung = Rung::Green;
            let mut changed = 0.0;
            let mut greens = Vec::new();
            for (scene, seconds) in scenes {
                for (at, from, to, cause) in theatre.play(scene, seconds) {
                    // Acts and undos balance: each change begins where the last one ended.
                    prop_assert_eq!(from, rung);
                    if cause == Cause::Relief {
                        prop_assert_eq!(to.number() + 1, from.number());
                        prop_assert!(at - changed >= from.hold().as_secs_f64() - 0.01);
                    } else {
                        prop_assert!(to > from);
                    }
                    if to == Rung::Green {
                        greens.push(at);
                    }
                    (rung, changed) = (to, at);
                }
                let asked = HEADROOM_PERCENT.iter().find(|(_, limit)| scene.percent < *limit);
                prop_assert!(theatre.ladder.rung() >= asked.map_or(Rung::Green, |(rung, _)| *rung));
            }
            prop_assert!(greens.windows(2).all(|pair| pair[1] - pair[0] >= 30.0));
            theatre.play(calm(50.0), 60.0);
            prop_assert_eq!(theatre.ladder.rung(), Rung::Green);
        }
    }
}
