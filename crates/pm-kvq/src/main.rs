//! `pm-kvq`: plans, calibrates, writes and measures with caches that step down in width.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nics_core::cli::{LogArgs, main_exit};

/// PM-KVQ: a KV cache that starts precise and steps down in width as memory fills, for long chains of thought.
#[derive(Parser)]
#[command(name = "pm-kvq", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Foretell from a config.json alone at how many tokens each width begins, and what memory it takes
    Plan(commands::plan::Plan),
    /// Write replies to prompts: one, a file, or JSON Lines; resumable
    Generate(commands::generate::Generate),
    /// Measure on texts what widths and key scales a model needs; resumable
    Calibrate(commands::calibrate::Calibrate),
    /// Choose the width of each layer from a sensitivity and a budget
    Allocate(commands::allocate::Allocate),
    /// Compare caches on the same model, prompts and seeds; resumable
    Compare(commands::compare::Compare),
    /// Measure a model with a cache on a public benchmark; resumable
    Eval(commands::eval::Eval),
    /// Score the responses of `eval` again
    Judge(commands::eval::JudgeResponses),
    /// Measure decoding with caches at a model's shape
    Bench(commands::bench::Measure),
    /// Train the tiny models of the nano study; resumable
    Train(commands::train::Train),
    /// What caches do to texts of the nano task, the method's beside all rivals
    Study(commands::study::Study),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.log.init();
    main_exit(|| match cli.command {
        Command::Plan(command) => command.run(),
        Command::Generate(command) => command.run(cli.log.quiet),
        Command::Calibrate(command) => command.run(cli.log.quiet),
        Command::Allocate(command) => command.run(),
        Command::Compare(command) => command.run(cli.log.quiet),
        Command::Eval(command) => command.run(cli.log.quiet),
        Command::Judge(command) => command.run(cli.log.quiet),
        Command::Bench(command) => command.run(cli.log.quiet),
        Command::Train(command) => command.run(cli.log.quiet),
        Command::Study(command) => command.run(cli.log.quiet),
    })
}
