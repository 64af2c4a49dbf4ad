//! What can be wrong with a checkpoint: a variant for each thing that a caller could act on differently.

use std::path::PathBuf;

use nics_base::hub::HubError;

/// What can be wrong with a checkpoint on disk, with a tensor read from it, or while one is written.
///
/// Messages name the file and the key, what was found, what was expected and, where there is one, the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// There is no folder of that name.
    #[error(
        "{path} is not a folder: give a folder with config.json and weights, or a hub id org/name[@revision]"
    )]
    FolderMissing {
        /// The argument.
        path: PathBuf,
    },
    /// The hub could not deliver the model, or the argument is neither a folder nor a hub id.
    #[error(transparent)]
    Hub(Box<HubError>),
    /// The operating system refused to read a file.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// Something other than a regular file stands where a file is expected.
    #[error("{path} is {found}, expected a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What stands there, e.g. `a folder`.
        found: &'static str,
    },
    /// A file that the caller asked for is not part of the checkpoint.
    #[error("{dir} has no {name}")]
    FileMissing {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The file's name.
        name: String,
    },
    /// A file name that leads out of the checkpoint's folder.
    #[error("the file name {name:?} leads out of the checkpoint {dir}; only plain relative names are read")]
    FileName {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The name as given.
        name: String,
    },
    /// The folder holds no `config.json`.
    #[error("{dir} has no config.json: it is not a checkpoint in the Hugging Face layout")]
    ConfigMissing {
        /// The folder.
        dir: PathBuf,
    },
    /// A JSON file of the checkpoint does not parse, or its top level is not an object.
    #[error("{path} is not valid JSON of the expected form: {detail}")]
    InvalidJson {
        /// The file.
        path: PathBuf,
        /// The parser's word with line and column.
        detail: String,
    },
    /// `config.json` lacks a field.
    #[error("{path} lacks the field {field}")]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Path of the field, e.g. `rope_scaling.factor`.
        field: String,
    },
    /// A field of `config.json` has a type or value that the model does not take.
    #[error("{path}: the field {field} is wrong: {detail}")]
    BadField {
        /// The file.
        path: PathBuf,
        /// Path of the field.
        field: String,
        /// What was found and what was expected.
        detail: String,
    },
    /// A file (or the header of one) exceeds what any sound checkpoint has.
    #[error("{path}: {what} takes {found} bytes, more than the {limit} that are read")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is too large.
        what: &'static str,
        /// Its size in bytes, as declared.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The folder holds a configuration but no weights.
    #[error(
        "{dir} has no weights: expected model.safetensors, or model.safetensors.index.json with its shards"
    )]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// The weights are there only as a Python pickle, which can run code when loaded.
    #[error(
        "{path} is a Python pickle, which is not read; convert it to safetensors: \
         AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
    )]
    PickledWeights {
        /// The pickle.
        path: PathBuf,
    },
    /// A git-lfs pointer lies where the file itself should be.
    #[error("{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A weights file ends before what its header promises.
    #[error("{path} is truncated: {found} bytes, expected {expected} ({what}); download it again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that are needed.
        expected: u64,
        /// What needs them.
        what: &'static str,
    },
    /// The header of a weights file is not what safetensors defines.
    #[error("{path} is not a safetensors file: {detail}")]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A weights file declares more tensors than are read.
    #[error("{path} declares more than {limit} tensors, which are not read")]
    TooManyTensors {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// A tensor has a dtype that safetensors does not define.
    #[error(
        "{path}: tensor {key} has the unknown dtype {found:?}, expected one of F64, F32, F16, BF16, I64, ..."
    )]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// The dtype as written.
        found: String,
    },
    /// A name occurs twice in one header or index.
    #[error("{path}: the key {key} occurs twice")]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// The name.
        key: String,
    },
    /// The entry of a tensor contradicts itself.
    #[error("{path}: the entry of tensor {key} is wrong: {detail}")]
    BadEntry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// What is wrong.
        detail: String,
    },
    /// Two tensors of a file share bytes.
    #[error("{path}: tensor {key} begins at byte {begin} but {other} ends at {end}: the two overlap")]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The later tensor.
        key: String,
        /// The earlier tensor.
        other: String,
        /// Where the later one begins.
        begin: u64,
        /// Where the earlier one ends.
        end: u64,
    },
    /// Bytes of a file belong to no tensor.
    #[error("{path}: bytes {begin}..{end} of the data belong to no tensor (after {after})")]
    Hole {
        /// The file.
        path: PathBuf,
        /// The tensor before the hole, or `the header`.
        after: String,
        /// Where the hole begins.
        begin: u64,
        /// Where it ends.
        end: u64,
    },
    /// The index names a shard that is not there.
    #[error("{index} puts {key} into {shard}, which is not there: download the shard")]
    ShardMissing {
        /// The index.
        index: PathBuf,
        /// The shard's name.
        shard: String,
        /// A tensor that the index puts there.
        key: String,
    },
    /// The index names a shard outside of the checkpoint's folder.
    #[error("{index} puts {key} into {shard:?}: a shard is a plain file name beside the index; refused")]
    ShardPath {
        /// The index.
        index: PathBuf,
        /// The shard as written.
        shard: String,
        /// A tensor that the index puts there.
        key: String,
    },
    /// The index promises a tensor that its shard does not hold.
    #[error("{index} puts {key} into {shard}, but that file does not hold it")]
    KeyNotInShard {
        /// The index.
        index: PathBuf,
        /// The shard's name.
        shard: String,
        /// The tensor.
        key: String,
    },
    /// Two weights files hold a tensor of the same name.
    #[error("tensor {key} is both in {first} and in {second}: which one is meant is undefined")]
    KeyInTwoShards {
        /// The tensor.
        key: String,
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
    /// The checkpoint lacks a tensor that the model needs.
    #[error("{origin} has no tensor {key}{}{}", because_clause(.because), nearest_clause(.nearest))]
    MissingTensor {
        /// Where it was looked for.
        origin: String,
        /// The tensor.
        key: String,
        /// What asks for it, e.g. `config.json (num_hidden_layers 24)`; may be empty.
        because: String,
        /// A name in the checkpoint that resembles it; may be empty.
        nearest: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("{key} in {origin} has shape {found:?}, but {} {expected:?}", asks_clause(.because))]
    WrongShape {
        /// The tensor.
        key: String,
        /// The file that holds it.
        origin: String,
        /// Its shape.
        found: Box<[i64]>,
        /// The shape needed.
        expected: Box<[i64]>,
        /// What asks for it, e.g. `config.json (hidden_size 896)`; may be empty.
        because: String,
    },
    /// A tensor has a dtype that cannot be read as the one needed.
    #[error("{key} in {origin} has dtype {found}, expected {expected}")]
    WrongDtype {
        /// The tensor.
        key: String,
        /// The file that holds it.
        origin: String,
        /// Its dtype.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// A tensor holds NaN or infinity, or a value beyond the range of the dtype asked for.
    #[error(
        "{key} in {origin} has {count} of {total} values that are not finite{}, the first at flat index {first}",
        as_clause(.kind)
    )]
    NotFinite {
        /// The tensor.
        key: String,
        /// The file that holds it.
        origin: String,
        /// How many values are not finite.
        count: u64,
        /// How many values there are.
        total: u64,
        /// Index of the first in row-major order.
        first: u64,
        /// The dtype that overflowed, empty when the file itself holds them.
        kind: String,
    },
    /// A file got shorter after it was opened.
    #[error("{path} shrank from {expected} to {found} bytes while in use: something is rewriting it")]
    Shrunk {
        /// The file.
        path: PathBuf,
        /// Bytes now.
        found: u64,
        /// Bytes when it was opened.
        expected: u64,
    },
    /// A transform put on a [`TensorPath`](super::TensorPath) refused a tensor.
    #[error("the transform of {key} failed: {reason}")]
    Transform {
        /// The tensor.
        key: String,
        /// Its reason.
        reason: String,
    },
    /// libtorch refused to make a tensor, usually for want of memory.
    #[error("libtorch could not hold {key}: {detail}")]
    Torch {
        /// The tensor.
        key: String,
        /// First line of libtorch's message.
        detail: String,
    },
    /// A checkpoint cannot be written as asked.
    #[error("cannot save {path}: {reason}")]
    Unsavable {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file or folder could not be written.
    #[error("cannot save the checkpoint")]
    Artefact(#[from] nics_base::Error),
}

impl From<HubError> for CheckpointError {
    fn from(e: HubError) -> Self {
        Self::Hub(Box::new(e))
    }
}

impl CheckpointError {
    /// Wraps libtorch's refusal; its messages carry a C++ stack trace after their first line.
    pub(super) fn torch(key: &str, e: &tch::TchError) -> Self {
        let detail = e.to_string().lines().next().unwrap_or_default().to_owned();
        Self::Torch { key: key.to_owned(), detail }
    }
}

fn because_clause(because: &str) -> String {
    if because.is_empty() { String::new() } else { format!(", which {because} asks for") }
}

fn nearest_clause(nearest: &str) -> String {
    if nearest.is_empty() { String::new() } else { format!("; the nearest name is {nearest}") }
}

fn asks_clause(because: &str) -> String {
    if because.is_empty() { "the model asks for".to_owned() } else { format!("{because} asks for") }
}

fn as_clause(kind: &str) -> String {
    if kind.is_empty() { String::new() } else { format!(" in {kind}") }
}
