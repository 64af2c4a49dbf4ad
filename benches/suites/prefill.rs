//! Reading a prompt: 512 new tokens of one sequence, to the logits of the last.

use anyhow::Result;
use nics_core::device::dtype_name;
use nics_core::models::Model;
use tch::Kind;

use crate::figure::{Case, id};
use crate::peers::{Field, Past, agree};
use crate::race::{Contender, race, tell};
use crate::settings::{SEED, Settings};
use crate::shapes::{Shape, ids};

const SUITE: &str = "prefill";
const NAME: &str = "batch 1";
const AXIS: &str = "prompt (tokens)";

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let shape = Shape::of(settings)?;
    let rows = settings.pick(512, 512, 24);
    for kind in [Kind::Float, Kind::BFloat16] {
        let dtype = dtype_name(kind);
        if !settings.wants(&id(SUITE, &dtype, NAME, AXIS, rows as f64)) {
            continue;
        }
        let mut field = Field::gather(settings, &shape, kind)?;
        let (absent, vocab) = (field.absent.clone(), field.ours.model().dims().vocab);
        let mut peers = field.everybody(|_| true);
        let prompt = ids(vocab, rows, SEED);
        for peer in &mut peers {
            peer.begin(1, &Past::none(), rows)?;
        }
        agree(&mut peers, kind, &prompt)?;
        let mut contenders: Vec<Contender> = peers
            .into_iter()
            .map(|peer| {
                let prompt = &prompt;
                Contender::new(peer.name(), move || {
                    peer.begin(1, &Past::none(), rows)?;
                    peer.call(prompt)
                })
            })
            .collect();
        let runs = race(&mut contenders, &settings.budget())?;
        let case = Case {
            suite: SUITE.into(),
            name: NAME.into(),
            dtype,
            x: rows as f64,
            x_label: AXIS.into(),
            per: "prompt".into(),
            model: shape.name.into(),
            threads: settings.threads,
            seed: SEED,
            // Arithmetic is the limit, not memory.
            bytes: None,
            device: None,
            bandwidth: None,
            runs,
            absent,
        };
        tell(settings, &case)?;
    }
    Ok(())
}
