//! The training loop.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::state::{Position, STATE_FILE, difference, load, save};
use super::{AdamW, EvalRow, LogRow, Loss, Result, StepRow, TrainConfig, TrainError};
use super::{clip_coefficient, global_norm, log};

/// The name of the log in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One micro batch to be made. What it holds must follow from these fields alone, or a resumed run would differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Micro {
    /// The step that it belongs to, counted from 0.
    pub step: u64,
    /// Its place in the step, counted from 0, below the run's `accumulation`.
    pub micro: u64,
    /// Its place in the run, counted from 0: `step * accumulation + micro`.
    pub index: u64,
    /// The run's seed.
    pub seed: u64,
}

impl Micro {
    /// Random numbers of this micro batch: a stream of its own under the run's seed.
    pub fn rng(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.index);
        rng
    }
}

/// How far a run is, after every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps to do.
    pub steps: u64,
    /// Cost per target token of this step.
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
}

/// What a run does beside training.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Asks the run to stop: it saves its state and returns [`TrainError::Interrupted`].
    pub interrupt: Interrupt,
    /// Called after every step.
    pub progress: Option<&'a mut dyn FnMut(Progress)>,
    /// Called every `eval_every` steps and after the last with the number of steps done, while the model holds the
    /// averaged weights if there are any. What it returns becomes a row of the log.
    pub evaluate: Option<&'a mut dyn FnMut(u64) -> Result<Map<String, Value>>>,
}

/// What a finished run has to show.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Target tokens trained on.
    pub tokens: u64,
    /// Seconds of training, over all processes of the run.
    pub seconds: f64,
    /// The last step's row of the log.
    pub last: Option<StepRow>,
    /// The last evaluation.
    pub eval: Option<EvalRow>,
}

/// Trains named parameters and keeps the run's state and log in a folder.
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    optimizer: AdamW,
    /// The averaged weights, in the order of the optimiser's parameters.
    average: Option<Vec<Tensor>>,
    position: Position,
    resumed: bool,
    state: PathBuf,
    log: JsonlLog<LogRow>,
    rows: Vec<LogRow>,
}

impl Trainer {
    /// Takes over `params` (tensors that share their storage with a model's) and the folder `dir`. Where `dir` holds the
    /// state of this run, weights, optimiser and log are put back to it.
    ///
    /// `identity` is what else makes the run what it is (model, data, split), compared on resume like `config`;
    /// `()` is nothing.
    ///
    /// # Errors
    /// [`TrainError::Config`] and [`TrainError::Input`] for settings and parameters that cannot be trained with,
    /// [`TrainError::ForeignState`] when `dir` belongs to a run with another config, identity or other parameters,
    /// [`TrainError::DamagedState`] when its state cannot be read, `Busy` when another process trains there.
    pub fn new(
        params: Vec<(String, Tensor)>,
        config: TrainConfig,
        identity: impl Serialize,
        dir: &Path,
    ) -> Result<Self> {
        config.validate()?;
        let optimizer = AdamW::new(params, config.adamw())?;
        let average = (config.ema > 0.0)
            .then(|| optimizer.params().iter().map(Tensor::f_detach_copy).collect::<Result<_, _>>())
            .transpose()?;
        // Opened before the state is read: the log's lock guards the folder.
        let (log, rows) = JsonlLog::open(dir.join(METRICS_FILE))?;
        let position = Position::start(as_read(&config)?, as_read(&identity)?);
        let state = dir.join(STATE_FILE);
        let mut trainer = Self { config, optimizer, average, position, resumed: false, state, log, rows };
        if let Some((position, tensors)) = load(&trainer.state)? {
            trainer.restore(position, &tensors)?;
        }
        log::cut_after(&trainer.log, &mut trainer.rows, trainer.position.step)?;
        Ok(trainer)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.position.step
    }

