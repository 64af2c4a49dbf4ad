//! A whole decode step of Qwen2-7B's shapes whose layers have weights of 3 and 4 bits in groups of 128: our decoder beside
//! itself in bf16 and beside libtorch, all with the same embeddings, norms and head, which stay in bf16.
//!
//! There is one decoder: before a turn its linear layers are exchanged for the contender's. The time of the head alone is a
//! contender too. Errors are those of the logits, beside the same step in bf16.

use std::cell::RefCell;

use anyhow::Result;
use nics_core::models::{self, Model, in_a_layer};
use nics_core::nn::PackedLinear;
use nics_core::nn::memory::floats as slice;
use nics_core::seam::Projection;
use nics_kernels::packed::Rounding;
use tch::{Device, Kind, Tensor};

use crate::figure::{Case, id};
use crate::packed::{GROUP, rounded};
use crate::peers::libtorch::Libtorch;
use crate::peers::ours::Ours;
use crate::peers::{Past, Peer, agree, parameters};
use crate::race::{Contender, drop_ok, race, tell, timed};
use crate::settings::{SEED, Settings, Size};
use crate::shapes::{ids, kept_bytes};

const SUITE: &str = "packed-decode";
const AXIS: &str = "context (tokens)";
const KIND: Kind = Kind::BFloat16;

fn name(batch: usize) -> String {
    format!("batch {batch}")
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let contexts: &[usize] = settings.pick(&[0, 2048], &[0], &[0, 16]);
    let batches: &[usize] = settings.pick(&[1, 4, 16], &[1], &[1, 3]);
    let wanted =
        |batch: usize, context: usize| settings.wants(&id(SUITE, "bf16", &name(batch), AXIS, context as f64));
    if !batches.iter().any(|&b| contexts.iter().any(|&c| wanted(b, c))) {
        return Ok(());
    }
    let mut field = Field::gather(settings)?;
    for &context in contexts {
        if !batches.iter().any(|&b| wanted(b, context)) {
            continue;
        }
        let past = Past::read(field.ours.borrow().model.model(), context, None)?;
        for &batch in batches.iter().filter(|b| wanted(**b, context)) {
            tell(settings, &field.measure(settings, &past, batch)?)?;
        }
    }
    Ok(())
}

/// The linear layers of all layers of a decoder, in the order in which it shows them.
type Linears = Vec<Box<dyn Projection>>;

/// One way to keep them.
struct Form {
    name: String,
    /// Theirs, or somebody else's while these are in the decoder.
    linears: Linears,
    bytes: u64,
}

/// The decoder and the forms of its layers.
struct Forms {
    model: Ours,
    forms: Vec<Form>,
}

impl Forms {
    /// Exchanges the decoder's linear layers with those of a form; a second time puts them back.
    fn swap(&mut self, form: usize) -> Result<()> {
        let mut theirs = self.forms[form].linears.iter_mut();
        self.model.model_mut().visit_projections(&mut |name, projection| {
            if let (true, Some(other)) = (in_a_layer(name), theirs.next()) {
                std::mem::swap(projection, other);
            }
            Ok(())
        })?;
        Ok(())
    }

    /// A step with the layers of a form, or with those in bf16.
    fn call(&mut self, form: Option<usize>, ids: &[i64]) -> Result<f64> {
        let Some(form) = form else { return self.model.call(ids) };
        self.swap(form)?;
        let seconds = self.model.call(ids);
        self.swap(form)?;
        seconds
    }
}

struct Field {
    ours: RefCell<Forms>,
    libtorch: Libtorch,
    name: String,
    /// Bytes of the head, and of the layers in bf16.
    head: u64,
    dense: u64,
}

impl Field {
    fn gather(settings: &Settings) -> Result<Self> {
        let mut shape = models::shape("qwen2-7b", Some(settings.pick(20, 8, 2)))?;
        if settings.size == Size::Miniature {
            let config = &mut shape.config;
            (config.hidden, config.intermediate, config.heads, config.kv_heads) = (128, 256, 2, 1);
            (config.head_dim, config.vocab, config.rope.head_dim) = (64, 320, 64);
        }
        let mut model = models::random(shape.config, Device::Cpu, KIND, SEED)?;
        let weights = parameters(&mut model)?;
        let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
        let sum = |wanted: &dyn Fn(&str) -> bool| {
            weights.iter().filter(|(name, _)| wanted(name)).map(|(_, t)| bytes(t)).sum::<u64>()
        };
        let head = sum(&|name| name.starts_with("lm_head"));
        let dense = sum(&in_a_layer);
        let mut forms = Vec::new();
        for bits in [3, 4] {
            let (mut linears, mut bytes) = (Linears::new(), 0);
            model.visit_projections(&mut |name, projection| {
                if in_a_layer(name) {
                    let layer = packed(&**projection, bits)?;
                    bytes += layer.weight().bytes() as u64;
                    linears.push(Box::new(layer));
                }
                Ok(())
            })?;
            forms.push(Form { name: format!("W{bits} A16"), linears, bytes });
        }
        let libtorch = Libtorch::new(model.config().clone(), weights)?;
        let ours = RefCell::new(Forms { model: Ours::new(model), forms });
        Ok(Self { ours, libtorch, name: shape.name, head, dense })
    }

