//! Turns with a model whose replies are written here.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use megrez::agent::{
    AgentError, Ask, Counting, Event, HttpSearch, HttpSettings, LocalIndex, PageLimits, RemoteTalker,
    SearchProvider, Settings, TalkError, Talker, WebSearchAgent,
};
use megrez::prompts::Prompts;
use nics_core::template::Message;
use serde_json::{Value, json};

use crate::web::{Reply, Web};

const CALL: &str = "<|function_start|>{\"name\": \"googleWebSearch\", \"arguments\": {\"query\": \"Oslo rain\"}}<|function_end|>";

/// Writes these replies in turn and remembers what it was asked. Tokens are characters.
#[derive(Clone)]
struct Scripted {
    replies: Arc<Mutex<Vec<&'static str>>>,
    asked: Arc<Mutex<Vec<Ask>>>,
    context: Option<usize>,
}

impl Scripted {
    fn new(replies: &[&'static str]) -> Self {
        let replies = Arc::new(Mutex::new(replies.iter().rev().copied().collect()));
        Self { replies, asked: Arc::default(), context: None }
    }

    fn asked(&self) -> Vec<Ask> {
        self.asked.lock().unwrap().clone()
    }
}

impl Talker for Scripted {
    fn context(&self) -> Option<usize> {
        self.context
    }

    fn count(&self, messages: &[Message], _: &[Value]) -> Result<usize, TalkError> {
        Ok(messages.iter().filter_map(Message::text).map(|t| t.chars().count()).sum())
    }

    fn shorten(&self, text: &str, tokens: usize) -> Result<String, TalkError> {
        Ok(text.chars().take(tokens).collect())
    }

    fn reply(&mut self, ask: &Ask, each: &mut dyn FnMut(&str) -> bool) -> Result<(), TalkError> {
        self.asked.lock().unwrap().push(ask.clone());
        let reply = self.replies.lock().unwrap().pop().expect("no reply is left");
        let characters: Vec<char> = reply.chars().collect();
        for piece in characters.chunks(3) {
            if !each(&piece.iter().collect::<String>()) {
                break;
            }
        }
        Ok(())
    }
}

fn folder() -> (tempfile::TempDir, Option<Box<dyn SearchProvider>>) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("a.txt", "Rain in Oslo tomorrow."), ("b.txt", "Oslo has 700,000 people and rain.")]
    {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let index: Box<dyn SearchProvider> = Box::new(LocalIndex::open(dir.path()).unwrap());
    (dir, Some(index))
}

fn agent(talker: &Scripted, provider: Option<Box<dyn SearchProvider>>) -> WebSearchAgent<Scripted> {
    let now = Some(time::macros::datetime!(2025-01-31 09:05 UTC));
    let settings = Settings { now, ..Settings::default() };
    WebSearchAgent::new(talker.clone(), provider, Prompts::default(), settings)
}

fn run(agent: &mut WebSearchAgent<Scripted>, question: &str) -> (megrez::agent::Answer, Vec<Event>) {
    let mut events = Vec::new();
    let answer = agent.turn(question, &mut |event| {
        events.push(event);
        true
    });
    (answer.unwrap(), events)
}

