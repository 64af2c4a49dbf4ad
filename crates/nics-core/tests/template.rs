//! Chat templates against what transformers renders (`datasets/golden/templates`, made by `make_templates.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save};
use nics_core::template::{ChatTemplate, Content, Message, RenderOptions, TemplateError};
use nics_core::tokenizer::SpecialTokens;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::Tensor;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/templates")
}

#[derive(Deserialize)]
struct Golden {
    now: String,
    tokens: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Message>,
    #[serde(default)]
    add_generation_prompt: bool,
    tools: Option<Value>,
    documents: Option<Value>,
    #[serde(default)]
    extra: Map<String, Value>,
    text: Option<String>,
    refused: Option<String>,
    fails: Option<String>,
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(folder().join("cases.json")).unwrap()).unwrap()
}

/// `2025-03-09T14:05:07`.
fn now(text: &str) -> time::OffsetDateTime {
    let n: Vec<u16> = text.split(['-', 'T', ':']).map(|part| part.parse().unwrap()).collect();
    let [year, month, day, hour, minute, second] = n.try_into().unwrap();
    let date = time::Date::from_calendar_date(i32::from(year), (month as u8).try_into().unwrap(), day as u8)
        .unwrap();
    date.with_hms(hour as u8, minute as u8, second as u8).unwrap().assume_utc()
}

#[test]
fn every_conversation_is_rendered_to_the_byte() {
    let golden = golden();
    let tokens = golden.tokens.iter().fold(SpecialTokens::default(), |t, (role, token)| t.with(role, token));
    let (mut texts, mut wrong) = (0, Vec::new());
    for case in &golden.cases {
        let source = std::fs::read_to_string(folder().join(format!("{}.jinja", case.template))).unwrap();
        let template = ChatTemplate::parse(&source).unwrap().with_tokens(tokens.clone());
        let options = RenderOptions {
            add_generation_prompt: case.add_generation_prompt,
            tools: case.tools.clone(),
            documents: case.documents.clone(),
            extra: case.extra.clone(),
            now: Some(now(&golden.now)),
            template: None,
        };
        let result = template.render(&case.messages, &options);
        let right = match (&result, &case.text, &case.refused, &case.fails) {
            (Ok(text), Some(expected), _, _) => {
                texts += 1;
                text == expected
            }
            (Err(TemplateError::Refused(message)), _, Some(expected), _) => message == expected,
            (Err(TemplateError::Render { .. }), _, _, Some(_)) => true,
            _ => false,
        };
        if !right {
            let expected = case.text.as_ref().or(case.refused.as_ref()).or(case.fails.as_ref());
            wrong.push(format!(
                "{}, {}:\n{result:#?}\nexpected\n{expected:#?}",
                case.template, case.conversation
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), golden.cases.len(), wrong.join("\n"));
    assert!(texts >= 60, "{texts}");
}

fn text(source: &str, options: &RenderOptions) -> Result<String, TemplateError> {
    ChatTemplate::parse(source)?.render(&[Message::new("user", "Hi")], options)
}

#[test]
fn a_template_that_does_not_parse() {
    let e = text("line one\n{% if %}", &RenderOptions::default()).unwrap_err();
    assert!(matches!(e, TemplateError::Syntax { line: 2, .. }), "{e:?}");
    assert!(e.to_string().starts_with("the chat template is wrong in line 2: syntax error"), "{e}");
}

#[test]
fn a_template_that_fails_or_refuses() {
    let e = text("a\n{{ messages[0].content.nothing.at_all }}", &RenderOptions::default()).unwrap_err();
    assert!(matches!(e, TemplateError::Render { line: 2, .. }), "{e:?}");
    let e = text("{{ raise_exception('no ' ~ messages[0].role) }}", &RenderOptions::default()).unwrap_err();
    assert_eq!(e.to_string(), "the chat template refuses this conversation: no user");
    let nested = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    let e = text(nested, &RenderOptions::default()).unwrap_err();
    assert!(matches!(&e, TemplateError::Refused(m) if m == "deep"), "{e:?}");
}

#[test]
fn a_template_without_end_is_stopped() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
        {% endfor %}{% endfor %}{% endfor %}";
    let start = std::time::Instant::now();
    let e = text(source, &RenderOptions::default()).unwrap_err();
    assert!(matches!(e, TemplateError::Render { .. }), "{e:?}");
    assert!(start.elapsed() < std::time::Duration::from_secs(30));
    let e = text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", &RenderOptions::default()).unwrap_err();
    assert!(matches!(e, TemplateError::Render { .. }), "{e:?}");
}

#[test]
fn named_templates() {
    let sources = [("default", "plain"), ("tool_use", "tools"), ("rag", "documents")];
    let sources = sources.map(|(n, s)| (n.to_owned(), s.to_owned())).into();
    let template = ChatTemplate::new(sources, SpecialTokens::default()).unwrap();
    let render = |options: RenderOptions| template.render(&[], &options);
    assert_eq!(render(RenderOptions::default()).unwrap(), "plain");
    assert_eq!(render(RenderOptions { tools: Some(json!([])), ..Default::default() }).unwrap(), "tools");
    assert_eq!(
        render(RenderOptions { template: Some("rag".into()), ..Default::default() }).unwrap(),
        "documents"
    );
    let e = render(RenderOptions { template: Some("x".into()), ..Default::default() }).unwrap_err();
    assert_eq!(e.to_string(), "there is no chat template x, only default, rag, tool_use");
}

/// A checkpoint folder with the given files beside weights.
fn checkpoint(files: &[(&str, &str)]) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), [("w".to_owned(), Tensor::from_slice(&[1.0f32]))], &json!({}), DEFAULT_SHARD_BYTES)
        .unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
    (dir, checkpoint)
}

