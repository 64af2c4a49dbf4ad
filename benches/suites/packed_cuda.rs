//! The layers of the suite `packed` on a CUDA device: our kernels over tiles of 3 and 4 bits in groups of 128, and what they
//! take when they write the weight out first, beside libtorch's product in bf16 and its own 4-bit product.
//!
//! A time is of products that are queued one after the other, copies of the weight in turn, until the device has done them
//! all; where a product takes less than its call, it is the call's. Without such a device nothing is measured, and a case
//! says why; in miniature the suite then runs on the processor, by operations.

use anyhow::{Result, bail};
use nics_core::device::DeviceSpec;
use nics_core::nn::DeviceWeight;
use nics_core::nn::memory::copied;
use nics_kernels::packed::Packed;
use tch::{Cuda, Device, Kind, Tensor};

use crate::figure::{Absent, Case, id};
use crate::memory::{WORKING_SET, random};
use crate::packed::{GROUP, SHAPES, name, rounded};
use crate::race::{Contender, drop_ok, race, tell, timed};
use crate::settings::{SEED, Settings, Size};

const SUITE: &str = "packed-cuda";
const AXIS: &str = "rows";

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let shapes: &[[usize; 2]] = settings.pick(&SHAPES, &SHAPES[2..4], &[[256, 192]]);
    let rows: &[usize] = settings.pick(&[1, 2, 4, 8, 16, 32, 64, 128, 1024], &[1, 8, 64], &[1, 5]);
    let wanted = |bits: u32, shape: [usize; 2], rows: usize| {
        settings.wants(&id(SUITE, "bf16", &name(bits, shape), AXIS, rows as f64))
    };
    let cases = || shapes.iter().flat_map(|shape| [3, 4].map(|bits| (bits, *shape)));
    if !cases().any(|(bits, shape)| rows.iter().any(|&r| wanted(bits, shape, r))) {
        return Ok(());
    }
    let card = match DeviceSpec::Cuda(0).open() {
        Ok(device) => Card::of(settings, device)?,
        Err(_) if settings.size == Size::Miniature => {
            Card { device: Device::Cpu, name: None, bandwidth: None }
        }
        Err(why) => {
            let absent = Absent { who: "everybody".into(), why: why.to_string() };
            let [first, ..] = shapes else { return Ok(()) };
            return tell(settings, &case(3, *first, rows[0], None, Vec::new(), vec![absent], &Card::none()));
        }
    };
    for (bits, shape) in cases() {
        if rows.iter().any(|&r| wanted(bits, shape, r)) {
            let layer = Layer::new(settings, &card, bits, shape)?;
            for &rows in rows.iter().filter(|r| wanted(bits, shape, **r)) {
                tell(settings, &layer.measure(settings, &card, rows)?)?;
            }
        }
    }
    Ok(())
}

/// The device that everybody computes on.
struct Card {
    device: Device,
    name: Option<String>,
    /// Bytes a second that its memory moves.
    bandwidth: Option<f64>,
}

impl Card {
    fn none() -> Self {
        Self { device: Device::Cpu, name: Some("cuda: none".into()), bandwidth: None }
    }

    fn of(settings: &Settings, device: Device) -> Result<Self> {
        let mut card = Self { device, name: None, bandwidth: None };
        if let Device::Cuda(index) = device {
            card.name = Some(format!("cuda: {}", nics_cuda::Device::open(index)?.name()?));
        }
        let bytes = settings.pick(WORKING_SET, WORKING_SET, 1 << 24);
        let from = Tensor::f_ones([bytes as i64], (Kind::Uint8, device))?;
        let mut to = from.f_zeros_like()?;
        let mut best = f64::INFINITY;
        for _ in 0..10 {
            best = best.min(card.timed(1, |_| Ok(to.f_copy_(&from)?))?);
        }
        // A copy reads and writes.
        card.bandwidth = Some(2.0 * bytes as f64 / best);
        Ok(card)
    }

