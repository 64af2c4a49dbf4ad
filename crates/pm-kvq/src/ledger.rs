//! The books of one layer's cache: how many tokens stand where, at what width, and what that costs.
//!
//! Tokens stand in three regions: the *sink* (the first ones, exact), the *middle*, and the *window* (the latest ones,
//! exact). A token enters the sink until that is full, then the window; from there blocks of `window` tokens move to the
//! middle. After each token, while the bytes are over the budget, the middle is halved in width, as a whole or page by
//! page. The state after `n` tokens therefore does not depend on how many came in one call.
//!
//! The books know no tensors: [`crate::cache`] makes its storage agree with them, and [`crate::budget::schedule`] runs them
//! alone to foretell what a budget leads to.

use serde::{Deserialize, Serialize};

use crate::{Bits, Error, Result};

/// The most tokens of a page.
pub const PAGE: usize = 128;

/// When a block leaves the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WindowMode {
    /// As soon as it is full: 0 to `window − 1` recent tokens are exact. The reference's rule.
    #[default]
    Block,
    /// When a second block is full: at least `window` recent tokens are exact, up to `2·window − 1`.
    Sliding,
}

/// What is halved when the budget is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shrink {
    /// The whole middle: every stored token has the same width. The reference's rule.
    #[default]
    Layer,
    /// As few pages as needed, the widest first, among them the oldest.
    Oldest,
    /// As few pages as needed, the widest first, among them the newest.
    Newest,
}

/// Which bytes the budget is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// Codes and exact values, without scales and zeros. The reference's rule.
    Payload,
    /// Scales and zeros too.
    #[default]
    Total,
}

/// What a token of a layer consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Channels that share a scale.
    pub group: usize,
    /// Bytes of an exact value: 2, or 4 for float32.
    pub exact: usize,
}

impl Shape {
    /// Bytes of the keys and values of a token at a width, without scales and zeros.
    pub fn payload(&self, bits: Bits) -> usize {
        let values = 2 * self.kv_heads * self.head_dim;
        if bits == Bits::B16 { values * self.exact } else { bits.bytes(values) }
    }

    /// Bytes of the scales and zeros of a token: a float32 each for each group; none for exact values.
    pub fn parameters(&self, bits: Bits) -> usize {
        if bits == Bits::B16 {
            0
        } else {
            2 * self.kv_heads * (self.head_dim / self.group) * 2 * size_of::<f32>()
        }
    }

    /// Bytes of a token as a budget counts them.
    pub fn token(&self, bits: Bits, count: Count) -> usize {
        match count {
            Count::Payload => self.payload(bits),
            Count::Total => self.payload(bits) + self.parameters(bits),
        }
    }
}

/// The rules that one layer's books are kept by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What a token is.
    pub shape: Shape,
    /// Tokens of the sink.
    pub sink: usize,
    /// Tokens of a block of the window, at least 1.
    pub window: usize,
    /// When a block leaves it.
    pub mode: WindowMode,
    /// Width at which tokens enter the middle.
    pub init: Bits,
    /// The lowest width.
    pub floor: Bits,
    /// What is halved.
    pub shrink: Shrink,
    /// Bytes that the layer may take; `None`: any number.
    pub budget: Option<u64>,
    /// Which bytes those are.
    pub count: Count,
}

impl Rules {
    /// Checks them.
    ///
    /// # Errors
    /// A window of 0, groups that do not divide a head, heads that do not fill bytes, a floor above the first width, or a
    /// budget that not even sink and window fit.
    pub fn check(&self) -> Result<()> {
        let setting = |field: &str, found: String, expected: &str| {
            Err(Error::Setting { field: field.into(), found, expected: expected.into() })
        };
        let Shape { kv_heads, head_dim, group, exact } = self.shape;
        if kv_heads == 0 || head_dim == 0 || !head_dim.is_multiple_of(4) {
            let found = format!("{kv_heads} heads of {head_dim} channels");
            return setting(
                "the model",
                found,
                "heads whose channels are a multiple of 4, so that codes fill bytes",
            );
        }
        if group == 0 || !head_dim.is_multiple_of(group) {
            return Err(Error::GroupMismatch { head_dim: head_dim as i64, group: group as i64 });
        }
        if exact != 2 && exact != 4 {
            return setting("bytes of an exact value", exact.to_string(), "2 or 4");
        }
        if self.window == 0 {
            return setting(
                "window",
                "0".into(),
                "at least 1 token: that many stay exact until they are quantized",
            );
        }
        if self.floor > self.init {
            let found = format!("{} bits", self.floor.get());
            return setting("min-bits", found, &format!("at most the first width, {} bits", self.init.get()));
        }
        let needed = self.least_budget();
        match self.budget {
            Some(given) if given < needed => Err(Error::BudgetTooSmallForWindow { needed, given }),
            _ => Ok(()),
        }
    }

