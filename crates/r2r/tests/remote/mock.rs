//! A server that speaks vLLM's, SGLang's or our protocol over the tiny large model, and misbehaves by script.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nics_core::cache::NoCache;
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::sampling::{Sampler, Sampling};
use nics_core::seam::{Ragged, SeqId};
use nics_core::tokenizer::Tokenizer;
use r2r::remote::Engine;
use serde_json::{Value, json};
use tch::Tensor;

/// How a call for tokens is answered wrongly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// Late: after the caller's time, if that is shorter.
    Late(Duration),
    /// When [`Mock::open_gate`] says so.
    Gate,
    /// The connection ends before the request is read.
    DropBefore,
    /// The connection ends once it is read.
    DropAfter,
    /// The connection ends within the reply.
    DropHalf,
    /// A status instead of tokens.
    Status(u16),
    /// 429 with `Retry-After` in seconds.
    Busy(u64),
    /// An id that only the large model could know.
    Outside(u32),
    /// Two ids for each sequence.
    Two,
    /// No ids.
    NoIds,
    /// An answer too few.
    TooFew,
    /// The answers in the opposite order, where they have numbers.
    Reversed,
    /// Two answers with one number.
    SameIndex,
    /// A negative id.
    Negative,
    /// Half of a JSON object.
    NoJson,
    /// JSON of another kind.
    OtherJson,
    /// The prefix cache is empty.
    Evicted,
}

/// What the server is.
#[derive(Clone)]
pub struct Persona {
    pub engine: Engine,
    pub model: &'static str,
    /// Whether it gives ids as `token_ids`, or as tokens of log-probabilities alone, as older servers.
    pub gives_ids: bool,
    /// Whether it has `/tokenize`.
    pub tokenizes: bool,
    /// What it adds to each id of a text: another tokenizer.
    pub shift: u32,
    pub context: Option<usize>,
    pub key: Option<&'static str>,
}

impl Persona {
    pub fn of(engine: Engine) -> Self {
        Self {
            engine,
            model: "org/large",
            gives_ids: true,
            tokenizes: true,
            shift: 0,
            context: Some(256),
            key: None,
        }
    }
}

/// Decides how the call with this number is answered.
pub type Script = Box<dyn FnMut(usize) -> Option<Fault> + Send>;

struct State {
    persona: Persona,
    model: Decoder,
    tokenizer: Tokenizer,
    script: Script,
    /// Bodies of the calls for tokens.
    calls: Vec<Value>,
    /// What the prefix cache has.
    known: Vec<Vec<u32>>,
    connections: usize,
}

/// The server; it ends with this.
pub struct Mock {
    pub url: String,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    gate: Arc<AtomicBool>,
}

impl Mock {
    pub fn start(persona: Persona, model: Decoder) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = State {
            persona,
            model,
            tokenizer: super::kit::tokenizer(),
            script: Box::new(|_| None),
            calls: Vec::new(),
            known: Vec::new(),
            connections: 0,
        };
        let (state, stop) = (Arc::new(Mutex::new(state)), Arc::new(AtomicBool::new(false)));
        let gate = Arc::new(AtomicBool::new(false));
        let mock = Self { url, state: Arc::clone(&state), stop: Arc::clone(&stop), gate: Arc::clone(&gate) };
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (state, gate) = (Arc::clone(&state), Arc::clone(&gate));
                let Ok(stream) = stream else { continue };
                thread::spawn(move || {
                    state.lock().unwrap().connections += 1;
                    serve(&state, &gate, stream);
                });
            }
        });
        mock
    }

    /// Begins to misbehave: calls are numbered from 0 again.
    pub fn script(&self, script: impl FnMut(usize) -> Option<Fault> + Send + 'static) {
        let mut state = self.state.lock().unwrap();
        state.script = Box::new(script);
        state.calls.clear();
    }

    /// Lets the calls go on that stand at the gate, for good.
    pub fn open_gate(&self) {
        self.gate.store(true, Ordering::Relaxed);
    }

    /// Bodies of the calls for tokens since the script began.
    pub fn calls(&self) -> Vec<Value> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Connections that were made.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
    }
}

