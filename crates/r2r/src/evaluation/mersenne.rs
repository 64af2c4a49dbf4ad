//! numpy's shuffles, so that multiple-choice questions have their options in the order of published runs.

/// The seed of published runs.
pub const SHUFFLE_SEED: u32 = 42;

const N: usize = 624;
const M: usize = 397;

/// `numpy.random.seed(seed)` and then `numpy.random.permutation(n)` for one question after the other: the Mersenne
/// Twister MT19937 (Matsumoto & Nishimura, 1998) and a Fisher-Yates shuffle with rejection.
#[derive(Debug, Clone)]
pub struct OptionShuffle {
    state: [u32; N],
    at: usize,
}

impl OptionShuffle {
    /// From a seed.
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, at: N }
    }

    /// The next order of `n` options: the option at each place.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            let j = self.at_most(i as u32) as usize;
            order.swap(i, j);
        }
        order
    }

    /// A number from 0 to `max`: draws of as many bits as `max` has until one fits.
    fn at_most(&mut self, max: u32) -> u32 {
        let mask = u32::MAX >> max.leading_zeros();
        loop {
            let value = self.next() & mask;
            if value <= max {
                return value;
            }
        }
    }

    fn next(&mut self) -> u32 {
        if self.at == N {
            self.twist();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twisted = if y & 1 == 0 { y >> 1 } else { (y >> 1) ^ 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ twisted;
        }
        self.at = 0;
    }
}
