//! What can go wrong in making labels, beside models and files.

use std::path::PathBuf;

/// What can go wrong in making labels.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// A file is not what was written.
    #[error(
        "{} is damaged: its hash is {found}, {expected} was written; delete the step's entry in run.json with its files to \
         make them again",
        path.display()
    )]
    ShardCorrupt {
        /// The file.
        path: PathBuf,
        /// Its hash, or what is wrong with it.
        found: String,
        /// The hash that its index has.
        expected: String,
    },
    /// A folder holds what other settings made.
    #[error(
        "{} holds the `{step}` of another run: its {field} is {found}, now it is {expected}; choose another folder, or delete \
         this one to start again",
        dir.display()
    )]
    OtherConfiguration {
        /// The folder.
        dir: PathBuf,
        /// The step.
        step: &'static str,
        /// The first setting that differs.
        field: String,
        /// Its value there.
        found: String,
        /// Its value now.
        expected: String,
    },
    /// A step needs what an earlier one makes.
    #[error("{}: `{step}` needs the whole of `{needs}`, which is not done; run it first", dir.display())]
    NotDone {
        /// The folder.
        dir: PathBuf,
        /// The step.
        step: &'static str,
        /// The one before.
        needs: &'static str,
    },
    /// A query that makes no sense.
    #[error("{}, line {line}: {reason}", path.display())]
    Query {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A text holds tokens that a model does not have.
    #[error(
        "document {document} holds token {token}, the small model has {vocab} tokens: the models of a pair need one \
         vocabulary"
    )]
    VocabTooSmall {
        /// The document.
        document: usize,
        /// The token.
        token: i64,
        /// Rows of the model's table.
        vocab: i64,
    },
    /// The models of a pair have different tokenizers.
    #[error(
        "the models have different tokenizers: token {id} is {small} for the small one and {large} for the large one; a pair \
         needs one tokenizer"
    )]
    OtherTokenizer {
        /// The first token that differs.
        id: u32,
        /// What it is for the small model.
        small: String,
        /// What it is for the large model.
        large: String,
    },
    /// The least that a step needs is more than it may have.
    #[error("the memory limit of {limit} MiB is too low: {what} takes {need} MiB at least")]
    MemoryLimit {
        /// The limit.
        limit: usize,
        /// What is needed.
        need: usize,
        /// For what.
        what: String,
    },
    /// Files of a folder contradict each other.
    #[error("{}: {reason}; delete the folder to start again", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}
