//! Wrong checkpoints: where they are, what is in their files.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::Case;
use crate::damage::{WEIGHTS, bytes, header, shards};
use crate::support::{copy, edit, megrez};

/// `generate` with a model of this name.
fn generate(model: &str) -> Command {
    megrez(["generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "2"])
}

/// The tiny checkpoint in folder `m`, changed by `damage`.
fn damaged(what: &'static str, words: &[&'static str], damage: fn(&Path)) -> Case {
    let prepare = move |dir: &Path| {
        let model = dir.join("m");
        std::fs::rename(copy().keep(), &model).unwrap();
        damage(&model);
        generate("m")
    };
    Case { what, code: 1, words: words.to_vec(), prepare: Box::new(prepare) }
}

/// As [`damaged`], in `config.json` alone.
fn config(what: &'static str, words: &[&'static str], change: fn(&mut Value)) -> Case {
    let mut case = damaged(what, words, |_| {});
    case.prepare = Box::new(move |dir: &Path| {
        let model = dir.join("m");
        std::fs::rename(copy().keep(), &model).unwrap();
        edit(&model.join("config.json"), change);
        generate("m")
    });
    case
}

/// A model of this name, with these variables.
fn named(
    what: &'static str,
    code: i32,
    words: &[&'static str],
    model: &'static str,
    variables: &'static [(&'static str, &'static str)],
) -> Case {
    let prepare = move |dir: &Path| {
        let mut command = generate(model);
        command.env("HF_HOME", dir.join("cache")).envs(variables.iter().copied());
        command
    };
    Case { what, code, words: words.to_vec(), prepare: Box::new(prepare) }
}

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).unwrap();
}

fn remove(dir: &Path, name: &str) {
    std::fs::remove_file(dir.join(name)).unwrap();
}

fn template(dir: &Path, template: &str) {
    edit(&dir.join("tokenizer_config.json"), |c| c["chat_template"] = template.into());
}

pub fn all() -> Vec<Case> {
    [places(), weights(), indices(), configurations(), tokenizers()].into_iter().flatten().collect()
}

fn places() -> Vec<Case> {
    vec![
        named("folder missing", 1, &["`./nowhere`", "no such folder", "hub id org/name"], "./nowhere", &[]),
        named("neither a folder nor a hub id", 1, &["`a/b/c`", "hub id org/name[@revision]"], "a/b/c", &[]),
        named(
            "hub id, offline and not cached",
            1,
            &["config.json of org/name", "main", "HF_HUB_OFFLINE"],
            "org/name",
            &[("HF_HUB_OFFLINE", "1")],
        ),
        named(
            "hub that does not answer",
            75,
            &["cannot reach http://127.0.0.1:9", "org/name", "HF_ENDPOINT"],
            "org/name",
            &[("HF_ENDPOINT", "http://127.0.0.1:9")],
        ),
        named(
            "hub address that is none",
            1,
            &["HF_ENDPOINT is `ftp://hub`", "http://"],
            "org/name",
            &[("HF_ENDPOINT", "ftp://hub")],
        ),
        damaged("a file in the place of the folder", &["`m`", "it is a file"], |m| {
            std::fs::remove_dir_all(m).unwrap();
            std::fs::write(m, "weights").unwrap();
        }),
    ]
}

