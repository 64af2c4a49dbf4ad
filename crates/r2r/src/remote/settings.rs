//! How a server is called.

use std::time::Duration;

use crate::decode::ReadAhead;
use crate::{Error, Result};

/// How a server is called.
#[derive(Debug, Clone)]
pub struct RemoteSettings {
    /// The model; the server's only or first one when `None`.
    pub model: Option<String>,
    /// The key, where the server asks for one.
    pub key: Option<String>,
    /// Separates this user's prefixes in vLLM's cache from others' (its `cache_salt`).
    pub cache_salt: Option<String>,
    /// Tokens of a sequence; what the server says when `None`.
    pub context: Option<usize>,
    /// The most time to make a connection.
    pub connect_timeout: Duration,
    /// The most time of one call, from its first byte to its last.
    pub timeout: Duration,
    /// Calls made again after one that failed.
    pub retries: usize,
    /// The pause before the first of these, which doubles with each.
    pub backoff: Duration,
    /// The longest pause, `Retry-After` included.
    pub max_backoff: Duration,
    /// Sequences in one call.
    pub max_batch: usize,
    /// Calls at a time.
    pub connections: usize,
    /// What is sent before it is asked for: see [`ReadAhead`].
    pub read_ahead: ReadAhead,
}

impl Default for RemoteSettings {
    fn default() -> Self {
        Self {
            model: None,
            key: None,
            cache_salt: None,
            context: None,
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(60),
            retries: 4,
            backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(20),
            max_batch: 16,
            connections: 4,
            read_ahead: ReadAhead { prompt: true, window: None },
        }
    }
}

impl RemoteSettings {
    /// Whether every value makes sense.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("timeout", self.timeout), ("connect_timeout", self.connect_timeout)] {
            if value.is_zero() {
                return Err(Error::setting(name, "0", "more than 0"));
            }
        }
        for (name, value, most) in
            [("max_batch", self.max_batch, 4096), ("connections", self.connections, 64)]
        {
            if !(1..=most).contains(&value) {
                return Err(Error::setting(name, value, format!("1 to {most}")));
            }
        }
        if self.read_ahead.window == Some(0) {
            return Err(Error::setting("prefetch_window", 0, "at least 1"));
        }
        Ok(())
    }

    /// The pause before retry `n`, from 0; a server's own word on it wins up to the longest pause.
    pub(crate) fn pause(&self, n: usize, retry_after: Option<Duration>) -> Duration {
        let doubled = self.backoff.saturating_mul(1 << n.min(16));
        retry_after.map_or(doubled, |asked| asked.max(doubled)).min(self.max_backoff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit() {
        let settings = RemoteSettings::default();
        let ms = |n, after| settings.pause(n, after).as_millis();
        assert_eq!([ms(0, None), ms(1, None), ms(2, None), ms(99, None)], [200, 400, 800, 20_000]);
        assert_eq!(ms(0, Some(Duration::from_secs(3))), 3000);
        assert_eq!(ms(0, Some(Duration::from_secs(3000))), 20_000);
    }
}
