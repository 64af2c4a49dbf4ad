//! Steps over a large model in this process: long prompts hold nobody up, and change nothing.

use std::time::Duration;

use nics_core::sampling::Sampling;
use r2r::Error;
use r2r::decode::{
    Answer, CHUNK, Decoder, LargeModel, LargeRequest, LocalLarge, OnFailure, ReadAhead, Request,
};
use r2r::policy::Sequence;

use crate::kit::*;

const CONTEXT: usize = 4096;

fn long(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + 7 * i) % 300).collect()
}

#[test]
fn a_long_prompt_holds_nobody_up_and_changes_nothing() {
    let (small, large) = (small_for(CONTEXT), large_for(CONTEXT));
    let requests = || {
        let mut all = greedy(12);
        all.push(Request::greedy(long(2 * CHUNK + 100), 4, &[]));
        all.push(Request::greedy(long(CHUNK), 4, &[]));
        all.push(Request::greedy(long(CHUNK + 1), 4, &[]));
        all
    };
    for ahead in [ReadAhead::default(), ReadAhead { prompt: true, window: Some(3) }] {
        let large = || Box::new(LocalLarge::new(&large).with_read_ahead(ahead));
        let alone: Vec<Written> = requests()
            .into_iter()
            .map(|r| run(&mut Decoder::new(&small, large(), always()), vec![r]).swap_remove(0))
            .collect();
        let mut decoder = Decoder::new(&small, large(), always());
        let (mut steps, mut short, mut long) = (0, Vec::new(), None);
        let together = run_watched(&mut decoder, requests(), &mut |step| {
            steps += 1;
            if step.tokens.iter().any(|e| e.sequence == Sequence(0)) {
                short.push(steps);
            }
            if step.tokens.iter().any(|e| e.sequence == Sequence(5)) {
                long.get_or_insert(steps);
            }
        });
        assert_same(&together, &alone, "long prompts");
        // The first sequence writes in each step until it is done.
        assert_eq!(short, (short[0]..short[0] + 12).collect::<Vec<_>>());
        assert!(long.unwrap() >= 3, "three pieces take three steps");
    }
}

/// Fails for one sequence.
struct Picky<'m>(LocalLarge<'m>, Sequence);

impl LargeModel for Picky<'_> {
    fn vocab(&self) -> usize {
        self.0.vocab()
    }
    fn context(&self) -> usize {
        self.0.context()
    }
    fn open(&mut self, s: Sequence, max: usize, sampling: &Sampling, vocab: usize) -> r2r::Result<()> {
        self.0.open(s, max, sampling, vocab)
    }
    fn ask(&mut self, requests: &[LargeRequest]) -> r2r::Result<()> {
        self.0.ask(requests)
    }
    fn answers(&mut self, wait: Duration) -> r2r::Result<Vec<Answer>> {
        let answers = self.0.answers(wait)?.into_iter().map(|(s, answer)| {
            (s, if s == self.1 { Err(Error::Input("not this one".into())) } else { answer })
        });
        // One that nobody asked for, and one of nobody.
        Ok(answers.chain([(Sequence(99), Err(Error::Input("who?".into())))]).collect())
    }
    fn close(&mut self, sequence: Sequence) {
        self.0.close(sequence);
    }
}

#[test]
fn a_failure_is_one_sequences_alone() {
    let (small, large) = (small(), large());
    let expected = local(sometimes(), greedy(10));
    for on_failure in [OnFailure::Abort, OnFailure::KeepSmall] {
        let picky = Picky(LocalLarge::new(&large), Sequence(2));
        let mut decoder = Decoder::new(&small, Box::new(picky), sometimes()).on_failure(on_failure);
        let found = run(&mut decoder, greedy(10));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            if i != 2 {
                assert_eq!(found.tokens(), expected.tokens());
            } else if on_failure == OnFailure::Abort {
                assert_eq!(found.error.as_deref(), Some("not this one"));
            } else {
                assert!(found.error.is_none() && found.events.iter().any(|e| e.degraded));
                assert!(found.sources().iter().all(|large| !large));
            }
        }
    }
}

#[test]
fn draws_of_the_large_model_belong_to_their_place() {
    let (small, large) = (small(), large());
    let whole = local(always(), drawn(10)).swap_remove(1);
    // A reply taken up in the middle goes on as it would have.
    let mut request = drawn(4).swap_remove(1);
    request.prompt.extend(&whole.tokens()[..6]);
    let mut decoder = Decoder::new(&small, Box::new(LocalLarge::new(&large)), always());
    let rest = run(&mut decoder, vec![request]).swap_remove(0);
    assert_eq!(rest.tokens(), whole.tokens()[6..]);
}
