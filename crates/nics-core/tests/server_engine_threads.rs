//! The default engine on its thread, among many clients.
#![cfg(feature = "server")]

mod seam_models;
mod server_engine_kit;

use std::time::Duration;

use nics_core::cache::DenseCache;
use nics_core::server::{
    Driver, EngineThread, Failure, Handle, Job, Phase, TextEngine, TextSettings, Update, Updates, spawn,
};
use seam_models::*;
use server_engine_kit::*;

/// The default engine on a tiny model, on a thread of its own.
fn text_engine(queue: usize, settings: TextSettings) -> (Handle, EngineThread) {
    spawn(queue, move |driver: Driver| -> nics_core::Result<()> {
        let model = decoder("llama");
        let mut cache = DenseCache::new();
        driver.run(&mut TextEngine::new(&model, &mut cache, settings)?);
        Ok(())
    })
    .unwrap()
}

fn tokens(updates: Updates) -> Vec<u32> {
    let mut updates = updates;
    let mut tokens = Vec::new();
    while let Some(update) = updates.blocking_recv() {
        match update {
            Update::Token(written) => tokens.push(written.token),
            Update::Failed { failure, .. } => panic!("{failure}"),
            _ => {}
        }
    }
    tokens
}

#[test]
fn a_reader_that_does_not_read_holds_nobody_up() {
    let (handle, thread) = text_engine(8, settings());
    let submit = |seed: u64, new| {
        let job = Job { id: handle.job_id(), ..drawn(seed, ids(12, seed as u32), new) };
        (job.clone(), handle.submit(vec![job]).unwrap())
    };
    let (slow_job, slow) = submit(1, 200);
    let model = decoder("llama");
    for seed in 2..8 {
        let (job, updates) = submit(seed, 20);
        assert_eq!(tokens(updates), alone(&model, &job));
    }
    // It has all of its tokens by and by, whenever it reads them.
    eventually("the slow one's job ends unread", || handle.stats().engine.running == 0);
    assert_eq!(tokens(slow), alone(&model, &slow_job));
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn many_threads_come_and_go_and_each_gets_its_own_tokens() {
    let (handle, thread) = text_engine(64, TextSettings { max_sequences: 4, ..settings() });
    let model = decoder("llama");
    std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for client in 0..8u64 {
            let handle = handle.clone();
            clients.push(scope.spawn(move || {
                let mut got = Vec::new();
                for turn in 0..6 {
                    let seed = client * 37 + turn * 5;
                    let job = Job {
                        id: handle.job_id(),
                        ..drawn(seed, ids(5 + turn as usize * 6, seed as u32), 16)
                    };
                    let mut updates = handle.submit(vec![job.clone()]).unwrap();
                    if turn % 3 == 2 {
                        // Away before the first token, or after three updates.
                        for _ in 0..(client % 2) * 3 {
                            updates.blocking_recv();
                        }
                        continue;
                    }
                    got.push((job, tokens(updates)));
                }
                got
            }));
        }
        for client in clients {
            for (job, found) in client.join().unwrap() {
                assert_eq!(found, alone(&model, &job), "seed {}", job.sampling.seed);
            }
        }
    });
    eventually("all slots are free", || handle.stats().engine.running == 0);
    let stats = handle.stats();
    assert_eq!((stats.accepted_total, stats.failed_total, stats.queued), (48, 0, 0));
    assert_eq!(stats.finished_total + stats.cancelled_total, 48);
    assert!(stats.step_time_total > Duration::ZERO);
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn updates_are_awaited_in_a_runtime_and_phases_too() {
    let (handle, thread) = text_engine(8, settings());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut phases = handle.watch();
        phases.wait_for(|phase| *phase == Phase::Ready).await.unwrap();
        let mut updates = handle.submit(vec![greedy(0, ids(4, 1), 3)]).unwrap();
        let mut count = 0;
        while updates.recv().await.is_some() {
            count += 1;
        }
        assert_eq!(count, 1 + 3 + 1);
        handle.drain();
        phases.wait_for(|phase| *phase == Phase::Stopped).await.unwrap();
    });
    thread.join().unwrap();
    assert!(matches!(Failure::Stopped.to_string().as_str(), "the server is shutting down"));
}
