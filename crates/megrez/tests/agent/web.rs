//! A small HTTP server on the loopback address whose answers are written by the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub path: String,
    pub head: String,
    pub body: String,
}

/// What to answer.
pub enum Reply {
    /// Status, content type, body.
    Page(u16, &'static str, String),
    /// Status 302 to here.
    Redirect(String),
    /// Nothing for so long, then an empty page.
    Late(Duration),
    /// This piece of text over and over, until the reader goes.
    Endless(&'static str),
}

impl Reply {
    pub fn html(body: impl Into<String>) -> Self {
        Self::Page(200, "text/html; charset=utf-8", body.into())
    }

    pub fn json(body: &serde_json::Value) -> Self {
        Self::Page(200, "application/json", body.to_string())
    }
}

/// A server; its thread ends with the process.
pub struct Web {
    pub port: u16,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Web {
    pub fn new(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, answer) = (asked.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                // A reader that goes away in the middle is what some tests are about.
                thread::spawn(move || drop(serve(stream, &log, &*answer)));
            }
        });
        Self { port, asked }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(
    stream: TcpStream,
    log: &Mutex<Vec<Asked>>,
    answer: &dyn Fn(&Asked) -> Reply,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    loop {
        let start = head.len();
        if reader.read_line(&mut head)? == 0 || head[start..].trim().is_empty() {
            break;
        }
    }
    let length = head
        .lines()
        .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let asked = Asked { path, head, body: String::from_utf8_lossy(&body).into_owned() };
    log.lock().unwrap().push(asked.clone());
    let mut out = stream;
    match answer(&asked) {
        Reply::Page(status, kind, body) => {
            write!(
                out,
                "HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
        }
        Reply::Redirect(to) => {
            write!(out, "HTTP/1.1 302 X\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
        Reply::Late(wait) => {
            thread::sleep(wait);
            write!(out, "HTTP/1.1 200 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
        Reply::Endless(piece) => {
            write!(out, "HTTP/1.1 200 X\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n")?;
            let block = piece.repeat((64 << 10) / piece.len());
            loop {
                out.write_all(block.as_bytes())?;
            }
        }
    }
}
