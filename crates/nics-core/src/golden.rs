//! Reading the fixtures that parity tests hold the project against.
//!
//! A folder of fixtures holds cases of some kinds, one file per case: `KIND.json` or `KIND.safetensors`, or
//! `KIND-anything.…` for several cases of a kind, with parameters in the case's JSON or in the folder's `params.json`.
//! Tests read the crate's `tests/golden`, or the folder that the variable `NICS_GOLDEN` names; nothing about a case is
//! written into a test. A case of a kind that a test does not know fails it, so that no case is passed over in silence.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Kind, Tensor};

use crate::checkpoint::TensorPath;
use crate::{Error, Result};

/// What a parity test makes of the files in a folder of fixtures.
#[derive(Debug, Clone, Copy)]
pub struct Kinds<'a> {
    /// Kinds that the tests run; each needs at least one case.
    pub run: &'a [&'a str],
    /// Kinds that belong to a later capability: printed as `later`, never counted as passed.
    pub later: &'a [&'a str],
    /// Files that are no cases: parts of a checkpoint, parameters, a README.
    pub parts: &'a [&'a str],
}

/// A folder of fixtures.
#[derive(Debug)]
pub struct Golden {
    dir: PathBuf,
}

impl Golden {
    /// `NICS_GOLDEN` when it is set, else `default`.
    pub fn open(default: impl AsRef<Path>) -> Self {
        let dir = std::env::var_os("NICS_GOLDEN").map_or_else(|| default.as_ref().to_owned(), PathBuf::from);
        Self { dir }
    }

    /// This very folder, whatever `NICS_GOLDEN` says.
    pub fn at(dir: impl AsRef<Path>) -> Self {
        Self { dir: dir.as_ref().to_owned() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Holds the folder against what the tests know: prints kinds that come later and gives the number of cases that
    /// the tests are to run.
    ///
    /// # Errors
    /// An unknown file, a declared kind without a case, or an unreadable folder.
    pub fn check(&self, kinds: Kinds) -> Result<usize> {
        let mut cases = 0;
        let mut missing: Vec<&str> = kinds.run.to_vec();
        for name in &self.names()? {
            let is = |kind: &&str| kind_of(name) == *kind;
            if kinds.parts.contains(&name.as_str()) {
                continue;
            }
            if let Some(kind) = kinds.run.iter().find(|k| is(k)) {
                cases += 1;
                missing.retain(|m| m != kind);
            } else if kinds.later.iter().any(is) {
                println!("later: {name}");
            } else {
                return Err(Error::Input(format!(
                    "{}: no test knows this kind of case",
                    self.path(name).display()
                )));
            }
        }
        match missing.first() {
            None => Ok(cases),
            Some(kind) => Err(Error::Input(format!("{}: no case of kind `{kind}`", self.dir.display()))),
        }
    }

    /// File names of a kind's cases, sorted.
    ///
    /// # Errors
    /// None is there, or the folder cannot be read.
    pub fn cases(&self, kind: &str) -> Result<Vec<String>> {
        let mut names = self.names()?;
        names.retain(|n| kind_of(n) == kind);
        if names.is_empty() {
            return Err(Error::Input(format!("{}: no case of kind `{kind}`", self.dir.display())));
        }
        Ok(names)
    }

    /// Names of all files, sorted.
    fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .and_then(|entries| entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect())
            .map_err(|source| Error::Io { path: self.dir.clone(), source })?;
        names.sort();
        Ok(names)
    }

    /// A JSON file of the folder.
    pub fn json(&self, name: &str) -> Result<Value> {
        let path = self.path(name);
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        serde_json::from_str(&text).map_err(|e| Error::Input(format!("{}: {e}", path.display())))
    }

    /// All tensors of a safetensors file of the folder, in their stored dtypes.
    pub fn tensors(&self, name: &str) -> Result<HashMap<String, Tensor>> {
        let root = TensorPath::from_file(&self.path(name))?;
        root.unread().into_iter().map(|name| Ok((name.clone(), root.stored(&name)?))).collect()
    }
}

/// The kind of a case's file: its stem up to a `-`.
fn kind_of(name: &str) -> &str {
    let stem = name.split('.').next().unwrap_or(name);
    stem.split('-').next().unwrap_or(stem)
}

/// Largest difference of two tensors of one shape: absolute, and relative to the largest expected magnitude.
/// Infinities must stand at the same places with the same sign.
///
/// # Errors
/// Shapes that differ, values that are not numbers, or infinities at different places.
pub fn difference(found: &Tensor, expected: &Tensor) -> Result<(f64, f64)> {
    if found.size() != expected.size() {
        return Err(Error::Input(format!("shape {:?} instead of {:?}", found.size(), expected.size())));
    }
    let (a, b) = (found.f_to_kind(Kind::Double)?, expected.f_to_kind(Kind::Double)?);
    let infinite = b.f_isinf()?;
    let agree = a.f_eq_tensor(&b)?.f_logical_or(&infinite.f_logical_or(&a.f_isinf()?)?.f_logical_not()?)?;
    if !agree.f_all()?.f_int64_value(&[]).map(|v| v != 0)? {
        return Err(Error::input("infinities stand at different places"));
    }
    let finite = |t: &Tensor| t.f_masked_fill(&infinite, 0.0);
    let (a, b) = (finite(&a)?, finite(&b)?);
    let absolute = if a.numel() == 0 { 0.0 } else { a.f_sub(&b)?.f_abs()?.f_max()?.f_double_value(&[])? };
    if absolute.is_nan() {
        return Err(Error::input("values that are not numbers"));
    }
    let largest = if b.numel() == 0 { 0.0 } else { b.f_abs()?.f_max()?.f_double_value(&[])? };
    Ok((absolute, absolute / largest.max(f64::MIN_POSITIVE)))
}
