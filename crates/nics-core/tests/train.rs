//! The training loop: it learns, adds micro batches up, resumes to the bit, and refuses what it cannot train with.

mod train_toy;

use std::fs;

use nics_core::base::interrupt::Interrupt;
use nics_core::tch::{Device, Kind, Tensor};
use nics_core::train::{
    Hooks, Loss, METRICS_FILE, Progress, STATE_FILE, TrainConfig, TrainError, Trainer, masked_cross_entropy,
};
use serde_json::{Value, json};
use tempfile::tempdir;
use train_toy::{Toy, config, state_tensors, trainer, untimed_log};

fn run(toy: &Toy, config: TrainConfig, dir: &std::path::Path) -> nics_core::train::Result<()> {
    trainer(toy, config, dir)?.run(&mut |micro| toy.loss(micro), Hooks::default()).map(drop)
}

#[test]
fn the_loss_goes_down_and_every_step_is_reported() {
    let (toy, dir) = (Toy::new(), tempdir().unwrap());
    let mut seen: Vec<Progress> = Vec::new();
    let mut evaluated = Vec::new();
    let hooks = Hooks {
        progress: Some(&mut |p| seen.push(p)),
        evaluate: Some(&mut |step| {
            evaluated.push(step);
            Ok(json!({"accuracy": 0.5}).as_object().unwrap().clone())
        }),
        ..Hooks::default()
    };
    let config = TrainConfig { eval_every: 40, log_every: 10, ..config(100) };
    let summary =
        trainer(&toy, config, dir.path()).unwrap().run(&mut |micro| toy.loss(micro), hooks).unwrap();
    assert_eq!(seen.iter().map(|p| p.step).collect::<Vec<_>>(), (1..=100).collect::<Vec<_>>());
    assert!(seen[0].loss > 1.9, "eight classes start near ln 8: {}", seen[0].loss);
    assert!(seen[99].loss < 0.5 * seen[0].loss, "{} -> {}", seen[0].loss, seen[99].loss);
    assert_eq!(evaluated, [40, 80, 100]);
    assert_eq!((summary.steps, summary.tokens), (100, 100 * 16));
    assert_eq!(summary.last.unwrap().step, 100);
    assert_eq!(summary.eval.unwrap().eval["accuracy"], 0.5);

    let rows = untimed_log(dir.path());
    let steps = |rows: &[Value], key: &str| {
        rows.iter().filter(|r| r.get(key).is_some()).map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(steps(&rows, "loss"), (1..=10).map(|n| n * 10).collect::<Vec<_>>());
    assert_eq!(steps(&rows, "eval"), [40, 80, 100]);
    // A row's loss is the mean over the steps since the row before (all steps have 16 tokens here).
    let mean = seen[..10].iter().map(|p| p.loss).sum::<f64>() / 10.0;
    assert!((rows[0]["loss"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert_eq!(rows[0]["tokens"], 160);
}

/// Micro batches of different sizes, cut from one batch: the update must be that of the whole.
#[test]
fn micro_batches_add_up_to_one_big_batch() {
    let cuts = [0, 5, 6, 15, 24];
    let train = |accumulation: u64| {
        let (toy, dir) = (Toy::new(), tempdir().unwrap());
        let config = TrainConfig { accumulation, clip: 0.5, ..config(8) };
        let mut loss = |micro: nics_core::train::Micro| {
            let whole = nics_core::train::Micro { index: micro.step, ..micro };
            let (x, labels) = toy.batch(whole.rng(), 24);
            let (from, to) = if accumulation == 1 {
                (0, 24)
            } else {
                (cuts[micro.micro as usize], cuts[micro.micro as usize + 1])
            };
            masked_cross_entropy(
                &toy.logits(&x.narrow(0, from, to - from)),
                &labels.narrow(0, from, to - from),
            )
        };
        let summary = trainer(&toy, config, dir.path()).unwrap().run(&mut loss, Hooks::default()).unwrap();
        (summary, toy)
    };
    let ((whole, big), (parts, small)) = (train(1), train(4));
    assert_eq!(whole.tokens, parts.tokens);
    let (whole, parts) = (whole.last.unwrap(), parts.last.unwrap());
    assert!((whole.loss - parts.loss).abs() < 1e-5 * whole.loss, "{} and {}", whole.loss, parts.loss);
    assert!((whole.grad_norm - parts.grad_norm).abs() < 1e-5 * whole.grad_norm);
    for ((name, a), (_, b)) in big.params().iter().zip(small.params()) {
        let far = (a - b).abs().max().double_value(&[]);
        assert!(far < 1e-5, "{name} differs by {far}");
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_bit() {
    for ema in [0.0, 0.9] {
        let settings = TrainConfig { ema, eval_every: 8, accumulation: 2, ..config(40) };
        let mut evaluate = |step: u64| Ok(json!({"n": step}).as_object().unwrap().clone());
        let (toy, whole) = (Toy::new(), tempdir().unwrap());
        let hooks = Hooks { evaluate: Some(&mut evaluate), ..Hooks::default() };
        trainer(&toy, settings.clone(), whole.path()).unwrap().run(&mut |m| toy.loss(m), hooks).unwrap();
        let unbroken = toy.bits();

        let broken = tempdir().unwrap();
        let mut stops = Vec::new();
        loop {
            let toy = Toy::new(); // a new process knows nothing of the weights
            let mut trainer = trainer(&toy, settings.clone(), broken.path()).unwrap();
            assert_eq!(trainer.resumed(), trainer.step() > 0);
            let interrupt = Interrupt::never();
            let stop = interrupt.clone();
            let until = trainer.step() + 9;
            let mut progress = |p: Progress| {
                if p.step == until {
                    stop.request();
                }
            };
            let hooks = Hooks { interrupt, progress: Some(&mut progress), evaluate: Some(&mut evaluate) };
            match trainer.run(&mut |m| toy.loss(m), hooks) {
                Err(TrainError::Interrupted { step, steps, .. }) => stops.push((step, steps)),
                Ok(_) => {
                    assert_eq!(toy.bits(), unbroken, "ema {ema}");
                    break;
                }
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!(stops, [(9, 40), (18, 40), (27, 40), (36, 40)]);
        assert_eq!(untimed_log(broken.path()), untimed_log(whole.path()));
        assert_eq!(state_tensors(broken.path()), state_tensors(whole.path()));
    }
}

/// What is past the last saved state must be done again, with the rows that told of it gone.
#[test]
fn rows_past_the_saved_state_are_written_anew() {
    let (toy, dir) = (Toy::new(), tempdir().unwrap());
    let broken = TrainError::Caller("the disk of the data is gone".into());
    let mut broken = Some(broken);
    // Saved at 7 and 14; rows up to 18; then the data fails.
    let mut loss =
        |m: nics_core::train::Micro| if m.step == 19 { Err(broken.take().unwrap()) } else { toy.loss(m) };
    let e = trainer(&toy, config(30), dir.path()).unwrap().run(&mut loss, Hooks::default()).unwrap_err();
    assert_eq!(e.to_string(), "the disk of the data is gone");
    assert_eq!(untimed_log(dir.path()).last().unwrap()["step"], 18);

    let log = dir.path().join(METRICS_FILE);
    fs::write(&log, [fs::read(&log).unwrap(), b"{\"step\": 21, \"lo".to_vec()].concat()).unwrap();
    let toy = Toy::new();
    let mut again = trainer(&toy, config(30), dir.path()).unwrap();
    assert_eq!(again.step(), 14);
    assert_eq!(untimed_log(dir.path()).last().unwrap()["step"], 12);
    again.run(&mut |m| toy.loss(m), Hooks::default()).unwrap();
    drop(again);

    let (fresh, whole) = (Toy::new(), tempdir().unwrap());
    run(&fresh, config(30), whole.path()).unwrap();
    assert_eq!(toy.bits(), fresh.bits());
    assert_eq!(untimed_log(dir.path()), untimed_log(whole.path()));
}

#[test]
fn a_finished_run_is_done_at_once() {
    let dir = tempdir().unwrap();
    let toy = Toy::new();
    let settings = TrainConfig { ema: 0.9, ..config(12) };
    run(&toy, settings.clone(), dir.path()).unwrap();
    let (again, mut calls) = (Toy::new(), 0);
    let mut loss = |m| {
        calls += 1;
        again.loss(m)
    };
    let summary = trainer(&again, settings, dir.path()).unwrap().run(&mut loss, Hooks::default()).unwrap();
    assert_eq!((calls, summary.steps, summary.last.unwrap().step), (0, 12, 12));
    assert_eq!(again.bits(), toy.bits());
}

#[test]
fn the_average_is_evaluated_and_left_in_the_model() {
    let (toy, dir) = (Toy::new(), tempdir().unwrap());
    let mut at_evaluation = Vec::new();
    let mut raw = Vec::new();
    let mut progress = |_| raw = toy.bits();
    let mut evaluate = |_| {
        at_evaluation = toy.bits();
        Ok(serde_json::Map::new())
    };
    let hooks = Hooks { progress: Some(&mut progress), evaluate: Some(&mut evaluate), ..Hooks::default() };
    let settings = TrainConfig { ema: 0.95, ..config(30) };
    trainer(&toy, settings, dir.path()).unwrap().run(&mut |m| toy.loss(m), hooks).unwrap();
    assert_eq!(toy.bits(), at_evaluation, "what was evaluated is the result");
    assert_ne!(raw, at_evaluation, "and it is not the last step's weights");
}

#[test]
fn the_state_of_another_run_is_refused_by_the_field_that_differs() {
    let dir = tempdir().unwrap();
    run(&Toy::new(), config(10), dir.path()).unwrap();
    let before = fs::read(dir.path().join(STATE_FILE)).unwrap();
    let refused = |params: Vec<(String, Tensor)>, config: TrainConfig, identity: Value, parts: [&str; 3]| {
        let e = Trainer::new(params, config, &identity, dir.path()).unwrap_err();
        assert!(matches!(e, TrainError::ForeignState { .. }), "{e}");
        let text = e.to_string();
        assert!(parts.iter().all(|part| text.contains(part)) && text.contains(STATE_FILE), "{text}");
    };
    let (toy, identity) = (Toy::new(), || json!({"data": "directions"}));
    let lr = TrainConfig { lr: 0.03, ..config(10) };
    refused(toy.params(), lr, identity(), ["lr is 0.02", "this run has 0.03", "delete this one"]);
    refused(toy.params(), config(11), identity(), ["steps is 10", "has 11", ""]);
    let betas = TrainConfig { betas: [0.9, 0.99], ..config(10) };
    refused(toy.params(), betas, identity(), ["betas[1] is 0.95", "0.99", ""]);
    let other = json!({"data": "sums"});
    refused(toy.params(), config(10), other, ["identity.data is \"directions\"", "\"sums\"", ""]);
    let fewer = toy.params().drain(..2).collect();
    refused(fewer, config(10), identity(), ["parameter w2", "there", "none of that name"]);
    let mut more = toy.params();
    let extra = || Tensor::zeros([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    more.push(("w3".into(), extra()));
    refused(more, config(10), identity(), ["parameter w3", "absent", "[3]"]);
    let mut reshaped = toy.params();
    reshaped[1].1 = extra();
    refused(reshaped, config(10), identity(), ["shape of b1", "[16]", "[3]"]);
    assert_eq!(toy.bits(), Toy::new().bits(), "a refused resume touches no weights");
    assert_eq!(fs::read(dir.path().join(STATE_FILE)).unwrap(), before);

    // How often a run saves may change.
    let toy = Toy::new();
    let resumed = trainer(&toy, TrainConfig { save_every: 1, ..config(10) }, dir.path()).unwrap();
    assert_eq!(resumed.step(), 10);
}

#[test]
fn a_damaged_state_is_an_error_that_names_the_file() {
    let dir = tempdir().unwrap();
    run(&Toy::new(), config(10), dir.path()).unwrap();
    let path = dir.path().join(STATE_FILE);
    let whole = fs::read(&path).unwrap();
    let mut foreign =
        safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None).unwrap();
    foreign.truncate(foreign.len());
    for bytes in [&whole[..whole.len() / 2], &whole[..4], &[0xff; 64], &foreign] {
        fs::write(&path, bytes).unwrap();
        let e = trainer(&Toy::new(), config(10), dir.path()).unwrap_err();
        assert!(matches!(e, TrainError::DamagedState { .. }), "{e}");
        assert!(e.to_string().contains(STATE_FILE) && e.to_string().contains("delete it"), "{e}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(trainer(&Toy::new(), config(10), dir.path()).unwrap().step(), 10);
}

#[test]
fn a_second_process_in_the_folder_is_refused() {
    let (toy, dir) = (Toy::new(), tempdir().unwrap());
    let _first = trainer(&toy, config(10), dir.path()).unwrap();
    let e = trainer(&toy, config(10), dir.path()).unwrap_err();
    assert!(matches!(e, TrainError::Base(nics_core::base::Error::Busy(_))), "{e}");
}

#[test]
fn losses_that_cannot_be_trained_on_name_the_step_and_leave_the_weights() {
    fn refused(loss: impl Fn(&Toy) -> nics_core::train::Result<Loss>) -> TrainError {
        let (toy, dir) = (Toy::new(), tempdir().unwrap());
        let mut before = Vec::new();
        let mut at_third = |m: nics_core::train::Micro| {
            if m.step < 2 {
                return toy.loss(m);
            }
            before = toy.bits();
            loss(&toy)
        };
        let e =
            trainer(&toy, config(10), dir.path()).unwrap().run(&mut at_third, Hooks::default()).unwrap_err();
        assert_eq!(before, toy.bits());
        assert!(e.to_string().contains("step 3"), "{e}");
        e
    }
    let sum = |toy: &Toy| toy.w1.sum(Kind::Float);
    let e = refused(|toy| Ok(Loss { sum: sum(toy) * f64::NAN, tokens: 1 }));
    assert!(matches!(&e, TrainError::NotFinite { step: 3, what, .. } if what == "the loss"), "{e}");
    // The loss is finite, one gradient is not: d sqrt(x) / dx at 0.
    let e = refused(|toy| Ok(Loss { sum: sum(toy) + (&toy.b1 * 0.0).sqrt().sum(Kind::Float), tokens: 1 }));
    assert!(matches!(&e, TrainError::NotFinite { step: 3, what, .. } if what.contains("b1")), "{e}");
    let e = refused(|toy| Ok(Loss { sum: sum(toy), tokens: 0 }));
    assert!(e.to_string().contains("no target tokens"), "{e}");
    let e = refused(|toy| Ok(Loss { sum: sum(toy), tokens: -1 }));
    assert!(e.to_string().contains("-1 tokens"), "{e}");
    let e = refused(|toy| Ok(Loss { sum: toy.w1.shallow_clone() * 1.0, tokens: 1 }));
    assert!(e.to_string().contains("[16, 6], expected a scalar"), "{e}");
    let e = refused(|_| Ok(Loss { sum: Tensor::from(1.0f32), tokens: 1 }));
    assert!(e.to_string().contains("depends on no parameter"), "{e}");
}

#[test]
fn a_parameter_without_gradient_is_left_alone() {
    let (toy, dir) = (Toy::new(), tempdir().unwrap());
    let before = train_toy::floats(&toy.w2);
    let mut loss =
        |_| Ok(Loss { sum: toy.w1.square().sum(Kind::Float) + toy.b1.square().sum(Kind::Float), tokens: 1 });
    trainer(&toy, config(10), dir.path()).unwrap().run(&mut loss, Hooks::default()).unwrap();
    assert_eq!(train_toy::floats(&toy.w2), before);
    assert_ne!(train_toy::floats(&toy.w1), train_toy::floats(&Toy::new().w1));
}

#[test]
fn parameters_that_cannot_be_trained_are_refused_by_name() {
    let leaf = || Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let refused = |params: Vec<(&str, Tensor)>, part: &str| {
        let dir = tempdir().unwrap();
        let params = params.into_iter().map(|(n, t)| (n.to_owned(), t)).collect();
        let e = Trainer::new(params, config(10), &Value::Null, dir.path()).unwrap_err();
        assert!(matches!(e, TrainError::Input(_)), "{e}");
        assert!(e.to_string().contains(part), "{e}");
    };
    refused(vec![], "no parameters");
    refused(vec![("a", leaf()), ("a", leaf())], "a occurs twice");
    let tied = leaf();
    refused(vec![("embed", tied.shallow_clone()), ("head", tied)], "head shares its storage");
    refused(vec![("a", leaf().detach().set_requires_grad(false))], "a is not a leaf");
    refused(vec![("a", leaf() * 2.0)], "a is not a leaf");
    refused(vec![("a", leaf().detach().to_kind(Kind::BFloat16).set_requires_grad(true))], "a is BFloat16");
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    type Change = fn(&mut TrainConfig);
    let change: [(&str, Change); 12] = [
        ("steps", |c| c.steps = 0),
        ("accumulation", |c| c.accumulation = 0),
        ("lr", |c| c.lr = f64::NAN),
        ("min_lr_ratio", |c| c.min_lr_ratio = 1.5),
        ("warmup", |c| c.warmup = 11),
        ("betas[0]", |c| c.betas[0] = 1.0),
        ("betas[1]", |c| c.betas[1] = -0.1),
        ("eps", |c| c.eps = 0.0),
        ("weight_decay", |c| c.weight_decay = -1.0),
        ("clip", |c| c.clip = f64::INFINITY),
        ("ema", |c| c.ema = 1.0),
        ("log_every", |c| c.log_every = 0),
    ];
    for (field, change) in change {
        let mut config = config(10);
        change(&mut config);
        let e = config.validate().unwrap_err();
        assert!(matches!(e, TrainError::Config { field: f, .. } if f == field), "{e}");
    }
    config(10).validate().unwrap();
    TrainConfig::default().validate().unwrap();
    let unknown =
        serde_json::from_value::<TrainConfig>(json!({"learning_rate": 1.0})).unwrap_err().to_string();
    assert!(unknown.contains("learning_rate"), "{unknown}");
}
