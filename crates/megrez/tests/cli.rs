//! The `megrez` binary on good input, over the tiny random checkpoint of `datasets/golden/megrez`.

mod support;

use std::path::{Path, PathBuf};

use megrez::prompt::Prompter;
use nics_base::shard::merge;
use nics_core::checkpoint::Checkpoint;
use nics_core::template::Message;
use serde_json::{Value, json};
use support::*;

/// Six prompts in the three forms that a line may have.
fn prompts(dir: &Path) -> PathBuf {
    let path = dir.join("prompts.jsonl");
    let lines = [
        json!({"id": "apples", "prompt": "Tom has 3 apples and buys 4. How many?"}),
        json!({"prompt": "小明有3个苹果。"}),
        json!({"messages": [{"role": "user", "content": "Hi"}]}),
        json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2+2"},
        ]}),
        json!({"id": 7, "ids": [5, 6, 7, 8]}),
        json!({"ids": [40]}),
    ];
    std::fs::write(&path, lines.map(|l| l.to_string()).join("\n\n") + "\n").unwrap();
    path
}

/// `generate` over the six prompts, greedily, 12 tokens each.
fn generate(input: &Path, more: &[&str]) -> Vec<std::ffi::OsString> {
    let mut args =
        args!["generate", "--model", golden(), "--input", input, "--greedy", "--max-new-tokens", "12"]
            .to_vec();
    args.extend(more.iter().map(Into::into));
    args
}

/// Replies of `generate` on standard output.
fn replies(input: &Path, more: &[&str]) -> Vec<Value> {
    lines(&run(generate(input, more)).ok())
}

#[test]
fn help_pages_succeed_and_usage_errors_are_code_2() {
    let commands = ["chat", "generate", "eval", "rows", "train", "serve", "agent", "bench", "inspect"];
    let top = run(["--help"]).ok();
    for command in commands {
        assert!(top.contains(command));
        let help = run([command, "--help"]).ok();
        assert!(help.contains("Usage: megrez") && help.contains("--"), "{help}");
    }
    assert!(run(["--version"]).ok().starts_with("megrez "));
    for (wrong, word) in [
        (&[][..], "Usage"),
        (&["sing"], "sing"),
        (&["generate", "--prompt", "x"], "--model"),
        (&["generate", "--model", "m"], "--input"),
        (&["generate", "--model", "m", "--prompt", "x", "--input", "y"], "--prompt"),
        (&["eval", "--model", "m", "--out", "o"], "--task"),
        (&["eval", "--model", "m", "--out", "o", "--task", "chess"], "chess"),
        (&["inspect", "m", "--colour"], "--colour"),
        (&["train", "--recipe", "r"], "--out"),
    ] {
        let run = run(wrong);
        assert_eq!(run.code, Some(2), "{wrong:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{wrong:?}: {}", run.stderr);
    }
}

#[test]
fn a_prompt_gets_a_reply_that_its_seed_repeats() {
    let reply = |more: &[&str]| {
        let mut args =
            args!["generate", "--model", golden(), "--prompt", "Tom has 3 apples.", "--max-new-tokens", "24"]
                .to_vec();
        args.extend(more.iter().map(Into::into));
        run(args).ok()
    };
    let drawn = reply(&["--temperature", "1.5", "--seed", "4"]);
    assert!(!drawn.trim().is_empty());
    assert_eq!(drawn, reply(&["--temperature", "1.5", "--seed", "4"]));
    assert_ne!(drawn, reply(&["--temperature", "1.5", "--seed", "5"]));
    assert_eq!(reply(&["--greedy", "--seed", "1"]), reply(&["--greedy", "--seed", "2"]));
}

