//! The system calls that a program in the sandbox may make.
//!
//! What is not listed fails with "operation not permitted". Two filters, since one has one answer to what it refuses:
//! libraries fall back from a call that is newer than they can count on if it "does not exist", not if it is forbidden.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// No effect beyond the caller's own memory, time and open files.
const FREE: &[c_long] = &[
    // Reading, and writing to what is open: two pipes.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_lseek,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_fadvise64,
    // Looking at files.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_umask,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mincore,
    // Threads.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_getcpu,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Its own signals and clocks.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_times,
    // Who it is and where.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_getsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_getrandom,
    libc::SYS_capget,
    // The program itself is begun by this one; another program has the same filters.
    libc::SYS_execve,
    // Refused by the other filter, with the answer that libraries expect.
    libc::SYS_clone3,
];

/// As [`FREE`], the older forms that x86-64 has beside them.
#[cfg(target_arch = "x86_64")]
const FREE_HERE: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_eventfd,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_alarm,
    libc::SYS_time,
    libc::SYS_getpgrp,
    libc::SYS_getrlimit,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const FREE_HERE: &[c_long] = &[];

/// Whatever could make, empty or lengthen a file.
const WRITES: c_int = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND;
/// Asking a terminal whether it is one and how large (TCGETS, TIOCGWINSZ); whether there is something to read (FIONREAD);
/// whether a file closes by itself (FIOCLEX, FIONCLEX). The same numbers on both architectures.
const REQUESTS: &[u64] = &[0x5401, 0x5413, 0x541b, 0x5451, 0x5450];
/// Copies of an open file and its flags. Not its owner, who would get signals.
const FILE_COMMANDS: &[c_int] = &[
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETPIPE_SZ,
];
/// Names of threads and of memory.
const OWN_SETTINGS: &[c_int] = &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA];

/// The filters, to be put on in this order.
pub(super) fn filters() -> Result<[BpfProgram; 2], BackendError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let errno = |code: c_int| SeccompAction::Errno(code as u32);
    let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = SeccompFilter::new(absent, SeccompAction::Allow, errno(libc::ENOSYS), arch)?;
    let allowed = SeccompFilter::new(allowed()?, errno(libc::EPERM), SeccompAction::Allow, arch)?;
    Ok([absent.try_into()?, allowed.try_into()?])
}

fn allowed() -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let mut calls: BTreeMap<c_long, Vec<SeccompRule>> =
        FREE.iter().chain(FREE_HERE).map(|&call| (call, Vec::new())).collect();
    let rule = |argument: u8, op: SeccompCmpOp, value: u64| {
        SeccompRule::new(vec![SeccompCondition::new(argument, Dword, op, value)?])
    };
    let one_of = |argument: u8, values: &mut dyn Iterator<Item = u64>| {
        values.map(|value| rule(argument, SeccompCmpOp::Eq, value)).collect::<Result<Vec<_>, _>>()
    };
    let read_only = SeccompCmpOp::MaskedEq(WRITES as u64);
    calls.insert(libc::SYS_openat, vec![rule(2, read_only.clone(), libc::O_RDONLY as u64)?]);
    #[cfg(target_arch = "x86_64")]
    calls.insert(libc::SYS_open, vec![rule(1, read_only, libc::O_RDONLY as u64)?]);
    // Threads of the program, never another process.
    let thread = libc::CLONE_THREAD as u64;
    calls.insert(libc::SYS_clone, vec![rule(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    // Limits of its own, which it can only lower.
    calls.insert(libc::SYS_prlimit64, vec![rule(0, SeccompCmpOp::Eq, 0)?]);
    calls.insert(libc::SYS_ioctl, one_of(1, &mut REQUESTS.iter().copied())?);
    calls.insert(libc::SYS_fcntl, one_of(1, &mut FILE_COMMANDS.iter().map(|&c| c as u64))?);
    calls.insert(libc::SYS_prctl, one_of(0, &mut OWN_SETTINGS.iter().map(|&c| c as u64))?);
    Ok(calls)
}
