//! From probabilities and labels to a threshold.
//!
//! A router is used at the threshold that asks the large model least often among those that still catch enough of the
//! divergent tokens ([`Scored::at_recall`]). The other rules are the reference implementation's alternatives.

use crate::checkpoint::CurvePoint;
use crate::policy::Hysteresis;
use crate::{Error, Result};

/// The share of divergent tokens that a threshold should catch, unless said otherwise.
pub const MIN_RECALL: f64 = 0.95;
/// The window of [`Simulation::Hysteresis`] unless said otherwise.
pub const WINDOW: usize = 3;

/// The thresholds that are tried: 100 from 0.01 to 0.99, evenly spaced.
pub fn sweep() -> Vec<f64> {
    spaced(0.01, 0.99, 100)
}

fn spaced(from: f64, to: f64, n: usize) -> Vec<f64> {
    let step = (to - from) / (n - 1) as f64;
    (0..n).map(|i| if i + 1 == n { to } else { i as f64 * step + from }).collect()
}

/// Probabilities with their labels, in the order of their positions.
#[derive(Debug, Clone)]
pub struct Scored {
    /// The router's probability of each row.
    pub probability: Vec<f32>,
    /// Whether the row is divergent.
    pub divergent: Vec<bool>,
}

/// How often decisions are right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// Share of decisions that equal the label.
    pub accuracy: f64,
    /// Share of the rows sent to the large model that are divergent; 0 when none is sent.
    pub precision: f64,
    /// Share of the divergent rows that are sent to the large model.
    pub recall: f64,
    /// Harmonic mean of precision and recall; 0 when both are.
    pub f1: f64,
    /// Share of all rows that are sent to the large model.
    pub positive_rate: f64,
    /// Rows sent to the large model without need, as a share of *all* rows.
    pub false_positives: f64,
}

/// A threshold, and whether it meets what was asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen {
    /// The threshold.
    pub threshold: f64,
    /// Whether it meets the condition; otherwise it is the nearest there is.
    pub met: bool,
    /// What it does on these rows.
    pub metrics: Metrics,
}

/// What a threshold should be best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Harmonic mean of precision and recall.
    F1,
    /// Precision.
    Precision,
    /// Recall.
    Recall,
}

/// How probabilities become decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Simulation {
    /// Each by itself.
    Plain,
    /// As [`crate::policy`]'s neural rolling with this window: the large model stays until the mean falls.
    Hysteresis(usize),
}

