//! COCO's annotation files as conversations: `captions_*.json` asks for a description, `instances_*.json` for the objects.
//!
//! One item an image, in the order of `images`. Of several captions the one with the least `id` is the answer, or all of them
//! one after the other. Objects are counted by category, in the order of the categories: `2 person, 1 dog`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;

use super::captions::{Caption, Speaker, Turn, text};
use crate::{Error, Result};

/// What is asked of an image with captions.
pub const DESCRIBE: &str = "Provide a one-sentence caption for the image.";
/// What is asked of an image with objects.
pub const OBJECTS: &str = "Which objects are in the image, and how many of each?";

/// What becomes of several captions of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Several {
    /// The first is the answer.
    #[default]
    First,
    /// All are, one after the other.
    All,
}

#[derive(Deserialize)]
struct File {
    images: Vec<Image>,
    annotations: Vec<Annotation>,
    #[serde(default)]
    categories: Vec<Category>,
}

#[derive(Deserialize)]
struct Image {
    id: u64,
    file_name: String,
}

#[derive(Deserialize)]
struct Annotation {
    #[serde(default)]
    id: u64,
    image_id: u64,
    caption: Option<String>,
    category_id: Option<u64>,
}

#[derive(Deserialize)]
struct Category {
    id: u64,
    name: String,
}

/// Whether a file is an annotation file: an object of `images` and `annotations`, rather than items.
pub fn is_annotations(path: &Path) -> Result<bool> {
    let text = text(path)?;
    Ok(text.trim_start().starts_with('{') && serde_json::from_str::<File>(&text).is_ok())
}

/// The items of an annotation file; images without an annotation are items whose reason is told.
///
/// # Errors
/// A file that is no such annotation file.
pub fn each(path: &Path, several: Several) -> Result<Vec<Result<Caption>>> {
    let wrong = |reason: String| Error::Artefact { path: path.to_owned(), reason };
    let file: File = serde_json::from_str(&text(path)?).map_err(|e| wrong(e.to_string()))?;
    let names: HashMap<u64, (usize, &str)> =
        file.categories.iter().enumerate().map(|(n, c)| (c.id, (n, c.name.as_str()))).collect();
    let mut captions: HashMap<u64, Vec<(u64, &str)>> = HashMap::new();
    let mut objects: HashMap<u64, BTreeMap<usize, (u64, &str)>> = HashMap::new();
    for annotation in &file.annotations {
        match (&annotation.caption, annotation.category_id) {
            (Some(caption), _) if !caption.trim().is_empty() => {
                captions.entry(annotation.image_id).or_default().push((annotation.id, caption.trim()));
            }
            (None, Some(category)) => {
                let &(place, name) = names.get(&category).ok_or_else(|| {
                    wrong(format!(
                        "annotation {} is of category {category}, which is not there",
                        annotation.id
                    ))
                })?;
                objects.entry(annotation.image_id).or_default().entry(place).or_insert((0, name)).0 += 1;
            }
            _ => {}
        }
    }
    if file.images.is_empty() {
        return Err(Error::NoData(format!("{} has no image", path.display())));
    }
    let one = |(n, image): (usize, &Image)| -> Result<Caption> {
        let (question, answer) = if let Some(own) = captions.get_mut(&image.id) {
            own.sort_unstable();
            let taken = if several == Several::First { 1 } else { own.len() };
            (DESCRIBE, own[..taken].iter().map(|(_, c)| *c).collect::<Vec<_>>().join(" "))
        } else if let Some(own) = objects.get(&image.id) {
            (OBJECTS, own.values().map(|(n, name)| format!("{n} {name}")).collect::<Vec<_>>().join(", "))
        } else {
            let (file, image) = (path.display(), &image.file_name);
            return Err(Error::NoData(format!("{file}: image {image} has no annotation")));
        };
        let turn = |from, value: String| Turn { from, value };
        Ok(Caption {
            id: Some(image.id.to_string()),
            images: vec![image.file_name.clone()],
            conversations: vec![
                turn(Speaker::Human, format!("<image>\n{question}")),
                turn(Speaker::Gpt, answer),
            ],
            line: n + 1,
        })
    };
    Ok(file.images.iter().enumerate().map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str, several: Several) -> Result<Vec<Result<Caption>>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, json).unwrap();
        assert_eq!(is_annotations(&path).unwrap(), json.contains("annotations"));
        each(&path, several)
    }

    const IMAGES: &str = r#""images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}]"#;

    #[test]
    fn captions_and_objects() {
        let captions = format!(
            r#"{{{IMAGES}, "annotations": [{{"id": 5, "image_id": 7, "caption": "A dog. "}}, {{"id": 3, "image_id": 7, "caption": "A cat."}}]}}"#
        );
        let items = of(&captions, Several::First).unwrap();
        let first = items[0].as_ref().unwrap();
        assert_eq!((first.images[0].as_str(), first.conversations[1].value.as_str()), ("7.jpg", "A cat."));
        assert!(items[1].as_ref().unwrap_err().to_string().contains("9.jpg has no annotation"));
        let all = of(&captions, Several::All).unwrap();
        assert_eq!(all[0].as_ref().unwrap().conversations[1].value, "A cat. A dog.");
        let objects = format!(
            r#"{{{IMAGES}, "categories": [{{"id": 18, "name": "dog"}}, {{"id": 1, "name": "person"}}], "annotations": [
            {{"id": 1, "image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]}}, {{"id": 2, "image_id": 9, "category_id": 18}},
            {{"id": 3, "image_id": 9, "category_id": 1}}]}}"#
        );
        let items = of(&objects, Several::First).unwrap();
        assert!(items[0].is_err());
        assert_eq!(items[1].as_ref().unwrap().conversations[1].value, "1 dog, 2 person");
        let unknown = objects.replace("\"category_id\": 18", "\"category_id\": 19");
        assert!(
            of(&unknown, Several::First).unwrap_err().to_string().contains("category 19, which is not there")
        );
        assert!(of(r#"{"images": [], "annotations": []}"#, Several::First).is_err());
        assert!(of("{}", Several::First).is_err());
    }
}
