//! Every family against transformers: pixels and ids exact, logits within 1e-4, greedy continuations token for token.

use nics_core::cache::{DenseCache, NoCache};
use nics_core::generate::{Generator, Prompt, Request, collect};
use nics_core::models::{Batch, Embedded, Input, Model, Vlm};
use nics_core::sampling::Sampling;
use nics_core::seam::{KvCache, SeqId};
use nics_core::vision::{Layout, Media, Processor, RgbImage, TokenKind};
use tch::Tensor;

use super::kit::{Fixture, assert_relative, fixture, fixtures};

/// Hidden states of whole prompts in one call without a cache.
pub fn hidden(model: &Vlm, prompts: &[(SeqId, &Embedded)]) -> Tensor {
    let (rows, x) = Embedded::batch(prompts).unwrap();
    model.forward(&Batch::new(rows, Input::Embeds(&x)), &mut NoCache::new(), None).unwrap().hidden
}

fn request(prompt: Embedded, new: usize) -> Request {
    Request {
        prompt: Prompt::Embedded(prompt),
        sampling: Sampling::default(),
        max_new_tokens: new,
        eos: Vec::new(),
    }
}

#[test]
fn pixels_ids_and_kinds() {
    for f in fixtures() {
        let expected = f.golden.tensors("expected.safetensors").unwrap();
        for (number, case) in f.cases.prompts.iter().enumerate() {
            let what = format!("{}, {}", f.name, case.name);
            let prompt = f.prompt(case);
            assert_eq!(prompt.ids, case.expanded, "{what}");
            assert_eq!(prompt.media.len(), case.media.len(), "{what}");
            for (i, placed) in prompt.media.iter().enumerate() {
                let pixels = &expected[&format!("{number}.pixels.{i}")];
                assert_eq!(placed.media.pixels.size(), pixels.size(), "{what}, medium {i}");
                let off = (&placed.media.pixels - pixels).abs().max().double_value(&[]);
                assert!(placed.media.pixels.equal(pixels), "{what}, medium {i}: pixels off by {off:e}");
                assert_eq!(placed.rows.len(), placed.media.tokens, "{what}");
                assert!(placed.rows.iter().all(|&row| prompt.kinds[row] == placed.media.kind), "{what}");
            }
            let seen = prompt.kinds.iter().filter(|&&kind| kind != TokenKind::Text).count();
            assert_eq!(seen, prompt.media.iter().map(|p| p.rows.len()).sum::<usize>(), "{what}");

            // Written out already, a prompt stays as it is.
            let again = f.processor.prompt(&case.expanded, &f.media(case)).unwrap();
            assert_eq!((&again.ids, &again.kinds), (&prompt.ids, &prompt.kinds), "{what}");
            for (a, b) in again.media.iter().zip(&prompt.media) {
                assert_eq!(a.rows, b.rows, "{what}");
            }
        }
    }
}

#[test]
fn positions() {
    let mut seen = 0;
    for f in fixtures() {
        for case in &f.cases.prompts {
            let rotary = f.model.positions().of(&f.prompt(case)).unwrap();
            assert_eq!(rotary.is_some(), case.positions.is_some(), "{}, {}", f.name, case.name);
            if let (Some(rotary), Some(positions)) = (rotary, &case.positions) {
                for (i, plane) in positions.iter().enumerate() {
                    let found: Vec<i64> = rotary.planes.iter().map(|p| p[i]).collect();
                    assert_eq!(&found, plane, "{}, {}, plane {i}", f.name, case.name);
                }
                assert_eq!(Some(rotary.delta), case.delta);
                seen += 1;
            }
        }
    }
    assert!(seen > 0, "no family with positions in time and space");
}

#[test]
fn logits() {
    let _no_grad = tch::no_grad_guard();
    for f in fixtures() {
        let expected = f.golden.tensors("expected.safetensors").unwrap();
        for (number, case) in f.cases.prompts.iter().enumerate() {
            let embedded = f.model.embed_prompt(&f.prompt(case)).unwrap();
            let logits = f.model.logits(&hidden(&f.model, &[(SeqId(0), &embedded)])).unwrap();
            let what = format!("{}, {}", f.name, case.name);
            assert_relative(
                &what,
                &logits,
                &expected[&format!("{number}.logits")],
                f.cases.tolerance.logits_relative,
            );
        }
    }
}

