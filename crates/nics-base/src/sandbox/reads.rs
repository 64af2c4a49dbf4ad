//! Which files a program in the sandbox may read, by Landlock (Linux 5.13 and newer).
//!
//! Landlock is a second wall: it also keeps from writing, from TCP and from signalling, which the filter of system calls does
//! alone where the kernel has no Landlock.

use std::os::fd::OwnedFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
    path_beneath_rules,
};

/// Libraries and what they read of the system. Of `/proc`, other processes' secrets stay closed: reading those is tracing,
/// which Landlock keeps within itself.
const SYSTEM: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/proc",
    "/sys/devices/system/cpu",
];

/// The newest interface that is used; of an older kernel's, what there is.
const NEWEST: ABI = ABI::V6;

/// Whether the kernel has Landlock and it is switched on.
pub(super) fn can_be_confined() -> bool {
    // SAFETY: the null pointer, size 0 and this flag ask for a version and change nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, ASK_VERSION)
    };
    version > 0
}

const ASK_VERSION: u32 = 1;

/// A ruleset under which nothing but [`SYSTEM`] and `more` is read. What does not exist is passed over.
pub(super) fn ruleset<'a>(more: impl Iterator<Item = &'a Path>) -> Result<Option<OwnedFd>, RulesetError> {
    let paths = SYSTEM.iter().map(Path::new).chain(more);
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rules(path_beneath_rules(paths, AccessFs::from_read(NEWEST)))?;
    Ok(ruleset.into())
}
