//! A conversation that stays within the model's context.

use nics_core::template::Message;
use nics_core::{Error, Result};

use crate::prompt::Prompter;

/// A conversation in turns.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// What the model is told about its role; `None` leaves it to the template.
    pub system: Option<String>,
    /// User and assistant in turn.
    pub turns: Vec<Message>,
}

impl Conversation {
    /// All messages, the system turn first.
    pub fn messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|s| Message::new("system", s));
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Adds what the user says.
    pub fn user(&mut self, text: impl Into<String>) {
        self.turns.push(Message::new("user", text));
    }

    /// Adds what the model said.
    pub fn assistant(&mut self, text: impl Into<String>) {
        self.turns.push(Message::new("assistant", text));
    }

    /// Token ids of the conversation up to the next reply, at most `room` of them: the oldest exchanges are forgotten
    /// until it fits. Gives the ids and the number of messages forgotten.
    ///
    /// # Errors
    /// `Error::ContextOverflow` when the last message does not fit even alone.
    pub fn prompt(&mut self, prompter: &Prompter, room: usize) -> Result<(Vec<u32>, usize)> {
        let before = self.turns.len();
        loop {
            let ids = prompter.encode(&self.messages(), true)?;
            if ids.len() <= room {
                return Ok((ids, before - self.turns.len()));
            }
            // Forget up to the next user turn, never the last one.
            let next = self.turns.iter().skip(1).position(|m| m.role == "user").map(|i| i + 1);
            match next {
                Some(next) => drop(self.turns.drain(..next)),
                None => {
                    return Err(Error::ContextOverflow {
                        need: ids.len(),
                        max: room,
                        what: "what the context leaves for the prompt",
                    });
                }
            }
        }
    }
}
