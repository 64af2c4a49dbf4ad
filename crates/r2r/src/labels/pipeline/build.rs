//! Step 4: the judge's word becomes the labels of rows.

use std::iter::Peekable;

use serde_json::json;
use tch::Tensor;

use super::LabelError;
use super::documents::{ReadDocument, documents, pick};
use super::judging::JudgedLine;
use super::lines::Lines;
use super::shards::{Index, ShardEntry, ShardFile, file_name, write};
use super::work::{Step, Watch, Work};
use crate::labels::{Label, Score, assemble};
use crate::{Error, Result};

/// Joins features and scores and writes `labels-NNNN.safetensors`, a file for each file of features, with their
/// `labels.json`. Gives how many rows there are. Documents without a mismatch are left out.
///
/// # Columns
/// `doc`, `pos`, `type`, `ids` (the token at the row), `real` (the next one, -1 at the end), `token` (the small model's
/// choice for it), `hidden`, `top_logits`, `top_index`, `divergent` (1, 0, or -1 where the judge could not tell), `mismatch`,
/// `mask` (whether the row counts: it belongs to thinking or answer).
///
/// # Errors
/// Those of [`Work::begin`], damaged files, and no row at all.
pub fn build(work: &mut Work, watch: &mut Watch) -> Result<u64> {
    if work.begin(Step::Build, json!({}))? {
        return Ok(work.done(Step::Build).map_or(0, |d| d.records));
    }
    let features = Index::read(&work.file(Step::Prefill))?;
    let path = work.file(Step::Build);
    let mut index = Index::read(&path)?;
    let done = index.files.len();
    watch.at(Step::Build, done, features.files.len());
    let mut judged =
        Lines::<JudgedLine>::open(&work.file(Step::Judge))?.skip(index.consumed() as usize).peekable();
    for (number, entry) in features.files.iter().enumerate().skip(done) {
        watch.check()?;
        let built = match ShardFile::open(work.dir(), entry)? {
            Some(file) => one(work, number, &file, &mut judged)?,
            None => ShardEntry { file: None, rows: 0, documents: 0, hash: String::new(), consumed: 0 },
        };
        index.files.push(built);
        index.write(&path)?;
        watch.at(Step::Build, number + 1, features.files.len());
    }
    let left = work.done(Step::Judge).map_or(0, |d| d.records) - index.consumed();
    if left > 0 {
        let reason = format!("{left} of its verdicts are of no document");
        return Err(LabelError::Inconsistent { path: work.file(Step::Judge), reason }.into());
    }
    if index.rows() == 0 {
        return Err(Error::Input("the models differ nowhere, so there is nothing to label".into()));
    }
    work.end(Step::Build, index.rows())?;
    Ok(index.rows())
}

type Verdicts = Peekable<std::iter::Skip<Lines<JudgedLine>>>;

fn one(work: &Work, number: usize, file: &ShardFile, judged: &mut Verdicts) -> Result<ShardEntry> {
    let (mut kept, mut consumed): (Vec<(ReadDocument, Vec<Label>)>, u64) = (Vec::new(), 0);
    for document in documents(file)? {
        let mut scores = Vec::new();
        while let Some(line) = judged.next_if(|l| l.as_ref().map_or(true, |l| l.doc == document.doc)) {
            let line = line?;
            scores.push(Score { position: line.position, score: line.score });
            consumed += 1;
        }
        if let Some(labels) = assemble(&document.types, &scores)? {
            kept.push((document, labels));
        }
    }
    let documents = kept.len() as u64;
    if kept.is_empty() {
        return Ok(ShardEntry { file: None, rows: 0, documents, hash: String::new(), consumed });
    }
    let rows: Vec<i64> =
        kept.iter().flat_map(|(d, _)| d.first as i64..(d.first + d.ids.len()) as i64).collect();
    let rows = Tensor::f_from_slice(&rows)?;
    let stored = |name: &str| pick(&file.tensor(name)?, &rows);
    let labels = || kept.iter().flat_map(|(_, labels)| labels);
    let real: Vec<i32> =
        kept.iter().flat_map(|(d, _)| d.ids.iter().skip(1).map(|&id| id as i32).chain([-1])).collect();
    let divergent: Vec<i8> = labels().map(|l| l.divergent as i8).collect();
    let mismatch: Vec<u8> = labels().map(|l| u8::from(l.mismatch)).collect();
    let mask: Vec<u8> = labels().map(|l| u8::from(l.mask)).collect();
    let name = file_name("labels", number);
    let tensors = [
        ("doc", stored("doc")?),
        ("pos", stored("pos")?),
        ("type", stored("type")?),
        ("ids", stored("ids")?),
        ("real", Tensor::f_from_slice(&real)?),
        ("token", stored("argmax")?),
        ("hidden", stored("hidden")?),
        ("top_logits", stored("top_logits")?),
        ("top_index", stored("top_index")?),
        ("divergent", Tensor::f_from_slice(&divergent)?),
        ("mismatch", Tensor::f_from_slice(&mismatch)?),
        ("mask", Tensor::f_from_slice(&mask)?),
    ];
    let hash = write(&work.path(&name), &tensors)?;
    Ok(ShardEntry { file: Some(name), rows: mask.len() as u64, documents, hash, consumed })
}
