//! Each fault on each protocol: passing faults are ridden out, lasting ones end in the stated policy.

use std::time::Duration;

use r2r::decode::{LargeModel, OnFailure};
use r2r::remote::{Engine, RemoteSettings};

use crate::kit::*;
use crate::mock::{Fault, Mock, Persona};

const ENGINES: [Engine; 3] = [Engine::Vllm, Engine::Sglang, Engine::Nics];

/// Faults after which the same call may succeed.
fn passing() -> Vec<Fault> {
    vec![
        Fault::DropBefore,
        Fault::DropAfter,
        Fault::DropHalf,
        Fault::Status(500),
        Fault::Status(503),
        Fault::Busy(1),
        Fault::Two,
        Fault::NoIds,
        Fault::TooFew,
        Fault::SameIndex,
        Fault::Negative,
        Fault::NoJson,
        Fault::OtherJson,
    ]
}

#[test]
fn without_faults_it_writes_what_it_writes_here() {
    let greedy_here = local(sometimes(), greedy(12));
    let drawn_here = local(sometimes(), drawn(12));
    for engine in ENGINES {
        let mock = Mock::start(Persona::of(engine), large());
        let found = remote(connect(engine, &mock.url, settings()), sometimes(), OnFailure::Abort, greedy(12));
        assert_same(&found, &greedy_here, engine.name());
        let found = remote(connect(engine, &mock.url, settings()), sometimes(), OnFailure::Abort, drawn(12));
        assert_same(&found, &drawn_here, engine.name());
        // Connections are kept: a handful for dozens of calls, two greetings among them.
        assert!(mock.calls().len() > 20 && mock.connections() <= 10, "{}", mock.connections());
    }
}

#[test]
fn passing_faults_are_ridden_out() {
    let (greedy_here, drawn_here) = (local(sometimes(), greedy(8)), local(sometimes(), drawn(8)));
    for engine in ENGINES {
        for fault in passing() {
            let what = format!("{} {fault:?}", engine.name());
            for (requests, expected) in [(greedy(8), &greedy_here), (drawn(8), &drawn_here)] {
                let mock = Mock::start(Persona::of(engine), large());
                // One call at a time: no sequence meets more faults in a row than there are retries.
                let one = RemoteSettings { connections: 1, ..settings() };
                let large = connect(engine, &mock.url, one);
                mock.script(move |n| (n % 4 < 2).then_some(fault));
                let found = remote(large, sometimes(), OnFailure::Abort, requests);
                assert_same(&found, expected, &what);
            }
        }
    }
}

#[test]
fn a_late_answer_is_asked_for_again_and_not_taken_twice() {
    let expected = local(sometimes(), drawn(6));
    for engine in ENGINES {
        let mock = Mock::start(Persona::of(engine), large());
        let settings = RemoteSettings { timeout: Duration::from_secs(1), ..settings() };
        let large = connect(engine, &mock.url, settings);
        mock.script(|n| (n == 2 || n == 6).then_some(Fault::Late(Duration::from_millis(1500))));
        let small = small();
        let mut decoder = r2r::decode::Decoder::new(&small, Box::new(large), sometimes());
        let found = run(&mut decoder, drawn(6));
        assert_same(&found, &expected, engine.name());
        assert!(decoder.traffic().unwrap().retries > 0);
    }
}

#[test]
fn an_id_of_the_large_model_alone_is_asked_away() {
    let (greedy_here, drawn_here) = (local(sometimes(), greedy(8)), local(sometimes(), drawn(8)));
    for engine in [Engine::Vllm, Engine::Sglang] {
        for (requests, expected) in [(greedy(8), &greedy_here), (drawn(8), &drawn_here)] {
            let mock = Mock::start(Persona::of(engine), large());
            let large = connect(engine, &mock.url, settings());
            // The server keeps to what is ruled out, each time anew.
            mock.script(|n| (n % 3 == 0).then_some(Fault::Outside(VOCAB as u32 + (n % 2) as u32)));
            let found = remote(large, sometimes(), OnFailure::Abort, requests);
            assert_same(&found, expected, engine.name());
            let banned = |call: &serde_json::Value| {
                let parameters = if engine == Engine::Sglang { &call["sampling_params"][0] } else { call };
                parameters["logit_bias"].is_object()
            };
            assert!(mock.calls().iter().any(banned));
        }
    }
    // Ours does not rule out ids: the policy has the word.
    let mock = Mock::start(Persona::of(Engine::Nics), large());
    let large = connect(Engine::Nics, &mock.url, settings());
    mock.script(|_| Some(Fault::Outside(VOCAB as u32)));
    let found = remote(large, always(), OnFailure::Abort, greedy(4));
    assert!(found.iter().all(|w| w.error.as_ref().unwrap().contains("outside the 320 ids")), "{found:?}");
}

