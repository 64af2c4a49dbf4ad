//! A model to be quantized.

use anyhow::Result;
use mbq::artefact::Origin;
use mbq::language::Language;
use mbq::operators::Names;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::ModelArgs;
use nics_core::models;

/// What was loaded.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub model: Language,
    pub names: Names,
    pub origin: Origin,
}

impl Opened {
    pub fn open(args: &ModelArgs) -> Result<Self> {
        args.set_threads()?;
        let checkpoint = Checkpoint::open(&args.model)?;
        let device = args.run_on.device.open()?;
        let kind = args.run_on.dtype.resolve(models::stored_kind(&checkpoint));
        let mut model = Language::load(&checkpoint, device, kind)?;
        let names = model.names()?;
        let origin = Origin::of(&checkpoint)?;
        Ok(Self { checkpoint, model, names, origin })
    }
}
