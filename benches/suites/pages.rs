//! Decode attention of one layer over a quantized cache, 40 query heads over 8 key/value heads of 128: the fused kernel at
//! each width, libtorch's scaled dot-product attention on the same numbers in bf16 and f32, dequantization followed by it
//! (what simulated quantizers do), and the block formats of everyday use.
//!
//! Beside it, halving the width of such a layer in place on one core, against a table of bytes.
//!
//! Codes are random; the floats that libtorch gets are what the codes mean, so that everybody computes the same. As in
//! `attention`, a turn goes through more memory than caches hold.

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use nics_core::nn::memory::floats as slice;
use nics_kernels::memory::prefer_huge_pages;
use nics_kernels::{Values, ValuesMut, pool};
use pm_kvq::kernel::{Blocks, Heads, Page, PageView, Rows, attend, narrow};
use pm_kvq::shrink::{Shift, shrink_codes};
use pm_kvq::{Bits, pack};
use tch::{Device, Kind, Tensor};

use crate::cached_step;
use crate::figure::{Case, id};
use crate::memory::{WORKING_SET, random};
use crate::peers::libtorch::floats;
use crate::race::{Contender, race, tell, timed};
use crate::settings::{SEED, Settings};

const SUITE: &str = "pages";
const AXIS: &str = "context (tokens)";
const HEADS: Heads = Heads { queries: 40, keys: 8, dim: 128 };
/// Tokens of a page.
const PAGE: usize = 128;
/// Bytes of a block of 32 channels.
const BLOCK8: usize = 34;
const BLOCK4: usize = 18;

fn name(bits: Bits, batch: usize) -> String {
    format!("{} bits, batch {batch}", bits.get())
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let contexts: &[usize] = settings.pick(&[2048, 8192, 32768], &[8192], &[160]);
    let batches: &[usize] = settings.pick(&[1, 8], &[1], &[1, 2]);
    for bits in Bits::ALL.into_iter().rev() {
        for &context in contexts {
            for &batch in batches {
                if settings.wants(&id(SUITE, "bf16", &name(bits, batch), AXIS, context as f64)) {
                    tell(settings, &measure(settings, bits, context, batch)?)?;
                }
            }
        }
    }
    for from in [Bits::B8, Bits::B4] {
        let tokens = settings.pick(32768, 32768, 160);
        if settings.wants(&id(SUITE, "uint8", &halving(from), TOKENS, tokens as f64)) {
            tell(settings, &halve(settings, from, tokens)?)?;
        }
    }
    cached_step::run(settings)
}

const TOKENS: &str = "tokens";

fn halving(from: Bits) -> String {
    format!("{} to {} bits on one core", from.get(), from.get() / 2)
}

/// Halves keys and values of a layer, page by page.
fn halve(settings: &Settings, from: Bits, tokens: usize) -> Result<Case> {
    let (keys, dim) = (HEADS.keys, HEADS.dim);
    let codes = random(&[1, (2 * keys * tokens) as i64, from.bytes(dim) as i64], Kind::Float, SEED)?;
    let codes = codes.f_mul_scalar(127.0)?.f_add_scalar(128.0)?.f_to_kind(Kind::Uint8)?.f_view([-1])?;
    let codes: Vec<u8> = Vec::try_from(&codes)?;
    let page = from.bytes(PAGE * dim);
    let halved = |codes: &mut [u8], one: &dyn Fn(&mut [u8], &mut [f32])| {
        let mut scales = [1f32; PAGE];
        for page in codes.chunks_mut(page) {
            let tokens = page.len() / from.bytes(dim);
            one(page, &mut scales[..tokens]);
        }
    };
    let ours = |page: &mut [u8], scales: &mut [f32]| narrow::halve(from, dim, page, scales);
    let table = |page: &mut [u8], _: &mut [f32]| shrink_codes(Shift::Equivalent, from, dim, page);
    let (mut a, mut b) = (repeated(&codes, 1), repeated(&codes, 1));
    halved(&mut a, &ours);
    halved(&mut b, &table);
    if a != b {
        bail!("the table of bytes gives other codes");
    }
    // What is halved again is other codes: the time does not depend on them.
    let mut contenders = [
        Contender::new("ours", || {
            timed(1.0, || {
                halved(&mut a, &ours);
                Ok(())
            })
        }),
        Contender::new("a table of bytes", || {
            timed(1.0, || {
                halved(&mut b, &table);
                Ok(())
            })
        }),
    ];
    let runs = race(&mut contenders, &settings.short_budget())?;
    Ok(Case {
        suite: SUITE.into(),
        name: halving(from),
        dtype: "uint8".into(),
        x: tokens as f64,
        x_label: TOKENS.into(),
        per: "layer".into(),
        model: format!("keys and values of {keys} heads of {dim}"),
        threads: 1,
        seed: SEED,
        bytes: None,
        device: None,
        bandwidth: None,
        runs,
        absent: Vec::new(),
    })
}