    /// Whether the folder held a state of this run.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The run's settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Trains up to the last step and leaves the result in the model: the averaged weights if there are any.
    ///
    /// `loss` makes a micro batch, runs the model on it and sums its cost; see [`Micro`] for what it may depend on.
    ///
    /// # Errors
    /// Besides those of `loss` and the hooks: [`TrainError::NotFinite`], with weights and state left as they were
    /// before the step, and [`TrainError::Interrupted`].
    pub fn run(&mut self, loss: &mut dyn FnMut(Micro) -> Result<Loss>, mut hooks: Hooks) -> Result<Summary> {
        let TrainConfig { steps, log_every, eval_every, save_every, .. } = self.config;
        let mut clock = Clock::start();
        while self.position.step < steps {
            if let Err(source) = hooks.interrupt.check() {
                self.save()?;
                return Err(TrainError::Interrupted { step: self.position.step, steps, source });
            }
            let update = self.update(loss)?;
            let step = self.position.step;
            let due = |every: u64| every > 0 && step.is_multiple_of(every) || step == steps;
            clock.window_tokens += update.tokens;
            self.position.seconds += clock.lap();
            if due(log_every) {
                self.log_step(&update, &mut clock)?;
            }
            if let Some(progress) = &mut hooks.progress {
                let loss = update.loss / update.tokens as f64;
                progress(Progress { step, steps, loss, lr: update.lr });
            }
            if let Some(evaluate) = hooks.evaluate.as_mut().filter(|_| due(eval_every)) {
                let eval = self.with_average(|| evaluate(step))?;
                self.append(LogRow::Eval(EvalRow { step, eval }))?;
                clock.skip();
            }
            if due(save_every) {
                self.save()?;
                clock.skip();
            }
        }
        if let Some(average) = &self.average {
            copy_into(self.optimizer.params(), average)?;
        }
        let last = self
            .rows
            .iter()
            .rev()
            .find_map(|row| if let LogRow::Step(r) = row { Some(r.clone()) } else { None });
        let eval = self
            .rows
            .iter()
            .rev()
            .find_map(|row| if let LogRow::Eval(r) = row { Some(r.clone()) } else { None });
        Ok(Summary { steps, tokens: self.position.tokens, seconds: self.position.seconds, last, eval })
    }

    /// One step: the gradient of the mean over all target tokens of its micro batches, clipped, and an update.
    fn update(&mut self, loss: &mut dyn FnMut(Micro) -> Result<Loss>) -> Result<Update> {
        let TrainConfig { accumulation, seed, clip, .. } = self.config;
        let (step, params) = (self.position.step, self.optimizer.params());
        let mut grads: Vec<Option<Tensor>> = params.iter().map(|_| None).collect();
        let (mut total, mut tokens) = (0.0, 0);
        for micro in 0..accumulation {
            let batch = Micro { step, micro, index: step * accumulation + micro, seed };
            let Loss { sum, tokens: counted } = loss(batch)?;
            if counted == 0 {
                continue;
            }
            total += checked(&sum, counted, step)?;
            tokens += counted as u64;
            for (sum, new) in grads.iter_mut().zip(Tensor::f_run_backward(&[&sum], params, false, false)?) {
                // A parameter that the loss does not depend on gets none. Gradients may share storage with each other
                // or with the graph, so nothing is added in place.
                if new.defined() {
                    *sum = Some(if let Some(sum) = sum { sum.f_add(&new)? } else { new });
                }
            }
        }
        if tokens == 0 {
            return Err(TrainError::Input(format!("step {}: its batch has no target tokens", step + 1)));
        }
        // Gradients so far are of the sum: the mean's are smaller by the number of tokens.
        let grad_norm = global_norm(&grads)? / tokens as f64;
        if !grad_norm.is_finite() {
            return Err(self.not_finite(&grads, grad_norm));
        }
        let scale = clip_coefficient(grad_norm, clip) / tokens as f64;
        for grad in grads.iter_mut().flatten() {
            *grad = grad.f_mul_scalar(scale)?;
        }
        let lr = self.config.lr * self.config.schedule().factor(step);
        self.optimizer.step(&grads, lr)?;
        self.update_average(step)?;
        self.position.step += 1;
        self.position.tokens += tokens;
        self.position.window.add(total, tokens);
        Ok(Update { loss: total, tokens, lr, grad_norm })
    }

