//! The kernels against references in f64 and against their scalar versions, over random shapes, widths and instructions.

use half::{bf16, f16};
use nics_kernels::{Element, Isa, Kind, Pool, Values, ValuesMut};
use pm_kvq::kernel::narrow::{halve_with, quantize_with};
use pm_kvq::kernel::{Blocks, Heads, PIECE, Page, PageView, Rows, attend_with};
use pm_kvq::shrink::{Shift, code, parameters};
use pm_kvq::{Bits, pack};
use proptest::prelude::*;

/// Values of a seed, between -1 and 1.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// How rows of a page are kept.
#[derive(Debug, Clone, Copy)]
enum Form {
    Codes(Bits),
    Exact(Kind),
    Q8,
    Q4,
}

const FORMS: [Form; 8] = [
    Form::Codes(Bits::B8),
    Form::Codes(Bits::B4),
    Form::Codes(Bits::B2),
    Form::Exact(Kind::Bf16),
    Form::Exact(Kind::F16),
    Form::Exact(Kind::F32),
    Form::Q8,
    Form::Q4,
];

/// Rows of a page, owned.
struct Owned {
    form: Form,
    tokens: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
    /// What the rows mean.
    meant: Vec<f64>,
}

impl Owned {
    fn new(form: Form, tokens: usize, dim: usize, group: usize, seed: u64) -> Self {
        let x = random(tokens * dim, seed);
        let mut new = Self {
            form,
            tokens,
            codes: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
            f32: x.clone(),
            bf16: x.iter().map(|x| Element::from_f32(*x)).collect(),
            f16: x.iter().map(|x| Element::from_f32(*x)).collect(),
            meant: Vec::new(),
        };
        match form {
            Form::Exact(Kind::F32) => new.meant = x.iter().map(|x| f64::from(*x)).collect(),
            Form::Exact(Kind::Bf16) => new.meant = new.bf16.iter().map(|x| f64::from(*x)).collect(),
            Form::Exact(Kind::F16) => new.meant = new.f16.iter().map(|x| f64::from(*x)).collect(),
            Form::Q8 | Form::Q4 => {
                for x in x.chunks_exact(32) {
                    let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let levels = if matches!(form, Form::Q8) { 127.0 } else { 7.5 };
                    let d = f16::from_f32(most / levels);
                    new.codes.extend(d.to_le_bytes());
                    let q: Vec<i8> =
                        x.iter().map(|x| (x / d.to_f32()).round().clamp(-128.0, 127.0) as i8).collect();
                    if matches!(form, Form::Q8) {
                        new.codes.extend(q.iter().map(|q| q.cast_unsigned()));
                        new.meant.extend(q.iter().map(|q| f64::from(*q) * f64::from(d)));
                    } else {
                        let q: Vec<u8> = q.iter().map(|q| (*q + 8).clamp(0, 15) as u8).collect();
                        new.codes.extend((0..16).map(|j| q[j] | q[j + 16] << 4));
                        new.meant.extend(q.iter().map(|q| (f64::from(*q) - 8.0) * f64::from(d)));
                    }
                }
            }
            Form::Codes(bits) => {
                let levels = bits.levels() as f32;
                let codes: Vec<u8> = x.iter().map(|x| ((x + 1.0) / 2.0 * levels).round() as u8).collect();
                new.codes = vec![0; bits.bytes(codes.len())];
                pack::pack(bits, dim, &codes, &mut new.codes);
                let n = tokens * dim / group;
                new.scales = random(n, seed ^ 3).iter().map(|x| (x + 1.1) / levels).collect();
                new.zeros = random(n, seed ^ 5);
                let mean = |(i, code): (usize, &u8)| {
                    let g = i / group;
                    f64::from(*code) * f64::from(new.scales[g]) - f64::from(new.zeros[g])
                };
                new.meant = codes.iter().enumerate().map(mean).collect();
            }
        }
        new
    }

