//! `scoutd chat`: a conversation in the terminal, no daemon.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args as ClapArgs;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::options::ConfigOptions;
use super::terminal::{self, SamplingOptions};
use crate::chat::{Backend, Message, Role};
use crate::daemon::Assembly;

/// What `chat` takes.
#[derive(ClapArgs, Debug)]
pub(super) struct Args {
    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    options: ConfigOptions,
}

const HELP: &str =
    "Type a message and Enter. /new starts over, /stats shows speed, /quit or Ctrl-D ends.";

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
    let assembly = Assembly::open(&config)?;
    let opening: Vec<Message> =
        args.system.iter().map(|system| Message::text(Role::System, system)).collect();
    let mut messages = opening.clone();
    let mut last = None;
    let mut editor = DefaultEditor::new()?;
    println!("{}", assembly.summary());
    println!("{HELP}");
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error.into()),
        };
        // A full history is no reason to end a conversation.
        let _ = editor.add_history_entry(&line);
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => return Ok(ExitCode::SUCCESS),
            "/help" => println!("{HELP}"),
            "/new" => messages.clone_from(&opening),
            "/stats" => match &last {
                Some(completion) => println!("{}", terminal::stats(completion)),
                None => println!("nothing has been asked yet"),
            },
            text => {
                messages.push(Message::text(Role::User, text));
                let mut stream = assembly.router.chat(args.sampling.request(messages.clone())?);
                match terminal::print(&mut stream, &mut io::stdout().lock()) {
                    Ok(reply) => {
                        writeln!(io::stdout())?;
                        messages.push(reply.turn());
                        last = Some(reply.completion);
                    }
                    Err(error) => {
                        messages.pop();
                        eprintln!("{error:#}");
                    }
                }
            }
        }
    }
}