    /// Bytes of sink and window at their fullest, which every budget has to hold.
    pub fn least_budget(&self) -> u64 {
        ((self.sink + self.full() - 1) * self.shape.token(Bits::B16, self.count)) as u64
    }

    /// Tokens of a page: the largest divisor of the window up to [`PAGE`], so that a block is whole pages.
    pub fn page(&self) -> usize {
        (1..=self.window.min(PAGE)).rev().find(|p| self.window.is_multiple_of(*p)).unwrap_or(1)
    }

    /// Tokens at which a block leaves the window.
    fn full(&self) -> usize {
        match self.mode {
            WindowMode::Block => self.window,
            WindowMode::Sliding => 2 * self.window,
        }
    }

    /// Tokens in the window after `n` tokens beyond the sink.
    fn in_window(&self, n: usize) -> usize {
        if n < self.full() { n } else { self.full() - self.window + n % self.window }
    }

    /// Bytes when, of `tokens` tokens that came one by one, all that can be have the width `bits`.
    pub fn bytes_at(&self, bits: Bits, tokens: usize) -> u64 {
        let beyond = tokens.saturating_sub(self.sink);
        let exact = tokens - beyond + self.in_window(beyond);
        let token = |bits| self.shape.token(bits, self.count) as u64;
        exact as u64 * token(Bits::B16) + (tokens - exact) as u64 * token(bits)
    }
}

/// A page: up to [`Rules::page`] tokens of one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageState {
    /// Tokens in it.
    pub tokens: usize,
    /// Their width.
    pub bits: Bits,
}

/// The books of one layer of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    sink: usize,
    /// Middle and window, oldest first.
    pages: Vec<PageState>,
    /// Tokens of the window, which stand in the last pages.
    window: usize,
    /// Pages of the window.
    window_pages: usize,
    /// Tokens of the middle by width, narrowest first.
    at: [usize; 4],
    /// Width of the middle, where it is one.
    bits: Bits,
    /// Tokens there were when information was lost last; cutting back to that many or more is exact.
    settled: usize,
    /// Whether the state is that which its tokens alone would have led to.
    pure: bool,
}

impl Ledger {
    /// Empty books.
    pub fn new(rules: &Rules) -> Self {
        Self {
            sink: 0,
            pages: Vec::new(),
            window: 0,
            window_pages: 0,
            at: [0; 4],
            bits: rules.init,
            settled: 0,
            pure: true,
        }
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.sink + self.middle() + self.window
    }

    /// Tokens of the sink.
    pub fn sink(&self) -> usize {
        self.sink
    }

    /// Tokens of the middle.
    pub fn middle(&self) -> usize {
        self.at.iter().sum()
    }

    /// Tokens of the window.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Pages of the middle, then those of the window.
    pub fn pages(&self) -> &[PageState] {
        &self.pages
    }

    /// Width of the middle when it is halved as a whole; otherwise that of the last token that entered it.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// The narrowest and the widest width of the middle; `None` when it is empty.
    pub fn widths(&self) -> Option<(Bits, Bits)> {
        let there = |bits: &Bits| self.at[slot(*bits)] > 0;
        Some((Bits::ALL.into_iter().find(there)?, Bits::ALL.into_iter().rev().find(there)?))
    }

    /// Bytes of all tokens: codes and exact values, then scales and zeros.
    pub fn bytes(&self, shape: &Shape) -> (usize, usize) {
        let exact = (self.sink + self.window) * shape.payload(Bits::B16);
        Bits::ALL.into_iter().fold((exact, 0), |(payload, parameters), bits| {
            let tokens = self.at[slot(bits)];
            (payload + tokens * shape.payload(bits), parameters + tokens * shape.parameters(bits))
        })
    }

