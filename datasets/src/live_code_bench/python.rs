//! The interpreter that runs programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::judge::JudgeError;

const ASK: &str = include_str!("ask.py");

/// The first that can be told to read and write UTF-8 whatever the locale.
const OLDEST: (u32, u32) = (3, 7);

/// An interpreter, found and asked for what it is.
#[derive(Debug, Clone)]
pub(super) struct Python {
    /// The interpreter itself. What was named may be a shim: a script that starts it, and nothing is started in a sandbox.
    pub(super) program: PathBuf,
    /// E.g. `3.12.4`.
    pub(super) version: String,
    /// Where its libraries are.
    pub(super) places: Vec<PathBuf>,
}

impl Python {
    /// By its path, or by its name on `PATH`.
    pub(super) fn find(named: &Path) -> Result<Self, JudgeError> {
        let wrong = |reason: String| JudgeError::Python { named: named.to_owned(), reason };
        let asked = Command::new(named).args(["-I", "-c", ASK]).stdin(Stdio::null()).output();
        let asked = asked.map_err(|e| wrong(e.to_string()))?;
        let said = String::from_utf8_lossy(&asked.stdout);
        match said.lines().collect::<Vec<_>>()[..] {
            [program, version, ref places @ ..]
                if asked.status.success() && Path::new(program).is_absolute() =>
            {
                let mut parts = version.split('.').map(str::parse::<u32>);
                match (parts.next(), parts.next()) {
                    (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => Ok(Self {
                        program: program.into(),
                        version: version.to_owned(),
                        places: places.iter().map(PathBuf::from).collect(),
                    }),
                    _ => Err(wrong(format!(
                        "it is of version {version}, expected {}.{} or newer",
                        OLDEST.0, OLDEST.1
                    ))),
                }
            }
            _ => {
                let error = String::from_utf8_lossy(&asked.stderr);
                let error = error.lines().last().unwrap_or("it printed something else").to_owned();
                Err(wrong(format!("asked for its version, it ended with {}: {error}", asked.status)))
            }
        }
    }
}
