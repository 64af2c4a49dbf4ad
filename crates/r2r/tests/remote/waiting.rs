//! While one sequence waits, others go on; what is read ahead; who goes while waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use r2r::decode::{Decoder, ReadAhead};
use r2r::policy::Sequence;
use r2r::remote::{Engine, RemoteSettings};

use crate::kit::*;
use crate::mock::{Fault, Mock, Persona};

#[test]
fn others_go_on_while_one_waits() {
    let expected = local(sometimes(), greedy(20));
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, RemoteSettings { max_batch: 1, ..settings() });
    // The first question is answered when the others have written a good deal.
    mock.script(|n| (n == 0).then_some(Fault::Gate));
    let small = small();
    let mut decoder = Decoder::new(&small, Box::new(large), sometimes());
    let (mut written, mut at_the_gate) = ([0; 5], None);
    let found = run_watched(&mut decoder, greedy(20), &mut |step| {
        step.tokens.iter().for_each(|event| written[event.sequence.0 as usize] += 1);
        if at_the_gate.is_none() && written.iter().sum::<usize>() >= 60 {
            at_the_gate = Some(written);
            mock.open_gate();
        }
    });
    assert_same(&found, &expected, "late");
    // Who waited wrote nothing from its question on.
    let ids: Vec<u32> = serde_json::from_value(mock.calls()[0]["prompt"][0].clone()).unwrap();
    let asked = |i: usize, prompt: &[u32]| [prompt, &expected[i].tokens()].concat().starts_with(&ids);
    let (waiting, prompt) = prompts().into_iter().enumerate().find(|(i, p)| asked(*i, p)).unwrap();
    assert_eq!(at_the_gate.unwrap()[waiting], ids.len() - prompt.len());
}

#[test]
fn what_is_routed_together_shares_calls_up_to_the_cap() {
    for (engine, requests, calls) in [
        (Engine::Vllm, greedy(4), 3 * 4),
        (Engine::Nics, greedy(4), 3 * 4),
        (Engine::Sglang, greedy(4), 3 * 4),
        // A call of these has one seed; SGLang's has one for each sequence.
        (Engine::Vllm, drawn(4), 5 * 4),
        (Engine::Sglang, drawn(4), 3 * 4),
    ] {
        let expected = local(always(), requests.clone());
        let mock = Mock::start(Persona::of(engine), large());
        let capped = RemoteSettings { max_batch: 2, ..settings() };
        let large = connect(engine, &mock.url, capped);
        mock.script(|_| None);
        let small = small();
        let mut decoder = Decoder::new(&small, Box::new(Together(large)), always());
        let found = run(&mut decoder, requests);
        assert_same(&found, &expected, engine.name());
        assert_eq!(mock.calls().len(), calls, "{}", engine.name());
    }
}

/// Hands answers over when all are there, so that sequences stay in step.
struct Together(r2r::remote::RemoteLarge);

impl r2r::decode::LargeModel for Together {
    fn vocab(&self) -> usize {
        self.0.vocab()
    }
    fn context(&self) -> usize {
        self.0.context()
    }
    fn open(
        &mut self,
        sequence: Sequence,
        max_tokens: usize,
        sampling: &nics_core::sampling::Sampling,
        vocab: usize,
    ) -> r2r::Result<()> {
        self.0.open(sequence, max_tokens, sampling, vocab)
    }
    fn ask(&mut self, requests: &[r2r::decode::LargeRequest]) -> r2r::Result<()> {
        self.0.ask(requests)
    }
    fn answers(&mut self, _wait: Duration) -> r2r::Result<Vec<r2r::decode::Answer>> {
        let mut all = Vec::new();
        while all.len() < 5 {
            all.extend(self.0.answers(LIVENESS)?);
        }
        Ok(all)
    }
    fn close(&mut self, sequence: Sequence) {
        self.0.close(sequence);
    }
}

