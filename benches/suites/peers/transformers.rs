//! transformers, in a Python process that takes commands and answers them as lines of JSON (`python/decode_peer.py`).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::Kind;

use super::{Past, Peer};

/// The model.
pub struct Transformers {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// Where logits are handed over.
    logits: tempfile::NamedTempFile,
}

impl Transformers {
    /// Starts `python` with a checkpoint's folder.
    ///
    /// # Errors
    /// A Python that does not start or lacks torch or transformers.
    pub fn start(python: &Path, folder: &Path, kind: Kind, threads: usize) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/decode_peer.py");
        let mut child = Command::new(python)
            .arg(&script)
            .arg(folder)
            .arg(if kind == Kind::Float { "float32" } else { "bfloat16" })
            .arg(threads.to_string())
            .env("OMP_NUM_THREADS", threads.to_string())
            // A Python brings the libtorch of its own wheel.
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}; NICS_PYTHON names it", python.display()))?;
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut peer = Self { child, commands, answers, logits: tempfile::NamedTempFile::new()? };
        let hello = peer.answer().context(
            "the Python that NICS_PYTHON names does not serve as a peer; it needs torch, transformers and safetensors",
        )?;
        eprintln!("transformers {} with torch {}", text(&hello["transformers"]), text(&hello["torch"]));
        Ok(peer)
    }

    fn ask(&mut self, command: &Value) -> Result<Value> {
        let commands = self.commands.as_mut().context("closed")?;
        writeln!(commands, "{command}").context("transformers' process has ended")?;
        commands.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("transformers' process has ended; what it wrote is above");
        }
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("transformers answers {line:?}"))?;
        match answer.get("error") {
            Some(error) => bail!("transformers: {}", text(error)),
            None => Ok(answer),
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

impl Peer for Transformers {
    fn name(&self) -> &'static str {
        "transformers"
    }

    fn begin(&mut self, batch: usize, past: &Past, _room: usize) -> Result<()> {
        if !past.ids.is_empty() && past.file.is_none() {
            bail!("the past was not written to a file");
        }
        self.ask(&json!({"do": "begin", "batch": batch, "past": past.file}))?;
        Ok(())
    }

    fn call(&mut self, ids: &[i64]) -> Result<f64> {
        let answer = self.ask(&json!({"do": "call", "ids": ids}))?;
        answer["seconds"].as_f64().with_context(|| format!("transformers answers {answer}"))
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let path = self.logits.path().to_owned();
        self.ask(&json!({"do": "logits", "file": path}))?;
        let bytes = std::fs::read(&path)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

impl Drop for Transformers {
    fn drop(&mut self) {
        // It ends with its commands.
        self.commands = None;
        let _ = self.child.wait();
    }
}
