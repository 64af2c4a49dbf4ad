//! A client that streams a completion, as small as can be: what is measured is the server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::front::MODEL;

/// The text of a greedy reply of `tokens` tokens.
pub fn complete(address: SocketAddr, prompt: &[u32], tokens: usize) -> Result<String> {
    let body = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true}
    })
    .to_string();
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(300)))?;
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut reader = BufReader::new(stream);
    let mut status = String::new();
    reader.read_line(&mut status)?;
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            bail!("the reply breaks off in its head");
        }
    }
    if !status.contains(" 200 ") {
        let mut rest = String::new();
        let _ = reader.read_to_string(&mut rest);
        bail!("{}: {rest}", status.trim());
    }
    let (mut text, mut written) = (String::new(), None);
    let mut events = Vec::new();
    while let Some(chunk) = chunk(&mut reader)? {
        events.extend_from_slice(&chunk);
        // Events end in an empty line; a chunk may end anywhere.
        while let Some(end) = events.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = events.drain(..end + 2).collect();
            let event = String::from_utf8(event)?;
            let Some(data) = event.trim().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                if written != Some(tokens as u64) {
                    bail!("the server wrote {written:?} tokens, expected {tokens}");
                }
                return Ok(text);
            }
            let data: Value = serde_json::from_str(data)?;
            if let Some(error) = data.get("error") {
                bail!("the server failed: {error}");
            }
            text.push_str(data["choices"][0]["text"].as_str().unwrap_or_default());
            written = data["usage"]["completion_tokens"].as_u64().or(written);
        }
    }
    bail!("the stream ended without [DONE]")
}

/// The next chunk of a chunked body; `None` behind the last.
fn chunk(reader: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut size = String::new();
    reader.read_line(&mut size)?;
    let size = size.trim().split(';').next().unwrap_or_default();
    let size = usize::from_str_radix(size, 16).with_context(|| format!("{size:?} is no size of a chunk"))?;
    if size == 0 {
        return Ok(None);
    }
    let mut data = vec![0; size + 2];
    reader.read_exact(&mut data)?;
    data.truncate(size);
    Ok(Some(data))
}
