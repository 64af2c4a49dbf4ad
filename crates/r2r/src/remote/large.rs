//! A large model on a server, as the decoder sees it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nics_core::sampling::Sampling;
use nics_core::tokenizer::Tokenizer;

use super::client::Client;
use super::handshake::{ServerFacts, greet, try_out};
use super::pool::{Done, Pool, Task};
use super::protocol::{Ask, Protocol};
use super::settings::RemoteSettings;
use super::spec::Engine;
use crate::decode::{
    Answer, LargeModel, LargeRequest, LargeToken, ReadAhead, Traffic, check_sampling, seed_at,
};
use crate::policy::Sequence;
use crate::{Error, Result};

struct Open {
    sampling: Sampling,
    vocab: usize,
    gone: Arc<AtomicBool>,
    /// Tokens that the server has been sent in calls that succeeded.
    sent: usize,
    /// What it waits for: its length and what was seen of it.
    asked: Option<(usize, usize)>,
    /// Calls under way that read ahead.
    warming: usize,
    /// What it asks when they are back: the server would read the same twice.
    held: Option<Ask>,
}

/// A large model on a server: calls are made by threads of its own.
pub struct RemoteLarge {
    pool: Pool,
    facts: ServerFacts,
    read_ahead: ReadAhead,
    vocab: usize,
    context: usize,
    open: HashMap<Sequence, Open>,
}

impl RemoteLarge {
    /// Greets a server: its model, its tokenizer against the small model's, one token to see whether ids come back.
    /// `vocab` and `context` are the small model's; where the server says nothing about its context, that one counts.
    ///
    /// # Errors
    /// A server that cannot be reached, has no such model, or another tokenizer; senseless settings.
    pub fn connect(
        engine: Engine,
        url: &str,
        settings: RemoteSettings,
        tokenizer: &Tokenizer,
        vocab: usize,
        context: usize,
    ) -> Result<Self> {
        settings.validate()?;
        let client = Client::new(url, &settings);
        let facts = greet(&client, engine, &settings, tokenizer)?;
        let protocol = Protocol::new(engine, facts.model.clone(), settings.cache_salt.clone());
        let highest = tokenizer.vocab_size().min(vocab).saturating_sub(1);
        try_out(&client, &protocol, &settings, highest as u32)?;
        let (read_ahead, given) = (settings.read_ahead, settings.context);
        let context = match (given, facts.context) {
            (Some(given), Some(server)) if given > server => {
                let expected = format!("at most the {server} tokens of {url}");
                return Err(Error::setting("the large model's context", given, expected));
            }
            (given, server) => given.or(server).unwrap_or(context),
        };
        let pool = Pool::new(client, protocol, settings)?;
        Ok(Self { pool, facts, read_ahead, vocab, context, open: HashMap::new() })
    }

    /// What the server says of itself.
    pub fn facts(&self) -> &ServerFacts {
        &self.facts
    }

    fn get(&mut self, sequence: Sequence) -> Result<&mut Open> {
        self.open.get_mut(&sequence).ok_or_else(|| {
            Error::Input(format!("sequence {} was not opened with the large model", sequence.0))
        })
    }

    /// Counts results in; answers that somebody waits for come out.
    fn take(&mut self, done: Done) -> Vec<Answer> {
        match done {
            Done::Answers(answers) => answers
                .into_iter()
                .filter_map(|(sequence, result)| {
                    let open = self.open.get_mut(&sequence)?;
                    let (len, seen) = open.asked.take()?;
                    let answer = result.map(|chosen| {
                        open.sent = open.sent.max(len);
                        let cached = chosen.cached.map_or(seen, |n| n.min(len));
                        LargeToken { token: chosen.token, cached, read: len - cached }
                    });
                    Some((sequence, answer))
                })
                .collect(),
            Done::Warmed { sequence, read } => {
                let Some(open) = self.open.get_mut(&sequence) else { return Vec::new() };
                open.warming = open.warming.saturating_sub(1);
                open.sent = open.sent.max(read.unwrap_or(0));
                if open.warming == 0
                    && let Some(ask) = open.held.take()
                {
                    let task = open.task(sequence, ask);
                    self.pool.ask(vec![task]);
                }
                Vec::new()
            }
        }
    }
}

impl Open {
    fn ask(&self, ids: &[u32]) -> Ask {
        let sampling = Sampling { seed: seed_at(self.sampling.seed, ids.len()), ..self.sampling.clone() };
        Ask { ids: ids.to_vec(), sampling, banned: Vec::new() }
    }

    fn task(&self, sequence: Sequence, ask: Ask) -> Task {
        let (sent, vocab) = (self.sent, self.vocab);
        Task { sequence, ask, sent, vocab, gone: Arc::clone(&self.gone) }
    }
}

impl LargeModel for RemoteLarge {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn read_ahead(&self) -> ReadAhead {
        self.read_ahead
    }

    fn open(
        &mut self,
        sequence: Sequence,
        _max_tokens: usize,
        sampling: &Sampling,
        vocab: usize,
    ) -> Result<()> {
        if self.open.contains_key(&sequence) {
            return Err(Error::Input(format!("sequence {} is open already", sequence.0)));
        }
        check_sampling(sampling)?;
        let open = Open {
            sampling: sampling.clone(),
            vocab,
            gone: Arc::default(),
            sent: 0,
            asked: None,
            warming: 0,
            held: None,
        };
        self.open.insert(sequence, open);
        Ok(())
    }

    fn warm(&mut self, request: &LargeRequest) {
        let Ok(open) = self.get(request.sequence) else { return };
        open.warming += 1;
        let task = open.task(request.sequence, open.ask(request.ids));
        self.pool.warm(task);
    }

    fn ask(&mut self, requests: &[LargeRequest]) -> Result<()> {
        for request in requests {
            let open = self.get(request.sequence)?;
            if open.asked.is_some() {
                return Err(Error::Input(format!("sequence {} is waiting already", request.sequence.0)));
            }
        }
        let mut tasks = Vec::new();
        for request in requests {
            // What has not begun yet would only be in the way.
            let withdrawn = self.pool.withdraw(request.sequence);
            let open = self.get(request.sequence)?;
            open.warming -= withdrawn.min(open.warming);
            open.asked = Some((request.ids.len(), request.seen));
            let ask = open.ask(request.ids);
            if open.warming > 0 {
                open.held = Some(ask);
            } else {
                tasks.push(open.task(request.sequence, ask));
            }
        }
        self.pool.ask(tasks);
        Ok(())
    }

    fn answers(&mut self, wait: Duration) -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        let deadline = Instant::now() + wait;
        loop {
            // Once there is an answer, only what is there already.
            let until = if answers.is_empty() { deadline } else { Instant::now() };
            match self.pool.next(until)? {
                Some(done) => answers.extend(self.take(done)),
                None => return Ok(answers),
            }
        }
    }

    fn close(&mut self, sequence: Sequence) {
        if let Some(open) = self.open.remove(&sequence) {
            open.gone.store(true, Ordering::Relaxed);
        }
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(self.pool.traffic())
    }
}
