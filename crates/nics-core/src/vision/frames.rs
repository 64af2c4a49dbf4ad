//! Which frames of a video are looked at: each family's rule, from the number of frames and their rate alone.

use super::config::senseless;
use crate::Result;

/// The frames that are looked at, and what the prompt may say of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Indices, ascending.
    pub indices: Vec<usize>,
    /// The time of each as LLaVA's prompt writes it, e.g. `0.00s,1.03s`.
    pub times: String,
    /// Length of the video, in seconds.
    pub seconds: f64,
}

/// LLaVA-Video's rule: one frame every `1 / target_fps` seconds; where those are more than `max_frames`, or `force` asks
/// for it, `max_frames` spread evenly from the first to the last.
///
/// # Errors
/// No frame, no frame to take, or rates that are not positive.
pub fn llava(frames: usize, fps: f64, max_frames: usize, target_fps: f64, force: bool) -> Result<Sampled> {
    check(frames, fps, max_frames)?;
    if !(target_fps.is_finite() && target_fps > 0.0) {
        return Err(senseless("target_fps", format!("is {target_fps}, expected a positive number")));
    }
    let step = ((fps / target_fps).round_ties_even() as usize).max(1);
    let mut indices: Vec<usize> = (0..frames).step_by(step).collect();
    // The reference counts the time of its grid in steps, that of spread frames in the video's rate.
    let mut rate = step as f64;
    if indices.len() > max_frames || force {
        let apart = (frames - 1) as f64 / (max_frames.max(2) - 1) as f64;
        indices = (0..max_frames).map(|i| (i as f64 * apart) as usize).collect();
        if max_frames > 1
            && let Some(last) = indices.last_mut()
        {
            *last = frames - 1;
        }
        rate = fps;
    }
    let times: Vec<String> = indices.iter().map(|&i| format!("{:.2}s", i as f64 / rate)).collect();
    Ok(Sampled { indices, times: times.join(","), seconds: frames as f64 / fps })
}

/// MiniCPM-V's rule: one frame a second, and of those at most `max_frames`, each from the middle of its share.
///
/// # Errors
/// As [`llava`].
pub fn minicpm(frames: usize, fps: f64, max_frames: usize) -> Result<Vec<usize>> {
    check(frames, fps, max_frames)?;
    let step = (fps.round_ties_even() as usize).max(1);
    let grid: Vec<usize> = (0..frames).step_by(step).collect();
    if grid.len() <= max_frames {
        return Ok(grid);
    }
    let share = grid.len() as f64 / max_frames as f64;
    Ok((0..max_frames).map(|i| grid[(i as f64 * share + share / 2.0) as usize]).collect())
}

/// How many frames Qwen looks at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QwenFrames {
    /// So many, rounded to an even number.
    Exactly(usize),
    /// So many a second, within bounds.
    Rate {
        /// Frames a second.
        fps: f64,
        /// At least so many.
        min_frames: usize,
        /// At most so many.
        max_frames: usize,
    },
}

impl Default for QwenFrames {
    fn default() -> Self {
        Self::Rate { fps: 2.0, min_frames: 4, max_frames: 768 }
    }
}

/// Qwen's rule: an even number of frames spread from the first to the last.
///
/// # Errors
/// As [`llava`], and a video of fewer than two frames or than are asked for.
pub fn qwen(frames: usize, fps: f64, wanted: QwenFrames) -> Result<Vec<usize>> {
    check(frames, fps, 1)?;
    let even = |n: f64| (n / 2.0).floor() * 2.0;
    let n = match wanted {
        QwenFrames::Exactly(n) => (n as f64 / 2.0).round_ties_even() * 2.0,
        QwenFrames::Rate { fps: target, min_frames, max_frames } => {
            let (least, most) = ((min_frames as f64 / 2.0).ceil() * 2.0, even(max_frames.min(frames) as f64));
            even((frames as f64 / fps * target).max(least).min(most).min(frames as f64))
        }
    };
    if !(2.0..=frames as f64).contains(&n) {
        return Err(senseless("nframes", format!("is {n}, expected 2 to the video's {frames} frames")));
    }
    let n = n as usize;
    // As `torch.linspace` does it: in float32, each half from its own end.
    let (last, step) = ((frames - 1) as f32, (frames - 1) as f32 / (n - 1) as f32);
    Ok((0..n)
        .map(|i| if i < n / 2 { i as f32 * step } else { last - (n - 1 - i) as f32 * step })
        .map(|x| x.round_ties_even() as usize)
        .collect())
}

fn check(frames: usize, fps: f64, max_frames: usize) -> Result<()> {
    if frames == 0 {
        return Err(super::VisionError::Empty { what: "a video without a frame".into() }.into());
    }
    if !(fps.is_finite() && fps > 0.0) {
        return Err(senseless("fps", format!("is {fps}, expected a positive number")));
    }
    if max_frames == 0 {
        return Err(senseless("max_frames", "is 0, expected at least 1"));
    }
    Ok(())
}
