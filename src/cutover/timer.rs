//! The times of a cutover, and its limits.

use std::time::{Duration, Instant};

use super::Step;
use super::options::{Options, limit};
use crate::error::{Error, ErrorKind, Result};

/// Measures the steps, and knows how much time is left.
pub(super) struct Timer<'a> {
    began: Instant,
    step_began: Instant,
    stall_began: Option<Instant>,
    timeout: Duration,
    stall_max: Duration,
    /// The steps that there will be: the one after the last that is done is under way.
    plan: Vec<&'static str>,
    pub(super) steps: Vec<Step>,
    tell: &'a mut (dyn FnMut(&Step) + Send + Sync),
}

impl<'a> Timer<'a> {
    pub(super) fn new(options: &Options, arms: bool, tell: &'a mut (dyn FnMut(&Step) + Send + Sync)) -> Timer<'a> {
        let now = Instant::now();
        let mut plan = vec!["check", "fence"];
        plan.extend(options.hooks.on_fence.as_ref().map(|_| "on-fence"));
        plan.extend(["drain", "close", "settle"]);
        plan.extend(arms.then_some("arm"));
        plan.push("switch");
        plan.extend(options.hooks.on_switch.as_ref().map(|_| "on-switch"));
        plan.extend(options.pgbouncer.as_ref().map(|_| "pgbouncer"));
        plan.push("release");
        Timer {
            began: now,
            step_began: now,
            stall_began: None,
            timeout: limit(options.timeout_seconds),
            stall_max: limit(options.max_write_stall_seconds),
            plan,
            steps: Vec::new(),
            tell,
        }
    }

    /// The step under way is done.
    pub(super) fn done(&mut self) {
        let step = Step { name: self.current().to_owned(), ms: self.step_began.elapsed().as_secs_f64() * 1000.0 };
        self.step_began = Instant::now();
        (self.tell)(&step);
        self.steps.push(step);
    }

    pub(super) fn current(&self) -> &'static str {
        self.plan.get(self.steps.len()).copied().unwrap_or("the end")
    }

    /// Writers wait from now on.
    pub(super) fn stall(&mut self) {
        self.stall_began.get_or_insert_with(Instant::now);
    }

    /// Writers wait no longer.
    pub(super) fn resume(&mut self) {
        self.stall_began = None;
    }

    pub(super) fn stalled(&self) -> Duration {
        self.stall_began.map(|began| began.elapsed()).unwrap_or_default()
    }

    /// What is left until one of the limits; how long writers may wait counts only while they do.
    pub(super) fn left(&self) -> Duration {
        let left = self.timeout.saturating_sub(self.began.elapsed());
        match self.stall_began {
            Some(began) => left.min(self.stall_max.saturating_sub(began.elapsed())),
            None => left,
        }
    }

    /// Does something within the limits.
    pub(super) async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let late = |_| {
            let waited = self.stall_began.is_some() && self.stalled() >= self.stall_max;
            let text = if waited {
                "writers had to wait longer than --max-write-stall"
            } else {
                "it took longer than --timeout"
            };
            Error::new(ErrorKind::Aborted, text)
        };
        tokio::time::timeout(self.left(), work).await.map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::options::Hooks;

    fn options(timeout_seconds: f64, max_write_stall_seconds: f64) -> Options {
        Options {
            timeout_seconds,
            max_write_stall_seconds,
            waive: vec![],
            fence_by_default: false,
            fence: Default::default(),
            sequence_margin: 0,
            hooks: Hooks::default(),
            pgbouncer: None,
            require_verified_seconds: None,
            prewarm: false,
            no_reverse: false,
            back: false,
        }
    }

    #[tokio::test]
    async fn a_cutover_ends_at_the_write_stall_or_the_timeout() {
        let mut tell = |_: &Step| {};
        let mut timer = Timer::new(&options(30.0, 0.0), false, &mut tell);
        timer.stall();
        let error = timer.within(std::future::pending::<Result<()>>()).await.unwrap_err();
        assert!(error.to_string().contains("--max-write-stall"), "{error}");
        timer.resume();
        let mut tell = |_: &Step| {};
        let timer = Timer::new(&options(0.0, 9.0), false, &mut tell);
        let error = timer.within(std::future::pending::<Result<()>>()).await.unwrap_err();
        assert!(error.to_string().contains("--timeout"), "{error}");
    }

    #[test]
    fn a_command_of_the_operators_is_a_step_of_its_own() {
        let mut names = Vec::new();
        let mut tell = |step: &Step| names.push(step.name.clone());
        let hooks = Hooks { on_fence: Some("true".into()), on_switch: Some("true".into()), ..Hooks::default() };
        let mut timer = Timer::new(&Options { hooks, ..options(1.0, 1.0) }, false, &mut tell);
        while timer.current() != "the end" {
            timer.done();
        }
        assert_eq!(names.join(" "), "check fence on-fence drain close settle switch on-switch release");
    }
}
