//! Normalised Hadamard rotations: orthogonal, all entries of one magnitude, so that one large channel is spread over all.
//!
//! A length `n = K · 2^m` is rotated as the Kronecker product of a matrix of order `K` and Sylvester's of order `2^m`. `K` is
//! 1, or the smallest order that Paley's constructions give for the odd part of `n`: 12, 20, 28, 36, …

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The rotation of one length.
#[derive(Debug)]
pub struct Hadamard {
    n: i64,
    /// Matrices whose Kronecker product it is, float32 and normalised together; the last of them acts on neighbours.
    factors: Vec<Tensor>,
}

impl Clone for Hadamard {
    fn clone(&self) -> Self {
        // The factors never change, so that clones may share them.
        Self { n: self.n, factors: self.factors.iter().map(Tensor::shallow_clone).collect() }
    }
}

/// Sylvester matrices are applied in pieces of at most this order.
const PIECE: i64 = 128;

impl Hadamard {
    /// Of order `n`.
    ///
    /// # Errors
    /// No matrix of that order is made here: an odd part above 1 needs a multiple of 4 and a construction of Paley's.
    pub fn new(n: i64) -> Result<Self> {
        let refused = || {
            Error::Input(format!(
                "no Hadamard matrix of order {n} is known here; powers of 2, and 12, 20, 28, … times them, are"
            ))
        };
        if n < 1 {
            return Err(refused());
        }
        let powers = n.trailing_zeros();
        let odd = n >> powers;
        if odd == 1 {
            return Self::product(n, None);
        }
        let order = (2..=powers).map(|j| odd << j).find(|&k| paley(k).is_some()).ok_or_else(refused)?;
        let first = paley(order).ok_or_else(refused)?;
        Self::product(n, Some(Tensor::f_from_slice(&first)?.f_reshape([order, order])?))
    }

    /// Of order `n` with a given matrix of ones and minus ones `[k, k]` as its first factor; `n / k` is a power of two.
    ///
    /// # Errors
    /// A matrix that is not square, whose rows are not orthogonal, or whose order does not fit.
    pub fn with(n: i64, first: &Tensor) -> Result<Self> {
        let k = match first.size()[..] {
            [a, b] if a == b && a > 0 && n % a == 0 && (n / a).count_ones() == 1 => a,
            _ => {
                let shape = first.size();
                return Err(Error::Input(format!(
                    "a first factor {shape:?} does not make a rotation of {n}"
                )));
            }
        };
        let first = first.f_to_kind(Kind::Float)?;
        let product = first.f_matmul(&first.f_transpose(0, 1)?)?;
        let wanted = Tensor::f_eye(k, (Kind::Float, first.device()))?.f_mul_scalar(k as f64)?;
        if !product.f_allclose(&wanted, 1e-4, 1e-4, false)? {
            return Err(Error::Input(format!("the given matrix of order {k} is no Hadamard matrix")));
        }
        Self::product(n, Some(first))
    }

    fn product(n: i64, first: Option<Tensor>) -> Result<Self> {
        let mut rest = n / first.as_ref().map_or(1, |f| f.size()[0]);
        let mut factors: Vec<Tensor> = first.into_iter().collect();
        while rest > 1 || factors.is_empty() {
            let piece = rest.min(PIECE);
            factors.push(sylvester(piece)?);
            rest /= piece;
        }
        for factor in &mut factors {
            let order = factor.size()[0] as f64;
            *factor = factor.f_mul_scalar(order.powf(-0.5))?;
        }
        Ok(Self { n, factors })
    }

    /// The length that is rotated.
    pub fn order(&self) -> i64 {
        self.n
    }

    /// `H x` over the last axis; the result has the shape and dtype of `x`, the arithmetic is float32.
    ///
    /// # Errors
    /// A last axis of another length.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, false)
    }

    /// `Hᵀ x` over the last axis, which undoes [`rotate`](Self::rotate).
    ///
    /// # Errors
    /// As [`rotate`](Self::rotate).
    pub fn unrotate(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, true)
    }

    fn apply(&self, x: &Tensor, transposed: bool) -> Result<Tensor> {
        let shape = x.size();
        if shape.last() != Some(&self.n) {
            return Err(Error::Input(format!("a rotation of {} channels was given {shape:?}", self.n)));
        }
        let mut y = x.f_to_kind(Kind::Float)?;
        let mut behind = self.n;
        for factor in &self.factors {
            let order = factor.size()[0];
            behind /= order;
            let factor = factor.f_to_device(x.device())?;
            let factor = if transposed { factor.f_transpose(0, 1)? } else { factor };
            y = factor.f_matmul(&y.f_reshape([-1, order, behind])?)?; // [before, order, behind]
        }
        Ok(y.f_reshape(&shape)?.f_to_kind(x.kind())?)
    }
}

