//! `megrez agent`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{ArgGroup, Args};
use megrez::agent::{
    AgentError, Answer, Counting, Event, HttpSearch, HttpSettings, LocalIndex, LocalTalker, PageLimits,
    RemoteTalker, SearchProvider, Settings, Talker, WebSearchAgent, link,
};
use megrez::prompt::Prompter;
use megrez::prompts::Prompts;
use nics_base::exit::Usage;
use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{DeviceArgs, JsonArg, PluggedModelArgs, PluginArgs, SeedArg, env_key};

use super::Loaded;
use super::lines::{Lines, Said};

/// Talks with a model that searches before it answers, and cites what it found.
///
/// The model runs in this process (--model) or behind a server of OpenAI's API (--url, its key in MEGREZ_AGENT_API_KEY).
/// It searches a folder of documents (--index) or a service (--search serper, brave, or a TOML file that describes one);
/// without either it answers by itself. One line is one message; /reset forgets the conversation, Ctrl-C stops a turn,
/// Ctrl-D ends.
#[derive(Args)]
#[command(group(ArgGroup::new("writer").required(true).args(["model", "url"])))]
pub struct Agent {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, value_name = "FOLDER|ID")]
    model: Option<String>,
    #[command(flatten)]
    run_on: DeviceArgs,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Server of OpenAI's API in place of --model, e.g. http://127.0.0.1:8000
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The server's model; default: the first that it lists
    #[arg(long, value_name = "NAME", requires = "url")]
    served_name: Option<String>,
    /// Checkpoint whose tokenizer counts tokens for --url; default: a guess on the safe side
    #[arg(long, value_name = "FOLDER|ID", requires = "url")]
    tokenizer: Option<String>,
    /// Seconds that the server may take for a reply's next piece
    #[arg(long, value_name = "SECONDS", default_value_t = 120, requires = "url")]
    reply_timeout: u64,
    /// Search the .txt, .md, .html and .jsonl documents of this folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "search")]
    index: Option<PathBuf>,
    /// Search with a service: serper, brave, or a TOML file with endpoint and JSON pointers
    #[arg(long, value_name = "NAME|FILE")]
    search: Option<String>,
    /// Results of a search that are read
    #[arg(long, value_name = "N", default_value_t = 5)]
    results: usize,
    /// Seconds that all pages of a search together may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    page_timeout: u64,
    /// Read pages of this machine and its network too; a search result can then reach any service that this process can
    #[arg(long)]
    allow_private: bool,
    /// Host whose pages are read wherever it is, e.g. wiki.example or 10.0.0.5:8080; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    allow_host: Vec<String>,
    /// Use the service's excerpt where a page cannot be read
    #[arg(long)]
    snippets: bool,
    /// TOML file with the texts around a conversation; default: built in
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Ask this and end
    #[arg(long, value_name = "TEXT")]
    question: Option<String>,
    #[command(flatten)]
    seed: SeedArg,
    #[command(flatten)]
    json: JsonArg,
}

impl Agent {
    pub fn run(self) -> Result<()> {
        if self.question.as_deref().is_some_and(|q| q.trim().is_empty()) {
            return Err(Usage("--question is empty".into()).into());
        }
        let prompts = self.prompts.as_deref().map_or_else(|| Ok(Prompts::default()), Prompts::read)?;
        let provider = self.provider()?;
        let talker = self.talker(&prompts)?;
        let settings = Settings {
            results: self.results.max(1),
            snippets: self.snippets,
            seed: self.seed.seed,
            ..Settings::default()
        };
        let mut agent = WebSearchAgent::new(talker, provider, prompts, settings);
        let interrupt = Interrupt::install()?;
        if let Some(question) = &self.question {
            return match self.turn(&mut agent, question.trim(), &interrupt) {
                Err(_) if interrupt.requested() => Err(nics_base::Error::Interrupted.into()),
                other => other,
            };
        }
        let interactive = std::io::stdin().is_terminal();
        let mut lines = Lines::new(interactive)?;
        loop {
            let message = match lines.next()? {
                Said::End => return Ok(()),
                Said::Nothing => continue,
                Said::Message(line) => line,
            };
            match message.as_str() {
                "/reset" => agent.reset(),
                "/quit" | "/exit" => return Ok(()),
                "/help" => eprintln!("/reset  /help  /quit"),
                question => {
                    let turn = self.turn(&mut agent, question, &interrupt);
                    let stopped = interrupt.take();
                    match turn {
                        Ok(()) => {}
                        Err(_) if stopped && interactive => eprintln!("\n(stopped)"),
                        Err(_) if stopped => return Err(nics_base::Error::Interrupted.into()),
                        Err(e) if interactive => eprintln!("error: {e:#}"),
                        Err(e) => return Err(e),
                    }
                }
            }
        }
    }

