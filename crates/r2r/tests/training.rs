//! Training: early stopping, exact resume, refusals.

use nics_base::interrupt::Interrupt;
use r2r::router::{Architecture, InitArgs, Router, RouterConfig};
use r2r::training::{Hooks, LossKind, Outcome, Rows, STATE_FILE, TrainingConfig, train};
use r2r::{Error, checkpoint};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

const HIDDEN: i64 = 6;
const VOCAB: i64 = 30;

fn config() -> RouterConfig {
    let args = InitArgs {
        hidden_states_size: Some(HIDDEN),
        logits_size: Some(4),
        hidden_dims: vec![8, 12],
        expansion_factor: 2,
        dropout_rate: 0.1,
        ..InitArgs::default()
    };
    RouterConfig { architecture: Architecture::HiddenTokenLogits, args }
}

fn router() -> Router {
    let embedding = random(9, &[VOCAB, HIDDEN]);
    Router::random(config(), Some(&embedding), None, 3, Device::Cpu).unwrap()
}

fn random(seed: u64, shape: &[i64]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: i64 = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Rows whose first hidden value tells the label, mostly.
fn rows(seed: u64, n: i64) -> Rows {
    let hidden = random(seed, &[n, HIDDEN]);
    let noise = random(seed + 1, &[n]) * 0.3;
    let label = (hidden.select(1, 0) + noise).gt(0.5).to_kind(Kind::Int64);
    let logits = random(seed + 2, &[n, 4]).sort(1, true).0;
    let token = (random(seed + 3, &[n]).abs() * VOCAB as f64).to_kind(Kind::Int64).clamp(0, VOCAB - 1);
    Rows::new(Some(hidden), Some(token), Some(logits), None, &label).unwrap()
}

fn settings() -> TrainingConfig {
    TrainingConfig {
        lr: 3e-3,
        batch: 32,
        epochs: 6,
        patience: 3,
        seed: 5,
        save_every: 3,
        ..TrainingConfig::default()
    }
}

fn run(router: &mut Router, dir: Option<&std::path::Path>, hooks: Hooks) -> r2r::Result<Outcome> {
    train(router, &rows(1, 300), &rows(100, 120), &settings(), dir, hooks)
}

fn same(a: &Router, b: &Router) -> bool {
    a.parameters().unwrap().iter().zip(b.parameters().unwrap()).all(|((_, a), (_, b))| a.equal(&b))
}

#[test]
fn a_router_learns_and_is_deterministic() {
    let (mut first, mut second) = (router(), router());
    let before = router();
    let outcome = run(&mut first, None, Hooks::default()).unwrap();
    assert!(!same(&first, &before));
    let metrics = outcome.threshold.metrics;
    assert!(outcome.threshold.met && metrics.recall >= 0.95 && metrics.positive_rate < 0.6, "{metrics:?}");
    run(&mut second, None, Hooks::default()).unwrap();
    assert!(same(&first, &second));
}

#[test]
fn a_run_stopped_at_any_step_ends_with_the_same_weights() {
    let mut whole = router();
    let expected = run(&mut whole, None, Hooks::default()).unwrap();
    // Ten steps an epoch: within, at the end of, and between saved states.
    for stop_at in [1usize, 3, 4, 10, 11, 25] {
        let dir = tempfile::tempdir().unwrap();
        let interrupt = Interrupt::never();
        let mut steps = 0;
        let mut step = |_, _, _, _| {
            steps += 1;
            if steps == stop_at {
                interrupt.request();
            }
        };
        let hooks = Hooks { interrupt: interrupt.clone(), step: Some(&mut step), ..Hooks::default() };
        let error = run(&mut router(), Some(dir.path()), hooks).unwrap_err();
        assert!(matches!(error, Error::Base(nics_base::Error::Interrupted)), "{error}");
        let mut resumed = router();
        let outcome = run(&mut resumed, Some(dir.path()), Hooks::default()).unwrap();
        assert!(same(&whole, &resumed), "stopped at {stop_at}");
        assert_eq!(outcome.epochs, expected.epochs);
        // Once more finds the work done.
        let mut again = router();
        assert_eq!(run(&mut again, Some(dir.path()), Hooks::default()).unwrap().epochs, expected.epochs);
        assert!(same(&whole, &again));
    }
}

/// A run that ends without a word goes on from its last saved state, not from where it was.
#[test]
fn a_run_that_died_between_saved_states_ends_with_the_same_weights() {
    let mut whole = router();
    let expected = run(&mut whole, None, Hooks::default()).unwrap();
    for die_at in [1usize, 2, 5, 10, 14, 38] {
        let dir = tempfile::tempdir().unwrap();
        let mut steps = 0;
        let mut step = |_, _, _, _| {
            steps += 1;
            assert!(steps < die_at, "killed on purpose");
        };
        let hooks = Hooks { step: Some(&mut step), ..Hooks::default() };
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&mut router(), Some(dir.path()), hooks)
        }));
        assert!(died.is_err());
        let mut resumed = router();
        let mut taken = 0;
        let mut count = |_, _, _, _| taken += 1;
        let hooks = Hooks { step: Some(&mut count), ..Hooks::default() };
        let outcome = run(&mut resumed, Some(dir.path()), hooks).unwrap();
        assert!(same(&whole, &resumed), "died at {die_at}");
        assert_eq!(outcome.epochs, expected.epochs);
        // Ten steps an epoch, a state after every third and at the end.
        let saved = (die_at - 1) / 10 * 10 + ((die_at - 1) % 10) / 3 * 3;
        assert_eq!(taken, 60 - saved, "died at {die_at}");
    }
}

