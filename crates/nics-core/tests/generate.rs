//! Step-wise generation: sequences come and go, and none changes another's tokens.

mod seam_models;

use nics_core::Error;
use nics_core::cache::DenseCache;
use nics_core::generate::{Finish, Generator, Prompt, Request, RequestId, Token, collect, run};
use nics_core::models::{Decoder, Model};
use nics_core::sampling::Sampling;
use nics_core::seam::{Bytes, KvCache, SeqId};
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
    assert_eq!(cache.bytes(), Bytes::default());

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

#[test]
fn budgets_and_calls_of_their_own_change_no_tokens() {
    let model = decoder("qwen2");
    let requests = || (0..4).map(|i| drawn(ids(1 + 17 * i, i as u32), 9, i as u64));
    let expected: Vec<Vec<u32>> = requests().map(|r| alone(&model, r)).collect();
    for (chunk, budget, isolate) in
        [(1024, 1, false), (5, 7, false), (5, 7, true), (1, 2, true), (1024, 30, true)]
    {
        let mut cache = DenseCache::new();
        let mut generator = Generator::new(&model, &mut cache)
            .with_prefill_chunk(chunk)
            .with_prefill_budget(budget)
            .isolate_prompts(isolate);
        let found = collect(&mut generator, requests(), 4).unwrap();
        assert_eq!(found, expected, "chunk {chunk}, budget {budget}, isolated {isolate}");
    }
}

#[test]
fn the_oldest_prompt_is_read_first_and_no_step_reads_more_than_its_budget() {
    let model = decoder("llama");
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_prefill_chunk(8).with_prefill_budget(12);
    let names: Vec<RequestId> =
        [20, 20, 6].iter().map(|&n| generator.add(drawn(ids(n, n as u32), 30, 0)).unwrap()).collect();
    let read = |generator: &Generator| -> Vec<usize> {
        names.iter().map(|id| generator.reading(*id).unwrap().1).collect()
    };
    // A second piece of 8 does not fit beside the first, and the short prompt does not overtake.
    for expected in [[8, 0, 0], [16, 0, 0], [20, 8, 0], [20, 16, 0], [20, 20, 6]] {
        generator.step().unwrap();
        assert_eq!(read(&generator), expected);
    }
}

#[test]
fn a_released_sequence_goes_on_elsewhere() {
    let model = decoder("qwen3");
    let prompt = ids(12, 3);
    let expected = alone(&model, drawn(prompt.clone(), 8, 1));
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).release_ended(true);
    let id = generator.add(drawn(prompt.clone(), 8, 1)).unwrap();
    let released = loop {
        let mut step = generator.advance().unwrap();
        if let Some(released) = step.ended.pop() {
            break released;
        }
    };
    assert_eq!((released.request, generator.running()), (id, 0));
    let all = [&prompt[..], &expected].concat();
    assert_eq!(released.ids.as_deref(), Some(&all[..all.len() - 1]), "the last token has no row");

    // More rows than are there, fewer, all of the prompt, and a sequence that is not there: the caller keeps it.
    let longer = [&all[..], &ids(6, 4)].concat();
    for (prompt, seq, read) in [
        (longer.clone(), released.seq, 20),
        (longer.clone(), released.seq, 18),
        (all[..19].to_vec(), released.seq, 19),
        (longer.clone(), SeqId(77), 19),
    ] {
        let e = generator.add_from(Request::greedy(prompt, 5, &[]), seq, read).unwrap_err();
        assert!(e.to_string().contains("cannot go on at row"), "{e}");
    }
    let request = || Request::greedy(longer.clone(), 5, &[]);
    let room = generator.check(&request()).unwrap();
    assert_eq!(room, longer.len() + 5);
    assert!(generator.cache_mut().resume(released.seq, 19, room).unwrap());
    let id = generator.add_from(request(), released.seq, 19).unwrap();
    assert_eq!(of(&finish(&mut generator), id), alone(&model, request()));

    drop(generator);
    // Released in the middle: what is read so far.
    let mut generator = Generator::new(&model, &mut cache).with_prefill_chunk(5);
    let id = generator.add(request()).unwrap();
    generator.step().unwrap();
    let released = generator.release(id).unwrap();
    assert_eq!(released.ids.as_deref(), Some(&longer[..5]));
    assert!(generator.release(id).is_none());
}

#[test]
fn a_branch_is_what_its_rows_alone_would_be() {
    let model = decoder("qwen2-window");
    let all = ids(120, 2);
    let mut cache = DenseCache::new();
    let seq = cache.open(130).unwrap();
    forward(&model, &mut cache, seq, 0, &all, None).unwrap();
    let fresh = |position: usize| {
        let mut cache = DenseCache::new();
        let seq = cache.open(130).unwrap();
        forward(&model, &mut cache, seq, 0, &all[..position], None).unwrap();
        forward(&model, &mut cache, seq, position, &all[100..110], None).unwrap().hidden
    };
    for position in [1, 63, 64, 100] {
        let branch = cache.branch(seq, position, position + 10).unwrap().unwrap();
        assert_eq!(cache.kept(branch, 2), position);
        let hidden = forward(&model, &mut cache, branch, position, &all[100..110], None).unwrap().hidden;
        assert_close(&hidden, &fresh(position));
        let full = forward(&model, &mut cache, branch, position + 10, &all[..1], None);
        assert!(matches!(full, Err(Error::ContextOverflow { .. })), "it has a limit of its own");
        let held = cache.held(branch).unwrap();
        assert!(held.allocated <= cache.forecast(model.dims(), position + 10), "{held:?}");
        cache.close(branch);
    }
    // What a sequence does not hold, or may not hold, it cannot begin with.
    for (position, max) in [(0, 10), (121, 130), (50, 49)] {
        assert!(cache.branch(seq, position, max).unwrap().is_none());
        assert!(!cache.resume(seq, position, max).unwrap());
    }
    assert!(cache.branch(SeqId(99), 1, 2).is_err() && cache.resume(SeqId(99), 1, 2).is_err());
    assert_eq!(cache.held(SeqId(99)), None);
    // Resumed in less room: the storage shrinks with it.
    assert!(cache.resume(seq, 40, 50).unwrap());
    assert_eq!((cache.kept(seq, 0), cache.held(seq)), (40, Some(cache.bytes())));
    assert!(cache.bytes().allocated <= cache.forecast(model.dims(), 50));
    let hidden = forward(&model, &mut cache, seq, 40, &all[100..110], None).unwrap().hidden;
    assert_close(&hidden, &fresh(40));
    cache.close(seq);
    assert_eq!(cache.bytes(), Bytes::default());
}
