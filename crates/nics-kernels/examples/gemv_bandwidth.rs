//! Bytes a second of the matrix-vector product beside the read bandwidth: `cargo run --release --example gemv_bandwidth`.

use std::time::Instant;

use half::{bf16, f16};
use nics_kernels::gemv::{Product, gemv_with};
use nics_kernels::memory::{prefer_huge_pages, read_bandwidth};
use nics_kernels::{Element, Isa, Kind, Pool, Values, ValuesMut};

/// Weights that begin a line of the cache, as those in libtorch's tensors do.
struct Weights<T> {
    memory: Vec<T>,
    from: usize,
    len: usize,
}

impl<T: Element> Weights<T> {
    fn new(len: usize) -> Self {
        let mut memory: Vec<T> = Vec::with_capacity(len + 64);
        let from = memory.as_ptr().align_offset(64);
        prefer_huge_pages(memory.as_ptr().cast(), len * size_of::<T>());
        memory.extend((0..len + from).map(|i| T::from_f32((i % 1000) as f32 * 1e-3 - 0.5)));
        Self { memory, from, len }
    }

    fn values(&self) -> &[T] {
        &self.memory[self.from..self.from + self.len]
    }
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let pool = Pool::new(threads).expect("threads");
    let limit = read_bandwidth(&pool, 1 << 30, 5);
    println!("read bandwidth with {threads} threads: {:.1} GB/s", limit / 1e9);
    for (input, out) in [(896, 151_936), (4864, 40_000), (896, 1152)] {
        let n = input * out;
        let (f, b, h) = (Weights::<f32>::new(n), Weights::<bf16>::new(n), Weights::<f16>::new(n));
        for rows in [1, 2, 4, 8, 16] {
            let x = vec![0.5f32; rows * input];
            let xb = vec![<bf16 as Element>::from_f32(0.5); rows * input];
            let mut y = vec![0f32; rows * out];
            for (name, w) in [
                ("f32", Values::F32(f.values())),
                ("bf16", Values::Bf16(b.values())),
                ("f16", Values::F16(h.values())),
            ] {
                for isa in Isa::available().into_iter().skip(1) {
                    let best = (0..9)
                        .map(|_| {
                            let start = Instant::now();
                            let y = ValuesMut::F32(&mut y);
                            gemv_with(
                                isa,
                                &pool,
                                x_of(w.kind(), &x, &xb),
                                rows,
                                &mut [Product { weight: w, bias: None, y }],
                            );
                            start.elapsed().as_secs_f64()
                        })
                        .fold(f64::INFINITY, f64::min);
                    let rate = (input * out * w.kind().size()) as f64 / best;
                    println!(
                        "[{out}, {input}] {name} {isa} {rows} rows: {:.3} ms, {:.1} GB/s, {:.0} % of the limit",
                        best * 1e3,
                        rate / 1e9,
                        100.0 * rate / limit
                    );
                }
            }
        }
    }
}

/// Activations in bf16 beside weights in bf16, else in f32.
fn x_of<'a>(weight: Kind, x: &'a [f32], bf16: &'a [bf16]) -> Values<'a> {
    if weight == Kind::Bf16 { Values::Bf16(bf16) } else { Values::F32(x) }
}