fn weights() -> Vec<Case> {
    const LM_HEAD: &str = "lm_head.weight";
    const EMBED: &str = "model.embed_tokens.weight";
    vec![
        damaged(
            "truncated safetensors",
            &["m/model.safetensors is truncated: 300000 bytes", "512760"],
            |m| {
                bytes(&m.join(WEIGHTS), |b| b.truncate(300_000));
            },
        ),
        damaged("safetensors of 3 bytes", &["m/model.safetensors is truncated: 3 bytes"], |m| {
            bytes(&m.join(WEIGHTS), |b| b.truncate(3));
        }),
        damaged("corrupt header", &["m/model.safetensors", "at line 1 column"], |m| {
            bytes(&m.join(WEIGHTS), |b| b[20..400].fill(b'#'));
        }),
        damaged("header length of 2^63", &["m/model.safetensors", "9223372036854775808"], |m| {
            bytes(&m.join(WEIGHTS), |b| b[..8].copy_from_slice(&(1u64 << 63).to_le_bytes()));
        }),
        damaged("overlapping tensors", &["m/model.safetensors", EMBED, LM_HEAD, "overlap"], |m| {
            header(&m.join(WEIGHTS), |h| h[EMBED]["data_offsets"] = json!([81_900, 163_820]));
        }),
        damaged(
            "bytes of no tensor",
            &["m/model.safetensors", "81920..163840", "belong to no tensor"],
            |m| {
                header(&m.join(WEIGHTS), |h| drop(h.remove(EMBED)));
            },
        ),
        damaged("offsets that contradict the shape", &["m/model.safetensors", LM_HEAD], |m| {
            header(&m.join(WEIGHTS), |h| h[LM_HEAD]["shape"] = json!([320, 63]));
        }),
        damaged("unknown dtype", &["m/model.safetensors", LM_HEAD, "\"F31\""], |m| {
            header(&m.join(WEIGHTS), |h| h[LM_HEAD]["dtype"] = "F31".into());
        }),
        damaged("integer weights", &[LM_HEAD, "m/model.safetensors", "dtype I32"], |m| {
            header(&m.join(WEIGHTS), |h| h[LM_HEAD]["dtype"] = "I32".into());
        }),
        damaged(
            "wrong tensor shape",
            &[LM_HEAD, "m/model.safetensors", "[64, 320]", "config.json (hidden_size 64", "[320, 64]"],
            |m| {
                header(&m.join(WEIGHTS), |h| h[LM_HEAD]["shape"] = json!([64, 320]));
            },
        ),
        damaged("missing tensor", &["m has no tensor model.norm.weight", "config.json"], |m| {
            header(&m.join(WEIGHTS), |h| {
                let norm = h.remove("model.norm.weight").unwrap();
                h.insert("model.norms.weight".into(), norm);
            });
        }),
        damaged(
            "weights that are not numbers",
            &["m/model.safetensors", "not finite", "the first at"],
            |m| {
                bytes(&m.join(WEIGHTS), |b| {
                    let end = b.len();
                    b[end - 64..end - 60].copy_from_slice(&f32::NAN.to_le_bytes());
                });
            },
        ),
        damaged("a Python pickle alone", &["m/pytorch_model.bin is a Python pickle", "safetensors"], |m| {
            std::fs::rename(m.join(WEIGHTS), m.join("pytorch_model.bin")).unwrap();
        }),
        damaged("no weights at all", &["m has no weights", "model.safetensors"], |m| remove(m, WEIGHTS)),
        damaged("a git-lfs pointer", &["m/model.safetensors is a git-lfs pointer", "git lfs pull"], |m| {
            let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 512760\n";
            write(m, WEIGHTS, pointer);
        }),
        damaged("a folder in the place of the weights", &["m/model.safetensors is a folder"], |m| {
            remove(m, WEIGHTS);
            std::fs::create_dir(m.join(WEIGHTS)).unwrap();
        }),
        damaged("a dangling link to the weights", &["cannot read m/model.safetensors"], |m| {
            remove(m, WEIGHTS);
            std::os::unix::fs::symlink("blobs/gone", m.join(WEIGHTS)).unwrap();
        }),
    ]
}

fn indices() -> Vec<Case> {
    const INDEX: &str = "m/model.safetensors.index.json";
    vec![
        damaged(
            "missing shard",
            &[INDEX, "lm_head.weight", "model-00002-of-00002.safetensors", "not there"],
            |m| shards(m, |map| map["lm_head.weight"] = "model-00002-of-00002.safetensors".into()),
        ),
        damaged("`../` in an index", &[INDEX, "lm_head.weight", "../m/model.safetensors", "refused"], |m| {
            shards(m, |map| map["lm_head.weight"] = "../m/model.safetensors".into());
        }),
        damaged("index key that its shard lacks", &[INDEX, "extra.weight", "does not hold it"], |m| {
            shards(m, |map| {
                drop(map.insert("extra.weight".into(), "model-00001-of-00002.safetensors".into()));
            });
        }),
        damaged("index that is not JSON", &[INDEX, "not valid JSON"], |m| {
            shards(m, |_| {});
            write(m, "model.safetensors.index.json", "{\"weight_map\": ");
        }),
    ]
}

