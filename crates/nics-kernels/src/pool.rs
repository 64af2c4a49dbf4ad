//! Threads that run one kernel at a time, spin briefly between two, then park.
//!
//! A decode step is some two hundred kernels of a tenth of a millisecond with a few microseconds between them: waking a
//! parked thread each time would cost as much as the work. A server that waits for requests must not burn a core. So a
//! worker spins for [`SPIN`] after a kernel and then parks.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a worker spins for the next kernel before it parks.
pub const SPIN: Duration = Duration::from_micros(100);

/// Set in [`Shared::state`] while workers may join the kernel.
const OPEN: u64 = 1 << 31;
/// Set in [`Shared::state`] when the pool ends.
const ENDED: u64 = 1 << 30;
/// The workers inside the kernel, in the low bits of [`Shared::state`].
const ACTIVE: u64 = ENDED - 1;

/// A kernel on its caller's stack.
struct Kernel<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Kernel<'_> {
    /// Takes tasks until there are none left.
    fn work(&self) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.run)(task))) {
                self.next.store(self.tasks, Ordering::Relaxed);
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                return;
            }
        }
    }
}

struct Shared {
    /// Number of the kernel in the high half; [`OPEN`], [`ENDED`] and the workers inside it in the low half.
    state: AtomicU64,
    kernel: AtomicPtr<Kernel<'static>>,
    parked: Vec<AtomicBool>,
}

/// A pool: its caller and `threads - 1` workers.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// Whether a kernel runs. Being a `Cell` it also keeps the pool with one caller at a time: `Pool` is not `Sync`.
    busy: Cell<bool>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool in which `threads` threads compute, the caller among them; at least 1.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let count = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            kernel: AtomicPtr::new(std::ptr::null_mut()),
            parked: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool =
            Self { shared: shared.clone(), workers: Vec::new(), handles: Vec::new(), busy: Cell::new(false) };
        for i in 0..count {
            let shared = shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("nics-kernel-{}", i + 1))
                .spawn(move || shared.serve(i))?;
            pool.handles.push(worker.thread().clone());
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `run(0)`, …, `run(tasks - 1)`, in any order, on all threads; returns when all are done. A call from inside
    /// a task runs on that task's thread alone.
    ///
    /// # Panics
    /// With the panic of a task, once no other task runs any more.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || self.busy.replace(true) {
            (0..tasks).for_each(run);
            return;
        }
        let kernel = Kernel { run, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        let shared = &*self.shared;
        let at = std::ptr::from_ref(&kernel).cast_mut().cast::<Kernel<'static>>();
        shared.kernel.store(at, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // SeqCst on both sides of `parked` and `state`: either a worker that is about to park sees this kernel, or this
        // sees that it has parked.
        shared.state.store((number << 32) | OPEN, Ordering::SeqCst);
        for (parked, thread) in shared.parked.iter().zip(&self.handles) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        kernel.work();
        // Nobody joins any more; wait for those inside, who still look at `kernel`.
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(1 << 14) {
                std::thread::yield_now();
            }
        }
        self.busy.set(false);
        let panic = kernel.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(ENDED, Ordering::SeqCst);
        self.handles.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing of its own to report.
            drop(worker.join());
        }
    }
}

impl Shared {
    /// The life of worker `i`.
    fn serve(&self, i: usize) {
        let mut last = 0;
        while let Some(number) = self.wait(i, last) {
            last = number;
            if !self.join(number) {
                continue;
            }
            // SAFETY: `join` counted this worker among the active ones of the kernel that `state` named open, and
            // `Pool::run` keeps that kernel alive until the count is back to zero.
            unsafe { &*self.kernel.load(Ordering::Relaxed) }.work();
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a kernel other than `last`; `None` when the pool ends.
    fn wait(&self, i: usize, last: u64) -> Option<u64> {
        let mut since = Instant::now();
        let mut spins = 0u32;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & ENDED != 0 {
                return None;
            }
            if state & OPEN != 0 && state >> 32 != last {
                return Some(state >> 32);
            }
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(64) && since.elapsed() > SPIN {
                self.parked[i].store(true, Ordering::SeqCst);
                let state = self.state.load(Ordering::SeqCst);
                if state & ENDED == 0 && (state & OPEN == 0 || state >> 32 == last) {
                    std::thread::park();
                }
                self.parked[i].store(false, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }

    /// Counts the caller among the active workers of kernel `number`, if that one is still open.
    fn join(&self, number: u64) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state & OPEN == 0 || state >> 32 != number {
                return false;
            }
            // Acquire: the kernel's pointer, stored before the state was opened, is seen.
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

thread_local! {
    static OWN: RefCell<Option<Rc<Pool>>> = const { RefCell::new(None) };
}

/// Gives the calling thread a pool of `threads` threads in place of the one that it has. Like libtorch's thread count, it
/// belongs to the thread that computes; it ends with that thread.
///
/// # Errors
/// When the system refuses a thread; the old pool then stays.
pub fn set_threads(threads: usize) -> std::io::Result<()> {
    if own().threads() != threads.max(1) {
        let pool = Rc::new(Pool::new(threads)?);
        OWN.with(|own| own.replace(Some(pool)));
    }
    Ok(())
}

/// The calling thread's pool; the thread alone until [`set_threads`] says otherwise.
pub fn own() -> Rc<Pool> {
    OWN.with(|own| {
        let mut own = own.borrow_mut();
        own.get_or_insert_with(|| {
            let shared =
                Shared { state: AtomicU64::new(0), kernel: AtomicPtr::default(), parked: Vec::new() };
            let (workers, handles) = (Vec::new(), Vec::new());
            Rc::new(Pool { shared: Arc::new(shared), workers, handles, busy: Cell::new(false) })
        })
        .clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(4).unwrap();
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|i| {
                ran[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{tasks}");
        }
    }

    #[test]
    fn many_short_kernels_and_parked_workers() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        for round in 0..if cfg!(miri) { 20 } else { 20_000 } {
            pool.run(5, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            if round % 2_000 == 0 {
                std::thread::sleep(SPIN * 5);
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), if cfg!(miri) { 200 } else { 200_000 });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(50, &|i| assert!(i != 17, "seventeen"))));
        assert!(caught.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(50, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn a_kernel_inside_a_kernel_runs_on_its_own_thread() {
        set_threads(2).unwrap();
        let ran = AtomicUsize::new(0);
        own().run(4, &|_| own().run(8, &|_| _ = ran.fetch_add(1, Ordering::Relaxed)));
        assert_eq!(ran.load(Ordering::Relaxed), 32);
        own().run(4, &|_| _ = ran.fetch_add(1, Ordering::Relaxed));
        assert_eq!(ran.load(Ordering::Relaxed), 36);
    }

    #[test]
    fn idle_workers_park() {
        let pool = Pool::new(2).unwrap();
        pool.run(2, &|_| {});
        let deadline = Instant::now() + Duration::from_secs(20);
        while !pool.shared.parked[0].load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the worker still spins");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn each_thread_has_its_own_pool() {
        set_threads(2).unwrap();
        assert_eq!(own().threads(), 2);
        std::thread::spawn(|| assert_eq!(own().threads(), 1)).join().unwrap();
        set_threads(1).unwrap();
        assert_eq!(own().threads(), 1);
    }
}
