//! Every model family against transformers, on the tiny random checkpoints of `datasets/golden` (or of the folder that
//! `NICS_GOLDEN` names): logits and hidden states of whole prompts, greedy continuations, cached against uncached, ragged
//! batch against single.

use std::path::{Path, PathBuf};

use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::Checkpoint;
use nics_core::generate::{Generator, Request, collect};
use nics_core::golden::{Golden, difference};
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::nn::RopeScaling;
use nics_core::seam::{KvCache, Ragged, SeqId};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Cases {
    new_tokens: usize,
    tolerance: Tolerance,
    #[serde(rename = "cases")]
    prompts: Vec<Case>,
}

#[derive(Deserialize)]
struct Tolerance {
    logits_relative: f64,
    hidden_relative: f64,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    ids: Vec<u32>,
    logits: String,
    hidden: String,
    /// None where transformers has no well-defined continuation (dynamic scaling past the original context).
    greedy: Option<Vec<u32>>,
}

struct Fixture {
    name: String,
    model: Decoder,
    /// End tokens of `generation_config.json`, where there is one.
    eos: Vec<u32>,
    golden: Golden,
    cases: Cases,
}

fn root() -> PathBuf {
    std::env::var_os("NICS_GOLDEN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden"), PathBuf::from)
}

/// All model folders; a folder that is neither a model nor known to another test fails.
fn fixtures() -> Vec<Fixture> {
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(root()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    let fixtures: Vec<Fixture> = dirs
        .into_iter()
        .filter(|dir| {
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            let others = ["sampling", "templates", "vision", "__pycache__"];
            assert!(
                dir.join("cases.json").exists() || others.contains(&name.as_str()),
                "no test knows the folder {name}"
            );
            dir.join("model.safetensors").exists()
        })
        .map(|dir| {
            let checkpoint = Checkpoint::open_dir(&dir).unwrap();
            let golden = Golden::at(&dir);
            let cases = serde_json::from_value(golden.json("cases.json").unwrap()).unwrap();
            let model = models::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
            let generation = checkpoint.generation_config().unwrap().unwrap_or_default();
            let eos = match &generation["eos_token_id"] {
                serde_json::Value::Array(ids) => ids.iter().map(|i| i.as_u64().unwrap() as u32).collect(),
                id => id.as_u64().map(|i| i as u32).into_iter().collect(),
            };
            Fixture {
                name: dir.file_name().unwrap().to_string_lossy().into_owned(),
                model,
                eos,
                golden,
                cases,
            }
        })
        .collect();
    assert!(!fixtures.is_empty());
    fixtures
}

fn input(ids: &[u32]) -> Tensor {
    Tensor::from_slice(&ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>())
}

fn assert_relative(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let (_, relative) = difference(found, expected).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(relative <= tolerance, "{what}: off by {relative:e} of the largest value, allowed {tolerance:e}");
}

/// Whether positions of a prompt are past where dynamic scaling starts to move: keys in a cache then keep the rotation
/// of the call that brought them, so cached and uncached differ by definition.
fn moves(model: &Decoder, tokens: usize) -> bool {
    let rope = &model.config().rope;
    matches!(rope.scaling, RopeScaling::Dynamic { .. }) && tokens > rope.max_positions
}

#[test]
fn logits_and_hidden_states() {
    let _no_grad = tch::no_grad_guard();
    let mut seen = 0;
    for Fixture { name, model, golden, cases, .. } in fixtures() {
        let expected = golden.tensors("expected.safetensors").unwrap();
        for case in &cases.prompts {
            let what = format!("{name}, {}", case.name);
            let ids = input(&case.ids);
            let rows = Ragged::contiguous(&[(SeqId(0), 0, case.ids.len())]);
            let out = model.forward(&Batch::new(rows, Input::Ids(&ids)), &mut NoCache::new(), None).unwrap();
            let logits = model.logits(&out.hidden).unwrap();
            assert_relative(&what, &logits, &expected[&case.logits], cases.tolerance.logits_relative);
            assert_relative(&what, &out.hidden, &expected[&case.hidden], cases.tolerance.hidden_relative);
            seen += 1;
        }
    }
    println!("{seen} prompts");
}

#[test]
fn greedy_tokens_alone_and_in_a_ragged_batch() {
    for Fixture { name, model, eos, cases, .. } in fixtures() {
        let expected: Vec<(&Case, &Vec<u32>)> =
            cases.prompts.iter().filter_map(|c| Some((c, c.greedy.as_ref()?))).collect();
        assert!(!expected.is_empty(), "{name} has no continuation");
        let requests =
            || expected.iter().map(|(c, _)| Request::greedy(c.ids.clone(), cases.new_tokens, &eos));
        for batch in [1, expected.len()] {
            let mut cache = DenseCache::new();
            // The fixtures run past `max_position_embeddings` on purpose.
            let mut generator =
                Generator::new(&model, &mut cache).with_context(4096).with_prefill_chunk(4096);
            let all = collect(&mut generator, requests(), batch).unwrap();
            for ((case, greedy), found) in expected.iter().zip(all) {
                assert_eq!(found, **greedy, "{name}, {}, {batch} at a time", case.name);
            }
            drop(generator);
            assert_eq!(cache.bytes().allocated, 0, "every sequence was closed");
        }
    }
}

#[test]
fn cached_in_pieces_equals_uncached() {
    let _no_grad = tch::no_grad_guard();
    for Fixture { name, model, cases, .. } in fixtures() {
        for case in cases.prompts.iter().filter(|c| !moves(&model, c.ids.len())) {
            let len = case.ids.len();
            let run = |cache: &mut dyn KvCache, seq: SeqId, from: usize, to: usize| {
                let ids = input(&case.ids[from..to]);
                let rows = Ragged::contiguous(&[(seq, from, to - from)]);
                model.forward(&Batch::new(rows, Input::Ids(&ids)), cache, None).unwrap().hidden
            };
            let whole = run(&mut NoCache::new(), SeqId(0), 0, len);
            let mut cache = DenseCache::new();
            let seq = cache.open(len).unwrap();
            // One row, then growing pieces.
            let (mut parts, mut at, mut piece) = (Vec::new(), 0, 1);
            while at < len {
                let to = (at + piece).min(len);
                parts.push(run(&mut cache, seq, at, to));
                (at, piece) = (to, piece + 2);
            }
            let what = format!("{name}, {}", case.name);
            assert_relative(&what, &Tensor::cat(&parts, 0), &whole, 1e-5);
            // Cut back, a sequence goes on as if the rest had never been.
            let keep = len / 2;
            cache.truncate(seq, keep).unwrap();
            let fork = cache.fork(seq).unwrap();
            for s in [seq, fork] {
                let rest = run(&mut cache, s, keep, len);
                let expected = whole.narrow(0, keep as i64, (len - keep) as i64);
                assert_relative(&what, &rest, &expected, 1e-5);
                assert_eq!(cache.kept(s, 0), len);
            }
        }
    }
}

#[test]
fn a_ragged_batch_equals_single_calls() {
    let _no_grad = tch::no_grad_guard();
    for Fixture { name, model, cases, .. } in fixtures() {
        let lens: Vec<_> =
            cases.prompts.iter().enumerate().map(|(i, c)| (SeqId(i as u64), 0, c.ids.len())).collect();
        let ids = input(&cases.prompts.iter().flat_map(|c| c.ids.clone()).collect::<Vec<_>>());
        let batch = Batch::new(Ragged::contiguous(&lens), Input::Ids(&ids));
        let all = model.forward(&batch, &mut NoCache::new(), None).unwrap();
        for ((_, from, positions), case) in all.rows.iter().zip(&cases.prompts) {
            let rows = Ragged::contiguous(&[(SeqId(0), 0, case.ids.len())]);
            let ids = input(&case.ids);
            let single =
                model.forward(&Batch::new(rows, Input::Ids(&ids)), &mut NoCache::new(), None).unwrap();
            let found = all.hidden.narrow(0, from as i64, positions.len() as i64);
            assert_relative(&format!("{name}, {}", case.name), &found, &single.hidden, 1e-5);
        }
    }
}