/// `copies` times the same values, in huge pages where the system has them.
fn repeated<T: Copy>(part: &[T], copies: usize) -> Vec<T> {
    let mut all: Vec<T> = Vec::with_capacity(part.len() * copies);
    prefer_huge_pages(all.as_ptr().cast(), size_of_val(part) * copies);
    for _ in 0..copies {
        all.extend_from_slice(part);
    }
    all
}

/// So many copies that they exceed the caches.
fn copies(settings: &Settings, bytes: usize) -> usize {
    settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).clamp(2, 8192)
}

/// Keys or values of a batch, `[batch, key heads, tokens, dim]`, in every form.
struct Kept {
    bits: Bits,
    /// What the codes mean.
    meant: Vec<f32>,
    /// In the native layout; bf16 at 16 bits.
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Kept {
    fn new(bits: Bits, rows: usize, seed: u64) -> Result<Self> {
        let dim = HEADS.dim;
        let noise = random(&[1, (rows * dim) as i64], Kind::Float, seed)?;
        let noise = slice(&noise).context("random numbers are no plain memory")?;
        if bits == Bits::B16 {
            let meant: Vec<f32> = noise.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            let codes = noise.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
            return Ok(Self { bits, meant, codes, scales: Vec::new(), zeros: Vec::new() });
        }
        let levels = bits.levels();
        let numbers: Vec<u8> =
            noise.iter().map(|x| ((x + 1.0) / 2.0 * levels as f32).round() as u8).collect();
        let mut codes = vec![0; bits.bytes(numbers.len())];
        pack::pack(bits, dim, &numbers, &mut codes);
        // Ranges that differ from token to token; scales and zeros that bf16 holds exactly, so that rounding them in
        // libtorch's dequantization shifts nothing.
        let zeros: Vec<f32> = (0..rows).map(|t| 1.0 + (t % 8) as f32 / 8.0).collect();
        let scales: Vec<f32> = zeros.iter().map(|z| 2.0 * z / (levels + 1) as f32).collect();
        let mean = |(i, code): (usize, &u8)| f32::from(*code) * scales[i / dim] - zeros[i / dim];
        let meant = numbers.iter().enumerate().map(mean).collect();
        Ok(Self { bits, meant, codes, scales, zeros })
    }

    /// Bytes that attention reads.
    fn bytes(&self) -> usize {
        self.codes.len() + 4 * (self.scales.len() + self.zeros.len())
    }

    /// The numbers as blocks of 32 behind a scale.
    fn blocks(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.meant.len() / 32 * 34);
        for x in self.meant.chunks_exact(32) {
            let most = x.iter().fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
            if self.bits == Bits::B8 {
                let d = most.abs() / 127.0;
                out.extend(f16::from_f32(d).to_le_bytes());
                out.extend(x.iter().map(|x| ((x / d).round() as i8).cast_unsigned()));
            } else {
                let d = most / -8.0;
                out.extend(f16::from_f32(d).to_le_bytes());
                let code = |x: f32| (x / d + 8.5).clamp(0.0, 15.0) as u8;
                out.extend((0..16).map(|j| code(x[j]) | code(x[j + 16]) << 4));
            }
        }
        out
    }

