//! What can go wrong in training.

use std::path::PathBuf;

/// `Result` with [`TrainError`].
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// What can go wrong in training, one variant for each thing that a caller could act on differently.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting out of its range.
    #[error("training setting {field} = {found}: expected {expected}")]
    Config {
        /// The field of [`TrainConfig`](super::TrainConfig).
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Parameters, losses or labels that cannot be trained with.
    #[error("{0}")]
    Input(String),
    /// A loss or a gradient is not finite; the weights are still those of the step before.
    #[error(
        "step {step}: {what} is not finite ({value}); lower lr, warm up for longer or look at this batch"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// `the loss` or the gradient of a parameter.
        what: String,
        /// What it is.
        value: f64,
    },
    /// The folder holds the state of another run.
    #[error(
        "{} belongs to another run: its {field} is {found}, this run has {expected}; restore the setting, or choose \
         another folder, or delete this one to start again", path.display()
    )]
    ForeignState {
        /// The state file.
        path: PathBuf,
        /// The first setting, identity field or parameter that differs.
        field: String,
        /// What the file has.
        found: String,
        /// What this run has.
        expected: String,
    },
    /// The saved state cannot be read.
    #[error("{} is damaged ({reason}); delete it to start again from the first step", path.display())]
    DamagedState {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Somebody asked to stop. The state is saved.
    #[error("training stopped after step {step} of {steps}")]
    Interrupted {
        /// Steps done.
        step: u64,
        /// Steps to do.
        steps: u64,
        /// [`nics_base::Error::Interrupted`], which asks for the exit code.
        source: nics_base::Error,
    },
    // Not `transparent`, which hides the inner error from whoever looks through the causes for an exit code.
    /// Files, folders and logs.
    #[error("{0}")]
    Base(#[from] nics_base::Error),
    /// The core.
    #[error("{0}")]
    Core(#[from] crate::Error),
    /// An error of the caller's own, from the closures of a run.
    #[error(transparent)]
    Caller(Box<dyn std::error::Error + Send + Sync>),
}

impl From<tch::TchError> for TrainError {
    fn from(e: tch::TchError) -> Self {
        Self::Core(e.into())
    }
}
