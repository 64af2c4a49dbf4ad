//! Pages as tensors.

use nics_kernels::Kind as Format;
use tch::{Device, Kind, Tensor};

use crate::{Bits, Error, Result};

/// How the rows of a layer lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Query heads; a multiple of the key heads.
    pub queries: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head; a multiple of 4.
    pub head_dim: usize,
    /// Channels that share a scale; divides `head_dim`.
    pub group: usize,
    /// Tokens of a page.
    pub page: usize,
    /// Format of exact rows: bf16 or f16.
    pub exact: Format,
}

impl Layout {
    pub(super) fn check(&self) -> Result<()> {
        let setting = |field: &str, found: usize, expected: String| {
            Err(Error::Setting { field: field.into(), found: found.to_string(), expected })
        };
        if self.kv_heads == 0 || self.queries == 0 || !self.queries.is_multiple_of(self.kv_heads) {
            return setting(
                "queries",
                self.queries,
                format!("a multiple of the {} key heads", self.kv_heads),
            );
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(4) {
            return setting("head_dim", self.head_dim, "a multiple of 4".into());
        }
        if self.group == 0 || !self.head_dim.is_multiple_of(self.group) {
            return Err(Error::GroupMismatch { head_dim: self.head_dim as i64, group: self.group as i64 });
        }
        if self.page == 0 {
            return setting("page", 0, "at least one token".into());
        }
        if self.exact == Format::F32 {
            return setting(
                "exact",
                32,
                "bf16 or f16: rows of float32 do not become codes in their place".into(),
            );
        }
        Ok(())
    }

    pub(super) fn groups(&self) -> usize {
        self.head_dim / self.group
    }

    /// Rows of a page: keys and values of all heads.
    pub(super) fn rows(&self) -> usize {
        2 * self.kv_heads * self.page
    }

    pub(super) fn kind(&self) -> Kind {
        if self.exact == Format::F16 { Kind::Half } else { Kind::BFloat16 }
    }

    /// `[keys and values, kv_heads, tokens of a page, last]`.
    pub(super) fn shape(&self, last: usize) -> [i64; 4] {
        [2, self.kv_heads as i64, self.page as i64, last as i64]
    }
}

/// A page.
#[derive(Debug)]
pub struct Page {
    pub(super) bits: Bits,
    pub(super) tokens: usize,
    pub(super) rows: Tensor,
    pub(super) parameters: Option<Tensor>,
}

impl Page {
    /// Its width.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `[keys and values, kv_heads, tokens of a page, head_dim]` of bf16 or f16, or as many bytes of codes in the native layout
    /// ([`crate::pack`]), `[.., head_dim · bits / 8]`.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// Float32 `[scales and zeros, keys and values, kv_heads, tokens of a page, groups]`; `None` while rows are exact.
    pub fn parameters(&self) -> Option<&Tensor> {
        self.parameters.as_ref()
    }
}

/// What a layer keeps of one sequence.
#[derive(Debug)]
pub struct Pages {
    layout: Layout,
    device: Device,
    pub(super) all: Vec<Page>,
}

impl Pages {
    /// No page yet.
    ///
    /// # Errors
    /// A layout that makes no sense.
    pub fn new(layout: Layout, device: Device) -> Result<Self> {
        layout.check()?;
        Ok(Self { layout, device, all: Vec::new() })
    }

    /// How they lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Where they lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The pages, oldest first.
    pub fn pages(&self) -> &[Page] {
        &self.all
    }

    /// Tokens in all pages.
    pub fn tokens(&self) -> usize {
        self.all.iter().map(|page| page.tokens).sum()
    }

    /// Bytes of rows, scales and zeros.
    pub fn bytes(&self) -> usize {
        let parameters = 2 * self.layout.rows() * self.layout.groups() * size_of::<f32>();
        let of_page = |page: &Page| {
            let own = if page.parameters.is_some() { parameters } else { 0 };
            page.bits.bytes(self.layout.rows() * self.layout.head_dim) + own
        };
        self.all.iter().map(of_page).sum()
    }

    /// Appends tokens as exact rows: into the last page while it is exact and has room, then into new ones.
    ///
    /// # Shapes
    /// `keys` (rotated) and `values`: `[tokens, kv_heads, head_dim]`.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let Layout { kv_heads, head_dim, page: capacity, .. } = self.layout;
        let n = keys.size().first().map_or(0, |n| *n as usize);
        let expected = [n as i64, kv_heads as i64, head_dim as i64];
        if keys.size() != expected || values.size() != expected {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?}, expected [tokens, {kv_heads}, {head_dim}] for both",
                keys.size(),
                values.size()
            )));
        }
        // [tokens, kv_heads, head_dim] -> [2, kv_heads, tokens, head_dim]
        let both = Tensor::f_stack(&[keys, values], 0)?.f_transpose(1, 2)?.f_to_device(self.device)?;
        let both = both.f_to_kind(self.layout.kind())?;
        let mut done = 0;
        while done < n {
            let open = |page: &Page| page.bits == Bits::B16 && page.tokens < capacity;
            if !self.all.last().is_some_and(open) {
                let rows = Tensor::f_zeros(self.layout.shape(head_dim), (self.layout.kind(), self.device))?;
                self.all.push(Page { bits: Bits::B16, tokens: 0, rows, parameters: None });
            }
            let Some(page) = self.all.last_mut() else { break };
            let now = (capacity - page.tokens).min(n - done);
            let mut to = page.rows.f_narrow(2, page.tokens as i64, now as i64)?;
            to.f_copy_(&both.f_narrow(2, done as i64, now as i64)?)?;
            page.tokens += now;
            done += now;
        }
        Ok(())
    }

    /// Appends a page of codes as the cache keeps it in the processor's memory: `rows` as [`Page::rows`], `scales` and `zeros`
    /// each `[keys and values, kv_heads, tokens of a page, groups]`.
    pub fn push(
        &mut self,
        bits: Bits,
        tokens: usize,
        rows: &[u8],
        scales: &[f32],
        zeros: &[f32],
    ) -> Result<()> {
        let (all, groups) = (self.layout.rows(), self.layout.rows() * self.layout.groups());
        let row = bits.bytes(self.layout.head_dim);
        let fits = rows.len() == all * row && scales.len() == groups && zeros.len() == groups;
        if bits == Bits::B16 || tokens > self.layout.page || !fits {
            return Err(Error::Input(format!(
                "a page of {tokens} tokens of {} bits: {} bytes, {} scales, {} zeros; expected at most {} tokens of codes, {} bytes, \
                 {groups} scales and zeros",
                bits.get(),
                rows.len(),
                scales.len(),
                zeros.len(),
                self.layout.page,
                all * row
            )));
        }
        let rows = Tensor::f_from_slice(rows)?.f_to_device(self.device)?.f_reshape(self.layout.shape(row))?;
        let [_, heads, page, last] = self.layout.shape(self.layout.groups());
        let parameters = Tensor::f_from_slice(&[scales, zeros].concat())?.f_to_device(self.device)?;
        let parameters = Some(parameters.f_reshape([2, 2, heads, page, last])?);
        self.all.push(Page { bits, tokens, rows, parameters });
        Ok(())
    }
}
