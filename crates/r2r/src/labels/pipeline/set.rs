//! Labels, read for training.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Kind, Tensor};

use super::LabelError;
use super::shards::{Index, ShardFile};
use super::work::{RUN_FILE, Step, records};
use crate::checkpoint::LabelStatistics;
use crate::training::Rows;
use crate::{Error, Result, RouterConfig};

/// Which column is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelColumn {
    /// The judge's word.
    #[default]
    Divergent,
    /// Whether the models differ at all: the ablation without a judge.
    Mismatch,
}

/// Which documents.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Documents {
    /// All of them.
    All,
    /// Those that are trained on: all but the share that is held out.
    Training {
        /// Share of the documents that is held out.
        held_out: f64,
        /// Seed of the choice.
        seed: u64,
    },
    /// Those that are held out.
    HeldOut {
        /// Their share.
        held_out: f64,
        /// Seed of the choice.
        seed: u64,
    },
}

impl Documents {
    /// Whether a document belongs to them: its own number decides, whatever else there is.
    fn take(self, doc: i64) -> bool {
        let out = |share: f64, seed: u64| {
            let hash = nics_base::hash::bytes([seed.to_le_bytes(), doc.to_le_bytes()].concat());
            let unit = u64::from_str_radix(&hash[..13], 16).unwrap_or_default() as f64 / (1u64 << 52) as f64;
            unit < share
        };
        match self {
            Self::All => true,
            Self::Training { held_out, seed } => !out(held_out, seed),
            Self::HeldOut { held_out, seed } => out(held_out, seed),
        }
    }
}

/// Labelled rows on disk, in the folders of one or more shards.
#[derive(Debug)]
pub struct LabelSet {
    folders: Vec<(PathBuf, Index)>,
    /// The small model's settings when it read: name, tokenizer, identity.
    prefill: Value,
    /// The large model's.
    respond: Value,
}

impl LabelSet {
    /// Opens folders: each one that `label build` filled, or one with the folders of all shards in it.
    ///
    /// # Errors
    /// Labels that are not done, shards that are missing or there twice, or folders that other settings made.
    pub fn open(folders: &[PathBuf]) -> Result<Self> {
        let mut found: Vec<PathBuf> = Vec::new();
        for folder in folders {
            if folder.join(RUN_FILE).is_file() {
                found.push(folder.clone());
            } else {
                found.extend(shards_in(folder)?);
            }
        }
        let mut set = Self { folders: Vec::new(), prefill: Value::Null, respond: Value::Null };
        let mut seen: Vec<String> = Vec::new();
        for folder in found {
            let steps = records(&folder)?;
            let step = |step: Step| {
                steps.get(step.name()).filter(|r| r.done.is_some()).ok_or_else(|| LabelError::NotDone {
                    dir: folder.clone(),
                    step: "train",
                    needs: step.name(),
                })
            };
            let (build, prefill, respond) = (step(Step::Build)?, step(Step::Prefill)?, step(Step::Respond)?);
            if seen.contains(&build.hash) && set.folders.iter().any(|(f, _)| same_file(f, &folder)) {
                return Err(Error::Input(format!("{} is given twice", folder.display())));
            }
            seen.push(build.hash.clone());
            if let Some(done) = &build.done {
                super::work::verify(&folder.join(Step::Build.file()), &done.hash)?;
            }
            if set.prefill.is_null() {
                set.prefill = prefill.settings.clone();
                set.respond = respond.settings.clone();
            } else {
                for field in ["small", "tokenizer", "settings"] {
                    if set.prefill[field] != prefill.settings[field] {
                        return Err(LabelError::OtherConfiguration {
                            dir: folder,
                            step: Step::Prefill.name(),
                            field: format!("`{field}`"),
                            found: prefill.settings[field].to_string(),
                            expected: set.prefill[field].to_string(),
                        }
                        .into());
                    }
                }
            }
            let index = Index::read(&folder.join(Step::Build.file()))?;
            set.folders.push((folder, index));
        }
        Ok(set)
    }

    /// Rows of all files, those that do not count among them.
    pub fn rows(&self) -> u64 {
        self.folders.iter().map(|(_, index)| index.rows()).sum()
    }

    /// The small model's name when it read.
    pub fn small(&self) -> Option<&str> {
        self.prefill["name"].as_str()
    }

    /// The large model's name.
    pub fn large(&self) -> Option<&str> {
        self.respond["name"].as_str()
    }

    /// Hash of the tokenizer.
    pub fn tokenizer_hash(&self) -> Option<&str> {
        self.prefill["tokenizer"].as_str()
    }

    /// The small model's identity when it read.
    pub fn small_identity(&self) -> &Value {
        &self.prefill["small"]
    }

    /// Logits of a position that are kept.
    pub fn top_k(&self) -> Option<i64> {
        self.prefill["settings"]["top_k"].as_i64()
    }

    /// Width of the hidden states that were kept.
    ///
    /// # Errors
    /// A damaged file.
    pub fn hidden(&self) -> Result<i64> {
        for (folder, index) in &self.folders {
            for entry in &index.files {
                if let Some(file) = ShardFile::open(folder, entry)? {
                    return Ok(file.tensor("hidden")?.size2()?.1);
                }
            }
        }
        Err(Error::Input("the labels have no rows".into()))
    }

