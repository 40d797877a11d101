//! The comparison itself: the reference reads and answers, then the file, position by position.

use std::path::Path;
use std::time::Instant;

use super::calls::{Judged, Said, json_validity, tally};
use super::cases::{Cases, Request};
use super::divergence::{Position, Positions};
use super::error::VerifyError;
use super::report::{Difference, PromptReport, Report, Share, judge};
use super::rows::{Reader, Row, Writer};
use super::runner::Runner;
use super::{Options, Progress, Unit};
use crate::units::TokenId;

/// Compares the models. One is in memory at a time.
pub(super) fn run(
    options: &Options,
    dir: &Path,
    reference: &Path,
    cases: &Cases,
    progress: &dyn Progress,
) -> Result<Report, VerifyError> {
    let started = Instant::now();
    let (subject, asked, first_answers, mut rows) = {
        let mut runner = Runner::open(reference, options)?;
        progress.begin("the reference reads", Unit::Tokens, cases.tokens());
        let mut rows = Writer::create(dir).map_err(VerifyError::io(dir))?;
        let mut keep = |token, logits: &[f32]| {
            rows.write(&Row::new(logits, token)).map_err(VerifyError::io(dir))
        };
        let answers =
            read_all(&mut runner, cases, progress, &mut |_, token, logits| keep(token, logits))?;
        let asked = ask(&mut runner, cases, progress)?;
        read_prompts(&mut runner, &asked, &mut |_, token, logits| keep(token, logits))?;
        (runner.subject(), asked, answers, rows.read_back().map_err(VerifyError::io(dir))?)
    };

    let mut runner = Runner::open(&options.file, options)?;
    progress.begin("the file reads", Unit::Tokens, cases.tokens());
    let mut parts = [Positions::default(), Positions::default()];
    let vocab_len = runner.vocab_len;
    let next = |rows: &mut Reader, token: TokenId, logits: &[f32]| {
        let row = rows.next(vocab_len).map_err(VerifyError::io(dir))?;
        debug_assert_eq!(row.token, token, "both read the same");
        Ok::<_, VerifyError>(Position::new(&row, logits))
    };
    let answers = read_all(&mut runner, cases, progress, &mut |part, token, logits| {
        parts[part as usize].add(next(&mut rows, token, logits)?);
        Ok(())
    })?;
    let mut along = vec![Vec::new(); asked.len()];
    read_prompts(&mut runner, &asked, &mut |index, token, logits| {
        along[index].push(next(&mut rows, token, logits)?);
        Ok(())
    })?;

    let judged: Vec<Judged> = cases
        .requests
        .iter()
        .zip(first_answers.iter().zip(&answers))
        .map(|(request, (reference, file))| judge_one(cases, request, reference, file))
        .collect();
    let calls = tally(&judged);
    let differences = cases.requests.iter().zip(&judged).zip(first_answers.iter().zip(&answers));
    let differences = differences.filter_map(|((request, judged), (reference, file))| {
        difference(request, judged, reference, file)
    });
    let differences = differences.collect();
    let each_prompt = asked.iter().zip(&along).map(|(asked, along)| asked.report(cases, along));
    let each_prompt: Vec<PromptReport> = each_prompt.collect();
    let mut prompts = Positions::default();
    along.into_iter().flatten().for_each(|position| prompts.add(position));
    let [text, answers] = parts.map(|part| part.likeness());
    let gate = judge(&options.gate, text.as_ref(), answers.as_ref(), &calls);
    Ok(Report {
        file: runner.subject(),
        reference: subject,
        arithmetic: match options.exact {
            true => "exact: activations and cache in F32",
            false => "as served: activations rounded to 8 bits for quantized weights, cache in F16",
        },
        text,
        answers,
        prompts: prompts.likeness(),
        each_prompt,
        calls,
        differences,
        passed: gate.iter().all(|check| check.passed),
        gate,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What a scored position belongs to.
#[derive(Clone, Copy)]
enum Part {
    Text = 0,
    Answers = 1,
}

/// Shows each scored token with the logits that foretold it.
type Show<'a, K> = dyn FnMut(K, TokenId, &[f32]) -> Result<(), VerifyError> + 'a;

/// Text and expected answers are read, and the model's own answers collected.
fn read_all(
    runner: &mut Runner,
    cases: &Cases,
    progress: &dyn Progress,
    show: &mut Show<'_, Part>,
) -> Result<Vec<String>, VerifyError> {
    for window in &cases.windows {
        let first = cases.window_first_scored() - 1;
        runner.read(&window[..window.len() - 1], first, |at, logits| {
            show(Part::Text, window[at + 1], logits)
        })?;
        progress.passed(window.len() as u64);
    }
    let mut answers = Vec::with_capacity(cases.requests.len());
    for request in &cases.requests {
        let expected = &request.expected;
        let tokens = [&request.prompt[..], &expected[..expected.len() - 1]].concat();
        let from = request.prompt.len();
        runner.read(&tokens, from - 1, |at, logits| {
            show(Part::Answers, expected[at + 1 - from], logits)
        })?;
        let answer = runner.answer(&request.prompt, request.answer_tokens_max(), cases.stops())?;
        answers.push(cases.tokenizer.decode(&answer));
        progress.passed(request.tokens());
    }
    Ok(answers)
}

/// A prompt with the reference's answer.
struct Asked<'a> {
    text: &'a str,
    prompt: &'a [TokenId],
    /// Never empty: a stop token if the reference had nothing to say.
    answer: Vec<TokenId>,
}

impl Asked<'_> {
    fn report(&self, cases: &Cases, along: &[Position]) -> PromptReport {
        let count = along.len().max(1) as f64;
        let difference = |p: &Position| (p.reference - p.file).abs();
        PromptReport {
            prompt: self.text.to_owned(),
            answer: cases.tokenizer.decode(&self.answer),
            mean_divergence: along.iter().map(|p| p.divergence).sum::<f64>() / count,
            max_difference: along.iter().map(difference).fold(0.0, f64::max),
            same_top: Share::new(along.iter().filter(|p| p.same_top).count(), along.len()),
        }
    }
}

fn ask<'a>(
    runner: &mut Runner,
    cases: &'a Cases,
    progress: &dyn Progress,
) -> Result<Vec<Asked<'a>>, VerifyError> {
    let mut asked = Vec::with_capacity(cases.prompts.len());
    for prompt in &cases.prompts {
        let mut answer =
            runner.answer(&prompt.tokens, super::cases::PROMPT_ANSWER_TOKENS, cases.stops())?;
        if answer.is_empty() {
            answer.extend(cases.stops().first().or(prompt.tokens.last()));
        }
        asked.push(Asked { text: &prompt.text, prompt: &prompt.tokens, answer });
        progress.passed(prompt.tokens.len() as u64);
    }
    Ok(asked)
}

