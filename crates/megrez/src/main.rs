//! `megrez`: chat, generation, evaluation, training, serving, search, measuring and inspection.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nics_core::cli::{LogArgs, main_exit};

/// Megrez-3B, a bilingual (Chinese and English) language model.
#[derive(Parser)]
#[command(name = "megrez", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Talk with a model on the terminal
    Chat(commands::chat::Chat),
    /// Reply to prompts: one, a file, or JSON Lines; writes JSON Lines, resumable
    Generate(commands::generate::Generate),
    /// Measure a model on a benchmark or on the project's word problems; resumable
    Eval(commands::eval::Eval),
    /// Make result rows out of answered items, e.g. of merged shards
    Rows(commands::eval::Rows),
    /// Train a small model from scratch, or fine-tune a checkpoint; resumable
    Train(commands::train::Train),
    /// Answer OpenAI's API over HTTP
    #[cfg(feature = "serve")]
    Serve(commands::serve::Serve),
    /// Talk with a model that searches the web, or a folder of documents, and cites what it finds
    #[cfg(feature = "agent")]
    Agent(commands::agent::Agent),
    /// Measure how fast a model, real shapes with random weights, or a server is
    #[cfg(feature = "bench")]
    Bench(commands::bench::Bench),
    /// Say what a checkpoint holds
    Inspect(commands::inspect::Inspect),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.log.init();
    main_exit(|| match cli.command {
        Command::Chat(command) => command.run(),
        Command::Generate(command) => command.run(cli.log.quiet),
        Command::Eval(command) => command.run(cli.log.quiet),
        Command::Rows(command) => command.run(),
        Command::Train(command) => command.run(cli.log.quiet),
        #[cfg(feature = "serve")]
        Command::Serve(command) => command.run(),
        #[cfg(feature = "agent")]
        Command::Agent(command) => command.run(),
        #[cfg(feature = "bench")]
        Command::Bench(command) => command.run(cli.log.quiet),
        Command::Inspect(command) => command.run(),
    })
}
