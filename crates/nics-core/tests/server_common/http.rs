//! A plain HTTP client: one request a connection.

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::timely;

/// An HTTP response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The data of a stream's events; comments are left out.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"), "{self:?}");
        let blocks = self.text().strip_suffix("\n\n").unwrap().split("\n\n");
        let data = |b: &str| b.strip_prefix("data: ").map(str::to_owned);
        blocks.filter(|b| !b.starts_with(':')).map(|b| data(b).unwrap_or_else(|| panic!("{b}"))).collect()
    }

    /// The chunks of a stream that ends well.
    pub fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    /// Holds it to be an error in OpenAI's form, and gives `(param, code)`.
    pub fn error(&self, status: u16) -> (Option<String>, Option<String>) {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{json}");
        assert!(error["type"].is_string());
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (text("param"), text("code"))
    }
}

/// The head of a request.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if !headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("content-type")) {
        head += "Content-Type: application/json\r\n";
    }
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    format!("{head}Content-Length: {length}\r\n\r\n").into_bytes()
}

/// One request on a connection of its own.
pub async fn request(
    address: std::net::SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut bytes = head(method, path, headers, body.len());
    bytes.extend_from_slice(body);
    // A refused body may find the other side closed.
    let _ = stream.write_all(&bytes).await;
    read_reply(&mut stream).await
}

/// Reads up to the connection's end.
pub async fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    timely(stream.read_to_end(&mut bytes)).await.unwrap();
    parse(&bytes)
}

pub fn parse(bytes: &[u8]) -> Reply {
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no HTTP response: {:?}", String::from_utf8_lossy(bytes)));
    let head = std::str::from_utf8(&bytes[..at]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .map(|l| l.split_once(": ").unwrap())
        .map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()))
        .collect();
    let mut rest = &bytes[at + 4..];
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let mut body = if chunked { Vec::new() } else { std::mem::take(&mut rest).to_vec() };
    while !rest.is_empty() || (chunked && body.is_empty()) {
        let at = rest.windows(2).position(|w| w == b"\r\n").expect("the chunks break off");
        let n = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
        body.extend_from_slice(&rest[at + 2..at + 2 + n]);
        rest = &rest[at + 4 + n..];
        if n == 0 {
            assert!(rest.is_empty(), "something follows the last chunk");
            return Reply { status, headers, body };
        }
    }
    assert!(!chunked, "the last chunk is missing");
    Reply { status, headers, body }
}
