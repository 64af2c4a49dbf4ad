//! The log of a server. A test by itself: what is logged depends on all threads of a process.

#![cfg(feature = "server")]

mod server_common;

use nics_core::server::{ApiKeys, ServerConfig};
use serde_json::json;
use server_common::*;

const KEY: (&str, &str) = ("Authorization", "Bearer sk-secret");

fn keyed() -> ServerConfig {
    ServerConfig { keys: ApiKeys::new(["sk-other", "sk-secret"]).unwrap(), ..ServerConfig::default() }
}

/// Where a test's log goes.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_log_has_a_line_a_request_and_neither_texts_nor_keys() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // The runtime of this test has this thread alone.
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = Server::fake(keyed(), 4, Fake::saying("a private answer")).await;
    let at = server.address();
    for (id, stream) in [("one", true), ("two", false)] {
        let body = chat("a private question", json!({"stream": stream, "user": "somebody"})).to_string();
        let reply =
            request(at, "POST", "/v1/chat/completions", &[KEY, ("X-Request-Id", id)], body.as_bytes()).await;
        assert_eq!(reply.status, 200);
    }
    let wrong = ("Authorization", "Bearer sk-guessed");
    request(at, "POST", "/v1/completions", &[wrong, ("X-Request-Id", "three")], b"a private question")
        .await
        .error(401);
    request(at, "POST", "/v1/private", &[KEY, ("X-Request-Id", "four")], b"{}").await.error(404);
    server.end().await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let line = |id: &str| {
        let lines: Vec<&str> = log.lines().filter(|l| l.contains(&format!("id=\"{id}\""))).collect();
        assert_eq!(lines.len(), 1, "{id}: {log}");
        lines[0]
    };
    for id in ["one", "two"] {
        for part in [
            "route=\"/v1/chat/completions\"",
            "status=200",
            "prompt_tokens=",
            "completion_tokens=",
            "queue_ms=",
            "first_token_ms=",
            "total_ms=",
        ] {
            assert!(line(id).contains(part), "{part}: {}", line(id));
        }
    }
    assert!(line("three").contains("status=401"));
    assert!(line("four").contains("status=404"));
    for secret in ["private", "secret", "guessed", "somebody"] {
        assert!(!log.contains(secret), "{secret}: {log}");
    }
}
