//! A Megrez of this process.

use nics_core::Error;
use nics_core::generate::{Generator, Prompt, Request, run};
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use nics_core::template::Message;
use nics_core::tokenizer::{DecodeStream, Tokenizer};
use serde_json::{Map, Value};

use super::{Ask, TalkError, Talker};
use crate::Megrez;
use crate::prompt::Prompter;
use crate::tools::{self, FUNCTION_END, FUNCTION_START};

/// A Megrez with its cache.
pub struct LocalTalker {
    megrez: Megrez,
    cache: Box<dyn KvCache>,
    /// Announces tools.
    sentence: String,
}

impl LocalTalker {
    /// A talker that announces tools by `sentence`.
    pub fn new(megrez: Megrez, cache: Box<dyn KvCache>, sentence: impl Into<String>) -> Self {
        Self { megrez, cache, sentence: sentence.into() }
    }

    fn request(&self, ask: &Ask) -> Result<Request, Error> {
        let prompt =
            tools::encode(&self.megrez.prompter, &self.sentence, &ask.messages, &ask.tools, &Map::new())?;
        self.megrez.check_prompt(&prompt)?;
        let sampling = Sampling { temperature: ask.temperature, seed: ask.seed, ..Sampling::default() };
        let eos = self.megrez.eos.clone();
        Ok(Request { prompt: Prompt::Ids(prompt), sampling, max_new_tokens: ask.max_tokens.max(1), eos })
    }
}

impl Talker for LocalTalker {
    fn context(&self) -> Option<usize> {
        Some(self.megrez.decoder.dims().context)
    }

    fn count(&self, messages: &[Message], tools: &[Value]) -> Result<usize, TalkError> {
        count(&self.megrez.prompter, &self.sentence, messages, tools)
    }

    fn shorten(&self, text: &str, tokens: usize) -> Result<String, TalkError> {
        shorten(&self.megrez.prompter.tokenizer, text, tokens)
    }

    fn reply(&mut self, ask: &Ask, each: &mut dyn FnMut(&str) -> bool) -> Result<(), TalkError> {
        let request = self.request(ask)?;
        let mut stream = Pieces::new(&self.megrez.prompter.tokenizer);
        let mut generator = Generator::new(&self.megrez.decoder, &mut *self.cache);
        let mut wanted = true;
        run(&mut generator, [request], 1, &mut |_, token| {
            let piece = stream.push(token.token)?;
            if !piece.is_empty() {
                wanted = each(&piece);
            }
            Ok(wanted)
        })?;
        let rest = stream.finish()?;
        if wanted && !rest.is_empty() {
            each(&rest);
        }
        Ok(())
    }

    fn replies(&mut self, asks: &[Ask]) -> Vec<Result<String, TalkError>> {
        // A request that cannot be made fails alone.
        let requests: Vec<Result<Request, Error>> = asks.iter().map(|ask| self.request(ask)).collect();
        let good: Vec<usize> = (0..asks.len()).filter(|&i| requests[i].is_ok()).collect();
        let mut texts: Vec<Result<String, TalkError>> = requests.iter().map(|_| Ok(String::new())).collect();
        let tokenizer = &self.megrez.prompter.tokenizer;
        let mut streams: Vec<Pieces> = good.iter().map(|_| Pieces::new(tokenizer)).collect();
        let mut written: Vec<String> = good.iter().map(|_| String::new()).collect();
        let mut generator = Generator::new(&self.megrez.decoder, &mut *self.cache);
        let mut failed = None;
        let (mut ready, mut bad) = (Vec::new(), Vec::new());
        for (i, request) in requests.into_iter().enumerate() {
            match request {
                Ok(request) => ready.push(request),
                Err(e) => bad.push((i, e)),
            }
        }
        let batch = ready.len();
        if let Err(e) = run(&mut generator, ready, batch, &mut |n, token| {
            written[n] += &streams[n].push(token.token)?;
            Ok(true)
        }) {
            failed = Some(e.to_string());
        }
        for ((&i, stream), text) in good.iter().zip(&mut streams).zip(written) {
            texts[i] = match (&failed, stream.finish()) {
                (Some(e), _) => Err(Error::Input(e.clone()).into()),
                (None, Ok(rest)) => Ok(text + &rest),
                (None, Err(e)) => Err(e.into()),
            };
        }
        for (i, e) in bad {
            texts[i] = Err(e.into());
        }
        texts
    }
}

/// Text of tokens as they come; of the special ones only the marks of calls.
struct Pieces<'a> {
    stream: DecodeStream<'a>,
    marks: [(Option<u32>, &'static str); 2],
}

impl<'a> Pieces<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        let mark = |token| (tokenizer.token_id(token), token);
        Self { stream: tokenizer.decode_stream(true), marks: [mark(FUNCTION_START), mark(FUNCTION_END)] }
    }

    fn push(&mut self, token: u32) -> Result<String, Error> {
        match self.marks.iter().find(|(id, _)| *id == Some(token)) {
            Some((_, mark)) => Ok(self.stream.finish()? + mark),
            None => Ok(self.stream.push(token)?),
        }
    }

    fn finish(&mut self) -> Result<String, Error> {
        Ok(self.stream.finish()?)
    }
}

/// Tokens of a conversation up to where the reply begins.
pub(super) fn count(
    prompter: &Prompter,
    sentence: &str,
    messages: &[Message],
    tools: &[Value],
) -> Result<usize, TalkError> {
    Ok(tools::encode(prompter, sentence, messages, tools, &Map::new())?.len())
}

/// The first `tokens` tokens of a text, without a broken character at the end.
pub(super) fn shorten(tokenizer: &Tokenizer, text: &str, tokens: usize) -> Result<String, TalkError> {
    // No token is shorter than a byte, so a text of so few bytes needs no tokenizer.
    if text.len() <= tokens {
        return Ok(text.to_owned());
    }
    // And none of ours is longer than some bytes: what is far behind is not looked at.
    let far = text.char_indices().nth(tokens.saturating_mul(32)).map_or(text.len(), |(at, _)| at);
    let mut ids = tokenizer.encode_ordinary(&text[..far]).map_err(Error::from)?;
    if far == text.len() && ids.len() <= tokens {
        return Ok(text.to_owned());
    }
    ids.truncate(tokens);
    let cut = tokenizer.decode(&ids, false).map_err(Error::from)?;
    Ok(cut.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned())
}
