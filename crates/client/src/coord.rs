//! Coordination over keys: a lock, an election, a bounded number of places, something done once. As the published Go SDK does it,
//! under the same keys, so that both can take part in one.
//!
//! A lock here is a lease: whoever holds it renews it every third of its time, and loses it when it cannot. What it guards should
//! bear a moment with two holders, such as when a machine slept; [`Lease::lost`] tells as soon as it is known.

use std::{fmt, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    connection::Client,
    error::Result,
    kv::{Kv, Scope},
};

/// How long a lease lasts without being renewed. The published figure.
const TTL: Duration = Duration::from_secs(30);

/// How often somebody who waits looks again.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Where the keys of coordination begin. The published prefix.
const PREFIX: &str = "_sys/coord/";

/// What can be coordinated with others over one scope of keys. Made by [`Client::coord`].
#[derive(Clone, Debug)]
pub struct Coord {
    client: Client,
    kv: Kv,
    ttl: Duration,
}

impl Client {
    /// What can be coordinated with all others that may use the keys of a scope.
    #[must_use]
    pub fn coord(&self, scope: Scope) -> Coord {
        Coord { client: self.clone(), kv: self.kv(scope), ttl: TTL }
    }
}

impl Coord {
    /// Leases that last so long without being renewed: 30 s without this. At least three seconds.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl.max(Duration::from_secs(3));
        self
    }

    /// Takes a lock if it is free.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn try_lock(&self, name: &str) -> Result<Option<Lease>> {
        // Random, so that a successor in the same identity is another owner.
        let owner = format!("{}/{}", self.client.identity(), uuid::Uuid::new_v4());
        let key = format!("{PREFIX}{name}");
        // Told from before the request, so that the lease never seems longer than it is.
        let begun = Instant::now();
        if !self.kv.set_if_absent(&key, owner.clone(), self.ttl).await? {
            return Ok(None);
        }
        let lost = CancellationToken::new();
        let renewing = renew(self.kv.clone(), key.clone(), owner.clone(), self.ttl, begun, lost.clone());
        let renews = AbortOnDropHandle::new(self.client.core.spawn(renewing));
        Ok(Some(Lease { coord: self.clone(), key, owner, lost, renews: Some(renews) }))
    }

    /// Waits for a lock. Who has waited longest is not preferred.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn lock(&self, name: &str) -> Result<Lease> {
        loop {
            if let Some(lease) = self.try_lock(name).await? {
                return Ok(lease);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Who holds a lock: whoever took it, as it named itself.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn holder(&self, name: &str) -> Result<Option<String>> {
        let value = self.kv.get(&format!("{PREFIX}{name}")).await?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// Leads, among all who call this with the same name, one at a time: runs `lead` while it does, and stops it when it does not any
    /// more. Returns what `lead` returned; who lost the lead stands for election again.
    ///
    /// # Errors
    /// As [`Kv::get`], while standing for election.
    pub async fn lead<T, F>(&self, name: &str, mut lead: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = T>,
    {
        loop {
            let lease = self.lock(name).await?;
            tokio::select! {
                done = lead() => {
                    if let Err(error) = lease.release().await {
                        tracing::debug!(%error, name, "the lead was not given back; it ends by itself");
                    }
                    return Ok(done);
                }
                () = lease.lost() => tracing::warn!(name, "lost the lead"),
            }
        }
    }

    /// Takes one of `limit` places, if one is free. A holder that vanishes keeps its place until somebody
    /// [clears](Kv::delete) the key: these are counted, not leased, as the published SDK does it. What must not be lost so is a
    /// [lock](Coord::try_lock) for each place.
    ///
    /// # Errors
    /// As [`Kv::get`]. After [`Kind::Interrupted`](crate::Kind::Interrupted) or [`Kind::Timeout`](crate::Kind::Timeout) nobody knows
    /// whether a place was taken, and one may be lost in the same way.
    pub async fn try_acquire(&self, name: &str, limit: u32) -> Result<Option<Place>> {
        let key = format!("{PREFIX}{name}");
        let taken = self.kv.increment_if(&key, 1, limit.into()).await?.applied;
        Ok(taken.then(|| Place { coord: self.clone(), key, is_released: false }))
    }

    /// Whether this is the first call with this name, of anybody: for what is to be done once. `for_ttl` is how long that is
    /// remembered; `None` for ever.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn once(&self, name: &str, for_ttl: impl Into<Option<Duration>>) -> Result<bool> {
        let by = self.client.identity().to_string();
        self.kv.set_if_absent(&format!("{PREFIX}{name}"), by, for_ttl).await
    }
}

/// Renews a lease until it is lost.
async fn renew(kv: Kv, key: String, owner: String, ttl: Duration, begun: Instant, lost: CancellationToken) {
    let mut good_until = begun + ttl;
    loop {
        sleep(ttl / 3).await;
        let asked = Instant::now();
        // Tried again and again, as long as it may still be ours.
        let renewed = timeout_at(good_until, async {
            loop {
                match kv.compare_and_set(&key, owner.clone(), owner.clone(), ttl).await {
                    Ok(renewed) => return renewed,
                    Err(error) => tracing::debug!(%error, key, "a lease was not renewed; trying again"),
                }
                sleep(LOOK_EVERY).await;
            }
        });
        if renewed.await != Ok(true) {
            lost.cancel();
            return;
        }
        good_until = asked + ttl;
    }
}

/// A lock that is held. Dropping it gives it back, a moment later; [`Lease::release`] waits until it is.
#[must_use = "a lock is given back when this is dropped"]
pub struct Lease {
    coord: Coord,
    key: String,
    owner: String,
    lost: CancellationToken,
    renews: Option<AbortOnDropHandle<()>>,
}

impl Lease {
    /// Returns when it is not held any more: it could not be renewed in time, or somebody took it away.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Whether it is held, as far as is known.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.lost.is_cancelled()
    }

    /// Gives it back. Answers whether it was still held.
    ///
    /// # Errors
    /// As [`Kv::get`]; it ends by itself then.
    pub async fn release(mut self) -> Result<bool> {
        self.renews = None;
        self.coord.kv.compare_and_delete(&self.key, self.owner.clone()).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // `None` after a release.
        if self.renews.take().is_some() {
            let (coord, key, owner) = (self.coord.clone(), self.key.clone(), self.owner.clone());
            self.coord.client.core.spawn(async move {
                if let Err(error) = coord.kv.compare_and_delete(&key, owner).await {
                    tracing::debug!(%error, key, "a lease was not given back; it ends by itself");
                }
            });
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease {{ {:?}, held: {} }}", self.key, self.is_held())
    }
}

/// A place out of several. [`Place::release`] gives it back; dropping it does so a moment later.
#[must_use = "a place is given back when this is dropped"]
#[derive(Debug)]
pub struct Place {
    coord: Coord,
    key: String,
    is_released: bool,
}

impl Place {
    /// Gives it back.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn release(mut self) -> Result<()> {
        self.is_released = true;
        self.coord.kv.decrement_if(&self.key, 1, 0).await.map(|_| ())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_released {
            return;
        }
        let (kv, key) = (self.coord.kv.clone(), self.key.clone());
        self.coord.client.core.spawn(async move {
            if let Err(error) = kv.decrement_if(&key, 1, 0).await {
                tracing::warn!(%error, key, "a place was not given back");
            }
        });
    }
}
