//! The fixtures and how they are read.

use std::path::{Path, PathBuf};

use nics_core::checkpoint::Checkpoint;
use nics_core::golden::{Golden, difference};
use nics_core::models::{self, Vlm};
use nics_core::vision::{Media, MediaPrompt, Processor, RgbImage, picture};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
pub struct Cases {
    pub new_tokens: usize,
    pub tolerance: Tolerance,
    #[serde(rename = "cases")]
    pub prompts: Vec<Case>,
}

#[derive(Deserialize)]
pub struct Tolerance {
    pub logits_relative: f64,
}

#[derive(Deserialize)]
pub struct Case {
    pub name: String,
    pub media: Vec<Shown>,
    /// Ids with one placeholder for each image or frame.
    pub ids: Vec<u32>,
    /// Ids with a placeholder for each token.
    pub expanded: Vec<u32>,
    pub greedy: Vec<u32>,
    /// In time, height and width, where the family has such positions.
    pub positions: Option<[Vec<i64>; 3]>,
    pub delta: Option<i64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub enum Shown {
    Image { image: String },
    Video { video: Vec<String>, interval: f64 },
}

pub struct Fixture {
    pub name: String,
    pub dir: PathBuf,
    pub model: Vlm,
    pub processor: Processor,
    pub golden: Golden,
    pub cases: Cases,
}

impl Fixture {
    pub fn open(dir: &Path) -> Self {
        let checkpoint = Checkpoint::open_dir(dir).unwrap();
        let golden = Golden::at(dir);
        let cases = serde_json::from_value(golden.json("cases.json").unwrap()).unwrap();
        Self {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            dir: dir.to_owned(),
            model: models::load_vlm(&checkpoint, Device::Cpu, Kind::Float).unwrap(),
            processor: Processor::open(&checkpoint).unwrap(),
            golden,
            cases,
        }
    }

    pub fn image(&self, name: &str) -> RgbImage {
        picture::open(self.dir.join(name)).unwrap()
    }

    pub fn media(&self, case: &Case) -> Vec<Media> {
        case.media
            .iter()
            .map(|shown| match shown {
                Shown::Image { image } => Media::Image(self.image(image)),
                Shown::Video { video, interval } => Media::Video {
                    frames: video.iter().map(|name| self.image(name)).collect(),
                    interval: *interval,
                },
            })
            .collect()
    }

    pub fn prompt(&self, case: &Case) -> MediaPrompt {
        self.processor.prompt(&case.ids, &self.media(case)).unwrap()
    }
}

/// The folder of all fixtures: `vision` in what `NICS_GOLDEN` names when it is there, else our own.
pub fn root() -> PathBuf {
    let given = std::env::var_os("NICS_GOLDEN").map(|dir| PathBuf::from(dir).join("vision"));
    given
        .filter(|dir| dir.is_dir())
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/vision"))
}

/// One fixture by its folder's name.
pub fn fixture(name: &str) -> Fixture {
    Fixture::open(&root().join(name))
}

/// All fixtures.
pub fn fixtures() -> Vec<Fixture> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|dir| dir.join("cases.json").exists())
        .collect();
    dirs.sort();
    assert!(!dirs.is_empty());
    dirs.iter().map(|dir| Fixture::open(dir)).collect()
}

pub fn assert_relative(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let (_, relative) = difference(found, expected).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(relative <= tolerance, "{what}: off by {relative:e} of the largest value, allowed {tolerance:e}");
}

pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let (absolute, _) = difference(found, expected).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(absolute <= tolerance, "{what}: off by {absolute:e}, allowed {tolerance:e}");
}
