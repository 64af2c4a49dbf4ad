//! A folder of documents as a search engine: BM25 (Robertson & Zaragoza, 2009), in memory, deterministic.
//!
//! `score = Σ idf(t) · tf (k1+1) / (tf + k1 (1 − b + b · len / mean len))`, `idf(t) = ln(1 + (N − n_t + ½) / (n_t + ½))`,
//! k1 = 1.2, b = 0.75. Documents are cut into passages at line breaks, and a document counts by its best passage: the
//! text that is given begins there.
//!
//! Words are runs of letters and digits, in lower case. Scripts without spaces (Chinese, Japanese, Korean, Thai) are
//! indexed by characters and by pairs of neighbours, and asked for by pairs, or by the character where it stands alone.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::visible::visible_text;
use super::{Hit, SearchError, SearchProvider};

/// Characters of a passage, a longer line aside.
const PASSAGE: usize = 1200;
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 256 << 20;
const K1: f64 = 1.2;
const B: f64 = 0.75;

struct Document {
    title: String,
    url: String,
    text: String,
}

struct Passage {
    document: usize,
    /// Where it begins in the document's text, in bytes.
    start: usize,
    terms: u32,
}

/// The documents of a folder.
pub struct LocalIndex {
    name: String,
    documents: Vec<Document>,
    passages: Vec<Passage>,
    /// For each term the passages that hold it, ascending, and how often.
    postings: HashMap<String, Vec<(u32, u32)>>,
    mean_terms: f64,
}

/// A line of a .jsonl file.
#[derive(Deserialize)]
struct Line {
    text: String,
    #[serde(default)]
    title: String,
    url: Option<String>,
}

impl LocalIndex {
    /// Reads the .txt, .md, .html, .htm and .jsonl files of a folder and those below it; other files are passed over,
    /// and links to folders are not followed. A line of a .jsonl file is a document: `{"text", "title", "url"}`, the
    /// last two optional.
    ///
    /// # Errors
    /// A folder or file that cannot be read, a line that is no document, or no document at all.
    pub fn open(folder: &Path) -> Result<Self, String> {
        let mut files = Vec::new();
        list(folder, &mut files)?;
        files.sort();
        let mut documents = Vec::new();
        for file in &files {
            read(file, folder, &mut documents)?;
        }
        documents.retain(|d| !d.text.trim().is_empty());
        if documents.is_empty() {
            return Err(format!(
                "{}: no document; expected .txt, .md, .html or .jsonl files with text",
                folder.display()
            ));
        }
        Ok(Self::build(folder.display().to_string(), documents))
    }

    fn build(name: String, documents: Vec<Document>) -> Self {
        let mut passages = Vec::new();
        let mut postings: HashMap<String, Vec<(u32, u32)>> = HashMap::new();
        let mut total = 0u64;
        for (document, d) in documents.iter().enumerate() {
            for (start, text) in cut(&d.text) {
                let passage = passages.len() as u32;
                let mut counts: BTreeMap<String, u32> = BTreeMap::new();
                // The title speaks for every passage.
                for term in terms(&d.title, true).into_iter().chain(terms(text, true)) {
                    *counts.entry(term).or_default() += 1;
                }
                let length: u32 = counts.values().sum();
                total += u64::from(length);
                for (term, count) in counts {
                    postings.entry(term).or_default().push((passage, count));
                }
                passages.push(Passage { document, start, terms: length });
            }
        }
        let mean_terms = (total as f64 / passages.len().max(1) as f64).max(1.0);
        Self { name, documents, passages, postings, mean_terms }
    }

