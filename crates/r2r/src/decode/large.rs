//! The large model, wherever it is: asked now, answering when it can.

use std::time::Duration;

use nics_core::sampling::Sampling;

use super::Traffic;
use crate::Result;
use crate::policy::Sequence;

/// A sequence that wants its next token from the large model.
#[derive(Debug, Clone, Copy)]
pub struct LargeRequest<'a> {
    /// Which one.
    pub sequence: Sequence,
    /// All of its tokens, prompt and accepted ones.
    pub ids: &'a [u32],
    /// How many of them the large model had when it last answered.
    pub seen: usize,
}

/// What the large model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargeToken {
    /// The token.
    pub token: u32,
    /// Tokens that it had cached.
    pub cached: usize,
    /// Tokens that it read for this one.
    pub read: usize,
}

/// The answer to one sequence.
pub type Answer = (Sequence, Result<LargeToken>);

/// What the large model is to read before it is asked, so that its first token and those after long stretches of the small
/// model's come sooner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadAhead {
    /// Each prompt, as soon as its request comes.
    pub prompt: bool,
    /// What was written, whenever it is so many tokens behind.
    pub window: Option<usize>,
}

/// Gives tokens to sequences that lag behind by different lengths.
///
/// [`ask`](Self::ask) and [`answers`](Self::answers) are apart so that sequences which are not waiting go on meanwhile.
/// What has been asked is answered once, in any order, unless the sequence is closed before. Its cache holds a sequence up
/// to what it has seen and never more: a token that it returned is read with the tokens after it, at its next call.
pub trait LargeModel {
    /// Ids below this are in its vocabulary.
    fn vocab(&self) -> usize;

    /// The most tokens of a sequence.
    fn context(&self) -> usize;

    /// What it likes to read ahead of being asked.
    fn read_ahead(&self) -> ReadAhead {
        ReadAhead::default()
    }

    /// Makes room for a sequence of at most `max_tokens`, whose tokens are chosen by `sampling` among ids below `vocab`. The
    /// token behind `n` ids is drawn with [`seed_at`]`(sampling.seed, n)`, so that an answer asked for again is the same.
    fn open(
        &mut self,
        sequence: Sequence,
        max_tokens: usize,
        sampling: &Sampling,
        vocab: usize,
    ) -> Result<()>;

    /// A hint that these tokens will be needed: it may read them now. What fails here shows when the sequence asks.
    fn warm(&mut self, request: &LargeRequest) {
        let _ = request;
    }

    /// Asks for the next token of each request. A sequence asks again only when it has been answered.
    ///
    /// # Errors
    /// None of the requests has been asked.
    fn ask(&mut self, requests: &[LargeRequest]) -> Result<()>;

    /// The answers that are there, waiting at most `wait` for the first. A model that computes in this thread does so here
    /// whatever `wait` is, and may return nothing while it reads a long prompt. An error beside a sequence is that
    /// sequence's alone.
    ///
    /// # Errors
    /// What no single sequence can be held to. Nothing is lost: the same answers come with a later call.
    fn answers(&mut self, wait: Duration) -> Result<Vec<Answer>>;

    /// Forgets a sequence, answered or not; an unknown one is ignored.
    fn close(&mut self, sequence: Sequence);

    /// What its calls have cost so far; `None` for a model in this process.
    fn traffic(&self) -> Option<Traffic> {
        None
    }
}

/// The seed of the draw behind `position` ids of a sequence with this seed: 31 bits, which every server takes.
pub fn seed_at(seed: u64, position: usize) -> u64 {
    // SplitMix64 (Steele, Lea & Flood, 2014), twice, so that neither neighbouring seeds nor neighbouring places are alike.
    let mix = |x: u64| {
        let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    mix(mix(seed) ^ position as u64) >> 33
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_place_and_fit_31_bits() {
        let mut all: Vec<u64> = (0..40).flat_map(|s| (0..40).map(move |p| seed_at(s, p))).collect();
        assert!(all.iter().all(|&s| s < 1 << 31));
        assert_eq!(seed_at(7, 11), seed_at(7, 11));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 1600);
    }
}
