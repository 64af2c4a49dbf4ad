//! What is refused, what fails, who leaves.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use nics_core::models::Model as _;
use nics_core::sampling::Sampling;
use nics_core::server::{Admission, Engine, Job, JobId};
use r2r::decode::{Answer, Decoder, LargeModel, LargeRequest, LocalLarge, OnFailure, seed_at};
use r2r::policy::{Kind, PolicySpec, Sequence};
use r2r::serve::{PairEngine, PairSettings};
use serde_json::{Map, json};

use crate::kit::*;

#[test]
fn a_wrong_field_is_named() {
    let server = Server::new(Setup::default());
    let prompt = prompt(0);
    for (fields, name) in [
        (json!({"threshold": -0.1}), "threshold"),
        (json!({"threshold": 2.5}), "threshold"),
        (json!({"threshold": "0.5"}), "threshold"),
        (json!({"threshold": true}), "threshold"),
        (json!({"target_llm_ratio": 1.1}), "target_llm_ratio"),
        (json!({"target_llm_ratio": -1}), "target_llm_ratio"),
        (json!({"target_llm_ratio": [0.5]}), "target_llm_ratio"),
        (json!({"threshold": 0.5, "target_llm_ratio": 0.5}), "threshold"),
        (json!({"return_sources": "yes"}), "return_sources"),
        (json!({"logprobs": 2}), "logprobs"),
        (json!({"min_p": 0.1}), "min_p"),
        (json!({"repetition_penalty": 1.2}), "repetition_penalty"),
        (json!({"top_p": 0.0}), "top_p"),
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
    ] {
        for stream in [false, true] {
            let mut body = body(&prompt, 8, fields.clone());
            body["stream"] = stream.into();
            let (status, reply) = server.ask("/v1/completions", &body);
            assert_eq!((status, &reply["error"]["param"]), (400, &json!(name)), "{fields}: {reply}");
            assert!(reply["error"]["message"].as_str().unwrap().contains(name), "{reply}");
        }
    }
    let chat = json!({"messages": [{"role": "user", "content": "hello"}], "logprobs": true});
    let (status, reply) = server.ask("/v1/chat/completions", &chat);
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("logprobs")));
    // Values that change nothing, and what nobody knows.
    let fine = json!({"min_p": 0, "repetition_penalty": 1.0, "threshold": null, "unheard_of": 1});
    server.complete(&body(&prompt, 3, fine));
    let chat = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5});
    assert_eq!(server.ask("/v1/chat/completions", &chat).0, 200);
    server.end();
}

#[test]
fn a_policy_without_a_threshold_takes_none() {
    let server = Server::new(Setup { spec: PolicySpec::new(Kind::AlwaysLarge), ..Setup::default() });
    for name in ["threshold", "target_llm_ratio"] {
        let (status, reply) = server.ask("/v1/completions", &body(&prompt(0), 8, json!({name: 0.5})));
        assert_eq!((status, &reply["error"]["param"]), (400, &json!(name)));
        assert!(reply["error"]["message"].as_str().unwrap().contains("always-large"), "{reply}");
    }
    let reply = server.complete(&body(&prompt(0), 8, json!({"return_sources": true})));
    assert!(sources(&reply["choices"][0]["tokens"]).iter().all(|(_, large)| *large));
    server.end();
}

#[test]
fn a_key_is_asked_for() {
    let server = Server::new(Setup { key: Some("sk-secret"), ..Setup::default() });
    server.complete(&body(&prompt(0), 3, json!({})));
    let stranger = ureq::Agent::new_with_config(
        ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build(),
    );
    let answer = stranger
        .post(format!("{}/v1/completions", server.url))
        .content_type("application/json")
        .send(body(&prompt(0), 3, json!({})).to_string())
        .unwrap();
    assert_eq!(answer.status(), 401);
    server.end();
}

