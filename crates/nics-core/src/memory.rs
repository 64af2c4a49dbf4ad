//! What the process occupies, for result rows: resident memory now and at its peak.
//!
//! Read from Linux's `/proc`; elsewhere every answer is `None`, as a figure that is not known should be.

use std::fs;

/// Resident memory of this process in bytes (`VmRSS`).
pub fn resident() -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS")
}

/// The most resident memory that this process had, in bytes (`VmHWM`), since it started or since [`reset_peak`].
pub fn peak_resident() -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Starts the peak anew from what is resident now. `false` where the system does not allow it: the peak then still
/// counts from the start of the process, and a row should say so or leave it out.
pub fn reset_peak() -> bool {
    // proc(5): writing 5 to clear_refs resets the "high water mark" of resident memory.
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Gives back to the system what the allocator keeps of freed memory. Whoever replaces tensors one by one otherwise holds the
/// holes between those that stay. Nothing happens where the allocator is not glibc's.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes the allocator's own locks and touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `VmRSS:      1234 kB` -> 1234 * 1024.
fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(field(status, "VmRSS"), Some(1 << 20));
        assert_eq!(field(status, "VmHWM"), Some(2 << 20));
        assert_eq!(field(status, "VmSwap"), None);
        assert_eq!(field("VmRSS: lots kB", "VmRSS"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_allocation_shows_in_the_peak() {
        let before = peak_resident().unwrap();
        let touched = vec![1_u8; 64 << 20];
        assert!(resident().unwrap() > 0);
        assert!(peak_resident().unwrap() >= before.max(touched.len() as u64));
    }
}
