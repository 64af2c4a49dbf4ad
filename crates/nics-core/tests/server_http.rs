//! The HTTP side by itself: routes, keys, limits, and the form of every refusal.

#![cfg(feature = "server")]

mod server_common;

use std::time::{Duration, Instant};

use nics_core::server::{ApiKeys, ROUTES, ServeError, ServerConfig, start};
use serde_json::json;
use server_common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const KEY: (&str, &str) = ("Authorization", "Bearer sk-secret");

fn keyed() -> ServerConfig {
    ServerConfig { keys: ApiKeys::new(["sk-other", "sk-secret"]).unwrap(), ..ServerConfig::default() }
}

#[tokio::test]
async fn every_route_but_health_needs_a_key() {
    let server = Server::fake(keyed(), 4, Fake::saying("hi")).await;
    let at = server.address();
    assert_eq!(ROUTES.iter().filter(|r| r.open).map(|r| r.path).collect::<Vec<_>>(), ["/health"]);
    for route in ROUTES {
        let path = route.path.replace("{*model}", MODEL);
        for headers in [&[][..], &[("Authorization", "Bearer sk-secre")], &[("Authorization", "sk-secret")]] {
            for method in ["GET", "POST", "DELETE"] {
                let reply = request(at, method, &path, headers, b"{}").await;
                if route.open && method == "GET" {
                    assert_eq!(reply.status, 200);
                } else {
                    let (_, code) = reply.error(401);
                    assert_eq!(code.as_deref(), Some("invalid_api_key"), "{method} {path}");
                    assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
                }
            }
        }
        // With the key it is found, and takes no other method.
        let reply = request(at, route.method, &path, &[KEY], b"{}").await;
        assert!(!matches!(reply.status, 401 | 404 | 405), "{path}: {}", reply.status);
        let other = request(at, "DELETE", &path, &[KEY], b"").await;
        assert_eq!(other.error(405).1.as_deref(), Some("method_not_allowed"));
        assert!(other.header("allow").is_some_and(|allow| allow.contains(route.method)), "{other:?}");
    }
    for path in ["/", "/v1", "/v1/embeddings", "/healthz", "/health/", "/v1/models/"] {
        assert_eq!(request(at, "GET", path, &[], b"").await.error(401).1.as_deref(), Some("invalid_api_key"));
        assert_eq!(request(at, "GET", path, &[KEY], b"").await.status, 404, "{path}");
    }
    server.end().await;
}

#[tokio::test]
async fn an_open_address_is_refused_without_a_key() {
    let (handle, _thread) = nics_core::server::spawn(1, |driver| {
        driver.run(&mut Fake::saying("hi"));
        Ok::<_, nics_core::Error>(())
    })
    .unwrap();
    let open = ServerConfig { host: "0.0.0.0".parse().unwrap(), port: 0, ..ServerConfig::default() };
    let front = std::sync::Arc::new(Front::new());
    let error = start(open.clone(), front.clone(), handle.clone()).await.unwrap_err();
    assert!(matches!(error, ServeError::Open { .. }), "{error}");
    let allowed = ServerConfig { allow_open: true, ..open };
    let running = start(allowed, front.clone(), handle.clone()).await.unwrap();
    // The port is taken now.
    let taken = ServerConfig { port: running.address().port(), ..ServerConfig::default() };
    let error = start(taken, front, handle).await.unwrap_err();
    assert!(matches!(error, ServeError::Bind { .. }), "{error}");
    running.stopper().stop();
    timely(running.join()).await.unwrap();
}

#[tokio::test]
async fn a_request_has_a_name() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let at = server.address();
    let given = request(at, "GET", "/v1/models", &[("X-Request-Id", "mine-1.2_3")], b"").await;
    assert_eq!(given.header("x-request-id"), Some("mine-1.2_3"));
    for bad in ["a b", "", &"x".repeat(200), "a=\"b\""] {
        let made = request(at, "GET", "/v1/models", &[("X-Request-Id", bad)], b"").await;
        assert!(made.header("x-request-id").unwrap().starts_with("req_"), "{made:?}");
    }
    server.end().await;
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!((&model["id"], &model["object"]), (&json!(MODEL), &json!("model")));
    assert_eq!((&model["owned_by"], model["created"].is_u64()), (&json!("tests"), true));
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(&server.get(path).await.json(), model);
    }
    let (_, code) = server.get("/v1/models/other").await.error(404);
    assert_eq!(code.as_deref(), Some("model_not_found"));
    let (param, code) =
        server.post("/v1/chat/completions", &chat("x", json!({"model": "gpt"}))).await.error(404);
    assert_eq!((param.as_deref(), code.as_deref()), (Some("model"), Some("model_not_found")));
    server.end().await;
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_text() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let front = Front::new();
    let text = "Some text, 再见 🦀";
    let reply = server.post("/tokenize", &json!({"prompt": text})).await.json();
    let ids = front.tokenizer.encode(text, true).unwrap();
    assert_eq!(reply, json!({"count": ids.len(), "max_model_len": 256, "tokens": ids}));
    let back = server.post("/detokenize", &json!({"tokens": ids})).await.json();
    assert_eq!(back, json!({"prompt": text}));
    let messages = json!([{"role": "user", "content": "hi"}]);
    let reply = server.post("/tokenize", &json!({"messages": messages})).await.json();
    let ids: Vec<u32> = serde_json::from_value(reply["tokens"].clone()).unwrap();
    assert!(
        front
            .tokenizer
            .decode(&ids, false)
            .unwrap()
            .ends_with("hi<|turn_end|><|role_start|>assistant<|role_end|>")
    );
    for (path, body, param) in [
        ("/tokenize", json!({}), "messages"),
        ("/tokenize", json!({"prompt": 3}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "add_special_tokens": "yes"}), "add_special_tokens"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [1, -1]}), "tokens"),
        ("/detokenize", json!({"tokens": [320]}), "tokens"),
    ] {
        assert_eq!(server.post(path, &body).await.error(400).0.as_deref(), Some(param), "{body}");
    }
    server.end().await;
}

