//! The order of samples: that of numpy's `default_rng(seed).shuffle`, by which published calibrations picked theirs.
//!
//! A PCG64 XSL-RR generator (O'Neill, 2014), seeded through numpy's `SeedSequence`, and a shuffle from the last place down
//! whose draws are made below a bound by masked rejection of 32-bit numbers.

/// The multiplier of PCG64.
const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

/// A PCG64 generator as numpy seeds it.
#[derive(Debug, Clone)]
pub struct Pcg64 {
    state: u128,
    increment: u128,
    /// The upper half of the last draw, which the next 32-bit number is.
    kept: Option<u32>,
}

impl Pcg64 {
    /// As `numpy.random.default_rng(seed)` is.
    pub fn seeded(seed: u64) -> Self {
        let words = sequence(seed);
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let (start, stream) = (wide(words[0], words[1]), wide(words[2], words[3]));
        let mut rng = Self { state: 0, increment: stream << 1 | 1, kept: None };
        rng.advance();
        rng.state = rng.state.wrapping_add(start);
        rng.advance();
        rng
    }

    fn advance(&mut self) {
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.advance();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The next 32 bits: the lower half of a draw, then its upper one.
    pub fn next_u32(&mut self) -> u32 {
        if let Some(kept) = self.kept.take() {
            return kept;
        }
        let next = self.next_u64();
        self.kept = Some((next >> 32) as u32);
        next as u32
    }

    /// A number from 0 to `most`.
    fn up_to(&mut self, most: u64) -> u64 {
        if most == 0 {
            return 0;
        }
        let mask = u64::MAX >> most.leading_zeros();
        loop {
            let value = match u32::try_from(most) {
                Ok(_) => u64::from(self.next_u32()) & mask,
                Err(_) => self.next_u64() & mask,
            };
            if value <= most {
                return value;
            }
        }
    }

    /// Shuffles in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.up_to(i as u64) as usize;
            items.swap(i, j);
        }
    }
}

/// numpy's `SeedSequence(seed).generate_state(4, uint64)`.
fn sequence(seed: u64) -> [u64; 4] {
    const POOL: usize = 4;
    let mut multiplier: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let value = value ^ multiplier;
        multiplier = multiplier.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(multiplier);
        value ^ value >> 16
    };
    let mix = |x: u32, y: u32| {
        let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ mixed >> 16
    };
    // The seed's words, lowest first; numpy leaves out upper ones that are zero, and a pool is filled up with zeros.
    let words = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut pool = words.map(&mut hash);
    for from in 0..POOL {
        for to in 0..POOL {
            if from != to {
                let hashed = hash(pool[from]);
                pool[to] = mix(pool[to], hashed);
            }
        }
    }
    let mut multiplier: u32 = 0x8b51_f9dd;
    let mut out = [0u32; 8];
    for (n, word) in out.iter_mut().enumerate() {
        let value = pool[n % POOL] ^ multiplier;
        multiplier = multiplier.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(multiplier);
        *word = value ^ value >> 16;
    }
    [0, 1, 2, 3].map(|n| u64::from(out[2 * n]) | u64::from(out[2 * n + 1]) << 32)
}

/// The numbers from 0 to `n` − 1 in the order of a shuffle.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    Pcg64::seeded(seed).shuffle(&mut all);
    all
}

/// The first `samples` of `n` items in shuffled order, from the front again when there are fewer.
pub fn picks(n: usize, samples: usize, seed: u64) -> Vec<usize> {
    shuffled(n, seed).into_iter().cycle().take(if n == 0 { 0 } else { samples }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_and_orders_are_numpys() {
        let mut rng = Pcg64::seeded(42);
        assert_eq!(rng.state, 0xcea4_4f67_9879_8f2a_acbc_7c9d_6886_0ac8);
        assert_eq!(rng.increment, 0xfa50_5436_c9a8_416e_66ca_f2e2_8d25_abff);
        assert_eq!([rng.next_u64(), rng.next_u64()], [0xc621_fbcd_16d9_2688, 0x705a_5661_a791_ffc1]);
        assert_eq!(picks(3, 7, 42).len(), 7);
        assert!(picks(0, 7, 42).is_empty());
        // `numpy.random.default_rng(seed).permutation(10)`, also with seeds of two words.
        for (seed, order) in [
            (0, [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]),
            (7, [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]),
            (123_456_789, [7, 4, 0, 5, 3, 8, 2, 1, 6, 9]),
            (1 << 32, [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]),
            ((1 << 40) + 5, [8, 1, 2, 5, 3, 0, 9, 7, 4, 6]),
            (u64::MAX, [8, 7, 3, 0, 4, 6, 1, 2, 5, 9]),
        ] {
            assert_eq!(shuffled(10, seed), order, "seed {seed}");
        }
    }
}