#[test]
fn templates_of_a_checkpoint() {
    let render = |files: &[(&str, &str)]| {
        let (_dir, checkpoint) = checkpoint(files);
        let template = ChatTemplate::from_checkpoint(&checkpoint)?;
        template.map(|t| t.render(&[Message::new("user", "Hi")], &RenderOptions::default())).transpose()
    };
    assert!(render(&[]).unwrap().is_none());
    let settings = r#"{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ eos_token }}!"}"#;
    let map = ("special_tokens_map.json", r#"{"eos_token": "</s>", "bos_token": "other"}"#);
    assert_eq!(render(&[("tokenizer_config.json", settings)]).unwrap().unwrap(), "<s>!");
    assert_eq!(render(&[("tokenizer_config.json", settings), map]).unwrap().unwrap(), "<s></s>!");
    let file = ("chat_template.jinja", "file {{ messages[0].content }}\n");
    assert_eq!(render(&[("tokenizer_config.json", settings), file]).unwrap().unwrap(), "file Hi");
    let list =
        r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#;
    assert_eq!(render(&[("tokenizer_config.json", list)]).unwrap().unwrap(), "d");
    for (bad, part) in [
        (r#"{"chat_template": 7}"#, "chat_template in tokenizer_config.json is 7, expected a string"),
        (r#"{"chat_template": ["x"]}"#, "is a list with \"x\""),
        (r#"{"chat_template": "{% x %}"}"#, "the chat template is wrong in line 1"),
        (r#"{"bos_token": 7, "chat_template": ""}"#, "bos_token is 7, expected a string, or an object"),
        ("{", "tokenizer_config.json is not valid JSON"),
    ] {
        let e = render(&[("tokenizer_config.json", bad)]).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    }
}

#[test]
fn messages_keep_what_they_are_given() {
    for text in [
        r#"{"role":"user","content":"Hi"}"#,
        r#"{"role":"assistant","content":null,"tool_calls":[{"b":1,"a":2}]}"#,
        r#"{"role":"assistant","reasoning_content":"x"}"#,
        r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"image"}],"name":"n"}"#,
    ] {
        let message: Message = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
    }
    let mut message = Message::new("user", "a").with("name", "n");
    assert_eq!(message.text(), Some("a"));
    message.set_text("b");
    assert_eq!(message.content, Some(Content::Text("b".into())));
    assert!(serde_json::from_str::<Message>(r#"{"content":"x"}"#).is_err());
    assert!(serde_json::from_str::<Message>(r#"{"role":"user","content":7}"#).is_err());
}

#[test]
fn special_tokens_yield_to_given_variables() {
    let template = ChatTemplate::parse("{{ bos_token }}").unwrap();
    let template = template.with_tokens(SpecialTokens::default().with("bos_token", "<s>"));
    assert_eq!(template.render(&[], &RenderOptions::default()).unwrap(), "<s>");
    let extra = json!({"bos_token": "[B]"}).as_object().unwrap().clone();
    assert_eq!(template.render(&[], &RenderOptions { extra, ..Default::default() }).unwrap(), "[B]");
}
