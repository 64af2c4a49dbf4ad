//! What a pickle's value is made of, and what it may name.

/// The element types of storages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorageKind {
    /// `torch.FloatStorage`.
    Float,
    /// `torch.BFloat16Storage`.
    BFloat16,
    /// `torch.HalfStorage`.
    Half,
    /// `torch.LongStorage`.
    Long,
}

impl StorageKind {
    /// Bytes of an element.
    pub fn size(self) -> u64 {
        match self {
            Self::Float => 4,
            Self::BFloat16 | Self::Half => 2,
            Self::Long => 8,
        }
    }
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    Storage(StorageKind),
    Dtype,
}

impl Global {
    pub fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch", "FloatStorage") => Self::Storage(StorageKind::Float),
            ("torch", "BFloat16Storage") => Self::Storage(StorageKind::BFloat16),
            ("torch", "HalfStorage") => Self::Storage(StorageKind::Half),
            ("torch", "LongStorage") => Self::Storage(StorageKind::Long),
            ("torch", "float32" | "float" | "bfloat16" | "float16" | "half" | "float64" | "int64") => {
                Self::Dtype
            }
            _ => return None,
        })
    }
}

/// A tensor as the pickle describes it: a view of a storage, in row-major order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorRef {
    /// The storage's key: its bytes are `data/KEY`.
    pub key: String,
    /// Its element type.
    pub kind: StorageKind,
    /// Elements that the storage is said to have.
    pub numel: u64,
    /// First element of the tensor.
    pub offset: u64,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl TensorRef {
    /// Elements of the tensor.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// A value as a tree.
#[derive(Debug, Clone, PartialEq)]
pub enum Tree {
    /// `None`, and dtypes, which nothing here depends on.
    None,
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A text.
    Text(String),
    /// A list or tuple.
    List(Vec<Tree>),
    /// A dictionary whose keys are texts, in order.
    Dict(Vec<(String, Tree)>),
    /// A tensor.
    Tensor(TensorRef),
}

impl Tree {
    /// What it is, for messages.
    pub fn what(&self) -> &'static str {
        match self {
            Self::None => "absent",
            Self::Bool(_) => "a truth value",
            Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Tensor(_) => "a tensor",
        }
    }
}