    fn rows(&self) -> Rows<'_> {
        match self.form {
            Form::Codes(bits) => Rows::Codes(PageView {
                bits,
                tokens: self.tokens,
                codes: &self.codes,
                scales: &self.scales,
                zeros: &self.zeros,
            }),
            Form::Q8 => Rows::Blocks(Blocks::Q8(&self.codes)),
            Form::Q4 => Rows::Blocks(Blocks::Q4(&self.codes)),
            Form::Exact(Kind::F32) => Rows::Exact(Values::F32(&self.f32)),
            Form::Exact(Kind::Bf16) => Rows::Exact(Values::Bf16(&self.bf16)),
            Form::Exact(Kind::F16) => Rows::Exact(Values::F16(&self.f16)),
        }
    }
}

/// A sequence: `[key heads, pages]`, keys and values.
type Sequence = Vec<(Owned, Owned)>;

/// Attention of one row in f64; also a bound of what the arithmetic of f32 may change.
fn reference(heads: Heads, q: &[f32], scale: f32, sequence: &Sequence) -> Vec<f64> {
    let Heads { queries, keys, dim } = heads;
    let pages = sequence.len() / keys;
    let mut out = Vec::new();
    for h in 0..queries {
        let head = &sequence[h / (queries / keys) * pages..][..pages];
        let keys: Vec<&[f64]> = head.iter().flat_map(|(k, _)| k.meant.chunks_exact(dim)).collect();
        let values: Vec<&[f64]> = head.iter().flat_map(|(_, v)| v.meant.chunks_exact(dim)).collect();
        let q: Vec<f64> = q[h * dim..][..dim].iter().map(|x| f64::from(*x * scale)).collect();
        let scores: Vec<f64> = keys.iter().map(|k| k.iter().zip(&q).map(|(k, q)| k * q).sum()).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        out.extend((0..dim).map(|c| e.iter().zip(&values).map(|(e, v)| e * v[c]).sum::<f64>() / sum));
    }
    out
}

fn pages(sequence: &Sequence) -> Vec<Page<'_>> {
    sequence.iter().map(|(k, v)| Page { keys: k.rows(), values: v.rows() }).collect()
}

