//! A whole decode step: one new token for each sequence, from its id to the logits.

use anyhow::Result;
use nics_core::device::dtype_name;
use nics_core::models::Model;
use tch::Kind;

use crate::figure::{Absent, Case, id};
use crate::peers::{Field, agree};
use crate::race::{Contender, race, tell};
use crate::settings::{SEED, Settings};
use crate::shapes::{Shape, ids, kept_bytes};

const SUITE: &str = "decode";
const AXIS: &str = "context (tokens)";

fn name(batch: usize) -> String {
    format!("batch {batch}")
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let shape = Shape::of(settings)?;
    let contexts: &[usize] = settings.pick(&[0, 2048], &[0, 2048], &[0, 16]);
    let batches: &[usize] = settings.pick(&[1, 4, 16], &[1], &[1, 3]);
    for kind in [Kind::Float, Kind::BFloat16] {
        let dtype = dtype_name(kind);
        let wanted = |context: usize, batch: usize| {
            settings.wants(&id(SUITE, &dtype, &name(batch), AXIS, context as f64))
        };
        if !contexts.iter().any(|&c| batches.iter().any(|&b| wanted(c, b))) {
            continue;
        }
        let mut field = Field::gather(settings, &shape, kind)?;
        for &context in contexts {
            let batches: Vec<usize> = batches.iter().copied().filter(|&b| wanted(context, b)).collect();
            if batches.is_empty() {
                continue;
            }
            let past = field.past(context)?;
            for batch in batches {
                let case = measure(settings, &shape, &mut field, &past, kind, batch)?;
                tell(settings, &case)?;
            }
        }
    }
    Ok(())
}

fn measure(
    settings: &Settings,
    shape: &Shape,
    field: &mut Field,
    past: &crate::peers::Past,
    kind: Kind,
    batch: usize,
) -> Result<Case> {
    let dims = field.ours.model().dims().clone();
    let (context, budget) = (past.ids.len(), settings.budget());
    let mut absent = field.absent.clone();
    // candle reads a past with every sequence, which takes minutes for many of them.
    let candle = batch <= 4 && (context == 0 || batch == 1 || settings.pick(true, false, true));
    if !candle && kind == Kind::Float {
        absent.push(Absent { who: "candle".into(), why: format!("not measured at batch {batch}") });
    }
    let bytes = field.bytes;
    let mut peers = field.everybody(|who| who != "candle" || candle);
    // The call that is compared, and two for every round and the one before them.
    let steps = 1 + 2 * (budget.rounds.end() + 1);
    for peer in &mut peers {
        peer.begin(batch, past, steps)?;
    }
    let step_ids = |step: usize| ids(dims.vocab, batch, SEED + 1 + step as u64);
    agree(&mut peers, kind, &step_ids(0))?;
    let mut contenders: Vec<Contender> = peers
        .into_iter()
        .map(|peer| {
            let mut step = 0;
            Contender::new(peer.name(), move || {
                // The first step after a pause finds cold caches and sleeping threads; decoding is the step after it.
                step += 2;
                peer.call(&step_ids(step - 1))?;
                peer.call(&step_ids(step))
            })
        })
        .collect();
    let runs = race(&mut contenders, &budget)?;
    let mean_context = context + runs[0].seconds.len();
    Ok(Case {
        suite: SUITE.into(),
        name: name(batch),
        dtype: dtype_name(kind),
        x: context as f64,
        x_label: AXIS.into(),
        per: "step".into(),
        model: shape.name.into(),
        threads: settings.threads,
        seed: SEED,
        bytes: Some(bytes + kept_bytes(&dims, batch * mean_context)),
        device: None,
        bandwidth: None,
        runs,
        absent,
    })
}
