//! Training of small models on one device, resumable to the bit.
//!
//! [`Trainer`] runs AdamW over named parameters with warm-up and cosine, clipping by global norm and gradient
//! accumulation. It knows neither models nor data: a closure turns a [`Micro`] batch into a [`Loss`]. Because what a
//! micro batch holds depends on seed and step alone ([`Micro::rng`]), a run killed at any moment continues from its last
//! saved state to the same weights and the same log as a run that was never killed (at an equal thread count).
//!
//! ```no_run,standalone_crate
//! use nics_core::train::{Hooks, Loss, TrainConfig, Trainer};
//! use nics_core::tch::{Device, Kind, Tensor};
//!
//! let w = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//! let dir = tempfile::tempdir()?;
//! let config = TrainConfig { steps: 200, lr: 0.1, warmup: 10, weight_decay: 0.0, ..TrainConfig::default() };
//! let mut trainer = Trainer::new(vec![("w".into(), w.shallow_clone())], config, (), dir.path())?;
//! // Loss (w - 3)^2, one "token" a batch. Running the same program again would find the work done.
//! trainer.run(&mut |_| Ok(Loss { sum: (&w - 3.).square().sum(Kind::Float), tokens: 1 }), Hooks::default())?;
//! assert!((w.f_double_value(&[0])? - 3.).abs() < 0.05);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | `config` | [`TrainConfig`]: what decides a run's result |
//! | `trainer` | [`Trainer`]: the loop |
//! | `adamw`, `clip`, `schedule` | the optimiser's parts, each after torch or transformers |
//! | `loss` | [`masked_cross_entropy`] |
//! | `scratch` | [`from_scratch`], [`vlm_from_scratch`], [`store`]: the weights that a model begins with, and its checkpoint |
//! | `task`, `words` | [`Workshop`]: a small model from nothing on a [`Task`], and [the files](words) of one whose tokens are words |
//! | `state`, `log` | `state.safetensors` and `metrics.jsonl` in the run's folder |

mod adamw;
mod clip;
mod config;
mod error;
mod log;
mod loss;
mod schedule;
mod scratch;
mod state;
mod task;
mod trainer;
pub mod words;

pub use adamw::{AdamW, AdamWOptions, Moments};
pub use clip::{clip_coefficient, global_norm};
pub use config::TrainConfig;
pub use error::{Result, TrainError};
pub use log::{EvalRow, LogRow, StepRow};
pub use loss::{IGNORED, Loss, masked_cross_entropy};
pub use schedule::Schedule;
pub use scratch::{Named, TRAINING_FILE, from_scratch, is_stored, store, vlm_from_scratch};
pub use state::STATE_FILE;
pub use task::{Stored, Task, Workshop, check_model, check_seeds, share};
pub use trainer::{Hooks, METRICS_FILE, Micro, Progress, Summary, Trainer};