    /// Pages of every sequence, `[key heads, pages]`: what `view` makes of so many rows from a row on. Within a head they are
    /// taken in no order, as those of a pool lie; softmax does not mind.
    fn pages<'a>(
        batch: usize,
        context: usize,
        view: impl Fn(usize, usize) -> Page<'a>,
    ) -> Vec<Vec<Page<'a>>> {
        let pages = context.div_ceil(PAGE);
        let step = if pages.is_multiple_of(7) { 1 } else { 7 };
        let page = |at: usize, p: usize| {
            let from = p * step % pages * PAGE;
            view(at + from, PAGE.min(context - from))
        };
        let head = |at: usize| (0..pages).map(move |p| (at, p));
        (0..batch)
            .map(|s| {
                (0..HEADS.keys)
                    .flat_map(|h| head((s * HEADS.keys + h) * context))
                    .map(|(at, p)| page(at, p))
                    .collect()
            })
            .collect()
    }
}

/// Copies of keys and values, and the pages in each.
struct Copies {
    keys: Vec<u8>,
    values: Vec<u8>,
    count: usize,
}

impl Copies {
    fn new(settings: &Settings, keys: &[u8], values: &[u8]) -> Self {
        let copies = copies(settings, keys.len() + values.len());
        Self { keys: repeated(keys, copies), values: repeated(values, copies), count: copies }
    }

    /// Keys and values of copy `i`.
    fn of(&self, i: usize) -> [&[u8]; 2] {
        let size = self.keys.len() / self.count;
        [&self.keys[i * size..][..size], &self.values[i * size..][..size]]
    }
}

/// `x` as tensors of `shape`, one for each copy.
fn tensors<T>(x: &[T], copies: usize, shape: &[i64], kind: Kind) -> Result<Vec<Tensor>> {
    let size = x.len() / copies;
    let strides: Vec<i64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    x.chunks_exact(size)
        .map(|x| {
            assert_eq!(shape.iter().product::<i64>() as usize, size);
            // SAFETY: `size` values of `kind`; the caller keeps them for longer than the tensors.
            let blob = unsafe { Tensor::f_from_blob(x.as_ptr().cast(), shape, &strides, kind, Device::Cpu) };
            Ok(blob?)
        })
        .collect()
}

fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let none: Option<&Tensor> = None;
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, none, 0.0, false, None, true)?)
}

/// Codes of the native layout, `[.., bytes of a row]`, as bf16 `[.., dim]`.
fn dequantized(bits: Bits, codes: &Tensor, scales: &Tensor, zeros: &Tensor) -> Result<Tensor> {
    let mut shape = codes.size();
    let last = shape.len() - 1;
    let planes = |parts: Vec<Tensor>, run: i64| -> Result<Tensor> {
        let mut of_runs = shape.clone();
        of_runs[last] /= run;
        of_runs.push(run);
        let parts = parts.iter().map(|p| Ok(p.f_view(&of_runs[..])?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&parts, -2)?)
    };
    let codes = match bits {
        Bits::B4 => {
            planes(vec![codes.f_bitwise_and(15)?, codes.f_bitwise_right_shift_tensor_scalar(4)?], 16)?
        }
        Bits::B2 => {
            let part = |n: i64| Ok(codes.f_bitwise_right_shift_tensor_scalar(2 * n)?.f_bitwise_and(3)?);
            planes((0..4).map(part).collect::<Result<_>>()?, 32)?
        }
        Bits::B8 | Bits::B16 => codes.shallow_clone(),
    };
    shape[last] = HEADS.dim as i64;
    Ok(codes.f_reshape(&shape)?.f_to_kind(Kind::BFloat16)?.f_mul(scales)?.f_sub(zeros)?)
}

