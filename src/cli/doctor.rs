//! `scoutd doctor`: what this system offers, and what is lost where something is missing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value as Json, json};

use crate::daemon;
use crate::memory::{Finding, MemoryProbe, ProcProbe, Verdict, survey};

/// Options of `scoutd doctor`.
#[derive(clap::Args)]
#[command(after_help = "Exit status: 0 if nothing is bad (notes are no fault), 1 if something is.")]
pub(super) struct Args {
    /// The folder whose disk is looked at [default: where models and figures are kept]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Print the findings as one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the findings.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let folder = args.folder.or_else(daemon::state_folder).unwrap_or_else(|| PathBuf::from("/"));
    let mut findings = survey(Path::new("/"), &folder);
    findings.push(measured());
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Good);
    if args.json {
        let rows: Vec<Json> = findings.iter().map(to_json).collect();
        println!(
            "{:#}",
            json!({"machine": daemon::machine_name(), "verdict": worst.name(), "findings": rows})
        );
    } else {
        println!("{}", daemon::machine_name());
        for finding in &findings {
            print(finding);
        }
    }
    Ok(if worst == Verdict::Bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(finding: &Finding) {
    let Finding { name, found, expected, verdict, consequence } = finding;
    println!("{:<5} {name:<19} {found}", verdict.name());
    if *verdict > Verdict::Good {
        println!("      expected {expected}: {consequence}");
    }
}

fn to_json(finding: &Finding) -> Json {
    json!({
        "name": finding.name, "verdict": finding.verdict.name(), "found": finding.found,
        "expected": finding.expected, "consequence": finding.consequence,
    })
}

/// Whether plans can go by figures of this machine.
fn measured() -> Finding {
    let memory = ProcProbe::new().and_then(|mut probe| probe.sample()).map(|sample| sample.total);
    let record = memory.ok().and_then(daemon::machine_record);
    let (verdict, found, consequence) = match record {
        Some(record) => (Verdict::Good, format!("on {}", record.date), String::new()),
        None => (
            Verdict::Note,
            "never".to_owned(),
            "plans go by published figures of a Raspberry Pi 5; run `scoutd bench --machine`"
                .to_owned(),
        ),
    };
    Finding { name: "measured", found, expected: "once", verdict, consequence }
}
