//! Many clients at once: every reply equals what the same request gives alone.

#![cfg(feature = "server")]

mod server_common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nics_core::memory::resident;
use nics_core::server::ServerConfig;
use serde_json::{Value, json};
use server_common::*;

const CLIENTS: usize = 64;

/// The requests that clients choose from: both APIs, streamed and whole, greedy and drawn, several choices, stop strings.
fn requests() -> Vec<(&'static str, Value)> {
    (0..48)
        .map(|i| {
            let mut fields = json!({
                "stream": i % 2 == 0, "n": 1 + i % 3, "seed": i, "max_tokens": 8 + i % 24,
                "temperature": if i % 4 == 0 { 0.0 } else { 1.0 },
            });
            if i % 5 == 0 {
                fields["stop"] = json!(["e", "!"]);
            }
            let text = format!("request {i} {}", "and more ".repeat(i % 7));
            if i % 8 < 4 {
                ("/v1/chat/completions", chat(&text, fields))
            } else {
                ("/v1/completions", completion(text, fields))
            }
        })
        .collect()
}

/// What must not differ from reply to reply: texts and ends of the choices. And the reply's name.
async fn answer(address: SocketAddr, (path, body): &(&str, Value)) -> (Vec<String>, Vec<Value>, String) {
    let reply = request(address, "POST", path, &[], body.to_string().as_bytes()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let n = body["n"].as_u64().unwrap() as usize;
    if body["stream"] == true {
        let chunks = reply.chunks();
        let id = chunks[0]["id"].clone();
        assert!(chunks.iter().all(|c| c["id"] == id), "chunks of another reply");
        let mut ends = vec![Value::Null; n];
        for choice in chunks.iter().map(|c| &c["choices"][0]).filter(|c| !c["finish_reason"].is_null()) {
            let end = &mut ends[choice["index"].as_u64().unwrap() as usize];
            assert!(end.is_null(), "a choice ends twice");
            *end = choice["finish_reason"].clone();
        }
        (streamed_texts(&chunks, n), ends, id.as_str().unwrap().to_owned())
    } else {
        let reply = reply.json();
        let ends = reply["choices"].as_array().unwrap().iter().map(|c| c["finish_reason"].clone()).collect();
        (whole_texts(&reply), ends, reply["id"].as_str().unwrap().to_owned())
    }
}

async fn load(time: Duration) {
    let server = Server::model(ServerConfig::default(), 2 * CLIENTS, settings()).await;
    let address = server.address();
    let requests = Arc::new(requests());
    let mut expected = Vec::new();
    for request in requests.iter() {
        let (texts, ends, _) = answer(address, request).await;
        assert!(ends.iter().all(Value::is_string));
        expected.push((texts, ends));
    }
    let expected = Arc::new(expected);
    // Memory for all of them, written to, so that the test's own does not grow.
    let mut ids = vec![1_u128; 1 << 20];
    ids.clear();
    let ids = Arc::new(Mutex::new(ids));
    let start = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (requests, expected, ids) = (requests.clone(), expected.clone(), ids.clone());
            tokio::spawn(async move {
                let mut sent = 0;
                while start.elapsed() < time {
                    let i = (client * 7 + sent * 5) % requests.len();
                    let (texts, ends, id) = answer(address, &requests[i]).await;
                    assert_eq!((&texts, &ends), (&expected[i].0, &expected[i].1), "request {i}");
                    let id = u128::from_str_radix(id.rsplit('-').next().unwrap(), 16).unwrap();
                    ids.lock().unwrap().push(id);
                    sent += 1;
                }
                sent
            })
        })
        .collect();
    let mut sizes = Vec::new();
    for _ in 0..10 {
        tokio::time::sleep(time / 10).await;
        sizes.push(resident().unwrap());
    }
    let mut replies = 0;
    for client in clients {
        replies += tokio::time::timeout(time + LIVENESS, client).await.expect("a client hangs").unwrap();
    }
    println!("{replies} replies in {:?}; resident bytes after each tenth: {sizes:?}", start.elapsed());
    let mut ids = std::mem::take(&mut *ids.lock().unwrap());
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), replies, "a name twice");
    assert!(replies >= CLIENTS);
    assert!(server.handle.stats().engine.prompt_tokens_reused_total > 0);
    // A client may have its reply before the driver has put down that the request has ended.
    until("the last request is put down", || server.handle.stats().running == 0).await;
    let stats = server.handle.stats();
    assert_eq!((stats.queued, stats.running, stats.failed_total, stats.busy_total), (0, 0, 0, 0));
    assert_eq!(stats.accepted_total as usize, replies + requests.len());
    if time > Duration::from_secs(60) {
        let (warm, end) = (sizes[3], sizes[9]);
        assert!(
            end as f64 <= warm as f64 * 1.01,
            "{warm} bytes after four tenths of the time, {end} at the end"
        );
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_seconds_of_load() {
    load(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn five_minutes_of_load() {
    load(Duration::from_secs(300)).await;
}
