//! From costs to a speed-up, and to where routing cannot pay.

use serde::Serialize;

use super::Costs;
use crate::{Error, Result};

/// What a token costs at a share of the large model, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// The share `r`.
    pub rate: f64,
    /// `t_L(1/r)`: a call of the large model for the tokens since its last one.
    pub call_s: f64,
    /// `t_S + t_R + r t_L(1/r)`.
    pub token_s: f64,
    /// `t_L(1)` over that.
    pub speed_up: f64,
}

/// Whether routing can be faster than the large model alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Up to this share of large-model tokens it is.
    UpTo(f64),
    /// Not at any share: small model and router alone take as long as the large model.
    Never,
    /// At every share, which is so when the large model's longer calls cost less a token than its steps.
    Always,
}

impl Costs {
    /// A step of the large model alone, `t_L(1)`, in seconds.
    pub fn large_step(&self) -> f64 {
        self.large.first().map_or(0.0, |(_, s)| s.median)
    }

    /// `t_L` of so many tokens, between measured lengths by a straight line, beyond the last by the last one's slope.
    pub fn large_call(&self, tokens: f64) -> f64 {
        let points: Vec<(f64, f64)> = self.large.iter().map(|(n, s)| (*n as f64, s.median)).collect();
        let Some(&(first, time)) = points.first() else { return 0.0 };
        if tokens <= first || points.len() == 1 {
            return time;
        }
        let at = points[1..].iter().position(|p| tokens <= p.0).unwrap_or(points.len() - 2);
        let ((x0, y0), (x1, y1)) = (points[at], points[at + 1]);
        y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
    }

    /// What a token costs at a share above 0 and up to 1.
    ///
    /// # Errors
    /// [`Error::Setting`] for any other share.
    pub fn predict(&self, rate: f64) -> Result<Prediction> {
        if !(rate > 0.0 && rate <= 1.0) {
            return Err(Error::setting("the routing rate", rate, "above 0, at most 1"));
        }
        let call_s = self.large_call(1.0 / rate);
        let token_s = self.small.median + self.router.median + rate * call_s;
        Ok(Prediction { rate, call_s, token_s, speed_up: self.large_step() / token_s })
    }

    /// The largest share at which a token still costs less than the large model's own.
    pub fn verdict(&self) -> Verdict {
        let gains = |rate: f64| self.predict(rate).is_ok_and(|p| p.speed_up > 1.0);
        // A thousandth of the tokens is as good as none. Costs rise with the share but for the steps of the large model's
        // calls, so the last share that gains is looked for from above.
        let shares = (1..=1000).rev().map(|i| f64::from(i) / 1000.0);
        match shares.into_iter().find(|&rate| gains(rate)) {
            Some(rate) if rate >= 1.0 => Verdict::Always,
            Some(rate) => Verdict::UpTo(rate),
            None => Verdict::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Spread;
    use super::*;

    fn spread(median: f64) -> Spread {
        Spread { median, low: median, high: median }
    }

    fn costs(small: f64, router: f64, large: &[(usize, f64)]) -> Costs {
        let large = large.iter().map(|&(n, t)| (n, spread(t))).collect();
        Costs { small: spread(small), router: spread(router), large }
    }

    #[test]
    fn a_token_costs_the_small_step_the_router_and_its_share_of_a_call() {
        let costs = costs(8.0, 1.0, &[(1, 33.0), (4, 34.0), (16, 40.0)]);
        let p = costs.predict(0.25).unwrap();
        assert!((p.call_s - 34.0).abs() < 1e-12 && (p.token_s - 17.5).abs() < 1e-12);
        assert!((p.speed_up - 33.0 / 17.5).abs() < 1e-12);
        assert!((costs.predict(0.125).unwrap().call_s - 36.0).abs() < 1e-12, "between 4 and 16");
        assert!((costs.predict(0.05).unwrap().call_s - 42.0).abs() < 1e-12, "beyond 16");
        for wrong in [0.0, -0.1, 1.1, f64::NAN] {
            assert!(costs.predict(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_verdict_is_where_both_cost_the_same() {
        // 9 + r 33 = 33 at r = 24 / 33.
        let Verdict::UpTo(rate) = costs(8.0, 1.0, &[(1, 33.0)]).verdict() else { panic!("a share") };
        assert!((rate - 24.0 / 33.0).abs() < 1e-3, "{rate}");
        assert_eq!(costs(30.0, 4.0, &[(1, 33.0)]).verdict(), Verdict::Never);
        assert_eq!(costs(0.0, -1.0, &[(1, 33.0)]).verdict(), Verdict::Always);
    }
}
