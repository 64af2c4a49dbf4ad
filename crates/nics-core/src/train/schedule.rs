//! The learning rate over a run.

use std::f64::consts::PI;

/// Linear warm-up, then half a cosine down to a floor: `get_cosine_with_min_lr_schedule_with_warmup` of transformers,
/// and with floor 0 its `get_cosine_schedule_with_warmup`. Floor 1 is a constant rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps in which the factor rises from 0 to 1.
    pub warmup: u64,
    /// The factor at the end.
    pub floor: f64,
}

impl Schedule {
    /// What the learning rate is multiplied by at `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
        let cosine = 0.5 * (1.0 + (PI * progress.min(1.0)).cos());
        cosine * (1.0 - self.floor) + self.floor
    }
}
