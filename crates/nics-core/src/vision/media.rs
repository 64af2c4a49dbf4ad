//! What a prompt shows a model: before preparation, after it, and in its place among the tokens.

use image::RgbImage;
use tch::Tensor;

use super::VisionError;
use crate::Result;

/// An image or a video, decoded.
#[derive(Debug, Clone)]
pub enum Media {
    /// One image.
    Image(RgbImage),
    /// Frames of one size, oldest first.
    Video {
        /// The frames.
        frames: Vec<RgbImage>,
        /// Seconds between two frames.
        interval: f64,
    },
}

impl Media {
    /// Whether it is an image or a video.
    pub fn kind(&self) -> TokenKind {
        match self {
            Self::Image(_) => TokenKind::Image,
            Self::Video { .. } => TokenKind::Video,
        }
    }

    /// Its frames (an image is one), checked: one at least, all of one size and not empty.
    pub(super) fn frames(&self) -> Result<&[RgbImage], VisionError> {
        let frames = match self {
            Self::Image(image) => std::slice::from_ref(image),
            Self::Video { frames, .. } => frames,
        };
        let Some(first) = frames.first() else {
            return Err(VisionError::Empty { what: "a video without a frame".into() });
        };
        let size = |i: &RgbImage| format!("{}x{}", i.width(), i.height());
        if first.width() == 0 || first.height() == 0 {
            return Err(VisionError::Empty { what: format!("an image of {}", size(first)) });
        }
        match frames.iter().position(|f| f.dimensions() != first.dimensions()) {
            Some(index) => {
                Err(VisionError::FrameSize { index, found: size(&frames[index]), expected: size(first) })
            }
            None => Ok(frames),
        }
    }
}

/// What a token of a prompt stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TokenKind {
    /// Text; the marks around an image too.
    Text,
    /// A part of an image.
    Image,
    /// A part of a video.
    Video,
}

impl TokenKind {
    /// `text`, `image` or `video`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::Video => "video",
        }
    }
}

/// How the pixels of a prepared medium are laid out.
#[derive(Debug, Clone, PartialEq)]
pub enum Layout {
    /// So many pictures of the tower's size: frames, or an image with its tiles, all treated alike.
    Frames(usize),
    /// The whole image at the tower's size, then `rows * columns` tiles of it enlarged, row by row.
    Tiles {
        /// Tiles above each other.
        rows: usize,
        /// Tiles beside each other.
        columns: usize,
        /// Height and width of the image as it came, in pixels.
        original: [usize; 2],
    },
    /// Patches, of which blocks of `merge * merge` that become one token follow each other.
    Patches {
        /// Patches in time, height and width.
        grid: [usize; 3],
        /// Seconds between two patches in time; 0 for an image.
        seconds: f64,
    },
}

/// A medium as a tower takes it.
#[derive(Debug)]
pub struct Prepared {
    /// Image or video.
    pub kind: TokenKind,
    /// float32: `[pictures, 3, height, width]`, or for [`Layout::Patches`] `[patches, 3 * time * side * side]`.
    pub pixels: Tensor,
    /// What the first axis of `pixels` is.
    pub layout: Layout,
    /// Tokens that it becomes.
    pub tokens: usize,
    /// Placeholders that it has in a prompt, each for an equal part of its tokens: one, or one for each frame where
    /// text stands between the frames.
    pub parts: usize,
}

/// A prompt with the place of everything that it shows.
#[derive(Debug)]
pub struct MediaPrompt {
    /// Ids with every placeholder repeated for each of its tokens.
    pub ids: Vec<u32>,
    /// What each id stands for.
    pub kinds: Vec<TokenKind>,
    /// What is shown, in the order of its place.
    pub media: Vec<Placed>,
}

/// A prepared medium and its tokens.
#[derive(Debug)]
pub struct Placed {
    /// The medium.
    pub media: Prepared,
    /// Index of each of its tokens among the prompt's, ascending; text may stand between them.
    pub rows: Vec<usize>,
}

/// The ids that stand for something to be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placeholders {
    /// For images.
    pub image: u32,
    /// For videos, where the model sees them; it may be that of the images.
    pub video: Option<u32>,
}

impl Placeholders {
    /// Puts each medium at its placeholder. A prompt has one placeholder for each (or each of its
    /// [parts](Prepared::parts)), which is repeated here, or is written out already: as many as there are tokens.
    ///
    /// # Errors
    /// [`VisionError::Placeholders`] for any other number, [`VisionError::Unseen`] for a video that has no placeholder.
    pub fn expand(&self, ids: &[u32], media: Vec<Prepared>) -> Result<MediaPrompt, VisionError> {
        let mut prompt = MediaPrompt { ids: Vec::new(), kinds: Vec::new(), media: Vec::new() };
        let (mut images, mut videos) = (Vec::new(), Vec::new());
        for media in media {
            match (media.kind, self.video) {
                (TokenKind::Video, None) => return Err(VisionError::Unseen { kind: "video" }),
                (TokenKind::Video, Some(video)) if video != self.image => videos.push(media),
                _ => images.push(media),
            }
        }
        let mut queues = vec![Queue::new("image", self.image, ids, images)?];
        if let Some(video) = self.video.filter(|&video| video != self.image) {
            queues.push(Queue::new("video", video, ids, videos)?);
        }
        for &id in ids {
            if let Some(queue) = queues.iter_mut().find(|q| q.token == id) {
                queue.take(&mut prompt);
            } else {
                prompt.ids.push(id);
                prompt.kinds.push(TokenKind::Text);
            }
        }
        prompt.media.sort_by_key(|placed| placed.rows.first().copied());
        Ok(prompt)
    }
}

/// The media of one placeholder on their way into a prompt.
struct Queue {
    token: u32,
    media: std::vec::IntoIter<Prepared>,
    /// Whether the prompt has a placeholder for each token, not for each part.
    written_out: bool,
    /// The medium whose placeholders come now, as its index in the prompt, and how many are still to come.
    open: Option<(usize, usize)>,
}

impl Queue {
    fn new(kind: &'static str, token: u32, ids: &[u32], media: Vec<Prepared>) -> Result<Self, VisionError> {
        let placeholders = ids.iter().filter(|&&id| id == token).count();
        let (parts, tokens) =
            media.iter().fold((0, 0), |(parts, tokens), m| (parts + m.parts, tokens + m.tokens));
        if placeholders != parts && placeholders != tokens {
            let media = media.len();
            return Err(VisionError::Placeholders { kind, token, placeholders, media, parts, tokens });
        }
        Ok(Self { token, media: media.into_iter(), written_out: placeholders != parts, open: None })
    }

    /// Writes the tokens of the next placeholder.
    fn take(&mut self, prompt: &mut MediaPrompt) {
        if self.open.is_none()
            && let Some(media) = self.media.next()
        {
            let placeholders = if self.written_out { media.tokens } else { media.parts };
            prompt.media.push(Placed { media, rows: Vec::new() });
            self.open = Some((prompt.media.len() - 1, placeholders));
        }
        // The numbers were compared, so that there is one.
        let Some((index, left)) = self.open else { return };
        let placed = &mut prompt.media[index];
        let times = if self.written_out { 1 } else { placed.media.tokens / placed.media.parts.max(1) };
        let first = prompt.ids.len();
        placed.rows.extend(first..first + times);
        prompt.ids.extend(std::iter::repeat_n(self.token, times));
        prompt.kinds.extend(std::iter::repeat_n(placed.media.kind, times));
        self.open = (left > 1).then_some((index, left - 1));
    }
}
