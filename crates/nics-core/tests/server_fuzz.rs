//! Whatever is sent, the server refuses or answers it, and answers the next one as before.

#![cfg(feature = "server")]

mod server_common;

use std::net::SocketAddr;
use std::time::Duration;

use nics_core::server::ServerConfig;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use server_common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What a request that arrives whole may be answered with. 404 is for models that are not here.
const EXPECTED: [u16; 5] = [200, 400, 404, 413, 415];
const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

const FIELDS: [&str; 39] = [
    "model",
    "messages",
    "prompt",
    "tokens",
    "tools",
    "tool_choice",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "ignore_eos",
    "return_token_ids",
    "echo",
    "user",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "response_format",
    "suffix",
    "best_of",
    "mood",
    "chat_template_kwargs",
    "add_special_tokens",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "metadata",
    "",
    "\u{0}",
];

struct Fuzz(ChaCha8Rng);

impl Fuzz {
    fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n)
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// A sound request.
    fn sound(&mut self, path: &str) -> Value {
        let mut body = match path {
            "/v1/chat/completions" => chat("hello", json!({})),
            "/v1/completions" => completion("hello", json!({})),
            "/tokenize" => json!({"prompt": "hello"}),
            _ => json!({"tokens": [72, 105]}),
        };
        body["max_tokens"] = json!(1 + self.below(8));
        for (field, values) in [
            ("temperature", json!([0, 0.7, 2])),
            ("top_p", json!([0.1, 1])),
            ("n", json!([1, 2, 3])),
            ("stop", json!(["a", ["b", "再见"], null])),
            ("stream", json!([true, false])),
            ("seed", json!([0, -1, u64::MAX])),
        ] {
            if self.below(3) == 0 {
                body[field] = self.pick(values.as_array().unwrap()).clone();
            }
        }
        body
    }

    /// A value that may stand nowhere.
    fn absurd(&mut self, depth: usize) -> Value {
        match self.below(if depth > 3 { 11 } else { 14 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.pick(&[0, -1, 1, 2, 100, 1_000_000, i64::MAX, i64::MIN])),
            3 => json!(u64::MAX),
            4 => json!(self.pick(&[1e308, -1e308, 5e-324, 0.5, -0.0, 2_147_483_648.0, 999_999.0])),
            5 => json!(""),
            6 => json!("x".repeat(self.below(3000))),
            7 => json!(self.pick(&[
                "\u{0}",
                "再见🦀",
                "<|turn_end|>",
                "../../etc/passwd",
                "{{ 1/0 }}",
                "\u{202e}\r\nX: y"
            ])),
            8 => json!("1"),
            9 => json!({}),
            10 => json!([]),
            11 => (0..self.below(5)).map(|_| self.absurd(depth + 1)).collect(),
            12 => Value::Object(
                (0..self.below(5))
                    .map(|_| ((*self.pick(&FIELDS)).to_owned(), self.absurd(depth + 1)))
                    .collect::<Map<_, _>>(),
            ),
            _ => {
                let deep = 1 + self.below(100);
                (0..deep).fold(json!(1), |inner, _| json!([inner]))
            }
        }
    }

    /// Puts absurd values at some places of a value.
    fn spoil(&mut self, value: &mut Value) {
        match value {
            Value::Object(map) if !map.is_empty() && self.below(4) != 0 => {
                let at = self.below(map.len());
                let inner = map.values_mut().nth(at).unwrap();
                self.spoil(inner);
            }
            Value::Array(list) if !list.is_empty() && self.below(4) != 0 => {
                let at = self.below(list.len());
                self.spoil(&mut list[at]);
            }
            other => *other = self.absurd(0),
        }
    }

    fn body(&mut self, path: &str) -> Vec<u8> {
        let mut body = self.sound(path);
        for _ in 0..self.below(3) {
            let field = *self.pick(&FIELDS);
            if self.below(6) == 0 {
                body.as_object_mut().unwrap().remove(field);
            } else {
                body[field] = self.absurd(0);
            }
        }
        if self.below(3) == 0 {
            self.spoil(&mut body);
        }
        let mut bytes = body.to_string().into_bytes();
        match self.below(12) {
            // Bytes that are wrong, missing, doubled.
            0 => {
                for _ in 0..=self.below(6) {
                    let at = self.below(bytes.len());
                    bytes[at] = self.0.random();
                }
            }
            1 => bytes.truncate(self.below(bytes.len())),
            2 => {
                let at = self.below(bytes.len());
                let invalid: [&[u8]; 5] = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f", b"\x00"];
                bytes.splice(at..at, self.pick(&invalid).iter().copied());
            }
            3 => {
                let deep = *self.pick(&[127, 128, 129, 10_000]);
                bytes =
                    format!("{{\"metadata\": {}{}, \"prompt\": \"a\"}}", "[".repeat(deep), "]".repeat(deep))
                        .into();
            }
            4 => bytes = vec![b' '; *self.pick(&[0, 1, 70_000])],
            5 => bytes.extend_from_slice(b"{}"),
            _ => {}
        }
        bytes
    }
}

