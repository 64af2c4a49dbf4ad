//! Benchmarks of questions about images: MMMU, SEED-Bench, OCRBench, VizWiz-VQA, ScienceQA, TextVQA.
//!
//! | benchmark | hub id | split | what a row has |
//! |---|---|---|---|
//! | MMMU | `lmms-lab/MMMU`, or a folder a subject as in `MMMU/MMMU` | validation | `options` as a Python list in a text, `image_1` to `image_7`, named in the text as `<image 1>` |
//! | SEED-Bench | `lmms-lab/SEED-Bench` | test | `choice_a` to `choice_d`, a list `image`: the frames of a video, or one image |
//! | OCRBench | `echo840/OCRBench` | test | a list of answers, any of which counts |
//! | VizWiz-VQA | `lmms-lab/VizWiz-VQA` | val | ten people's answers |
//! | ScienceQA | `lmms-lab/ScienceQA`: `ScienceQA-FULL`, `ScienceQA-IMG` | test | `choices`, the index of the right one, a `hint` |
//! | TextVQA | `lmms-lab/textvqa` | validation | ten people's answers |
//!
//! Texts are read at once, images one question at a time ([`VisualSet::images`]). JSON Lines with the same fields are read too;
//! an image is a path there, relative to the file's folder.

mod python;
mod rows;

use std::fmt;
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use serde::{Deserialize, Serialize};

use crate::error::{DatasetError, Result};
use crate::layout::{Layout, Part};
use crate::pictures::{self, Picture, Pictures};
use crate::table::{Table, extension};
use rows::Around;

/// A benchmark, or a part of one that is reported apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Visual {
    /// College-level questions of 30 subjects (Yue et al., 2024).
    Mmmu,
    /// Questions about images and videos (Li et al., 2023).
    #[serde(rename = "seedbench")]
    SeedBench,
    /// Those about images.
    #[serde(rename = "seedbench-image")]
    SeedBenchImage,
    /// Text in images (Liu et al., 2023).
    #[serde(rename = "ocrbench")]
    OcrBench,
    /// Photos and questions of blind people (Gurari et al., 2018).
    #[serde(rename = "vizwiz")]
    VizWiz,
    /// School questions (Lu et al., 2022), half of them with an image.
    #[serde(rename = "scienceqa")]
    ScienceQa,
    /// Those with an image.
    #[serde(rename = "scienceqa-img")]
    ScienceQaImg,
    /// Questions about text in photos (Singh et al., 2019).
    #[serde(rename = "textvqa")]
    TextVqa,
}

/// What is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gold {
    /// The index of an option.
    Option(usize),
    /// Texts: references of which one suffices, or what each of several people answered.
    Texts(Vec<String>),
}

/// A question about images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisualQuestion {
    /// `<benchmark>/<the row's own id>`, or `<benchmark>/<row>`, rows counted from 0.
    pub id: String,
    /// What results are also told by: the subject (MMMU, ScienceQA), `image` or `video` (SEED-Bench), the kind of question
    /// (OCRBench), of answer (VizWiz).
    pub group: String,
    /// What is asked.
    pub question: String,
    /// What is told before it (ScienceQA); empty where nothing is.
    pub hint: String,
    /// The options; none where the answer is free.
    pub options: Vec<String>,
    /// What is right.
    pub gold: Gold,
    /// Where OCRBench has it from, which decides how it is scored; empty elsewhere.
    pub origin: String,
    /// The file and the row in it, from 1.
    place: (usize, usize),
    /// Columns of the images that it shows, in their order.
    columns: Vec<String>,
}

impl VisualQuestion {
    /// Whether it shows an image.
    pub fn shows(&self) -> bool {
        !self.columns.is_empty()
    }
}

/// A benchmark's questions, and the way to their images.
pub struct VisualSet {
    /// The questions, in the order of files and rows.
    pub questions: Vec<VisualQuestion>,
    files: Vec<PathBuf>,
    /// The images of one parquet file at a time, or the rows of one other file.
    open: Option<(usize, OpenFile)>,
}

enum OpenFile {
    Parquet(Box<Pictures>),
    Lines(Vec<serde_json::Map<String, serde_json::Value>>),
}

/// Columns that hold images, of all benchmarks.
const IMAGES: [&str; 8] =
    ["image", "image_1", "image_2", "image_3", "image_4", "image_5", "image_6", "image_7"];

impl Visual {
    /// Every benchmark.
    pub const ALL: [Self; 8] = [
        Self::Mmmu,
        Self::SeedBench,
        Self::SeedBenchImage,
        Self::OcrBench,
        Self::VizWiz,
        Self::ScienceQa,
        Self::ScienceQaImg,
        Self::TextVqa,
    ];

