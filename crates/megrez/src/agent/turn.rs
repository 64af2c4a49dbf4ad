//! One turn of the agent: from what the user says to an answer with sources.

use nics_core::template::Message;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use super::call::{Action, FUNCTION_END, FUNCTION_START, Splitter, action};
use super::citation::{clamp, extract, link};
use super::event::{AgentError, Answer, Event, Settings, Source};
use super::history::truncate;
use super::rechunk::Rechunker;
use super::search::{Hit, SearchProvider};
use super::talker::{Ask, TalkError, Talker};
use crate::prompts::{Prompts, fill};

/// The name of the tool.
pub const SEARCH_TOOL: &str = "googleWebSearch";

/// A conversation with a model that may search.
pub struct WebSearchAgent<T> {
    talker: T,
    provider: Option<Box<dyn SearchProvider>>,
    prompts: Prompts,
    settings: Settings,
    history: Vec<Message>,
}

impl<T: Talker> WebSearchAgent<T> {
    /// A conversation's begin; without a provider the model is offered no tool.
    pub fn new(
        talker: T,
        provider: Option<Box<dyn SearchProvider>>,
        prompts: Prompts,
        settings: Settings,
    ) -> Self {
        Self { talker, provider, prompts, settings, history: Vec::new() }
    }

    /// Forgets the conversation.
    pub fn reset(&mut self) {
        self.history.clear();
    }

    /// What was said: users' questions and answers without citations.
    pub fn history(&self) -> &[Message] {
        &self.history
    }

    /// Answers what the user says. Events go to `emit`, which says whether to go on.
    ///
    /// # Errors
    /// When the model fails or `emit` asks to stop; the turn is then not part of the conversation.
    pub fn turn(
        &mut self,
        question: &str,
        emit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Answer, AgentError> {
        let tools = self.tools();
        let system = self.system();
        let mut said = self.history.clone();
        said.push(Message::new("user", question));
        let talker = &self.talker;
        let whole = |turns: &[Message]| [std::slice::from_ref(&system), turns].concat();
        let mut count = |turns: &[Message]| talker.count(&whole(turns), &tools);
        let said = truncate(&said, self.settings.window, self.settings.max_input_tokens, &mut count)?;
        let mut messages = whole(&said);

        let mut answer = Answer::default();
        let output = self.reply(&messages, &tools, &mut answer, emit)?;
        let registered: Vec<&str> = if tools.is_empty() { vec![] } else { vec![SEARCH_TOOL] };
        let mut reason = String::new();
        let (name, arguments, observation) = match action(&output, &registered) {
            Action::Nothing => (String::new(), Value::Null, None),
            Action::Unknown { name, arguments } => {
                let text = fill(&self.prompts.unknown_tool, &[("name", &name)]);
                tell(emit, Event::Call { name: name.clone(), arguments: arguments.clone() })?;
                (name, arguments, Some(text))
            }
            Action::Call { name, arguments } => {
                match arguments["query"].as_str().map(str::trim).filter(|q| !q.is_empty()) {
                    None => (name, arguments, None),
                    Some(query) => {
                        let query = query.to_owned();
                        tell(emit, Event::Call { name: name.clone(), arguments: arguments.clone() })?;
                        answer.sources = match self.look_up(question, &query, emit)? {
                            Ok(sources) => sources,
                            Err(why) => {
                                tell(emit, Event::Failed { reason: why.clone() })?;
                                reason = why;
                                Vec::new()
                            }
                        };
                        let text = self.observe(question, &query, &reason, &answer.sources);
                        (name, arguments, Some(text))
                    }
                }
            }
        };
        if let Some(mut observation) = observation {
            let before = answer.text.clone();
            let call = json!([{
                "id": "call_0",
                "type": "function",
                "function": { "name": name, "arguments": arguments.to_string() },
            }]);
            messages.push(Message::new("assistant", before).with("tool_calls", call));
            loop {
                let observed = Message::new("tool", &observation).with("tool_call_id", "call_0");
                messages.push(observed);
                if self.fits(&messages, &tools)? {
                    break;
                }
                messages.pop();
                // Older turns go first, then the summaries become shorter.
                if messages.len() > 3 {
                    messages.drain(1..messages.len() - 2);
                } else if !shorten_all(&mut answer.sources) {
                    // The talker says what does not fit.
                    messages.push(Message::new("tool", &observation).with("tool_call_id", "call_0"));
                    break;
                } else if let Some(query) = arguments["query"].as_str() {
                    observation = self.observe(question, query, &reason, &answer.sources);
                }
            }
            self.reply(&messages, &tools, &mut answer, emit)?;
        }

        for number in extract(&answer.text) {
            if let Some(n) = clamp(&number, answer.sources.len())
                && !answer.cited.contains(&n)
            {
                answer.cited.push(n);
            }
        }
        self.history.push(Message::new("user", question));
        // A later turn has other sources: the numbers of this one would mislead it.
        self.history.push(Message::new("assistant", link(&answer.text, 0, |_| String::new())));
        emit(Event::Answer(answer.clone()));
        Ok(answer)
    }

    /// The tools of a request.
    fn tools(&self) -> Vec<Value> {
        if self.provider.is_none() {
            return Vec::new();
        }
        vec![json!({
            "type": "function",
            "function": {
                "name": SEARCH_TOOL,
                "description": self.prompts.search_description,
                "parameters": {
                    "type": "object",
                    "properties": {
                        "query": { "type": "string", "description": self.prompts.search_query },
                    },
                    "required": ["query"],
                },
            },
        })]
    }

    /// Role and date; the tools follow where the conversation is rendered.
    fn system(&self) -> Message {
        let now = self.settings.now.unwrap_or_else(|| {
            // The local offset cannot always be told safely in a process with threads; UTC is the usual way out.
            OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc())
        });
        let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
        let datetime = now.format(form).unwrap_or_default();
        let weekday = now.weekday().to_string();
        let date = fill(&self.prompts.date, &[("datetime", &datetime), ("weekday", &weekday)]);
        Message::new("system", format!("{}\n{date}", self.prompts.role))
    }