#[test]
fn a_question_is_looked_up_summarised_and_answered_with_sources() {
    let talker = Scripted::new(&[
        "Let me see. <|function_start|>{\"name\": \"googleWebSearch\", \"arguments\": {\"query\": \"Oslo rain\"}}<|function_end|>",
        "It will rain.",
        "700,000 people.",
        "Yes, it rains[citation:1], in a city of 700,000[citation:2][citation:7].",
    ]);
    let (_dir, provider) = folder();
    let mut agent = agent(&talker, provider);
    let (answer, events) = run(&mut agent, "Does it rain in Oslo?");
    assert_eq!(answer.replies, 2);
    assert_eq!(
        answer.text,
        "Let me see. Yes, it rains[citation:1], in a city of 700,000[citation:2][citation:7]."
    );
    assert_eq!(answer.linked(), "Let me see. Yes, it rains[1], in a city of 700,000[2][2].");
    assert_eq!(answer.cited, [1, 2]);
    assert_eq!(answer.sources[0].url, "a.txt");
    assert_eq!(answer.sources[0].summary, "It will rain.");

    let pieces: Vec<&str> = events
        .iter()
        .filter_map(|e| if let Event::Text { text } = e { Some(text.as_str()) } else { None })
        .collect();
    assert_eq!(pieces.concat(), answer.text);
    assert!(pieces.iter().all(|p| p.matches('[').count() == p.matches(']').count()), "{pieces:?}");
    let kinds: Vec<String> = events
        .iter()
        .map(|e| serde_json::to_value(e).unwrap()["event"].as_str().unwrap().to_owned())
        .filter(|kind| kind != "text")
        .collect();
    assert_eq!(kinds, ["call", "result", "result", "summary", "summary", "answer"]);

    let asked = talker.asked();
    let texts = |i: usize| -> Vec<(String, String)> {
        asked[i].messages.iter().map(|m| (m.role.clone(), m.text().unwrap().to_owned())).collect()
    };
    // First: who it is, when it is; what it may call goes with the request.
    let first = texts(0);
    assert_eq!(first.len(), 2);
    let system: Vec<&str> = first[0].1.lines().collect();
    assert_eq!(system.len(), 2);
    assert!(system[1].contains("2025-01-31 09:05:00") && system[1].contains("Friday"), "{}", system[1]);
    assert_eq!(asked[0].tools[0]["function"]["name"], "googleWebSearch");
    assert_eq!(asked[0].tools[0]["function"]["parameters"]["required"], json!(["query"]));
    assert_eq!((asked[0].temperature, asked[0].max_tokens), (0.01, 512));
    // Then a summary for each page, in a conversation of its own.
    assert_eq!(texts(1)[0].0, "system");
    assert!(
        texts(1)[1].1.contains("Rain in Oslo tomorrow.") && texts(1)[1].1.contains("Does it rain in Oslo?")
    );
    assert!(asked[1].tools.is_empty() && asked[1].max_tokens == 512);
    // Then the answer, from the summaries alone.
    let last = texts(3);
    assert_eq!(
        last.iter().map(|m| m.0.as_str()).collect::<Vec<_>>(),
        ["system", "user", "assistant", "tool"]
    );
    assert_eq!(last[2].1, "Let me see. ");
    assert_eq!(asked[3].messages[2].extra["tool_calls"][0]["function"]["name"], "googleWebSearch");
    let observation = &last[3].1;
    assert!(observation.ends_with("[[citation:1]]\nIt will rain.\n\n[[citation:2]]\n700,000 people."));
    assert!(observation.contains("Does it rain in Oslo?") && observation.contains("Oslo rain"));

    // What is remembered has no citations, whose sources are gone.
    let kept: Vec<&str> = agent.history().iter().map(|m| m.text().unwrap()).collect();
    assert_eq!(kept, ["Does it rain in Oslo?", "Let me see. Yes, it rains, in a city of 700,000."]);
}

#[test]
fn without_a_call_one_reply_is_all() {
    for (reply, text) in [
        ("Hello.", "Hello."),
        ("<|function_start|>{bad json<|function_end|>", ""),
        ("Well <|function_start|>{\"name\": \"googleWebSearch\"}<|function_end|>", "Well "),
        ("<|function_start|>{\"name\": \"googleWebSearch\", \"arguments\": {}}<|function_end|>", ""),
    ] {
        let talker = Scripted::new(&[reply]);
        let (_dir, provider) = folder();
        let (answer, _) = run(&mut agent(&talker, provider), "Hi");
        assert_eq!((answer.text.as_str(), answer.replies), (text, 1), "{reply}");
        assert!(answer.sources.is_empty());
    }
    // No provider: no tool, other settings.
    let talker = Scripted::new(&["Hi[citation:3]."]);
    let (answer, _) = run(&mut agent(&talker, None), "Hi");
    let asked = talker.asked();
    assert!(asked[0].tools.is_empty());
    assert_eq!((asked[0].temperature, asked[0].max_tokens), (0.4, 2048));
    assert!(answer.cited.is_empty(), "there is nothing to cite");
}

