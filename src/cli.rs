//! The command line: one file per subcommand.

/// As the standard library's, but a reader that has gone (`scoutd inspect … | head`) is no reason to panic.
macro_rules! println {
    () => { $crate::cli::print_line(format_args!("")) };
    ($($arguments:tt)*) => { $crate::cli::print_line(format_args!($($arguments)*)) };
}

mod ask;
mod bench;
mod chat;
mod convert;
mod doctor;
mod inspect;
mod list;
mod machine;
mod options;
mod plan;
mod pool;
mod pull;
mod rm;
mod serve;
mod terminal;
mod trace;
mod verify;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::daemon::StartError;

/// A resident language model for the house: INT4 inference, memory headroom, HTTP and MQTT.
#[derive(Parser)]
#[command(name = "scoutd", version, about, long_about = None, args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Without a subcommand the daemon starts with its built-in model, broker and loopback addresses.

Examples:
  scoutd                                   start the daemon and print how to ask it
  scoutd serve --model llama-3.2-1b.gguf   the same with another model
  scoutd ask \"Turn on the kitchen light\"   one question, one answer, no daemon
  scoutd chat --model smollm2.gguf         a conversation in the terminal
  scoutd pull owner/model-GGUF:Q4_0        load a model from the Hugging Face hub
  scoutd convert ./checkpoint --type q4_0 --out model.gguf
  scoutd verify model.gguf --against ./checkpoint

Exit status: 0 success, 1 failure, 64 wrong usage or configuration, 69 no usable model.")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Args,
}

#[derive(Subcommand)]
enum Command {
    /// Start the daemon
    Serve(serve::Args),
    /// Ask one question and print the answer, without a daemon
    Ask(ask::Args),
    /// Hold a conversation in the terminal, without a daemon
    Chat(chat::Args),
    /// Measure the speed of a model, or with --machine what this machine's memory and disk give
    Bench(bench::Args),
    /// Convert a Hugging Face checkpoint or a GGUF file to quantized GGUF
    Convert(convert::Args),
    /// Show what is in a GGUF file
    Inspect(inspect::Args),
    /// Load a model from the Hugging Face hub into the store
    Pull(pull::Args),
    /// List the models of the store
    List(list::Args),
    /// Delete a model of the store
    Rm(rm::Args),
    /// Show and change the pool of a running daemon
    Pool(pool::Args),
    /// Tell whether a model will fit, how fast it would be, and what would fit instead
    Plan(plan::Args),
    /// Show which experts a mixture of experts uses, and what keeping some of them in memory gives
    Trace(trace::Args),
    /// Compare a quantized file with what it was made from: the quality gate
    Verify(verify::Args),
    /// Look at what this system offers for memory, disk and clock, and say what is lost where something is missing
    Doctor(doctor::Args),
}

/// Wrong usage or configuration (`EX_USAGE`).
const EXIT_USAGE: u8 = 64;
/// No usable model (`EX_UNAVAILABLE`).
const EXIT_NO_MODEL: u8 = 69;

/// A mistake of whoever typed the command or wrote the configuration.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    let result = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(args) => serve::run(args),
        Command::Ask(args) => ask::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Pull(args) => pull::run(args),
        Command::List(args) => list::run(args),
        Command::Rm(args) => rm::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Pool(args) => pool::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("scoutd: {error:#}");
        exit_code(&error)
    })
}

/// One line on standard output. Nobody reading on is no error; any other is told, and the command goes on.
fn print_line(line: fmt::Arguments<'_>) {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("scoutd: cannot write to standard output: {error}");
        }
        _ => {}
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<StartError>() {
        Some(StartError::Model { .. }) => return ExitCode::from(EXIT_NO_MODEL),
        Some(StartError::Config(_)) => return ExitCode::from(EXIT_USAGE),
        _ => {}
    }
    if error.is::<Usage>() { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
}