    /// Names the first gradient that is not finite; all finite ones can still have an infinite norm.
    fn not_finite(&self, grads: &[Option<Tensor>], norm: f64) -> TrainError {
        let culprit = grads.iter().zip(self.optimizer.names()).find_map(|(grad, name)| {
            let value = grad.as_ref()?.f_sum(tch::Kind::Double).ok()?.f_double_value(&[]).ok()?;
            (!value.is_finite()).then(|| (format!("the gradient of {name}"), value))
        });
        let (what, value) = culprit.unwrap_or_else(|| ("the norm of the gradient".into(), norm));
        TrainError::NotFinite { step: self.position.step + 1, what, value }
    }

    /// `average <- d average + (1 - d) weights`, with d rising from 0.1 so that the start is forgotten soon.
    fn update_average(&mut self, step: u64) -> Result<()> {
        let Some(average) = &mut self.average else { return Ok(()) };
        let _guard = tch::no_grad_guard();
        let decay = self.config.ema.min((1.0 + step as f64) / (10.0 + step as f64));
        for (average, param) in average.iter_mut().zip(self.optimizer.params()) {
            let _ = average.f_lerp_(param, 1.0 - decay)?;
        }
        Ok(())
    }

    /// Calls `f` while the model holds the averaged weights, and puts its own back whatever `f` returns.
    fn with_average<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(average) = &self.average else { return f() };
        let params = self.optimizer.params();
        let own = params.iter().map(Tensor::f_detach_copy).collect::<Result<Vec<_>, _>>()?;
        copy_into(params, average)?;
        let result = f();
        copy_into(params, &own)?;
        result
    }

    fn log_step(&mut self, update: &Update, clock: &mut Clock) -> Result<()> {
        let Position { step, tokens, window, seconds, .. } = self.position;
        let row = StepRow {
            step,
            loss: window.mean(),
            lr: update.lr,
            grad_norm: update.grad_norm,
            tokens,
            tokens_per_s: clock.rate(),
            seconds,
        };
        self.position.window = super::state::Window::default();
        self.append(LogRow::Step(row))
    }

    fn append(&mut self, row: LogRow) -> Result<()> {
        self.log.append(&row)?;
        self.rows.push(row);
        Ok(())
    }

    /// Saves where the run stands. The log is synced first: a saved state implies the rows up to it.
    fn save(&mut self) -> Result<()> {
        self.log.sync()?;
        let names = self.optimizer.names();
        let moments = self.optimizer.moments();
        self.position.updates = names.iter().cloned().zip(moments.iter().map(|m| m.updates)).collect();
        let mut tensors = Vec::new();
        for (i, name) in names.iter().enumerate() {
            tensors.push((format!("param/{name}"), &self.optimizer.params()[i]));
            tensors.push((format!("m/{name}"), &moments[i].m));
            tensors.push((format!("v/{name}"), &moments[i].v));
            if let Some(average) = &self.average {
                tensors.push((format!("average/{name}"), &average[i]));
            }
        }
        save(&self.state, &self.position, tensors)
    }

    fn restore(&mut self, position: Position, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let foreign = |(field, found, expected)| {
            Err(TrainError::ForeignState { path: self.state.clone(), field, found, expected })
        };
        // How often a run saves decides nothing of its result.
        let decisive = |config: &Value| {
            let mut config = config.clone();
            config.as_object_mut().map(|fields| fields.remove("save_every"));
            config
        };
        let here = &self.position;
        let differs = difference(&decisive(&position.config), &decisive(&here.config), "")
            .or_else(|| difference(&position.identity, &here.identity, "identity"));
        if let Some(differs) = differs {
            return foreign(differs);
        }
        if let Some(name) = position.updates.keys().find(|name| !self.optimizer.names().contains(name)) {
            return foreign((format!("parameter {name}"), "there".into(), "none of that name".into()));
        }
        let shapes = self.optimizer.names().iter().zip(self.optimizer.params());
        for (name, param) in shapes {
            let Some(found) = tensors.get(&format!("param/{name}")) else {
                return foreign((
                    format!("parameter {name}"),
                    "absent".into(),
                    format!("{:?}", param.size()),
                ));
            };
            if found.size() != param.size() {
                let (found, expected) = (format!("{:?}", found.size()), format!("{:?}", param.size()));
                return foreign((format!("shape of {name}"), found, expected));
            }
        }
        // Everything is looked up before anything is overwritten.
        let names = self.optimizer.names().to_vec();
        let pick = |kind: &str| -> Result<Vec<&Tensor>> {
            let missing = |name: &str| TrainError::DamagedState {
                path: self.state.clone(),
                reason: format!("{kind}/{name} is missing or of another shape than its parameter"),
            };
            let find = |(name, param): (&String, &Tensor)| {
                let found = tensors.get(&format!("{kind}/{name}")).filter(|t| t.size() == param.size());
                found.ok_or_else(|| missing(name))
            };
            names.iter().zip(self.optimizer.params()).map(find).collect()
        };
        let (params, m, v) = (pick("param")?, pick("m")?, pick("v")?);
        let average = self.average.is_some().then(|| pick("average")).transpose()?;
        copy_into(self.optimizer.params(), &params)?;
        if let (Some(into), Some(from)) = (&self.average, average) {
            copy_into(into, &from)?;
        }
        for (i, moments) in self.optimizer.moments_mut().iter_mut().enumerate() {
            moments.m.f_copy_(m[i])?;
            moments.v.f_copy_(v[i])?;
            moments.updates = position.updates.get(&names[i]).copied().unwrap_or(0);
        }
        self.position = position;
        self.resumed = true;
        Ok(())
    }
}

