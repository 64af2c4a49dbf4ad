//! The greeting: what cannot be the large model of this small one is refused before anything is written.

use std::net::TcpListener;
use std::time::Duration;

use r2r::Error;
use r2r::decode::{LargeModel, OnFailure};
use r2r::remote::{Engine, RemoteLarge, RemoteSettings};

use crate::kit::*;
use crate::mock::{Fault, Mock, Persona};

fn greet(engine: Engine, url: &str, settings: RemoteSettings) -> Result<RemoteLarge, Error> {
    RemoteLarge::connect(engine, url, settings, &tokenizer(), VOCAB, 200)
}

fn refused(engine: Engine, url: &str, settings: RemoteSettings) -> String {
    match greet(engine, url, settings) {
        Ok(_) => panic!("{url} was taken"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn model_and_context_are_the_servers() {
    for engine in [Engine::Vllm, Engine::Sglang, Engine::Nics] {
        let mock = Mock::start(Persona::of(engine), large());
        let found = greet(engine, &mock.url, settings()).unwrap();
        assert_eq!((found.facts().model.as_str(), found.facts().tokenizer_checked), ("org/large", true));
        // SGLang's page about the model has no context: the small model's counts.
        assert_eq!(found.context(), if engine == Engine::Sglang { 200 } else { 256 });
        let named = RemoteSettings { model: Some("org/large".into()), context: Some(100), ..settings() };
        assert_eq!(greet(engine, &mock.url, named).unwrap().context(), 100);
        let error =
            refused(engine, &mock.url, RemoteSettings { model: Some("org/other".into()), ..settings() });
        assert!(error.contains("org/other") && error.contains("org/large"), "{error}");
    }
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let error = refused(Engine::Vllm, &mock.url, RemoteSettings { context: Some(1000), ..settings() });
    assert!(error.contains("1000") && error.contains("256"), "{error}");
}

#[test]
fn another_tokenizer_is_refused_and_one_that_cannot_be_asked_is_not() {
    for engine in [Engine::Vllm, Engine::Sglang, Engine::Nics] {
        let mock = Mock::start(Persona { shift: 1, ..Persona::of(engine) }, large());
        match greet(engine, &mock.url, settings()) {
            Err(Error::RemoteTokenizer { theirs, ours, .. }) => assert_ne!(theirs, ours),
            other => panic!("{:?}", other.map(|_| ())),
        }
        let mock = Mock::start(Persona { tokenizes: false, ..Persona::of(engine) }, large());
        assert!(!greet(engine, &mock.url, settings()).unwrap().facts().tokenizer_checked);
    }
}

#[test]
fn keys_are_sent() {
    let mock = Mock::start(Persona { key: Some("secret"), ..Persona::of(Engine::Vllm) }, large());
    let error = refused(Engine::Vllm, &mock.url, settings());
    assert!(error.contains("401") && error.contains("a key is needed"), "{error}");
    greet(Engine::Vllm, &mock.url, RemoteSettings { key: Some("secret".into()), ..settings() }).unwrap();
}

#[test]
fn dead_and_foreign_servers_are_named() {
    // A port that nobody listens on any more.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let error = refused(Engine::Vllm, &url, settings());
    assert!(error.contains(&url) && error.contains("cannot be reached, in 4 calls"), "{error}");
    // One that never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let hasty = RemoteSettings { timeout: Duration::from_millis(100), retries: 1, ..settings() };
    match greet(Engine::Sglang, &url, hasty) {
        Err(Error::RemoteTimeout { calls: 2, .. }) => {}
        other => panic!("{:?}", other.map(|_| ())),
    }
    // SGLang where vLLM is meant, and the other way round.
    for (is, said) in [(Engine::Sglang, Engine::Vllm), (Engine::Vllm, Engine::Sglang)] {
        let mock = Mock::start(Persona::of(is), large());
        let error = refused(said, &mock.url, settings());
        assert!(error.contains("404"), "{error}");
    }
}

#[test]
fn a_server_that_gives_no_ids_is_refused() {
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    mock.script(|_| Some(Fault::NoIds));
    let error = refused(Engine::Vllm, &mock.url, settings());
    assert!(error.contains("token_ids"), "{error}");
    // One hiccup is none.
    mock.script(|n| (n == 0).then_some(Fault::Status(503)));
    greet(Engine::Vllm, &mock.url, settings()).unwrap();
}

#[test]
fn senseless_settings_are_named() {
    for (settings, field) in [
        (RemoteSettings { timeout: Duration::ZERO, ..settings() }, "timeout"),
        (RemoteSettings { max_batch: 0, ..settings() }, "max_batch"),
        (RemoteSettings { connections: 1000, ..settings() }, "connections"),
    ] {
        assert!(refused(Engine::Vllm, "http://127.0.0.1:9", settings).contains(field));
    }
    // A penalty that would have to know where the prompt ends.
    let mock = Mock::start(Persona::of(Engine::Vllm), large());
    let mut request = drawn(3).swap_remove(0);
    request.large.penalize_prompt = false;
    let small = small();
    let large = greet(Engine::Vllm, &mock.url, settings()).unwrap();
    let mut decoder =
        r2r::decode::Decoder::new(&small, Box::new(large), always()).on_failure(OnFailure::Abort);
    assert!(decoder.add(request).unwrap_err().to_string().contains("repetition_penalty"));
}