#[test]
fn an_unknown_tool_is_told_to_the_model() {
    let talker = Scripted::new(&[
        "<|function_start|>{\"name\": \"dance\", \"arguments\": {\"a\": 1}}<|function_end|>",
        "I cannot dance. <|function_start|>{\"name\": \"dance\", \"arguments\": {}}<|function_end|>",
    ]);
    let (_dir, provider) = folder();
    let (answer, events) = run(&mut agent(&talker, provider), "Dance!");
    assert_eq!((answer.text.as_str(), answer.replies), ("I cannot dance. ", 2), "one action a turn");
    let observation = talker.asked()[1].messages[3].text().unwrap().to_owned();
    assert_eq!(observation, "dance不在可以使用的工具列表中");
    assert!(matches!(&events[0], Event::Call { name, .. } if name == "dance"));
}

#[test]
fn when_no_page_comes_in_time_the_model_is_told() {
    let pages = Web::new(|_| Reply::Late(Duration::from_secs(60)));
    let links: Vec<Value> = (0..3).map(|i| json!({"link": pages.url(&format!("/{i}"))})).collect();
    let service = Web::new(move |_| Reply::json(&json!({"r": links})));
    let endpoint = service.url("/?q={query}");
    let settings =
        HttpSettings::parse(&format!("name = \"t\"\nendpoint = \"{endpoint}\"\nresults = \"/r\"")).unwrap();
    let limits = PageLimits { timeout: Duration::from_secs(1), allow_private: true, ..PageLimits::default() };
    let search = HttpSearch::new(settings, limits).unwrap();
    let talker = Scripted::new(&[CALL, "I found nothing."]);
    let (answer, events) = run(&mut agent(&talker, Some(Box::new(search))), "Does it rain?");
    assert_eq!((answer.text.as_str(), answer.replies), ("I found nothing.", 2));
    assert_eq!(talker.asked().len(), 2, "there is nothing to summarise");
    let observation = talker.asked()[1].messages[3].text().unwrap().to_owned();
    assert!(
        observation.contains("Oslo rain") && observation.contains("no answer within 1 s"),
        "{observation}"
    );
    let failed = events.iter().filter(|e| matches!(e, Event::Result { error: Some(_), .. })).count();
    assert_eq!(failed, 3);
    assert!(events.iter().any(|e| matches!(e, Event::Failed { .. })));
}

#[test]
fn a_small_context_shortens_what_the_model_sees() {
    let mut talker = Scripted::new(&[
        "First.",
        CALL,
        "A long summary of this page.",
        "Another one, longer still.",
        "Done.",
    ]);
    talker.context = Some(900);
    let (_dir, provider) = folder();
    let mut agent = agent(&talker, provider);
    run(&mut agent, &"x".repeat(400));
    let (answer, _) = run(&mut agent, "Does it rain?");
    assert_eq!(answer.text, "Done.");
    let asked = talker.asked();
    for ask in &asked {
        let size = talker.count(&ask.messages, &[]).unwrap();
        assert!(size + ask.max_tokens <= 900, "{size} + {}", ask.max_tokens);
    }
    assert!(asked.last().unwrap().messages.iter().all(|m| !m.text().unwrap().starts_with("xxx")));
}

#[test]
fn a_stopped_turn_leaves_no_trace() {
    let talker = Scripted::new(&["A reply that is long enough to be shown in pieces.", "Hi."]);
    let mut agent = agent(&talker, None);
    let stopped = agent.turn("One", &mut |event| !matches!(event, Event::Text { .. }));
    assert!(matches!(stopped, Err(AgentError::Stopped)));
    assert!(agent.history().is_empty());
    run(&mut agent, "Two");
    assert_eq!(agent.history().len(), 2);
    agent.reset();
    assert!(agent.history().is_empty());
}