fn measure(settings: &Settings, bits: Bits, context: usize, batch: usize) -> Result<Case> {
    let Heads { queries, keys, dim } = HEADS;
    let rows = batch * keys * context;
    let (k, v) = (Kept::new(bits, rows, SEED)?, Kept::new(bits, rows, SEED + 1)?);
    let shape = [batch, keys, context, dim].map(|n| n as i64);
    let q =
        random(&[1, batch as i64, queries as i64, 1, dim as i64], Kind::Float, SEED + 2)?.f_squeeze_dim(0)?;
    let short = q.f_to_kind(Kind::BFloat16)?;
    let q = short.f_to_kind(Kind::Float)?;
    let queries_of_ours = slice(&q).context("the queries are no plain memory")?;
    let scale = (dim as f32).powf(-0.5);

    let codes = Copies::new(settings, &k.codes, &v.codes);
    let (scales, zeros) = (
        [&k, &v].map(|x| repeated(&x.scales, codes.count)),
        [&k, &v].map(|x| repeated(&x.zeros, codes.count)),
    );
    let row = bits.bytes(dim);
    let side = |copy: usize, side: usize, from: usize, tokens: usize| {
        let bytes = &codes.of(copy)[side][from * row..][..tokens * row];
        if bits == Bits::B16 {
            return Rows::of_bytes(bytes, nics_kernels::Kind::Bf16);
        }
        let at = copy * rows + from;
        let (scales, zeros) = (&scales[side][at..][..tokens], &zeros[side][at..][..tokens]);
        Rows::Codes(PageView { bits, tokens, codes: bytes, scales, zeros })
    };
    let ours: Vec<_> = (0..codes.count)
        .map(|c| {
            Kept::pages(batch, context, |from, tokens| Page {
                keys: side(c, 0, from, tokens),
                values: side(c, 1, from, tokens),
            })
        })
        .collect();
    let attended = |pages: &Vec<Vec<Page>>| {
        let mut out = vec![0f32; queries_of_ours.len()];
        let pages: Vec<&[Page]> = pages.iter().map(Vec::as_slice).collect();
        attend(&pool::own(), HEADS, Values::F32(queries_of_ours), scale, &pages, ValuesMut::F32(&mut out));
        out
    };

    let halves = [&k, &v].map(|x| x.meant.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
    let n = copies(settings, 4 * halves[0].len());
    let halves = halves.map(|x| repeated(&x, n));
    let wide = copies(settings, 8 * k.meant.len());
    let floats_of = [&k, &v].map(|x| repeated(&x.meant, wide));
    let in_bf16: Vec<(Tensor, Tensor)> = tensors(&halves[0], n, &shape, Kind::BFloat16)?
        .into_iter()
        .zip(tensors(&halves[1], n, &shape, Kind::BFloat16)?)
        .collect();
    let in_f32: Vec<(Tensor, Tensor)> = tensors(&floats_of[0], wide, &shape, Kind::Float)?
        .into_iter()
        .zip(tensors(&floats_of[1], wide, &shape, Kind::Float)?)
        .collect();

    let narrow = [shape[0], shape[1], shape[2], row as i64];
    let mut coded = Vec::new();
    if bits != Bits::B16 {
        let one = [shape[0], shape[1], shape[2], 1];
        let parameters = |x: &[f32]| {
            Ok::<_, anyhow::Error>(Tensor::f_from_slice(x)?.f_view(one)?.f_to_kind(Kind::BFloat16)?)
        };
        let parameters = [parameters(&k.scales)?, parameters(&k.zeros)?];
        for (k, v) in tensors(&codes.keys, codes.count, &narrow, Kind::Uint8)?.into_iter().zip(tensors(
            &codes.values,
            codes.count,
            &narrow,
            Kind::Uint8,
        )?) {
            coded.push((k, v, parameters.each_ref().map(Tensor::shallow_clone)));
        }
    }
    let after = |(k, v, [s, z]): &(Tensor, Tensor, [Tensor; 2])| -> Result<Tensor> {
        sdpa(&short, &dequantized(bits, k, s, z)?, &dequantized(bits, v, s, z)?)
    };

    let blocks = match bits {
        Bits::B8 | Bits::B4 => Some(Copies::new(settings, &k.blocks(), &v.blocks())),
        Bits::B16 | Bits::B2 => None,
    };
    let block_pages: Vec<_> = blocks
        .iter()
        .flat_map(|blocks| (0..blocks.count).map(move |c| (blocks, c)))
        .map(|(blocks, c)| {
            let block = if bits == Bits::B8 { BLOCK8 } else { BLOCK4 };
            let row = dim / 32 * block;
            let side = |side: usize, from: usize, tokens: usize| {
                let bytes = &blocks.of(c)[side][from * row..][..tokens * row];
                Rows::Blocks(if bits == Bits::B8 { Blocks::Q8(bytes) } else { Blocks::Q4(bytes) })
            };
            Kept::pages(batch, context, |from, tokens| Page {
                keys: side(0, from, tokens),
                values: side(1, from, tokens),
            })
        })
        .collect();

    // Everybody attends to the same.
    let expected = floats(&sdpa(&q, &in_f32[0].0, &in_f32[0].1)?)?;
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let check = |who: &str, found: &[f32], allowed: f32| {
        let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        if found.len() != expected.len() || far.is_nan() || far > allowed * largest {
            bail!("{who} attends to something else: {far} away, values up to {largest}");
        }
        Ok(())
    };
    check("our kernel", &attended(&ours[0]), 1e-3)?;
    check("libtorch in bf16", &floats(&sdpa(&short, &in_bf16[0].0, &in_bf16[0].1)?)?, 3e-2)?;
    if let Some(coded) = coded.first() {
        check("libtorch after dequantization", &floats(&after(coded)?)?, 3e-2)?;
    }
    if let Some(pages) = block_pages.first() {
        check("blocks of 32", &attended(pages), if bits == Bits::B8 { 0.05 } else { 0.5 })?;
    }

    let every = |layers: &[Vec<Vec<Page>>]| {
        timed(layers.len() as f64, || {
            for layer in layers {
                std::hint::black_box(attended(layer));
            }
            Ok(())
        })
    };
    let mut contenders = vec![
        Contender::new("ours", || every(&ours)),
        Contender::new("libtorch bf16", || {
            timed(n as f64, || in_bf16.iter().try_for_each(|(k, v)| sdpa(&short, k, v).map(drop)))
        }),
        Contender::new("libtorch f32", || {
            timed(wide as f64, || in_f32.iter().try_for_each(|(k, v)| sdpa(&q, k, v).map(drop)))
        }),
    ];
    if !coded.is_empty() {
        // Slow: two copies suffice to leave the caches.
        contenders.push(Contender::new("dequantized, libtorch bf16", || {
            timed(2.0, || coded[..2].iter().try_for_each(|layer| after(layer).map(drop)))
        }));
    }
    if blocks.is_some() {
        contenders.push(Contender::new(if bits == Bits::B8 { "ours, q8_0" } else { "ours, q4_0" }, || {
            every(&block_pages)
        }));
    }
    let runs = race(&mut contenders, &settings.short_budget())?;
    drop(contenders);
    Ok(Case {
        suite: SUITE.into(),
        name: name(bits, batch),
        dtype: "bf16".into(),
        x: context as f64,
        x_label: AXIS.into(),
        per: "call".into(),
        model: format!("{queries} query heads over {keys} of {dim}"),
        threads: settings.threads,
        seed: SEED,
        bytes: Some((k.bytes() + v.bytes()) as u64),
        device: None,
        bandwidth: None,
        runs,
        absent: Vec::new(),
    })
}
