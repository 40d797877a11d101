//! What decided, in bytes that can be compared: no times, no texts, everything in canonical order.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::answer::{canonical, sha256};
use super::judge;
use super::plan::{Decision, Plan};
use crate::chat::Message;

/// What a receipt is made from besides the plan.
pub(super) struct Facts<'a> {
    pub(super) pool: &'a str,
    pub(super) prompt: &'a str,
    pub(super) seed: Option<u64>,
    /// Digests of the members, where they are told.
    pub(super) digests: &'a dyn Fn(usize) -> Option<String>,
    pub(super) judge: Option<String>,
}

/// A receipt as canonical JSON.
pub(super) fn receipt(facts: &Facts<'_>, plan: &Plan, decision: &Decision) -> String {
    let mut members: Vec<(String, Value)> = plan
        .attempts()
        .iter()
        .filter(|attempt| !attempt.ask.fallback)
        .map(|attempt| {
            let end = attempt.end.as_ref();
            let usable = end.and_then(|end| end.usable.as_ref());
            let member = json!({
                "id": attempt.ask.id,
                "digest": (facts.digests)(attempt.ask.member),
                "state": end.map(|end| end.state.as_str()),
                "answer": usable.map(|usable| sha256(usable.text.as_bytes())),
                "weight": attempt.ask.weight,
            });
            (attempt.ask.id.clone(), member)
        })
        .collect();
    members.sort_by(|a, b| a.0.cmp(&b.0));
    let usable: Vec<String> = plan
        .attempts()
        .iter()
        .filter_map(|a| Some(sha256(a.end.as_ref()?.usable.as_ref()?.text.as_bytes())))
        .collect();
    let judge = decision.judged.then(|| {
        let scores = plan.scores().iter().filter(|(hash, _)| usable.contains(hash));
        let scores: Vec<Value> = scores.map(|(hash, milli)| json!([hash, milli])).collect();
        json!({ "digest": facts.judge, "prompt": judge::PROMPT, "scores": scores })
    });
    let value = json!({
        "version": 1,
        "pool": facts.pool,
        "mode_used": decision.mode_used.as_str(),
        "prompt": facts.prompt,
        "seed": facts.seed,
        "form": plan.setup().form.kind(),
        "members": members.into_iter().map(|(_, member)| member).collect::<Vec<_>>(),
        "judge": judge,
        "winner": plan.attempts()[decision.winner].ask.id,
        "output": sha256(decision.text.as_bytes()),
    });
    let mut text = String::new();
    canonical(&value, &mut text);
    text
}

/// SHA-256 of a conversation.
pub(super) fn prompt_hash(messages: &[Message]) -> String {
    let turns: Vec<Value> = messages
        .iter()
        .map(|message| json!([format!("{:?}", message.role), message.content]))
        .collect();
    sha256(Value::from(turns).to_string().as_bytes())
}

/// The last receipts, by the id of their fusion.
#[derive(Debug, Default)]
pub(super) struct Drawer {
    kept: VecDeque<(String, String)>,
}

impl Drawer {
    pub(super) fn put(&mut self, id: String, receipt: String) {
        if self.kept.len() == KEPT_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back((id, receipt));
    }

    pub(super) fn get(&self, id: &str) -> Option<&str> {
        self.kept.iter().find(|(kept, _)| kept == id).map(|(_, receipt)| receipt.as_str())
    }
}

const KEPT_MAX: usize = 256;
