//! The embedded models, and training.

use std::path::Path;

use mbq::language::Language;
use mbq::nano::{ANSWER, POSITIONS, Recipe, Report, train};
use nics_base::interrupt::Interrupt;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::generate::{Generator, Prompt, Request, collect};
use nics_core::models::load_vlm;
use nics_core::template::{ChatTemplate, Content, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::train::Workshop;
use nics_core::vision::{Media, Processor, RgbImage};
use nics_datasets::symbol_grid::{EDGE, EOS_ID, Nuisance, SymbolGrid, problem, problems};
use nics_datasets::word_problems::Split;
use serde_json::json;
use tch::{Device, Kind};

use crate::embedded;

fn picture(problem: &SymbolGrid, nuisance: Nuisance) -> Media {
    Media::Image(RgbImage::from_raw(EDGE as u32, EDGE as u32, problem.rgb(nuisance)).unwrap())
}

/// A question and its answer, as captions say them.
fn messages(problem: &SymbolGrid) -> [Message; 2] {
    let parts = vec![json!({"type": "image"}), json!({"type": "text", "text": problem.line.to_string()})];
    let asks = Message { content: Some(Content::Parts(parts)), ..Message::new("user", "") };
    [asks, Message::new("assistant", problem.answer_text())]
}

#[test]
fn every_embedded_model_is_what_its_card_says_and_reads_pictures() {
    let _no_grad = tch::no_grad_guard();
    let mut bytes = 0;
    for seed in 0..8 {
        let dir = embedded(seed);
        let checkpoint = Checkpoint::open_dir(&dir).unwrap();
        let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
        assert!(card.contains(&checkpoint.weights_hash().unwrap()), "the card is of other weights");
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
        let template = ChatTemplate::from_checkpoint(&checkpoint).unwrap().unwrap();
        let processor = Processor::open(&checkpoint).unwrap();
        let model = load_vlm(&checkpoint, Device::Cpu, Kind::Float).unwrap();
        let mut requests = Vec::new();
        let nuisances = [Nuisance { pixels: 32, std: 3.0 }, Nuisance { pixels: 6, std: 8.0 }];
        let all: Vec<SymbolGrid> = problems(Split::Test, 7_000 + seed, 48).collect();
        for (i, problem) in all.iter().enumerate() {
            // Words, template and tokenizer agree with the generator.
            let messages = messages(problem);
            let options =
                |add_generation_prompt| RenderOptions { add_generation_prompt, ..RenderOptions::default() };
            let whole = template.render(&messages, &options(false)).unwrap();
            assert_eq!(tokenizer.encode(&whole, false).unwrap(), problem.ids(), "{whole}");
            let asked = template.render(&messages[..1], &options(true)).unwrap();
            let ids = tokenizer.encode(&asked, false).unwrap();
            assert_eq!(ids, problem.ids()[..5], "{asked}");
            let prompt = processor.prompt(&ids, &[picture(problem, nuisances[i % 2])]).unwrap();
            assert_eq!(prompt.ids.len(), ANSWER.start);
            let prompt = Prompt::Embedded(model.embed_prompt(&prompt).unwrap());
            requests.push(Request { prompt, ..Request::greedy(Vec::new(), 8, &[EOS_ID]) });
        }
        let mut cache = DenseCache::new();
        let written = collect(&mut Generator::new(&model, &mut cache), requests, 16).unwrap();
        let right = written.iter().zip(&all).filter(|(w, p)| w.starts_with(&p.ids()[5..11])).count();
        let told = card.split("answers without a mistake ").nth(1).and_then(|rest| rest.split(' ').next());
        let told: f64 = told.unwrap().parse().unwrap();
        assert!(
            told > 200.0 && (right as f64 / 48.0 - told / 500.0).abs() < 0.2,
            "seed {seed}: {right}, {told}"
        );
        bytes += std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum::<u64>();
    }
    assert!(bytes < 6 << 20, "{bytes} bytes");
}

const TINY: &str = r"
    seeds = [7]
    batch = 4
    embedding_std = 0.5
    frozen = ['vision_tower.']
    validation = 4
    nuisance = [{ pixels = 32, std = 3.0 }, { pixels = 6, std = 8.0 }]
    text_config = { hidden_size = 16, intermediate_size = 32, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 1, head_dim = 8 }
    vision_config = { hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1, num_attention_heads = 2 }
    train = { steps = 12, lr = 1e-2, warmup = 2, save_every = 3, log_every = 4 }
";

fn hash(out: &Path) -> String {
    Checkpoint::open_dir(&out.join("seed-7")).unwrap().weights_hash().unwrap()
}

#[test]
fn training_stopped_anywhere_ends_with_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recipe.toml");
    std::fs::write(&file, TINY).unwrap();
    let recipe = Recipe::read(&file).unwrap();
    let whole = dir.path().join("whole");
    let never = Interrupt::never();
    let run = |recipe: &Recipe, [state, out]: [&Path; 2], interrupt: &Interrupt, report: Report| {
        train(recipe, &Workshop { state, out, device: Device::Cpu, interrupt }, report)
    };
    run(&recipe, [&dir.path().join("state"), &whole], &never, &mut |_, _| {}).unwrap();
    let (state, out) = (dir.path().join("stopped-state"), dir.path().join("stopped"));
    for stop in [5, 4, 1000] {
        let interrupt = Interrupt::never();
        let mut steps = 0;
        let result = run(&recipe, [&state, &out], &interrupt, &mut |_, _| {
            steps += 1;
            if steps == stop {
                interrupt.request();
            }
        });
        assert_eq!(result.is_ok(), stop == 1000);
    }
    assert_eq!(hash(&whole), hash(&out));
    // Once more finds the work done.
    let mut steps = 0;
    run(&recipe, [&state, &out], &never, &mut |_, _| steps += 1).unwrap();
    assert_eq!(steps, 0);
    // What is frozen stays as it was drawn, so that a run of one step has the same tower; what is not does not.
    let short = Recipe {
        train: nics_core::train::TrainConfig { steps: 3, ..recipe.train.clone() },
        ..recipe.clone()
    };
    let other = dir.path().join("short");
    run(&short, [&dir.path().join("short-state"), &other], &never, &mut |_, _| {}).unwrap();
    let tensor = |out: &Path, name: &str| {
        let checkpoint = Checkpoint::open_dir(&out.join("seed-7")).unwrap();
        checkpoint.root(Device::Cpu, Kind::Float).stored(name).unwrap()
    };
    let tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight";
    assert!(tensor(&whole, tower).equal(&tensor(&other, tower)));
    let projector = "multi_modal_projector.linear_1.weight";
    assert!(!tensor(&whole, projector).equal(&tensor(&other, projector)));
    // What came out is a model that every command takes.
    let checkpoint = Checkpoint::open_dir(&out.join("seed-7")).unwrap();
    assert!(Language::sees(&checkpoint));
    Language::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    // And what is not there cannot be frozen.
    let wrong = Recipe { frozen: vec!["tower.".into()], ..recipe };
    let error = run(&wrong, [&dir.path().join("w"), &dir.path().join("x")], &never, &mut |_, _| {});
    assert!(error.unwrap_err().to_string().contains("\"tower.\""));
}

#[test]
fn a_picture_is_as_many_tokens_as_it_has_cells() {
    let checkpoint = Checkpoint::open_dir(&embedded(0)).unwrap();
    let processor = Processor::open(&checkpoint).unwrap();
    let problem = problem(Split::Test, 1, 1);
    let nuisance = Nuisance { pixels: 32, std: 3.0 };
    let prompt = processor.prompt(&problem.ids(), &[picture(&problem, nuisance)]).unwrap();
    assert_eq!(prompt.ids.len(), POSITIONS);
    // The tower sees the numbers behind the levels of grey.
    let pixels = &prompt.media[0].media.pixels;
    let level = f64::from(problem.grey(nuisance)[5]);
    assert!((pixels.double_value(&[0, 0, 0, 5]) - (level - 127.5) / 5.0).abs() < 1e-4);
}
