//! A flag that SIGINT and SIGTERM set, for loops that stop at a good place.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};
use crate::exit::Exit;

/// Whether somebody asked this process to stop.
///
/// The first SIGINT or SIGTERM sets the flag; a second one ends the process at once with exit code 130.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over SIGINT and SIGTERM. Call once, at the start of `main`.
    pub fn install() -> io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the shutdown looks at the flag before this signal sets it.
            flag::register_conditional_shutdown(signal, Exit::Interrupted.code().into(), Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self(asked))
    }

    /// A flag that no signal sets, for libraries and tests.
    pub fn never() -> Self {
        Self::default()
    }

    /// True from the first signal on.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// [`Error::Interrupted`] from the first signal on, for `?` at the top of a loop.
    pub fn check(&self) -> Result<()> {
        if self.requested() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Takes the flag back, where a signal only stops what is under way: a reply in a chat. Gives what it was.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }

    /// Sets the flag as a signal would.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_sets_the_flag() {
        let interrupt = Interrupt::install().unwrap();
        assert!(!interrupt.requested());
        interrupt.check().unwrap();
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert!(interrupt.requested());
        assert_eq!(interrupt.check().unwrap_err().exit(), Exit::Interrupted);
    }
}
