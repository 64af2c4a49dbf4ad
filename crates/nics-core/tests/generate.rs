//! Step-wise generation: sequences come and go, and none changes another's tokens.

mod seam_models;

use nics_core::Error;
use nics_core::cache::DenseCache;
use nics_core::generate::{Finish, Generator, Prompt, Request, RequestId, Token, collect, run};
use nics_core::models::{Decoder, Model};
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use seam_models::*;
use tch::{Kind, Tensor};

/// A draw that differs from the likeliest token more often than not.
fn drawn(prompt: Vec<u32>, new: usize, seed: u64) -> Request {
    let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
    Request { prompt: Prompt::Ids(prompt), sampling, max_new_tokens: new, eos: Vec::new() }
}

fn alone(model: &Decoder, request: Request) -> Vec<u32> {
    let mut cache = DenseCache::new();
    collect(&mut Generator::new(model, &mut cache), [request], 1).unwrap().remove(0)
}

/// Steps until nothing runs; tokens by request.
fn finish(generator: &mut Generator) -> Vec<Token> {
    let mut all = Vec::new();
    while generator.running() > 0 {
        all.extend(generator.step().unwrap());
    }
    all
}

fn of(tokens: &[Token], id: RequestId) -> Vec<u32> {
    tokens.iter().filter(|t| t.request == id).map(|t| t.token).collect()
}

#[test]
fn requests_that_join_and_leave_change_no_other_tokens() {
    let model = decoder("llama");
    let requests = || [drawn(ids(9, 1), 20, 1), drawn(ids(40, 2), 12, 2), drawn(ids(3, 3), 16, 3)];
    let expected: Vec<Vec<u32>> = requests().into_iter().map(|r| alone(&model, r)).collect();

    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_prefill_chunk(7);
    let mut tokens = Vec::new();
    let mut given = Vec::new();
    for request in requests() {
        given.push(generator.add(request).unwrap());
        // Goes after a few steps, in the middle of the others.
        let passing = generator.add(drawn(ids(15, 4), 50, 9)).unwrap();
        for _ in 0..4 {
            tokens.extend(generator.step().unwrap());
        }
        generator.cancel(passing);
    }
    tokens.extend(finish(&mut generator));
    for (id, expected) in given.iter().zip(&expected) {
        assert_eq!(&of(&tokens, *id), expected);
    }
}

#[test]
fn a_seed_belongs_to_its_sequence_whatever_runs_beside_it() {
    let model = decoder("qwen2");
    let requests = || (0..5).map(|i| drawn(ids(4 + 3 * i, i as u32), 12, 40 + i as u64));
    let expected: Vec<Vec<u32>> = requests().map(|r| alone(&model, r)).collect();
    for batch in [1, 2, 5] {
        let mut cache = DenseCache::new();
        let found = collect(&mut Generator::new(&model, &mut cache), requests(), batch).unwrap();
        assert_eq!(found, expected, "{batch} at a time");
    }
    // The same prompt with the same seed twice in one batch, and with another seed.
    let mut cache = DenseCache::new();
    let twins = [drawn(ids(6, 1), 16, 5), drawn(ids(6, 1), 16, 5), drawn(ids(6, 1), 16, 6)];
    let found = collect(&mut Generator::new(&model, &mut cache), twins, 3).unwrap();
    assert_eq!(found[0], found[1]);
    assert_ne!(found[0], found[2]);
}

#[test]
fn a_sequence_says_why_it_ended() {
    let model = decoder("llama");
    let prompt = ids(10, 5);
    let free = alone(&model, Request::greedy(prompt.clone(), 12, &[]));
    let last = |generator: &mut Generator, request: Request| {
        let id = generator.add(request).unwrap();
        let tokens = finish(generator);
        let ends: Vec<_> = tokens.iter().map(|t| t.finish).collect();
        assert!(ends[..ends.len() - 1].iter().all(Option::is_none), "only the last token says so");
        (of(&tokens, id), ends[ends.len() - 1].unwrap())
    };
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache);
    assert_eq!(
        last(&mut generator, Request::greedy(prompt.clone(), 12, &[])),
        (free.clone(), Finish::Length)
    );
    // The end token is the last one given out.
    let at = (1..12).find(|&i| !free[..i].contains(&free[i])).unwrap();
    let eos = [7777, free[at]];
    let ended = last(&mut generator, Request::greedy(prompt.clone(), 12, &eos));
    assert_eq!(ended, (free[..=at].to_vec(), Finish::Eos));
    drop(generator);

    let mut generator = Generator::new(&model, &mut cache).with_context(prompt.len() + 5);
    let full = last(&mut generator, Request::greedy(prompt.clone(), 12, &[]));
    assert_eq!(full, (free[..5].to_vec(), Finish::Context));
    // Exactly as much as there is room for is no overflow.
    let exact = last(&mut generator, Request::greedy(prompt, 5, &[]));
    assert_eq!(exact, (free[..5].to_vec(), Finish::Length));
    drop(generator);
    assert_eq!(cache.bytes().allocated, 0);
}

