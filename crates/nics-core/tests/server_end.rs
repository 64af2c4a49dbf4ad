//! The end of a server: SIGTERM drains it, a second one ends it at once.
//!
//! The server of these tests is this very program, started again, so that signals reach nobody else.

#![cfg(feature = "server")]

mod server_common;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nics_core::server::{ServerConfig, serve_blocking, spawn};
use serde_json::{Value, json};
use server_common::*;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const VARIABLE: &str = "NICS_TEST_SERVER";
const CHAT: &str = "/v1/chat/completions";

/// Not a test by itself: the server that the others start. `VARIABLE` has the drain timeout and the time of a step, in
/// milliseconds.
#[test]
fn the_server_of_the_other_tests() {
    let Ok(times) = std::env::var(VARIABLE) else { return };
    let (drain, pace) = times.split_once(' ').unwrap();
    let ms = |t: &str| Duration::from_millis(t.parse().unwrap());
    let (drain_timeout, pace) = (ms(drain), ms(pace));
    let (handle, thread) = spawn(16, move |driver| {
        driver.run(&mut Fake { pace, ..Fake::babbling() });
        Ok::<_, nics_core::Error>(())
    })
    .unwrap();
    let config = ServerConfig { port: 0, drain_timeout, ..ServerConfig::default() };
    let bound = |address: SocketAddr| println!("\nlistening {address}");
    serve_blocking(config, Arc::new(Front::new()), handle, 1, bound).unwrap();
    thread.join().unwrap();
}

struct Started {
    child: Child,
    address: SocketAddr,
}

fn start_server(drain_ms: u64, pace_ms: u64) -> Started {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_server_of_the_other_tests", "--nocapture"])
        .env(VARIABLE, format!("{drain_ms} {pace_ms}"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = loop {
        let line = lines.next().expect("the server starts").unwrap();
        if let Some(address) = line.strip_prefix("listening ") {
            break address.parse().unwrap();
        }
    };
    // What follows must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    Started { child, address }
}

impl Started {
    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    async fn wait(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIVENESS, "the server does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// A request that is under way.
async fn send(address: SocketAddr, fields: Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = chat("x", fields).to_string();
    let mut bytes = head("POST", CHAT, &[], body.len());
    bytes.extend_from_slice(body.as_bytes());
    stream.write_all(&bytes).await.unwrap();
    stream
}

/// Waits until the server has taken so many requests in hand.
async fn taken(address: SocketAddr, n: usize) {
    let start = Instant::now();
    loop {
        let page = request(address, "GET", "/metrics", &[], b"").await;
        if page.text().contains(&format!("nics_requests_accepted_total {n}\n")) {
            return;
        }
        assert!(start.elapsed() < LIVENESS);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn sigterm_finishes_what_was_taken() {
    for signal in ["-TERM", "-INT"] {
        let server = start_server(30_000, 20);
        let mut streamed = send(server.address, json!({"stream": true, "max_tokens": 40, "seed": 1})).await;
        let mut whole = send(server.address, json!({"max_tokens": 40, "seed": 1})).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        taken(server.address, 2).await;
        server.signal(signal);
        // While it drains it says so, and takes nothing new.
        let start = Instant::now();
        while request(server.address, "GET", "/health", &[], b"").await.status == 200 {
            assert!(start.elapsed() < LIVENESS);
        }
        let health = request(server.address, "GET", "/health", &[], b"").await;
        assert_eq!((health.status, health.json()), (503, json!({"status": "draining"})));
        let refused =
            request(server.address, "POST", CHAT, &[], chat("x", json!({})).to_string().as_bytes()).await;
        refused.error(503);

        let chunks = read_reply(&mut streamed).await.chunks();
        let reply = read_reply(&mut whole).await.json();
        assert_eq!(streamed_texts(&chunks, 1), whole_texts(&reply));
        assert_eq!(reply["usage"]["completion_tokens"], 40);
        idle.shutdown().await.unwrap();
        assert_eq!(server.wait().await.code(), Some(0));
    }
}

#[tokio::test]
async fn what_outlasts_the_drain_is_told_so() {
    let server = start_server(300, 20);
    let mut streamed = send(server.address, json!({"stream": true, "max_tokens": 100})).await;
    let mut whole = send(server.address, json!({"max_tokens": 100})).await;
    taken(server.address, 2).await;
    let start = Instant::now();
    server.signal("-TERM");
    let reply = read_reply(&mut streamed).await;
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("shutting down"), "{last}");
    assert_eq!(read_reply(&mut whole).await.error(503).1.as_deref(), Some("unavailable"));
    assert_eq!(server.wait().await.code(), Some(0));
    let took = start.elapsed();
    // The timeout and a second more.
    assert!(took >= Duration::from_millis(300) && took < Duration::from_millis(1300), "{took:?}");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let server = start_server(60_000, 20);
    let mut streamed = send(server.address, json!({"stream": true, "max_tokens": 100})).await;
    taken(server.address, 1).await;
    server.signal("-TERM");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    server.signal("-TERM");
    let reply = read_reply(&mut streamed).await;
    assert!(reply.events().last().unwrap().contains("error"));
    assert_eq!(server.wait().await.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
