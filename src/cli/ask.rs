//! `scoutd ask`: one question, one answer, no daemon.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use clap::Args as ClapArgs;

use super::options::ConfigOptions;
use super::terminal::{self, SamplingOptions};
use crate::chat::{Backend, Message, Role};
use crate::daemon::Assembly;

/// What `ask` takes.
#[derive(ClapArgs, Debug)]
pub(super) struct Args {
    /// The question; `-` reads it from standard input
    question: String,
    /// Instructions that stand before the question
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Print token counts and speed to standard error
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    options: ConfigOptions,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
    let question = match args.question.as_str() {
        "-" => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text)?;
            text
        }
        text => text.to_owned(),
    };
    let assembly = Assembly::open(&config)?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(Message::text(Role::System, system));
    }
    messages.push(Message::text(Role::User, question));
    let mut stream = assembly.router.chat(args.sampling.request(messages)?);
    let reply = terminal::print(&mut stream, &mut io::stdout().lock())?;
    writeln!(io::stdout())?;
    if args.stats {
        eprintln!("{}", terminal::stats(&reply.completion));
    }
    Ok(ExitCode::SUCCESS)
}