/// What a step did.
struct Update {
    /// Summed over its tokens.
    loss: f64,
    tokens: u64,
    lr: f64,
    grad_norm: f64,
}

/// Times training and not what happens between its steps.
struct Clock {
    lap: Instant,
    window_seconds: f64,
    window_tokens: u64,
}

impl Clock {
    fn start() -> Self {
        Self { lap: Instant::now(), window_seconds: 0.0, window_tokens: 0 }
    }

    /// Seconds since the last lap.
    fn lap(&mut self) -> f64 {
        let seconds = self.lap.elapsed().as_secs_f64();
        self.window_seconds += seconds;
        self.lap = Instant::now();
        seconds
    }

    /// Leaves out the time since the last lap.
    fn skip(&mut self) {
        self.lap = Instant::now();
    }

    /// Tokens per second, and a new window.
    fn rate(&mut self) -> f64 {
        let rate = self.window_tokens as f64 / self.window_seconds.max(f64::MIN_POSITIVE);
        (self.window_seconds, self.window_tokens) = (0.0, 0);
        rate
    }
}

/// The value of a micro batch's loss, once it is one that can be trained on.
fn checked(sum: &Tensor, tokens: i64, step: u64) -> Result<f64> {
    let at = |what: String| TrainError::Input(format!("step {}: {what}", step + 1));
    if tokens < 0 {
        return Err(at(format!("the loss counts {tokens} tokens")));
    }
    if sum.numel() != 1 {
        return Err(at(format!("the loss has shape {:?}, expected a scalar", sum.size())));
    }
    if !sum.requires_grad() {
        return Err(at("the loss depends on no parameter (was it computed under no_grad?)".into()));
    }
    let value = sum.f_detach()?.f_reshape([-1])?.f_double_value(&[0])?;
    if !value.is_finite() {
        return Err(TrainError::NotFinite { step: step + 1, what: "the loss".into(), value });
    }
    Ok(value)
}

/// Overwrites tensors in place, so that a model that shares their storage sees it.
fn copy_into<T: std::borrow::Borrow<Tensor>>(into: &[Tensor], from: &[T]) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for (into, from) in into.iter().zip(from) {
        into.shallow_clone().f_copy_(from.borrow())?;
    }
    Ok(())
}

/// A value as it comes back from a file: numbers may lose their last bit on the way, and then do on both sides.
fn as_read(value: &impl Serialize) -> Result<Value> {
    let json = |source| nics_base::Error::Json { what: "the settings of a training run".into(), source };
    let text = serde_json::to_string(value).map_err(json)?;
    Ok(serde_json::from_str(&text).map_err(json)?)
}
