//! A linear layer over a few rows, at the shapes of Qwen2.5-0.5B: our kernel, libtorch's product, candle's (f32).
//!
//! A turn goes through so many copies of the weight that none is in a cache when its turn comes again, as in a model.

use anyhow::{Result, bail};
use candle_core::Module as _;
use nics_core::device::dtype_name;
use nics_core::nn::Linear;
use nics_core::seam::Projection as _;
use tch::{Kind, Tensor};

use crate::figure::{Absent, Case, id};
use crate::memory::{WORKING_SET, random};
use crate::peers::libtorch::floats;
use crate::race::{Contender, drop_ok, race, tell, timed};
use crate::settings::{SEED, Settings};

const SUITE: &str = "gemv";
const AXIS: &str = "rows";

fn name(input: i64, output: i64) -> String {
    format!("{input} to {output}")
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    // q, k and v together; gate and up together; down; the head.
    let all = [(896, 1152), (896, 9728), (4864, 896), (896, 151_936)];
    let shapes: &[(i64, i64)] = settings.pick(&all, &all[1..2], &[(96, 72)]);
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
    let rows: &[i64] = settings.pick(&[1, 4, 16], &[1, 16], &[1, 3]);
    for &kind in settings.pick(&kinds[..], &kinds[..2], &kinds[..]) {
        for &(input, output) in shapes {
            let dtype = dtype_name(kind);
            let wanted =
                |rows: i64| settings.wants(&id(SUITE, &dtype, &name(input, output), AXIS, rows as f64));
            if !rows.iter().any(|&r| wanted(r)) {
                continue;
            }
            let weights = Weights::new(settings, kind, input, output)?;
            for &rows in rows.iter().filter(|r| wanted(**r)) {
                tell(settings, &weights.measure(settings, rows)?)?;
            }
        }
    }
    Ok(())
}

/// Copies of one layer, for everybody.
struct Weights {
    kind: Kind,
    input: i64,
    output: i64,
    plain: Vec<Tensor>,
    ours: Vec<Linear>,
    candles: Vec<candle_nn::Linear>,
}

impl Weights {
    fn new(settings: &Settings, kind: Kind, input: i64, output: i64) -> Result<Self> {
        let bytes = (input * output) as usize * kind.elt_size_in_bytes();
        let copies = settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).max(1) as i64;
        let all = random(&[copies, output, input], kind, SEED)?;
        let plain = (0..copies).map(|i| all.f_select(0, i)).collect::<Result<Vec<_>, _>>()?;
        let ours = plain.iter().map(|w| Linear::new(w.shallow_clone(), None)).collect();
        let mut candles = Vec::new();
        if kind == Kind::Float {
            for weight in &plain {
                let size = (output as usize, input as usize);
                let weight = candle_core::Tensor::from_vec(floats(weight)?, size, &candle_core::Device::Cpu)?;
                candles.push(candle_nn::Linear::new(weight, None));
            }
        }
        Ok(Self { kind, input, output, plain, ours, candles })
    }

    fn measure(&self, settings: &Settings, rows: i64) -> Result<Case> {
        let x = random(&[1, rows, self.input], self.kind, SEED + 1)?.f_squeeze_dim(0)?;
        let size = (rows as usize, self.input as usize);
        let candles_x = candle_core::Tensor::from_vec(floats(&x)?, size, &candle_core::Device::Cpu)?;
        let none: Option<&Tensor> = None;
        let copies = self.plain.len() as f64;
        let expected = floats(&self.ours[0].forward(&x)?)?;
        let same = |who: &str, found: &[f32]| {
            let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
            let allowed = largest * if self.kind == Kind::Float { 1e-3 } else { 2e-2 };
            if found.len() != expected.len()
                || found.iter().zip(&expected).any(|(a, b)| (a - b).abs() > allowed)
            {
                bail!("{who} computes another product");
            }
            Ok(())
        };
        same("libtorch", &floats(&x.f_linear(&self.plain[0], none)?)?)?;
        let mut contenders = vec![
            Contender::new("ours", || {
                timed(copies, || self.ours.iter().try_for_each(|layer| drop_ok(layer.forward(&x))))
            }),
            Contender::new("libtorch", || {
                timed(copies, || self.plain.iter().try_for_each(|w| drop_ok(x.f_linear(w, none))))
            }),
        ];
        let mut absent = Vec::new();
        if let Some(first) = self.candles.first() {
            same("candle", &first.forward(&candles_x)?.flatten_all()?.to_vec1::<f32>()?)?;
            contenders.push(Contender::new("candle", || {
                timed(copies, || self.candles.iter().try_for_each(|layer| drop_ok(layer.forward(&candles_x))))
            }));
        } else {
            absent.push(Absent { who: "candle".into(), why: "measured in f32 alone".into() });
        }
        let runs = race(&mut contenders, &settings.short_budget())?;
        let element = self.kind.elt_size_in_bytes() as i64;
        Ok(Case {
            suite: SUITE.into(),
            name: name(self.input, self.output),
            dtype: dtype_name(self.kind),
            x: rows as f64,
            x_label: AXIS.into(),
            per: "product".into(),
            model: format!("linear {} to {}", self.input, self.output),
            threads: settings.threads,
            seed: SEED,
            bytes: Some((self.input * self.output * element) as u64),
            device: None,
            bandwidth: None,
            runs,
            absent,
        })
    }
}