/// Something that is no HTTP request.
async fn garbage(address: SocketAddr, fuzz: &mut Fuzz) {
    let heads: [&[u8]; 9] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
        b"GET /%ff%00/../health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ];
    let mut bytes = fuzz.pick(&heads).to_vec();
    if fuzz.below(5) == 0 {
        bytes = (0..fuzz.below(4000)).map(|_| fuzz.0.random()).collect();
    }
    if fuzz.below(20) == 0 {
        bytes =
            format!("GET /{} HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(fuzz.below(90_000)), "b".repeat(90_000))
                .into();
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(&bytes).await;
    let _ = stream.shutdown().await;
    let mut reply = Vec::new();
    // The other side may close without a word, or with a reset.
    if timely(stream.read_to_end(&mut reply)).await.is_ok() && !reply.is_empty() {
        let line = String::from_utf8_lossy(&reply[..reply.len().min(12)]).into_owned();
        assert!(
            line.starts_with("HTTP/1.") && !line.ends_with("422") && &line[9..10] != "5"
                || line.ends_with("505"),
            "{line}"
        );
    }
}

async fn fuzz(requests: usize, seed: u64) {
    let config = ServerConfig {
        max_body_bytes: 64 << 10,
        header_timeout: Duration::from_secs(2),
        body_timeout: Duration::from_secs(2),
        ..ServerConfig::default()
    };
    let server = Server::model(config, 64, settings()).await;
    let address = server.address();
    let good = chat("a good request", json!({"temperature": 1.0, "seed": 11, "max_tokens": 16}));
    let expected = whole_texts(&server.post(PATHS[0], &good).await.json());
    let mut fuzz = Fuzz(ChaCha8Rng::seed_from_u64(seed));
    let mut seen = std::collections::BTreeMap::<u16, usize>::new();
    for i in 0..requests {
        if fuzz.below(12) == 0 {
            garbage(address, &mut fuzz).await;
        } else {
            let path = *fuzz.pick(&PATHS);
            let body = fuzz.body(path);
            let kind = if fuzz.below(16) == 0 { "text/plain" } else { "application/json" };
            let reply = request(address, "POST", path, &[("Content-Type", kind)], &body).await;
            let shown = || format!("request {i} of seed {seed}, {path}: {}", String::from_utf8_lossy(&body));
            assert!(EXPECTED.contains(&reply.status), "{} for {}", reply.status, shown());
            if reply.status == 200 {
                if reply.header("content-type") == Some("application/json") {
                    reply.json();
                } else {
                    reply.chunks();
                }
            } else {
                reply.error(reply.status);
            }
            *seen.entry(reply.status).or_default() += 1;
        }
        if i % 20 == 0 {
            let texts = whole_texts(&server.post(PATHS[0], &good).await.json());
            assert_eq!(texts, expected, "after request {i} of seed {seed}");
        }
    }
    println!("{seen:?}");
    // A fuzzer that is refused at the door tests nothing behind it.
    assert!(seen.get(&200).is_some_and(|n| n * 20 > requests), "{seen:?}");
    assert_eq!(server.get("/health").await.status, 200);
    until("nothing runs", || server.handle.stats().engine.running == 0).await;
    let stats = server.handle.stats();
    assert_eq!((stats.queued, stats.failed_total), (0, 0));
    server.end().await;
}

#[tokio::test]
async fn five_hundred_requests() {
    fuzz(500, 1).await;
}

#[tokio::test]
#[ignore = "long"]
async fn ten_thousand_requests() {
    fuzz(10_000, 2).await;
}