#[test]
fn a_second_run_adds_what_is_missing_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (prompts(dir.path()), dir.path().join("deep/replies.jsonl"));
    let with_out = |input: &Path| run(generate(input, &["--batch", "3", "--out", out.to_str().unwrap()]));
    with_out(&input).ok();
    let whole = std::fs::read_to_string(&out).unwrap();
    let by_index = |text: &str| {
        let mut all = lines(text);
        all.sort_by_key(|l| l["index"].as_u64());
        all
    };
    let all = by_index(&whole);
    let ids: Vec<&Value> = all.iter().map(|l| &l["id"]).collect();
    assert_eq!(ids, [&json!("apples"), &json!(1), &json!(2), &json!(3), &json!(7), &json!(5)]);

    with_out(&input).ok();
    assert_eq!(std::fs::read_to_string(&out).unwrap(), whole, "a finished file is left alone");

    let kept: Vec<&str> = whole.lines().step_by(2).collect();
    std::fs::write(&out, kept.join("\n") + "\n").unwrap();
    with_out(&input).ok();
    let resumed = std::fs::read_to_string(&out).unwrap();
    assert!(resumed.starts_with(&kept.join("\n")), "what was there stays where it was");
    assert_eq!(by_index(&resumed), all);

    // Another prompt in the place of one that was answered.
    let text = std::fs::read_to_string(&input).unwrap().replace("3 apples", "9 apples");
    std::fs::write(&input, text).unwrap();
    let refused = with_out(&input);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("a reply to another prompt (index 0)"), "{}", refused.stderr);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), resumed);
}

#[test]
fn replies_do_not_depend_on_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let input = prompts(dir.path());
    let alone = replies(&input, &["--batch", "1"]);
    assert_eq!(alone, replies(&input, &["--batch", "4"]));
    let order: Vec<u64> = alone.iter().map(|l| l["index"].as_u64().unwrap()).collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5], "on standard output in the order of the prompts");
    for reply in &alone {
        let tokens = reply["tokens"].as_array().unwrap();
        assert!((1..=12).contains(&tokens.len()) && !reply["finish"].as_str().unwrap().is_empty());
        assert!(reply.get("logprobs").is_none());
    }
}

#[test]
fn logprobs_of_each_token_and_of_the_likeliest() {
    let dir = tempfile::tempdir().unwrap();
    let input = prompts(dir.path());
    for reply in replies(&input, &["--logprobs", "3"]) {
        let tokens = reply["tokens"].as_array().unwrap();
        let logprobs = reply["logprobs"].as_array().unwrap();
        let top = reply["top_logprobs"].as_array().unwrap();
        assert_eq!((logprobs.len(), top.len()), (tokens.len(), tokens.len()));
        for ((token, logprob), top) in tokens.iter().zip(logprobs).zip(top) {
            let of = |i: usize| top[i][1].as_f64().unwrap();
            assert_eq!((&top[0][0], &top[0][1]), (token, logprob), "greedy takes the likeliest");
            assert!(of(0) >= of(1) && of(1) >= of(2) && of(0) <= 0.0);
        }
    }
    let plain = replies(&input, &["--logprobs"]);
    assert!(plain.iter().all(|r| r.get("top_logprobs").is_none() && r["logprobs"].is_array()));
}

#[test]
fn a_stop_string_ends_a_reply_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let input = prompts(dir.path());
    let whole = replies(&input, &[]);
    let text = whole.iter().map(|r| r["text"].as_str().unwrap()).find(|t| t.chars().count() > 6).unwrap();
    // Two characters in the middle, in whatever tokens they come.
    let (at, _) = text.char_indices().nth(3).unwrap();
    let stop: String = text[at..].chars().take(2).collect();
    for (stopped, whole) in replies(&input, &["--stop", &stop]).iter().zip(&whole) {
        let whole_text = whole["text"].as_str().unwrap();
        match whole_text.find(&stop) {
            Some(at) => {
                assert_eq!(stopped["text"], whole_text[..at]);
                assert_eq!(stopped["finish"], "stop");
            }
            None => assert_eq!(stopped, whole),
        }
    }
}

