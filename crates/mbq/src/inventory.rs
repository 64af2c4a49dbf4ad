//! Which linear layers of a model are quantized: what an evaluation says of the model that it measures, so that nobody takes the
//! figures of a float model for those of a quantized one.

use std::collections::BTreeMap;
use std::fmt;

use nics_core::seam::Projection;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::apply::Summary;
use crate::language::Language;
use crate::operators::Names;

/// Linear layers of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// How many.
    pub layers: usize,
    /// Their weights.
    pub weights: u64,
}

/// A model's linear layers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Those inside the decoder's layers, by what they are: `dense`, `w3g128`, …
    pub decoder: BTreeMap<String, Count>,
    /// Those of tower and projector, and the head.
    pub elsewhere: BTreeMap<String, Count>,
}

const DENSE: &str = "dense";

impl Inventory {
    /// Of a model as it was loaded, and what was made of its decoder since.
    pub fn of(model: &mut Language, names: &Names, rounded: Option<&Summary>) -> Result<Self> {
        let inside = model.quantized(names);
        let mut all = Self::default();
        model.model_mut().visit_projections(&mut |path, projection| {
            let here = inside.iter().any(|name| name == path);
            // Rounded weights are dense for the one who looks at the layer alone.
            let kind = match (rounded.filter(|_| here), packed(&**projection)) {
                (Some(summary), _) => summary.spec.clone(),
                (None, Some(kind)) => kind,
                (None, None) => DENSE.to_owned(),
            };
            let of = if here { &mut all.decoder } else { &mut all.elsewhere };
            let count = of.entry(kind).or_default();
            count.layers += 1;
            count.weights += match projection.as_packed() {
                Some(packed) => (packed.weight().out() * packed.weight().input()) as u64,
                None => projection.dense()?.numel() as u64,
            };
            Ok(())
        })?;
        Ok(all)
    }

    /// Whether any linear layer is quantized.
    pub fn is_quantized(&self) -> bool {
        self.decoder.keys().chain(self.elsewhere.keys()).any(|kind| kind != DENSE)
    }
}

/// What a packed layer is, e.g. `w3g128`; a group that is a whole row is `w4row`.
fn packed(projection: &dyn Projection) -> Option<String> {
    let weight = projection.as_packed()?.weight();
    let group =
        if weight.group() == weight.input() { "row".to_owned() } else { format!("g{}", weight.group()) };
    Some(format!("w{}{group}", weight.bits()))
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |of: &BTreeMap<String, Count>| {
            let each = of.iter().map(|(kind, c)| format!("{} {kind}", c.layers));
            let all: Vec<String> = each.collect();
            if all.is_empty() { "none".to_owned() } else { all.join(", ") }
        };
        write!(
            f,
            "linear layers of the decoder: {}; of tower, projector and head: {}",
            list(&self.decoder),
            list(&self.elsewhere)
        )
    }
}
