//! `mbq generate`.

use std::io::Write;

use anyhow::{Context, Result, bail};
use clap::Args;
use mbq::language::Language;
use mbq::prompt::Prompter;
use nics_base::interrupt::Interrupt;
use nics_core::cli::{Given, JsonArg, ModelArgs, PluginSpec, PromptArgs, PromptLine, SamplingArgs, SeedArg};
use nics_core::generate::{Finish, Generator, Prompt, Request};
use nics_core::models::{self, Model};
use nics_core::plugin::Plugins;
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use nics_core::template::RenderOptions;
use nics_core::text::TextStream;
use nics_core::tokenizer::Tokenizer;
use nics_core::vision::{Media, Processor, RgbImage, TokenKind, picture};
use serde::Serialize;
use serde_json::json;

use super::opened::{ActArg, Runnable};

/// Answers a prompt about images, or about nothing but text, with a packed, an exported or a dense model.
///
/// A quantized checkpoint (ours, AutoAWQ's, GPTQ's, compressed-tensors') runs as it is stored: no dense copy of its layers is
/// ever in memory. Several images are shown in their order, before the text.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    act: ActArg,
    /// Method that keeps keys and values: NAME or NAME:SPEC
    #[arg(long, value_name = "NAME[:SPEC]")]
    kv: Option<PluginSpec>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    /// An image to show: a file or a data URL (data:image/png;base64,...); may be given several times
    #[arg(long, short = 'I', value_name = "FILE|URL")]
    image: Vec<String>,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "image")]
    raw: bool,
    /// Print the answer as it is written
    #[arg(long)]
    stream: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// A finished answer.
#[derive(Debug, Serialize)]
struct Answer {
    index: usize,
    text: String,
    tokens: Vec<u32>,
    /// `eos`, `stop`, `length`, `context`, or `cache_exhausted` where the cache's budget ended it.
    finish: &'static str,
    prompt_tokens: usize,
    image_tokens: usize,
}

fn plugins_of_binary() -> Plugins {
    let plugins = Plugins::default();
    #[cfg(feature = "with-pm-kvq")]
    let plugins = plugins.with(pm_kvq::plugin::PmKvq);
    plugins
}

/// What answers.
struct Speaker {
    model: Language,
    tokenizer: Tokenizer,
    /// Of a checkpoint with a chat template.
    prompter: Option<Prompter>,
    images: Vec<RgbImage>,
    sampling: Sampling,
}

impl Generate {
    pub fn run(self, quiet: bool) -> Result<()> {
        let lines = self.prompts.lines()?;
        // What is cheap to find wrong comes before the model.
        let images = self.image.iter().map(|i| image(i)).collect::<Result<Vec<_>>>()?;
        self.model.set_threads()?;
        let checkpoint = Runnable::open(&self.model.model, self.act)?.checkpoint;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
        let prompter = if self.raw { None } else { Some(Prompter::open(&checkpoint)?) };
        let generation = checkpoint.generation_config()?.unwrap_or_default();
        let sampling = self.sampling.over(&Sampling::from_generation_config(&generation))?;
        let device = self.model.run_on.device.open()?;
        let kind = self.model.run_on.dtype.resolve(models::stored_kind(&checkpoint));
        let interrupt = Interrupt::install()?;
        let model = Language::load(&checkpoint, device, kind)?;
        let kv = self.kv.as_ref().map(|p| (p.name.as_str(), p.spec.as_str()));
        let mut cache = plugins_of_binary().cache(kv, model.decoder().dims())?;
        let speaker = Speaker { model, tokenizer, prompter, images, sampling };
        let _no_grad = tch::no_grad_guard();
        for (index, line) in lines.iter().enumerate() {
            let prompt = speaker.prompt(line).with_context(|| format!("prompt {}", index + 1))?;
            let answer = self.answer(&speaker, index, prompt, &mut *cache, &interrupt)?;
            if !quiet {
                let of_images = match answer.image_tokens {
                    0 => String::new(),
                    n => format!(" ({n} of images)"),
                };
                eprintln!(
                    "{} tokens, {}; prompt of {}{of_images}",
                    answer.tokens.len(),
                    answer.finish,
                    answer.prompt_tokens
                );
            }
        }
        Ok(())
    }

