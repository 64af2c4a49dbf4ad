//! Benchmarks of nics, each with its peers in the same run.
//!
//! `cargo xtask bench` runs them and puts their figures beside the memory's bandwidth; `cargo bench -p nics-benches` runs
//! them alone. `cargo test` runs each in miniature. Which comparison is unfair, and how: README.md.

mod attention;
mod cached_step;
mod decode;
mod figure;
mod gemv;
mod memory;
mod packed;
mod packed_cuda;
mod packed_decode;
mod pages;
mod peers;
mod prefill;
mod race;
mod route;
mod serve;
mod settings;
mod shapes;

use anyhow::{Result, bail};
use figure::Case;
use settings::{Settings, Size};

/// A suite.
type Suite = fn(&Settings) -> Result<()>;

const SUITES: [(&str, Suite); 10] = [
    ("decode", decode::run),
    ("prefill", prefill::run),
    ("serve", serve::run),
    ("gemv", gemv::run),
    ("packed", packed::run),
    ("packed-decode", packed_decode::run),
    ("packed-cuda", packed_cuda::run),
    ("attention", attention::run),
    ("route", route::run),
    ("pages", pages::run),
];

fn main() -> Result<()> {
    let mut settings = Settings::read()?;
    let _no_grad = tch::no_grad_guard();
    if settings.suite() == Some("bandwidth") {
        let bytes = if settings.size == Size::Miniature { 1 << 24 } else { 1 << 30 };
        let best = nics_kernels::memory::read_bandwidth(&nics_kernels::pool::own(), bytes, 5);
        println!("{best}");
        return Ok(());
    }
    let wanted = |name: &str, settings: &Settings| settings.suite().is_none_or(|suite| suite == name);
    if !SUITES.iter().any(|(name, _)| wanted(name, &settings)) {
        let known: Vec<&str> = SUITES.iter().map(|(name, _)| *name).collect();
        bail!(
            "there is no suite {}; the suites are {}",
            settings.suite().unwrap_or_default(),
            known.join(", ")
        );
    }
    let scratch = Settings::scratch()?;
    let tested = settings.is_test.then(|| scratch.path().join("cases.jsonl"));
    if let Some(file) = &tested {
        settings.out = Some(file.clone());
    }
    for (_, run) in SUITES.iter().filter(|(name, _)| wanted(name, &settings)) {
        run(&settings)?;
    }
    tested.map_or(Ok(()), |file| check(&std::fs::read_to_string(file)?))
}

/// What a run in miniature has to leave: cases of every suite, each with its peers and with times of every round.
fn check(lines: &str) -> Result<()> {
    let cases = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Case>, _>>()?;
    for (name, _) in SUITES {
        if !cases.iter().any(|case| case.suite == name) {
            bail!("the suite {name} has written no case");
        }
    }
    for case in cases {
        let whole = |run: &figure::Run| {
            run.seconds.len() == 2 && run.seconds.iter().all(|s| s.is_finite() && *s > 0.0)
        };
        if case.runs.len() < 2 || !case.runs.iter().all(whole) {
            bail!("{} is not whole: {case:?}", case.id());
        }
    }
    Ok(())
}
