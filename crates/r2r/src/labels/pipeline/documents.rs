//! The documents of the features, one after another.

use tch::Tensor;

use super::LabelError;
use super::shards::{Index, ShardFile};
use super::work::{Step, Work};
use crate::Result;
use crate::labels::TokenType;

/// A conversation as the small model read it.
#[derive(Debug, Clone)]
pub struct ReadDocument {
    /// Which one: see [`Response::doc`](super::Response::doc).
    pub doc: usize,
    /// Its first row in its file.
    pub first: usize,
    /// Its tokens.
    pub ids: Vec<i64>,
    /// The small model's likeliest next token after each.
    pub argmax: Vec<i64>,
    /// The part that each belongs to.
    pub types: Vec<TokenType>,
}

/// The documents of one file, without what is wide.
pub fn documents(file: &ShardFile) -> Result<Vec<ReadDocument>> {
    let [ids, argmax, docs, types] = ["ids", "argmax", "doc", "type"].map(|name| file.column(name));
    let (ids, argmax, docs, types) = (ids?, argmax?, docs?, types?);
    let refuse = |reason: &str| {
        let (path, reason) = (file.path().to_owned(), reason.to_owned());
        LabelError::Inconsistent { path, reason }
    };
    if ids.len() != argmax.len() || ids.len() != docs.len() || ids.len() != types.len() {
        return Err(refuse("its columns have different lengths").into());
    }
    let mut all: Vec<ReadDocument> = Vec::new();
    let mut first = 0;
    for chunk in docs.chunk_by(|a, b| a == b) {
        let rows = first..first + chunk.len();
        let kinds = types[rows.clone()].iter().map(|kind| match kind {
            0 => Ok(TokenType::Instruction),
            1 => Ok(TokenType::Reasoning),
            2 => Ok(TokenType::Response),
            _ => Err(refuse("it has a type that is none of 0, 1 and 2")),
        });
        all.push(ReadDocument {
            doc: chunk[0] as usize,
            first,
            ids: ids[rows.clone()].to_vec(),
            argmax: argmax[rows.clone()].to_vec(),
            types: kinds.collect::<Result<_, _>>()?,
        });
        first = rows.end;
    }
    Ok(all)
}

/// What is done with a file: its number, the file, its documents.
pub type EachFile<'a> = dyn FnMut(usize, &ShardFile, Vec<ReadDocument>) -> Result<()> + 'a;

/// Hands the documents of every file to `each`, file by file.
pub fn each_file(work: &Work, each: &mut EachFile) -> Result<()> {
    let index = Index::read(&work.file(Step::Prefill))?;
    for (number, entry) in index.files.iter().enumerate() {
        if let Some(file) = ShardFile::open(work.dir(), entry)? {
            let documents = documents(&file)?;
            each(number, &file, documents)?;
        }
    }
    Ok(())
}

/// Rows of a tensor, by their numbers.
pub(super) fn pick(t: &Tensor, rows: &Tensor) -> Result<Tensor> {
    Ok(t.f_index_select(0, rows)?)
}