    fn provider(&self) -> Result<Option<Box<dyn SearchProvider>>> {
        if let Some(folder) = &self.index {
            let index = LocalIndex::open(folder).map_err(|e| anyhow!(e))?;
            return Ok(Some(Box::new(index)));
        }
        let Some(service) = &self.search else { return Ok(None) };
        let limits = PageLimits {
            timeout: Duration::from_secs(self.page_timeout),
            allow_private: self.allow_private,
            allow_hosts: self.allow_host.clone(),
            ..PageLimits::default()
        };
        let settings = HttpSettings::named_or_file(service).map_err(|e| anyhow!(e)).context("--search")?;
        Ok(Some(Box::new(HttpSearch::new(settings, limits).map_err(|e| anyhow!(e))?)))
    }

    fn talker(&self, prompts: &Prompts) -> Result<Box<dyn Talker>> {
        if let Some(url) = &self.url {
            let counting = match &self.tokenizer {
                None => Counting::Estimate,
                Some(source) => {
                    let prompter = Prompter::from_checkpoint(&Checkpoint::open(source)?)?;
                    Counting::Exact(Box::new(prompter), prompts.functions.clone())
                }
            };
            let key = env_key("MEGREZ_AGENT_API_KEY");
            let timeout = Duration::from_secs(self.reply_timeout.max(1));
            let talker = RemoteTalker::connect(url, self.served_name.as_deref(), key, counting, timeout)?;
            return Ok(Box::new(talker));
        }
        let args = PluggedModelArgs {
            model: self.model.clone(),
            run_on: self.run_on.clone(),
            plugins: self.plugins.clone(),
        };
        if !self.plugins.hook.is_empty() {
            return Err(Usage("--hook does not go with the agent".into()).into());
        }
        let Loaded { megrez, cache, .. } = Loaded::open(&args)?;
        Ok(Box::new(LocalTalker::new(megrez, cache, &prompts.functions)))
    }

    fn turn(
        &self,
        agent: &mut WebSearchAgent<Box<dyn Talker>>,
        question: &str,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let mut failed = None;
        let mut page = Page::default();
        let ended = agent.turn(question, &mut |event| {
            let shown = if self.json.json { show_json(&event) } else { page.show(&event) };
            if let Err(e) = shown {
                failed = Some(e);
            }
            failed.is_none() && !interrupt.requested()
        });
        match (ended, failed) {
            (_, Some(e)) => Err(e),
            // Stopped in its last event: nothing is missing.
            (Ok(_), None) => Ok(()),
            (Err(AgentError::Talk(e)), None) => Err(e.into()),
            (Err(e), None) => Err(e.into()),
        }
    }
}

fn show_json(event: &Event) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(event)?)?;
    Ok(out.flush()?)
}

/// Text for a terminal: what a page or a model writes must not steer it.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// A turn as a person reads it: what is going on on stderr, the answer on stdout, its sources below it.
#[derive(Default)]
struct Page {
    sources: Vec<(String, String)>,
    said: bool,
}

impl Page {
    fn show(&mut self, event: &Event) -> Result<()> {
        let mut out = std::io::stdout().lock();
        match event {
            Event::Text { text } => {
                let links = out.is_terminal();
                let written = link(&plain(text), self.sources.len(), |n| self.reference(n, links));
                self.said |= !written.trim().is_empty();
                write!(out, "{written}")?;
            }
            Event::Call { name, arguments } => {
                if std::mem::take(&mut self.said) {
                    writeln!(out)?;
                }
                let query = arguments["query"].as_str().map_or_else(|| arguments.to_string(), str::to_owned);
                eprintln!("({}: {})", plain(name), plain(&query));
            }
            Event::Result { title, url, error: None } => eprintln!("  {} {}", plain(title), plain(url)),
            Event::Result { url, error: Some(error), .. } => eprintln!("  {}: {}", plain(url), plain(error)),
            Event::Summary(source) => self.sources.push((plain(&source.title), plain(&source.url))),
            Event::Failed { reason } => eprintln!("(nothing found: {reason})"),
            Event::Answer(answer) => self.end(&mut out, answer)?,
        }
        Ok(out.flush()?)
    }

    /// `[2]`, on a terminal as a link to its source.
    fn reference(&self, n: usize, links: bool) -> String {
        match self.sources.get(n - 1) {
            // OSC 8, as terminals read hyperlinks.
            Some((_, url)) if links && url.starts_with("http") => {
                format!("\x1b]8;;{url}\x1b\\[{n}]\x1b]8;;\x1b\\")
            }
            _ => format!("[{n}]"),
        }
    }

    fn end(&self, out: &mut impl Write, answer: &Answer) -> Result<()> {
        writeln!(out)?;
        for &n in &answer.cited {
            if let Some((title, url)) = self.sources.get(n - 1) {
                let title = if title.is_empty() { String::new() } else { format!("{title}, ") };
                writeln!(out, "[{n}] {title}{url}")?;
            }
        }
        Ok(())
    }
}
