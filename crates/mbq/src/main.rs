//! `mbq`: calibrates, quantizes and measures the language model of a checkpoint, shows what was found, and answers with it.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nics_core::cli::{LogArgs, main_exit};

/// MBQ: quantization that weighs errors on images by what they matter to answers.
#[derive(Parser)]
#[command(name = "mbq", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the list that a calibration reads, from captions as they are published
    PrepareData(commands::prepare_data::PrepareData),
    /// Measure how much the training loss reacts to each modality; resumable
    Sensitivity(commands::sensitivity::Measure),
    /// Search scales for a model on captions or texts; resumable
    Calibrate(commands::calibrate::Calibrate),
    /// Make scales of a file that the official code saved
    Import(commands::import::Import),
    /// Quantize a model by a method, or with scales that were searched, and write it as a checkpoint
    Quantize(commands::quantize::Quantize),
    /// Measure a model on benchmarks of questions about images; resumable, in shards
    Eval(commands::eval::Eval),
    /// Answer a prompt about images or text with a packed, an exported or a dense model
    Generate(commands::generate::Generate),
    /// Write a quantized checkpoint in our own layout, which runs packed
    Pack(commands::pack::Pack),
    /// Write a packed checkpoint in a layout that other engines load
    Export(commands::pack::Export),
    /// Measure a decoder of a published shape with random weights, dense and packed
    Bench(commands::bench::Bench),
    /// Show what a calibration has found
    Inspect(commands::inspect::Inspect),
    /// Study nano models: every method at every width
    Study(commands::study::Study),
    /// Train the nano models of a recipe; resumable
    Train(commands::train::Train),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.log.init();
    main_exit(|| match cli.command {
        Command::PrepareData(command) => command.run(cli.log.quiet),
        Command::Sensitivity(command) => command.run(cli.log.quiet),
        Command::Calibrate(command) => command.run(cli.log.quiet),
        Command::Import(command) => command.run(),
        Command::Quantize(command) => command.run(cli.log.quiet),
        Command::Eval(command) => command.run(cli.log.quiet),
        Command::Generate(command) => command.run(cli.log.quiet),
        Command::Pack(command) => command.run(cli.log.quiet),
        Command::Export(command) => command.run(cli.log.quiet),
        Command::Bench(command) => command.run(cli.log.quiet),
        Command::Inspect(command) => command.run(),
        Command::Study(command) => command.run(cli.log.quiet),
        Command::Train(command) => command.run(cli.log.quiet),
    })
}
