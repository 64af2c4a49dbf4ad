//! The HTTP side by itself: routes, keys, limits, and the form of every refusal.

#![cfg(feature = "server")]

mod server_common;

use std::time::{Duration, Instant};

use nics_core::server::{ApiKeys, ROUTES, ServeError, ServerConfig, start};
use serde_json::{Value, json};
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
async fn a_wrong_field_is_named() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let both = [
        ("temperature", json!(999_999)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!([1])),
        ("top_p", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1e9)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("n", json!(1_000_000)),
        ("n", json!(0)),
        ("n", json!(1.5)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(2_147_483_648u64)),
        ("max_tokens", json!(1e300)),
        ("max_completion_tokens", json!(257)),
        ("stop", json!(3)),
        ("stop", json!([3])),
        ("stop", json!("")),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(257))),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("stream", json!(1)),
        ("stream_options", json!({"include_usage": true})),
        ("ignore_eos", json!("no")),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-0.5)),
        ("logit_bias", json!({"5": 1})),
        ("response_format", json!({"type": "json_object"})),
        ("suffix", json!("end")),
        ("best_of", json!(3)),
        ("user", json!(3)),
        ("model", json!(3)),
    ];
    let chats = [
        ("messages", json!(null)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages[0]", json!(["hi"])),
        ("messages[0].role", json!([{"content": "hi"}])),
        ("messages[0].role", json!([{"role": 3, "content": "hi"}])),
        ("messages[0].content", json!([{"role": "user"}])),
        ("messages[0].content", json!([{"role": "user", "content": 3}])),
        ("messages[0].content[0].type", json!([{"role": "user", "content": [{"text": "hi"}]}])),
        ("messages[0].content[0].text", json!([{"role": "user", "content": [{"type": "text"}]}])),
        (
            "messages[0].content[1].type",
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "file:///x"}}]}]),
        ),
        ("messages[0].tool_calls", json!([{"role": "assistant", "content": "a", "tool_calls": 3}])),
        ("messages[0].tool_calls[0].function.name", json!([{"role": "assistant", "tool_calls": [{}]}])),
    ];
    let check = async |path: &str, mut body: Value, param: &str, field: &str, value: Value| {
        body[field] = value.clone();
        let reply = server.post(path, &body).await;
        assert_eq!(reply.error(400).0.as_deref(), Some(param), "{field}: {value}: {}", reply.text());
    };
    for (field, value) in both {
        check("/v1/chat/completions", chat("hi", json!({})), field, field, value.clone()).await;
        check("/v1/completions", completion("hi", json!({})), field, field, value).await;
    }
    for (param, value) in chats {
        check("/v1/chat/completions", chat("hi", json!({})), param, "messages", value).await;
    }
    for (field, value) in [
        ("tools", json!("all")),
        ("tools[0]", json!([3])),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ("logprobs", json!(3)),
        ("top_logprobs", json!(2)),
        ("chat_template_kwargs", json!(2)),
        ("functions", json!([{"name": "f"}])),
    ] {
        let name = field.split('[').next().unwrap();
        check("/v1/chat/completions", chat("hi", json!({})), field, name, value).await;
    }
    for (field, value) in [
        ("prompt", json!(null)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!(3)),
        ("prompt", json!([1, "a"])),
        ("prompt", json!(["a", 1])),
        ("prompt", json!([[1, 2], [3, -1]])),
        ("prompt", json!([320])),
        ("prompt", json!([4_294_967_296u64])),
        ("prompt", json!({"a": 1})),
        ("prompt", json!(vec!["a"; 65])),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("echo", json!(1)),
    ] {
        check("/v1/completions", completion("hi", json!({})), field, field, value).await;
    }
    let reply = server.post("/v1/completions", &completion("hi", json!({"mood": 3}))).await;
    assert!(reply.text().contains("mood is no string"));
    reply.error(400);
    server.end().await;
}

#[tokio::test]
async fn values_that_change_nothing_are_let_through() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let neutral = json!({
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "suffix": null, "best_of": 1, "user": "me", "temperature": null, "top_p": 1, "top_k": -1, "min_p": 0,
        "stop": null, "n": null, "stream": false, "stream_options": null, "seed": -3, "max_tokens": 2,
        "max_completion_tokens": 2, "logprobs": null, "no_such_field": [1, 2],
    });
    assert_eq!(server.post("/v1/completions", &completion("x", neutral.clone())).await.status, 200);
    let mut neutral = neutral;
    neutral["tools"] = json!([]);
    neutral["tool_choice"] = json!("none");
    neutral["logprobs"] = json!(false);
    neutral["messages"] = json!([
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": "me"},
    ]);
    let reply = server.post("/v1/chat/completions", &neutral).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    server.end().await;
}

#[tokio::test]
async fn prompt_and_reply_must_fit_the_context() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::babbling()).await;
    let ids = |n: usize| json!(vec![5; n]);
    let post =
        async |n: usize, fields: Value| server.post("/v1/completions", &completion(ids(n), fields)).await;
    for (n, fields) in [(256, json!({})), (250, json!({"max_tokens": 7})), (5000, json!({"max_tokens": 1}))] {
        let (_, code) = post(n, fields).await.error(400);
        assert_eq!(code.as_deref(), Some("context_length_exceeded"), "{n}");
    }
    // Absent, it is the model's own, as far as there is room.
    for (n, fields, written) in
        [(250, json!({"max_tokens": 6}), 6), (250, json!({}), 6), (20, json!({}), 24), (255, json!({}), 1)]
    {
        let reply = post(n, fields).await.json();
        let usage = json!({
            "prompt_tokens": n, "completion_tokens": written, "total_tokens": n + written,
            "prompt_tokens_details": {"cached_tokens": 0},
        });
        assert_eq!(reply["usage"], usage);
        assert_eq!(reply["choices"][0]["finish_reason"], "length");
    }
    server.end().await;
}

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