    /// How many documents there are.
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    /// Whether there is none; [`open`](Self::open) refuses that.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// The best passages, one for each document, with their scores, the best first.
    fn rank(&self, query: &str, limit: usize) -> Vec<(usize, f64)> {
        let mut query = terms(query, false);
        query.sort_unstable();
        query.dedup();
        let n = self.passages.len() as f64;
        let mut scores: BTreeMap<u32, f64> = BTreeMap::new();
        for term in &query {
            let Some(found) = self.postings.get(term) else { continue };
            let with = found.len() as f64;
            let idf = (1.0 + (n - with + 0.5) / (with + 0.5)).ln();
            for &(passage, count) in found {
                let length = f64::from(self.passages[passage as usize].terms) / self.mean_terms;
                let tf = f64::from(count);
                *scores.entry(passage).or_default() +=
                    idf * tf * (K1 + 1.0) / (tf + K1 * (1.0 - B + B * length));
            }
        }
        // The best passage of each document; of equal ones the first.
        let mut best: BTreeMap<usize, (usize, f64)> = BTreeMap::new();
        for (passage, score) in scores {
            let entry =
                best.entry(self.passages[passage as usize].document).or_insert((passage as usize, score));
            if score > entry.1 {
                *entry = (passage as usize, score);
            }
        }
        let mut ranked: Vec<(usize, f64)> = best.into_values().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.truncate(limit);
        ranked
    }
}

impl SearchProvider for LocalIndex {
    fn name(&self) -> &str {
        &self.name
    }

    fn search(&self, query: &str, limit: usize) -> Result<Vec<Hit>, SearchError> {
        let hit = |(passage, _): (usize, f64)| {
            let Passage { document, start, .. } = self.passages[passage];
            let d = &self.documents[document];
            let text = d.text[start..].to_owned();
            let snippet = text.chars().take(160).collect::<String>().replace('\n', " ");
            Hit { title: d.title.clone(), url: d.url.clone(), snippet, page: Ok(text) }
        };
        Ok(self.rank(query, limit).into_iter().map(hit).collect())
    }
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            list(&path, files)?;
        } else if path.is_file() && kind(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

fn kind(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    ["txt", "md", "html", "htm", "jsonl"].into_iter().find(|k| *k == extension)
}

fn read(path: &Path, folder: &Path, documents: &mut Vec<Document>) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        return Err(format!(
            "{} has {} MiB, expected at most {}: cut it into several files",
            path.display(),
            size >> 20,
            MAX_FILE >> 20
        ));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let text = String::from_utf8(bytes)
        .map_err(|e| format!("{}: not UTF-8 at byte {}", path.display(), e.utf8_error().valid_up_to()))?;
    let name = path.strip_prefix(folder).unwrap_or(path).display().to_string();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match kind(path) {
        Some("jsonl") => {
            for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
                let line_name = || format!("{name}:{}", i + 1);
                let line: Line = serde_json::from_str(line)
                    .map_err(|e| format!("{}, line {}: {e}", path.display(), i + 1))?;
                let url = line.url.unwrap_or_else(line_name);
                documents.push(Document { title: line.title, url, text: line.text });
            }
        }
        Some("html" | "htm") => {
            let (title, text) = visible_text(&text)
                .ok_or_else(|| format!("{}: its markup is nested too deep", path.display()))?;
            documents.push(Document { title: if title.is_empty() { stem } else { title }, url: name, text });
        }
        _ => {
            // A Markdown file's first heading is its title.
            let heading =
                text.lines().find_map(|l| l.strip_prefix("# ")).filter(|_| kind(path) == Some("md"));
            let title = heading.map_or(stem, |h| h.trim().to_owned());
            documents.push(Document { title, url: name, text });
        }
    }
    Ok(())
}

/// Passages of whole lines: where each begins in bytes, and its text.
fn cut(text: &str) -> Vec<(usize, &str)> {
    let mut all = Vec::new();
    let (mut start, mut at, mut length) = (0, 0, 0);
    for line in text.split_inclusive('\n') {
        let characters = line.chars().count();
        if length > 0 && length + characters > PASSAGE {
            all.push((start, &text[start..at]));
            (start, length) = (at, 0);
        }
        at += line.len();
        length += characters;
    }
    if start < text.len() {
        all.push((start, &text[start..]));
    }
    all
}

