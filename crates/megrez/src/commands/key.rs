//! API keys: from a file or the environment, never from the command line, where other users of the machine see them.

/// The key in an environment variable; empty is none.
pub fn from_env(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}
