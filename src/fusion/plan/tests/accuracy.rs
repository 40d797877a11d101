//! F5: how often a vote is right, by counting through the plan and by formula.

use super::{decided, form, setup};
use crate::chat::AnswerForm;
use crate::fusion::{Form, arithmetic, weight};

/// The probability that the heaviest answer is right: members independent, wrong ones each give one of `wrong`
/// answers with equal chance, equal sums go to the answer with the heaviest member, equal ones of these to chance.
fn exact(strengths: &[f64], weights: &[u32], wrong: usize) -> f64 {
    let n = strengths.len();
    let mut sum = 0.0;
    for mask in 0..1_u32 << n {
        let right = |index: usize| mask >> index & 1 == 1;
        let chance: f64 =
            (0..n).map(|i| if right(i) { strengths[i] } else { 1.0 - strengths[i] }).product();
        let of_right: Vec<u32> = (0..n).filter(|i| right(*i)).map(|i| weights[i]).collect();
        let of_wrong: Vec<u32> = (0..n).filter(|i| !right(*i)).map(|i| weights[i]).collect();
        let best = (of_right.iter().sum(), of_right.iter().copied().max().unwrap_or(0));
        sum += chance * spread(&of_wrong, wrong, &mut Vec::new(), best);
    }
    sum
}

/// The chance that `right` wins, over all ways in which the wrong ones agree.
fn spread(left: &[u32], wrong: usize, blocks: &mut Vec<(u32, u32)>, right: (u32, u32)) -> f64 {
    let Some((&weight, rest)) = left.split_first() else {
        let best = blocks.iter().copied().max().unwrap_or((0, 0)).max(right);
        if right != best || right.0 == 0 {
            return 0.0;
        }
        let equal = blocks.iter().filter(|block| **block == best).count();
        return 1.0 / (equal + 1) as f64;
    };
    let one = 1.0 / wrong as f64;
    let mut sum = 0.0;
    for index in 0..blocks.len() {
        let before = blocks[index];
        blocks[index] = (before.0 + weight, before.1.max(weight));
        sum += one * spread(rest, wrong, blocks, right);
        blocks[index] = before;
    }
    let new = (wrong - blocks.len()) as f64 * one;
    if new > 0.0 {
        blocks.push((weight, weight));
        sum += new * spread(rest, wrong, blocks, right);
        blocks.pop();
    }
    sum
}

struct Chance(u64);