    /// The name in ids and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mmmu => "mmmu",
            Self::SeedBench => "seedbench",
            Self::SeedBenchImage => "seedbench-image",
            Self::OcrBench => "ocrbench",
            Self::VizWiz => "vizwiz",
            Self::ScienceQa => "scienceqa",
            Self::ScienceQaImg => "scienceqa-img",
            Self::TextVqa => "textvqa",
        }
    }

    /// Where the hub has it.
    pub fn hub_id(self) -> &'static str {
        match self {
            Self::Mmmu => "lmms-lab/MMMU",
            Self::SeedBench | Self::SeedBenchImage => "lmms-lab/SEED-Bench",
            Self::OcrBench => "echo840/OCRBench",
            Self::VizWiz => "lmms-lab/VizWiz-VQA",
            Self::ScienceQa | Self::ScienceQaImg => "lmms-lab/ScienceQA",
            Self::TextVqa => "lmms-lab/textvqa",
        }
    }

    /// The split that figures are reported on.
    pub fn part(self) -> Part {
        match self {
            Self::Mmmu | Self::VizWiz | Self::TextVqa => Part::Validation,
            _ => Part::Test,
        }
    }

    /// The questions of a split.
    ///
    /// # Errors
    /// [`DatasetError::NothingFound`] where the split is not there, [`DatasetError::BadField`] naming file, row and field of
    /// the first row that is no question, [`DatasetError::Unreadable`] for a file that is no table.
    pub fn load(self, source: &Source, part: Part) -> Result<VisualSet> {
        let layout = Layout::find(source, part)?;
        let mut set = VisualSet { questions: Vec::new(), files: Vec::new(), open: None };
        for subject in self.subjects(&layout)? {
            for file in layout.files(&subject)? {
                self.read(file, &subject, part, &mut set)?;
            }
        }
        match self {
            Self::SeedBenchImage => set.questions.retain(|q| q.group == "image"),
            Self::ScienceQaImg => set.questions.retain(VisualQuestion::shows),
            _ => {}
        }
        if set.questions.is_empty() {
            return Err(layout.nothing(self.name()));
        }
        Ok(set)
    }

    /// The folders that hold it: one a configuration, or one a subject.
    fn subjects(self, layout: &Layout) -> Result<Vec<String>> {
        let wanted: &[&str] = match self {
            Self::ScienceQa => &["ScienceQA-FULL", ""],
            Self::ScienceQaImg => &["ScienceQA-IMG", "ScienceQA-FULL", ""],
            _ => &[""],
        };
        if let Some(whole) = wanted.iter().find(|s| layout.has(s)) {
            return Ok(vec![(*whole).to_owned()]);
        }
        let all: Vec<String> = layout.subjects().map(str::to_owned).collect();
        // MMMU has a configuration for each of its subjects; of another benchmark a single folder is it, whatever its name.
        if self == Self::Mmmu && !all.is_empty() || all.len() == 1 {
            return Ok(all);
        }
        Err(layout.nothing(wanted[0]))
    }

    fn read(self, file: PathBuf, subject: &str, part: Part, set: &mut VisualSet) -> Result<()> {
        let parquet = extension(&file) == Some("parquet");
        let columns = if parquet { pictures::columns(&file, &IMAGES)? } else { Vec::new() };
        let (index, first) = (set.files.len(), set.questions.len());
        let questions = Table::read(&file, &["question"], &[])?.map(|row| {
            let number = first + row.number() - 1;
            let around = Around { subject, part, number, columns: &columns };
            let mut question = rows::question(self, row, &around)?;
            question.place = (index, row.number());
            Ok(question)
        })?;
        set.questions.extend(questions);
        set.files.push(file);
        Ok(())
    }
}

impl VisualSet {
    /// The images of a question, in the order in which they are shown. Asked in the order of the questions, each file is read
    /// once.
    ///
    /// # Errors
    /// An image that is not there, or a file that is damaged: file, row and column are named.
    pub fn images(&mut self, question: &VisualQuestion) -> Result<Vec<Picture>> {
        if question.columns.is_empty() {
            return Ok(Vec::new());
        }
        let (index, row) = question.place;
        let path = self.files.get(index).cloned().unwrap_or_default();
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let file = if extension(&path) == Some("parquet") {
                let columns = pictures::columns(&path, &IMAGES)?;
                OpenFile::Parquet(Box::new(Pictures::open(&path, &columns)?))
            } else {
                let rows = Table::read(&path, &["question"], &[])?.rows();
                OpenFile::Lines(rows.map(|(_, fields)| fields).collect())
            };
            self.open = Some((index, file));
        }
        match &mut self.open {
            Some((_, OpenFile::Parquet(pictures))) => pictures.of(row, &question.columns),
            Some((_, OpenFile::Lines(rows))) => {
                let folder = path.parent().unwrap_or(Path::new(""));
                let mut all = Vec::new();
                for column in &question.columns {
                    let value = rows.get(row - 1).and_then(|fields| fields.get(column));
                    let named = pictures::named(value.unwrap_or(&serde_json::Value::Null), folder);
                    let bad = |reason| DatasetError::BadField {
                        path: path.clone(),
                        row,
                        field: column.clone(),
                        reason,
                    };
                    all.extend(named.map_err(bad)?);
                }
                Ok(all)
            }
            None => Ok(Vec::new()),
        }
    }

    /// The error for an image that cannot be decoded: the `n`-th of a question, from 0.
    pub fn bad_image(&self, question: &VisualQuestion, n: usize, reason: &dyn fmt::Display) -> DatasetError {
        let (index, row) = question.place;
        let field = question.columns.get(n).or(question.columns.first()).cloned().unwrap_or_default();
        let path = self.files.get(index).cloned().unwrap_or_default();
        DatasetError::BadField { path, row, field, reason: reason.to_string() }
    }
}

impl fmt::Display for Visual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Visual {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|b| b.name() == text);
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|b| b.name()).collect();
            format!("no task is named `{text}`; there are {}", names.join(", "))
        })
    }
}