    /// Reads the rows that count into memory: what a router of `config` takes, hidden states in the dtype in which they are
    /// kept. With the statistics of these rows under `train`, `divergent` and `mismatch`.
    ///
    /// # Errors
    /// [`LabelError::ShardCorrupt`], a router that takes more logits than were kept or hidden states of another width, and
    /// routers over several positions, whose rows do not stand side by side here.
    pub fn read(
        &self,
        config: &RouterConfig,
        column: LabelColumn,
        documents: Documents,
    ) -> Result<(Rows, LabelStatistics)> {
        let kind = config.architecture;
        let k = config.top_k();
        if config.args.logits_size.filter(|_| kind.takes_logits()) != k {
            return Err(Error::setting(
                "architecture",
                kind.name(),
                "one that reads a single position: windows of positions are not labelled",
            ));
        }
        if let (Some(k), Some(kept)) = (k, self.top_k())
            && k > kept
        {
            return Err(Error::setting("top_k", k, format!("at most {kept}, the logits that were kept")));
        }
        let mut parts: [Vec<Tensor>; 5] = Default::default();
        let mut statistics = LabelStatistics::default();
        for (folder, index) in &self.folders {
            for entry in &index.files {
                let Some(file) = ShardFile::open(folder, entry)? else { continue };
                let (divergent, mismatch) = (file.column("divergent")?, file.column("mismatch")?);
                let (mask, docs) = (file.column("mask")?, file.column("doc")?);
                let mut rows: Vec<i64> = Vec::new();
                for i in 0..docs.len() {
                    if mask[i] == 1 && matches!(divergent[i], 0 | 1) && documents.take(docs[i]) {
                        rows.push(i as i64);
                        statistics.train += 1;
                        statistics.divergent += divergent[i] as u64;
                        statistics.mismatch += mismatch[i] as u64;
                    }
                }
                let label: Vec<i64> = rows
                    .iter()
                    .map(|&i| match column {
                        LabelColumn::Divergent => divergent[i as usize],
                        LabelColumn::Mismatch => mismatch[i as usize],
                    })
                    .collect();
                let rows = Tensor::f_from_slice(&rows)?;
                let pick =
                    |name: &str| -> Result<Tensor> { Ok(file.tensor(name)?.f_index_select(0, &rows)?) };
                if kind.takes_hidden() {
                    let hidden = pick("hidden")?;
                    let (width, found) = (config.args.hidden_states_size.unwrap_or(0), hidden.size2()?.1);
                    if width != found {
                        return Err(Error::HiddenSizeMismatch { router: width, slm: found });
                    }
                    parts[0].push(hidden);
                }
                if kind.takes_token() {
                    parts[1].push(pick("token")?.f_to_kind(Kind::Int64)?);
                }
                if let Some(k) = k {
                    parts[2].push(pick("top_logits")?.f_narrow(1, 0, k)?.f_contiguous()?);
                }
                if config.args.use_position_embedding {
                    parts[3].push(pick("pos")?.f_to_kind(Kind::Int64)?);
                }
                parts[4].push(Tensor::f_from_slice(&label)?);
            }
        }
        let [hidden, token, logits, positions, label] = parts;
        if label.is_empty() || statistics.train == 0 {
            return Err(Error::Input(
                "there is no row that counts among these documents; label more queries, or hold out another share".into(),
            ));
        }
        let join = |parts: Vec<Tensor>| -> Result<Option<Tensor>> {
            Ok(if parts.is_empty() { None } else { Some(Tensor::f_cat(&parts, 0)?) })
        };
        let label = Tensor::f_cat(&label, 0)?;
        let rows = Rows::new(join(hidden)?, join(token)?, join(logits)?, join(positions)?, &label)?;
        Ok((rows, statistics))
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b)
}

/// The folders `shard-I-of-N` of a folder: all of one N.
fn shards_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| nics_base::Error::Io { action: "read", path: folder.to_owned(), source };
    let mut found: Vec<(usize, usize, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let numbers = name.strip_prefix("shard-").and_then(|rest| rest.split_once("-of-"));
        if let Some((Ok(i), Ok(n))) = numbers.map(|(i, n)| (i.parse(), n.parse())) {
            found.push((i, n, path));
        }
    }
    found.sort();
    let Some(&(_, count, _)) = found.first() else {
        return Err(Error::Input(format!(
            "{} has neither {RUN_FILE} nor folders of shards: it holds no labels",
            folder.display()
        )));
    };
    let missing = (0..count).find(|i| found.get(*i).is_none_or(|f| (f.0, f.1) != (*i, count)));
    match missing {
        None if found.len() == count => Ok(found.into_iter().map(|f| f.2).collect()),
        _ => Err(Error::Input(format!(
            "{} has {} folders of shards, expected shard-0000 to shard-{:04} of {count} and no others",
            folder.display(),
            found.len(),
            count.saturating_sub(1)
        ))),
    }
}