    fn answer(
        &self,
        speaker: &Speaker,
        index: usize,
        prompt: Prompt,
        cache: &mut dyn KvCache,
        interrupt: &Interrupt,
    ) -> Result<Answer> {
        let (prompt_tokens, image_tokens) = match &prompt {
            Prompt::Embedded(p) => {
                (p.ids.len(), p.kinds.iter().filter(|k| !matches!(k, TokenKind::Text)).count())
            }
            Prompt::Ids(ids) => (ids.len(), 0),
            Prompt::Embeds(x) => (x.size().first().map_or(0, |n| *n as usize), 0),
        };
        let dims = speaker.model.decoder().dims();
        if prompt_tokens >= dims.context {
            bail!(
                "the prompt has {prompt_tokens} tokens, which leaves no room in the context of {}",
                dims.context
            );
        }
        let request = Request {
            prompt,
            sampling: Sampling {
                seed: self.seed.seed.wrapping_add(index as u64),
                ..speaker.sampling.clone()
            },
            max_new_tokens: self.sampling.max_new_tokens.unwrap_or(1024),
            eos: speaker.tokenizer.special_ids().eos.clone(),
        };
        let mut stream = TextStream::new(&speaker.tokenizer, &self.sampling.stop);
        let mut generator = Generator::new(speaker.model.model(), cache);
        let id = generator.add(request)?;
        let mut answer = Answer {
            index,
            text: String::new(),
            tokens: Vec::new(),
            finish: "length",
            prompt_tokens,
            image_tokens,
        };
        while generator.running() > 0 {
            interrupt.check()?;
            for token in generator.step()? {
                answer.tokens.push(token.token);
                self.show(&mut answer, &stream.push(token.token)?)?;
                answer.finish = match token.finish {
                    Some(Finish::Eos) => "eos",
                    Some(Finish::Context) if prompt_tokens + answer.tokens.len() < dims.context => {
                        "cache_exhausted"
                    }
                    Some(Finish::Context) => "context",
                    _ => "length",
                };
            }
            if stream.stopped().is_some() {
                generator.cancel(id);
            }
        }
        self.show(&mut answer, &stream.finish()?)?;
        if stream.stopped().is_some() {
            answer.finish = "stop";
        }
        let mut stdout = std::io::stdout().lock();
        if self.json.json {
            writeln!(stdout, "{}", serde_json::to_string(&answer)?)?;
        } else if self.stream {
            writeln!(stdout)?;
        } else {
            writeln!(stdout, "{}", answer.text)?;
        }
        Ok(answer)
    }

    /// A piece of an answer, shown as it comes where that was asked for.
    fn show(&self, answer: &mut Answer, piece: &str) -> Result<()> {
        answer.text += piece;
        if self.stream && !piece.is_empty() {
            let mut stdout = std::io::stdout().lock();
            if self.json.json {
                writeln!(stdout, "{}", json!({"index": answer.index, "delta": piece}))?;
            } else {
                stdout.write_all(piece.as_bytes())?;
            }
            stdout.flush()?;
        }
        Ok(())
    }
}

impl Speaker {
    fn prompt(&self, line: &PromptLine) -> Result<Prompt> {
        let ids = match (line.given()?, &self.prompter) {
            (Given::Ids(ids), _) => ids.to_vec(),
            (Given::Text(text), None) => self.tokenizer.encode(text, false)?,
            (Given::Text(text), Some(prompter)) => prompter.question(text, self.images.len())?,
            (Given::Messages(_), None) => bail!("a conversation needs the chat template: leave --raw out"),
            (Given::Messages(messages), Some(prompter)) => {
                let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                self.tokenizer.encode(&prompter.template.render(messages, &options)?, false)?
            }
        };
        let dims = self.model.decoder().dims();
        let placeholders =
            self.prompter.as_ref().and_then(|p| p.processor.as_ref()).map(Processor::placeholders);
        if let Some(id) = ids.iter().find(|&&id| {
            i64::from(id) >= dims.vocab && placeholders.is_none_or(|p| p.image != id && p.video != Some(id))
        }) {
            bail!("token {id} is outside the vocabulary of {}", dims.vocab);
        }
        if ids.is_empty() {
            bail!("the prompt is empty");
        }
        if self.images.is_empty() {
            return Ok(Prompt::Ids(ids));
        }
        let processor = self.prompter.as_ref().and_then(|p| p.processor.as_ref());
        let processor = processor.context("the model does not see: leave --image out")?;
        let media: Vec<Media> = self.images.iter().cloned().map(Media::Image).collect();
        let shown = processor.prompt(&ids, &media)?;
        Ok(Prompt::Embedded(self.model.vlm()?.embed_prompt(&shown)?))
    }
}

/// An image in a file or a data URL.
fn image(from: &str) -> Result<RgbImage> {
    if from.starts_with("data:") {
        return Ok(picture::from_data_url(from)?);
    }
    if from.starts_with("http://") || from.starts_with("https://") {
        bail!("--image {from}: images are not fetched; download it and give the file, or a data: URL");
    }
    Ok(picture::open(from)?)
}
