//! The path that a judge would take.

use nics_core::cache::DenseCache;
use nics_core::generate::{Generator, Request, collect};
use r2r::Error;
use r2r::labels::judges::{Judge, Pair, RuleJudge, SynonymTable, Verdict};
use r2r::labels::live::{LiveSettings, LiveToken, follow};
use r2r::labels::pipeline::ContinueSettings;
use serde_json::{Value, json};

use crate::kit::*;

/// Always of one mind, and counts how often it is asked.
struct Fixed(i64, usize);

impl Judge for Fixed {
    fn identity(&self) -> Value {
        json!("fixed")
    }

    fn batch(&self) -> usize {
        3
    }

    fn judge(&mut self, pairs: &[Pair], verdicts: &mut Vec<Verdict>) -> r2r::Result<()> {
        assert!((1..=3).contains(&pairs.len()) && pairs.iter().all(|p| p.small != p.large));
        self.1 += pairs.len();
        verdicts.extend(pairs.iter().map(|_| Verdict::of(self.0)));
        Ok(())
    }
}

fn settings(model: &Model, batch: usize) -> LiveSettings {
    LiveSettings {
        max_new_tokens: 40,
        batch,
        eos: model.tokenizer.special_ids().eos.clone(),
        stops: ContinueSettings::default().stop_tokens(&model.tokenizer).unwrap(),
        sentences: 0,
        max_continuation: 12,
    }
}

fn alone(model: &Model, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let eos = &model.tokenizer.special_ids().eos;
    let requests = prompts.iter().map(|p| Request::greedy(p.clone(), 40, eos));
    let mut cache = DenseCache::new();
    collect(&mut Generator::new(&model.decoder, &mut cache), requests, 4).unwrap()
}

fn tokens(paths: &[Vec<LiveToken>]) -> Vec<Vec<u32>> {
    paths.iter().map(|path| path.iter().map(|t| t.token).collect()).collect()
}

#[test]
fn a_judge_of_one_mind_gives_the_path_of_one_model() {
    let (small, large) = (Model::open(&small()), Model::open(&large()));
    let prompts: Vec<Vec<u32>> = (0..9).map(prompt).collect();
    let follow = |score, batch| {
        let mut judge = Fixed(score, 0);
        let settings = settings(&large, batch);
        let paths = follow(&small.decoder, &large.decoder, &mut judge, &prompts, &settings).unwrap();
        (paths, judge.1)
    };
    for score in [0, 1, -1] {
        let (paths, asked) = follow(score, 4);
        let expected = alone(if score == 0 { &small } else { &large }, &prompts);
        assert_eq!(tokens(&paths), expected, "a judge who says {score}");
        let differ = paths.iter().flatten().filter(|t| t.score.is_some()).count();
        assert!(differ > 0 && differ == asked);
        assert_eq!(paths.iter().flatten().filter(|t| t.large).count(), if score == 0 { 0 } else { differ });
        assert_eq!(paths, follow(score, 1).0);
    }
}

#[test]
fn the_rule_takes_the_large_model_only_where_it_matters() {
    let (small, large) = (Model::open(&small()), Model::open(&large()));
    let prompts: Vec<Vec<u32>> = (0..12).map(prompt).collect();
    let table: SynonymTable = nics_base::settings::parse(&table()).unwrap();
    let run = |batch| {
        let settings = settings(&large, batch);
        let mut judge = RuleJudge::new(&table, &large.tokenizer, settings.stops.clone()).unwrap();
        follow(&small.decoder, &large.decoder, &mut judge, &prompts, &settings).unwrap()
    };
    let paths = run(5);
    assert_eq!(paths, run(1));
    let differ = paths.iter().flatten().filter(|t| t.score.is_some()).count();
    let taken = paths.iter().flatten().filter(|t| t.large).count();
    assert!(taken > 0 && taken < differ, "{taken} of {differ}");
}

#[test]
fn senseless_requests_are_refused() {
    let (small, large) = (Model::open(&small()), Model::open(&large()));
    let run = |prompt: Vec<u32>, settings: &LiveSettings| {
        follow(&small.decoder, &large.decoder, &mut Fixed(0, 0), &[prompt], settings).unwrap_err()
    };
    let good = settings(&large, 2);
    assert!(matches!(run(vec![], &good), Error::EmptyPrompt { seq: 0 }));
    assert!(run(vec![999], &good).to_string().contains("999"));
    assert!(run(vec![1; 500], &good).to_string().contains("smaller context"));
    assert!(run(vec![1], &LiveSettings { batch: 0, ..good }).to_string().contains("batch"));
}
