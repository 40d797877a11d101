//! `scoutd pool`: the members of a running daemon's pool.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args as ClapArgs, Subcommand};

use super::Usage;
use super::options::ConfigOptions;
use crate::egress::{Client, ClientConfig, HeaderMap, Method, Reach, Request, Url, header};
use crate::wire::upstream::{
    CalibrationBody, MemberBody, PoolReport, read_calibration_report, read_error, read_pool_report,
};

/// What `pool` takes.
#[derive(ClapArgs, Debug)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
    /// Where the daemon is [default: the configured HTTP address]
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// File whose first line is the daemon's key, if it wants one; changes need the admin key
    #[arg(long, global = true, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    options: ConfigOptions,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Show the members, how they do, and who else was announced
    Status,
    /// Add a member until it is removed
    Add {
        /// Its name
        name: String,
        /// Where it is, as http://192.168.1.12:11434
        address: String,
        /// What it speaks: scoutd, ollama, openai, dllama
        #[arg(long, default_value = "scoutd")]
        kind: String,
        /// The model to ask for
        #[arg(long, value_name = "NAME")]
        ask_for: Option<String>,
        /// How strong its model is: tiny, small, medium, large
        #[arg(long)]
        tier: Option<String>,
        /// Requests it gets at once
        #[arg(long, value_name = "COUNT")]
        max_in_flight: Option<u16>,
    },
    /// Remove a member
    Remove {
        /// Its name
        name: String,
    },
    /// Ask all members questions whose answers are known, and weigh their votes by how often they are right
    Calibrate {
        /// How many questions of arithmetic, where no list is given
        #[arg(long, default_value_t = 40, value_name = "COUNT")]
        items: u32,
        /// Your own questions: a question, a tab and its answer on each line
        #[arg(long, value_name = "FILE")]
        list: Option<PathBuf>,
        /// What the answers are: text, number, json
        #[arg(long, default_value = "number")]
        form: String,
        /// Seconds for each
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        patience: u64,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let daemon = Daemon::new(&args)?;
    match args.action {
        Action::Status => daemon.show(Method::GET, "/fusion/v1/pool", Vec::new())?,
        Action::Add { name, address, kind, ask_for, tier, max_in_flight } => {
            let member =
                MemberBody { name, kind, url: address, model: ask_for, max_in_flight, tier };
            daemon.show(Method::POST, "/fusion/v1/members", member.write())?;
        }
        Action::Remove { name } => {
            if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
                bail!(Usage(format!("`{name}` is no member's name")));
            }
            daemon.show(Method::DELETE, &format!("/fusion/v1/members/{name}"), Vec::new())?;
        }
        Action::Calibrate { items, list, form, patience } => {
            let asked = CalibrationBody {
                items,
                list: list.as_deref().map(questions).transpose()?.unwrap_or_default(),
                form,
                patience: Duration::from_secs(patience),
            };
            let answer = daemon.ask(Method::POST, "/fusion/v1/calibrate", asked.write())?;
            let lines = read_calibration_report(&answer).context("the answer cannot be read")?;
            println!("{:44} {:8} {:>6} {:>6}", "model", "answers", "right", "asked");
            for line in lines {
                println!("{:44} {:8} {:>6} {:>6}", line.model, line.form, line.right, line.asked);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A running daemon.
struct Daemon {
    url: Url,
    key: Option<String>,
}

impl Daemon {
    fn new(args: &Args) -> anyhow::Result<Daemon> {
        let url = match &args.url {
            Some(url) => url.clone(),
            None => {
                let config = args.options.load()?;
                let Some(address) = config.rest.listen.first() else {
                    bail!(Usage(
                        "the configuration has no HTTP address: name one with --url".into()
                    ));
                };
                format!(
                    "http://{}",
                    address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
                )
            }
        };
        let key = match &args.key_file {
            None => None,
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
                Some(text.lines().next().unwrap_or_default().trim().to_owned())
            }
        };
        Ok(Daemon { url: url.parse().map_err(|error| Usage(format!("{error}")))?, key })
    }

    fn show(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<()> {
        let answer = self.ask(method, path, body)?;
        let report = read_pool_report(&answer).context("the daemon's answer cannot be read")?;
        print(&report);
        Ok(())
    }

    fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut config = ClientConfig::new(Reach::Anywhere);
            config.connect_timeout = Duration::from_secs(5);
            let client = Client::new(config)?;
            let mut headers = HeaderMap::new();
            if let Some(key) = &self.key {
                headers.insert(header::AUTHORIZATION, format!("Bearer {key}").parse()?);
            }
            let url = self.url.with_path(path)?;
            let request = Request { method, url, headers, body: body.into() };
            let mut answer = client.send(request).await.context("is the daemon running?")?;
            let body = answer.body(BODY_MAX).await?;
            if answer.status != 200 {
                bail!(read_error(&body).unwrap_or_else(|| format!("status {}", answer.status)));
            }
            Ok(body)
        })
    }
}

/// The owner's questions with their answers.
fn questions(path: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let line = |(number, line): (usize, &str)| {
        let (question, truth) = line
            .split_once('\t')
            .ok_or_else(|| Usage(format!("{}: line {} has no tab", path.display(), number + 1)))?;
        Ok((question.trim().to_owned(), truth.trim().to_owned()))
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

fn print(report: &PoolReport) {
    let key = match &report.key_fingerprint {
        Some(fingerprint) => format!("key {fingerprint}"),
        None => "no key: other scoutd nodes are neither asked nor let in".to_owned(),
    };
    println!("pool {} ({key})", report.pool);
    println!(
        "{:28} {:8} {:6} {:10} {:>9} {:>8}  {}",
        "member", "kind", "scope", "state", "prefill/s", "decode/s", "last fault"
    );
    for member in &report.members {
        let speed =
            |speed: Option<f64>| speed.map_or("-".to_owned(), |speed| format!("{speed:.1}"));
        println!(
            "{:28} {:8} {:6} {:10} {:>9} {:>8}  {}",
            member.id,
            member.kind,
            member.scope,
            member.state,
            speed(member.prefill_tokens_per_s),
            speed(member.decode_tokens_per_s),
            member.reason.as_deref().unwrap_or("-")
        );
    }
    for candidate in &report.candidates {
        println!(
            "announced: {} at {} by {} (pool {}): {}",
            candidate.name, candidate.url, candidate.source, candidate.pool, candidate.reason
        );
    }
}

/// Bytes of a daemon's answer.
const BODY_MAX: usize = 4 << 20;