#[test]
fn a_client_that_goes_frees_both_models() {
    let server = Server::new(Setup { wrap: |large| Box::new(Slow(large)), ..Setup::default() });
    for _ in 0..5 {
        let mut body = body(&prompt(4), 200, json!({"threshold": 0}));
        body["stream"] = true.into();
        let mut reader = server.post("/v1/completions", &body).into_body().into_reader();
        let mut some = [0; 64];
        assert!(reader.read(&mut some).unwrap() > 0);
        drop(reader);
        server.wait_for("running_sequences", 0.0);
        server.wait_for("kv_bytes", 0.0);
    }
    assert!(server.metric("generated_tokens_total") < 1000.0);
    assert!(server.metric("sequences_cancelled_total") > 4.5);
    server.complete(&body(&prompt(4), 3, json!({})));
    server.end();
}

fn job(id: u64, prompt: usize, new: usize) -> Job {
    Job {
        id: JobId(id),
        prompt: Arc::from(vec![7; prompt]),
        sampling: Sampling::default(),
        max_new_tokens: new,
        eos: Vec::new(),
        own: Map::new(),
    }
}

#[test]
fn a_job_enters_when_both_models_have_room() {
    let pair = Pair::new();
    let dims = (pair.small.dims(), pair.large.dims());
    let engine = |small: usize, large: usize| {
        let (a, b) = PairSettings::token_bytes(dims.0, Some(dims.1));
        let mut settings = PairSettings::share(1, 8, dims.0, Some(dims.1));
        settings.kv_limit_bytes = small * a;
        settings.large.as_mut().unwrap().kv_limit_bytes = large * b;
        let policy = PolicySpec::new(Kind::AlwaysLarge).build(None).unwrap();
        PairEngine::new(Decoder::new(&pair.small, Box::new(LocalLarge::new(&pair.large)), policy), settings)
    };
    // Either of the two can be the one that is short.
    for (small, large, short) in [(128, 4096, "small"), (4096, 128, "large")] {
        let mut engine = engine(small, large).unwrap();
        let limit = engine.stats().kv_limit_bytes;
        match engine.admit(&job(0, 60, 180)) {
            Admission::Refused(e) => assert!(e.to_string().contains(&format!("the {short} model's")), "{e}"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(engine.admit(&job(1, 30, 30)), Admission::Taken));
        assert!(matches!(engine.admit(&job(2, 30, 40)), Admission::Taken | Admission::Full));
        engine.cancel(JobId(2));
        assert!(matches!(engine.admit(&job(3, 50, 60)), Admission::Full));
        let held = engine.stats().kv_bytes;
        assert!(held > 0 && held < limit);
        // Once the first has ended there is room.
        while engine.running() > 0 {
            engine.step(&mut |_| {}).unwrap();
        }
        assert_eq!(engine.stats().kv_bytes, 0);
        assert!(matches!(engine.admit(&job(4, 50, 60)), Admission::Taken));
    }
    let error = engine(1, 4096).err().expect("not even two tokens");
    assert!(error.to_string().contains("the small model is too small"), "{error}");
    assert!(engine(4096, 1).is_err());
}

/// A large model that takes its time.
struct Slow<'m>(LocalLarge<'m>);

/// A large model that fails the sequences whose prompt begins with 13.
struct Unlucky<'m> {
    inner: LocalLarge<'m>,
    failing: Vec<Sequence>,
}

impl LargeModel for Slow<'_> {
    fn vocab(&self) -> usize {
        self.0.vocab()
    }
    fn context(&self) -> usize {
        self.0.context()
    }
    fn open(&mut self, s: Sequence, most: usize, sampling: &Sampling, vocab: usize) -> r2r::Result<()> {
        self.0.open(s, most, sampling, vocab)
    }
    fn ask(&mut self, requests: &[LargeRequest]) -> r2r::Result<()> {
        self.0.ask(requests)
    }
    fn answers(&mut self, wait: Duration) -> r2r::Result<Vec<Answer>> {
        std::thread::sleep(Duration::from_millis(5));
        self.0.answers(wait)
    }
    fn close(&mut self, sequence: Sequence) {
        self.0.close(sequence);
    }
}

