//! From a plan to its reply: jobs in, updates out, as a whole or as a stream of events.
//!
//! Whoever waits for a reply holds its [`Updates`]: when the connection closes, the future of a whole reply or the body of
//! a stream is dropped, the updates with it, and the driver ends the jobs.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt, StreamExt, stream};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};

use super::choice::{Choice, Delta};
use super::driver::{Update, Updates};
use super::engine::{Frontend, Job, JobId};
use super::error::ApiError;
use super::plan::{Form, Plan};
use super::record::Record;
use super::reply::{Chunks, Gathered, Head, Usage, UsageField};
use super::routes::App;
use crate::generate::Finish;

/// Events of a stream that wait for its client.
const EVENTS: usize = 16;

/// Runs a plan.
pub(super) async fn answer(app: Arc<App>, plan: Plan, record: Record) -> Result<Response, ApiError> {
    let card = app.frontend.card();
    let jobs = plan.jobs(card, &app.handle);
    let names: Vec<Named> = jobs.iter().map(Named::of).collect();
    let usage = Usage { prompt: plan.prompts.iter().map(|p| p.ids.len()).sum(), ..Usage::default() };
    record.usage(usage);
    let updates = app.handle.submit(jobs)?;
    let head = Head {
        form: plan.form,
        id: match plan.form {
            Form::Chat { .. } => format!("chatcmpl-{:032x}", rand::random::<u128>()),
            Form::Text => format!("cmpl-{:032x}", rand::random::<u128>()),
        },
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        model: card.id.clone(),
        fingerprint: app.fingerprint.clone(),
    };
    let (counts, submitted) = (BTreeMap::new(), Instant::now());
    let run = Started { plan, names, updates, usage, counts, submitted, record };
    if run.plan.options.stream { stream_of(app, head, run).await } else { whole(&app, &head, run).await }
}

/// A job without what the engine alone needs.
struct Named {
    id: JobId,
    eos: Vec<u32>,
}

impl Named {
    fn of(job: &Job) -> Self {
        Self { id: job.id, eos: job.eos.clone() }
    }
}

/// A plan whose jobs are queued.
struct Started {
    plan: Plan,
    names: Vec<Named>,
    updates: Updates,
    usage: Usage,
    /// The engine's own counts.
    counts: BTreeMap<&'static str, u64>,
    submitted: Instant,
    record: Record,
}

impl Started {
    /// The field `usage`.
    fn usage(&self, frontend: &dyn Frontend) -> Value {
        let own = if self.counts.is_empty() { Map::new() } else { frontend.usage(&self.counts) };
        self.usage.json(own)
    }
}

/// What a step of a [`Run`] brings: something of one choice, perhaps its end.
struct Step {
    index: usize,
    delta: Delta,
    finish: Option<&'static str>,
}

/// The choices of a request while they are written.
struct Run<'a> {
    started: &'a mut Started,
    choices: Vec<Choice<'a>>,
    /// When each choice's last token came.
    last: Vec<Option<Instant>>,
}

impl<'a> Run<'a> {
    fn new(started: &'a mut Started, frontend: &'a dyn Frontend) -> Self {
        let tools = match started.plan.form {
            Form::Chat { tools: true } => frontend.card().tools,
            _ => None,
        };
        let (stops, ids) = (&started.plan.options.stops, started.plan.options.token_ids);
        let choices: Vec<Choice> =
            started.names.iter().map(|_| Choice::new(frontend.tokenizer(), stops, tools, ids)).collect();
        Self { last: vec![None; choices.len()], choices, started }
    }

    /// The next step that its client is to see; `None` at the end. Cancel safe.
    async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        loop {
            let Some(update) = self.started.updates.recv().await else { return Ok(None) };
            let step = self.take(update)?;
            if let Some(step) = step
                && (step.finish.is_some() || !step.delta.is_empty())
            {
                return Ok(Some(step));
            }
        }
    }

    fn take(&mut self, update: Update) -> Result<Option<Step>, ApiError> {
        let started = &mut *self.started;
        let job = update.job();
        let Some(index) = started.names.iter().position(|n| n.id == job) else { return Ok(None) };
        let choice = &mut self.choices[index];
        let fault = |e: crate::Error| ApiError::internal(e.to_string());
        match update {
            Update::Started { cached_tokens, .. } => {
                started.record.started(started.submitted.elapsed());
                // Of `n` choices the first one tells how much of the prompt was there before the request.
                if index.is_multiple_of(started.plan.options.n) {
                    started.usage.cached += cached_tokens;
                }
                Ok(None)
            }
            Update::Token(written) => {
                let now = Instant::now();
                match self.last[index].replace(now) {
                    None => started.record.first_token(),
                    Some(before) => started.record.metrics().inter_token.observe(now - before),
                }
                started.usage.completion += 1;
                started.record.usage(started.usage);
                for (name, n) in &written.counts {
                    *started.counts.entry(name).or_default() += n;
                }
                let ends = started.names[index].eos.contains(&written.token);
                let mut delta = choice.push(written, ends).map_err(fault)?;
                let finish = choice.stopped().then(|| {
                    started.updates.cancel(job);
                    if choice.has_calls() { "tool_calls" } else { "stop" }
                });
                if finish.is_some() {
                    let rest = choice.finish().map_err(fault)?;
                    delta.pieces.extend(rest.pieces);
                    delta.logprobs.extend(rest.logprobs);
                    delta.own.extend(rest.own);
                    delta.ids.extend(rest.ids);
                }
                Ok(Some(Step { index, delta, finish }))
            }
            Update::Finished { finish, .. } => {
                let delta = choice.finish().map_err(fault)?;
                let natural = finish == Finish::Eos || choice.stopped();
                let finish = match (natural, choice.has_calls()) {
                    (true, true) => "tool_calls",
                    (true, false) => "stop",
                    (false, _) => "length",
                };
                Ok(Some(Step { index, delta, finish: Some(finish) }))
            }
            Update::Failed { failure, .. } => Err(failure.into()),
        }
    }
}