fn configurations() -> Vec<Case> {
    const FILE: &str = "m/config.json";
    /// What is said of quantized weights by a binary that reads none, and by one that misses their groups.
    const QUANTIZED: &[&str] = if cfg!(feature = "with-mbq") {
        &[FILE, "quantization_config", "group_size"]
    } else {
        &[FILE, "quantized (gptq)", "original checkpoint"]
    };
    vec![
        damaged("config.json missing", &["m has no config.json"], |m| remove(m, "config.json")),
        damaged("config.json is not JSON", &[FILE, "line 1 column 19"], |m| {
            write(m, "config.json", "{\"hidden_size\": 6,,}");
        }),
        config("config.json without hidden_size", &[FILE, "hidden_size"], |c| {
            c.as_object_mut().unwrap().remove("hidden_size");
        }),
        config("hidden_size in words", &[FILE, "`hidden_size`", "many"], |c| {
            c["hidden_size"] = "many".into();
        }),
        config("hidden_size negative", &[FILE, "`hidden_size` is -64"], |c| c["hidden_size"] = json!(-64)),
        config("heads no multiple of key heads", &[FILE, "`num_attention_heads` 8", "3"], |c| {
            c["num_key_value_heads"] = json!(3);
        }),
        config("more layers than the weights have", &["model.layers.3.", "num_hidden_layers 1000"], |c| {
            c["num_hidden_layers"] = json!(1_000);
        }),
        config("a million million layers", &[FILE, "`num_hidden_layers` is 1000000000000"], |c| {
            c["num_hidden_layers"] = json!(1_000_000_000_000_u64);
        }),
        config("unknown architecture", &[FILE, "`MambaForCausalLM`", "LlamaForCausalLM"], |c| {
            c["architectures"] = json!(["MambaForCausalLM"]);
        }),
        config(
            "the mixture of experts",
            &[FILE, "`MegrezMoeForCausalLM`", "mixture-of-experts Megrez2"],
            |c| {
                c["architectures"] = json!(["MegrezMoeForCausalLM"]);
            },
        ),
        config("no architecture", &[FILE, "architectures"], |c| c["architectures"] = json!([])),
        config("quantized weights", QUANTIZED, |c| {
            c["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
        }),
        config("unknown rope type", &[FILE, "longrope"], |c| {
            c["rope_scaling"] = json!({"rope_type": "longrope", "factor": 4.0});
        }),
        config("rope scaling without its factor", &[FILE, "`factor`"], |c| {
            c["rope_scaling"] = json!({"rope_type": "linear"});
        }),
        config("unknown activation", &[FILE, "`hidden_act` is `gelu`", "silu"], |c| {
            c["hidden_act"] = "gelu".into();
        }),
        damaged("generation_config.json is not JSON", &["m/generation_config.json", "JSON"], |m| {
            write(m, "generation_config.json", "do_sample: true");
        }),
    ]
}

fn tokenizers() -> Vec<Case> {
    vec![
        damaged("tokenizer.json missing", &["m has no tokenizer.json", "save_pretrained"], |m| {
            remove(m, "tokenizer.json");
        }),
        damaged("tokenizer.json is not JSON", &["m/tokenizer.json", "line 1"], |m| {
            write(m, "tokenizer.json", "<html>");
        }),
        damaged("tokenizer.json describes no tokenizer", &["m/tokenizer.json is not a tokenizer"], |m| {
            write(m, "tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"Magic\"}}");
        }),
        damaged("more tokens than vocab_size", &["m: tokenizer.json has 4", "vocab_size of 320"], |m| {
            edit(&m.join("tokenizer.json"), |t| {
                let added = t["added_tokens"].as_array_mut().unwrap();
                let first = 1 + added.iter().map(|t| t["id"].as_u64().unwrap()).max().unwrap();
                for id in first..420 {
                    let mut token = added[0].clone();
                    token["id"] = id.into();
                    token["content"] = format!("<|more-{id}|>").into();
                    added.push(token);
                }
            });
        }),
        damaged("template with a wrong syntax", &["chat template", "line 1"], |m| {
            template(m, "{% for message in messages %}{{ message.content }}");
        }),
        damaged("template that refuses", &["chat template refuses", "roles must alternate"], |m| {
            template(m, "{{ raise_exception('roles must alternate') }}");
        }),
        damaged("template that fails", &["chat template fails", "line 2"], |m| {
            template(m, "one\n{{ messages[0].content.shout() }}");
        }),
        damaged("template without an end", &["chat template fails", "fuel"], |m| {
            template(
                m,
                "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}",
            );
        }),
        damaged("template that says nothing", &["prompt 1", "empty"], |m| template(m, "{# nothing #}")),
        damaged("template of another form", &["chat_template in", "7"], |m| {
            edit(&m.join("tokenizer_config.json"), |c| c["chat_template"] = json!(7));
        }),
    ]
}
