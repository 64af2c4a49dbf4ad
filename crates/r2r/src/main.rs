//! `r2r`: writing, talking and serving with two models; labels, routers and what they are worth.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nics_core::cli::{LogArgs, main_exit};

/// R2R: a small model writes, a trained router calls the large one for the tokens that change the path of reasoning.
#[derive(Parser)]
#[command(name = "r2r", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write replies to prompts: one, a file, or JSON Lines; resumable
    Generate(commands::generate::Generate),
    /// Talk with the pair on the terminal
    Chat(commands::chat::Chat),
    /// Answer OpenAI's API over HTTP
    #[cfg(feature = "serve")]
    Serve(commands::serve::Serve),
    /// Measure a pair on a public benchmark; resumable
    Eval(commands::eval::Eval),
    /// Measure what a pair costs and whether routing can be faster
    Bench(commands::bench::Bench),
    /// Make labels: where the small model's token changes what the large one would say; resumable
    Label(commands::label::Label),
    /// Train a router on labels; resumable
    Train(commands::train::Train),
    /// Choose a router's threshold on labels
    Threshold(commands::threshold::Threshold),
    /// Look at routers and convert them
    Router(commands::router::Router),
    /// Train the tiny models of the nano study
    Pair(commands::pair::Pair),
    /// What routing is worth on the nano task, beside everything it is held against
    Study(commands::study::Study),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.log.init();
    main_exit(|| match cli.command {
        Command::Generate(command) => command.run(cli.log.quiet),
        Command::Chat(command) => command.run(),
        #[cfg(feature = "serve")]
        Command::Serve(command) => command.run(),
        Command::Eval(command) => command.run(cli.log.quiet),
        Command::Bench(command) => command.run(cli.log.quiet),
        Command::Label(command) => command.run(cli.log.quiet),
        Command::Train(command) => command.run(cli.log.quiet),
        Command::Threshold(command) => command.run(),
        Command::Router(command) => command.run(),
        Command::Pair(command) => command.run(cli.log.quiet),
        Command::Study(command) => command.run(cli.log.quiet),
    })
}