/// Whether words of a character's script are not set apart by spaces.
fn unspaced(c: char) -> bool {
    matches!(u32::from(c),
        0x0e00..=0x0eff // Thai, Lao
        | 0x3040..=0x30ff | 0x31f0..=0x31ff // kana
        | 0x3400..=0x4dbf | 0x4e00..=0x9fff | 0xf900..=0xfaff | 0x20000..=0x3ffff // Han
        | 0xac00..=0xd7af) // Hangul
}

/// Terms of a text. A document has pairs and single characters of unspaced scripts, a query single ones only where they
/// stand alone.
fn terms(text: &str, document: bool) -> Vec<String> {
    let mut all = Vec::new();
    let mut word = String::new();
    let mut run: Vec<char> = Vec::new();
    let end_run = |run: &mut Vec<char>, all: &mut Vec<String>| {
        if document || run.len() == 1 {
            all.extend(run.iter().map(ToString::to_string));
        }
        all.extend(run.windows(2).map(|pair| pair.iter().collect::<String>()));
        run.clear();
    };
    for c in text.chars().flat_map(char::to_lowercase) {
        if !word.is_empty() && (unspaced(c) || !c.is_alphanumeric()) {
            all.push(std::mem::take(&mut word));
        }
        if unspaced(c) && c.is_alphanumeric() {
            run.push(c);
            continue;
        }
        end_run(&mut run, &mut all);
        if c.is_alphanumeric() {
            word.push(c);
        }
    }
    end_run(&mut run, &mut all);
    if !word.is_empty() {
        all.push(word);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(texts: &[&str]) -> LocalIndex {
        let document = |(i, text): (usize, &&str)| Document {
            title: String::new(),
            url: i.to_string(),
            text: (*text).to_owned(),
        };
        LocalIndex::build("test".into(), texts.iter().enumerate().map(document).collect())
    }

    fn found(index: &LocalIndex, query: &str) -> Vec<String> {
        index.search(query, 5).unwrap().into_iter().map(|h| h.url).collect()
    }

    #[test]
    fn terms_of_both_scripts() {
        assert_eq!(terms("GPT-4 在北京", false), ["gpt", "4", "在北", "北京"]);
        assert_eq!(terms("北京", true), ["北", "京", "北京"]);
        assert_eq!(terms("猫", false), ["猫"]);
        assert_eq!(terms("x猫y", false), ["x", "猫", "y"]);
        assert!(terms(" ,。!", true).is_empty());
    }

    #[test]
    fn scores_are_those_of_the_formula() {
        let index = index(&["apple pear", "apple apple plum cherry", "fig"]);
        let ranked = index.rank("apple", 5);
        // N 3, n 2, mean length 7/3.
        let idf = (1.0f64 + (3.0 - 2.0 + 0.5) / (2.0 + 0.5)).ln();
        let score = |tf: f64, length: f64| idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / (7.0 / 3.0)));
        let expected = [(1, score(2.0, 4.0)), (0, score(1.0, 2.0))];
        assert_eq!(ranked.len(), 2);
        for ((passage, found), (document, score)) in ranked.iter().zip(expected) {
            assert_eq!(*passage, document);
            assert!((found - score).abs() < 1e-12);
        }
    }

    #[test]
    fn chinese_is_found_by_neighbouring_characters() {
        let index = index(&["北京今天晴，气温十度。", "上海明天有雨。", "京东在北方。", "I like cats."]);
        assert_eq!(found(&index, "北京天气")[0], "0");
        assert_eq!(found(&index, "上海 雨")[0], "1");
        assert_eq!(found(&index, "CATS"), ["3"]);
        assert!(found(&index, "龙").is_empty());
        assert!(found(&index, "").is_empty());
    }

    #[test]
    fn a_long_document_is_read_from_its_best_passage_on() {
        let filler = "nothing of note here\n".repeat(200);
        let text = format!("{filler}the treasure lies in Zanzibar\n{filler}");
        let index = index(&[&text, "another text"]);
        let hits = index.search("treasure Zanzibar", 5).unwrap();
        assert_eq!(hits.len(), 1);
        let page = hits[0].page.as_ref().unwrap();
        let at = page.find("Zanzibar").unwrap();
        assert!(at < PASSAGE, "{at}");
    }
}
