//! Why a file is not read.

/// What is wrong with a file. A pickle is a program: whatever is not on a short list is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Not a zip archive at all, or a damaged one.
    #[error("not a sound zip archive as torch.save writes it: {0}")]
    Archive(String),
    /// Larger than what is read.
    #[error("{what} is {found} bytes, more than the {limit} that are read")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size in bytes.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// An entry whose name is no part of a checkpoint, or leads out of it.
    #[error("the archive's entry {0:?} is no part of a checkpoint")]
    EntryName(String),
    /// A name that occurs twice.
    #[error("the archive holds {0} twice")]
    DuplicateEntry(String),
    /// A compressed or encrypted entry; torch stores all of them plainly.
    #[error("the archive's entry {0} is compressed or encrypted, which torch.save never does")]
    NotStored(String),
    /// Two entries share bytes.
    #[error("the archive's entries {0} and {1} overlap")]
    EntriesOverlap(String, String),
    /// An entry that has to be there.
    #[error("the archive lacks {0}")]
    MissingEntry(String),
    /// Values of another byte order.
    #[error("the file is in byte order {0:?}, expected little")]
    ByteOrder(String),
    /// The pickle names something that is not allowed, be it harmless or `os.system`.
    #[error("its pickle asks for {0}, which is not on the list of what a checkpoint needs; nothing was run")]
    Global(String),
    /// The pickle calls something with arguments that it does not take.
    #[error("its pickle calls {0}")]
    Call(String),
    /// An instruction that torch does not write.
    #[error("its pickle has instruction {opcode:#04x} at byte {at}, which no checkpoint needs")]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Where it is.
        at: usize,
    },
    /// The pickle breaks off or contradicts itself.
    #[error("its pickle is damaged at byte {at}: {reason}")]
    Pickle {
        /// Where.
        at: usize,
        /// How.
        reason: String,
    },
    /// Values within values without end, or far too many.
    #[error("its values {0}")]
    Structure(String),
    /// A field is missing or of another type.
    #[error("its field {field} is {found}, expected {expected}")]
    Field {
        /// The path, e.g. `common_args.threshold`.
        field: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
    /// A field that is not known.
    #[error("it has the field {0}, which is not known here")]
    UnknownField(String),
    /// A tensor that does not fit its storage or is of no use as it is.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}
