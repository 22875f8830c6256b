//! Background jobs of a server. Each runs until the server stops; one that ends before, by a panic or by returning, is a
//! fault of the server: what it did is not done any more, so the server is not ready, and the program that runs it is told
//! ([`crate::Server::failed`]).

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use trunkline_store::{
    Store,
    fault::{Fault, Faults},
};

/// Runs jobs and tells when one of them, or a thread of the store, has failed. Clones share everything.
#[derive(Clone)]
pub(crate) struct Supervisor {
    tasks: TaskTracker,
    stop: CancellationToken,
    faults: Faults,
}

impl Supervisor {
    /// Jobs run in `tasks`, and may end once `stop` is cancelled.
    pub(crate) fn new(tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { tasks, stop, faults: Faults::default() }
    }

    /// The same, for jobs that run in `tasks` and may end once `stop` is cancelled. Faults are shared.
    pub(crate) fn within(&self, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { tasks, stop, faults: self.faults.clone() }
    }

    /// What cancels the jobs.
    pub(crate) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Where the jobs run, and what they start.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Runs a job that ends by itself when the server stops.
    pub(crate) fn spawn(&self, name: &'static str, job: impl Future<Output = ()> + Send + 'static) {
        let (stop, faults, on_panic) = (self.stop.clone(), self.faults.clone(), self.faults.guard(name));
        self.tasks.spawn(async move {
            let _on_panic = on_panic;
            job.await;
            if !stop.is_cancelled() {
                faults.report(name, "ended before the server stopped");
            }
        });
    }

    /// Runs a job that is dropped when the server stops.
    pub(crate) fn spawn_until_stop(&self, name: &'static str, job: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn(name, async move {
            stop.run_until_cancelled(job).await;
        });
    }

    /// Takes faults of the store's threads for faults of the server.
    pub(crate) fn watch(&self, store: Store) {
        let (stop, faults) = (self.stop.clone(), self.faults.clone());
        self.tasks.spawn(async move {
            if let Some(fault) = stop.run_until_cancelled(store.failed()).await {
                faults.report(&fault.part, &fault.reason);
            }
        });
    }

    /// The first fault, if there was one.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.faults.first()
    }

    /// Waits for the first fault.
    pub(crate) async fn failed(&self) -> Fault {
        self.faults.reported().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor() -> (Supervisor, TaskTracker, CancellationToken) {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        (Supervisor::new(tasks.clone(), stop.clone()), tasks, stop)
    }

    #[tokio::test]
    async fn a_job_that_panics_or_returns_is_a_fault() {
        let (jobs, ..) = supervisor();
        jobs.spawn("relay", async { unreachable!("on purpose") });
        assert_eq!(jobs.failed().await.to_string(), "relay panicked");
        assert_eq!(jobs.fault().map(|fault| fault.part.to_string()).as_deref(), Some("relay"));

        let (jobs, ..) = supervisor();
        jobs.spawn_until_stop("sweep", async {});
        assert_eq!(&*jobs.failed().await.part, "sweep");
    }

    #[tokio::test]
    async fn a_job_that_ends_with_the_server_is_none() {
        let (jobs, tasks, stop) = supervisor();
        jobs.spawn_until_stop("relay", std::future::pending());
        let stopped = stop.clone();
        jobs.spawn("sandboxes", async move { stopped.cancelled().await });
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        assert_eq!(jobs.fault(), None);
    }
}
