//! A linear layer whose weights have 3 or 4 bits, in groups of 128, at the shapes of 7B models: our kernels with activations
//! of 8 and 16 bits beside libtorch's product in bf16 and f32, its own 4-bit product, Q3_K and Q4_K of candle and ggml, and,
//! for several rows, codes that are dequantized and then multiplied.
//!
//! All weights come from the same random numbers, each rounded as its format rounds. An error is how far a result is from
//! the product with *its own* weights in double precision, or, for libtorch's and candle's formats, which have weights of
//! their own, with the numbers before rounding: there it is the error of the format. A turn goes through more copies than
//! caches hold.

use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::Module as _;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use nics_core::nn::memory::floats as slice;
use nics_kernels::packed::{Packed, PackedProduct, Rounding, packed};
use nics_kernels::{Values, ValuesMut, pool};
use tch::{Kind, Tensor};

use crate::figure::{Absent, Case, id};
use crate::memory::{WORKING_SET, random};
use crate::peers::ggml::{FOLDER, Format, Ggml, Layers};
use crate::peers::libtorch::floats;
use crate::race::{Contender, drop_ok, race, tell, timed};
use crate::settings::{SEED, Settings};

const SUITE: &str = "packed";
const AXIS: &str = "rows";
/// Channels that share a scale.
pub const GROUP: usize = 128;
/// Channels in and out: q, k and v together; o; gate or up, down of Qwen2-7B; gate or up of InternLM2-7B.
pub const SHAPES: [[usize; 2]; 5] = [[3584, 4608], [3584, 3584], [3584, 18944], [18944, 3584], [4096, 14336]];
/// Rows from which on libtorch's 4-bit product takes a way that not every processor has the instructions for.
const INT4_ROWS: usize = 128;
/// Rows from which on weights are dequantized panel by panel as well.
const PANEL_ROWS: usize = 64;

/// The name of a case.
pub fn name(bits: u32, [input, output]: [usize; 2]) -> String {
    format!("{bits} bits, {input} to {output}")
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let shapes: &[[usize; 2]] = settings.pick(&SHAPES, &SHAPES[2..3], &[[512, 192]]);
    let rows: &[usize] = settings.pick(&[1, 4, 16, 128, 1024], &[1, 16], &[1, 5]);
    let ggml = Ggml::find(settings.threads)?;
    for &shape in shapes {
        for bits in [3, 4] {
            let wanted =
                |rows: usize| settings.wants(&id(SUITE, "bf16", &name(bits, shape), AXIS, rows as f64));
            if !rows.iter().any(|&r| wanted(r)) {
                continue;
            }
            let layer = Layer::new(settings, bits, shape)?;
            for &rows in rows.iter().filter(|r| wanted(**r)) {
                tell(settings, &layer.measure(settings, ggml.as_ref(), rows)?)?;
            }
        }
    }
    Ok(())
}

/// One layer in every form.
struct Layer {
    bits: u32,
    shape: [usize; 2],
    /// The numbers that all forms are made from, `[out, in]`.
    plain: Vec<f32>,
    /// What our codes mean.
    meant: Vec<f32>,
    ours: Vec<Packed>,
    in_bf16: Vec<Tensor>,
    in_f32: Vec<Tensor>,
    /// Codes a byte each with scales and zeros in bf16, as simulated quantizers keep them.
    coded: Vec<[Tensor; 3]>,
    /// libtorch's own 4 bits: codes, then scales and zeros.
    int4: Vec<[Tensor; 2]>,
    candles: Vec<QMatMul>,
}

/// The asymmetric grid of every group: codes, scales, zeros.
pub fn rounded(bits: u32, group: usize, weights: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let most = ((1u32 << bits) - 1) as f32;
    let (mut codes, mut scales, mut zeros) = (Vec::with_capacity(weights.len()), Vec::new(), Vec::new());
    for group in weights.chunks_exact(group) {
        let low = group.iter().copied().fold(f32::INFINITY, f32::min);
        let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = half::f16::from_f32((high - low).max(1e-5) / most).to_f32();
        let zero = (-low / scale).round_ties_even().clamp(0.0, most);
        codes.extend(group.iter().map(|w| ((w / scale).round_ties_even() + zero).clamp(0.0, most) as u8));
        scales.push(scale);
        zeros.push(zero as u8);
    }
    (codes, scales, zeros)
}