    /// Mean width of all tokens, exact ones counted as they are stored.
    pub fn mean_bits(&self, shape: &Shape) -> f64 {
        let values = 2 * shape.kv_heads * shape.head_dim * self.tokens();
        if values == 0 { 0.0 } else { (self.bytes(shape).0 * 8) as f64 / values as f64 }
    }

    fn cost(&self, rules: &Rules) -> u64 {
        let (payload, parameters) = self.bytes(&rules.shape);
        match rules.count {
            Count::Payload => payload as u64,
            Count::Total => (payload + parameters) as u64,
        }
    }

    /// Takes in `n` tokens, one after the other; gives whether they all fitted the budget. Tokens that do not fit are in the
    /// books all the same, at the lowest width.
    pub fn append(&mut self, rules: &Rules, n: usize) -> bool {
        let mut fits = true;
        for _ in 0..n {
            self.push(rules);
            fits &= self.fit(rules);
        }
        fits
    }

    /// Whether one more token fits the budget.
    pub fn has_room(&self, rules: &Rules) -> bool {
        let Some(budget) = rules.budget else { return true };
        let token = |bits| rules.shape.token(bits, rules.count) as u64;
        let mut exact = self.sink + self.window + 1;
        let flushed =
            if self.sink >= rules.sink && self.window + 1 == rules.full() { rules.window } else { 0 };
        exact -= flushed;
        let floor = rules.floor.min(self.bits);
        let middle: u64 =
            Bits::ALL.into_iter().map(|bits| self.at[slot(bits)] as u64 * token(bits.min(rules.floor))).sum();
        exact as u64 * token(Bits::B16) + flushed as u64 * token(floor) + middle <= budget
    }

    /// One token more, before the budget is looked at.
    fn push(&mut self, rules: &Rules) {
        if self.sink < rules.sink {
            self.sink += 1;
            return;
        }
        match self.pages.last_mut() {
            Some(page) if !self.window.is_multiple_of(rules.page()) => page.tokens += 1,
            _ => {
                self.pages.push(PageState { tokens: 1, bits: Bits::B16 });
                self.window_pages += 1;
            }
        }
        self.window += 1;
        if self.window == rules.full() {
            self.flush(rules);
        }
    }

    /// The oldest block of the window becomes middle.
    fn flush(&mut self, rules: &Rules) {
        let bits = match rules.shrink {
            Shrink::Layer => self.bits,
            Shrink::Oldest | Shrink::Newest => rules.init,
        };
        let from = self.pages.len() - self.window_pages;
        let moved = rules.window / rules.page();
        self.pages[from..from + moved].iter_mut().for_each(|page| page.bits = bits);
        self.window_pages -= moved;
        self.window -= rules.window;
        self.at[slot(bits)] += rules.window;
        self.bits = bits;
        if bits != Bits::B16 {
            self.settled = self.tokens();
        }
    }

    /// Halves widths while the bytes are over the budget; `false` when they still are in the end.
    fn fit(&mut self, rules: &Rules) -> bool {
        let Some(budget) = rules.budget else { return true };
        while self.cost(rules) > budget {
            if !self.halve(rules) {
                return false;
            }
        }
        true
    }

    /// Halves the middle or a page of it; `false` when there is nothing to halve.
    fn halve(&mut self, rules: &Rules) -> bool {
        let middle = self.pages.len() - self.window_pages;
        match rules.shrink {
            Shrink::Layer => {
                let half = self.bits.half().filter(|half| *half >= rules.floor);
                let Some(half) = half.filter(|_| middle > 0) else { return false };
                self.bits = half;
                for page in &mut self.pages[..middle] {
                    page.bits = page.bits.min(half);
                }
                self.at = [0; 4];
                self.pages[..middle].iter().for_each(|page| self.at[slot(page.bits)] += page.tokens);
            }
            Shrink::Oldest | Shrink::Newest => {
                let Some((_, widest)) = self.widths() else { return false };
                let Some(half) = widest.half().filter(|half| *half >= rules.floor) else { return false };
                let mut pages = self.pages[..middle].iter_mut();
                let is_widest = |page: &&mut PageState| page.bits == widest;
                let page = if rules.shrink == Shrink::Oldest {
                    pages.find(is_widest)
                } else {
                    pages.rev().find(is_widest)
                };
                let Some(page) = page else { return false };
                page.bits = half;
                self.at[slot(widest)] -= page.tokens;
                self.at[slot(half)] += page.tokens;
            }
        }
        self.settled = self.tokens();
        true
    }