/// Requests of one connection, until it ends or a fault ends it.
fn serve(state: &Mutex<State>, gate: &AtomicBool, stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    while let Some((method, path, key, body)) = request(&mut reader) {
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (fault, (status, reply)) = {
            let mut state = state.lock().unwrap();
            let fault = match path.as_str() {
                "/generate" | "/v1/completions" => {
                    let number = state.calls.len();
                    state.calls.push(body.clone());
                    (state.script)(number)
                }
                _ => None,
            };
            let refused = state.persona.key.is_some_and(|k| key != Some(format!("Bearer {k}")));
            let answer = if refused {
                (401, json!({"error": {"message": "a key is needed"}}))
            } else {
                state.answer(&method, &path, &body, fault)
            };
            (fault, answer)
        };
        let mut text = reply.to_string();
        let mut retry = String::new();
        match fault {
            Some(Fault::Late(time)) => thread::sleep(time),
            Some(Fault::Gate) => {
                let start = std::time::Instant::now();
                while !gate.load(Ordering::Relaxed) && start.elapsed() < super::kit::LIVENESS {
                    thread::sleep(Duration::from_millis(2));
                }
            }
            // Reading a request cannot be undone; that nothing of it is acted upon comes to the same.
            Some(Fault::DropBefore | Fault::DropAfter) => return,
            Some(Fault::NoJson) => text.truncate(text.len() / 2),
            Some(Fault::Busy(seconds)) => retry = format!("Retry-After: {seconds}\r\n"),
            _ => {}
        }
        let length = text.len();
        let head = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{retry}Content-Length: {length}\r\n\r\n"
        );
        if fault == Some(Fault::DropHalf) {
            let _ = stream.write_all(format!("{head}{}", &text[..length / 2]).as_bytes());
            return;
        }
        if stream.write_all(format!("{head}{text}").as_bytes()).is_err() {
            return;
        }
    }
}

type Request = (String, String, Option<String>, Vec<u8>);

fn request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut key) = (0, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => key = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((method, path, key, body))
}

impl State {
    fn answer(&mut self, method: &str, path: &str, body: &Value, fault: Option<Fault>) -> (u16, Value) {
        let persona = self.persona.clone();
        let nothing = (404, json!({"detail": "Not Found"}));
        match (method, path) {
            ("GET", "/v1/models") if persona.engine != Engine::Sglang => {
                let mut models = json!([{"id": persona.model, "object": "model"}]);
                if let Some(context) = persona.context {
                    models[0]["max_model_len"] = context.into();
                }
                (200, json!({"object": "list", "data": models}))
            }
            ("GET", "/get_model_info") if persona.engine == Engine::Sglang => {
                (200, json!({"model_path": persona.model, "is_generation": true}))
            }
            ("POST", "/tokenize") if persona.tokenizes => {
                let ids = self.tokenizer.encode(body["prompt"].as_str().unwrap(), false).unwrap();
                let ids: Vec<u32> = ids.into_iter().map(|id| id + persona.shift).collect();
                (200, json!({"count": ids.len(), "tokens": ids}))
            }
            ("POST", "/generate") if persona.engine == Engine::Sglang => self.sglang(body, fault),
            ("POST", "/v1/completions") if persona.engine != Engine::Sglang => {
                if body["model"] != persona.model {
                    return (404, json!({"error": {"message": "no such model"}}));
                }
                self.completions(body, fault)
            }
            _ => nothing,
        }
    }

    fn refusal(fault: Option<Fault>) -> Option<(u16, Value)> {
        let status = match fault {
            Some(Fault::Status(status)) => status,
            Some(Fault::Busy(_)) => 429,
            Some(Fault::OtherJson) => return Some((200, json!(["tokens"]))),
            _ => return None,
        };
        Some((status, json!({"error": {"message": format!("misbehaving with {status}")}})))
    }

    fn completions(&mut self, body: &Value, fault: Option<Fault>) -> (u16, Value) {
        if let Some(refusal) = Self::refusal(fault) {
            return refusal;
        }
        let ours = self.persona.engine == Engine::Nics;
        if ours && !body["logit_bias"].is_null() {
            return (400, json!({"error": {"message": "logit_bias is not supported"}}));
        }
        assert_eq!(
            (&body["max_tokens"], &body["n"], &body["ignore_eos"]),
            (&json!(1), &json!(1), &json!(true))
        );
        let prompts: Vec<Vec<u32>> = serde_json::from_value(body["prompt"].clone()).unwrap();
        let (mut cached, mut choices) = (0, Vec::new());
        for (i, ids) in prompts.iter().enumerate() {
            let (token, had) = self.token(ids, body, "seed", 16, fault);
            cached += had;
            let mut choice = json!({"index": i, "text": "?", "finish_reason": "length", "logprobs": null});
            if self.persona.gives_ids {
                choice["token_ids"] = spoilt(token, fault);
            } else if body["return_tokens_as_token_ids"] == true && fault != Some(Fault::NoIds) {
                choice["logprobs"] = json!({"tokens": [format!("token_id:{token}")]});
            }
            choices.push(choice);
        }
        match fault {
            Some(Fault::Reversed) => choices.reverse(),
            Some(Fault::TooFew) => drop(choices.pop()),
            Some(Fault::SameIndex) => choices.iter_mut().for_each(|c| c["index"] = json!(7)),
            _ => {}
        }
        let usage = json!({"prompt_tokens_details": {"cached_tokens": cached}});
        (200, json!({"object": "text_completion", "choices": choices, "usage": usage}))
    }