    /// Seconds that each of `n` calls takes on the device.
    fn timed(&self, n: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let done = || {
            if let Device::Cuda(index) = self.device {
                Cuda::synchronize(index as i64);
            }
        };
        done();
        timed(n as f64, || {
            (0..n).try_for_each(&mut call)?;
            done();
            Ok(())
        })
    }
}

fn case(
    bits: u32,
    [input, output]: [usize; 2],
    rows: usize,
    bytes: Option<u64>,
    runs: Vec<crate::figure::Run>,
    absent: Vec<Absent>,
    card: &Card,
) -> Case {
    Case {
        suite: SUITE.into(),
        name: name(bits, [input, output]),
        dtype: "bf16".into(),
        x: rows as f64,
        x_label: AXIS.into(),
        per: "product".into(),
        model: format!("linear {input} to {output}, groups of {GROUP}"),
        threads: 1,
        seed: SEED,
        bytes,
        device: card.name.clone(),
        bandwidth: card.bandwidth,
        runs,
        absent,
    }
}

/// One layer in every form, in so many copies that no cache holds them.
struct Layer {
    bits: u32,
    shape: [usize; 2],
    /// The numbers before and after rounding, float32 `[out, in]`, on the processor.
    plain: Tensor,
    meant: Tensor,
    ours: Vec<DeviceWeight>,
    in_bf16: Vec<Tensor>,
    /// libtorch's own 4 bits: codes, then scales and zeros.
    int4: Vec<[Tensor; 2]>,
}

