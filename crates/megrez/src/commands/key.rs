//! API keys: from a file or the environment, never from the command line, where other users of the machine see them.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// Keys, one a line; lines that begin with `#` and empty ones are passed over.
#[cfg(feature = "serve")]
pub fn keys(file: Option<&Path>, variable: &str) -> Result<Vec<String>> {
    let Some(path) = file else {
        return Ok(from_env(variable).into_iter().collect());
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the API keys of {}", path.display()))?;
    let keys: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        bail!("{} holds no API key: expected one a line", path.display());
    }
    Ok(keys)
}

/// The key in an environment variable; empty is none.
pub fn from_env(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}
