//! Measuring contenders against each other.
//!
//! They take turns, A B C A B C …, in an order that rotates: a machine that drifts (clock, neighbours, temperature)
//! slows all of them, and each round gives ratios of its own. Criterion, which measures one function to its end before the
//! next, is handed the finished times for its statistics and for its comparison with the run before.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use criterion::{Criterion, SamplingMode};

use crate::figure::{Case, Run};
use crate::settings::{Budget, Settings};

/// Threads of a contender's library may spin for a while after its turn (OpenMP's do); the next one waits until they sleep.
const REST: Duration = Duration::from_millis(40);
/// Samples below which Criterion has no statistics.
const LEAST_SAMPLES: usize = 10;

/// Somebody who can be measured.
pub struct Contender<'a> {
    /// The name.
    pub who: String,
    /// One turn; gives the seconds that count.
    pub turn: Box<dyn FnMut() -> Result<f64> + 'a>,
    /// As [`Run::error`].
    pub error: Option<f64>,
}

impl<'a> Contender<'a> {
    /// A contender.
    pub fn new(who: impl Into<String>, turn: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self { who: who.into(), turn: Box::new(turn), error: None }
    }

    /// With the error of what it computes.
    pub fn with_error(self, error: Option<f64>) -> Self {
        Self { error, ..self }
    }
}

/// Lets the contenders take turns: one round that does not count, then as many as `budget` says.
pub fn race(contenders: &mut [Contender], budget: &Budget) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> =
        contenders.iter().map(|c| Run { who: c.who.clone(), seconds: Vec::new(), error: c.error }).collect();
    let mut round = |start: usize| -> Result<Vec<f64>> {
        let n = contenders.len();
        let mut seconds = vec![0.0; n];
        for at in (0..n).map(|i| (start + i) % n) {
            std::thread::sleep(REST);
            let contender = &mut contenders[at];
            seconds[at] = (contender.turn)().with_context(|| format!("{} failed", contender.who))?;
        }
        Ok(seconds)
    };
    round(0)?;
    let begin = Instant::now();
    for r in 1..=*budget.rounds.end() {
        if r > *budget.rounds.start() && begin.elapsed() >= budget.time {
            break;
        }
        for (run, seconds) in runs.iter_mut().zip(round(r)?) {
            run.seconds.push(seconds);
        }
    }
    Ok(runs)
}

/// Lets the result go: its time is the time to make it.
pub fn drop_ok<T, E: Into<anyhow::Error>>(result: Result<T, E>) -> Result<()> {
    result.map(|value| drop(std::hint::black_box(value))).map_err(Into::into)
}

/// Seconds that each of `n` parts of `work` takes.
pub fn timed(n: f64, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() / n)
}

/// Tells of a finished case: a line on the terminal, one in the file of cases, and Criterion's statistics.
pub fn tell(settings: &Settings, case: &Case) -> Result<()> {
    let shown: Vec<String> = case
        .runs
        .iter()
        .map(|run| {
            let error = run.error.map_or(String::new(), |e| format!(" (error {e:.1e})"));
            format!("{} {:.3} ms{error}", run.who, 1e3 * median(&run.seconds))
        })
        .chain(case.absent.iter().map(|a| format!("{} absent ({})", a.who, a.why)))
        .collect();
    println!("{}: {} a {}", case.id(), shown.join(", "), case.per);
    if let Some(out) = &settings.out {
        let mut line = serde_json::to_vec(case)?;
        line.push(b'\n');
        let file = std::fs::File::options().append(true).create(true).open(out);
        file.and_then(|mut f| f.write_all(&line))
            .with_context(|| format!("cannot write {}", out.display()))?;
    }
    if !case.runs.is_empty() && case.runs.iter().all(|run| run.seconds.len() >= LEAST_SAMPLES) {
        analyse(case);
    }
    Ok(())
}

/// Criterion's statistics of times that are there already: one sample a round.
fn analyse(case: &Case) {
    let mut criterion =
        Criterion::default().without_plots().nresamples(10_000).warm_up_time(Duration::from_nanos(1));
    let mut group = criterion.benchmark_group(case.id());
    group.sampling_mode(SamplingMode::Flat);
    for run in &case.runs {
        let n = run.seconds.len();
        // A call takes no time of its own, so Criterion plans many iterations for whatever time it is given; each sample
        // is one round whatever their number.
        group.sample_size(n).measurement_time(Duration::from_micros(10 * n as u64));
        // The call for warming up takes the last one, so that the samples are the rounds in their order.
        let mut next = n - 1;
        group.bench_function(&run.who, |bencher| {
            bencher.iter_custom(|iterations| {
                let seconds = run.seconds[next] * iterations as f64;
                next = (next + 1) % n;
                Duration::from_secs_f64(seconds)
            });
        });
    }
    group.finish();
}

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 0 => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        n => sorted[n / 2],
    }
}
