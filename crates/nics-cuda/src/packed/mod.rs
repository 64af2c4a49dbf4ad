//! Products with weights of 2, 3, 4 or 8 bits on a device, and the same weights written out.
//!
//! [`Tiles`] is a matrix as it lies there, `kernels.cu` what multiplies it: a launch takes up to 64 rows of x of half precision
//! or bf16, up to 8 of which take the instructions of one, and sums exact products in float32. Codes become numbers in registers, which
//! feed the tensor cores from there; channels are divided among the warps of a block, whose sums meet in shared memory. For
//! more rows the matrix is written out in 16 bits ([`dequantize`]), and the product is a library's.
//!
//! That the scales of a group are applied to sums, not to weights, costs nothing there: a lane has four outputs. Half
//! precision is never summed in, so that nothing overflows or is lost in it.
//!
//! The kernels have not run on a GPU yet, and no speed is claimed for them. Their source is held against plain loops as C++
//! with every thread run (`tests/packed.rs`), and compiled by NVRTC.

mod tiles;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

pub use tiles::{BLOCK, Layout, Scales, TILE, Tiles};

use crate::{Arch, Argument, Device, Function, Grid, Result, Source, compiled};

/// The kernels, for the [`defines`](Kind::defines) of a kind of matrix.
pub const SOURCE: &str = include_str!("kernels.cu");
/// Rows of x that one launch takes.
pub const ROWS: usize = 64;
/// The kernels by their names, those of a product with the rows, and warps, that each is for.
const PRODUCTS: [(&str, usize, u32); 4] =
    [("product_8", 8, 16), ("product_16", 16, 16), ("product_32", 32, 8), ("product_64", ROWS, 8)];
const DEQUANTIZE: &str = "dequantize";
/// Blocks of channels that a block of threads writes out.
const WRITTEN: usize = 8;
/// Devices before this one have no `mma` for bf16.
const OLDEST: Arch = Arch { major: 8, minor: 0 };

/// All kernels by name.
pub fn names() -> [&'static str; 5] {
    let [a, b, c, d] = PRODUCTS.map(|(name, ..)| name);
    [a, b, c, d, DEQUANTIZE]
}

/// Matrices that the same compiled code is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    /// Bits of a code.
    pub bits: u32,
    /// Channels that share a scale; 0 for all.
    pub group: usize,
    /// Bits of a scale: 16 or 32.
    pub scales: u32,
    /// Whether x and y are of half precision; otherwise they are bf16.
    pub half: bool,
}

impl Kind {
    /// That of a matrix.
    pub fn of(layout: &Layout, scales: u32, half: bool) -> Self {
        let group = if layout.group == layout.input { 0 } else { layout.group };
        Self { bits: layout.bits, group, scales, half }
    }

    /// The numbers that [`SOURCE`] is compiled for.
    pub fn defines(&self) -> [(&'static str, i64); 4] {
        [
            ("BITS", i64::from(self.bits)),
            ("GROUP", self.group as i64),
            ("SCALES", i64::from(self.scales)),
            ("IEEE_HALF", i64::from(self.half)),
        ]
    }
}

/// Addresses of a matrix on the device.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// [`Tiles::words`].
    pub codes: u64,
    /// [`Tiles::scales`].
    pub scales: u64,
    /// [`Tiles::zeros`].
    pub zeros: u64,
}

/// A launch that has not happened.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The kernel, one of [`names`].
    pub kernel: &'static str,
    /// Its threads.
    pub grid: Grid,
    /// Its arguments.
    pub arguments: Vec<Argument>,
}

/// `y = x Wᵀ + b`: addresses of y (`[rows, out]`), x (`[rows, input]`, at a multiple of 16 bytes) and b (`[out]`, or 0 for none), all
/// of 16 bits. More than [`ROWS`] rows read the matrix again for each so many.
///
/// # Panics
/// Without rows.
pub fn product(layout: &Layout, w: Addresses, [y, x, bias]: [u64; 3], rows: usize) -> Launch {
    assert!(rows > 0, "a product without rows");
    let fits = PRODUCTS.iter().find(|(_, most, _)| rows <= *most);
    let (kernel, most, warps) = *fits.unwrap_or(&PRODUCTS[PRODUCTS.len() - 1]);
    let int = |n: usize| Argument::Int(n as i32);
    let mut arguments = [y, x, w.codes, w.scales, w.zeros, bias].map(Argument::Pointer).to_vec();
    arguments.extend([rows, layout.input, layout.out, layout.blocks(), layout.groups()].map(int));
    let blocks = [layout.tiles() as u32, rows.div_ceil(most) as u32, 1];
    Launch { kernel, grid: Grid { blocks, threads: warps * 32, shared: 0 }, arguments }
}

/// Writes the matrix out in 16 bits, `[out, input]`, to an address that is a multiple of 16.
pub fn dequantize(layout: &Layout, w: Addresses, to: u64) -> Launch {
    let mut arguments = [to, w.codes, w.scales, w.zeros].map(Argument::Pointer).to_vec();
    let int = |n: usize| Argument::Int(n as i32);
    arguments.extend([layout.input, layout.out, layout.blocks(), layout.groups()].map(int));
    let blocks = [layout.tiles() as u32, layout.blocks().div_ceil(WRITTEN) as u32, 1];
    Launch { kernel: DEQUANTIZE, grid: Grid { blocks, threads: WRITTEN as u32 * 32, shared: 0 }, arguments }
}

/// The kernels of a kind of matrix on a device.
#[derive(Debug, Clone)]
pub struct Kernels(Vec<(&'static str, Function)>);

impl Kernels {
    /// Those of `kind` on the device of this index: compiled or loaded once for the process, with what came of it also when
    /// they cannot be had.
    ///
    /// # Errors
    /// Why they cannot be had, in words.
    pub fn of(kind: Kind, device: usize) -> Result<Self, String> {
        type Known = HashMap<(Kind, usize), Result<Kernels, String>>;
        static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        let own = known.entry((kind, device));
        let compile = || {
            let card = Device::open(device).map_err(|e| e.to_string())?;
            if card.arch() < OLDEST {
                return Err(format!("the device is {}, and the kernels need {OLDEST} at least", card.arch()));
            }
            Self::compile(kind, &card).map_err(|e| e.to_string())
        };
        own.or_insert_with(compile).clone()
    }

    fn compile(kind: Kind, card: &Device) -> Result<Self> {
        let source = Source { name: "packed", text: SOURCE, defines: &kind.defines() };
        let module = card.load(&compiled(&source, card.arch(), None)?)?;
        names().into_iter().map(|name| Ok((name, module.function(name)?))).collect::<Result<_>>().map(Self)
    }

    /// Queues a launch.
    ///
    /// # Safety
    /// As for [`Function::launch`]: what the addresses of the launch point to lies on this device, is as large as the launch's
    /// layout says, and lives until it has run.
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let own = self.0.iter().find(|(name, _)| *name == launch.kernel);
        // SAFETY: the caller's; the arguments are those of the kernel, by the functions of this module.
        own.map_or(Ok(()), |(_, function)| unsafe { function.launch(launch.grid, &launch.arguments) })
    }
}
