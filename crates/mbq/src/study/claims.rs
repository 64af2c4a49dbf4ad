//! What is claimed of a study, in TOML: apart from its settings, since it decides nothing of what is measured.

use std::path::Path;

use nics_base::settings;
use serde::{Deserialize, Serialize};

use super::{Study, variants};
use crate::Result;

/// That one method diverges less than another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The name of a condition.
    pub condition: String,
    /// A width.
    pub quant: String,
    /// The one that diverges less.
    pub method: String,
    /// The other one.
    pub over: String,
}

/// All claims.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// Each.
    pub claim: Vec<Claim>,
}

impl Claims {
    /// Reads claims about a study.
    ///
    /// # Errors
    /// A file that cannot be read, and what is wrong in it: a claim about something that the study
    /// does not measure among it.
    pub fn read(path: &Path, study: &Study) -> Result<Self> {
        Ok(settings::read(path, |text| Self::parse(text, study))?)
    }

    fn parse(text: &str, study: &Study) -> Result<Self, String> {
        let claims: Self = settings::parse(text)?;
        let all = variants(study).map_err(|e| e.to_string())?;
        for Claim { condition, quant, method, over } in &claims.claim {
            let same =
                |v: &&super::Variant| study.condition[v.condition].name == *condition && v.quant() == *quant;
            let measured: Vec<&str> = all.iter().filter(same).map(|v| v.name).collect();
            if let Some(missing) = [method, over].into_iter().find(|m| !measured.contains(&m.as_str())) {
                return Err(format!(
                    "a claim is about {missing:?} at {quant}, {condition}: that is not measured"
                ));
            }
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_claims_of_this_crate_are_about_what_its_study_measures() {
        let study = Study::parse(include_str!("../../recipes/study.toml")).unwrap();
        let text = include_str!("../../recipes/claims.toml");
        assert!(!Claims::parse(text, &study).unwrap().claim.is_empty());
        for (from, to, why) in [
            ("MBQ, MAE", "MBQ, MAP", "\"MBQ, MAP\""),
            ("\"w4a4\"", "\"w4a5\"", "w4a5"),
            ("quant =", "quants =", "quants"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Claims::parse(&text.replacen(from, to, 1), &study).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
