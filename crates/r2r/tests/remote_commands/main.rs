//! `r2r generate` and `r2r chat`, on good and on bad input, with a large model here and on a server.

#[path = "../remote/kit.rs"]
#[allow(dead_code)]
mod kit;
#[path = "../remote/mock.rs"]
#[allow(dead_code)]
mod mock;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use mock::{Fault, Mock, Persona};
use r2r::checkpoint::{Card, CommonArgs, save, tokenizer_hash};
use r2r::remote::Engine;
use r2r::router::{Architecture, InitArgs, Router, RouterConfig};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    command.args(args).env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1");
    command.env_remove("NICS_LOG").env_remove("R2R_LARGE_KEY").env_remove("NO_COLOR");
    command
}

/// Reads to the end beside the test.
fn drain(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    })
}

fn finish(mut child: Child, input: &str) -> Run {
    let start = Instant::now();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let (out, err) = (drain(child.stdout.take().unwrap()), drain(child.stderr.take().unwrap()));
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > 2 * kit::LIVENESS {
            child.kill().unwrap();
            panic!("the command hangs");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let code = child.wait().unwrap().code();
    Run { code, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
}

fn r2r_with(args: &[&str], input: &str) -> Run {
    let mut command = command(args);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(piped.spawn().unwrap(), input)
}

fn r2r(args: &[&str]) -> Run {
    r2r_with(args, "")
}

fn model() -> String {
    kit::checkpoint().to_str().unwrap().to_owned()
}

/// A copy of the tiny checkpoint, to be changed.
fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let files = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    for name in files {
        std::fs::copy(kit::checkpoint().join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// A router for a small model of this width, with this number of logits, in a folder.
fn router(dir: &Path, hidden: i64, k: i64, tokenizer: Option<String>) -> PathBuf {
    let args = InitArgs {
        hidden_states_size: Some(hidden),
        logits_size: Some(k),
        hidden_dims: vec![8, 8],
        expansion_factor: 2,
        ..InitArgs::default()
    };
    let config = RouterConfig { architecture: Architecture::HiddenTokenLogits, args };
    let table = Tensor::zeros([320, hidden], (Kind::Float, Device::Cpu));
    let router = Router::random(config.clone(), Some(&table), None, 1, Device::Cpu).unwrap();
    let common = CommonArgs { threshold: 0.5, input_type: Vec::new() };
    let card = Card { tokenizer_hash: tokenizer, ..Card::new(&config, common) };
    let folder = dir.join(format!("router-{hidden}-{k}"));
    save(&folder, &router, &card).unwrap();
    folder
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const PROMPTS: &str = concat!(
    r#"{"id": "a", "prompt": "Hello"}"#,
    "\n",
    r#"{"prompt": "What is 1 + 1?"}"#,
    "\n",
    r#"{"ids": [40, 41, 42]}"#,
    "\n"
);

#[test]
fn replies_say_whose_tokens_are_whose_and_a_second_run_goes_on() {
    let (dir, model) = (tempfile::tempdir().unwrap(), model());
    let input = dir.path().join("prompts.jsonl");
    std::fs::write(&input, PROMPTS).unwrap();
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    let out = dir.path().join("out.jsonl");
    let base = [
        "generate",
        "--small",
        &model,
        "--large",
        &model,
        "--policy",
        "random",
        "--target-rate",
        "0.5",
        "--input",
        &path(&input),
        "--max-new-tokens",
        "12",
        "--temperature",
        "0.8",
        "--seed",
        "3",
    ]
    .map(str::to_owned);
    let run = |more: &[&str]| {
        let args: Vec<&str> = base.iter().map(String::as_str).chain(more.iter().copied()).collect();
        r2r(&args)
    };
    let whole = lines(&run(&[]).ok());
    assert_eq!(
        whole.iter().map(|r| r["id"].clone()).collect::<Vec<_>>(),
        [Value::from("a"), 1.into(), 2.into()]
    );
    for reply in &whole {
        let tokens = reply["tokens"].as_array().unwrap();
        let large = tokens.iter().filter(|t| t["source"] == "large").count();
        assert!(tokens.iter().all(|t| t["token"].is_u64() && t["score"].is_number()));
        assert_eq!(reply["usage"]["large_tokens"], large);
        assert_eq!(reply["usage"]["small_tokens"], tokens.len() - large);
        assert!(
            reply["mean_parameters_billions"]["additive"].as_f64()
                > reply["mean_parameters_billions"]["exclusive"].as_f64()
        );
        assert!(["eos", "length"].contains(&reply["finish"].as_str().unwrap()));
    }
    // Begun before, with a torn last line.
    let first = serde_json::to_string(&whole[1]).unwrap();
    std::fs::write(&out, format!("{first}\n{{\"index\": 2, \"id")).unwrap();
    run(&["--out", &path(&out), "--batch", "1"]).ok();
    let mut resumed = lines(&std::fs::read_to_string(&out).unwrap());
    resumed.sort_by_key(|r| r["index"].as_u64());
    assert_eq!(resumed, whole);
    // Nothing is left to do; another prompt is refused.
    run(&["--out", &path(&out)]).ok();
    std::fs::write(&input, PROMPTS.replace("Hello", "Good bye")).unwrap();
    let refused = run(&["--out", &path(&out)]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("holds a reply to another prompt"), "{}", refused.stderr);
}

#[test]
fn one_prompt_is_printed_as_text_with_colours_when_asked() {
    let model = model();
    let base = [
        "generate",
        "--small",
        &model,
        "--large",
        &model,
        "--prompt",
        "Hi",
        "--greedy",
        "--max-new-tokens",
        "16",
    ];
    let run = |more: &[&str]| r2r(&[&base[..], more].concat());
    let plain = run(&["--policy", "always-large"]);
    assert!(plain.stderr.contains("parameters a token"), "{}", plain.stderr);
    let plain = plain.ok();
    // Not on a pipe, unless always.
    assert_eq!(run(&["--policy", "always-large", "--color-by-source"]).ok(), plain);
    let coloured = run(&["--policy", "always-large", "--color-by-source", "always"]).ok();
    assert_ne!(coloured, plain);
    assert_eq!(coloured.replace("\u{1b}[36m", "").replace("\u{1b}[0m", ""), plain);
    // Models that are the same write the same, whoever it is.
    assert_eq!(run(&["--policy", "always-small"]).ok(), plain);
    let json = lines(&run(&["--policy", "always-small", "--json"]).ok());
    assert_eq!(json[0]["text"], plain.trim_end_matches('\n'));
}

#[test]
fn the_large_model_may_be_on_a_server() {
    let model = model();
    let base = [
        "generate",
        "--small",
        &model,
        "--prompt",
        "Hi",
        "--greedy",
        "--max-new-tokens",
        "10",
        "--json",
        "--policy",
        "always-large",
    ];
    let here = lines(&r2r(&[&base[..], &["--large", &model]].concat()).ok());
    for engine in [Engine::Vllm, Engine::Sglang, Engine::Nics] {
        let mock = Mock::start(Persona::of(engine), kit::large());
        let spec = format!("{}:{}", engine.name(), mock.url);
        let run = r2r(&[&base[..], &["--large", &spec, "--sizes", "1.5,32"]].concat());
        assert!(run.stderr.contains("calls"), "{}", run.stderr);
        let there = lines(&run.ok());
        assert_eq!(there[0]["tokens"], here[0]["tokens"]);
        assert_eq!(there[0]["mean_parameters_billions"]["exclusive"], 32.0);
        // What lasts ends the text, or the small model writes on.
        mock.script(|n| (n > 0).then_some(Fault::Status(500)));
        let lasting = [&base[..], &["--large", &spec, "--large-retries", "0", "--no-eager"]].concat();
        let aborted = r2r(&lasting);
        assert_eq!((aborted.code, aborted.stdout.as_str()), (Some(1), ""), "{}", aborted.stderr);
        assert!(aborted.stderr.contains("status 500"), "{}", aborted.stderr);
        mock.script(|n| (n > 0).then_some(Fault::Status(500)));
        let kept = lines(&r2r(&[&lasting[..], &["--on-failure", "keep-small"]].concat()).ok());
        assert!(kept[0]["tokens"].as_array().unwrap().iter().all(|t| t["degraded"] == true));
    }
}

#[test]
fn a_chat_remembers_its_turns() {
    let model = model();
    let args = [
        "chat",
        "--small",
        &model,
        "--large",
        &model,
        "--policy",
        "random",
        "--target-rate",
        "0.5",
        "--max-new-tokens",
        "8",
        "--greedy",
    ];
    let run = r2r_with(&args, "Hello\n/usage\nAnd again\n/reset\nHello\n/nonsense\n/quit\nnever\n");
    assert!(
        run.stderr.contains("of the large model") && run.stderr.contains("/nonsense is no command"),
        "{}",
        run.stderr
    );
    let replies: Vec<String> = run.ok().lines().map(str::to_owned).collect();
    assert!(replies.len() >= 3);
    assert_eq!(r2r_with(&args, "Hello\n").ok().lines().next(), Some(replies[0].as_str()));
}

/// Each wrong input: the exit code, and what the one error names.
#[test]
fn wrong_input_gets_one_error_that_names_it() {
    let (dir, model) = (tempfile::tempdir().unwrap(), model());
    let other = copy();
    edit(&other.path().join("tokenizer.json"), |t| {
        let vocab = t["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["!"].clone(), vocab["\""].clone());
        vocab.insert("!".into(), b);
        vocab.insert("\"".into(), a);
    });
    let other = other.path().to_str().unwrap().to_owned();
    let hash = tokenizer_hash(&kit::tokenizer());
    let made = |hidden, k, hash: Option<&str>| {
        router(dir.path(), hidden, k, hash.map(str::to_owned)).to_str().unwrap().to_owned()
    };
    let (narrow, many) = (made(32, 16, None), made(64, 400, None));
    let good = made(64, 16, Some(&hash));
    let foreign = {
        let folder = dir.path().join("foreign");
        std::fs::create_dir(&folder).unwrap();
        router(&folder, 64, 16, Some("0123".into())).to_str().unwrap().to_owned()
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dead = format!("vllm:http://127.0.0.1:{port}");
    let shifted = Mock::start(Persona { shift: 2, ..Persona::of(Engine::Vllm) }, kit::large());
    let shifted = format!("vllm:{}", shifted.url.clone());
    let pair = ["--small", &model, "--large", &model];
    let empty = dir.path().join("empty.jsonl");
    std::fs::write(&empty, "\n").unwrap();
    let torn = dir.path().join("torn.jsonl");
    std::fs::write(&torn, "{\"prompt\": \"a\"}\n{\"prompt\": 3}\n").unwrap();
    let (empty, torn) = (empty.to_str().unwrap(), torn.to_str().unwrap());
    let cases: Vec<(Vec<&str>, i32, &[&str])> = vec![
        ([&pair[..], &["--prompt", "x"]].concat(), 1, &["--router", "--policy"]),
        ([&pair[..], &["--prompt", "x", "--policy", "neural"]].concat(), 1, &["neural", "--router"]),
        ([&pair[..], &["--prompt", "x", "--policy", "clever"]].concat(), 2, &["clever", "neural"]),
        ([&pair[..], &["--prompt", "x", "--policy", "random"]].concat(), 1, &["target_llm_ratio", "missing"]),
        (
            [&pair[..], &["--prompt", "x", "--router", &good, "--threshold", "7"]].concat(),
            1,
            &["threshold is 7"],
        ),
        (
            [&pair[..], &["--prompt", "x", "--policy", "rolling", "--target-rate", "0.1"]].concat(),
            1,
            &["rolling", "share"],
        ),
        ([&pair[..], &["--prompt", "x", "--router", "nowhere"]].concat(), 1, &["nowhere"]),
        (
            [&pair[..], &["--prompt", "x", "--router", &narrow]].concat(),
            1,
            &["32", "64", "another model's router"],
        ),
        (
            [&pair[..], &["--prompt", "x", "--router", &many]].concat(),
            1,
            &["400", "320", "another model's router"],
        ),
        ([&pair[..], &["--prompt", "x", "--router", &foreign]].concat(), 1, &["0123", "tokenizer"]),
        (
            vec!["--small", &model, "--large", &other, "--prompt", "x", "--policy", "entropy"],
            1,
            &["different tokenizers", "id 0"],
        ),
        (
            vec!["--small", &model, "--large", "nowhere/at/all", "--prompt", "x", "--policy", "entropy"],
            1,
            &["nowhere/at/all"],
        ),
        (
            vec![
                "--small",
                &model,
                "--large",
                &dead,
                "--large-retries",
                "0",
                "--prompt",
                "x",
                "--policy",
                "entropy",
            ],
            1,
            &["cannot be reached"],
        ),
        (
            vec!["--small", &model, "--large", &shifted, "--prompt", "x", "--policy", "entropy"],
            1,
            &["another tokenizer"],
        ),
        (
            vec!["--small", &model, "--large", "ollama:http://x", "--prompt", "x", "--policy", "entropy"],
            2,
            &["ollama", "vllm:URL"],
        ),
        (
            vec!["--small", &model, "--large", "http://x", "--prompt", "x", "--policy", "entropy"],
            2,
            &["vllm:http://x"],
        ),
        (
            [&pair[..], &["--prompt", "x", "--policy", "entropy", "--large-timeout", "0"]].concat(),
            2,
            &["large-timeout"],
        ),
        (
            [&pair[..], &["--prompt", "x", "--policy", "entropy", "--large-connections", "0"]].concat(),
            1,
            &["connections is 0"],
        ),
        ([&pair[..], &["--prompt", "x", "--policy", "entropy", "--sizes", "1"]].concat(), 2, &["1.5,32"]),
        ([&pair[..], &["--prompt", "x", "--policy", "entropy", "--min-p", "0.1"]].concat(), 1, &["--min-p"]),
        ([&pair[..], &["--prompt", " ", "--policy", "entropy"]].concat(), 1, &["prompt 1", "empty"]),
        ([&pair[..], &["--policy", "entropy"]].concat(), 2, &["--input"]),
        ([&pair[..], &["--input", "nowhere.jsonl", "--policy", "entropy"]].concat(), 1, &["nowhere.jsonl"]),
        ([&pair[..], &["--input", empty, "--policy", "entropy"]].concat(), 1, &["has no prompt"]),
        ([&pair[..], &["--input", torn, "--policy", "entropy"]].concat(), 1, &["line 2"]),
        ([&pair[..], &["--prompt", "x", "--policy", "entropy", "--batch", "0"]].concat(), 2, &["at least 1"]),
    ];
    for (args, code, words) in cases {
        let args = [&["generate"][..], &args].concat();
        let run = r2r(&args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(code), ""), "{args:?}: {}", run.stderr);
        let errors = run.stderr.lines().filter(|l| l.starts_with("error: ")).count();
        assert_eq!(errors, 1, "{args:?}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked") && !run.stderr.contains("internal error"), "{}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{args:?} does not say {word}: {}", run.stderr);
        }
    }
    // And the good router writes.
    r2r(&[&["generate"], &pair[..], &["--prompt", "x", "--router", &good, "--max-new-tokens", "3"]].concat())
        .ok();
}
