//! What a user says, line by line: from a terminal with history, or from a pipe.

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// What one line says.
pub enum Said {
    Message(String),
    Nothing,
    End,
}

/// Lines of a terminal (with history) or of a pipe.
pub enum Lines {
    Terminal(Box<DefaultEditor>),
    Pipe(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    pub fn new(interactive: bool) -> Result<Self> {
        Ok(if interactive {
            Self::Terminal(Box::new(DefaultEditor::new()?))
        } else {
            Self::Pipe(std::io::stdin().lines())
        })
    }

    pub fn next(&mut self) -> Result<Said> {
        let line = match self {
            Self::Pipe(lines) => match lines.next() {
                None => return Ok(Said::End),
                Some(line) => line.context("cannot read standard input")?,
            },
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    line
                }
                Err(ReadlineError::Interrupted) => return Ok(Said::Nothing),
                Err(ReadlineError::Eof) => return Ok(Said::End),
                Err(e) => return Err(e.into()),
            },
        };
        let line = line.trim();
        Ok(if line.is_empty() { Said::Nothing } else { Said::Message(line.to_owned()) })
    }
}