/// A server of OpenAI's API that streams these events.
fn server(events: &'static [&'static str]) -> Web {
    Web::new(move |asked| {
        if asked.path == "/v1/models" {
            return Reply::json(&json!({"data": [{"id": "m", "max_model_len": 4096}]}));
        }
        let body: Value = serde_json::from_str(&asked.body).unwrap();
        if body["stream"] == true {
            let body: String = events.iter().flat_map(|e| ["data: ", e, "\n\n"]).collect();
            return Reply::Page(200, "text/event-stream", body);
        }
        Reply::json(&json!({"choices": [{"message": {"role": "assistant", "content": "a summary"}}]}))
    })
}

fn connect(web: &Web, model: Option<&str>) -> Result<RemoteTalker, TalkError> {
    let key = Some("sk-test".to_owned());
    RemoteTalker::connect(&web.url(""), model, key, Counting::Estimate, Duration::from_secs(5))
}

fn ask(text: &str) -> Ask {
    let messages = vec![Message::new("user", text)];
    Ask { messages, tools: vec![], temperature: 0.5, max_tokens: 7, seed: 3 }
}

fn stream(talker: &mut RemoteTalker) -> Result<String, TalkError> {
    let mut text = String::new();
    talker.reply(&ask("Hi"), &mut |piece| {
        text.push_str(piece);
        true
    })?;
    Ok(text)
}

#[test]
fn a_server_streams_text_and_calls() {
    let web = server(&[
        r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
        r#"{"choices":[{"delta":{"content":"Let me "}}]}"#,
        r#"{"choices":[{"delta":{"content":"see."}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"googleWebSearch","arguments":""}}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"query\":"}}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"雨\"}"}}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":1,"function":{"name":"second","arguments":"{}"}}]}}]}"#,
        r#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#,
        "[DONE]",
    ]);
    let mut talker = connect(&web, None).unwrap();
    assert_eq!((talker.model(), talker.context()), ("m", Some(4096)));
    assert_eq!(
        stream(&mut talker).unwrap(),
        "Let me see.<|function_start|>{\"name\": \"googleWebSearch\", \"arguments\": {\"query\": \"雨\"}}<|function_end|>"
    );
    let replies = talker.replies(&[ask("a"), ask("b")]);
    assert!(replies.iter().all(|r| r.as_ref().is_ok_and(|text| text == "a summary")));
    let asked = web.asked();
    assert!(asked.iter().all(|a| a.head.to_ascii_lowercase().contains("authorization: bearer sk-test")));
    let body: Value = serde_json::from_str(&asked[1].body).unwrap();
    assert_eq!((&body["model"], &body["max_tokens"], &body["seed"]), (&json!("m"), &json!(7), &json!(3)));
    assert_eq!(body["messages"], json!([{"role": "user", "content": "Hi"}]));
    assert!(body.get("tools").is_none());
}

#[test]
fn a_server_that_fails_says_how() {
    let refusing = Web::new(|asked| {
        if asked.path == "/v1/models" {
            return Reply::json(&json!({"data": [{"id": "m"}]}));
        }
        Reply::Page(429, "application/json", json!({"error": {"message": "too busy"}}).to_string())
    });
    let mut talker = connect(&refusing, Some("m")).unwrap();
    let e = stream(&mut talker).unwrap_err();
    assert!(matches!(&e, TalkError::Refused { status: 429, message, .. } if message == "too busy"), "{e}");
    let e = connect(&refusing, Some("gpt")).err().unwrap().to_string();
    assert!(e.contains("no model \"gpt\", only m"), "{e}");

    for (events, why) in [
        (&[r#"{"choices":[{"delta":{"content":"Hal"}}]}"#][..], "the stream ended before the reply did"),
        (&["{broken"], "no JSON"),
        (&[r#"{"error":{"message":"out of memory"}}"#], "out of memory"),
    ] {
        let web = server(events);
        let e = stream(&mut connect(&web, None).unwrap()).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    }
    let closed =
        RemoteTalker::connect("http://127.0.0.1:1", None, None, Counting::Estimate, Duration::from_secs(1));
    assert!(matches!(closed, Err(TalkError::Unreachable { .. })));
}
