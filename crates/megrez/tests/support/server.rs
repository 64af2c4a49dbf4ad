//! `megrez serve` in a process of its own.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::support::megrez;

/// No claim about speed: a busy machine is slow.
const LIVENESS: Duration = Duration::from_secs(120);

/// A running server; ended with the test.
pub struct Server(Child, String);

impl Server {
    /// With these flags.
    pub fn start<A: AsRef<OsStr>>(flags: impl IntoIterator<Item = A>) -> Self {
        let mut command = megrez(["serve", "--port", "0"]);
        command.args(flags);
        command.env_remove("MEGREZ_API_KEY");
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(url) = line.strip_prefix("listening on ") {
                    let _ = send.send(url.to_owned());
                }
            }
        });
        let url = receive.recv_timeout(LIVENESS).expect("it says where it listens");
        Self(child, url)
    }

    /// The reply to a request for a completion.
    pub fn complete(&self, body: &Value) -> Value {
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
        let agent = ureq::Agent::new_with_config(config.timeout_global(Some(LIVENESS)).build());
        let request = agent.post(format!("{}/v1/completions", self.1)).content_type("application/json");
        let mut answer = request.send(body.to_string()).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert_eq!(answer.status(), 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
