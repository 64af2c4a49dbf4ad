//! The fields of a request that only this engine knows.

use nics_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::served;
use crate::Error;
use crate::policy::{PolicySpec, Settings};

/// The fields of a request that only this engine knows, checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnFields {
    /// `threshold` and `target_llm_ratio`.
    pub settings: Settings,
    /// `return_sources`: whether each token's source and score are in the reply. Without the field they are in streams.
    pub sources: bool,
}

impl OwnFields {
    /// Takes them out of what the server has left of a request.
    ///
    /// # Errors
    /// `Error::Field` with the field that is wrong, or that the policy does not have.
    pub fn read(fields: &Map<String, Value>, policy: &PolicySpec) -> Result<Self> {
        let settings = Settings {
            threshold: number(fields, "threshold")?,
            target: number(fields, "target_llm_ratio")?,
            seed: None,
        };
        policy.check(&settings).map_err(served)?;
        let streamed = fields.get("stream").and_then(Value::as_bool).unwrap_or(false);
        let sources = match given(fields, "return_sources") {
            None => streamed,
            Some(Value::Bool(wanted)) => *wanted,
            Some(other) => return Err(wrong("return_sources", other, "true or false")),
        };
        Ok(Self { settings, sources })
    }

    /// As a job carries them.
    pub fn to_map(self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            // A struct of numbers and booleans is an object.
            _ => Map::new(),
        }
    }

    /// From a job. What is no map of [`to_map`](Self::to_map)'s is an error.
    pub fn of_job(own: &Map<String, Value>) -> Result<Self> {
        if own.is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_value(Value::Object(own.clone())).map_err(nics_core::Error::input)
    }
}

/// A field; an explicit null counts as absent.
fn given<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|v| !v.is_null())
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<Option<f64>> {
    match given(fields, name) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| wrong(name, value, "a number")),
    }
}

fn wrong(name: &str, value: &Value, expected: &str) -> nics_core::Error {
    let shown: String = value.to_string().chars().take(40).collect();
    served(Error::setting(name, shown, expected))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Kind;
    use serde_json::json;

    fn read(fields: Value, kind: Kind) -> Result<OwnFields> {
        let Value::Object(fields) = fields else { panic!("no object") };
        OwnFields::read(&fields, &PolicySpec { target: Some(0.5), ..PolicySpec::new(kind) })
    }

    #[test]
    fn fields_are_read_and_carried() {
        let found = read(json!({"stream": true, "threshold": 0, "other": 1}), Kind::Neural).unwrap();
        assert_eq!(found.settings, Settings { threshold: Some(0.0), ..Settings::default() });
        assert!(found.sources);
        assert_eq!(OwnFields::of_job(&found.to_map()).unwrap(), found);
        let found =
            read(json!({"target_llm_ratio": 0.25, "threshold": null, "return_sources": true}), Kind::Entropy);
        let found = found.unwrap();
        assert_eq!((found.settings.target, found.sources), (Some(0.25), true));
        assert!(!read(json!({"stream": true, "return_sources": false}), Kind::Neural).unwrap().sources);
        assert_eq!(OwnFields::of_job(&Map::new()).unwrap(), OwnFields::default());
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (fields, kind, name) in [
            (json!({"threshold": "high"}), Kind::Neural, "threshold"),
            (json!({"threshold": -0.5}), Kind::Neural, "threshold"),
            (json!({"threshold": 0.5, "target_llm_ratio": 0.5}), Kind::Neural, "threshold"),
            (json!({"threshold": 0.5}), Kind::AlwaysLarge, "threshold"),
            (json!({"target_llm_ratio": 1.5}), Kind::Neural, "target_llm_ratio"),
            (json!({"target_llm_ratio": 0.5}), Kind::Rolling, "target_llm_ratio"),
            (json!({"return_sources": 1}), Kind::Neural, "return_sources"),
        ] {
            let error = read(fields.clone(), kind).unwrap_err();
            assert!(
                matches!(&error, nics_core::Error::Field { field, .. } if field == name),
                "{fields}: {error}"
            );
        }
    }
}
