//! What can be wrong with a dataset.

use std::path::PathBuf;

use nics_base::hub::HubError;

/// `Result` with this crate's [`DatasetError`].
pub type Result<T, E = DatasetError> = std::result::Result<T, E>;

/// Why a dataset could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The folder or repository could not be had, or one of its files.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// No file of the dataset holds what was asked for.
    #[error("{source_name} has no JSONL, parquet or CSV file for {wanted}; {found}")]
    NothingFound {
        /// The folder or hub id.
        source_name: String,
        /// Split and subject.
        wanted: String,
        /// What it has instead.
        found: String,
    },
    /// The same part of the dataset is there twice.
    #[error("{source_name} has {wanted} twice, in {first} and {second}; keep one of them")]
    Ambiguous {
        /// The folder or hub id.
        source_name: String,
        /// Split and subject.
        wanted: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// A file cannot be read, or not as what its name says.
    #[error("{} is not readable as {format}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// JSONL, CSV or parquet.
        format: &'static str,
        /// Why not.
        reason: String,
    },
    /// A row lacks a field, or the field is not what it should be.
    #[error("{}, row {row}, field {field}: {reason}", path.display())]
    BadField {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: usize,
        /// The field's name.
        field: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A setting of a generated task that makes no sense.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Its name.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A file without a row.
    #[error("{} has no rows", .0.display())]
    Empty(PathBuf),
}
