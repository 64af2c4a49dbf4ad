//! Step 3: a judge compares.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::LabelError;
use super::continuation::Continued;
use super::documents::each_file;
use super::lines::{Lines, Log};
use super::work::{Step, Watch, Work};
use crate::Result;
use crate::labels::judges::{Judge, Pair, Verdict};

/// A line of `judged.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgedLine {
    /// The document.
    pub doc: usize,
    /// The predicted position.
    pub position: usize,
    /// 1 the difference matters, 0 it does not, -1 the judge cannot tell.
    pub score: i64,
    /// What the judge said; absent where it says nothing, or has said it before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// Hash of what it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_hash: Option<String>,
}

/// Pairs that wait for their verdicts, with document and position.
#[derive(Default)]
struct Waiting {
    pairs: Vec<Pair>,
    places: Vec<(usize, usize)>,
}

impl Waiting {
    fn judge(&mut self, judge: &mut dyn Judge, log: &mut Log) -> Result<()> {
        let mut verdicts = Vec::new();
        let result = judge.judge(&self.pairs, &mut verdicts);
        let line = |((doc, position), verdict): (&(usize, usize), Verdict)| JudgedLine {
            doc: *doc,
            position: *position,
            score: verdict.score,
            reply: verdict.reply,
            prompt_hash: verdict.prompt_hash,
        };
        let lines: Vec<JudgedLine> = self.places.iter().zip(verdicts).map(line).collect();
        // What a server answered before it failed is kept.
        log.append(&lines)?;
        result?;
        self.pairs.clear();
        self.places.clear();
        Ok(())
    }
}

/// Lets a judge compare the branches of every mismatch and writes `judged.jsonl`: a line a mismatch. Gives how many there
/// are.
///
/// # Errors
/// Those of [`Work::begin`] and of the judge; the verdicts before are kept, and the next run goes on with what is missing.
pub fn judge(work: &mut Work, judge: &mut dyn Judge, watch: &mut Watch) -> Result<u64> {
    let identity = json!({ "judge": judge.identity() });
    if work.begin(Step::Judge, identity)? {
        return Ok(work.done(Step::Judge).map_or(0, |d| d.records));
    }
    let all = work.done(Step::Continue).map_or(0, |d| d.records as usize);
    let path = work.file(Step::Judge);
    let mut log = Log::open(&path)?;
    if log.lines() < all {
        let unit = judge.unit().max(1);
        log.keep(log.lines() / unit * unit)?;
    }
    for line in Lines::<JudgedLine>::open(&path)? {
        let line = line?;
        if let Some(hash) = &line.prompt_hash {
            judge.remember(hash, line.score);
        }
    }
    let done = log.lines();
    watch.at(Step::Judge, done, all);
    let mut mismatches = Lines::<Continued>::open(&work.file(Step::Continue))?.skip(done).peekable();
    let mut waiting = Waiting::default();
    let batch = judge.batch().max(1);
    each_file(work, &mut |_, _, documents| {
        for document in &documents {
            let of_this = |line: &Result<Continued>| line.as_ref().map_or(true, |m| m.doc == document.doc);
            while let Some(mismatch) = mismatches.next_if(of_this) {
                let mismatch = mismatch?;
                waiting.places.push((mismatch.doc, mismatch.position));
                waiting.pairs.push(pair(&mismatch, &document.ids).ok_or_else(|| {
                    let reason = format!("document {} has no position {}", mismatch.doc, mismatch.position);
                    LabelError::Inconsistent { path: work.file(Step::Continue), reason }
                })?);
                if waiting.pairs.len() == batch {
                    watch.check()?;
                    waiting.judge(judge, &mut log)?;
                    watch.at(Step::Judge, log.lines(), all);
                }
            }
        }
        Ok(())
    })?;
    if !waiting.pairs.is_empty() {
        waiting.judge(judge, &mut log)?;
    }
    watch.at(Step::Judge, log.lines(), all);
    if log.lines() != all {
        let reason = format!("it has {} lines, there are {all} mismatches", log.lines());
        return Err(LabelError::Inconsistent { path, reason }.into());
    }
    log.sync()?;
    work.end(Step::Judge, log.lines() as u64)?;
    Ok(log.lines() as u64)
}

fn pair(mismatch: &Continued, ids: &[i64]) -> Option<Pair> {
    let narrow = |ids: &[i64]| -> Vec<u32> { ids.iter().map(|&id| id as u32).collect() };
    if mismatch.position == 0 || mismatch.position >= ids.len() {
        return None;
    }
    Some(Pair {
        context: narrow(&ids[..mismatch.position]),
        small: mismatch.small as u32,
        large: mismatch.real as u32,
        small_continuation: narrow(&mismatch.continuation),
        large_continuation: narrow(&mismatch.reference),
        written: Some(narrow(&ids[mismatch.position..])),
    })
}