    fn sglang(&mut self, body: &Value, fault: Option<Fault>) -> (u16, Value) {
        if let Some(refusal) = Self::refusal(fault) {
            return refusal;
        }
        let prompts: Vec<Vec<u32>> = serde_json::from_value(body["input_ids"].clone()).unwrap();
        let mut answers = Vec::new();
        for (ids, sampling) in prompts.iter().zip(body["sampling_params"].as_array().unwrap()) {
            assert_eq!((&sampling["max_new_tokens"], &sampling["ignore_eos"]), (&json!(1), &json!(true)));
            let (token, had) = self.token(ids, sampling, "sampling_seed", 1, fault);
            let info = json!({"cached_tokens": had, "prompt_tokens": ids.len()});
            answers.push(json!({"text": "?", "output_ids": spoilt(token, fault), "meta_info": info}));
        }
        match fault {
            Some(Fault::TooFew) => drop(answers.pop()),
            Some(Fault::Reversed) => {
                answers.iter_mut().enumerate().for_each(|(i, a)| a["index"] = json!(i));
                answers.reverse();
            }
            Some(Fault::SameIndex) => answers.iter_mut().for_each(|a| a["index"] = json!(7)),
            _ => {}
        }
        (200, answers.into())
    }

    /// The next token, and how many of the ids the prefix cache had, in whole blocks.
    fn token(
        &mut self,
        ids: &[u32],
        fields: &Value,
        seed: &str,
        block: usize,
        fault: Option<Fault>,
    ) -> (u32, usize) {
        if fault == Some(Fault::Evicted) {
            self.known.clear();
        }
        let common = |known: &Vec<u32>| known.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let cached = self.known.iter().map(common).max().unwrap_or(0).min(ids.len() - 1) / block * block;
        self.known.push(ids.to_vec());
        let banned = fields["logit_bias"].as_object();
        if let Some(Fault::Outside(id)) = fault
            && banned.is_none_or(|b| !b.contains_key(&id.to_string()))
        {
            return (id, cached);
        }
        let number = |key: &str| fields[key].as_f64().unwrap_or_else(|| panic!("{key} is not said")) as f32;
        let sampling = Sampling {
            temperature: number("temperature"),
            top_p: number("top_p"),
            top_k: fields["top_k"].as_i64().unwrap().max(0) as usize,
            min_p: number("min_p"),
            repetition_penalty: number("repetition_penalty"),
            seed: fields[seed].as_u64().unwrap_or(0),
            ..Sampling::default()
        };
        assert_eq!(sampling.temperature > 0.0, !fields[seed].is_null(), "a seed where it matters");
        let mut logits = self.logits(ids);
        for id in banned.into_iter().flatten().map(|(id, _)| id.parse::<usize>().unwrap()) {
            if let Some(logit) = logits.get_mut(id) {
                *logit = -1e30;
            }
        }
        (Sampler::new(sampling, ids).unwrap().choose(&mut logits).unwrap().token, cached)
    }

    fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let _guard = tch::no_grad_guard();
        let input = Tensor::from_slice(&ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>());
        let rows = Ragged::contiguous(&[(SeqId(0), 0, ids.len())]);
        let out =
            self.model.forward(&Batch::new(rows, Input::Ids(&input)), &mut NoCache::new(), None).unwrap();
        let last = out.hidden.narrow(0, ids.len() as i64 - 1, 1);
        Vec::try_from(self.model.logits(&last).unwrap().view(-1)).unwrap()
    }
}

/// The list of ids, or what a fault makes of it.
fn spoilt(token: u32, fault: Option<Fault>) -> Value {
    match fault {
        Some(Fault::Two) => json!([token, token]),
        Some(Fault::NoIds) => Value::Null,
        Some(Fault::Negative) => json!([-1]),
        _ => json!([token]),
    }
}