#[test]
fn a_cancelled_or_dropped_sequence_frees_its_cache() {
    let model = decoder("llama");
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache);
    let ids: Vec<RequestId> = (0..3).map(|i| generator.add(drawn(ids(20, i), 30, 0)).unwrap()).collect();
    generator.step().unwrap();
    generator.cancel(ids[1]);
    generator.cancel(ids[1]);
    generator.cancel(RequestId(99));
    assert_eq!(generator.running(), 2);
    let tokens = generator.step().unwrap();
    assert_eq!(tokens.iter().map(|t| t.request).collect::<Vec<_>>(), [ids[0], ids[2]]);
    drop(generator);
    assert_eq!(cache.bytes(), nics_core::seam::Bytes::default());

    // One that is told to stop by its reader, while another goes on.
    let mut generator = Generator::new(&model, &mut cache);
    let mut seen = [0, 0];
    let requests = [drawn(vec![1, 2], 10, 0), drawn(vec![3], 10, 0)];
    run(&mut generator, requests, 2, &mut |i, _| {
        seen[i] += 1;
        Ok(i == 1 || seen[0] < 3)
    })
    .unwrap();
    assert_eq!(seen, [3, 10]);
    drop(generator);
    assert_eq!(cache.bytes().allocated, 0);
}

#[test]
fn requests_that_cannot_be_met_are_refused_and_the_next_is_answered() {
    let model = decoder("llama");
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache);
    let hidden = model.dims().hidden;
    let embeds = |shape: &[i64]| Request {
        prompt: Prompt::Embeds(Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu))),
        ..Request::greedy(Vec::new(), 4, &[])
    };
    let with = |sampling: Sampling| Request { sampling, ..Request::greedy(vec![1], 4, &[]) };
    for (request, word) in [
        (Request::greedy(Vec::new(), 4, &[]), "the prompt is empty"),
        (embeds(&[0, hidden]), "the prompt is empty"),
        (embeds(&[]), "the prompt is empty"),
        (embeds(&[3, hidden + 1]), "[3, 49]"),
        (embeds(&[3]), "[3]"),
        (embeds(&[3, hidden, 1]), "[3, 48, 1]"),
        (Request::greedy(vec![1], 0, &[]), "max_new_tokens is 0"),
        (Request::greedy(vec![1, 256], 4, &[]), "prompt token 256 is outside the vocabulary of 256"),
        (with(Sampling { temperature: 999_999.0, ..Sampling::default() }), "temperature is 999999"),
        (with(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature is NaN"),
        (with(Sampling { top_p: -1.0, ..Sampling::default() }), "top_p is -1"),
        (with(Sampling { top_p: 0.0, ..Sampling::default() }), "top_p is 0"),
        (with(Sampling { min_p: 1.5, ..Sampling::default() }), "min_p is 1.5"),
        (with(Sampling { repetition_penalty: 0.0, ..Sampling::default() }), "repetition_penalty is 0"),
    ] {
        let e = generator.add(request).unwrap_err();
        assert!(matches!(e, Error::Input(_)) && e.to_string().contains(word), "{e}");
    }
    let e = generator.add(Request::greedy(vec![1; 256], 1, &[])).unwrap_err();
    assert!(matches!(e, Error::ContextOverflow { need: 257, max: 256, .. }), "{e}");
    assert_eq!(generator.running(), 0);
    assert!(generator.step().unwrap().is_empty());
    generator.add(Request::greedy(vec![1; 255], usize::MAX, &[])).unwrap();
    assert_eq!(finish(&mut generator).len(), 1);
    drop(generator);
    assert_eq!(cache.bytes().allocated, 0, "what was refused holds nothing");
}

#[test]
fn embeddings_of_ids_write_what_the_ids_write() {
    let model = decoder("qwen3");
    let prompt = ids(13, 6);
    let expected = alone(&model, Request::greedy(prompt.clone(), 10, &[]));
    let embeds = tch::no_grad(|| model.embed(&tensor(&prompt)).unwrap());
    let request = Request { prompt: Prompt::Embeds(embeds), ..Request::greedy(Vec::new(), 10, &[]) };
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_prefill_chunk(5);
    // Beside one that starts from ids.
    let found = collect(&mut generator, [request, Request::greedy(prompt, 10, &[])], 2).unwrap();
    assert_eq!(found, [expected.clone(), expected]);
}
