//! What is not a policy: single models, speculative decoding, the judge's path, routing of whole queries.

use std::time::Instant;

use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_datasets::ring::RingProblem;
use nics_datasets::word_problems::Split;
use tch::Tensor;

use super::Point;
use super::evaluate::{Bench, MIDDLE, ORACLE, Store, has};
use super::oracle::path;
use super::settings::Study;
use crate::Result;
use crate::baselines::query::{
    Comparison, Head, Matrix, QueryRouter, Similarity, pooled_states, threshold_for_share,
};
use crate::baselines::speculative::{self, Speculative, SpeculativeUsage};
use crate::nano::RESPONSE_TOKENS;

/// One of them.
pub(super) enum Rival {
    /// The middle model by itself.
    Middle,
    /// Speculative decoding with drafts of this length.
    Speculative(usize),
    /// The path of the judge.
    Oracle,
    /// Whole queries go to one model or the other.
    Queries,
}

impl Rival {
    /// All that a study asks for.
    pub fn all(study: &Study) -> Vec<Self> {
        let drafts = study.evaluation.drafts.iter().copied().map(Self::Speculative);
        [Self::Oracle, Self::Queries, Self::Middle].into_iter().chain(drafts).collect()
    }

    /// Its name.
    pub fn name(&self) -> String {
        match self {
            Self::Middle => MIDDLE.to_owned(),
            Self::Speculative(draft) => format!("speculative decoding (vanilla), draft {draft}"),
            Self::Oracle => ORACLE.to_owned(),
            Self::Queries => "query routers".to_owned(),
        }
    }
}

