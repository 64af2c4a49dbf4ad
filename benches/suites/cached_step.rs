//! One new token through the cache of one layer that has become 4 bits wide, stored and attended to: the paged cache beside
//! the reference's packed one, which joins and dequantizes all it holds at every step.
//!
//! Both grow by a token a step and are what they are at this length: nothing is rotated over copies.

use anyhow::{Result, bail};
use nics_core::models::ModelDims;
use nics_core::nn::{Rope, RopeConfig, Rotary};
use nics_core::seam::{KvCache, Mask, Ragged, SeqId, Site};
use pm_kvq::Bits;
use pm_kvq::cache::official::{self, Backend};
use pm_kvq::cache::{CacheConfig, OfficialCache, PagedCache};
use tch::{Device, Kind, Tensor};

use crate::figure::{Case, id};
use crate::memory::random;
use crate::peers::libtorch::floats;
use crate::race::{Contender, race, tell, timed};
use crate::settings::{SEED, Settings};

const SUITE: &str = "pages";
const NAME: &str = "a token stored and attended to, 4 bits";
const AXIS: &str = "context (tokens)";
/// Tokens of a call of the prompt.
const CHUNK: usize = 256;
/// Steps of a turn, one after the other as layers come in decoding.
const STEPS: usize = 8;

/// Measures.
pub fn run(settings: &Settings) -> Result<()> {
    let context = settings.pick(4096, 4096, 512);
    if settings.wants(&id(SUITE, "bf16", NAME, AXIS, context as f64)) {
        tell(settings, &measure(settings, context)?)?;
    }
    Ok(())
}

/// A cache with one sequence.
struct Filled<'a> {
    cache: &'a mut dyn KvCache,
    sequence: SeqId,
    kept: usize,
}

impl Filled<'_> {
    /// Attends with rows that come next.
    fn call(&mut self, dims: &ModelDims, [q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
        let n = q.size()[0] as usize;
        let rows = Ragged::contiguous(&[(self.sequence, self.kept, n)]);
        let rope = rope(dims, &rows)?;
        let input = Tensor::f_zeros([n as i64, dims.hidden], (dims.kind, Device::Cpu))?;
        let scale = (dims.head_dim as f64).powf(-0.5);
        let (mask, want_scores) = (Mask::Causal, None);
        let site = Site { layer: 0, rows: &rows, rope: &rope, input: &input, mask, want_scores, scale };
        let attended = self.cache.attend(&site, q, k, v)?;
        self.kept += n;
        Ok(attended.out)
    }

    /// Seconds of one of [`STEPS`] calls with the same row.
    fn steps(&mut self, dims: &ModelDims, one: &[Tensor; 3]) -> Result<f64> {
        timed(STEPS as f64, || (0..STEPS).try_for_each(|_| self.call(dims, one).map(drop)))
    }
}

fn rope(dims: &ModelDims, rows: &Ragged) -> Result<Rope> {
    let config = RopeConfig::parse(1e4, dims.head_dim, dims.context, None)?;
    Ok(Rotary::new(config, Device::Cpu).rows(rows)?)
}

fn measure(settings: &Settings, context: usize) -> Result<Case> {
    let (heads, kv_heads, head_dim) = (40, 8, 128);
    // A budget for half as many tokens again: more than half full at 8 bits, so at 4 by now.
    let max_len = context * 3 / 2;
    let window = (context / 32).min(128);
    let dims = ModelDims {
        layers: 1,
        hidden: 8,
        intermediate: 8,
        heads,
        kv_heads,
        head_dim,
        vocab: 8,
        context: max_len,
        kind: Kind::BFloat16,
        device: Device::Cpu,
    };
    let part = |n: usize, seed: u64| -> Result<[Tensor; 3]> {
        let of = |heads: i64, seed: u64| {
            random(&[1, n as i64, heads, head_dim], Kind::BFloat16, seed)
                .and_then(|t| Ok(t.f_squeeze_dim(0)?))
        };
        Ok([of(heads, seed)?, of(kv_heads, seed + 1)?, of(kv_heads, seed + 2)?])
    };

    let config: CacheConfig =
        format!("preset=official,min-bits=4,max-len={max_len},window={window}").parse()?;
    let mut paged = PagedCache::new(&dims, &config)?;
    let budget = Bits::B4.bytes(2 * (kv_heads * head_dim) as usize * max_len) as u64;
    let rules = official::Settings {
        backend: Backend::Packed,
        sink: 1,
        window,
        init: Bits::B16,
        group: head_dim,
        budgets: vec![budget],
    };
    let mut packed = OfficialCache::new(&dims, rules)?;
    let (s, r) = (paged.open(max_len)?, packed.open(max_len)?);
    let mut ours = Filled { cache: &mut paged, sequence: s, kept: 0 };
    let mut reference = Filled { cache: &mut packed, sequence: r, kept: 0 };
    for (i, _) in (0..context).step_by(CHUNK).enumerate() {
        let rows = part(CHUNK, SEED + 10 * i as u64)?;
        drop(ours.call(&dims, &rows)?);
        drop(reference.call(&dims, &rows)?);
    }
    let one = part(1, SEED + 7)?;
    let (a, b) = (floats(&ours.call(&dims, &one)?)?, floats(&reference.call(&dims, &one)?)?);
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    let far = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    if far.is_nan() || far > 0.1 * largest {
        bail!("the two caches attend to something else: {far} apart, values up to {largest}");
    }
    let runs = {
        let mut contenders = [
            Contender::new("ours", || ours.steps(&dims, &one)),
            Contender::new("the reference's packed cache", || reference.steps(&dims, &one)),
        ];
        race(&mut contenders, &settings.short_budget())?
    };
    let own = paged.stats(s).first().and_then(|layer| layer.widths);
    let its = packed.layer(r, 0).map(official::LayerState::bits);
    if (own, its) != (Some((Bits::B4, Bits::B4)), Some(Bits::B4)) {
        bail!("the widths are {own:?} and {its:?}, expected 4 bits");
    }
    Ok(Case {
        suite: SUITE.into(),
        name: NAME.into(),
        dtype: "bf16".into(),
        x: context as f64,
        x_label: AXIS.into(),
        per: "step".into(),
        model: format!("{heads} query heads over {kv_heads} of {head_dim}"),
        threads: settings.threads,
        seed: SEED,
        bytes: None,
        device: None,
        bandwidth: None,
        runs,
        absent: Vec::new(),
    })
}
