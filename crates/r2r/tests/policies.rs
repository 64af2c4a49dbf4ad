//! One policy that serves sequences under settings of their own.

use std::sync::{Arc, Mutex};

use r2r::policy::{
    DuoRolling, Entropy, Momentum, Neural, NeuralRolling, Policy, Random, Rolling, STEP, Sequence, Settings,
    SharedRouter, StepView,
};
use r2r::router::{Architecture, Features, InitArgs, Router, RouterConfig, largest_logits};
use tch::{Device, Kind, Tensor};

const VOCAB: i64 = 40;
const K: i64 = 8;

fn router(architecture: Architecture, logits_size: i64) -> SharedRouter {
    let args = InitArgs {
        logits_size: Some(logits_size),
        hidden_dims: vec![16, 16],
        expansion_factor: 2,
        dropout_rate: 0.0,
        ..InitArgs::default()
    };
    let config = RouterConfig { architecture, args };
    Arc::new(Mutex::new(Router::random(config, None, None, 5, Device::Cpu).unwrap()))
}

/// Logits of `steps` steps of a sequence, `[steps, vocab]`; positive, as measures of evidence want them.
fn text(seed: i64, steps: i64) -> Tensor {
    let n = steps * VOCAB;
    let at = Tensor::arange(n, (Kind::Float, Device::Cpu)) * 12.9898 + 78.233 * seed as f64;
    ((at.sin() * 43758.5453).frac().abs() * 6.0).reshape([steps, VOCAB])
}

/// Decisions over the texts of some sequences, a step of each at a time.
fn run(policy: &mut dyn Policy, texts: &[(Sequence, &Tensor)]) -> Vec<Vec<(bool, f32)>> {
    let steps = texts[0].1.size()[0];
    let rows = texts.len() as i64;
    let hidden = Tensor::zeros([rows, 4], (Kind::Float, Device::Cpu));
    let token = Tensor::zeros([rows], (Kind::Int64, Device::Cpu));
    let sequences: Vec<Sequence> = texts.iter().map(|(s, _)| *s).collect();
    let mut all = vec![Vec::new(); texts.len()];
    for t in 0..steps {
        let logits = Tensor::stack(&texts.iter().map(|(_, text)| text.get(t)).collect::<Vec<_>>(), 0);
        let view = StepView { logits: &logits, hidden: &hidden, token: &token };
        for (all, decision) in all.iter_mut().zip(policy.decide(&view, &sequences).unwrap()) {
            all.push((decision.large, decision.score));
        }
    }
    all
}

fn share(decisions: &[(bool, f32)]) -> f64 {
    decisions.iter().filter(|(large, _)| *large).count() as f64 / decisions.len() as f64
}

/// Makes a policy at a threshold.
type Make<'a> = Box<dyn Fn(f64) -> Box<dyn Policy> + 'a>;

fn threshold(threshold: f64) -> Settings {
    Settings { threshold: Some(threshold), ..Settings::default() }
}

fn target(target: f64) -> Settings {
    Settings { target: Some(target), ..Settings::default() }
}