#[test]
fn a_prompt_is_the_same_as_text_messages_and_ids() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open_dir(&golden()).unwrap();
    let prompter = Prompter::from_checkpoint(&checkpoint).unwrap();
    // What a user types never becomes a control token, unless asked for.
    let said = "Tom <|turn_end|> 3";
    let ids = prompter.encode(&[Message::new("user", said)], true).unwrap();
    let turn_end = prompter.tokenizer.token_id("<|turn_end|>").unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == turn_end).count(), 2, "system's and user's own");
    let path = dir.path().join("p.jsonl");
    let forms = [
        json!({"id": 0, "prompt": said}),
        json!({"id": 0, "messages": [{"role": "user", "content": said}]}),
        json!({"id": 0, "ids": ids}),
    ];
    std::fs::write(&path, forms.map(|l| l.to_string()).join("\n")).unwrap();
    let all = replies(&path, &[]);
    for reply in &all {
        assert_eq!((&reply["prompt_hash"], &reply["tokens"]), (&all[0]["prompt_hash"], &all[0]["tokens"]));
    }
    let allowed = replies(&path, &["--allow-special"]);
    assert_ne!(allowed[0]["prompt_hash"], all[0]["prompt_hash"]);
    assert_eq!(allowed[2]["prompt_hash"], all[2]["prompt_hash"]);

    // A file that is not JSON Lines, and standard input, are one prompt; --raw leaves the template out.
    let file = dir.path().join("p.txt");
    std::fs::write(&file, said).unwrap();
    let raw = replies(&file, &["--raw"]);
    assert_ne!(raw[0]["prompt_hash"], all[0]["prompt_hash"]);
    assert_eq!(replies(&file, &[])[0]["prompt_hash"], all[0]["prompt_hash"]);
    let piped = run_with(megrez(generate(Path::new("-"), &[])), said).ok();
    assert_eq!(lines(&piped)[0]["tokens"], all[0]["tokens"]);
}

/// `chat` with `input` on a pipe.
fn chat(model: &Path, input: &str, more: &[&str]) -> Run {
    let mut command = megrez(args!["chat", "--model", model, "--greedy", "--max-new-tokens", "8"]);
    command.args(more);
    run_with(command, input)
}

#[test]
fn a_chat_through_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let saved = |name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(dir.path().join(name)).unwrap()).unwrap()
    };
    let file = |name: &str| dir.path().join(name).display().to_string();
    let input = format!(
        "1+1\n\n/save {}\n/system Count.\n2+2\n/save {}\n/reset\n/sing\n/save\n/system\n/save {}\n/help\n/quit\nnever\n",
        file("one.json"),
        file("two.json"),
        file("three.json"),
    );
    let run = chat(&golden(), &input, &[]);
    let stderr = run.stderr.clone();
    let stdout = run.ok();

    let roles = |chat: &Value| -> Vec<String> {
        let turns = chat["conversations"].as_array().unwrap().iter();
        turns.map(|t| t["role"].as_str().unwrap().to_owned()).collect()
    };
    let (one, two) = (saved("one.json"), saved("two.json"));
    assert_eq!(roles(&one), ["user", "assistant"]);
    assert_eq!(roles(&two), ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(roles(&saved("three.json")), [""; 0], "/reset and /system without a text forget");
    let said = |i: usize| two["conversations"][i]["content"].as_str().unwrap();
    assert_eq!((said(0), said(1), said(3)), ("Count.", "1+1", "2+2"));
    assert_eq!(one["conversations"][1], two["conversations"][2]);
    assert_eq!(stdout, format!("{}\n{}\n", said(2), said(4)), "the replies and nothing else");
    assert!(stderr.contains("error: /sing is no command; /help lists them"), "{stderr}");
    assert!(stderr.contains("error: /save needs a file"), "{stderr}");
    assert!(stderr.contains("/reset  /system"), "{stderr}");

    // What was saved is what the training reads.
    let opened = megrez::train::Conversations::open(
        &megrez::train::Source::Conversations { file: write_line(dir.path(), &two) },
        0,
    );
    assert_eq!(opened.unwrap().get(0).len(), 5);
}