impl Layer {
    fn new(settings: &Settings, card: &Card, bits: u32, [input, output]: [usize; 2]) -> Result<Self> {
        let plain = random(&[1, output as i64, input as i64], Kind::Float, SEED)?.f_squeeze_dim(0)?;
        let Some(numbers) = nics_core::nn::memory::floats(&plain) else {
            bail!("random numbers are no plain memory")
        };
        let (codes, scales, zeros) = rounded(bits, GROUP, numbers);
        let packed = Packed::new(bits, [output, input], GROUP, &codes, &scales, &zeros)?;
        let mut meant = vec![0f32; numbers.len()];
        packed.dequantize(0, &mut meant);
        let meant = Tensor::f_from_slice(&meant)?.f_view([output as i64, input as i64])?;
        let copies = |bytes: usize| settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).max(1);
        let first = DeviceWeight::new(&packed, card.device)?;
        let mut ours = vec![];
        for _ in 1..copies(first.bytes()) {
            ours.push(first.copied()?);
        }
        ours.push(first);
        let bf16 = plain.f_to_kind(Kind::BFloat16)?.f_to_device(card.device)?;
        let in_bf16 = (0..copies(2 * numbers.len())).map(|_| copied(&bf16)).collect::<Result<_, _>>()?;
        let mut int4 = Vec::new();
        if bits == 4 && card.device != Device::Cpu {
            // Two codes a byte, the even channel in the high half.
            let codes =
                Tensor::f_from_slice(&codes)?.f_view([output as i64, -1, 2])?.f_to_device(card.device)?;
            let [even, odd] = [0, 1].map(|i| codes.f_select(2, i));
            let bytes = even?.f_mul_scalar(16)?.f_add(&odd?)?;
            let own = bytes.f_contiguous()?.f_internal_convert_weight_to_int4pack(8)?;
            let parameters = |x: &[f32]| Tensor::f_from_slice(x)?.f_view([output as i64, -1, 1]);
            let whole: Vec<f32> = zeros.iter().map(|z| f32::from(*z)).collect();
            let (s, z) = (parameters(&scales)?, parameters(&whole)?);
            // (q - 8) s + z with z = (8 - zero) s.
            let shift = s.f_mul(&z.f_neg()?.f_add_scalar(8.0)?)?;
            let both = Tensor::f_cat(&[&s, &shift], -1)?.f_transpose(0, 1)?.f_to_kind(Kind::BFloat16)?;
            let both = both.f_contiguous()?.f_to_device(card.device)?;
            for _ in 0..copies(numbers.len() / 2) {
                int4.push([copied(&own)?, both.shallow_clone()]);
            }
        }
        Ok(Self { bits, shape: [input, output], plain, meant, ours, in_bf16, int4 })
    }

    fn measure(&self, settings: &Settings, card: &Card, rows: usize) -> Result<Case> {
        let x =
            random(&[1, rows as i64, self.shape[0] as i64], Kind::BFloat16, SEED + 1)?.f_squeeze_dim(0)?;
        let exact = x.f_to_kind(Kind::Double)?;
        let x = x.f_to_device(card.device)?;
        let none: Option<&Tensor> = None;
        let error = |who: &str, found: &Tensor, weights: &Tensor, most: f64| -> Result<Option<f64>> {
            // A few outputs suffice.
            let n = weights.size()[0].min(512);
            let expected = exact.f_linear(&weights.f_narrow(0, 0, n)?.f_to_kind(Kind::Double)?, none)?;
            let found = found.f_narrow(1, 0, n)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
            let off = found.f_sub(&expected)?.f_norm()?.f_div(&expected.f_norm()?)?.f_double_value(&[])?;
            if off.is_nan() || off > most {
                bail!("{who} computes something else: relative error {off}");
            }
            Ok(Some(off))
        };
        let int4 =
            |[q, parameters]: &[Tensor; 2]| x.f_internal_weight_int4pack_mm(q, GROUP as i64, parameters);
        let bits = self.bits;
        let obstacle = self.ours[0].obstacle(Kind::BFloat16);
        let mut absent = Vec::new();
        let who = match obstacle {
            None => format!("W{bits} kernel"),
            Some(why) => {
                absent.push(Absent { who: format!("W{bits} kernel"), why });
                format!("W{bits} operations")
            }
        };
        let of_ours = error(&who, &self.ours[0].forward(&x, None)?, &self.meant, 0.01)?;
        let dequantized =
            |w: &DeviceWeight| -> Result<Tensor> { Ok(x.f_linear(&w.dequantize(Kind::BFloat16)?, none)?) };
        let of_written = error("dequantized", &dequantized(&self.ours[0])?, &self.meant, 0.02)?;
        let of_bf16 = error("libtorch bf16", &x.f_linear(&self.in_bf16[0], none)?, &self.plain, 0.02)?;
        let mut contenders = vec![
            Contender::new(who, || card.timed(self.ours.len(), |i| drop_ok(self.ours[i].forward(&x, None))))
                .with_error(of_ours),
            Contender::new("libtorch bf16", || {
                card.timed(self.in_bf16.len(), |i| drop_ok(x.f_linear(&self.in_bf16[i], none)))
            })
            .with_error(of_bf16),
            Contender::new("dequantized, libtorch bf16", || {
                let few = self.ours.len().min(4);
                card.timed(few, |i| dequantized(&self.ours[i]).map(drop))
            })
            .with_error(of_written),
        ];
        match self.int4.first() {
            Some(first) => {
                let off = error("libtorch int4", &int4(first)?, &self.plain, 0.2)?;
                contenders.push(
                    Contender::new("libtorch int4", || {
                        card.timed(self.int4.len(), |i| drop_ok(int4(&self.int4[i])))
                    })
                    .with_error(off),
                );
            }
            None if bits == 4 => absent.push(Absent {
                who: "libtorch int4".into(),
                why: "on this device it is in another layout".into(),
            }),
            None => {}
        }
        let runs = race(&mut contenders, &settings.short_budget())?;
        // Many rows take their time from arithmetic.
        let bytes = (rows <= 16).then(|| self.ours[0].bytes() as u64);
        Ok(case(bits, self.shape, rows, bytes, runs, absent, card))
    }
}