    /// The least number of tokens that cutting back to is exact: the state is then that which those tokens alone would have
    /// led to. `None` when no number is, since the books were cut back further before.
    pub fn exact_from(&self) -> Option<usize> {
        self.pure.then_some(self.settled)
    }

    /// The books as numbers.
    pub fn to_numbers(&self) -> Vec<i64> {
        let [sink, window, settled] = [self.sink, self.window, self.settled].map(|n| n as i64);
        let head = [sink, window, i64::from(self.bits.get()), settled, i64::from(self.pure)];
        let pages = self.pages.iter().flat_map(|page| [page.tokens as i64, i64::from(page.bits.get())]);
        head.into_iter().chain(pages).collect()
    }

    /// Books from what [`to_numbers`](Self::to_numbers) gave; `None` when the numbers cannot be books by these rules.
    pub fn of_numbers(rules: &Rules, numbers: &[i64]) -> Option<Self> {
        let width = |bits: i64| Bits::try_from(u32::try_from(bits).ok()?).ok();
        let (head, pages) = numbers.split_first_chunk::<5>()?;
        let [sink, window, bits, settled, pure] = *head;
        let page = |page: &[i64]| {
            let tokens = usize::try_from(page[0]).ok().filter(|n| (1..=rules.page()).contains(n))?;
            Some(PageState { tokens, bits: width(page[1])? })
        };
        let mut books = Self::new(rules);
        books.pages = pages.chunks_exact(2).map(page).collect::<Option<_>>()?;
        books.sink = usize::try_from(sink).ok().filter(|n| *n <= rules.sink)?;
        books.window = usize::try_from(window).ok().filter(|n| *n < rules.full())?;
        books.window_pages = books.window.div_ceil(rules.page());
        books.bits = width(bits)?;
        books.pure = pure == 1;
        let (middle, last) = books.pages.split_at(books.pages.len().checked_sub(books.window_pages)?);
        let exact = last.iter().all(|page| page.bits == Bits::B16);
        let in_window: usize = last.iter().map(|page| page.tokens).sum();
        for page in middle {
            books.at[slot(page.bits)] += page.tokens;
        }
        books.settled = usize::try_from(settled).ok().filter(|n| *n <= books.tokens())?;
        let whole = pages.len().is_multiple_of(2) && matches!(pure, 0 | 1);
        (whole && exact && in_window == books.window).then_some(books)
    }

    /// Forgets all tokens but the first `tokens`. Below [`exact_from`](Self::exact_from), tokens that have been quantized
    /// stay so and the window begins anew.
    pub fn truncate(&mut self, rules: &Rules, tokens: usize) {
        if tokens >= self.tokens() {
            return;
        }
        let exact = self.exact_from().is_some_and(|from| tokens >= from);
        let kept_window = (self.window + tokens).saturating_sub(self.tokens());
        self.sink = self.sink.min(tokens);
        let beyond = tokens - self.sink;
        let mut left = beyond;
        self.pages.retain_mut(|page| {
            page.tokens = page.tokens.min(left);
            left -= page.tokens;
            page.tokens > 0
        });
        // Where nothing was lost since, blocks that had left the window come back to it.
        self.window = if exact { rules.in_window(beyond) } else { kept_window };
        self.window_pages = self.window.div_ceil(rules.page());
        let middle = self.pages.len() - self.window_pages;
        self.at = [0; 4];
        self.pages[..middle].iter().for_each(|page| self.at[slot(page.bits)] += page.tokens);
        self.pure = exact;
        self.settled = self.settled.min(tokens);
        if exact && self.settled == 0 {
            self.bits = rules.init;
        }
    }
}

fn slot(bits: Bits) -> usize {
    match bits {
        Bits::B2 => 0,
        Bits::B4 => 1,
        Bits::B8 => 2,
        Bits::B16 => 3,
    }
}
