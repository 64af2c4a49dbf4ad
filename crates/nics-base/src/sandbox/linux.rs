//! What a child does to itself between `fork` and `exec`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit, setsid,
};
use seccompiler::BpfProgram;

use super::{Limits, SandboxError, calls, reads};

pub(super) const SIGXCPU: i32 = libc::SIGXCPU;

/// Stack of the first thread, where the machine allows it: programs that recurse deeply are common.
const STACK: u64 = 64 << 20;
const OPEN_FILES: u64 = 64;

/// The filters of system calls, ready to be put on.
#[derive(Debug)]
pub(super) struct Wall {
    filters: [BpfProgram; 2],
    confines_reads: bool,
}

impl Wall {
    pub(super) fn new() -> Result<Self, SandboxError> {
        // A question that changes nothing: is there a seccomp that takes filters?
        // SAFETY: the call only reads its arguments, and the null pointer is what makes it a question (EFAULT is yes).
        let asked =
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, 0usize, 0usize, 0usize) };
        let answer = io::Error::last_os_error();
        if asked != -1 || answer.raw_os_error() != Some(libc::EFAULT) {
            return Err(SandboxError::Unsupported(format!(
                "this kernel takes no seccomp filters ({answer})"
            )));
        }
        let filters = calls::filters().map_err(|e| SandboxError::Unsupported(e.to_string()))?;
        Ok(Self { filters, confines_reads: reads::can_be_confined() })
    }

    pub(super) fn confines_reads(&self) -> bool {
        self.confines_reads
    }

    /// Makes the command's child confine itself before it runs the program, which may read `reads`.
    pub(super) fn confine<'a>(
        &self,
        command: &mut Command,
        limits: Limits,
        reads: impl Iterator<Item = &'a Path>,
    ) -> io::Result<()> {
        let filters = self.filters.clone();
        let reads = if self.confines_reads { reads::ruleset(reads).map_err(io::Error::other)? } else { None };
        let confine = move || {
            setsid()?;
            // The program does not outlive us, even where we are killed.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The signal of the first limit says what happened; whoever ignores it meets the second.
            lower(Resource::Cpu, limits.seconds, limits.seconds + 1)?;
            lower(Resource::As, limits.memory, limits.memory)?;
            lower(Resource::Fsize, 0, 0)?;
            lower(Resource::Core, 0, 0)?;
            lower(Resource::Nofile, OPEN_FILES, OPEN_FILES)?;
            lower(Resource::Stack, STACK, STACK)?;
            hide_files()?;
            drop_powers();
            if let Some(ruleset) = &reads {
                enter(ruleset)?;
            }
            for filter in &filters {
                seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
            }
            Ok(())
        };
        // SAFETY: the closure runs in the child of a program that has threads, so it may only do what is safe in a signal
        // handler. It makes system calls on values that were prepared before, allocates nothing and takes no lock.
        unsafe { command.pre_exec(confine) };
        Ok(())
    }
}

/// Sets a limit, or leaves it where the machine has a lower one.
fn lower(resource: Resource, soft: u64, hard: u64) -> io::Result<()> {
    let most = getrlimit(resource).maximum.unwrap_or(u64::MAX);
    Ok(setrlimit(resource, Rlimit { current: Some(soft.min(most)), maximum: Some(hard.min(most)) })?)
}

/// Puts on a Landlock ruleset.
fn enter(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain numbers, one of them an open file of ours.
    let entered = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1usize, 0usize, 0usize, 0usize) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) == 0
    };
    if entered { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file in memory, which a program can open again by `/dev/stdin` whatever it may read.
pub(super) fn unnamed() -> io::Result<File> {
    Ok(memfd_create("input", MemfdFlags::CLOEXEC)?.into())
}

/// Closes on `exec` whatever a library of ours may have opened without saying so.
fn hide_files() -> io::Result<()> {
    // SAFETY: plain numbers; nothing is closed before the program begins.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    match closed {
        0 => Ok(()),
        // Kernels before 5.11 cannot. Rust opens its files so that they close by themselves.
        _ if io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Empties the set of powers that a program started by root would have. Others have none to lose: it fails for them.
fn drop_powers() {
    for power in 0..64usize {
        // SAFETY: plain numbers; a power that the kernel does not know is an error that changes nothing.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, power, 0usize, 0usize, 0usize) };
    }
}

/// How many threads a process has; none where it has ended.
pub(super) fn threads(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let count = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    count.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}
