//! Where the rows of a page lie, and what is asked of memory ahead of its use.

use nics_kernels::lanes::Lanes;

use super::PageView;

/// Bytes of a line of the caches.
const LINE: usize = 64;
/// How far ahead of its use memory is asked for, in bytes.
const AHEAD: usize = 1024;

/// Where the rows of a page lie.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    /// The first byte.
    pub at: *const u8,
    /// Bytes of a row.
    pub row: usize,
    /// How many rows.
    pub tokens: usize,
    /// `[tokens, groups]`.
    pub scales: &'a [f32],
    /// `[tokens, groups]`.
    pub zeros: &'a [f32],
    /// Scales of a token; 0 of numbers.
    pub groups: usize,
    /// What will be read after this page.
    next: [&'a [u8]; 2],
}

impl<'a> Stored<'a> {
    /// Codes.
    pub fn codes(page: &PageView<'a>, dim: usize) -> Self {
        let PageView { bits, tokens, codes, scales, zeros } = *page;
        let (at, row) = (codes.as_ptr(), bits.bytes(dim));
        assert!(tokens > 0 && codes.len() == tokens * row && scales.len() == zeros.len());
        Self { at, row, tokens, scales, zeros, groups: scales.len() / tokens, next: [&[]; 2] }
    }

    /// Rows of `row` numbers or bytes each, without scales of their own.
    pub fn rows<T>(rows: &'a [T], row: usize) -> Self {
        let tokens = rows.len() / row;
        assert!(tokens > 0 && rows.len() == tokens * row);
        let at = rows.as_ptr().cast();
        Self { at, row: row * size_of::<T>(), tokens, scales: &[], zeros: &[], groups: 0, next: [&[]; 2] }
    }

    /// The same, before `next`.
    pub fn before(self, next: [&'a [u8]; 2]) -> Self {
        Self { next, ..self }
    }

    /// Asks for what will be read soon while tokens `t .. t + n` are computed: rows a few kilobytes ahead, those of what
    /// follows the page at its end, and the same part of what is read last.
    #[inline(always)]
    pub fn fetch<L: Lanes>(&self, t: usize, n: usize) {
        let (at, bytes, size) = (t * self.row, n * self.row, self.tokens * self.row);
        let [follows, last] = self.next;
        for line in (0..bytes).step_by(LINE) {
            let ahead = at + line + AHEAD;
            let key = if ahead < size {
                self.at.wrapping_add(ahead)
            } else {
                follows.as_ptr().wrapping_add(ahead - size)
            };
            // SAFETY: the caller runs with the instructions of `L`; any address may be asked for.
            unsafe {
                L::prefetch(key);
                L::prefetch(last.as_ptr().wrapping_add(at + line));
            }
        }
    }

    /// Scale and zero of token `t` for the channels from `channel` on.
    #[inline(always)]
    pub fn parameters(&self, t: usize, channel: u32, dim: usize) -> (f32, f32) {
        let at = t * self.groups + channel as usize / (dim / self.groups);
        (self.scales[at], self.zeros[at])
    }
}