fn bits_of(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Pages of a sequence: tokens and the forms of keys and values.
fn page() -> impl Strategy<Value = (usize, usize, usize)> {
    let tokens = prop_oneof![4 => 1usize..20, 2 => 100usize..=128, 1 => Just(0), 1 => Just(PIECE + 77)];
    (tokens, 0..FORMS.len(), 0..FORMS.len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn attention_equals_the_reference(
        keys in 1usize..4, group in 1usize..=10,
        dim in prop::sample::select(WIDTHS.to_vec()),
        divisor in prop::sample::select(vec![1usize, 1, 2, 4, 8]),
        sequences in prop::collection::vec(prop::collection::vec(page(), 1..6), 1..3),
        sharp in 0.1f32..3.0, seed in any::<u64>(), threads in 1usize..4,
    ) {
        let heads = Heads { queries: keys * group, keys, dim };
        let row = heads.queries * dim;
        let size = if dim % divisor == 0 { dim / divisor } else { dim };
        let q = random(sequences.len() * row, seed);
        let scale = sharp / (dim as f32).sqrt();
        let stored: Vec<Sequence> = sequences.iter().enumerate().map(|(s, pages)| {
            let mut pages = pages.clone();
            pages[0].0 = pages[0].0.max(1);
            (0..keys).flat_map(|head| pages.iter().enumerate().map(move |(p, (tokens, k, v))| {
                let seed = seed ^ ((s * 1000 + head * 100 + p * 10) as u64) << 8;
                // Blocks of 32 fill rows, or there are none.
                let forms = if dim % 32 == 0 { FORMS.len() } else { FORMS.len() - 2 };
                let (k, v) = (FORMS[k % forms], FORMS[v % forms]);
                (Owned::new(k, *tokens, dim, size, seed), Owned::new(v, *tokens, dim, size, seed ^ 1))
            }).collect::<Vec<_>>()).collect()
        }).collect();
        let views: Vec<Vec<Page>> = stored.iter().map(pages).collect();
        let views: Vec<&[Page]> = views.iter().map(Vec::as_slice).collect();
        let expected: Vec<f64> = stored.iter().enumerate()
            .flat_map(|(s, sequence)| reference(heads, &q[s * row..][..row], scale, sequence)).collect();
        for isa in Isa::available() {
            let mut got = vec![f32::NAN; q.len()];
            let pool = Pool::new(threads).unwrap();
            attend_with(isa, &pool, heads, Values::F32(&q), scale, &views, ValuesMut::F32(&mut got));
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                prop_assert!((f64::from(*got) - expected).abs() <= 1e-5, "{isa} {i}: {got}, expected {expected}");
            }
            // Alone and with one thread: the same bits.
            for s in 0..views.len() {
                let mut alone = vec![0f32; row];
                attend_with(isa, &Pool::new(1).unwrap(), heads, Values::F32(&q[s * row..][..row]), scale, &views[s..=s], ValuesMut::F32(&mut alone));
                prop_assert_eq!(bits_of(&alone), bits_of(&got[s * row..][..row]));
            }
        }
    }
}

const WIDTHS: [usize; 12] = [4, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256];

proptest! {
    #[test]
    fn halving_equals_the_shift_of_every_code(
        dim in prop::sample::select(WIDTHS.to_vec()), tokens in 1usize..150, eight in any::<bool>(), seed in any::<u64>(),
    ) {
        let from = if eight { Bits::B8 } else { Bits::B4 };
        let to = from.half().unwrap();
        let codes: Vec<u8> =
            random(tokens * dim, seed).iter().map(|x| ((x + 1.0) * 127.9) as u8 & from.levels() as u8).collect();
        let scales: Vec<f32> = random(tokens, seed ^ 1);
        let mut packed = vec![0; from.bytes(codes.len())];
        pack::pack(from, dim, &codes, &mut packed);
        let expected: Vec<u8> = codes.iter().map(|q| code(Shift::Equivalent, from, u32::from(*q)) as u8).collect();
        for isa in Isa::available() {
            let (mut packed, mut halved, mut got) = (packed.clone(), scales.clone(), vec![0; codes.len()]);
            halve_with(isa, from, dim, &mut packed, &mut halved);
            pack::unpack(to, dim, &packed[..to.bytes(codes.len())], &mut got);
            prop_assert_eq!(&got, &expected, "{}", isa);
            for (old, new) in scales.iter().zip(&halved) {
                prop_assert_eq!(parameters(Shift::Equivalent, from, *old, 0.0).0.to_bits(), new.to_bits());
            }
        }
    }

    #[test]
    fn quantization_equals_its_formula(
        dim in prop::sample::select(WIDTHS.to_vec()), divisor in prop::sample::select(vec![1usize, 2, 4]), tokens in 1usize..20,
        spread in prop::sample::select(vec![0f32, 1e-6, 0.3, 40.0]), half in any::<bool>(), seed in any::<u64>(),
    ) {
        let (group, kind) = (dim / divisor, if half { Kind::F16 } else { Kind::Bf16 });
        let x = random(tokens * dim, seed);
        let (x, page): (Vec<f32>, Vec<[u8; 2]>) = match kind {
            Kind::F16 => x.iter().map(|x| f16::from_f32(x * spread + 0.5)).map(|x| (x.to_f32(), x.to_le_bytes())).unzip(),
            _ => x.iter().map(|x| bf16::from_f32(x * spread + 0.5)).map(|x| (x.to_f32(), x.to_le_bytes())).unzip(),
        };
        let page = page.concat();
        for isa in Isa::available() {
            let (mut scales, mut zeros) = (vec![0f32; x.len() / group], vec![0f32; x.len() / group]);
            let mut page = page.clone();
            quantize_with(isa, kind, dim, group, &mut page, &mut scales, &mut zeros);
            for (i, x) in x.chunks_exact(group).enumerate() {
                let min = x.iter().copied().fold(f32::INFINITY, f32::min);
                let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let scale = ((max - min) / 255.0).clamp(1e-5, 1e5);
                prop_assert_eq!((scales[i], zeros[i]), (scale, -min));
                for (x, got) in x.iter().zip(&page[i * group..]) {
                    prop_assert_eq!(((x - min) / scale).round_ties_even().clamp(0.0, 255.0) as u8, *got, "{}", isa);
                }
            }
        }
    }
}

/// One page of ones for each of two key heads.
fn ones(tokens: usize, dim: usize) -> Sequence {
    let form = Form::Codes(Bits::B4);
    (0..2u64)
        .map(|seed| (Owned::new(form, tokens, dim, dim, seed), Owned::new(form, tokens, dim, dim, seed + 9)))
        .collect()
}

#[test]
fn queries_and_results_may_be_of_half_precision() {
    let heads = Heads { queries: 4, keys: 2, dim: 64 };
    let sequence = ones(33, 64);
    let pages = pages(&sequence);
    let q: Vec<bf16> = random(256, 4).iter().map(|x| bf16::from_f32(*x)).collect();
    let wide: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
    let pool = Pool::new(2).unwrap();
    let (mut exact, mut short) = (vec![0f32; 256], vec![bf16::ZERO; 256]);
    for isa in Isa::available() {
        attend_with(isa, &pool, heads, Values::F32(&wide), 0.3, &[&pages], ValuesMut::F32(&mut exact));
        attend_with(isa, &pool, heads, Values::Bf16(&q), 0.3, &[&pages], ValuesMut::Bf16(&mut short));
        assert!(exact.iter().zip(&short).all(|(x, y)| bf16::from_f32(*x) == *y), "{isa}");
    }
}

#[test]
fn a_page_of_bytes_is_rows_of_half_precision() {
    let rows: Vec<f16> = random(64, 8).iter().map(|x| f16::from_f32(*x)).collect();
    // SAFETY: two bytes a value.
    let bytes = unsafe { std::slice::from_raw_parts(rows.as_ptr().cast::<u8>(), 128) };
    let Rows::Exact(Values::F16(back)) = Rows::of_bytes(bytes, Kind::F16) else { panic!("another format") };
    assert_eq!(back, rows);
    assert_eq!(Rows::of_bytes(bytes, Kind::Bf16).tokens(32), 2);
}

fn refused(heads: Heads, sequence: &[Page]) {
    let n = heads.queries * heads.dim;
    let (q, mut out) = (vec![0f32; n], vec![0f32; n]);
    attend_with(
        Isa::Scalar,
        &Pool::new(1).unwrap(),
        heads,
        Values::F32(&q),
        1.0,
        &[sequence],
        ValuesMut::F32(&mut out),
    );
}

const HEADS: Heads = Heads { queries: 2, keys: 2, dim: 32 };

#[test]
#[should_panic(expected = "sequence 0 has no token")]
fn a_sequence_without_a_token_is_refused() {
    refused(HEADS, &pages(&ones(0, 32)));
}

#[test]
#[should_panic(expected = "bytes of codes for 3 tokens")]
fn a_page_that_is_too_short_is_refused() {
    let sequence = ones(3, 32);
    let mut pages = pages(&sequence);
    if let Rows::Codes(view) = &mut pages[1].values {
        view.codes = &view.codes[1..];
    }
    refused(HEADS, &pages);
}

#[test]
#[should_panic(expected = "key head 1, page 0: 2 keys, 2 values, 3 keys in key head 0")]
fn heads_of_different_lengths_are_refused() {
    let (three, two) = (ones(3, 32), ones(2, 32));
    refused(HEADS, &[pages(&three)[0], pages(&two)[1]]);
}

#[test]
#[should_panic(expected = "3 pages for 2 key heads")]
fn pages_that_are_not_of_all_heads_are_refused() {
    let sequence = ones(3, 32);
    let pages = pages(&sequence);
    refused(HEADS, &[pages[0], pages[1], pages[0]]);
}
