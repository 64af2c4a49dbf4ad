//! This project's own server as the large model.

use std::sync::Arc;
use std::thread::JoinHandle;

use nics_core::cache::DenseCache;
use nics_core::sampling::Sampling;
use nics_core::server::{
    EngineThread, Frontend, ModelCard, Phase, ServerConfig, Stopper, TextEngine, TextSettings, spawn, start,
};
use nics_core::template::Message;
use nics_core::tokenizer::Tokenizer;
use r2r::decode::{Decoder, OnFailure, ReadAhead};
use r2r::remote::{Engine, RemoteSettings};
use serde_json::{Map, Value};

use crate::kit::*;

struct Front {
    card: ModelCard,
    tokenizer: Tokenizer,
}

impl Frontend for Front {
    fn card(&self) -> &ModelCard {
        &self.card
    }
    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
    fn chat(
        &self,
        _: &[Message],
        _: Option<&[Value]>,
        _: &Map<String, Value>,
    ) -> nics_core::Result<Vec<u32>> {
        Err(nics_core::Error::input("there is no template"))
    }
}

struct Own {
    url: String,
    stopper: Stopper,
    listening: Option<JoinHandle<()>>,
    engine: Option<EngineThread>,
}

impl Own {
    fn start() -> Self {
        let tokenizer = tokenizer();
        // Sampling of its own, which every call has to speak against.
        let sampling = Sampling { temperature: 0.7, top_p: 0.5, top_k: 3, ..Sampling::default() };
        let card = ModelCard {
            id: "org/large".into(),
            owner: "tests".into(),
            context: 256,
            vocab: VOCAB,
            sampling,
            max_new_tokens: 24,
            eos: tokenizer.special_ids().eos.clone(),
            tools: None,
        };
        let front = Arc::new(Front { card, tokenizer });
        let (handle, engine) = spawn(64, |driver| {
            nics_core::device::set_threads(Some(1))?;
            let model = large();
            let mut cache = DenseCache::new();
            let settings = TextSettings { prefill_chunk: 16, ..TextSettings::default() };
            let mut engine = TextEngine::new(&model, &mut cache, settings)?;
            driver.run(&mut engine);
            Ok::<_, nics_core::Error>(())
        })
        .unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let listening = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            runtime.unwrap().block_on(async move {
                let config = ServerConfig { port: 0, ..ServerConfig::default() };
                let running = start(config, front, handle.clone()).await.unwrap();
                handle.watch().wait_for(|p| *p != Phase::Loading).await.unwrap();
                send.send((running.address(), running.stopper().clone())).unwrap();
                running.join().await.unwrap();
            });
        });
        let (address, stopper) = receive.recv_timeout(LIVENESS).unwrap();
        Self { url: format!("http://{address}"), stopper, listening: Some(listening), engine: Some(engine) }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

#[test]
fn it_writes_what_the_model_writes_here() {
    let own = Own::start();
    for requests in [greedy(16), drawn(16)] {
        for policy in [sometimes, always] {
            let expected = local(policy(), requests.clone());
            let large = connect(Engine::Nics, &own.url, settings());
            assert!(large.facts().tokenizer_checked);
            let found = remote(large, policy(), OnFailure::Abort, requests.clone());
            assert_same(&found, &expected, "own server");
        }
    }
    // Reading ahead, over the server's own prefix cache.
    let ahead = ReadAhead { prompt: true, window: Some(4) };
    let large = connect(Engine::Nics, &own.url, RemoteSettings { read_ahead: ahead, ..settings() });
    let small = small();
    let mut decoder = Decoder::new(&small, Box::new(large), sometimes());
    let found = run(&mut decoder, greedy(16));
    assert_same(&found, &local(sometimes(), greedy(16)), "own server, ahead");
    assert!(decoder.traffic().unwrap().cached_ratio().unwrap() > 0.5, "{:?}", decoder.traffic());
}

#[test]
fn its_end_is_the_policys_case() {
    let own = Own::start();
    let large = connect(Engine::Nics, &own.url, RemoteSettings { retries: 1, ..settings() });
    drop(own);
    let found = remote(large, always(), OnFailure::KeepSmall, greedy(3));
    assert!(found.iter().all(|w| w.error.is_none() && w.events.iter().all(|e| e.degraded)));
}
