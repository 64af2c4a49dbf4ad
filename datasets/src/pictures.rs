//! Images in the rows of a table: where they are, and one row's at a time. A file of a benchmark may hold gigabytes of them.
//!
//! In parquet an image is a struct `{bytes, path}`, a list of such structs, or a path; in JSON Lines a path or `{"path": …}`, or
//! a list of these. Paths are relative to the folder of their file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;

use crate::error::{DatasetError, Result};
use crate::table::unreadable;

/// Values that a column reader holds at once: images are large.
const BATCH: usize = 16;

/// An image as a dataset holds it, not decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picture {
    /// The content of its file.
    Bytes(Vec<u8>),
    /// Its file.
    File(PathBuf),
}

/// Images of the rows of one parquet file, in their order.
pub(crate) struct Pictures {
    path: PathBuf,
    columns: Vec<String>,
    rows: RowIter<'static>,
    /// The row that comes next, from 1.
    next: usize,
}

impl Pictures {
    /// The images in some columns of a file.
    pub fn open(path: &Path, columns: &[String]) -> Result<Self> {
        let rows = guarded(path, || {
            let reader = open(path)?;
            let root = reader.metadata().file_metadata().schema_descr_ptr();
            let root = root.root_schema();
            let fields = root.get_fields().iter().filter(|f| columns.iter().any(|c| c == f.name())).cloned();
            let wanted = group(root, fields.collect())?;
            RowIter::from_file_into(Box::new(reader)).with_batch_size(BATCH).project(Some(wanted))
        })?;
        Ok(Self { path: path.to_owned(), columns: columns.to_vec(), rows, next: 1 })
    }

    /// The images in `columns` of a row, from 1; rows are asked for in their order.
    ///
    /// # Errors
    /// A row that is behind, or an image that is not there.
    pub fn of(&mut self, row: usize, columns: &[String]) -> Result<Vec<Picture>> {
        if row < self.next {
            *self = Self::open(&self.path, &self.columns)?;
        }
        let mut fields = None;
        while self.next <= row {
            let Self { path, rows, next, .. } = self;
            fields = Some(guarded(path, || {
                rows.next().transpose()?.ok_or_else(|| general(&format!("it has no row {next}")))
            })?);
            self.next += 1;
        }
        let fields = fields.map(parquet::record::Row::into_columns).unwrap_or_default();
        let mut found = Vec::new();
        for column in columns {
            let bad = |reason: &str| DatasetError::BadField {
                path: self.path.clone(),
                row,
                field: column.clone(),
                reason: reason.to_owned(),
            };
            let field = fields.iter().find(|(name, _)| name == column).map(|(_, field)| field);
            let folder = self.path.parent().unwrap_or(Path::new(""));
            pictures(field.unwrap_or(&Field::Null), folder, &mut found).map_err(|reason| bad(&reason))?;
        }
        Ok(found)
    }
}

/// Everything in a field of images.
fn pictures(field: &Field, folder: &Path, found: &mut Vec<Picture>) -> Result<(), String> {
    match field {
        Field::ListInternal(list) => list.elements().iter().try_for_each(|f| pictures(f, folder, found)),
        Field::Bytes(bytes) if !bytes.data().is_empty() => {
            found.push(Picture::Bytes(bytes.data().to_vec()));
            Ok(())
        }
        Field::Str(path) => {
            found.push(file(path, folder)?);
            Ok(())
        }
        Field::Group(row) => {
            let of = |name: &str| row.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| field);
            match (of("bytes"), of("path")) {
                (Some(bytes @ Field::Bytes(_)), _) => pictures(bytes, folder, found),
                (_, Some(path @ Field::Str(_))) => pictures(path, folder, found),
                _ => Err("an image without bytes and without a path".into()),
            }
        }
        Field::Null => Err("there is no image".into()),
        Field::Bytes(_) => Err("an image of no bytes".into()),
        other => Err(format!("found {other}, expected an image: bytes and a path")),
    }
}

fn file(path: &str, folder: &Path) -> Result<Picture, String> {
    if path.is_empty() {
        return Err("an image without bytes and without a path".into());
    }
    Ok(Picture::File(folder.join(path)))
}

/// The images that a JSON value names.
pub(crate) fn named(value: &Value, folder: &Path) -> Result<Vec<Picture>, String> {
    match value {
        Value::Null => Err("there is no image".into()),
        Value::String(path) => Ok(vec![file(path, folder)?]),
        Value::Object(fields) => match fields.get("path") {
            Some(Value::String(path)) => Ok(vec![file(path, folder)?]),
            _ => Err("an image without a path".into()),
        },
        Value::Array(all) => {
            let each = all.iter().map(|v| named(v, folder));
            Ok(each.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
        }
        other => Err(format!("found {other}, expected the path of an image")),
    }
}

/// The columns of a parquet file that may hold images, by name.
pub(crate) fn columns(path: &Path, wanted: &[&str]) -> Result<Vec<String>> {
    guarded(path, || {
        let reader = open(path)?;
        let fields = reader.metadata().file_metadata().schema_descr_ptr();
        let fields = fields.root_schema().get_fields().iter().map(|f| f.name().to_owned());
        Ok(fields.filter(|name| wanted.contains(&name.as_str())).collect())
    })
}

/// A schema without raw bytes: what can be read of a table without its images. The paths beside the bytes stay, so that it is
/// known which images are there.
pub(crate) fn without_bytes(root: &Type) -> parquet::errors::Result<Type> {
    let fields = root.get_fields().iter().filter_map(light).collect();
    group(root, fields)
}

fn light(field: &TypePtr) -> Option<TypePtr> {
    if field.is_primitive() {
        let info = field.get_basic_info();
        let text = matches!(
            info.converted_type(),
            ConvertedType::UTF8 | ConvertedType::ENUM | ConvertedType::JSON | ConvertedType::DECIMAL
        ) || matches!(
            info.logical_type_ref(),
            Some(LogicalType::String | LogicalType::Json | LogicalType::Enum)
        );
        return (text || field.get_physical_type() != Physical::BYTE_ARRAY).then(|| Arc::clone(field));
    }
    let fields: Vec<TypePtr> = field.get_fields().iter().filter_map(light).collect();
    if fields.is_empty() {
        return None;
    }
    group(field, fields).ok().map(Arc::new)
}

/// A group with other fields.
fn group(of: &Type, fields: Vec<TypePtr>) -> parquet::errors::Result<Type> {
    let info = of.get_basic_info();
    let mut builder = Type::group_type_builder(of.name())
        .with_converted_type(info.converted_type())
        .with_logical_type(info.logical_type_ref().cloned())
        .with_fields(fields);
    if info.has_repetition() {
        builder = builder.with_repetition(info.repetition());
    }
    builder.build()
}

fn open(path: &Path) -> parquet::errors::Result<SerializedFileReader<File>> {
    SerializedFileReader::new(File::open(path)?)
}

fn general(reason: &str) -> parquet::errors::ParquetError {
    parquet::errors::ParquetError::General(reason.to_owned())
}

/// What the parquet crate gives, its panics on damaged files as errors.
fn guarded<T>(path: &Path, f: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(unreadable(path, "parquet", &e)),
        Err(_) => Err(unreadable(path, "parquet", "its content is damaged")),
    }
}
