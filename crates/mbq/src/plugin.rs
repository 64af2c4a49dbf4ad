//! The method under a name: `--weights mbq:FOLDER`.

use nics_core::checkpoint::Checkpoint;
use nics_core::seam::Plugin;

use crate::packed::{Act, open};
use crate::{Error, Result};

/// `--weights mbq:FOLDER[,act=8|16|dense]`: weights of a quantized checkpoint, ours or in the layout of AutoAWQ, GPTQ or
/// compressed-tensors, which are never held dense. Without a folder it is the model's own checkpoint that is read so.
///
/// The folder has norms and scales that belong to its weights, so that it is read in place of the model's checkpoint; its
/// architecture has to be the same.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mbq;

/// The folder, where one is named, and how inputs are rounded.
fn parse(spec: &str) -> Result<(Option<&str>, Option<Act>)> {
    let (folder, act) = match spec.rsplit_once("act=") {
        Some((before, act)) if before.is_empty() || before.ends_with(',') => {
            (before.strip_suffix(',').unwrap_or(before), Some(act.parse()?))
        }
        _ => (spec, None),
    };
    Ok((Some(folder).filter(|f| !f.is_empty()), act))
}

fn checkpoint(model: Option<&Checkpoint>, spec: &str) -> Result<Checkpoint> {
    let (folder, act) = parse(spec)?;
    let Some(folder) = folder else {
        let model =
            model.ok_or_else(|| Error::Input("neither a folder nor a model is given: mbq:FOLDER".into()))?;
        if !model.is_quantized() {
            return Err(Error::Input(format!(
                "{} is not quantized: name a folder, mbq:FOLDER",
                model.name()
            )));
        }
        return open(model.clone(), act);
    };
    let quantized = Checkpoint::open(folder)?;
    if let Some(model) = model.filter(|m| m.arch_hash() != quantized.arch_hash()) {
        return Err(Error::Input(format!("its architecture is not that of {}", model.name())));
    }
    open(quantized, act)
}

impl Plugin for Mbq {
    fn name(&self) -> &'static str {
        "mbq"
    }

    fn checkpoint(&self, model: Option<&Checkpoint>, spec: &str) -> nics_core::Result<Option<Checkpoint>> {
        // Without a specification a checkpoint that is quantized asked for us, not a flag.
        let flag = if spec.is_empty() { String::new() } else { format!("--weights mbq:{spec}: ") };
        let wrong = |e| nics_core::Error::Input(format!("{flag}{e}"));
        checkpoint(model, spec).map(Some).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_and_how_inputs_are_rounded() {
        assert_eq!(parse("a,b").unwrap(), (Some("a,b"), None));
        assert_eq!(parse("dir,act=8").unwrap(), (Some("dir"), Some(Act::Bits8)));
        assert_eq!(parse("act=dense").unwrap(), (None, Some(Act::Dense)));
        assert_eq!(parse("fact=8").unwrap(), (Some("fact=8"), None));
        assert!(parse("dir,act=4").unwrap_err().to_string().contains("8, 16 or dense"));
    }
}
