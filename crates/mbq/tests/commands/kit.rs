//! Tiny checkpoints with a tokenizer and a chat template, captions for them, and the binary.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// How a process ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// The standard output of what has to have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// What has to have failed with a code, in one line.
    #[track_caller]
    pub fn refused(self, code: i32, says: &str) {
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert!(self.err.contains(says), "{says:?} is not in: {}", self.err);
        assert_eq!(self.err.lines().filter(|l| l.starts_with("error:")).count(), 1, "{}", self.err);
    }
}

pub fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mbq"));
    let foreign = ["SLURM_", "JOB_COMPLETION", "NICS_", "HF_", "RUST_BACKTRACE"];
    for (name, _) in std::env::vars_os() {
        if foreign.iter().any(|f| name.to_string_lossy().starts_with(f)) {
            command.env_remove(name);
        }
    }
    command.args(args).env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    let ran = command(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: ran.status.code(), out: text(ran.stdout), err: text(ran.stderr) }
}

/// A family: its folder of the fixtures, and the tokens that its prompts need.
pub struct Family {
    pub name: &'static str,
    tokens: &'static [(&'static str, u32)],
    /// What its template writes for an image; none where it knows texts alone.
    marker: Option<&'static str>,
    picture: &'static str,
}

pub const FAMILIES: [Family; 4] = [
    Family {
        name: "llava",
        tokens: &[("<image>", 95), ("<|im_start|>", 91), ("<|im_end|>", 90)],
        marker: Some("<image>"),
        picture: "small.png",
    },
    Family {
        name: "llava-onevision",
        tokens: &[("<image>", 95), ("<|im_start|>", 91), ("<|im_end|>", 90)],
        marker: Some("<image>"),
        picture: "tall.png",
    },
    Family {
        name: "qwen2-vl",
        tokens: &[
            ("<|image_pad|>", 95),
            ("<|vision_start|>", 93),
            ("<|vision_end|>", 92),
            ("<|im_start|>", 91),
            ("<|im_end|>", 90),
        ],
        marker: Some("<|vision_start|><|image_pad|><|vision_end|>"),
        picture: "wide.png",
    },
    Family {
        name: "internvl2",
        tokens: &[
            ("<IMG_CONTEXT>", 95),
            ("<img>", 93),
            ("</img>", 92),
            ("<|im_start|>", 91),
            ("<|im_end|>", 90),
        ],
        marker: None,
        picture: "square.png",
    },
];

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/vision").join(name)
}

impl Family {
    /// A checkpoint.
    pub fn model(&self, dir: &Path) -> PathBuf {
        let (from, to) = (fixtures(self.name), dir.join(self.name));
        std::fs::create_dir(&to).unwrap();
        for file in ["config.json", "model.safetensors", "preprocessor_config.json"] {
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
        let mut vocab: serde_json::Map<String, Value> =
            (0..90).map(|i| (format!("w{i}"), json!(i))).collect();
        let mut added = Vec::new();
        let mut listed = serde_json::Map::new();
        for (token, id) in self.tokens {
            vocab.insert((*token).to_owned(), json!(id));
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}));
            listed.insert(id.to_string(), json!({"content": token, "special": true}));
        }
        let tokenizer = json!({
            "version": "1.0", "added_tokens": added, "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
        });
        std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let content = match self.marker {
            None => "{{ m.content }}".to_owned(),
            Some(marker) => format!(
                "{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for p in m.content %}}\
                 {{% if p.type == 'image' %}}{marker} {{% else %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
            ),
        };
        let template = format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}} {content} <|im_end|>{{% endfor %}}\
             {{% if add_generation_prompt %}}<|im_start|>assistant {{% endif %}}"
        );
        let config = json!({"chat_template": template, "added_tokens_decoder": listed});
        std::fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
        to
    }

    /// Its picture.
    pub fn image(&self) -> PathBuf {
        fixtures(self.name).join(self.picture)
    }

    /// Captions of its picture, the last of text alone.
    pub fn captions(&self, dir: &Path) -> PathBuf {
        let line = |i: usize| {
            let said = |from: usize, n: usize| {
                (from..from + n).map(|w| format!("w{}", w * 7 % 90)).collect::<Vec<_>>().join(" ")
            };
            json!({"id": i, "image": fixtures(self.name).join(self.picture), "conversations": [
                {"from": "human", "value": format!("<image>\n{}", said(i, 3))},
                {"from": "gpt", "value": said(i + 20, 4 + i)},
            ]})
        };
        let mut items: Vec<Value> = (0..4).map(line).collect();
        items[3].as_object_mut().unwrap().remove("image");
        let path = dir.join(format!("{}.jsonl", self.name));
        let lines: Vec<String> = items.iter().map(Value::to_string).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        path
    }
}

/// Arguments as strings, from anything that shows itself as one.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(std::ffi::OsString::from(AsRef::<std::ffi::OsStr>::as_ref(&$arg))),*] };
}