fn write_line(dir: &Path, value: &Value) -> PathBuf {
    let path = dir.join("line.jsonl");
    std::fs::write(&path, format!("{value}\n")).unwrap();
    path
}

#[test]
fn a_chat_forgets_its_oldest_messages_when_the_context_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("chat.json");
    // The context takes 256 tokens and a letter is about one.
    let long = |c: &str| c.repeat(30);
    let input =
        format!("{}\n{}\n{}\n{}\n/save {}\n", long("ab "), long("cd "), long("ef "), "last", file.display());
    let run = chat(&golden(), &input, &["--system", "Brief."]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("old messages are forgotten: the context is full"), "{}", run.stderr);
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let turns = saved["conversations"].as_array().unwrap();
    assert_eq!(turns[0]["role"], "system");
    assert_eq!(turns[1]["role"], "user", "a conversation begins with what the user said");
    assert!(turns.len() < 9, "{}", turns.len());
    assert_eq!(turns[turns.len() - 2]["content"], "last");

    let too_long = chat(&golden(), &"long ".repeat(200), &[]);
    assert_eq!(too_long.code, Some(1));
    assert!(
        too_long.stderr.contains("what the context leaves for the prompt holds 248"),
        "{}",
        too_long.stderr
    );
}

#[test]
fn inspect_says_what_a_checkpoint_holds() {
    let json = lines(&run(args!["inspect", golden(), "--json", "--tensors"]).ok());
    let (about, tensors) = (&json[0], &json[1..]);
    assert_eq!(about["architecture"], "LlamaForCausalLM");
    for (field, value) in
        [("layers", 3), ("hidden", 64), ("heads", 8), ("kv_heads", 2), ("context", 256), ("vocabulary", 320)]
    {
        assert_eq!(about[field], value, "{field}");
    }
    assert_eq!(about["tensors"], tensors.len());
    let of =
        |t: &Value| -> u64 { t["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product() };
    assert_eq!(about["parameters"], tensors.iter().map(of).sum::<u64>());
    assert!(tensors.iter().any(|t| t["name"] == "model.layers.2.mlp.down_proj.weight"));
    assert_eq!(about["chat template"], true);
    for hash in ["arch_hash", "weights_hash"] {
        assert_eq!(about[hash].as_str().unwrap().len(), 64);
    }

    let text = run(args!["inspect", golden()]).ok();
    assert!(text.contains("LlamaForCausalLM") && !text.contains("down_proj"), "{text}");
    assert!(run(args!["inspect", golden(), "--tensors"]).ok().contains("model.norm.weight"));
}

/// `eval` greedily with short replies.
fn eval(model: &Path, task: &str, out: &Path, more: &[&str]) -> Run {
    let mut command = megrez(args!["eval", "--model", model, "--task", task, "--out", out]);
    command.args(["--greedy", "--max-new-tokens", "6", "--batch", "8"]).args(more);
    run_with(command, "")
}

#[test]
fn word_problems_are_evaluated_whole_in_shards_and_from_their_items() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let model = with_context(1024);
    let printed = eval(model.path(), "word-problems", &whole, &["--limit", "20", "--json"]).ok();
    let items = std::fs::read_to_string(whole.join("items.jsonl")).unwrap();
    let records = lines(&items);
    assert_eq!(records.len(), 20);
    for (i, record) in records.iter().enumerate() {
        assert_eq!(record["index"], i);
        assert_eq!(record["task"], "word-problems");
        assert!(record["gold"].as_str().unwrap().parse::<i64>().is_ok(), "{record}");
        assert_eq!(record["correct"], record["extracted"] == record["gold"]);
    }
    let rows = read_lines(&whole.join("rows.jsonl"));
    assert_eq!(lines(&printed), rows);
    let named = |rows: &[Value], metric: &str| rows.iter().find(|r| r["metric"] == metric).cloned().unwrap();
    let accuracy = named(&rows, "accuracy");
    let right = records.iter().filter(|r| r["correct"] == true).count();
    assert_eq!(accuracy["value"], json!(right as f64 / 20.0));
    assert_eq!((&accuracy["n"], &accuracy["dataset"]), (&json!(20), &json!("word-problems")));
    assert!(accuracy["ci"][1].as_f64().unwrap() > 0.0);

    // The same command finds its work done.
    eval(model.path(), "word-problems", &whole, &["--limit", "20"]).ok();
    assert_eq!(std::fs::read_to_string(whole.join("items.jsonl")).unwrap(), items);

    // Two shards, one of them named as a Kubernetes job would, merged.
    eval(model.path(), "word-problems", &parts, &["--limit", "20", "--shard", "0/2"]).ok();
    let mut second =
        megrez(args!["eval", "--model", model.path(), "--task", "word-problems", "--out", parts]);
    second.args(["--greedy", "--max-new-tokens", "6", "--batch", "3", "--limit", "20"]);
    second.env("JOB_COMPLETION_INDEX", "1").env("JOB_COMPLETIONS", "2");
    run_with(second, "").ok();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&parts).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "shards leave their items alone: {files:?}");
    let merged = dir.path().join("merged.jsonl");
    assert_eq!(merge(&files, &merged).unwrap(), 20);
    assert_eq!(std::fs::read_to_string(&merged).unwrap(), items, "merged shards are the unsharded items");

    // Rows made from the merged items say the same.
    let again = dir.path().join("rows.jsonl");
    run(args!["rows", merged, "--out", again, "--model", "tiny"]).ok();
    let summary = |rows: &[Value]| -> Vec<Value> {
        rows.iter().map(|r| json!([r["metric"], r["value"], r["n"], r["ci"]])).collect()
    };
    assert_eq!(summary(&read_lines(&again)), summary(&rows));
}

