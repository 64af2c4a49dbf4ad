//! Wrong prompts, flags, outputs, recipes and data, with a checkpoint that is right.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::Case;
use crate::support::{golden, megrez};

/// A command with the words of `line`, in a folder with the given files. `MODEL` stands for the tiny checkpoint.
fn command(
    what: &'static str,
    code: i32,
    words: &[&'static str],
    files: &'static [(&'static str, &'static str)],
    line: &'static str,
) -> Case {
    let prepare = move |dir: &Path| {
        for (name, text) in files {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        words_of(line)
    };
    Case { what, code, words: words.to_vec(), prepare: Box::new(prepare) }
}

fn words_of(line: &str) -> Command {
    let word = |w: &str| if w == "MODEL" { golden().into_os_string() } else { OsString::from(w) };
    megrez(line.split_whitespace().map(word))
}

/// As [`command`], where the folder needs more than files.
fn prepared(what: &'static str, words: &[&'static str], line: &'static str, prepare: fn(&Path)) -> Case {
    let mut case = command(what, 1, words, &[], line);
    case.prepare = Box::new(move |dir: &Path| {
        prepare(dir);
        words_of(line)
    });
    case
}

pub fn all() -> Vec<Case> {
    [prompts(), outputs(), flags(), recipes(), states(), evaluations()].into_iter().flatten().collect()
}

const INPUT: &str = "generate --model MODEL --greedy --max-new-tokens 2 --input p.jsonl";

fn prompts() -> Vec<Case> {
    let input = |what, words: &[&'static str], files| command(what, 1, words, files, INPUT);
    vec![
        command(
            "empty prompt",
            1,
            &["the prompt is empty"],
            &[("p.txt", " \n")],
            "generate --model MODEL --input p.txt",
        ),
        input(
            "prompt beyond the context",
            &["prompt 2", "the model's context holds 256"],
            &[(
                "p.jsonl",
                concat!(
                    "{\"ids\": [1]}\n",
                    "{\"prompt\": \"0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789\"}"
                ),
            )],
        ),
        input(
            "prompt id outside the vocabulary",
            &["prompt 2", "token 320", "vocabulary of 320"],
            &[("p.jsonl", "{\"ids\": [1]}\n{\"ids\": [5, 320]}")],
        ),
        input("negative prompt id", &["p.jsonl, line 1", "-1"], &[("p.jsonl", "{\"ids\": [-1]}")]),
        input(
            "line that is not JSON",
            &["p.jsonl, line 3"],
            &[("p.jsonl", "{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\n{\"prompt\": \"c\"}")],
        ),
        input(
            "line without a prompt",
            &["prompt 1", "one of `prompt`, `messages` and `ids`"],
            &[("p.jsonl", "{\"id\": 3}")],
        ),
        input(
            "line with two prompts",
            &["prompt 1", "one of `prompt`, `messages` and `ids`"],
            &[("p.jsonl", "{\"prompt\": \"a\", \"ids\": [1]}")],
        ),
        input(
            "line with an unknown field",
            &["p.jsonl, line 1", "`promt`"],
            &[("p.jsonl", "{\"promt\": \"a\"}")],
        ),
        input(
            "empty conversation",
            &["prompt 1", "the conversation is empty"],
            &[("p.jsonl", "{\"messages\": []}")],
        ),
        input(
            "message without a role",
            &["p.jsonl, line 1", "role"],
            &[("p.jsonl", "{\"messages\": [{\"content\": \"a\"}]}")],
        ),
        input("no prompt in the file", &["p.jsonl has no prompt"], &[("p.jsonl", "\n\n")]),
        input("input missing", &["cannot read p.jsonl"], &[]),
        prepared("a folder in the place of the input", &["cannot read p.jsonl", "directory"], INPUT, |dir| {
            std::fs::create_dir(dir.join("p.jsonl")).unwrap();
        }),
        prepared("input behind a dangling link", &["cannot read p.jsonl"], INPUT, |dir| {
            std::os::unix::fs::symlink("gone", dir.join("p.jsonl")).unwrap();
        }),
        prepared("input that is not UTF-8", &["cannot read p.jsonl", "UTF-8"], INPUT, |dir| {
            std::fs::write(dir.join("p.jsonl"), b"{\"prompt\": \"\xff\"}").unwrap();
        }),
    ]
}

fn outputs() -> Vec<Case> {
    const LINE: &str =
        "{\"index\":0,\"id\":0,\"prompt_hash\":\"0\",\"text\":\"\",\"tokens\":[],\"finish\":\"\"}\n";
    let generate = "generate --model MODEL --greedy --max-new-tokens 2 --prompt Hi --out out/r.jsonl";
    vec![
        command("a file in the place of the output's folder", 1, &["out"], &[("out", "a file")], generate),
        prepared("a folder in the place of the output", &["out/r.jsonl"], generate, |dir| {
            std::fs::create_dir_all(dir.join("out/r.jsonl")).unwrap();
        }),
        prepared("output with a corrupt line in the middle", &["out/r.jsonl, line 2"], generate, |dir| {
            std::fs::create_dir(dir.join("out")).unwrap();
            std::fs::write(dir.join("out/r.jsonl"), format!("{LINE}{{\"index\":\n{LINE}")).unwrap();
        }),
        prepared("output of another prompt", &["out/r.jsonl", "another prompt (index 0)"], generate, |dir| {
            std::fs::create_dir(dir.join("out")).unwrap();
            std::fs::write(dir.join("out/r.jsonl"), LINE).unwrap();
        }),
    ]
}

fn flags() -> Vec<Case> {
    let flag = |what, code, words: &[&'static str], line| command(what, code, words, &[], line);
    vec![
        flag(
            "--temperature 999999",
            1,
            &["temperature is 999999", "0 to 100"],
            "generate --model MODEL --prompt Hi --temperature 999999",
        ),
        flag(
            "--temperature nan",
            1,
            &["temperature is NaN", "0 to 100"],
            "generate --model MODEL --prompt Hi --temperature nan",
        ),
        flag(
            "--top-p -1",
            1,
            &["top_p is -1", "above 0 to 1"],
            "generate --model MODEL --prompt Hi --top-p=-1",
        ),
        flag("--min-p 2", 1, &["min_p is 2", "0 to 1"], "generate --model MODEL --prompt Hi --min-p 2"),
        flag(
            "--repetition-penalty 0",
            1,
            &["repetition_penalty is 0"],
            "generate --model MODEL --prompt Hi --repetition-penalty 0",
        ),
        flag(
            "--greedy with --top-k",
            2,
            &["--greedy", "--top-k"],
            "generate --model MODEL --prompt Hi --greedy --top-k 3",
        ),
        flag(
            "--top-k where nothing is drawn",
            1,
            &["--top-k has no effect", "--temperature"],
            "eval --model MODEL --task word-problems --limit 1 --out o --top-k 3",
        ),
        flag(
            "--max-new-tokens 0",
            2,
            &["--max-new-tokens", "at least 1"],
            "generate --model MODEL --prompt Hi --max-new-tokens 0",
        ),
        flag(
            "unknown --weights",
            1,
            &["--weights int3", "shuffle"],
            "generate --model MODEL --prompt Hi --weights int3",
        ),
        flag("unknown --kv", 1, &["--kv tiny", "dense"], "generate --model MODEL --prompt Hi --kv tiny:2bit"),
        flag("unknown --hook", 1, &["--hook fuse"], "generate --model MODEL --prompt Hi --hook fuse"),
        flag(
            "--kv with a setting that it lacks",
            1,
            &["--kv dense", "`4bit`"],
            "generate --model MODEL --prompt Hi --kv dense:4bit",
        ),
        flag(
            "--weights shuffle without a seed",
            1,
            &["shuffle:0", "seed"],
            "generate --model MODEL --prompt Hi --weights shuffle:now",
        ),
        flag(
            "--weights without a name",
            2,
            &["--weights", "NAME:SPEC"],
            "generate --model MODEL --prompt Hi --weights :4bit",
        ),
        flag(
            "CUDA device that is not there",
            1,
            &["CUDA"],
            "generate --model MODEL --prompt Hi --device cuda:99",
        ),
        flag(
            "unknown device",
            2,
            &["\"gpu\"", "cuda:INDEX"],
            "generate --model MODEL --prompt Hi --device gpu",
        ),
        flag("unknown dtype", 2, &["int4", "bf16"], "generate --model MODEL --prompt Hi --dtype int4"),
        flag("--threads 0", 1, &["threads", "0"], "generate --model MODEL --prompt Hi --threads 0"),
    ]
}

const TRAIN: &str = "train --recipe r.toml --out made";

/// A recipe that is right but for what a case changes.
macro_rules! recipe {
    ($source:literal, $start:literal, $train:literal) => {
        concat!("[data]\nsource = ", $source, "\nbatch = 2\n[model.", $start, "\n[train]\n", $train)
    };
    ($start:literal, $train:literal) => {
        recipe!("{ word-problems = { seed = 1 } }", $start, $train)
    };
    ($train:literal) => {
        recipe!(
            "scratch]\nvocab_size = 300\nvocabulary_conversations = 40\nconfig = { hidden_size = 16, \
             intermediate_size = 16, num_hidden_layers = 1, num_attention_heads = 2 }",
            $train
        )
    };
}

fn recipes() -> Vec<Case> {
    const NONE: &str = recipe!(
        "{ conversations = { file = \"c.jsonl\" } }",
        "scratch]\nvocab_size = 300\nvocabulary_conversations = 2\nconfig = { hidden_size = 16, intermediate_size = 16, \
         num_hidden_layers = 1, num_attention_heads = 2 }",
        "steps = 2\nwarmup = 1"
    );
    let train = |what, words: &[&'static str], files| command(what, 1, words, files, TRAIN);
    vec![
        train("recipe missing", &["r.toml"], &[]),
        train("recipe that is not TOML", &["r.toml", "line 1"], &[("r.toml", "[data\n")]),
        train("recipe with an unknown key", &["r.toml", "`stepz`"], &[("r.toml", recipe!("stepz = 9"))]),
        train(
            "recipe of 0 steps",
            &["r.toml", "steps = 0", "at least 1"],
            &[("r.toml", recipe!("steps = 0"))],
        ),
        train(
            "recipe with a learning rate of inf",
            &["r.toml", "lr = inf"],
            &[("r.toml", recipe!("lr = inf"))],
        ),
        train(
            "recipe with a warm-up beyond its end",
            &["r.toml", "warmup"],
            &[("r.toml", recipe!("steps = 5\nwarmup = 9"))],
        ),
        train(
            "recipe with an unknown source",
            &["r.toml", "riddles"],
            &[(
                "r.toml",
                recipe!(
                    "{ riddles = {} }",
                    "scratch]\nvocab_size = 300\nvocabulary_conversations = 2\nconfig = {}",
                    ""
                ),
            )],
        ),
        train(
            "vocabulary too small for the bytes",
            &["vocabulary of 100", "at least 275"],
            &[(
                "r.toml",
                recipe!("scratch]\nvocab_size = 100\nvocabulary_conversations = 9\nconfig = {}", ""),
            )],
        ),
        train(
            "vocabulary too large for the texts",
            &["99981 ordinary entries", "more text"],
            &[(
                "r.toml",
                recipe!("scratch]\nvocab_size = 100000\nvocabulary_conversations = 9\nconfig = {}", ""),
            )],
        ),
        train(
            "recipe without hidden_size",
            &["model.scratch.config", "hidden_size"],
            &[(
                "r.toml",
                recipe!("scratch]\nvocab_size = 300\nvocabulary_conversations = 40\nconfig = {}", ""),
            )],
        ),
        train(
            "base checkpoint missing",
            &["./nowhere"],
            &[("r.toml", recipe!("from]\ncheckpoint = \"./nowhere\"", ""))],
        ),
        train("conversations missing", &["c.jsonl"], &[("r.toml", NONE)]),
        train(
            "conversation without an assistant",
            &["c.jsonl", "line 2", "assistant"],
            &[
                ("r.toml", NONE),
                (
                    "c.jsonl",
                    "{\"conversations\": [{\"role\": \"user\", \"content\": \"1\"}, {\"role\": \"assistant\", \"content\": \
                 \"2\"}]}\n{\"conversations\": [{\"role\": \"user\", \"content\": \"1\"}]}\n",
                ),
            ],
        ),
        train(
            "conversation that is not JSON",
            &["c.jsonl", "line 1"],
            &[("r.toml", NONE), ("c.jsonl", "{]\n")],
        ),
        train(
            "no conversation in the file",
            &["c.jsonl", "no conversation"],
            &[("r.toml", NONE), ("c.jsonl", "")],
        ),
    ]
}

fn states() -> Vec<Case> {
    /// Trains as `r.toml` says, then changes the recipe.
    fn trained(dir: &Path, before: &str, after: &str) {
        std::fs::write(dir.join("r.toml"), before).unwrap();
        let status = words_of("--quiet train --recipe r.toml --out made").current_dir(dir).status().unwrap();
        assert!(status.success());
        std::fs::write(dir.join("r.toml"), after).unwrap();
    }
    const TWO: &str = recipe!("steps = 2\nwarmup = 1");
    vec![
        prepared(
            "state of another recipe",
            &["made.training", "another run", "lr is 0.001", "0.002"],
            TRAIN,
            |dir| {
                trained(dir, TWO, &format!("{TWO}\nlr = 2e-3\n"));
            },
        ),
        prepared("state of other data", &["made.training", "another run", "seed"], TRAIN, |dir| {
            trained(dir, TWO, &TWO.replace("seed = 1", "seed = 2"));
        }),
        prepared(
            "damaged state",
            &["made.training/state.safetensors is damaged", "delete it"],
            TRAIN,
            |dir| {
                trained(dir, TWO, TWO);
                crate::damage::bytes(&dir.join("made.training/state.safetensors"), |b| b.truncate(500));
            },
        ),
        prepared("log with a corrupt line", &["made.training/metrics.jsonl, line 1"], TRAIN, |dir| {
            trained(dir, TWO, TWO);
            std::fs::write(dir.join("made.training/metrics.jsonl"), "{]\n{}\n").unwrap();
        }),
        prepared("a file in the place of the state's folder", &["made.training"], TRAIN, |dir| {
            std::fs::write(dir.join("r.toml"), TWO).unwrap();
            std::fs::write(dir.join("made.training"), "a file").unwrap();
        }),
        prepared("parameters to freeze that are not there", &["freeze", "`model.vision`"], TRAIN, |dir| {
            let start = format!(
                "[model.from]\ncheckpoint = \"{}\"\nfreeze = [\"model.vision\"]\n",
                golden().display()
            );
            let data = "[data]\nsource = { word-problems = { seed = 1 } }\nbatch = 2\n";
            std::fs::write(dir.join("r.toml"), format!("{data}{start}")).unwrap();
        }),
    ]
}

fn evaluations() -> Vec<Case> {
    const GSM8K: &str = "eval --model MODEL --task gsm8k --data d --out o";
    const MMLU: &str = "eval --model MODEL --task mmlu --data d --out o --shots 0";
    let eval = |what, code, words: &[&'static str], files, line| command(what, code, words, files, line);
    let mut cases = vec![
        eval(
            "dataset missing",
            1,
            &["`./nowhere`", "dataset"],
            &[],
            "eval --model MODEL --task gsm8k --data ./nowhere --out o",
        ),
        eval(
            "dataset with nothing in it",
            1,
            &["d has no JSONL, parquet or CSV file"],
            &[("d/README.md", "")],
            GSM8K,
        ),
        eval(
            "dataset row without a field",
            1,
            &["d/test.jsonl, row 2, field answer"],
            &[("d/test.jsonl", "{\"question\": \"1+1\", \"answer\": \"#### 2\"}\n{\"question\": \"1+2\"}\n")],
            GSM8K,
        ),
        eval(
            "dataset answer without a number",
            1,
            &["d/test.jsonl, row 1, field answer"],
            &[("d/test.jsonl", "{\"question\": \"1+1\", \"answer\": \"two\"}\n")],
            GSM8K,
        ),
        eval(
            "dataset row that is not JSON",
            1,
            &["d/test.jsonl", "line 2"],
            &[("d/test.jsonl", "{\"question\": \"1+1\", \"answer\": \"#### 2\"}\n{]\n")],
            GSM8K,
        ),
        eval(
            "answer that is no option",
            1,
            &["row 1, field answer", "E", "A to D"],
            &[("d/test/anatomy_test.csv", "Which is a bone?,Femur,Aorta,Cornea,Bile,E\n")],
            MMLU,
        ),
        eval(
            "unknown subject",
            1,
            &["the split test of alchemy", "anatomy"],
            &[("d/test/anatomy_test.csv", "Which is a bone?,Femur,Aorta,Cornea,Bile,A\n")],
            "eval --model MODEL --task mmlu --data d --out o --shots 0 --subject alchemy",
        ),
        eval(
            "parquet that is none",
            1,
            &["d/main/test-00000-of-00001.parquet is not readable as parquet"],
            &[("d/main/test-00000-of-00001.parquet", "PAR1 or so")],
            GSM8K,
        ),
        eval(
            "question beyond the context",
            1,
            &["gsm8k", "the model's context"],
            &[(
                "d/test.jsonl",
                "{\"question\": \"0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789\", \"answer\": \"#### 2\"}\n",
            )],
            GSM8K,
        ),
        eval(
            "--limit 0",
            1,
            &["--limit is 0"],
            &[],
            "eval --model MODEL --task word-problems --out o --limit 0",
        ),
        eval(
            "--shard 5/4",
            2,
            &["--shard", "5/4", "the last of 4 is 3/4"],
            &[],
            "eval --model MODEL --task word-problems --out o --limit 4 --shard 5/4",
        ),
        eval(
            "result's folder is a file",
            1,
            &["o"],
            &[("o", "a file")],
            "eval --model MODEL --task word-problems --limit 1 --max-new-tokens 2 --out o",
        ),
        eval("items missing", 1, &["cannot read items.jsonl"], &[], "rows items.jsonl --out r.jsonl"),
        eval(
            "no items in the file",
            1,
            &["items.jsonl has no items"],
            &[("items.jsonl", "")],
            "rows items.jsonl --out r.jsonl",
        ),
        eval(
            "items with a corrupt line",
            1,
            &["items.jsonl, line 1"],
            &[("items.jsonl", "{\"index\": 0}\n")],
            "rows items.jsonl --out r.jsonl",
        ),
    ];
    // A batch system that says only half of what a shard needs.
    let mut half = command(
        "a job's index without the number of jobs",
        2,
        &["JOB_COMPLETION_INDEX=1", "JOB_COMPLETIONS"],
        &[],
        "",
    );
    half.prepare = Box::new(|_| {
        let mut command = words_of("eval --model MODEL --task word-problems --out o --limit 4");
        command.env("JOB_COMPLETION_INDEX", "1");
        command
    });
    cases.push(half);
    cases
}