fn read_prompts(
    runner: &mut Runner,
    asked: &[Asked<'_>],
    show: &mut Show<'_, usize>,
) -> Result<(), VerifyError> {
    for (index, Asked { prompt, answer, .. }) in asked.iter().enumerate() {
        let tokens = [prompt, &answer[..answer.len() - 1]].concat();
        let from = prompt.len();
        runner.read(&tokens, from - 1, |at, logits| show(index, answer[at + 1 - from], logits))?;
    }
    Ok(())
}

fn difference(
    request: &Request,
    judged: &Judged,
    reference: &str,
    file: &str,
) -> Option<Difference> {
    let broken_json = judged.file_json == Some(false);
    let differs = judged.reference_right != judged.file_right || broken_json;
    differs.then(|| Difference {
        request: request.words.clone(),
        expected: request.answer.clone(),
        reference: reference.to_owned(),
        file: file.to_owned(),
        lost: judged.reference_right && !judged.file_right,
        broken_json,
    })
}

fn judge_one(cases: &Cases, request: &Request, reference: &str, file: &str) -> Judged {
    let tools = &cases.tools_of(request);
    let right = |answer: &str| Said::parse(answer, tools).is(&request.said);
    Judged {
        wants_call: !request.said.calls.is_empty(),
        reference_right: right(reference),
        file_right: right(file),
        reference_json: json_validity(reference, tools),
        file_json: json_validity(file, tools),
    }
}