#[test]
fn a_lasting_fault_aborts_who_needs_the_large_model_and_nobody_else() {
    let expected = local(sometimes(), greedy(8));
    let mut lasting = passing();
    lasting.extend([Fault::Status(400), Fault::Status(401), Fault::Status(404)]);
    for engine in ENGINES {
        for &fault in &lasting {
            let what = format!("{} {fault:?}", engine.name());
            let mock = Mock::start(Persona::of(engine), large());
            let settings = RemoteSettings { retries: 1, ..settings() };
            let large = connect(engine, &mock.url, settings);
            // Healthy at first.
            mock.script(move |n| (n >= 3).then_some(fault));
            let found = remote(large, sometimes(), OnFailure::Abort, greedy(8));
            for (found, expected) in found.iter().zip(&expected) {
                // What was written is a beginning of what is written without faults.
                assert_eq!(found.tokens(), expected.tokens()[..found.events.len()], "{what}");
                match &found.error {
                    Some(error) => assert!(error.contains(&mock.url), "{what}: {error}"),
                    None => assert_eq!(found.events.len(), expected.events.len(), "{what}"),
                }
                // It ended where the large model was to choose.
                let next = expected.sources().get(found.events.len()).copied();
                assert_eq!(found.error.is_some(), next == Some(true), "{what}");
            }
            assert!(found.iter().any(|w| w.error.is_some()), "{what}");
        }
    }
}

#[test]
fn keep_small_writes_on_and_says_so() {
    let alone = local(Box::new(r2r::policy::AlwaysSmall), greedy(6));
    for engine in ENGINES {
        for fault in [Fault::Status(500), Fault::Status(400), Fault::DropAfter, Fault::Two] {
            let mock = Mock::start(Persona::of(engine), large());
            let large = connect(engine, &mock.url, RemoteSettings { retries: 1, ..settings() });
            mock.script(move |_| Some(fault));
            let found = remote(large, always(), OnFailure::KeepSmall, greedy(6));
            for (found, alone) in found.iter().zip(&alone) {
                assert_eq!(found.tokens(), alone.tokens());
                assert!(found.events.iter().all(|e| e.degraded));
            }
        }
    }
    // A server that comes back is asked again, with everything that it has missed.
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, RemoteSettings { retries: 0, ..settings() });
    mock.script(|n| (n < 4).then_some(Fault::Status(500)));
    let request = greedy(8).swap_remove(1);
    let found = remote(large, always(), OnFailure::KeepSmall, vec![request.clone()]).swap_remove(0);
    assert_eq!(
        found.events.iter().map(|e| e.degraded).collect::<Vec<_>>(),
        [true, true, true, true, false, false, false, false]
    );
    let ids: Vec<u32> = serde_json::from_value(mock.calls()[4]["prompt"][0].clone()).unwrap();
    assert_eq!(ids, [&request.prompt[..], &found.tokens()[..4]].concat());
}

#[test]
fn one_bad_sequence_of_a_call_does_not_take_the_others_along() {
    let expected = local(always(), greedy(4));
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, settings());
    // Calls of several are refused: each is tried alone.
    mock.script({
        let mut first = true;
        move |_| std::mem::take(&mut first).then_some(Fault::Status(400))
    });
    let found = remote(large, always(), OnFailure::Abort, greedy(4));
    assert_same(&found, &expected, "split");
}

#[test]
fn answers_in_another_order_find_their_sequences() {
    let expected = local(always(), greedy(6));
    for engine in ENGINES {
        let mock = Mock::start(Persona::of(engine), large());
        let large = connect(engine, &mock.url, settings());
        mock.script(|_| Some(Fault::Reversed));
        let found = remote(large, always(), OnFailure::Abort, greedy(6));
        assert_same(&found, &expected, engine.name());
    }
}

#[test]
fn an_evicted_cache_changes_nothing_but_the_count() {
    let expected = local(always(), greedy(10));
    for engine in ENGINES {
        for evicted in [false, true] {
            let mock = Mock::start(Persona::of(engine), large());
            let large = connect(engine, &mock.url, settings());
            mock.script(move |_| evicted.then_some(Fault::Evicted));
            let small = small();
            let mut decoder = r2r::decode::Decoder::new(&small, Box::new(large), always());
            let found = run(&mut decoder, greedy(10));
            assert_same(&found, &expected, engine.name());
            let ratio = decoder.traffic().unwrap().cached_ratio().unwrap();
            assert_eq!(ratio < 0.5, evicted, "{} {ratio}", engine.name());
        }
    }
}

#[test]
fn older_servers_give_ids_among_log_probabilities() {
    let expected = local(sometimes(), drawn(8));
    let persona = Persona { gives_ids: false, ..Persona::of(Engine::Vllm) };
    let mock = Mock::start(persona, large());
    let large = connect(Engine::Vllm, &mock.url, settings());
    mock.script(|_| None);
    let found = remote(large, sometimes(), OnFailure::Abort, drawn(8));
    assert_same(&found, &expected, "log-probabilities");
    assert!(mock.calls().iter().all(|c| c["logprobs"] == 1 && c["return_tokens_as_token_ids"] == true));
}

#[test]
fn what_calls_cost_is_counted() {
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let large = connect(Engine::Vllm, &mock.url, settings());
    mock.script(|n| (n == 1).then_some(Fault::Status(500)));
    assert_eq!(large.traffic().unwrap().calls, 0);
    let small = small();
    let mut decoder = r2r::decode::Decoder::new(&small, Box::new(large), always());
    run(&mut decoder, greedy(5));
    let traffic = decoder.traffic().unwrap();
    let bodies: usize = mock.calls().iter().map(|c| c.to_string().len()).sum();
    assert_eq!((traffic.calls, traffic.retries, traffic.failures), (mock.calls().len() as u64, 1, 0));
    // Five sequences, one call a step.
    assert_eq!(traffic.calls, 6);
    assert!(traffic.bytes_up.abs_diff(bodies as u64) < 100 && traffic.bytes_down > 0, "{traffic:?} {bodies}");
}
