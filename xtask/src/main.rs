//! Set-up, tests, training, reproduction and reports of the workspace, as one command: `cargo xtask`.
//!
//! It needs Rust alone, links no libtorch, and sets libtorch up before anything that does.

mod bench;
mod cargo;
mod doctor;
mod process;
mod reproduce;
mod setup;
mod train;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nics_base::cli::main_exit;
use nics_base::interrupt::Interrupt;
use nics_base::shard;

use setup::Kind;
use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version)]
struct Cli {
    /// The workspace, when it is not the one that xtask belongs to
    #[arg(long, global = true, env = "NICS_ROOT", value_name = "DIR", hide = true)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make libtorch ready: download it into the cache once, verify it, link it as .libtorch
    Setup {
        /// The full set with NVIDIA's libraries (5 GB) instead of the CPU's (0.5 GB)
        #[arg(long)]
        cuda: bool,
        /// Download and verify again
        #[arg(long)]
        force: bool,
    },
    /// Say what this machine has of libtorch, CUDA, compilers, Python, caches and disk, and what to mend
    Doctor,
    /// Install a crate's binary so that it finds libtorch from anywhere
    Install {
        /// The crate
        #[arg(value_name = "CRATE")]
        name: String,
    },
    /// Formatting, lints, documentation, dependencies
    Check,
    /// Set up, then run all tests
    Test {
        /// Also those that take long: kills, soaks, fuzzing
        #[arg(long)]
        long: bool,
    },
    /// Train one of the small reference checkpoints again
    Train {
        /// Its name under datasets/nano
        name: String,
        /// More arguments for the training command, behind --
        #[arg(last = true)]
        extra: Vec<String>,
    },
    /// Run experiments and render their report; with no METHOD, of every crate
    Reproduce(reproduce::Args),
    /// Measure speed beside peers and beside the memory's bandwidth
    Bench(bench::Args),
    /// Render the report of a folder again, from the rows in it
    Report {
        /// The folder that `reproduce` wrote
        dir: PathBuf,
    },
    /// Put the finished files of all shards of one run together
    Merge {
        /// The file to write
        #[arg(long, short)]
        out: PathBuf,
        /// The shards: NAME-CONFIG.INDEX-of-COUNT.jsonl
        #[arg(required = true)]
        shards: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    main_exit(|| run(cli))
}

fn run(cli: Cli) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let ws = Workspace::locate(cli.root)?;
    let set_up = || setup::setup(&ws, Kind::Cpu, false, &interrupt);
    match cli.command {
        Task::Setup { cuda, force } => {
            let kind = if cuda { Kind::Cuda } else { Kind::Cpu };
            setup::setup(&ws, kind, force, &interrupt)
        }
        Task::Doctor => doctor::doctor(&ws),
        Task::Install { name } => {
            let folder = cargo::crate_folder(&ws, &name)?;
            set_up()?;
            cargo::install(&ws, &folder, &interrupt)
        }
        Task::Check => {
            set_up()?;
            cargo::check(&ws, &interrupt)
        }
        Task::Test { long } => {
            set_up()?;
            cargo::test(&ws, long, &interrupt)
        }
        Task::Train { name, extra } => train::train(&ws, &name, &extra, &interrupt),
        Task::Reproduce(args) => reproduce::reproduce(&ws, &args, &interrupt),
        Task::Bench(args) => {
            set_up()?;
            bench::bench(&ws, &args, &interrupt)
        }
        Task::Report { dir } => reproduce::render(&dir),
        Task::Merge { out, shards } => {
            let lines = shard::merge(&shards, &out)?;
            println!("{lines} lines of {} shards in {}", shards.len(), out.display());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