#[test]
fn benchmarks_from_local_folders_in_both_modes() {
    let dir = tempfile::tempdir().unwrap();
    let model = with_context(4096);
    // The fixtures hold a single solved example a subject; of MMLU on the hub, for anatomy alone.
    for (task, data, subject, shots, ids) in [
        ("mmlu", "mmlu-csv", "anatomy", "0", ["mmlu/anatomy/test/0", "mmlu/anatomy/test/1"]),
        ("mmlu", "mmlu-hub", "anatomy", "1", ["mmlu/anatomy/test/0", "mmlu/anatomy/test/1"]),
        ("ceval", "ceval-csv", "logic", "5", ["ceval/logic/validation/0", "ceval/logic/validation/1"]),
        ("cmmlu", "cmmlu-csv", "agronomy", "1", ["cmmlu/agronomy/test/0", "cmmlu/agronomy/test/1"]),
    ] {
        for mode in ["ppl", "gen"] {
            let out = dir.path().join(format!("{data}-{mode}"));
            let data = dataset(data);
            let data = data.to_str().unwrap();
            let more = ["--data", data, "--shots", shots, "--mode", mode, "--subject", subject];
            let run = eval(model.path(), task, &out, &more);
            assert_eq!(run.stderr.contains("1 solved examples instead of 5"), shots == "5", "{}", run.stderr);
            run.ok();
            let records = read_lines(&out.join("items.jsonl"));
            let found: Vec<&str> = records.iter().map(|r| r["id"].as_str().unwrap()).collect();
            assert_eq!(found, ids);
            for record in records {
                let logprobs = record["logprobs"].as_array().map(Vec::as_slice).unwrap_or_default();
                let letters: Vec<f64> = logprobs.iter().map(|p| p.as_f64().unwrap()).collect();
                if mode == "gen" {
                    assert!(letters.is_empty() && record["tokens"].as_u64().unwrap() > 0, "{record}");
                    continue;
                }
                let best = (0..letters.len()).max_by(|&a, &b| letters[a].total_cmp(&letters[b])).unwrap();
                assert_eq!(record["output"], char::from(b'A' + best as u8).to_string());
                assert_eq!(record["correct"], record["output"] == record["gold"]);
            }
            assert!(out.join("rows.jsonl").exists());
        }
    }
    let out = dir.path().join("gsm8k");
    let data = dataset("gsm8k-plain");
    eval(model.path(), "gsm8k", &out, &["--data", data.to_str().unwrap()]).ok();
    let gold: Vec<Value> =
        read_lines(&out.join("items.jsonl")).into_iter().map(|r| r["gold"].clone()).collect();
    assert_eq!(gold, ["36", "1250000", "-4"]);

    // Without a subject: all of them.
    let (out, data) = (dir.path().join("all"), dataset("mmlu-csv"));
    let more = ["--data", data.to_str().unwrap(), "--shots", "0"];
    let printed = eval(model.path(), "mmlu", &out, &more).ok();
    assert!(
        printed.contains("accuracy, mean of subjects") && printed.contains("accuracy, astronomy"),
        "{printed}"
    );
    assert_eq!(read_lines(&out.join("items.jsonl")).len(), 3);
}