fn requests(f: &Fixture) -> Vec<Request> {
    let all = f.cases.prompts.iter();
    all.map(|case| request(f.model.embed_prompt(&f.prompt(case)).unwrap(), f.cases.new_tokens)).collect()
}

#[test]
fn greedy_tokens_alone_and_in_a_ragged_batch() {
    for f in fixtures() {
        let n = f.cases.prompts.len();
        // In one piece, and with prompts read in pieces of seven rows.
        for (batch, chunk) in [(1, 1024), (n, 1024), (n, 7)] {
            let mut cache = DenseCache::new();
            let mut generator = Generator::new(&f.model, &mut cache)
                .with_context(4096)
                .with_prefill_chunk(chunk)
                .last_row_apart(true);
            let all = collect(&mut generator, requests(&f), batch).unwrap();
            for (case, found) in f.cases.prompts.iter().zip(all) {
                assert_eq!(found, case.greedy, "{}, {}, {batch} at a time, {chunk} rows", f.name, case.name);
            }
            drop(generator);
            assert_eq!(cache.bytes().allocated, 0, "every sequence was closed");
        }
    }
}

#[test]
fn a_ragged_batch_equals_single_calls() {
    let _no_grad = tch::no_grad_guard();
    for f in fixtures() {
        let all: Vec<Embedded> =
            f.cases.prompts.iter().map(|c| f.model.embed_prompt(&f.prompt(c)).unwrap()).collect();
        let alone: Vec<Tensor> = all.iter().map(|e| hidden(&f.model, &[(SeqId(0), e)])).collect();
        let together: Vec<_> = all.iter().enumerate().map(|(i, e)| (SeqId(i as u64), e)).collect();
        assert_relative(&f.name, &hidden(&f.model, &together), &Tensor::cat(&alone, 0), 1e-5);
    }
    assert!(Embedded::batch(&[]).is_err());
}

#[test]
fn text_alone_is_a_prompt_of_ids() {
    for f in fixtures() {
        let Some(case) = f.cases.prompts.iter().find(|c| c.media.is_empty()) else { continue };
        let mut cache = DenseCache::new();
        let mut generator = Generator::new(&f.model, &mut cache);
        // In one batch with a prompt that stands in time and space.
        let shown = f.model.embed_prompt(&f.prompt(&f.cases.prompts[0])).unwrap();
        let requests =
            [Request::greedy(case.ids.clone(), f.cases.new_tokens, &[]), request(shown, f.cases.new_tokens)];
        let all = collect(&mut generator, requests, 2).unwrap();
        assert_eq!(all, [case.greedy.clone(), f.cases.prompts[0].greedy.clone()], "{}", f.name);
    }
}

#[test]
fn tokens_and_tiles_of_many_sizes() {
    let rows = |name: &str, key: &str| -> Vec<[i64; 3]> {
        let f = fixture(name);
        let all = Vec::<i64>::try_from(f.golden.tensors("expected.safetensors").unwrap()[key].flatten(0, -1));
        all.unwrap().chunks(3).map(|row| [row[0], row[1], row[2]]).collect()
    };
    let Processor::OneVision(processor) = fixture("llava-onevision").processor else {
        panic!("another family")
    };
    for [height, width, tokens] in rows("llava-onevision", "tokens") {
        let found = processor.image_tokens(height as u32, width as u32).unwrap();
        assert_eq!(found as i64, tokens, "{width}x{height}");
    }
    let f = fixture("internvl2");
    for [height, width, pictures] in rows("internvl2", "pictures") {
        let media = [Media::Image(RgbImage::new(width as u32, height as u32))];
        let prepared = f.processor.prepare(&media).unwrap().remove(0);
        assert_eq!(prepared.layout, Layout::Frames(pictures as usize), "{width}x{height}");
    }
}