#[test]
fn sequences_under_settings_of_their_own_do_as_under_a_policy_of_their_own() {
    let shared = router(Architecture::Logits, K);
    let policies: Vec<Make> = vec![
        Box::new(|t| Box::new(Neural::new(shared.clone(), t).unwrap())),
        Box::new(|t| Box::new(NeuralRolling::new(shared.clone(), t, 3).unwrap())),
        Box::new(|t| Box::new(Entropy::new(t).unwrap())),
        Box::new(|t| Box::new(Momentum::new(t, 0.7, 0.3, 0.7).unwrap())),
        Box::new(|t| Box::new(Rolling::new(t, 0.1, 3).unwrap())),
        Box::new(|t| Box::new(DuoRolling::new(t, 3).unwrap())),
    ];
    let texts: Vec<Tensor> = (0..3).map(|seed| text(seed, 60)).collect();
    for make in &policies {
        // Thresholds that two and three fifths of the scores do not reach.
        let mut scores: Vec<f32> =
            run(&mut *make(1.0), &[(Sequence(0), &texts[0])])[0].iter().map(|d| d.1).collect();
        scores.sort_by(f32::total_cmp);
        let (a, b) = (f64::from(scores[24]), f64::from(scores[36]));
        let mut policy = make(a);
        policy.open(Sequence(1), &threshold(b)).unwrap();
        policy.open(Sequence(2), &Settings::default()).unwrap();
        let all: Vec<(Sequence, &Tensor)> =
            texts.iter().enumerate().map(|(i, t)| (Sequence(i as u64), t)).collect();
        let found = run(&mut *policy, &all);
        // Sequence 0 was never opened, 2 without settings: both have the policy's.
        for (i, own) in [(0, a), (1, b), (2, a)] {
            let alone = run(&mut *make(own), &all[i..=i]);
            let decided = |d: &[(bool, f32)]| d.iter().map(|(large, _)| *large).collect::<Vec<_>>();
            assert_eq!(decided(&found[i]), decided(&alone[0]), "{} {i}", policy.name());
        }
        // Thresholds that decide something, or nothing was shown.
        let large = found.iter().flatten().filter(|(large, _)| *large).count();
        assert!((1..180).contains(&large), "{}: {large} of 180", policy.name());
        // Closed, a sequence starts anew with the policy's.
        policy.close(Sequence(1));
        let again = run(&mut *policy, &[(Sequence(1), &texts[0])]);
        assert_eq!(again[0], run(&mut *make(a), &[(Sequence(1), &texts[0])])[0], "{}", policy.name());
        assert!(policy.open(Sequence(9), &threshold(f64::NAN)).is_err());
    }
}

#[test]
fn every_sequence_holds_its_own_share() {
    let n = 1500;
    let texts: Vec<Tensor> = (0..4).map(|seed| text(seed, n)).collect();
    let bound = (1.0 + STEP) / (STEP * n as f64) + 1e-9;
    let shared = router(Architecture::Logits, K);
    let neural = Neural::new(shared, 0.5).unwrap().holding(0.5, STEP).unwrap();
    let entropy = Entropy::new(0.45).unwrap().holding(0.5, STEP).unwrap();
    for mut policy in [Box::new(neural) as Box<dyn Policy>, Box::new(entropy)] {
        policy.open(Sequence(0), &target(0.1)).unwrap();
        policy.open(Sequence(1), &target(0.8)).unwrap();
        policy.open(Sequence(2), &threshold(0.0)).unwrap();
        let all: Vec<(Sequence, &Tensor)> =
            texts.iter().enumerate().map(|(i, t)| (Sequence(i as u64), t)).collect();
        let found = run(&mut *policy, &all);
        for (decisions, (expected, bound)) in
            found.iter().zip([(0.1, bound), (0.8, bound), (1.0, 1e-9), (0.5, bound)])
        {
            let off = (share(decisions) - expected).abs();
            assert!(off <= bound, "{}: {} of {expected}", policy.name(), share(decisions));
        }
    }
    let mut random = Random::new(0.5, 1).unwrap();
    random.open(Sequence(0), &target(0.1)).unwrap();
    let found = run(&mut random, &[(Sequence(0), &texts[0]), (Sequence(1), &texts[1])]);
    // Five deviations of a fair coin over so many throws.
    assert!((share(&found[0]) - 0.1).abs() < 0.04 && (share(&found[1]) - 0.5).abs() < 0.065);
    assert!(random.open(Sequence(2), &threshold(0.5)).is_err());
}

#[test]
fn a_router_of_several_positions_reads_the_last_of_each_sequence() {
    let shared = router(Architecture::MultiLogits, 3 * K);
    let mut policy = Neural::new(shared.clone(), 0.5).unwrap();
    let texts = [text(0, 6), text(1, 6)];
    let found = run(&mut policy, &[(Sequence(0), &texts[0]), (Sequence(1), &texts[1])]);
    let router = shared.lock().unwrap();
    for (found, text) in found.iter().zip(&texts) {
        let largest = largest_logits(text, K).unwrap();
        for (t, (_, score)) in found.iter().enumerate() {
            // Before there are three positions the oldest stands for those before it.
            let slots: Vec<Tensor> =
                (0..3).map(|slot| largest.get((t as i64 + slot - 2).max(0)).unsqueeze(0)).collect();
            let window = Tensor::cat(&slots, 1);
            let features = Features { logits: Some(&window), ..Features::default() };
            let expected = router.probability(&features).unwrap().double_value(&[0]);
            assert!((f64::from(*score) - expected).abs() < 1e-6, "{t}: {score} {expected}");
        }
    }
}