impl Chance {
    fn draw(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Shares of right answers over `items`: of the plan, and of each member alone. With the chance `shared` an item's
/// members draw the same luck, and with that chance a wrong one gives the item's common wrong answer.
fn counted(
    strengths: &[f64],
    weights: &[u32],
    wrong: usize,
    shared: f64,
    items: usize,
) -> (f64, Vec<f64>) {
    let mut chance = Chance(2026);
    let number: Form = form(&AnswerForm::Number);
    let mut right = 0;
    let mut alone = vec![0; strengths.len()];
    for item in arithmetic(11, items) {
        let truth: i64 = item.truth.parse().expect("a number");
        let luck = (chance.draw() < shared).then(|| chance.draw());
        let common = 1 + (chance.draw() * wrong as f64) as i64;
        let answers: Vec<String> = strengths
            .iter()
            .enumerate()
            .map(|(index, strength)| {
                let draw = chance.draw();
                if luck.unwrap_or(draw) < *strength {
                    alone[index] += 1;
                    return truth.to_string();
                }
                let own = 1 + (chance.draw() * wrong as f64) as i64;
                let off = if chance.draw() < shared { common } else { own };
                (truth + off).to_string()
            })
            .collect();
        let mut order: Vec<usize> = (0..strengths.len()).collect();
        order.sort_by_key(|_| (chance.draw() * 1e9) as u64);
        let decision = decided(setup(weights, number.clone()), &answers, &order);
        right += usize::from(decision.text == item.truth);
    }
    let share = |count: usize| count as f64 / items as f64;
    (share(right), alone.into_iter().map(share).collect())
}

fn items(slow: usize) -> usize {
    if std::env::var("SCOUTD_SLOW_TESTS").is_ok() { slow } else { 2000 }
}

fn check(name: &str, strengths: &[f64], weights: &[u32], wrong: usize, reference: f64) {
    let items = items(20_000);
    let formula = exact(strengths, weights, wrong);
    let (counted, _) = counted(strengths, weights, wrong, 0.0, items);
    let sigma = (formula * (1.0 - formula) / items as f64).sqrt();
    println!("| {name} | {reference:.2} | {formula:.4} | {counted:.4} |");
    assert!((counted - formula).abs() <= 3.0 * sigma, "{name}: {counted} is not {formula}");
    assert!((formula - reference).abs() <= 0.0101, "{name}: {formula} is not {reference}");
}

#[test]
fn f5_votes_of_equal_members_are_as_right_as_the_formula_says() {
    println!("| members, wrong answers | fusion.md | formula | counted |\n|---|---|---|---|");
    for (strength, wrong, expected) in [
        (0.4, 10, [0.48, 0.64, 0.73]),
        (0.5, 10, [0.61, 0.78, 0.87]),
        (0.6, 10, [0.73, 0.88, 0.95]),
        (0.7, 10, [0.84, 0.95, 0.98]),
        (0.6, 1, [0.65, 0.68, 0.71]),
    ] {
        for (n, expected) in [3, 5, 7].into_iter().zip(expected) {
            let name = format!("{n} of {strength}, {wrong}");
            check(&name, &vec![strength; n], &vec![693; n], wrong, expected);
        }
    }
}

#[test]
fn f5_votes_of_unequal_members_are_as_right_as_the_formula_says() {
    println!("| members, weights | fusion.md | formula | counted |\n|---|---|---|---|");
    for (strengths, plural, ten, two) in [
        (&[0.8, 0.4, 0.4][..], 0.66, 0.80, 0.80),
        (&[0.75, 0.55, 0.45], 0.72, 0.79, 0.75),
        (&[0.7, 0.6, 0.5], 0.74, 0.78, 0.77),
        (&[0.9, 0.5, 0.5, 0.5, 0.5], 0.88, 0.93, 0.90),
        (&[0.55, 0.5, 0.45, 0.4, 0.35], 0.72, 0.74, 0.68),
    ] {
        let weigh = |wrong: f64| strengths.iter().map(|p| weight(*p, wrong)).collect::<Vec<u32>>();
        check(&format!("{strengths:?}, equal"), strengths, &vec![693; strengths.len()], 10, plural);
        check(&format!("{strengths:?}, W = 10"), strengths, &weigh(10.0), 10, ten);
        check(&format!("{strengths:?}, W = 2"), strengths, &weigh(2.0), 10, two);
    }
}

#[test]
fn f5_with_w_2_shared_errors_do_not_make_the_vote_worse_than_the_best_member() {
    let items = items(20_000);
    println!(
        "| members | shared | best alone | W = 2 | W = 3 | W = 10 |\n|---|---|---|---|---|---|"
    );
    for strengths in
        [&[0.9, 0.5, 0.5, 0.5, 0.5][..], &[0.8, 0.4, 0.4], &[0.7, 0.6, 0.5], &[0.6, 0.6, 0.6]]
    {
        for shared in [0.0, 0.3, 0.5] {
            let run = |wrong: f64| {
                let weights: Vec<u32> = strengths.iter().map(|p| weight(*p, wrong)).collect();
                counted(strengths, &weights, 10, shared, items)
            };
            let (two, alone) = run(2.0);
            let (three, ten) = (run(3.0).0, run(10.0).0);
            let best = alone.into_iter().fold(0.0, f64::max);
            println!("| {strengths:?} | {shared} | {best:.3} | {two:.3} | {three:.3} | {ten:.3} |");
            assert!(two >= best - 0.01, "{strengths:?} at {shared}: {two} against {best}");
        }
    }
}
