//! Nano pairs: what is embedded is what its cards say; training is resumable, and its result loads.

use std::path::{Path, PathBuf};

use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::Checkpoint;
use nics_core::tokenizer::Tokenizer;
use nics_core::train::Workshop;
use nics_datasets::word_problems::Split;
use r2r::nano::{Recipe, Report, RingTask, Role, accuracy, train};
use r2r::study::Models;
use tch::Device;

fn embedded(seed: u64) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../datasets/nano/r2r-nano/seed-{seed}"))
}

#[test]
fn every_embedded_pair_is_what_its_cards_say() {
    let mut bytes = 0;
    for seed in [0, 1, 2] {
        let models = Models::load(&embedded(seed), Device::Cpu).unwrap();
        assert_eq!((models.parameters[0], models.parameters[2]), (6_000, 199_056));
        let solved = |model| accuracy(model, &models.task, Split::Test, 500 + seed, 100).unwrap();
        let (small, large) = (solved(&models.small), solved(&models.large));
        assert!(small < 0.4 && large > 0.93, "pair of seed {seed}: {small} and {large}");
        for role in [Role::Small, Role::Middle, Role::Large] {
            let dir = embedded(seed).join(role.name());
            let checkpoint = Checkpoint::open_dir(&dir).unwrap();
            let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
            assert!(card.contains(&checkpoint.weights_hash().unwrap()), "the card is of other weights");
            let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
            assert_eq!(tokenizer.special_ids().eos, [models.task.eos()]);
            let problem = models.task.ring().problem(Split::Test, seed, 4);
            let ids = tokenizer.encode(&problem.text(), true).unwrap();
            assert_eq!(ids, models.task.encode(&problem.text()).unwrap());
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), problem.text());
            bytes +=
                std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum::<u64>();
        }
    }
    assert!(bytes < 3 << 20, "{bytes} bytes");
}

const TINY: &str = r"
    modulus = 5
    seeds = [7]
    validation = 4
    [models.small]
    config = { hidden_size = 8, intermediate_size = 8, num_hidden_layers = 1, num_attention_heads = 1, num_key_value_heads = 1, head_dim = 8 }
    batch = 4
    embedding_std = 0.5
    train = { steps = 12, lr = 1e-2, warmup = 2, save_every = 3, log_every = 4 }
    [models.large]
    config = { hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 1, head_dim = 8 }
    batch = 4
    embedding_std = 0.5
    train = { steps = 12, lr = 1e-2, warmup = 2, save_every = 3, log_every = 4 }
";

fn hashes(out: &Path) -> Vec<String> {
    ["small", "large"]
        .map(|role| Checkpoint::open_dir(&out.join("seed-7").join(role)).unwrap().weights_hash().unwrap())
        .to_vec()
}

#[test]
fn training_stopped_anywhere_ends_with_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recipe.toml");
    std::fs::write(&file, TINY).unwrap();
    let recipe = Recipe::read(&file).unwrap();
    let whole = dir.path().join("whole");
    let never = Interrupt::never();
    let run = |[state, out]: [&Path; 2], interrupt: &Interrupt, report: Report| {
        train(&recipe, &Workshop { state, out, device: Device::Cpu, interrupt }, report)
    };
    run([&dir.path().join("state"), &whole], &never, &mut |_, _, _| {}).unwrap();
    let (state, out) = (dir.path().join("stopped-state"), dir.path().join("stopped"));
    // Stops in the first model, then in the second, then not at all.
    for stop in [5, 16, 1000] {
        let interrupt = Interrupt::never();
        let mut steps = 0;
        let result = run([&state, &out], &interrupt, &mut |_, _, _| {
            steps += 1;
            if steps == stop {
                interrupt.request();
            }
        });
        assert_eq!(result.is_ok(), stop == 1000);
    }
    assert_eq!(hashes(&whole), hashes(&out));
    // Once more finds the work done; another recipe does not.
    let mut steps = 0;
    run([&state, &out], &never, &mut |_, _, _| steps += 1).unwrap();
    assert_eq!(steps, 0);
    assert_eq!(
        RingTask::of_vocabulary(
            Tokenizer::from_checkpoint(&Checkpoint::open_dir(&out.join("seed-7/small")).unwrap())
                .unwrap()
                .vocab_size()
        )
        .unwrap()
        .ring()
        .modulus(),
        5
    );
}