#[tokio::test]
async fn a_body_must_be_json_of_a_kind_and_a_size() {
    let config = ServerConfig { max_body_bytes: 20_000, ..ServerConfig::default() };
    let server = Server::fake(config, 4, Fake::saying("hi")).await;
    let at = server.address();
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        let deep = format!("{}{}", r#"{"a":"#, "[".repeat(10_000));
        for body in [
            &b""[..],
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe{}",
            b"{\"prompt\": \"\xc3\x28\"}",
            deep.as_bytes(),
            b"{\"temperature\": 1e999}",
        ] {
            let start = Instant::now();
            request(at, "POST", path, &[], body).await.error(400);
            assert!(start.elapsed() < Duration::from_secs(5), "liveness");
        }
        for kind in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"] {
            request(at, "POST", path, &[("Content-Type", kind)], b"{}").await.error(415);
        }
        request(at, "POST", path, &[("Content-Encoding", "gzip")], b"{}").await.error(415);
        let reply =
            request(at, "POST", path, &[("Content-Type", "Application/JSON; charset=utf-8")], b"{}").await;
        reply.error(400);

        // Too long: as announced, and in chunks without a word about the length.
        let large = vec![b' '; 2 << 20];
        assert_eq!(
            request(at, "POST", path, &[], &large).await.error(413).1.as_deref(),
            Some("body_too_large")
        );
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
        for _ in 0..200 {
            if stream.write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
        let _ = stream.write_all(b"0\r\n\r\n").await;
        read_reply(&mut stream).await.error(413);
    }
    server.end().await;
}

#[tokio::test]
async fn slow_clients_are_cut() {
    let config = ServerConfig {
        header_timeout: Duration::from_millis(400),
        body_timeout: Duration::from_millis(400),
        ..ServerConfig::default()
    };
    let server = Server::fake(config, 4, Fake::saying("hi")).await;
    let at = server.address();
    // A head that does not end: the connection is closed.
    let trickle = async |bytes: &[u8]| {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let mut reply = Vec::new();
        let writing = async {
            for byte in bytes {
                if writer.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = writing => {}
            _ = timely(reader.read_to_end(&mut reply)) => {}
        }
        reply
    };
    let start = Instant::now();
    let head_alone = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    let reply = trickle(head_alone).await;
    assert!(reply.is_empty() || parse(&reply).status == 408, "{}", String::from_utf8_lossy(&reply));
    // A body that does not end: 408.
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(&head("POST", "/v1/completions", &[], 100)).await.unwrap();
    stream.write_all(b"{").await.unwrap();
    let reply = read_reply(&mut stream).await;
    assert_eq!(reply.error(408).1.as_deref(), Some("body_timeout"));
    // An idle connection is closed as well.
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut reply = Vec::new();
    timely(stream.read_to_end(&mut reply)).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(1100));
    server.end().await;
}

#[tokio::test]
async fn clients_that_wait_for_a_slow_engine_are_not_cut() {
    let short = Duration::from_millis(150);
    let config = ServerConfig {
        header_timeout: short,
        body_timeout: short,
        write_timeout: short,
        ..ServerConfig::default()
    };
    let fake = Fake { pace: Duration::from_millis(300), ..Fake::saying("ab") };
    let server = Server::fake(config, 4, fake).await;
    for stream in [false, true] {
        let reply = server.post("/v1/chat/completions", &chat("x", json!({"stream": stream}))).await;
        assert_eq!(reply.status, 200);
        let texts = if stream { streamed_texts(&reply.chunks(), 1) } else { whole_texts(&reply.json()) };
        assert_eq!(texts, ["ab"]);
    }
    server.end().await;
}

#[tokio::test]
async fn a_foreign_name_is_not_answered_without_keys() {
    let post = async |server: &Server, host: &str, headers: &str| {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let head = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        read_reply(&mut stream).await
    };
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    for host in ["127.0.0.1:8000", "localhost", "[::1]:80"] {
        assert_eq!(post(&server, host, "").await.status, 200, "{host}");
    }
    let reply = post(&server, "rebound.example:8000", "").await;
    assert_eq!(reply.error(403).1.as_deref(), Some("host_not_allowed"));
    assert!(reply.header("access-control-allow-origin").is_none());
    server.end().await;
    let server = Server::fake(keyed(), 4, Fake::saying("hi")).await;
    assert_eq!(post(&server, "any.example", "Authorization: Bearer sk-secret\r\n").await.status, 200);
    server.end().await;
}

#[tokio::test]
async fn a_head_that_is_no_http_gets_a_bare_status() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("x")).await;
    for head in ["GET\r\n\r\n", "POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n"] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let reply = read_reply(&mut stream).await;
        assert_eq!((reply.status, reply.body.len()), (400, 0), "{head}");
    }
    assert_eq!(server.get("/health").await.status, 200);
    server.end().await;
}
