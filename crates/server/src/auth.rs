//! Credentials: who may claim to be whom.
//!
//! Without `--dev` every principal needs an API key, or a certificate that names it. With it, whoever presents nothing is admitted; a credential that is
//! presented is checked all the same, and refused if it cannot be.
//!
//! Secrets have 256 bits, so nobody finds one by trying. A peer that presents wrong ones is told to wait, and costs little; right
//! ones are always admitted, whatever else comes from their address: behind a proxy that is everybody's.

mod throttle;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use trunkline_core::{
    Error, Kind,
    caller::{Caller, Credential},
    gate::Gate,
    identity::Identity,
    task::Tasks,
    token,
};
use trunkline_store::log::Clock;

use crate::tls;
use throttle::{Secret, Throttle};

/// Keys of the credentials map that carry a credential, in the order in which they are looked at.
const CREDENTIALS: [&str; 6] = ["token", "task_token", "x-api-key", "api_key", "authorization", "bearer_token"];

/// How often it is looked at whether the token of a stream is still good. One that is revoked ends it at once.
const TOKEN_PAUSE: Duration = Duration::from_secs(30);

/// Why what somebody came in with is not good any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Its time is over.
    Expired,
    /// Somebody took it back.
    Revoked,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Expired => "its credential has expired",
            Self::Revoked => "its API key was revoked",
        })
    }
}

/// How connections are admitted. Clones share what they know of peers.
#[derive(Clone)]
pub(crate) struct Auth {
    /// Who is asking over HTTP and presents nothing, where that is enough.
    anybody: Option<Arc<Caller>>,
    gate: Gate,
    tasks: Tasks,
    throttle: Arc<Mutex<Throttle>>,
}

impl Auth {
    /// With `dev`, whoever presents nothing is admitted.
    pub(crate) fn new(gate: Gate, tasks: Tasks, dev: bool) -> Self {
        let anybody = Identity::user("dev", "http").ok().filter(|_| dev);
        let anybody = anybody.map(|identity| Caller::new(identity, String::new(), Credential::none(true)).into());
        Self { anybody, gate, tasks, throttle: Arc::default() }
    }

    /// Admits `claimed`, or says why not. A certificate that names it is enough; a credential beside it is checked all the
    /// same. With `--dev`, orchestrators and the workflow engine administer the server, as in the published server's
    /// development mode; otherwise nobody does by claiming a kind.
    pub(crate) async fn admit(
        &self,
        claimed: &Identity,
        credentials: &HashMap<String, String>,
        peer: Option<IpAddr>,
        certificate: Option<&CertificateDer<'_>>,
    ) -> Result<Credential, Error> {
        let holder = certificate.map(tls::holder).transpose()?.flatten();
        if let Some((holder, _)) = &holder {
            tls::check_holder(holder, claimed)?;
        }
        // Where both are presented, both have to last.
        let certified_until = holder.map(|(_, until)| until);
        let within = |credential: Credential| {
            let expires_at = credential.expires_at.into_iter().chain(certified_until).min();
            Credential { expires_at, ..credential }
        };
        let presented = CREDENTIALS.into_iter().find_map(|key| {
            let value = credentials.get(key).filter(|value| !value.is_empty())?;
            Some((key, value.as_str()))
        });
        let Some((key, secret)) = presented else {
            if certified_until.is_some() {
                return Ok(within(Credential::none(false)));
            }
            if self.anybody.is_some() {
                let is_admin = matches!(claimed, Identity::Orchestrator(_) | Identity::WorkflowEngine);
                return Ok(Credential::none(is_admin));
            }
            let kind = claimed.kind();
            return Err(refused(format!("anonymous connection as {kind} requires a matching API key credential")));
        };
        let presented_as = match key {
            "token" | "task_token" => "task",
            "x-api-key" | "api_key" => "key",
            other => other,
        };
        let secret_hash = Secret::new(presented_as, secret);
        self.check_refused(&secret_hash, peer).map_err(|_| throttled())?;
        let admitted = match key {
            "token" | "task_token" => {
                let task = self.tasks.authenticate(secret, claimed).await;
                task.map(|task| Credential { task: Some(task), ..Credential::none(false) })
            }
            "x-api-key" | "api_key" => token::authenticate(&self.gate, secret, claimed).await,
            _ => Err(refused("credential authentication failed: authentication failed: unknown credential".to_owned())),
        };
        let admitted = admitted.map(within);
        admitted.map_err(|error| if self.note(&error, secret_hash, peer).is_some() { throttled() } else { error })
    }

