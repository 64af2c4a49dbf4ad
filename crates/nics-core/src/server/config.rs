//! What a server is told at its start: where it listens, who may ask, and the limits that hold.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use subtle::{Choice, ConstantTimeEq};

use super::listen::ServeError;

/// Settings of a server. The default listens on the loopback address alone and asks for no key.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Who may ask; without any key everybody who reaches the port may.
    pub keys: ApiKeys,
    /// Whether an address other than loopback may be served without a key.
    pub allow_open: bool,
    /// Connections held at once; further ones wait in the system's backlog. Together with `max_body_bytes` this bounds
    /// what clients can make the server hold.
    pub max_connections: usize,
    /// Longest body, in bytes; more is 413.
    pub max_body_bytes: usize,
    /// Largest `n`.
    pub max_n: usize,
    /// Most sequences of a request: prompts of `/v1/completions` times `n`.
    pub max_choices: usize,
    /// Most `stop` strings.
    pub max_stops: usize,
    /// Longest `stop` string, in bytes.
    pub max_stop_bytes: usize,
    /// Largest `top_logprobs`, or `logprobs` of `/v1/completions`.
    pub max_logprobs: usize,
    /// Time for the head of a request, from the connection's opening or the previous reply on; the connection is closed
    /// then.
    pub header_timeout: Duration,
    /// Time for the body of a request; 408 then.
    pub body_timeout: Duration,
    /// Time for a client to take what was written to it; the connection is closed then and its requests are cancelled.
    pub write_timeout: Duration,
    /// After so long without an event a stream carries a comment, which keeps proxies from closing it.
    pub heartbeat: Duration,
    /// Time for running and queued requests to end once the server shall stop; what is left fails then.
    pub drain_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8000,
            keys: ApiKeys::default(),
            allow_open: false,
            max_connections: 512,
            max_body_bytes: 2 << 20,
            max_n: 16,
            max_choices: 64,
            max_stops: 16,
            max_stop_bytes: 256,
            max_logprobs: 20,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            heartbeat: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

impl ServerConfig {
    /// Whether the settings go together.
    ///
    /// # Errors
    /// `ServeError::Open` for an address that others reach without a key, `ServeError::Config` for a limit of 0.
    pub fn validate(&self) -> Result<(), ServeError> {
        if self.keys.is_empty() && !self.allow_open && !self.host.is_loopback() {
            return Err(ServeError::Open { host: self.host });
        }
        let limits = [
            ("max_connections", self.max_connections),
            ("max_body_bytes", self.max_body_bytes),
            ("max_n", self.max_n),
            ("max_choices", self.max_choices),
        ];
        let times = [
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("write_timeout", self.write_timeout),
            ("heartbeat", self.heartbeat),
        ];
        let zero = limits.into_iter().filter(|(_, n)| *n == 0).map(|(name, _)| name).next();
        let zero = zero.or(times.into_iter().filter(|(_, t)| t.is_zero()).map(|(name, _)| name).next());
        zero.map_or(Ok(()), |name| Err(ServeError::Config(format!("{name} is 0, expected more"))))
    }
}

/// The API keys, as hashes: they are compared in a time that says nothing about them, and nothing can print them.
#[derive(Clone, Default)]
pub struct ApiKeys {
    hashes: Vec<[u8; 32]>,
}

impl ApiKeys {
    /// These keys.
    ///
    /// # Errors
    /// `ServeError::Config` for a key that is empty or has white space or characters that no header can carry.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Result<Self, ServeError> {
        let mut hashes = Vec::new();
        for (i, key) in keys.into_iter().enumerate() {
            let key = key.as_ref();
            if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(ServeError::Config(format!(
                    "API key {} is empty or has white space or characters beyond ASCII",
                    i + 1
                )));
            }
            hashes.push(*blake3::hash(key.as_bytes()).as_bytes());
        }
        Ok(Self { hashes })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether the value of an `Authorization` header names one of the keys.
    pub(super) fn admit(&self, authorization: Option<&[u8]>) -> bool {
        if self.is_empty() {
            return true;
        }
        let bearer = authorization.and_then(|value| {
            let (scheme, key) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
        });
        let Some(found) = bearer else { return false };
        let found = *blake3::hash(found).as_bytes();
        self.hashes.iter().fold(Choice::from(0), |any, key| any | key.ct_eq(&found)).into()
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} API keys", self.hashes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_admitted_and_nothing_near_it() {
        let keys = ApiKeys::new(["sk-one", "sk-two"]).unwrap();
        for good in ["Bearer sk-one", "bearer sk-two", "Bearer  sk-two "] {
            assert!(keys.admit(Some(good.as_bytes())), "{good}");
        }
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "sk-one",
            "Basic sk-one",
            "Bearer sk-on",
            "Bearer sk-onee",
            "Bearer sk-one,sk-two",
        ] {
            assert!(!keys.admit(Some(bad.as_bytes())), "{bad}");
        }
        assert!(!keys.admit(None));
        assert!(!format!("{keys:?}").contains("sk-"));
    }

    #[test]
    fn an_open_address_needs_a_key_or_a_word() {
        let open = ServerConfig { host: "0.0.0.0".parse().unwrap(), ..ServerConfig::default() };
        assert!(matches!(open.validate(), Err(ServeError::Open { .. })));
        ServerConfig { allow_open: true, ..open.clone() }.validate().unwrap();
        ServerConfig { keys: ApiKeys::new(["k"]).unwrap(), ..open }.validate().unwrap();
        ServerConfig::default().validate().unwrap();
        assert!(ApiKeys::new(["a b"]).is_err() && ApiKeys::new([""]).is_err());
    }
}