#[test]
fn the_folder_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(&mut router(), Some(dir.path()), Hooks::default()).unwrap();
    let other = TrainingConfig { lr: 1e-3, ..settings() };
    let error =
        train(&mut router(), &rows(1, 300), &rows(100, 120), &other, Some(dir.path()), Hooks::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("training") && error.contains(STATE_FILE), "{error}");
    let error =
        train(&mut router(), &rows(2, 300), &rows(100, 120), &settings(), Some(dir.path()), Hooks::default());
    assert!(error.unwrap_err().to_string().contains("train_labels"));
    std::fs::write(dir.path().join(STATE_FILE), b"half a file").unwrap();
    assert!(run(&mut router(), Some(dir.path()), Hooks::default()).is_err());
}

#[test]
fn training_ends_when_the_validation_loss_no_longer_falls() {
    // Labels that nothing tells: the loss on other rows soon rises.
    let label = |seed| random(seed, &[200]).gt(0.4).to_kind(Kind::Int64);
    let noise = |seed| {
        let rows = rows(seed, 200);
        Rows::new(rows.hidden, rows.token, rows.logits, None, &label(seed + 50)).unwrap()
    };
    let config = TrainingConfig { lr: 0.02, epochs: 40, patience: 2, ..settings() };
    let mut router = router();
    let outcome = train(&mut router, &noise(20), &noise(40), &config, None, Hooks::default()).unwrap();
    assert!(outcome.stopped_early);
    assert_eq!(outcome.epochs.len(), outcome.best_epoch + 2);
    // The router is the best epoch's.
    let best = outcome.epochs[outcome.best_epoch - 1];
    assert!((outcome.validation.metrics(0.5).accuracy - best.accuracy).abs() < 1e-12);
}

#[test]
fn senseless_runs_are_refused() {
    let none = |rows: &Rows| Tensor::zeros([rows.len() as i64], (Kind::Int64, Device::Cpu));
    let sound = rows(1, 50);
    let all_zero = rows(1, 50);
    let label = none(&all_zero);
    let all_zero = Rows::new(all_zero.hidden, all_zero.token, all_zero.logits, None, &label).unwrap();
    for (a, b) in [(&all_zero, &sound), (&sound, &all_zero)] {
        let error = train(&mut router(), a, b, &settings(), None, Hooks::default()).unwrap_err();
        assert!(matches!(error, Error::NoPositiveLabels { positive: 0, total: 50 }), "{error}");
    }
    for (config, field) in [
        (TrainingConfig { lr: f64::NAN, ..settings() }, "lr"),
        (TrainingConfig { batch: 0, ..settings() }, "batch"),
        (TrainingConfig { betas: [0.9, 1.0], ..settings() }, "betas"),
        (TrainingConfig { min_recall: 2.0, ..settings() }, "min_recall"),
        (TrainingConfig { loss: LossKind::Bce { recall_factor: 0.0 }, ..settings() }, "recall_factor"),
    ] {
        let error =
            train(&mut router(), &sound, &sound, &config, None, Hooks::default()).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
    let label = Tensor::from_slice(&[0i64, 1, -1]);
    assert!(Rows::new(None, None, None, None, &label).unwrap_err().to_string().contains("0 or 1"));
    assert!(Rows::new(Some(random(1, &[2, 6])), None, None, None, &label).is_err());
}

#[test]
fn every_architecture_begins_at_random_and_survives_a_folder() {
    let embedding = random(9, &[VOCAB, HIDDEN]);
    let dir = tempfile::tempdir().unwrap();
    for architecture in Architecture::ALL {
        let mut args = InitArgs { normalize_input: true, topk: Some(5), ..config().args };
        args.logits_size = Some(if architecture == Architecture::MultiLogits { 12 } else { 4 });
        args.use_position_embedding = architecture == Architecture::Logits;
        args.max_position_embeddings = 16;
        let config = RouterConfig { architecture, args };
        let make = |seed| {
            Router::random(config.clone(), Some(&embedding), Some(&embedding), seed, Device::Cpu).unwrap()
        };
        let (a, b, c) = (make(1), make(1), make(2));
        assert!(same(&a, &b) && !same(&a, &c), "{architecture:?}");
        let common = checkpoint::CommonArgs { threshold: 0.4, input_type: Vec::new() };
        let path = dir.path().join(architecture.name());
        checkpoint::save(&path, &a, &checkpoint::Card::new(&config, common)).unwrap();
        let (read, _) =
            checkpoint::load(&path, Some(&embedding), r2r::router::Storage::F32, Device::Cpu).unwrap();
        assert!(same(&a, &read), "{architecture:?}");
        // A flipped byte shows.
        let weights = path.join(checkpoint::WEIGHTS_FILE);
        let mut bytes = std::fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&weights, bytes).unwrap();
        let error =
            checkpoint::load(&path, Some(&embedding), r2r::router::Storage::F32, Device::Cpu).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }
}
