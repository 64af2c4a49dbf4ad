//! The task in token ids.

use std::collections::HashMap;

use nics_datasets::ring::{self, Ring, RingProblem};

use crate::labels::ThinkTokens;
use crate::{Error, Result};

/// More tokens than any right response has: 7 a step, at most six steps, and 6 around them.
pub const RESPONSE_TOKENS: usize = 56;

/// The words of a [`Ring`] as token ids: a word's place in the vocabulary.
#[derive(Debug, Clone)]
pub struct RingTask {
    ring: Ring,
    words: Vec<String>,
    ids: HashMap<String, u32>,
    /// For each id the id that stands for its meaning.
    meanings: Vec<u32>,
    separators: Vec<u32>,
}

impl RingTask {
    /// The task modulo `modulus`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a modulus that the task does not have.
    pub fn new(modulus: u32) -> Result<Self> {
        let expected = format!("3 to {}", Ring::MAX_MODULUS);
        let ring = Ring::new(modulus).map_err(|_| Error::setting("modulus", modulus, expected))?;
        let words = ring.vocabulary();
        let ids: HashMap<String, u32> =
            words.iter().enumerate().map(|(id, word)| (word.clone(), id as u32)).collect();
        let meanings = words.iter().map(|word| ids[ring::canonical(word)]).collect();
        let separators = ring::SEPARATORS.iter().map(|word| ids[*word]).collect();
        Ok(Self { ring, words, ids, meanings, separators })
    }

    /// The task whose vocabulary has so many words.
    ///
    /// # Errors
    /// [`Error::Setting`] for a vocabulary that is no task's.
    pub fn of_vocabulary(size: usize) -> Result<Self> {
        let others = Ring::new(3).map_or(0, |ring| ring.vocabulary().len() - 3);
        let modulus = size.saturating_sub(others);
        Self::new(u32::try_from(modulus).unwrap_or(0)).map_err(|_| {
            Error::setting("the vocabulary", size, format!("{others} words and a modulus from 3 on"))
        })
    }

    /// The generator.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// The vocabulary.
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// Ids of a text.
    ///
    /// # Errors
    /// A word that the task does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let id = |word: &str| {
            let unknown = || Error::Input(format!("`{word}` is no word of {}", self.ring.name()));
            self.ids.get(word).copied().ok_or_else(unknown)
        };
        text.split_whitespace().map(id).collect()
    }

    /// The text of ids; those beyond the vocabulary have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        let words: Vec<&str> =
            ids.iter().filter_map(|&id| self.words.get(id as usize)).map(String::as_str).collect();
        words.join(" ")
    }

    fn id(&self, word: &str) -> u32 {
        self.ids[word]
    }

    /// The id that ends a response.
    pub fn eos(&self) -> u32 {
        self.id(ring::EOS)
    }

    /// The ids around the worked steps.
    pub fn think(&self) -> ThinkTokens {
        ThinkTokens { start: self.id(ring::THINK).into(), end: self.id(ring::THINK_END).into() }
    }

    /// Whether an id ends a step.
    pub fn is_separator(&self, id: u32) -> bool {
        self.separators.contains(&id)
    }

    /// The id that stands for an id's meaning: the first of its synonyms.
    pub fn meaning(&self, id: u32) -> u32 {
        self.meanings.get(id as usize).copied().unwrap_or(id)
    }

    /// Whether a response, in ids, ends with the problem's value.
    pub fn is_right(&self, problem: &RingProblem, response: &[u32]) -> bool {
        response.last() == Some(&self.eos()) && ring::answer(&self.decode(response)) == Some(problem.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nics_datasets::word_problems::Split;

    #[test]
    fn text_and_ids_are_one() {
        let task = RingTask::new(19).unwrap();
        assert_eq!(RingTask::of_vocabulary(40).unwrap().ring(), task.ring());
        assert!(RingTask::of_vocabulary(7).is_err());
        for index in 0..50 {
            let problem = task.ring().problem(Split::Test, 0, index);
            let ids = task.encode(&problem.text()).unwrap();
            assert_eq!(task.decode(&ids), problem.text());
            let prompt = task.encode(&problem.prompt()).unwrap().len();
            assert!(ids.len() - prompt < RESPONSE_TOKENS);
            assert!(task.is_right(&problem, &ids[prompt..]));
            assert!(!task.is_right(&problem, &ids[prompt..ids.len() - 1]), "it has not ended");
        }
        assert!(task.encode("so 1 + 19").unwrap_err().to_string().contains("`19` is no word of ring-19"));
        assert_eq!(task.meaning(task.id("thus")), task.id("so"));
        assert_ne!(task.meaning(task.id("7")), task.meaning(task.id("8")));
        assert!(task.is_separator(task.id("!!")) && !task.is_separator(task.id("=")));
    }
}