    /// Whoever comes with this secret over HTTP, or with none.
    pub(crate) async fn bearer(&self, secret: Option<&str>, peer: Option<IpAddr>) -> Result<Arc<Caller>, Error> {
        let Some(secret) = secret else {
            let required = || refused("a bearer token is required".to_owned());
            return self.anybody.clone().ok_or_else(required);
        };
        let wait = |wait| Error { kind: Kind::Exhausted, retry_after: Some(wait), ..throttled() };
        let secret_hash = Secret::new("key", secret);
        self.check_refused(&secret_hash, peer).map_err(wait)?;
        match token::bearer(&self.gate, secret).await {
            Ok((identity, credential)) => Ok(Caller::new(identity, String::new(), credential).into()),
            Err(error) => Err(self.note(&error, secret_hash, peer).map_or(error, wait)),
        }
    }

    /// Whether what somebody came in with is still good.
    pub(crate) async fn confirm(&self, caller: &Caller) -> Result<(), Error> {
        token::confirm(&self.gate, &caller.credential).await
    }

    /// Returns when what somebody came in with is not good any more; never for what does not end. Cancel-safe.
    pub(crate) async fn ended(&self, caller: &Caller) -> Ended {
        let Some(own) = &caller.credential.token else { return std::future::pending().await };
        let mut revocations = self.gate.revocations();
        let expired = self.expired(caller);
        tokio::pin!(expired);
        // Another node may have revoked it.
        let mut looks = tokio::time::interval(TOKEN_PAUSE);
        loop {
            tokio::select! {
                ended = &mut expired => return ended,
                _ = looks.tick() => {}
                revoked = revocations.recv() => {
                    if revoked.is_ok_and(|revoked| *revoked != **own) {
                        continue;
                    }
                }
            }
            if self.confirm(caller).await.is_err_and(|error| error.kind == Kind::Unauthenticated) {
                return Ended::Revoked;
            }
        }
    }

    /// Returns when what somebody came in with expires; never for what does not. Cancel-safe.
    pub(crate) async fn expired(&self, caller: &Caller) -> Ended {
        let Some(expires_at) = caller.credential.expires_at else { return std::future::pending().await };
        loop {
            let now = i64::try_from(Clock::system().now_ms() / 1000).unwrap_or(i64::MAX);
            let left = expires_at.saturating_sub(now);
            if left <= 0 {
                return Ended::Expired;
            }
            // In steps, because the wall clock says when it ends, and that may be set.
            tokio::time::sleep(TOKEN_PAUSE.min(Duration::from_secs(left.unsigned_abs()))).await;
        }
    }

    /// Refuses a secret that was wrong a moment ago, without asking the ledger: with how long its peer is to wait.
    fn check_refused(&self, secret: &Secret, peer: Option<IpAddr>) -> Result<(), Duration> {
        let now = Instant::now();
        let mut throttle = self.throttle();
        // A peer that may still try is told what is wrong, by the ledger.
        if throttle.was_refused(secret, now) && throttle.cooldown(peer, now).is_some() {
            return Err(throttle.failed(peer, now).unwrap_or_default());
        }
        Ok(())
    }

    /// Notes why a secret was refused. Answers how long its peer is to wait, if it has failed too often.
    fn note(&self, error: &Error, secret: Secret, peer: Option<IpAddr>) -> Option<Duration> {
        if error.kind != Kind::Unauthenticated {
            return None;
        }
        let now = Instant::now();
        let mut throttle = self.throttle();
        throttle.refuse(secret, now);
        throttle.failed(peer, now)
    }

    fn throttle(&self) -> std::sync::MutexGuard<'_, Throttle> {
        // A panic while holding the lock cannot leave half a change: each section is a few calls of maps.
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn throttled() -> Error {
    refused("auth temporarily throttled after repeated failures".to_owned())
}

fn refused(message: String) -> Error {
    Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", message)
}