/// So many copies that they exceed the caches.
fn copies(settings: &Settings, bytes: usize) -> usize {
    settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).max(1)
}

/// Copies of a tensor in memory of their own.
fn repeated(settings: &Settings, tensor: &Tensor) -> Result<Vec<Tensor>> {
    let n = copies(settings, tensor.numel() * tensor.kind().elt_size_in_bytes());
    let mut shape = tensor.size();
    shape.insert(0, n as i64);
    let all = Tensor::f_empty(&shape, (tensor.kind(), tensor.device()))?;
    nics_kernels::memory::prefer_huge_pages(
        all.data_ptr().cast_const().cast(),
        all.numel() * all.kind().elt_size_in_bytes(),
    );
    let mut filled = all.shallow_clone();
    filled.f_copy_(tensor)?;
    Ok((0..n as i64).map(|i| all.f_select(0, i)).collect::<Result<_, _>>()?)
}

impl Layer {
    fn new(settings: &Settings, bits: u32, [input, output]: [usize; 2]) -> Result<Self> {
        let weights = random(&[1, output as i64, input as i64], Kind::Float, SEED)?.f_squeeze_dim(0)?;
        let Some(plain) = slice(&weights).map(<[f32]>::to_vec) else {
            bail!("random numbers are no plain memory")
        };
        let (codes, scales, zeros) = rounded(bits, GROUP, &plain);
        let one = Packed::new(bits, [output, input], GROUP, &codes, &scales, &zeros)?;
        let mut meant = vec![0f32; plain.len()];
        one.dequantize(0, &mut meant);
        let n = copies(settings, one.bytes());
        let parameters = |x: &[f32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(x)?.f_view([output as i64, -1, 1])?.f_to_kind(Kind::BFloat16)?)
        };
        let whole: Vec<f32> = zeros.iter().map(|z| f32::from(*z)).collect();
        let (s, z) = (parameters(&scales)?, parameters(&whole)?);
        let by_group = Tensor::f_from_slice(&codes)?.f_view([output as i64, -1, GROUP as i64])?;
        let coded = repeated(settings, &by_group)?;
        let coded = coded.into_iter().map(|c| [c, s.shallow_clone(), z.shallow_clone()]).collect();
        let mut int4 = Vec::new();
        if bits == 4 {
            let codes = Tensor::f_from_slice(&codes)?.f_view([output as i64, input as i64])?;
            let packed = codes.f_to_kind(Kind::Int)?.f_internal_convert_weight_to_int4pack_for_cpu(1)?;
            // (q - 8) s + z with z = (8 - zero) s.
            let shift = s.f_mul(&z.f_neg()?.f_add_scalar(8.0)?)?;
            let both = Tensor::f_cat(&[&s, &shift], -1)?.f_transpose(0, 1)?.f_contiguous()?;
            int4.extend(repeated(settings, &packed)?.into_iter().map(|c| [c, both.shallow_clone()]));
        }
        let format = if bits == 3 { GgmlDType::Q3K } else { GgmlDType::Q4K };
        let mut candles = Vec::new();
        if input.is_multiple_of(format.block_size()) {
            let cpu = candle_core::Device::Cpu;
            let source = candle_core::Tensor::from_vec(plain.clone(), (output, input), &cpu)?;
            let first = QTensor::quantize(&source, format)?;
            let data = first.data()?;
            for _ in 0..copies(settings, data.len()) {
                let copy = qtensor_from_ggml(format, &data, vec![output, input], &cpu)?;
                candles.push(QMatMul::from_qtensor(copy)?);
            }
        }
        Ok(Self {
            bits,
            shape: [input, output],
            meant,
            ours: (0..n).map(|_| one.clone()).collect(),
            in_bf16: repeated(settings, &weights.f_to_kind(Kind::BFloat16)?)?,
            in_f32: repeated(settings, &weights)?,
            plain,
            coded,
            int4,
            candles,
        })
    }

    fn measure(&self, settings: &Settings, ggml: Option<&Arc<Ggml>>, rows: usize) -> Result<Case> {
        let [input, output] = self.shape;
        let short = random(&[1, rows as i64, input as i64], Kind::BFloat16, SEED + 1)?.f_squeeze_dim(0)?;
        let long = short.f_to_kind(Kind::Float)?;
        let x = floats(&long)?;
        let size = (rows, input);
        let candles_x = candle_core::Tensor::from_vec(x.clone(), size, &candle_core::Device::Cpu)?;
        let none: Option<&Tensor> = None;
        let pool = pool::own();

        let ours = |layer: &Packed, rounding: Rounding| {
            let mut y = vec![0f32; rows * output];
            let product = PackedProduct { weight: layer, bias: None, y: ValuesMut::F32(&mut y) };
            packed(&pool, Values::F32(&x), rows, rounding, &mut [product]);
            y
        };
        let dequantized = |[q, s, z]: &[Tensor; 3]| -> Result<Tensor> {
            let w = q.f_to_kind(Kind::BFloat16)?.f_sub(z)?.f_mul(s)?;
            Ok(short.f_linear(&w.f_view([output as i64, input as i64])?, none)?)
        };
        let int4 = |[q, parameters]: &[Tensor; 2]| {
            short.f_internal_weight_int4pack_mm_for_cpu(q, GROUP as i64, parameters)
        };

        // Errors on a few outputs of a few rows suffice.
        let (some_rows, some) = (rows.min(4), output.min(512));
        let error = |who: &str, found: &[f32], weights: &[f32], most: f64| -> Result<Option<f64>> {
            let (mut off, mut size) = (0f64, 0f64);
            for t in 0..some_rows {
                let x = &x[t * input..][..input];
                for (o, weights) in weights.chunks_exact(input).take(some).enumerate() {
                    let sum: f64 = x.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    off += (f64::from(found[t * output + o]) - sum).powi(2);
                    size += sum.powi(2);
                }
            }
            let error = (off / size).sqrt();
            if error.is_nan() || error > most {
                bail!("{who} computes something else: relative error {error}");
            }
            Ok(Some(error))
        };
        // Many rows take their time from arithmetic: a few copies suffice then.
        let turns = |copies: usize| copies.div_ceil(rows).max(2).min(copies);
        let each = |rounding: Rounding| {
            let layers = &self.ours[..turns(self.ours.len())];
            timed(layers.len() as f64, || {
                for layer in layers {
                    std::hint::black_box(ours(layer, rounding));
                }
                Ok(())
            })
        };
        let product = |weights: &[Tensor], x: &Tensor| {
            let weights = &weights[..turns(weights.len())];
            timed(weights.len() as f64, || weights.iter().try_for_each(|w| drop_ok(x.f_linear(w, none))))
        };
        let b = self.bits;
        let a8 = error("A8", &ours(&self.ours[0], Rounding::A8), &self.meant, 0.05)?;
        let a16 = error("A16", &ours(&self.ours[0], Rounding::A16), &self.meant, 1e-3)?;
        let of_bf16 =
            error("libtorch bf16", &floats(&short.f_linear(&self.in_bf16[0], none)?)?, &self.plain, 0.05)?;
        let of_f32 =
            error("libtorch f32", &floats(&long.f_linear(&self.in_f32[0], none)?)?, &self.plain, 1e-3)?;
        let mut contenders = vec![
            Contender::new(format!("W{b} A8"), || each(Rounding::A8)).with_error(a8),
            Contender::new(format!("W{b} A16"), || each(Rounding::A16)).with_error(a16),
            Contender::new("libtorch bf16", || product(&self.in_bf16, &short)).with_error(of_bf16),
            Contender::new("libtorch f32", || product(&self.in_f32, &long)).with_error(of_f32),
        ];
        if rows >= PANEL_ROWS {
            let by_panels = |layer: &Packed| nics_core::nn::by_panels(layer, None, &short);
            let off = error("panels", &floats(&by_panels(&self.ours[0])?)?, &self.meant, 0.05)?;
            contenders.push(
                Contender::new(format!("W{b} bf16 panels"), move || {
                    let layers = &self.ours[..turns(self.ours.len())];
                    timed(layers.len() as f64, || layers.iter().try_for_each(|w| drop_ok(by_panels(w))))
                })
                .with_error(off),
            );
        }
        if rows > 1 {
            let off = error("dequantized", &floats(&dequantized(&self.coded[0])?)?, &self.meant, 0.05)?;
            // Slow: a few copies leave the caches as well.
            let few = &self.coded[..self.coded.len().min(2)];
            contenders.push(
                Contender::new("dequantized, libtorch bf16", || {
                    timed(few.len() as f64, || few.iter().try_for_each(|layer| dequantized(layer).map(drop)))
                })
                .with_error(off),
            );
        }
        let mut absent = Vec::new();
        if rows >= INT4_ROWS && !self.int4.is_empty() {
            let why = format!("libtorch 2.11 ends with an illegal instruction from {INT4_ROWS} rows on here");
            absent.push(Absent { who: "libtorch int4".into(), why });
        } else if let Some(first) = self.int4.first() {
            let off = error("libtorch int4", &floats(&int4(first)?)?, &self.plain, 0.2)?;
            contenders.push(
                Contender::new("libtorch int4", || {
                    let layers = &self.int4[..turns(self.int4.len())];
                    timed(layers.len() as f64, || layers.iter().try_for_each(|w| drop_ok(int4(w))))
                })
                .with_error(off),
            );
        }
        if let Some(first) = self.candles.first() {
            let who = if b == 3 { "candle Q3K" } else { "candle Q4K" };
            let off =
                error(who, &first.forward(&candles_x)?.flatten_all()?.to_vec1::<f32>()?, &self.plain, 0.3)?;
            contenders.push(
                Contender::new(who, || {
                    let layers = &self.candles[..turns(self.candles.len())];
                    timed(layers.len() as f64, || {
                        layers.iter().try_for_each(|w| drop_ok(w.forward(&candles_x)))
                    })
                })
                .with_error(off),
            );
        } else {
            absent
                .push(Absent { who: "candle".into(), why: format!("{input} channels are no blocks of 256") });
        }
        let formats: &[Format] = if b == 3 { &[Format::Q3K] } else { &[Format::Q4K, Format::Q4KInterleaved] };
        match ggml {
            None => absent.push(Absent { who: "ggml".into(), why: format!("{FOLDER} names no folder") }),
            Some(_) if !input.is_multiple_of(256) => {
                absent.push(Absent {
                    who: "ggml".into(),
                    why: format!("{input} channels are no blocks of 256"),
                });
            }
            Some(ggml) => {
                for &format in formats {
                    let all = copies(settings, self.ours[0].bytes());
                    let layers = Layers::new(ggml, format, &self.plain, self.shape, rows, turns(all))?;
                    layers.set(&x);
                    layers.compute()?;
                    let off = error(format.name(), &layers.first(), &self.plain, 0.3)?;
                    contenders.push(
                        Contender::new(format.name(), move || {
                            timed(layers.len() as f64, || layers.compute())
                        })
                        .with_error(off),
                    );
                }
            }
        }
        let runs = race(&mut contenders, &settings.short_budget())?;
        Ok(Case {
            suite: SUITE.into(),
            name: name(b, self.shape),
            dtype: "bf16".into(),
            x: rows as f64,
            x_label: AXIS.into(),
            per: "product".into(),
            model: format!("linear {input} to {output}, groups of {GROUP}"),
            threads: settings.threads,
            seed: SEED,
            bytes: Some(self.ours[0].bytes() as u64),
            device: None,
            bandwidth: None,
            runs,
            absent,
        })
    }
}
