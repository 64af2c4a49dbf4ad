//! Clients that go, and clients that come too many: jobs end with them, and nobody else notices.

#![cfg(feature = "server")]

mod server_common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nics_core::memory::resident;
use nics_core::server::ServerConfig;
use serde_json::{Value, json};
use server_common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TEXT: &str = "/v1/completions";

/// Sends a request and gives its connection.
async fn send(address: SocketAddr, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = body.to_string();
    let mut bytes = head("POST", TEXT, &[], body.len());
    bytes.extend_from_slice(body.as_bytes());
    stream.write_all(&bytes).await.unwrap();
    stream
}

/// Reads until so many events with a text have come.
async fn read_events(stream: &mut TcpStream, n: usize) {
    let mut seen = Vec::new();
    while seen.windows(6).filter(|w| w == b"data: ").count() < n {
        let mut bytes = [0; 4096];
        let read = timely(stream.read(&mut bytes)).await.unwrap();
        assert!(read > 0, "closed: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&bytes[..read]);
    }
}

#[tokio::test]
async fn a_client_that_goes_takes_its_jobs_along_before_the_next_step() {
    let fake = Fake { pace: Duration::from_millis(5), ..Fake::babbling() };
    let seen = fake.seen.clone();
    let server = Server::fake(ServerConfig::default(), 16, fake).await;
    for (stream, events, n) in [(true, 3, 1), (true, 0, 1), (false, 0, 1), (true, 3, 4), (false, 0, 4)] {
        let ended = server.ended(TEXT).await;
        let before = seen.cancelled.load(Ordering::SeqCst);
        seen.hold.store(events == 0, Ordering::SeqCst);
        let body = completion("x", json!({"stream": stream, "n": n, "max_tokens": 200}));
        let mut client = send(server.address(), &body).await;
        if events > 0 {
            read_events(&mut client, events).await;
            seen.hold.store(true, Ordering::SeqCst);
        }
        until("a step is under way", || seen.held.load(Ordering::SeqCst)).await;
        let tokens = seen.tokens.load(Ordering::SeqCst);
        drop(client);
        // The step lasts until the server has noticed.
        while server.ended(TEXT).await == ended {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        seen.hold.store(false, Ordering::SeqCst);
        until("the job ends", || seen.running.load(Ordering::SeqCst) == 0).await;
        assert_eq!(seen.tokens.load(Ordering::SeqCst) - tokens, n, "those of the step alone, with {body}");
        assert_eq!(seen.cancelled.load(Ordering::SeqCst) - before, n);
    }
    server.end().await;
}

#[tokio::test]
async fn a_client_that_goes_while_it_waits_leaves_the_queue() {
    let fake = Fake { pace: Duration::from_millis(5), room: 1, ..Fake::babbling() };
    let seen = fake.seen.clone();
    let server = Server::fake(ServerConfig::default(), 16, fake).await;
    let long = completion("x", json!({"max_tokens": 200}));
    let first = send(server.address(), &long).await;
    until("the first runs", || seen.running.load(Ordering::SeqCst) == 1).await;
    for stream in [true, false] {
        let waiting = send(server.address(), &completion("y", json!({"stream": stream}))).await;
        until("it waits", || server.handle.stats().queued == 1).await;
        drop(waiting);
        until("it has left", || server.handle.stats().queued == 0).await;
    }
    assert_eq!(seen.admitted.load(Ordering::SeqCst), 1);
    drop(first);
    server.end().await;
}

/// Clients killed before the first token and after three, beside others whose text must not change.
async fn killed_clients(cycles: usize) {
    let server = Server::model(ServerConfig::default(), 64, settings()).await;
    let address = server.address();
    let steady = |i: usize| {
        completion(format!("steady {i}"), json!({"max_tokens": 40, "seed": i, "temperature": 1.0}))
    };
    let text = async |i: usize| {
        whole_texts(&request(address, "POST", TEXT, &[], steady(i).to_string().as_bytes()).await.json())
    };
    let expected = [text(0).await, text(1).await];
    let expected = Arc::new(expected);
    let mut warm = 0;
    for cycle in 0..cycles {
        let others: Vec<_> = (0..2)
            .map(|i| {
                let (expected, body) = (expected.clone(), steady(i).to_string());
                tokio::spawn(async move {
                    let reply = request(address, "POST", TEXT, &[], body.as_bytes()).await;
                    assert_eq!(whole_texts(&reply.json()), expected[i]);
                })
            })
            .collect();
        let fields = json!({"stream": cycle % 3 != 2, "max_tokens": 220, "n": 1 + cycle % 2, "seed": cycle, "ignore_eos": true});
        let mut client = send(address, &completion("to be killed", fields)).await;
        if cycle % 3 == 0 {
            read_events(&mut client, 3).await;
        }
        drop(client);
        for other in others {
            timely(other).await.unwrap();
        }
        until("the slot is free", || server.handle.stats().engine.running == 0).await;
        if cycle + 1 == cycles / 2 {
            warm = resident().unwrap();
        }
    }
    if cycles >= 100 {
        let after = resident().unwrap();
        assert!(
            after as f64 <= warm as f64 * 1.01,
            "{warm} bytes after half of the cycles, {after} at the end"
        );
    }
    let stats = server.handle.stats();
    assert_eq!((stats.queued, stats.running, stats.failed_total), (0, 0, 0));
    server.end().await;
}

#[tokio::test]
async fn clients_are_killed_and_others_do_not_notice() {
    killed_clients(10).await;
}

#[tokio::test]
#[ignore = "long"]
async fn clients_are_killed_two_hundred_times() {
    killed_clients(200).await;
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let fake = Fake { pace: Duration::from_millis(20), room: 1, ..Fake::babbling() };
    let server = Server::fake(ServerConfig::default(), 8, fake).await;
    let address = server.address();
    let alone = server.post(TEXT, &completion("x", json!({"max_tokens": 10, "seed": 0}))).await.json();
    let clients: Vec<_> = (0..64)
        .map(|i| {
            tokio::spawn(async move {
                let body = completion("x", json!({"max_tokens": 10, "seed": 0, "stream": i % 2 == 0}));
                request(address, "POST", TEXT, &[], body.to_string().as_bytes()).await
            })
        })
        .collect();
    let (mut accepted, mut busy) = (0, 0);
    for client in clients {
        let reply = timely(client).await.unwrap();
        if reply.status == 200 {
            let whole = reply.header("content-type") == Some("application/json");
            let texts = if whole { whole_texts(&reply.json()) } else { streamed_texts(&reply.chunks(), 1) };
            assert_eq!(texts, whole_texts(&alone));
            accepted += 1;
        } else {
            assert_eq!(reply.error(429).1.as_deref(), Some("rate_limit_exceeded"));
            let after: u64 = reply.header("retry-after").unwrap().parse().unwrap();
            assert!((1..=60).contains(&after));
            busy += 1;
        }
    }
    // Eight may wait; those that are taken in or end meanwhile make room for others.
    assert!(accepted >= 8 && busy > 0, "{accepted} accepted, {busy} refused");
    let stats = server.handle.stats();
    assert_eq!((stats.busy_total, stats.accepted_total), (busy, accepted + 1));
    assert_eq!(server.post(TEXT, &completion("x", json!({"max_tokens": 10, "seed": 0}))).await.status, 200);
    server.end().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut() {
    let config = ServerConfig { write_timeout: Duration::from_millis(300), ..ServerConfig::default() };
    let front = Front::new();
    // Much more than the sockets' buffers hold: the fields of every token are long.
    let mood = "x".repeat(60_000);
    let fake = Fake { pace: Duration::from_millis(1), ..Fake::babbling() };
    let seen = fake.seen.clone();
    let server = Server::fake(config, 4, fake).await;
    let n = front.card.context - 20;
    let client = send(
        server.address(),
        &completion("x", json!({"stream": true, "max_tokens": n, "n": 4, "mood": mood})),
    )
    .await;
    until("it runs", || seen.admitted.load(Ordering::SeqCst) == 4).await;
    // Its connection is closed from the other side.
    let start = std::time::Instant::now();
    while server.ended(TEXT).await == 0 {
        assert!(start.elapsed() < LIVENESS, "the connection stays open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(client);
    server.end().await;
}