    fn measure(&mut self, settings: &Settings, past: &Past, batch: usize) -> Result<Case> {
        let (context, budget) = (past.ids.len(), settings.budget());
        let Self { ours, libtorch, name: shape, head, dense } = self;
        let ours = &*ours;
        let dims = ours.borrow().model.model().dims().clone();
        let step_ids = |step: usize| ids(dims.vocab, batch, SEED + 1 + step as u64);
        let forms: Vec<Option<usize>> =
            (0..ours.borrow().forms.len()).map(Some).chain(std::iter::once(None)).collect();
        // The calls that are compared, and two of everybody for every round and the one before them.
        let steps = (1 + 2 * (budget.rounds.end() + 1)) * forms.len();
        let begin = |peer: &mut dyn Peer| peer.begin(batch, past, steps);
        begin(&mut ours.borrow_mut().model)?;
        begin(libtorch)?;
        agree(&mut [&mut ours.borrow_mut().model, libtorch], KIND, &step_ids(0))?;
        let plain = ours.borrow_mut().model.logits()?;
        let mut errors = Vec::new();
        for &form in &forms {
            begin(&mut ours.borrow_mut().model)?;
            ours.borrow_mut().call(form, &step_ids(0))?;
            errors.push(form.is_some().then(|| ours.borrow_mut().model.logits()).transpose()?);
        }
        let hidden = crate::memory::random(&[1, batch as i64, dims.hidden], KIND, SEED)?.f_squeeze_dim(0)?;
        // What a step takes in beside the layers' weights.
        let beside = *head + kept_bytes(&dims, batch * (context + steps / 2));
        let first = ours.borrow().forms[0].bytes;
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let kept: Vec<String> = ours
            .borrow()
            .forms
            .iter()
            .map(|form| format!("{:.2} GB as {}", gigabytes(form.bytes), form.name))
            .collect();
        println!(
            "{shape}: layers {:.2} GB in bf16, {}; the head {:.2} GB, {:.0} % of what the first reads in a step",
            gigabytes(*dense),
            kept.join(", "),
            gigabytes(*head),
            100.0 * *head as f64 / (first + beside) as f64,
        );
        let mut contenders: Vec<Contender> = Vec::new();
        for (&form, logits) in forms.iter().zip(errors) {
            let who = form.map_or("bf16".to_owned(), |f| ours.borrow().forms[f].name.clone());
            let error = logits.map(|logits| relative(&logits, &plain));
            let mut step = 0;
            let turn = move || {
                // The first step after a pause finds cold caches and sleeping threads; decoding is the step after it.
                step += 2;
                ours.borrow_mut().call(form, &step_ids(step - 1))?;
                ours.borrow_mut().call(form, &step_ids(step))
            };
            contenders.push(Contender::new(who, turn).with_error(error));
        }
        let mut step = 0;
        contenders.push(Contender::new("libtorch", move || {
            step += 2;
            libtorch.call(&step_ids(step - 1))?;
            libtorch.call(&step_ids(step))
        }));
        contenders.push(Contender::new("the head alone", || {
            timed(1.0, || drop_ok(ours.borrow().model.model().logits(&hidden)))
        }));
        let runs = race(&mut contenders, &budget)?;
        Ok(Case {
            suite: SUITE.into(),
            name: name(batch),
            dtype: "bf16".into(),
            x: context as f64,
            x_label: AXIS.into(),
            per: "step".into(),
            model: format!("{shape} (random weights)"),
            threads: settings.threads,
            seed: SEED,
            bytes: Some(first + beside),
            runs,
            absent: Vec::new(),
            device: None,
            bandwidth: None,
        })
    }
}

/// The weights of a linear layer on the asymmetric grid.
fn packed(layer: &dyn Projection, bits: u32) -> nics_core::Result<PackedLinear> {
    let dense = layer.dense()?.f_to_kind(Kind::Float)?.f_contiguous()?;
    let (out, input) = dense.size2()?;
    let (codes, scales, zeros) = rounded(bits, GROUP, slice(&dense).unwrap_or_default());
    let groups = [out, input / GROUP as i64];
    PackedLinear::new(
        bits,
        &Tensor::f_from_slice(&codes)?.f_view([out, input])?,
        &Tensor::f_from_slice(&scales)?.f_view(groups)?,
        &Tensor::f_from_slice(&zeros)?.f_view(groups)?,
        layer.bias(),
        Rounding::A16,
        KIND,
    )
}

/// How far logits are from others, as a part of those (L2).
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let sum = |f: &dyn Fn((&f32, &f32)) -> f64| found.iter().zip(expected).map(f).sum::<f64>();
    (sum(&|(a, b)| f64::from(a - b).powi(2)) / sum(&|(_, b)| f64::from(*b).powi(2))).sqrt()
}