impl Scored {
    /// Pairs probabilities with labels.
    ///
    /// # Errors
    /// Different lengths, a probability outside 0 to 1, or [`Error::NoPositiveLabels`] unless both classes are there.
    pub fn new(probability: Vec<f32>, divergent: Vec<bool>) -> Result<Self> {
        if probability.len() != divergent.len() {
            let (p, l) = (probability.len(), divergent.len());
            return Err(Error::Input(format!("{p} probabilities for {l} labels")));
        }
        if let Some(p) = probability.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return Err(Error::Input(format!("{p} is no probability")));
        }
        let (positive, total) = (divergent.iter().filter(|d| **d).count(), divergent.len());
        if positive == 0 || positive == total {
            return Err(Error::NoPositiveLabels { positive, total });
        }
        Ok(Self { probability, divergent })
    }

    /// What a threshold does.
    pub fn metrics(&self, threshold: f64) -> Metrics {
        self.metrics_of(self.probability.iter().map(|&p| f64::from(p) >= threshold))
    }

    /// What decisions in the order of the rows amount to.
    pub fn metrics_of(&self, large: impl Iterator<Item = bool>) -> Metrics {
        // [label][decision]
        let mut counts = [[0usize; 2]; 2];
        for (large, &divergent) in large.zip(&self.divergent) {
            counts[usize::from(divergent)][usize::from(large)] += 1;
        }
        let [[true_negative, false_positive], [false_negative, true_positive]] = counts;
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let n = self.divergent.len();
        let precision = share(true_positive, true_positive + false_positive);
        let recall = share(true_positive, true_positive + false_negative);
        let f1 = if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
        Metrics {
            accuracy: share(true_negative + true_positive, n),
            precision,
            recall,
            f1,
            positive_rate: share(true_positive + false_positive, n),
            false_positives: share(false_positive, n),
        }
    }

    /// Recall and positive rate over the [`sweep`], for a router's card.
    pub fn curve(&self) -> Vec<CurvePoint> {
        let point = |threshold| {
            let Metrics { recall, positive_rate, .. } = self.metrics(threshold);
            CurvePoint { threshold, recall, positive_rate }
        };
        sweep().into_iter().map(point).collect()
    }

    /// Of the [`sweep`]'s thresholds with at least `min_recall` the one that asks the large model least, the first of
    /// equals; when there is none, the first with the highest recall.
    pub fn at_recall(&self, min_recall: f64) -> Chosen {
        let all = self.swept(Simulation::Plain);
        let enough = all.iter().filter(|c| c.metrics.recall >= min_recall);
        match first_least(enough, |c| c.metrics.positive_rate) {
            Some(chosen) => Chosen { met: true, ..*chosen },
            None => highest_recall(&all),
        }
    }

    /// The threshold whose positive rate over the [`sweep`] is the largest that does not exceed `rate`, the lowest of
    /// equals; when all exceed it, the highest threshold.
    pub fn at_rate(&self, rate: f64) -> Chosen {
        let all = self.swept(Simulation::Plain);
        let within = all.iter().filter(|c| c.metrics.positive_rate <= rate);
        match first_least(within, |c| -c.metrics.positive_rate) {
            Some(chosen) => Chosen { met: true, ..*chosen },
            None => all[all.len() - 1],
        }
    }

    /// The best of nine thresholds from 0.1 to 0.9, the first of equals.
    pub fn best(&self, objective: Objective) -> Chosen {
        let of = |m: &Metrics| match objective {
            Objective::F1 => m.f1,
            Objective::Precision => m.precision,
            Objective::Recall => m.recall,
        };
        let all: Vec<Chosen> =
            spaced(0.1, 0.9, 9).into_iter().map(|t| self.chosen(t, Simulation::Plain)).collect();
        let best = first_least(all.iter(), |c| -of(&c.metrics)).copied().unwrap_or(all[0]);
        Chosen { met: true, ..best }
    }

    /// Of thresholds with at least `min_recall` and at most `max_false_positives` (a share of all rows) the one with
    /// fewest false positives. Where only the recall can be met, fewest false positives among those; where not even that
    /// can, the highest recall.
    pub fn at_false_positives(
        &self,
        max_false_positives: f64,
        min_recall: f64,
        simulation: Simulation,
    ) -> Chosen {
        let all = self.swept(simulation);
        let enough = || all.iter().filter(|c| c.metrics.recall >= min_recall);
        match first_least(enough(), |c| c.metrics.false_positives) {
            Some(chosen) => Chosen { met: chosen.metrics.false_positives <= max_false_positives, ..*chosen },
            None => highest_recall(&all),
        }
    }

    fn swept(&self, simulation: Simulation) -> Vec<Chosen> {
        sweep().into_iter().map(|t| self.chosen(t, simulation)).collect()
    }

    fn chosen(&self, threshold: f64, simulation: Simulation) -> Chosen {
        let metrics = match simulation {
            Simulation::Plain => self.metrics(threshold),
            Simulation::Hysteresis(window) => {
                let mut state = Hysteresis::new(threshold, window, true);
                self.metrics_of(self.probability.iter().map(|&p| state.step(f64::from(p))))
            }
        };
        Chosen { threshold, met: false, metrics }
    }
}

/// The first with the least value.
fn first_least<'a>(
    all: impl Iterator<Item = &'a Chosen>,
    value: impl Fn(&Chosen) -> f64,
) -> Option<&'a Chosen> {
    all.reduce(|best, c| if value(c) < value(best) { c } else { best })
}

fn highest_recall(all: &[Chosen]) -> Chosen {
    first_least(all.iter(), |c| -c.metrics.recall).copied().unwrap_or(all[0])
}