async fn whole(app: &App, head: &Head, mut started: Started) -> Result<Response, ApiError> {
    let mut gathered: Vec<Gathered> = started.names.iter().map(|_| Gathered::default()).collect();
    let mut run = Run::new(&mut started, &*app.frontend);
    while let Some(step) = run.next().await? {
        let choice = &mut gathered[step.index];
        choice.add(step.delta);
        if let Some(finish) = step.finish {
            choice.finish = finish;
        }
    }
    drop(run);
    let options = &started.plan.options;
    let choices = gathered
        .into_iter()
        .enumerate()
        .map(|(i, choice)| {
            let echo = started.plan.prompts[i / options.n].echo.as_deref();
            choice.json(head.form, i, echo, options.sampling.logprobs.is_some())
        })
        .collect();
    Ok(json_response(&head.whole(choices, started.usage(&*app.frontend))))
}

/// 200 with a JSON body.
pub(super) fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// A stream of events. What fails before the first token, and before a heartbeat is due, is answered with its own status;
/// what fails later is an event of the stream.
async fn stream_of(app: Arc<App>, head: Head, started: Started) -> Result<Response, ApiError> {
    let (events, mut body) = mpsc::channel::<Bytes>(EVENTS);
    let (begun, begins) = oneshot::channel();
    let heartbeat = app.config.heartbeat;
    tokio::spawn(async move {
        let record = started.record.clone();
        let out = Events { events: events.clone(), heartbeat };
        let written = AssertUnwindSafe(write(&app, head, started, out, begun)).catch_unwind().await;
        let broken = written.unwrap_or_else(|_| {
            let error = ApiError::internal("the server failed on this reply");
            let _ = events.try_send(event(&error.body()));
            Err(Broken("panic"))
        });
        if let Err(Broken(why)) = broken {
            record.broken(why);
        }
    });
    match tokio::time::timeout(heartbeat, begins).await {
        Ok(Ok(Ok(()))) | Err(_) => {}
        Ok(Ok(Err(error))) => return Err(error),
        Ok(Err(_)) => return Err(ApiError::internal("the server failed on this reply")),
    }
    let body = Body::from_stream(stream::poll_fn(move |cx| body.poll_recv(cx)).map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, body).into_response())
}

/// Why a stream did not come to its end.
struct Broken(&'static str);

const GONE: Broken = Broken("the client has gone");

struct Events {
    events: mpsc::Sender<Bytes>,
    heartbeat: Duration,
}

impl Events {
    async fn send(&self, value: &Value) -> Result<(), Broken> {
        self.events.send(event(value)).await.map_err(|_| GONE)
    }

    async fn send_raw(&self, bytes: &'static [u8]) -> Result<(), Broken> {
        self.events.send(Bytes::from_static(bytes)).await.map_err(|_| GONE)
    }

    /// The next step; comments while there is none. An error when the client goes.
    async fn next(&self, run: &mut Run<'_>) -> Result<Result<Option<Step>, ApiError>, Broken> {
        loop {
            tokio::select! {
                biased;
                () = self.events.closed() => return Err(GONE),
                step = run.next() => return Ok(step),
                () = tokio::time::sleep(self.heartbeat) => self.send_raw(b": keep-alive\n\n").await?,
            }
        }
    }
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

/// Writes the events of a reply. `begun` is told whether there is one.
async fn write(
    app: &App,
    head: Head,
    mut started: Started,
    out: Events,
    begun: oneshot::Sender<Result<(), ApiError>>,
) -> Result<(), Broken> {
    let counted = started.plan.options.include_usage;
    let usage = if counted { UsageField::Null } else { UsageField::Absent };
    let n = started.plan.options.n;
    let echoes: Vec<Option<String>> = started.plan.prompts.iter().map(|p| p.echo.clone()).collect();
    let mut chunks: Vec<Chunks> = (0..started.names.len()).map(|i| Chunks::new(head.form, i)).collect();
    let mut run = Run::new(&mut started, &*app.frontend);

    let mut step = match out.next(&mut run).await? {
        Ok(step) => step,
        Err(error) => {
            // The response's head may be out already, after a heartbeat's time.
            if let Err(Err(error)) = begun.send(Err(error)) {
                out.send(&error.body()).await?;
            }
            return Err(Broken("failed"));
        }
    };
    let _ = begun.send(Ok(()));
    for (i, chunk) in chunks.iter_mut().enumerate() {
        if let Some(choice) = chunk.begin(echoes[i / n].as_deref()) {
            out.send(&head.chunk(Some(choice), &usage)).await?;
        }
    }
    while let Some(Step { index, delta, finish }) = step {
        for choice in chunks[index].delta(delta) {
            out.send(&head.chunk(Some(choice), &usage)).await?;
        }
        if let Some(finish) = finish {
            out.send(&head.chunk(Some(chunks[index].end(finish)), &usage)).await?;
        }
        step = match out.next(&mut run).await? {
            Ok(step) => step,
            Err(error) => {
                out.send(&error.body()).await?;
                return Err(Broken("failed"));
            }
        };
    }
    drop(run);
    if counted {
        let usage = UsageField::Counts(started.usage(&*app.frontend));
        out.send(&head.chunk(None, &usage)).await?;
    }
    out.send_raw(b"data: [DONE]\n\n").await
}