impl Bench<'_> {
    /// Measures what is missing of one.
    pub fn rival(&self, rival: &Rival, store: &mut Store) -> Result<()> {
        let name = rival.name();
        if has(store, &name, None) {
            return Ok(());
        }
        match rival {
            Rival::Middle => Ok(store.add(self.middle()?)?),
            Rival::Speculative(draft) => Ok(store.add(self.speculative(*draft, name)?)?),
            Rival::Oracle => Ok(store.add(self.oracle()?)?),
            Rival::Queries => self.query_routers(store),
        }
    }

    /// A model by itself: response to each prompt.
    fn alone(&self, model: &dyn Model, prompts: &[Vec<u32>]) -> Result<Vec<Vec<u32>>> {
        let eos = [self.models.task.eos()];
        let requests =
            prompts.iter().map(|p| nics_core::generate::Request::greedy(p.clone(), RESPONSE_TOKENS, &eos));
        let mut cache = nics_core::cache::DenseCache::new();
        let mut generator = nics_core::generate::Generator::new(model, &mut cache);
        Ok(nics_core::generate::collect(&mut generator, requests, self.study.evaluation.batch)?)
    }

    fn middle(&self) -> Result<Point> {
        let begun = Instant::now();
        let responses = self.alone(&self.models.middle, &self.prompts)?;
        Ok(Point {
            variant: MIDDLE.into(),
            rate: None,
            threshold: None,
            right: self.marks(responses.iter().cloned()),
            large: vec![0; responses.len()],
            tokens: responses.iter().map(|r| r.len() as u32).collect(),
            large_read: 0,
            identical: None,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn speculative(&self, draft: usize, variant: String) -> Result<Point> {
        let expected = self.alone(&self.models.large, &self.prompts)?;
        let requests: Vec<speculative::Request> = self
            .prompts
            .iter()
            .map(|prompt| speculative::Request {
                prompt: prompt.clone(),
                max_new_tokens: RESPONSE_TOKENS,
                eos: vec![self.models.task.eos()],
                sampling: Sampling::default(),
            })
            .collect();
        let begun = Instant::now();
        let mut decoder = Speculative::new(&self.models.small, &self.models.large, draft)?;
        let replies = decoder.generate(&requests, self.study.evaluation.batch)?;
        let seconds = begun.elapsed().as_secs_f64();
        let usage = replies.iter().fold(SpeculativeUsage::default(), |sum, r| sum.and(r.usage));
        Ok(Point {
            variant,
            rate: None,
            threshold: None,
            right: self.marks(replies.iter().map(|r| r.tokens.clone())),
            large: replies.iter().map(|r| r.usage.calls as u32).collect(),
            tokens: replies.iter().map(|r| r.tokens.len() as u32).collect(),
            large_read: usage.large_read,
            identical: Some(replies.iter().zip(&expected).filter(|(r, e)| r.tokens == **e).count()),
            seconds,
        })
    }

    fn oracle(&self) -> Result<Point> {
        let begun = Instant::now();
        let paths = path(self.models, &self.prompts, RESPONSE_TOKENS, self.study.evaluation.batch)?;
        Ok(Point {
            variant: ORACLE.into(),
            rate: None,
            threshold: None,
            right: self.marks(paths.iter().map(|path| path.iter().map(|t| t.token).collect())),
            large: paths.iter().map(|path| path.iter().filter(|t| t.large).count() as u32).collect(),
            tokens: paths.iter().map(|path| path.len() as u32).collect(),
            // The large model reads everything, the branches aside.
            large_read: paths.iter().map(|path| path.len() as u64).sum(),
            identical: None,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// Problems of a split as queries.
    fn queries(&self, split: Split, n: usize) -> Result<(Vec<RingProblem>, Vec<Vec<u32>>)> {
        let (task, seed) = (&self.models.task, self.study.labels.seed + self.seed);
        let problems: Vec<_> = task.ring().problems(split, seed, n).collect();
        let prompts = problems.iter().map(|p| task.encode(&p.prompt())).collect::<Result<_>>()?;
        Ok((problems, prompts))
    }

    fn query_routers(&self, store: &mut Store) -> Result<()> {
        let (settings, task) = (&self.study.query, &self.models.task);
        let (problems, train) = self.queries(Split::Train, settings.train)?;
        let (_, validation) = self.queries(Split::Validation, settings.validation)?;
        let right = |model: &dyn Model| -> Result<Vec<bool>> {
            let responses = self.alone(model, &train)?;
            Ok(problems.iter().zip(&responses).map(|(p, r)| task.is_right(p, r)).collect())
        };
        let (small, large) = (right(&self.models.small)?, right(&self.models.large)?);
        let known: Vec<Comparison> = small.iter().zip(&large).map(|(s, l)| Comparison::of(*s, *l)).collect();
        let states = |prompts: &[Vec<u32>]| pooled_states(&self.models.small, prompts);
        let (train, validation, test): (Tensor, Tensor, Tensor) =
            (states(&train)?, states(&validation)?, states(&self.prompts)?);
        let mut training = settings.training;
        training.seed += self.seed;
        let routers: Vec<Box<dyn QueryRouter>> = vec![
            Box::new(Matrix::train(&train, &known, settings.dimensions, &training)?),
            Box::new(Head::train(&train, &known, 0, &training)?),
            Box::new(Head::train(&train, &known, settings.hidden, &training)?),
            Box::new(Similarity::new(&train, &known, Similarity::GAMMA)?),
        ];
        let small = self.alone(&self.models.small, &self.prompts)?;
        let large = self.alone(&self.models.large, &self.prompts)?;
        for router in routers {
            let (on_validation, scores) = (router.scores(&validation)?, router.scores(&test)?);
            for &rate in &self.study.evaluation.coarse_rates {
                if has(store, router.name(), Some(rate)) {
                    continue;
                }
                let threshold = threshold_for_share(&on_validation, rate)?;
                let sent: Vec<bool> = scores.iter().map(|s| *s >= threshold).collect();
                let replies = || sent.iter().zip(small.iter().zip(&large));
                let chosen = replies().map(|(sent, (small, large))| if *sent { large } else { small });
                let taken = replies().map(|(sent, (_, large))| if *sent { large.len() as u32 } else { 0 });
                let read = sent.iter().zip(self.prompts.iter().zip(&large)).filter(|(sent, _)| **sent);
                store.add(Point {
                    variant: router.name().into(),
                    rate: Some(rate),
                    threshold: Some(f64::from(threshold)).filter(|t| t.is_finite()),
                    right: self.marks(chosen.clone().cloned()),
                    large: taken.collect(),
                    tokens: chosen.map(|r| r.len() as u32).collect(),
                    large_read: read
                        .map(|(_, (prompt, reply))| (prompt.len() + reply.len() - 1) as u64)
                        .sum(),
                    identical: None,
                    // Both models' replies are known; what a routed query takes is in their own rows.
                    seconds: 0.0,
                })?;
            }
        }
        Ok(())
    }
}
