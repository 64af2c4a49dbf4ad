//! From a data set to the list that a calibration reads: what is chosen, what is left out and why.
//!
//! Items are filtered by their images' paths, put into the order of a seed, and looked at one by one until there are enough:
//! every image is decoded, and with a model's tokenizer and processor the positions of each modality are counted. With the
//! published filter and seed 42 these are the samples of the published calibrations, those that cannot be used left out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nics_base::interrupt::Interrupt;
use nics_core::vision::picture;
use serde::{Deserialize, Serialize};

use super::captions::{self, Caption, Speaker};
use super::coco::{self, Several};
use super::conversation::Reader;
use super::order::shuffled;
use crate::prompt::Prompter;
use crate::{Error, Result};

/// Version of the report.
const FORMAT: u32 = 1;
/// Items that a reason names.
const EXAMPLES: usize = 3;
/// Stands for an image in a text.
const MARK: &str = "<image>";

/// What is asked for.
pub struct Wanted<'a> {
    /// ShareGPT4V or LLaVA lists, JSON or JSON Lines, or COCO's annotation files.
    pub files: &'a [PathBuf],
    /// What image paths are relative to.
    pub images: &'a Path,
    /// Only items of which an image's path contains this.
    pub part: Option<&'a str>,
    /// No items of text alone.
    pub images_only: bool,
    /// What becomes of several captions of an image in an annotation file.
    pub several: Several,
    /// So many items; all that can be used where it is `None`.
    pub samples: Option<usize>,
    /// Seed of the order.
    pub seed: u64,
    /// The model that will read them.
    pub prompter: Option<&'a Prompter>,
    /// The most positions of an item; asked of [`Wanted::prompter`].
    pub longest: usize,
}

/// Why an item is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It is no item: not JSON of the form, without an answer, an image without an annotation.
    Invalid,
    /// None of its images is of those that were asked for.
    OtherImages,
    /// It has no image.
    TextAlone,
    /// Its text has another number of places than it has images.
    Places,
    /// An image is not there.
    ImageMissing,
    /// An image cannot be decoded.
    ImageUnreadable,
    /// It takes more positions than are allowed.
    TooLong,
    /// The model's template, tokenizer or processor refuse it.
    Refused,
}

impl Reason {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Invalid => "are no items",
            Self::OtherImages => "show other images",
            Self::TextAlone => "have no image",
            Self::Places => "have another number of <image> marks than of images",
            Self::ImageMissing => "name an image that is not there",
            Self::ImageUnreadable => "name an image that cannot be decoded",
            Self::TooLong => "are too long",
            Self::Refused => "are refused by the model's template or processor",
        }
    }
}

/// Items that were left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Why.
    pub reason: Reason,
    /// How many.
    pub items: usize,
    /// What was wrong with the first of them.
    pub examples: Vec<String>,
}

/// Positions of one modality over all items that were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Positions {
    /// All.
    pub sum: usize,
    /// Of the item with the fewest.
    pub least: usize,
    /// Of the item with the most.
    pub most: usize,
    /// Items that have any.
    pub items: usize,
}

/// What was read, taken and left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the format.
    pub format_version: u32,
    /// The files, with the hash of each.
    pub files: Vec<(String, String)>,
    /// The filter, if there was one.
    pub images_of: Option<String>,
    /// Seed of the order.
    pub seed: u64,
    /// Items in the files.
    pub items: usize,
    /// Items that passed the filters; their order is that of the seed.
    pub candidates: usize,
    /// Candidates that were looked at.
    pub looked_at: usize,
    /// Items that were taken.
    pub taken: usize,
    /// Of these, those of text alone.
    pub text_alone: usize,
    /// Of these, those with several images.
    pub several_images: usize,
    /// Items that were left out, by reason.
    pub dropped: Vec<Dropped>,
    /// By modality; `None` where no model was given.
    pub positions: Option<BTreeMap<String, Positions>>,
}