#[test]
fn shuffled_weights_answer_otherwise_and_never_share_a_result() {
    let dir = tempfile::tempdir().unwrap();
    let model = with_context(1024);
    let run = |more: &[&str]| {
        let more = [&["--limit", "4"], more].concat();
        eval(model.path(), "word-problems", dir.path(), &more).ok();
        read_lines(&dir.path().join("items.jsonl"))
            .into_iter()
            .map(|r| r["output"].clone())
            .collect::<Vec<_>>()
    };
    let own = run(&[]);
    let shuffled = run(&["--weights", "shuffle:0"]);
    assert_ne!(own, shuffled);
    assert_ne!(shuffled, run(&["--weights", "shuffle:1"]));
    assert_eq!(shuffled, run(&["--weights", "shuffle:0"]));
    assert_eq!(own, run(&["--kv", "dense"]));
}

#[test]
fn a_trained_checkpoint_is_one_that_every_command_reads() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("tiny.toml");
    std::fs::write(&recipe, include_str!("support/tiny.toml")).unwrap();
    let out = dir.path().join("made");
    run(args!["train", "--recipe", recipe, "--out", out]).ok();
    assert!(run(args!["inspect", out]).ok().contains("LlamaForCausalLM"));
    for file in ["README.md", "training.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(out.join(file).exists(), "{file}");
    }
    run(args!["generate", "--model", out, "--prompt", "1+1", "--max-new-tokens", "4"]).ok();

    // Fine-tuned on conversations of one's own; what is frozen stays as it is, to the bit.
    let chats = dir.path().join("chats.jsonl");
    let chat = json!({"conversations": [
        {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]});
    std::fs::write(&chats, format!("{chat}\n{chat}\n")).unwrap();
    let tune = dir.path().join("tune.toml");
    let text = format!(
        "[data]\nsource = {{ conversations = {{ file = \"chats.jsonl\" }} }}\nbatch = 2\n\
         [model.from]\ncheckpoint = \"{}\"\nfreeze = [\"model.embed_tokens\"]\n\
         [train]\nsteps = 2\nwarmup = 1\n",
        out.display()
    );
    std::fs::write(&tune, text).unwrap();
    let tuned = dir.path().join("tuned");
    run(args!["train", "--recipe", tune, "--out", tuned]).ok();
    let bytes = |dir: &Path, name: &str| {
        let file = std::fs::read(dir.join("model.safetensors")).unwrap();
        safetensors::SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().data().to_vec()
    };
    let same = |name: &str| bytes(&out, name) == bytes(&tuned, name);
    assert!(same("model.embed_tokens.weight"));
    assert!(!same("lm_head.weight") && !same("model.norm.weight"));
}