#[test]
fn reading_ahead_changes_no_token() {
    let expected = local(sometimes(), drawn(24));
    for engine in [Engine::Vllm, Engine::Sglang] {
        let mock = Mock::start(Persona::of(engine), large());
        let ahead = ReadAhead { prompt: true, window: Some(4) };
        // Reading ahead that fails is nobody's concern, and other calls are made again.
        mock.script(|n| (n % 5 == 1).then_some(Fault::Status(500)));
        let small = small();
        let mut warm_calls = 0;
        // How often there is time to read ahead depends on who waits for whom just then; over some rounds there is.
        for _ in 0..4 {
            let large =
                connect(engine, &mock.url, RemoteSettings { read_ahead: ahead, retries: 40, ..settings() });
            let mut decoder = Decoder::new(&small, Box::new(large), sometimes());
            let found = run(&mut decoder, drawn(24));
            assert_same(&found, &expected, engine.name());
            let traffic = decoder.traffic().unwrap();
            assert!(traffic.failures == 0, "{traffic:?}");
            warm_calls += traffic.warm_calls;
        }
        assert!(warm_calls >= 5, "{warm_calls}");
    }
}

#[test]
fn a_prompt_is_sent_when_its_request_comes() {
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(
        Engine::Vllm,
        &mock.url,
        RemoteSettings { read_ahead: ReadAhead { prompt: true, window: None }, ..settings() },
    );
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    mock.script(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        None
    });
    let small = small();
    let mut decoder = Decoder::new(&small, Box::new(large), Box::new(r2r::policy::AlwaysSmall));
    let request = greedy(3).swap_remove(3);
    decoder.add(request.clone()).unwrap();
    let start = std::time::Instant::now();
    while seen.load(Ordering::Relaxed) == 0 {
        assert!(start.elapsed() < LIVENESS);
        std::thread::sleep(Duration::from_millis(2));
    }
    let ids: Vec<u32> = serde_json::from_value(mock.calls()[0]["prompt"][0].clone()).unwrap();
    assert_eq!(ids, request.prompt);
    while decoder.running() > 0 {
        decoder.step().unwrap();
    }
    assert_eq!(mock.calls().len(), 1, "the small model alone writes");
}

#[test]
fn who_goes_while_waiting_is_forgotten() {
    let expected = local(always(), greedy(6));
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, RemoteSettings { max_batch: 1, ..settings() });
    mock.script(|n| (n < 5).then_some(Fault::Late(Duration::from_millis(100))));
    let small = small();
    let mut decoder = Decoder::new(&small, Box::new(large), always());
    let sequences: Vec<Sequence> = greedy(6).into_iter().map(|r| decoder.add(r).unwrap()).collect();
    assert!(decoder.advance().unwrap().tokens.is_empty());
    decoder.cancel(sequences[1]);
    decoder.cancel(sequences[3]);
    // A sequence that comes meanwhile is not confused with them.
    let late = decoder.add(greedy(6).swap_remove(1)).unwrap();
    let mut found: std::collections::HashMap<Sequence, Vec<u32>> = std::collections::HashMap::new();
    while decoder.running() > 0 {
        for event in decoder.step().unwrap() {
            found.entry(event.sequence).or_default().push(event.token);
        }
    }
    assert_eq!(found.len(), 4);
    for (i, sequence) in [(0, sequences[0]), (2, sequences[2]), (4, sequences[4]), (1, late)] {
        assert_eq!(found[&sequence], expected[i].tokens());
    }
}

#[test]
fn ending_while_calls_are_under_way_is_no_matter() {
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, settings());
    mock.script(|_| Some(Fault::Late(Duration::from_millis(300))));
    let small = small();
    let mut decoder = Decoder::new(&small, Box::new(large), always());
    for request in greedy(6) {
        decoder.add(request).unwrap();
    }
    decoder.advance().unwrap();
    let start = std::time::Instant::now();
    drop(decoder);
    assert!(start.elapsed() < Duration::from_millis(250), "nobody waits for the threads");
}