/// Sylvester's matrix of order `n`, a power of two: `H[i][j] = (−1)^popcount(i & j)`.
fn sylvester(n: i64) -> Result<Tensor> {
    let entry = |at: i64| if ((at / n) & (at % n)).count_ones().is_multiple_of(2) { 1f32 } else { -1.0 };
    Ok(Tensor::f_from_slice(&(0..n * n).map(entry).collect::<Vec<f32>>())?.f_reshape([n, n])?)
}

/// A Hadamard matrix of order `k` by Paley's first construction (`k − 1` a prime that is 3 modulo 4) or second (`k/2 − 1` a
/// prime that is 1 modulo 4), row by row.
fn paley(k: i64) -> Option<Vec<f32>> {
    if is_prime(k - 1) && (k - 1) % 4 == 3 {
        let q = k - 1;
        // I + S with S the skew matrix of residues, bordered.
        let entry = |at: i64| match (at / k, at % k) {
            (0, _) => 1.0,
            (_, 0) => -1.0,
            (i, j) if i == j => 1.0,
            (i, j) => residue(i - j, q),
        };
        return Some((0..k * k).map(entry).collect());
    }
    let (half, q) = (k / 2, k / 2 - 1);
    if k % 2 == 0 && is_prime(q) && q % 4 == 1 {
        // The symmetric conference matrix C of order q + 1, each entry a block of 2: 0 as [1 -1; -1 -1], ±1 as ±[1 1; 1 -1].
        let conference = |i: i64, j: i64| match (i, j) {
            (0, 0) => 0.0,
            (0, _) | (_, 0) => 1.0,
            (i, j) => residue(i - j, q),
        };
        let entry = |at: i64| {
            let (i, j) = (at / k, at % k);
            let c: f32 = conference(i % half, j % half);
            match (c == 0.0, i / half, j / half) {
                (true, 0, 0) => 1.0,
                (true, ..) => -1.0,
                (false, 1, 1) => -c,
                (false, ..) => c,
            }
        };
        return Some((0..k * k).map(entry).collect());
    }
    None
}

/// Whether `a` is a square modulo the prime `q`: 1, −1, or 0 for a multiple of `q`.
fn residue(a: i64, q: i64) -> f32 {
    let a = a.rem_euclid(q);
    if a == 0 {
        0.0
    } else if (1..=q / 2).any(|b| b * b % q == a) {
        1.0
    } else {
        -1.0
    }
}

fn is_prime(n: i64) -> bool {
    n > 1 && (2..n).take_while(|d| d * d <= n).all(|d| n % d != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_are_orthogonal_and_even_out() {
        for n in [1, 2, 64, 80, 96, 112, 144, 256, 320, 768, 1024] {
            let rotation = Hadamard::new(n).unwrap();
            let unit = Tensor::eye(n, (Kind::Float, tch::Device::Cpu));
            let rotated = rotation.rotate(&unit).unwrap();
            let magnitude = (n as f64).powf(-0.5);
            assert!((rotated.abs() - magnitude).abs().max().double_value(&[]) < 1e-5, "{n}");
            let back = rotation.unrotate(&rotated).unwrap();
            assert!((back - unit).abs().max().double_value(&[]) < 1e-5, "{n}");
        }
    }

    #[test]
    fn orders_without_a_matrix_are_refused() {
        for n in [0, 3, 6, 10, 21] {
            assert!(Hadamard::new(n).is_err(), "{n}");
        }
        let ones = Tensor::ones([4, 4], (Kind::Float, tch::Device::Cpu));
        assert!(Hadamard::with(8, &ones).unwrap_err().to_string().contains("no Hadamard matrix"));
        assert!(Hadamard::with(10, &ones).is_err());
        let rotation = Hadamard::new(8).unwrap();
        assert!(rotation.rotate(&ones).is_err());
    }
}