/// Chooses the items.
///
/// # Errors
/// Files that cannot be read, no item that can be used, fewer than were asked for, a stop that was asked for.
pub fn prepare(
    wanted: &Wanted,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Vec<Caption>, Report)> {
    let mut report = Report {
        format_version: FORMAT,
        files: Vec::new(),
        images_of: wanted.part.map(str::to_owned),
        seed: wanted.seed,
        items: 0,
        candidates: 0,
        looked_at: 0,
        taken: 0,
        text_alone: 0,
        several_images: 0,
        dropped: Vec::new(),
        positions: wanted.prompter.map(|_| BTreeMap::new()),
    };
    let mut candidates = Vec::new();
    for file in wanted.files {
        let hash = nics_base::hash::file(file)?;
        report.files.push((file.display().to_string(), hash));
        let annotations = coco::is_annotations(file)?;
        let items = if annotations { coco::each(file, wanted.several)? } else { captions::each(file)? };
        report.items += items.len();
        for item in items {
            match item.map_err(|e| (Reason::Invalid, e.to_string())).and_then(|c| filter(wanted, file, c)) {
                Ok(caption) => candidates.push((file, caption)),
                Err((reason, why)) => report.drop_one(reason, why),
            }
        }
    }
    report.candidates = candidates.len();
    let total = wanted.samples.unwrap_or(candidates.len()).min(candidates.len());
    let mut taken = Vec::with_capacity(total);
    for i in shuffled(candidates.len(), wanted.seed) {
        if taken.len() == total {
            break;
        }
        interrupt.check()?;
        let (file, caption) = &candidates[i];
        report.looked_at += 1;
        match look(wanted, caption) {
            Ok(counts) => {
                report.take(caption, &counts);
                taken.push(caption.clone());
            }
            Err((reason, why)) => report.drop_one(reason, format!("{}: {why}", named(file, caption))),
        }
        progress(taken.len(), total);
    }
    if taken.is_empty() {
        let why: Vec<String> =
            report.dropped.iter().map(|d| format!("{} {}", d.items, d.reason.words())).collect();
        return Err(Error::NoData(format!("none of {} items can be used: {}", report.items, why.join(", "))));
    }
    report.taken = taken.len();
    Ok((taken, report))
}

type Refused = (Reason, String);

fn named(file: &Path, caption: &Caption) -> String {
    match &caption.id {
        Some(id) => format!("{}, item {id}", file.display()),
        None => format!("{}, line {}", file.display(), caption.line),
    }
}

/// What can be told without a look at the images.
fn filter(wanted: &Wanted, file: &Path, caption: Caption) -> Result<Caption, Refused> {
    if caption.images.is_empty() {
        // A text has no image of those that were asked for.
        if wanted.images_only || wanted.part.is_some() {
            return Err((Reason::TextAlone, named(file, &caption)));
        }
    } else if wanted.part.is_some_and(|part| !caption.shows_image_of(part)) {
        return Err((Reason::OtherImages, format!("{}: {}", named(file, &caption), caption.images[0])));
    }
    let asked = caption.conversations.iter().filter(|t| t.from == Speaker::Human);
    let marks: usize = asked.map(|t| t.value.matches(MARK).count()).sum();
    // Without marks images come first.
    if marks != caption.images.len() && marks != 0 {
        let reason = format!("{}: {marks} marks, {} images", named(file, &caption), caption.images.len());
        return Err((Reason::Places, reason));
    }
    Ok(caption)
}

/// Opens the images, and counts positions where there is a model.
fn look(wanted: &Wanted, caption: &Caption) -> Result<Vec<(&'static str, usize)>, Refused> {
    for image in &caption.images {
        let path = wanted.images.join(image);
        if !path.exists() {
            return Err((Reason::ImageMissing, path.display().to_string()));
        }
        picture::open(&path).map_err(|e| (Reason::ImageUnreadable, e.to_string()))?;
    }
    let Some(prompter) = wanted.prompter else { return Ok(Vec::new()) };
    let reader = Reader { prompter, images: wanted.images, longest: usize::MAX };
    let counts = reader.counts(caption).map_err(|e| (Reason::Refused, e.to_string()))?;
    let all: usize = counts.iter().map(|(_, n)| n).sum();
    if all > wanted.longest {
        return Err((Reason::TooLong, format!("{all} positions, at most {} are allowed", wanted.longest)));
    }
    Ok(counts)
}

impl Report {
    fn drop_one(&mut self, reason: Reason, example: String) {
        if let Some(d) = self.dropped.iter_mut().find(|d| d.reason == reason) {
            d.items += 1;
            if d.examples.len() < EXAMPLES {
                d.examples.push(example);
            }
        } else {
            self.dropped.push(Dropped { reason, items: 1, examples: vec![example] });
            self.dropped.sort_by_key(|d| d.reason);
        }
    }

    fn take(&mut self, caption: &Caption, counts: &[(&'static str, usize)]) {
        self.text_alone += usize::from(caption.images.is_empty());
        self.several_images += usize::from(caption.images.len() > 1);
        let Some(positions) = &mut self.positions else { return };
        for (name, n) in counts {
            let p = positions
                .entry((*name).to_owned())
                .or_insert(Positions { least: *n, ..Positions::default() });
            p.sum += n;
            p.least = p.least.min(*n);
            p.most = p.most.max(*n);
            p.items += usize::from(*n > 0);
        }
    }
}