    /// Streams a reply, adds its text to the answer, and gives the output with its call.
    fn reply(
        &mut self,
        messages: &[Message],
        tools: &[Value],
        answer: &mut Answer,
        emit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<String, AgentError> {
        let (temperature, most) = self.limits(tools);
        let max_tokens = match self.talker.context() {
            None => most,
            Some(context) => most.min(context.saturating_sub(self.talker.count(messages, tools)?)).max(1),
        };
        let ask = Ask {
            messages: messages.to_vec(),
            tools: tools.to_vec(),
            temperature,
            max_tokens,
            seed: self.settings.seed.wrapping_add(answer.replies as u64),
        };
        answer.replies += 1;
        let mut splitter = Splitter::default();
        let mut stream = Rechunker::default();
        let mut wanted = true;
        let text = &mut answer.text;
        let mut show = |piece: Option<String>| match piece {
            None => true,
            Some(piece) => {
                text.push_str(&piece);
                emit(Event::Text { text: piece })
            }
        };
        self.talker.reply(&ask, &mut |output| {
            let piece = splitter.push(output);
            wanted = show(stream.push(&piece));
            wanted && !splitter.ended()
        })?;
        let rest = splitter.finish();
        wanted = wanted && show(stream.push(&rest)) && show(stream.finish());
        if !wanted {
            return Err(AgentError::Stopped);
        }
        let call = splitter.call().map(|call| format!("{FUNCTION_START}{call}{FUNCTION_END}"));
        Ok(call.unwrap_or_default())
    }

    fn limits(&self, tools: &[Value]) -> (f32, usize) {
        if tools.is_empty() {
            (self.settings.plain_temperature, self.settings.plain_reply_tokens)
        } else {
            (self.settings.search_temperature, self.settings.search_reply_tokens)
        }
    }

    /// Whether a conversation leaves room for a reply.
    fn fits(&self, messages: &[Message], tools: &[Value]) -> Result<bool, TalkError> {
        let Some(context) = self.talker.context() else { return Ok(true) };
        let reply = self.limits(tools).1.min(context / 4);
        Ok(self.talker.count(messages, tools)? + reply <= context)
    }

    /// Searches and summarises: sources, at least one, or why there is none.
    fn look_up(
        &mut self,
        question: &str,
        query: &str,
        emit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Result<Vec<Source>, String>, AgentError> {
        let Some(provider) = &self.provider else { return Ok(Err("there is no search".into())) };
        let hits = match provider.search(query, self.settings.results) {
            Ok(hits) if hits.is_empty() => return Ok(Err(format!("{} has no result", provider.name()))),
            Ok(hits) => hits,
            Err(e) => return Ok(Err(e.to_string())),
        };
        let mut pages: Vec<(Hit, String)> = Vec::new();
        let mut reasons: Vec<String> = Vec::new();
        for hit in hits {
            let (error, text) = match &hit.page {
                Ok(text) => (None, Some(text.clone())),
                Err(e) => {
                    let snippet = (self.settings.snippets && !hit.snippet.is_empty()).then_some(&hit.snippet);
                    (Some(e.to_string()), snippet.cloned())
                }
            };
            reasons.extend(error.iter().filter(|e| !reasons.contains(e)).cloned().collect::<Vec<_>>());
            tell(emit, Event::Result { title: hit.title.clone(), url: hit.url.clone(), error })?;
            pages.extend(text.map(|text| (hit, text)));
        }
        if pages.is_empty() {
            return Ok(Err(format!("no page could be read ({})", reasons.join("; "))));
        }
        let sources = self.summarise(question, pages)?;
        for source in &sources {
            tell(emit, Event::Summary(source.clone()))?;
        }
        Ok(if sources.is_empty() { Err("no page could be summarised".into()) } else { Ok(sources) })
    }

    /// Summaries of pages for a question; a page whose summary fails or is empty is left out.
    fn summarise(&mut self, question: &str, pages: Vec<(Hit, String)>) -> Result<Vec<Source>, AgentError> {
        let ask_for = |title: &str, page: &str| {
            let values = [("question", question), ("title", title), ("page", page)];
            vec![
                Message::new("system", &self.prompts.summary_system),
                Message::new("user", fill(&self.prompts.summary_user, &values)),
            ]
        };
        let mut asks = Vec::new();
        for (hit, page) in &pages {
            let (mut tokens, mut reply) = (self.settings.page_tokens, self.settings.summary_tokens);
            if let Some(context) = self.talker.context() {
                reply = reply.min(context / 4).max(1);
                let around = self.talker.count(&ask_for(&hit.title, ""), &[])?;
                tokens = tokens.min(context.saturating_sub(around + reply));
            }
            let page = self.talker.shorten(page, tokens)?;
            asks.push(Ask {
                messages: ask_for(&hit.title, &page),
                tools: Vec::new(),
                temperature: self.settings.search_temperature,
                max_tokens: reply,
                seed: self.settings.seed,
            });
        }
        let summaries = self.talker.replies(&asks);
        let mut sources = Vec::new();
        for ((hit, _), summary) in pages.into_iter().zip(summaries) {
            match summary {
                Ok(summary) if !summary.trim().is_empty() => sources.push(Source {
                    number: sources.len() + 1,
                    title: hit.title,
                    url: hit.url,
                    summary: summary.trim().to_owned(),
                }),
                Ok(_) => tracing::info!("the summary of {} is empty", hit.url),
                Err(e) => tracing::warn!("no summary of {}: {e}", hit.url),
            }
        }
        Ok(sources)
    }

    /// What the model sees of a search, or of why it gave nothing.
    fn observe(&self, question: &str, query: &str, reason: &str, sources: &[Source]) -> String {
        if sources.is_empty() {
            let values = [("keywords", query), ("reason", reason)];
            return fill(&self.prompts.failed, &values);
        }
        let blocks: Vec<String> =
            sources.iter().map(|s| format!("[[citation:{}]]\n{}", s.number, s.summary)).collect();
        let citations = blocks.join("\n\n");
        let values = [("question", question), ("keywords", query), ("citations", citations.as_str())];
        fill(&self.prompts.observation, &values)
    }
}

/// Halves every summary; `false` when there is nothing left to halve.
fn shorten_all(sources: &mut [Source]) -> bool {
    let long = sources.iter().any(|s| s.summary.chars().count() > 16);
    for source in sources {
        let half = source.summary.chars().count().div_ceil(2);
        source.summary = source.summary.chars().take(half).collect();
    }
    long
}

fn tell(emit: &mut dyn FnMut(Event) -> bool, event: Event) -> Result<(), AgentError> {
    if emit(event) { Ok(()) } else { Err(AgentError::Stopped) }
}