impl LargeModel for Unlucky<'_> {
    fn vocab(&self) -> usize {
        self.inner.vocab()
    }
    fn context(&self) -> usize {
        self.inner.context()
    }
    fn open(&mut self, s: Sequence, most: usize, sampling: &Sampling, vocab: usize) -> r2r::Result<()> {
        self.inner.open(s, most, sampling, vocab)
    }
    fn ask(&mut self, requests: &[LargeRequest]) -> r2r::Result<()> {
        let (bad, good): (Vec<_>, Vec<_>) = requests.iter().copied().partition(|r| r.ids[0] == 13);
        self.inner.ask(&good)?;
        self.failing.extend(bad.iter().map(|r| r.sequence));
        Ok(())
    }
    fn answers(&mut self, wait: Duration) -> r2r::Result<Vec<Answer>> {
        let mut answers = self.inner.answers(wait)?;
        let gone = |s| (s, Err(r2r::Error::Input("the other end is gone".into())));
        answers.extend(self.failing.drain(..).map(gone));
        Ok(answers)
    }
    fn close(&mut self, sequence: Sequence) {
        self.failing.retain(|s| *s != sequence);
        self.inner.close(sequence);
    }
}

fn unlucky(on_failure: OnFailure) -> Server {
    fn wrap<'m>(inner: LocalLarge<'m>) -> Box<dyn LargeModel + 'm> {
        Box::new(Unlucky { inner, failing: Vec::new() })
    }
    Server::new(Setup { on_failure, wrap, ..Setup::default() })
}

#[test]
fn a_large_model_that_fails_one_job_fails_no_other() {
    let server = unlucky(OnFailure::Abort);
    let fields = json!({"threshold": 0, "return_sources": true});
    std::thread::scope(|scope| {
        for i in 0..6u32 {
            let (server, fields) = (&server, fields.clone());
            scope.spawn(move || {
                let first = if i % 2 == 0 { 13 } else { 14 };
                let (status, reply) = server.ask("/v1/completions", &body(&[first, i], 20, fields));
                if first == 13 {
                    assert_eq!(status, 500, "{reply}");
                    assert!(reply["error"]["message"].as_str().unwrap().contains("the other end is gone"));
                } else {
                    assert_eq!(status, 200, "{reply}");
                    assert_eq!(reply["usage"]["llm_tokens"], 20);
                }
            });
        }
    });
    server.wait_for("running_sequences", 0.0);
    server.wait_for("kv_bytes", 0.0);
    server.end();
}

#[test]
fn a_degraded_token_says_so() {
    let pair = Pair::new();
    let server = unlucky(OnFailure::KeepSmall);
    let prompt = [13, 5, 9];
    let fields = json!({"threshold": 0, "return_sources": true});
    let reply = server.complete(&body(&prompt, 12, fields));
    let tokens = reply["choices"][0]["tokens"].as_array().unwrap();
    assert!(tokens.iter().all(|t| t["degraded"] == true && t["source"] == "small"), "{tokens:?}");
    let small = pair
        .write(&PolicySpec::new(Kind::AlwaysSmall), r2r::decode::Request::greedy(prompt.to_vec(), 12, &[]));
    assert_eq!(sources(&reply["choices"][0]["tokens"]), written(&small));
    assert_eq!((&reply["usage"]["degraded_tokens"], &reply["usage"]["slm_tokens"]), (&json!(12), &json!(12)));
    assert!((server.metric("degraded_tokens_total") - 12.0).abs() < 1e-9);
    server.end();
}

#[test]
fn the_large_models_draws_have_their_own_seeds() {
    // What the server and a decoder of this process agree on when sampling.
    let pair = Pair::new();
    let server = Server::new(Setup::default());
    let prompt = prompt(5);
    let mut request = r2r::decode::Request::greedy(prompt.clone(), 30, &[]);
    request.settings.target = Some(0.5);
    (request.small.temperature, request.small.top_p) = (f64::from(0.8f32), f64::from(0.9f32));
    request.large = Sampling { temperature: 0.8, top_p: 0.9, seed: 9, ..Sampling::default() };
    request.seed = 9;
    let expected = written(&pair.write(&PolicySpec::new(Kind::Neural), request));
    let fields =
        json!({"target_llm_ratio": 0.5, "temperature": 0.8, "top_p": 0.9, "seed": 9, "return_sources": true});
    let reply = server.complete(&body(&prompt, 30, fields));
    assert_eq!(sources(&reply["choices"][0]["tokens"]), expected);
    assert_ne!(seed_at(9, prompt.len()), seed_at(9, prompt.len() + 1));
    server.end();
}
