//! `megrez agent`, the command.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::args;
use crate::support::*;
use crate::web::{Reply, Web};

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/megrez-text")
}

/// A folder of one document, and texts that leave room in the nano checkpoint's context of 512 tokens.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("docs")).unwrap();
    std::fs::write(dir.path().join("docs/oslo.txt"), "It will rain in Oslo tomorrow.").unwrap();
    let prompts =
        "role = \"A\"\ndate = \"B\"\nfunctions = \"C\"\nsearch_description = \"D\"\nsearch_query = \"E\"\n";
    std::fs::write(dir.path().join("prompts.toml"), prompts).unwrap();
    dir
}

#[test]
fn the_nano_checkpoint_answers_over_a_local_index() {
    let dir = files();
    let (docs, prompts) = (dir.path().join("docs"), dir.path().join("prompts.toml"));
    let question = "Tom has 3 apples and buys 4 more. How many apples does he have?";
    let args = args![
        "agent",
        "--model",
        nano(),
        "--index",
        docs,
        "--prompts",
        prompts,
        "--question",
        question,
        "--json"
    ];
    let events = lines(&run(args.clone()).ok());
    let answer = events.last().unwrap();
    assert_eq!(answer["event"], "answer");
    let text: String =
        events.iter().filter(|e| e["event"] == "text").map(|e| e["text"].as_str().unwrap()).collect();
    assert_eq!(answer["text"], text.as_str());
    assert!(!text.is_empty());
    assert_eq!(
        run(args).ok().lines().last(),
        Some(answer.to_string().as_str()),
        "the same seed, the same answer"
    );
}

/// A server whose model calls the search and then cites what it is shown.
fn server() -> Web {
    Web::new(|asked| {
        if asked.path == "/v1/models" {
            return Reply::json(&json!({"data": [{"id": "m"}]}));
        }
        let body: Value = serde_json::from_str(&asked.body).unwrap();
        if body["stream"] == false {
            return Reply::json(&json!({"choices": [{"message": {"content": "Rain tomorrow."}}]}));
        }
        let seen = body["messages"].as_array().unwrap().last().unwrap()["role"] == "tool";
        let delta = if seen {
            json!({"content": "Yes, rain[citation:1]."})
        } else {
            let function = json!({"name": "googleWebSearch", "arguments": "{\"query\": \"rain Oslo\"}"});
            json!({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": function}]})
        };
        let chunk = json!({"choices": [{"delta": delta, "finish_reason": "stop"}]});
        Reply::Page(200, "text/event-stream", format!("data: {chunk}\n\ndata: [DONE]\n\n"))
    })
}

#[test]
fn an_answer_cites_numbered_sources() {
    let (dir, web) = (files(), server());
    let docs = dir.path().join("docs");
    let with = |more: &[&str]| {
        let mut args = args!["agent", "--url", web.url(""), "--index", docs].to_vec();
        args.extend(more.iter().map(Into::into));
        args
    };
    let page = run(with(&["--question", "Does it rain?"]));
    assert_eq!(page.stdout, "Yes, rain[1].\n[1] oslo, oslo.txt\n", "{}", page.stderr);
    assert!(page.stderr.contains("(googleWebSearch: rain Oslo)"));
    // Several messages from a pipe.
    let talk = run_with(megrez(with(&[])), "Does it rain?\n/reset\n\nReally?\n");
    assert_eq!(talk.ok().matches("[1] oslo, oslo.txt").count(), 2);
    let kinds: Vec<Value> =
        lines(&run(with(&["--question", "Hm?", "--json"])).ok()).iter().map(|e| e["event"].clone()).collect();
    assert_eq!(kinds, ["call", "result", "summary", "text", "answer"]);
}

#[test]
fn what_is_wrong_is_said_once() {
    let dir = files();
    let docs = dir.path().join("docs");
    let none = dir.path().join("none");
    let model = golden();
    for (args, code, word) in [
        (args!["agent", "--question", "x"].to_vec(), 2, "--model"),
        (args!["agent", "--model", model, "--url", "http://x"].to_vec(), 2, "--url"),
        (args!["agent", "--model", model, "--question", " "].to_vec(), 2, "--question is empty"),
        (args!["agent", "--model", model, "--index", docs, "--search", "serper"].to_vec(), 2, "--search"),
        (args!["agent", "--model", model, "--index", none, "--question", "x"].to_vec(), 1, "none"),
        (
            args!["agent", "--model", model, "--search", "altavista", "--question", "x"].to_vec(),
            1,
            "serper, brave",
        ),
        (
            args!["agent", "--model", model, "--search", "serper", "--question", "x"].to_vec(),
            1,
            "SERPER_API_KEY",
        ),
        (args!["agent", "--model", model, "--prompts", none, "--question", "x"].to_vec(), 1, "none"),
        (args!["agent", "--url", "http://127.0.0.1:1", "--question", "x"].to_vec(), 1, "127.0.0.1:1"),
        (
            args!["agent", "--model", model, "--kv", "magic", "--question", "x"].to_vec(),
            1,
            "this binary knows",
        ),
    ] {
        let mut command = megrez(&args);
        command.env_remove("SERPER_API_KEY");
        let run = run_with(command, "");
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{args:?}: {}", run.stderr);
        assert_eq!(run.stderr.matches("error:").count(), 1, "{}", run.stderr);
    }
}
