//! Which linear layers of a model are quantized: what an evaluation says of the model that it measures, so that nobody takes the
//! figures of a float model for those of a quantized one.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::apply::Summary;
use crate::language::Language;
use crate::operators::Names;
use crate::packed::Opened;

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
    /// Those inside the decoder's layers, by what they are: `dense`, `w3g128`, `w4a8`, …
    pub decoder: BTreeMap<String, Count>,
    /// Those of tower and projector, and the head.
    pub elsewhere: BTreeMap<String, Count>,
}

const DENSE: &str = "dense";

impl Inventory {
    /// Of a model as it was loaded, from `stored` where its checkpoint is quantized, and what was made of its decoder since.
    pub fn of(
        model: &mut Language,
        names: &Names,
        stored: Option<&Opened>,
        rounded: Option<&Summary>,
    ) -> Result<Self> {
        let inside = model.quantized(names);
        // A layer cannot always tell itself: rounded weights are dense, and so are stored ones for which there is no kernel.
        let stored = stored.map(Opened::layers).unwrap_or_default();
        let mut all = Self::default();
        model.model_mut().visit_projections(&mut |path, projection| {
            let here = inside.iter().any(|name| name == path);
            let (kind, weights) = match (rounded.filter(|_| here), stored.get(path)) {
                (Some(summary), _) => (summary.spec.clone(), None),
                (None, Some(made)) => (made.kind.clone(), Some(made.weights)),
                (None, None) => (DENSE.to_owned(), None),
            };
            let of = if here { &mut all.decoder } else { &mut all.elsewhere };
            let count = of.entry(kind).or_default();
            count.layers += 1;
            count.weights += match weights {
                Some(weights) => weights,
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
