//! What a server says about itself: health and metrics.

#![cfg(feature = "server")]

mod server_common;

use nics_core::server::{ServerConfig, start};
use serde_json::json;
use server_common::*;

#[tokio::test]
async fn health_and_metrics_say_what_goes_on() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hello")).await;
    assert_eq!(server.get("/health").await.json(), json!({"status": "ok"}));
    server.post("/v1/chat/completions", &chat("hi", json!({}))).await.json();
    server.post("/v1/chat/completions", &chat("hi", json!({"n": 0}))).await.error(400);
    server.get("/nowhere").await.error(404);
    let page = server.get("/metrics").await;
    assert_eq!(page.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for line in [
        "nics_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "nics_http_requests_total{route=\"/v1/chat/completions\",status=\"400\"} 1",
        "nics_http_requests_total{route=\"other\",status=\"404\"} 1",
        "nics_queue_requests 0",
        "nics_queue_limit_requests 4",
        "nics_running_requests 0",
        "nics_requests_accepted_total 1",
        "nics_requests_rejected_total 0",
        "nics_time_to_first_token_seconds_count 1",
        "nics_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1",
    ] {
        assert!(page.text().lines().any(|l| l == line), "{line} is not in\n{}", page.text());
    }
    for line in page.text().lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("nics_") && value.parse::<f64>().is_ok(), "{line}");
    }
    server.end().await;

    // An engine that could not be loaded: the server says so.
    let server =
        Server::with(ServerConfig::default(), 4, |_| Err(nics_core::Error::input("no weights"))).await;
    let reply = server.get("/health").await;
    assert_eq!((reply.status, reply.json()), (503, json!({"status": "dead"})));
    server.post("/v1/chat/completions", &chat("hi", json!({}))).await.error(503);
    server.running.stopper().drain();
    timely(server.running.join()).await.unwrap();
}

#[tokio::test]
async fn a_model_that_is_being_loaded_keeps_requests_waiting() {
    let (load, loaded) = std::sync::mpsc::channel::<()>();
    let (handle, thread) = nics_core::server::spawn(4, move |driver| {
        loaded.recv().unwrap();
        driver.run(&mut Fake::saying("hi"));
        Ok::<_, nics_core::Error>(())
    })
    .unwrap();
    let config = ServerConfig { port: 0, ..ServerConfig::default() };
    let running = start(config, std::sync::Arc::new(Front::new()), handle.clone()).await.unwrap();
    let server = Server { running, handle, thread };
    let health = server.get("/health").await;
    assert_eq!((health.status, health.json()), (503, json!({"status": "loading"})));
    let body = chat("x", json!({}));
    let waiting = server.post("/v1/chat/completions", &body);
    let after = async {
        until("it waits", || server.handle.stats().queued == 1).await;
        load.send(()).unwrap();
    };
    let (reply, ()) = timely(async { tokio::join!(waiting, after) }).await;
    assert_eq!(whole_texts(&reply.json()), ["hi"]);
    server.end().await;
}
