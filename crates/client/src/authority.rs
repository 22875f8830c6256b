//! Acting on behalf of somebody else: grants, requests for them, and checks of access.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use trunkline_proto::v1::{
    AccessCheckOperation, AclRenewAuthorityGrantRequest, AuthorityGrantBatchExchangeRequest,
    AuthorityGrantDeriveForTargetRequest, AuthorityGrantDeriveRequest, AuthorityGrantExchangeRequest,
    AuthorityGrantListRequest, AuthorityGrantOperation, AuthorityGrantResponse, AuthorityGrantRevocation,
    AuthorityRequestListFilter, AuthorityRequestOperation, AuthorityRequestOperationResponse,
    BatchAccessCheckOperation, CreateAuthorityRequestPayload, ResolveAuthorityRequest, ResolveAuthorityRequestPayload,
    ResourceAccessRequest, authority_grant_operation::OpType, authority_request_operation,
    downstream_message::Payload as Down, upstream_message::Payload as Up,
};

pub use trunkline_proto::v1::{
    AccessDecisionReceipt, AclAuthorityGrantInfo as Grant, AuthorityRequest, AuthorizationContext, PrincipalRef,
    ResolvedAuthority,
};

use crate::{
    connection::{Ask, Client},
    error::{Error, Kind, Result},
    reply,
    routes::Revoked,
};

/// That a request is made on behalf of somebody, by a grant. Goes into the authorization of messages, keys, tasks and calls.
///
/// ```
/// use trunkline_client::authority::OnBehalf;
/// let authorization = OnBehalf::of("user", "alice").by("grant-1");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnBehalf {
    subject: (String, String),
    grant_id: String,
}

impl OnBehalf {
    /// Of a principal, by its type and id.
    #[must_use]
    pub fn of(subject_type: impl Into<String>, subject_id: impl Into<String>) -> Self {
        Self { subject: (subject_type.into(), subject_id.into()), grant_id: String::new() }
    }

    /// By a grant.
    #[must_use]
    pub fn by(mut self, grant_id: impl Into<String>) -> Self {
        self.grant_id = grant_id.into();
        self
    }
}

impl From<OnBehalf> for AuthorizationContext {
    fn from(on_behalf: OnBehalf) -> Self {
        let (principal_type, principal_id) = on_behalf.subject;
        Self {
            authority_mode: "on_behalf_of".to_owned(),
            subject: Some(PrincipalRef { principal_type, principal_id }),
            grant_id: on_behalf.grant_id,
            ..Self::default()
        }
    }
}

/// What can be done with grants. Made by [`Client::authority`].
#[derive(Clone, Debug)]
pub struct Authority {
    client: Client,
}

impl Client {
    /// What can be done with grants.
    #[must_use]
    pub fn authority(&self) -> Authority {
        Authority { client: self.clone() }
    }

    /// Whether an access would be allowed. The receipt says so, and can go with a message.
    ///
    /// # Errors
    /// What the server refused to tell.
    pub async fn check_access(
        &self,
        access: ResourceAccessRequest,
        authorization: Option<AuthorizationContext>,
    ) -> Result<AccessDecisionReceipt> {
        let access = Some(access);
        let build = |request_id| Up::AccessCheck(Box::new(AccessCheckOperation { request_id, access, authorization }));
        let reply = reply!(self.core.ask(Ask::read("check access"), build).await?, Down::AccessCheckResponse)?;
        match reply.decision {
            Some(decision) if reply.success => Ok(decision),
            _ => Err(Error::from_words(&reply.error)),
        }
    }

    /// Whether each of some accesses would be allowed, in order.
    ///
    /// # Errors
    /// As [`Client::check_access`].
    pub async fn check_accesses(
        &self,
        access: Vec<ResourceAccessRequest>,
        authorization: Option<AuthorizationContext>,
    ) -> Result<Vec<AccessDecisionReceipt>> {
        let build = |request_id| {
            Up::BatchAccessCheck(Box::new(BatchAccessCheckOperation { request_id, access, authorization }))
        };
        let reply = reply!(self.core.ask(Ask::read("check access"), build).await?, Down::BatchAccessCheckResponse)?;
        if reply.success { Ok(reply.decisions) } else { Err(Error::from_words(&reply.error)) }
    }
}

impl Authority {
    async fn run(&self, idempotent: bool, operation: AuthorityGrantOperation) -> Result<AuthorityGrantResponse> {
        let ask = Ask { idempotent, ..Ask::change("use a grant") };
        let build = |request_id| Up::AuthorityGrantOp(Box::new(AuthorityGrantOperation { request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::AuthorityGrant)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    async fn one(&self, idempotent: bool, operation: AuthorityGrantOperation) -> Result<Grant> {
        let reply = self.run(idempotent, operation).await?;
        reply.grant.ok_or_else(|| Error::new(Kind::NotFound, "the server answered without the grant"))
    }

    fn op(op: OpType) -> AuthorityGrantOperation {
        AuthorityGrantOperation { op: op.into(), ..AuthorityGrantOperation::default() }
    }

    /// Exchanges a session's authority for a grant.
    ///
    /// # Errors
    /// This and all others here: what the server refused, and [`Kind::Timeout`] after 10 s.
    pub async fn exchange(&self, request: AuthorityGrantExchangeRequest) -> Result<Grant> {
        let operation = AuthorityGrantOperation { exchange_request: Some(request), ..Self::op(OpType::Exchange) };
        self.one(false, operation).await
    }

    /// Exchanges several; with `stop`, none after the first that is refused.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn exchange_all(&self, requests: Vec<AuthorityGrantExchangeRequest>, stop: bool) -> Result<Vec<Grant>> {
        let batch = AuthorityGrantBatchExchangeRequest { requests, stop_on_first_error: stop };
        let exchange = Self::op(OpType::BatchExchange);
        let operation = AuthorityGrantOperation { batch_exchange_request: Some(batch), ..exchange };
        Ok(self.run(false, operation).await?.grants)
    }

    /// Hands a part of a grant on.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn derive(&self, request: AuthorityGrantDeriveRequest) -> Result<Grant> {
        self.one(false, AuthorityGrantOperation { derive_request: Some(request), ..Self::op(OpType::Derive) }).await
    }

    /// Hands a part of a grant on to whom something is sent.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn derive_for_target(&self, request: AuthorityGrantDeriveForTargetRequest) -> Result<Grant> {
        let derive = Self::op(OpType::DeriveForTarget);
        self.one(false, AuthorityGrantOperation { derive_for_target_request: Some(request), ..derive }).await
    }

    /// One grant.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn get(&self, grant_id: &str) -> Result<Grant> {
        let get = Self::op(OpType::Get);
        self.one(true, AuthorityGrantOperation { grant_id: grant_id.to_owned(), ..get }).await
    }

    /// Makes a grant last until then, in Unix seconds.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn renew(&self, grant_id: &str, expires_at: i64) -> Result<Grant> {
        let grant_id = grant_id.to_owned();
        let request = AclRenewAuthorityGrantRequest { grant_id: grant_id.clone(), expires_at, ..Default::default() };
        self.renewed(grant_id, request).await
    }

    /// Makes a grant last so much longer.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn extend(&self, grant_id: &str, by: Duration) -> Result<Grant> {
        let (grant_id, extend_seconds) = (grant_id.to_owned(), i32::try_from(by.as_secs()).unwrap_or(i32::MAX));
        let request =
            AclRenewAuthorityGrantRequest { grant_id: grant_id.clone(), extend_seconds, ..Default::default() };
        self.renewed(grant_id, request).await
    }

    async fn renewed(&self, grant_id: String, request: AclRenewAuthorityGrantRequest) -> Result<Grant> {
        let renew = Self::op(OpType::Renew);
        self.one(false, AuthorityGrantOperation { grant_id, renew_request: Some(request), ..renew }).await
    }

    /// Makes a grant void, and all that were derived from it.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn revoke(&self, grant_id: &str) -> Result<()> {
        let revoke = Self::op(OpType::Revoke);
        self.run(false, AuthorityGrantOperation { grant_id: grant_id.to_owned(), ..revoke }).await.map(|_| ())
    }

    /// The grants that this client has.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn mine(&self, filter: AuthorityGrantListRequest) -> Result<Vec<Grant>> {
        let list = Self::op(OpType::ListMyGrants);
        Ok(self.run(true, AuthorityGrantOperation { list_request: Some(filter), ..list }).await?.grants)
    }

    /// The grants of which this client is the subject.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn on_me(&self, filter: AuthorityGrantListRequest) -> Result<Vec<Grant>> {
        let list = Self::op(OpType::ListGrantsOnMe);
        Ok(self.run(true, AuthorityGrantOperation { list_request: Some(filter), ..list }).await?.grants)
    }

    /// Whom a grant stands for, and how far: for services that are called on somebody's behalf.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn resolve(&self, request: ResolveAuthorityRequest) -> Result<ResolvedAuthority> {
        let build =
            |request_id| Up::ResolveAuthorityRequest(Box::new(ResolveAuthorityRequest { request_id, ..request }));
        let ask = Ask::read("resolve a grant");
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::ResolveAuthorityResponse)?;
        match reply.authority {
            Some(authority) if reply.ok => Ok(authority),
            _ => Err(Error::from_words(&reply.error)),
        }
    }

    async fn request_op(
        &self,
        idempotent: bool,
        operation: AuthorityRequestOperation,
    ) -> Result<AuthorityRequestOperationResponse> {
        let ask = Ask { idempotent, ..Ask::change("ask for authority") };
        let build = |client_request_id| {
            Up::AuthorityRequestOp(Box::new(AuthorityRequestOperation { client_request_id, ..operation }))
        };
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::AuthorityRequestResponse)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    async fn one_request(&self, idempotent: bool, operation: AuthorityRequestOperation) -> Result<AuthorityRequest> {
        let reply = self.request_op(idempotent, operation).await?;
        reply.request.ok_or_else(|| Error::new(Kind::NotFound, "the server answered without the request"))
    }

    fn request(op: authority_request_operation::OpType) -> AuthorityRequestOperation {
        AuthorityRequestOperation { op: op.into(), ..AuthorityRequestOperation::default() }
    }

    /// Asks for authority. A duration of 0 becomes half an hour, and no level becomes read and write: the published figures.
    ///
    /// # Errors
    /// As [`Authority::exchange`]; [`Kind::Invalid`] unless it is routed to exactly one of a principal and a capability.
    pub async fn ask(&self, mut wanted: CreateAuthorityRequestPayload) -> Result<AuthorityRequest> {
        if let Some(target) = &wanted.routing_target
            && target.principal.is_some() != target.capability.is_empty()
        {
            return Err(Error::invalid("a request is routed to a principal, or to a capability"));
        }
        if wanted.requested_duration_seconds == 0 {
            wanted.requested_duration_seconds = 1800;
        }
        if wanted.requested_access_level == 0 {
            wanted.requested_access_level = trunkline_proto::v1::AccessLevel::Readwrite.into();
        }
        let create = Self::request(authority_request_operation::OpType::Create);
        self.one_request(false, AuthorityRequestOperation { create: Some(wanted), ..create }).await
    }

    /// One request for authority.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn asked(&self, request_id: &str) -> Result<AuthorityRequest> {
        let get = Self::request(authority_request_operation::OpType::Get);
        self.one_request(true, AuthorityRequestOperation { request_id: request_id.to_owned(), ..get }).await
    }

    /// The requests that wait for an answer.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn waiting(&self, filter: AuthorityRequestListFilter) -> Result<Vec<AuthorityRequest>> {
        let list = Self::request(authority_request_operation::OpType::ListPending);
        Ok(self.request_op(true, AuthorityRequestOperation { list_filter: Some(filter), ..list }).await?.requests)
    }

    /// Answers a request.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn decide(&self, request_id: &str, decision: ResolveAuthorityRequestPayload) -> Result<AuthorityRequest> {
        let resolve = Self::request(authority_request_operation::OpType::Resolve);
        let (request_id, decision) = (request_id.to_owned(), Some(decision));
        self.one_request(false, AuthorityRequestOperation { request_id, resolve: decision, ..resolve }).await
    }

    /// Takes a request back.
    ///
    /// # Errors
    /// As [`Authority::exchange`].
    pub async fn withdraw(&self, request_id: &str, reason: &str) -> Result<()> {
        let cancel = Self::request(authority_request_operation::OpType::Cancel);
        let (request_id, reason) = (request_id.to_owned(), reason.to_owned());
        self.request_op(false, AuthorityRequestOperation { request_id, reason, ..cancel }).await.map(|_| ())
    }
}

/// How long before its end a grant is renewed. The published figure.
const RENEW_BEFORE: Duration = Duration::from_secs(30);

/// How long a resolved grant is remembered at most, and how many. The published figures.
const RESOLVED_FOR: Duration = Duration::from_secs(60);
const RESOLVED_MAX: usize = 10_000;

/// Grants that are used again and again: kept, renewed half a minute before they end, and dropped when the server says that they
/// are void, together with what was derived from them. One request for a key is under way at a time.
pub struct GrantCache {
    authority: Authority,
    grants: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Grant>>>>>,
    /// The last grants that were said to be void: one may be on its way to the cache meanwhile.
    void: Mutex<VecDeque<AuthorityGrantRevocation>>,
}

/// Grants that are kept at most; over it, those that nobody asks for right now are forgotten.
const KEPT_MAX: usize = 10_000;

/// Revocations that are remembered.
const VOID_MAX: usize = 256;

impl GrantCache {
    /// An empty one.
    #[must_use]
    pub fn new(client: &Client) -> Arc<Self> {
        let cache = Arc::new(Self { authority: client.authority(), grants: Mutex::default(), void: Mutex::default() });
        let weak: std::sync::Weak<dyn Revoked> = Arc::downgrade(&(Arc::clone(&cache) as Arc<dyn Revoked>));
        client.core.routes.watch_revocations(weak);
        cache
    }

    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<Option<Grant>>>>> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The grant under a key, exchanged if there is none and renewed if it ends soon.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn get_or_exchange(&self, key: &str, request: AuthorityGrantExchangeRequest) -> Result<Grant> {
        let slot = {
            let mut grants = self.lock();
            if grants.len() >= KEPT_MAX {
                grants.retain(|_, slot| Arc::strong_count(slot) > 1);
            }
            Arc::clone(grants.entry(key.to_owned()).or_default())
        };
        // Held over the request on purpose: whoever wants the same waits for the same.
        let mut held = slot.lock().await;
        if held.as_ref().is_some_and(|grant| self.is_void(grant)) {
            *held = None;
        }
        if let Some(grant) = held.as_ref() {
            let left = left(grant);
            if left.is_none_or(|left| left > RENEW_BEFORE) {
                return Ok(grant.clone());
            }
            if left.is_some_and(|left| !left.is_zero())
                && let Ok(renewed) = self.authority.extend(&grant.grant_id, Duration::from_secs(1800)).await
            {
                return Ok(held.insert(renewed).clone());
            }
        }
        let grant = self.authority.exchange(request).await?;
        Ok(held.insert(grant).clone())
    }

    fn void(&self) -> MutexGuard<'_, VecDeque<AuthorityGrantRevocation>> {
        self.void.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_void(&self, grant: &Grant) -> bool {
        self.void().iter().any(|revocation| voids(revocation, grant))
    }

    /// Forgets the grant under a key.
    pub fn invalidate(&self, key: &str) {
        self.lock().remove(key);
    }

    /// The grants that are kept.
    pub async fn list(&self) -> Vec<Grant> {
        let slots: Vec<_> = self.lock().values().cloned().collect();
        let mut all = Vec::new();
        for slot in slots {
            all.extend(slot.lock().await.clone());
        }
        all
    }

    /// Makes all of them void, and forgets them.
    ///
    /// # Errors
    /// The first refusal; the others are still tried.
    pub async fn revoke_all(&self) -> Result<()> {
        let grants = self.list().await;
        self.lock().clear();
        let mut outcome = Ok(());
        for grant in grants {
            let revoked = self.authority.revoke(&grant.grant_id).await;
            outcome = outcome.and(revoked);
        }
        outcome
    }
}

impl Revoked for GrantCache {
    fn revoked(&self, revocation: &AuthorityGrantRevocation) {
        let mut void = self.void();
        void.push_back(revocation.clone());
        if void.len() > VOID_MAX {
            void.pop_front();
        }
        drop(void);
        // One that is in use right now is looked at when it is asked for again.
        let is_void = |grant: &Grant| voids(revocation, grant);
        self.lock().retain(|_, slot| !slot.try_lock().is_ok_and(|held| held.as_ref().is_some_and(is_void)));
    }
}

fn voids(revocation: &AuthorityGrantRevocation, grant: &Grant) -> bool {
    grant.grant_id == revocation.grant_id
        || (revocation.cascade && grant.root_grant_id == revocation.grant_id)
        || (revocation.cascade && grant.parent_grant_id == revocation.grant_id)
}

/// How long it is good; `None` for ever.
fn left(grant: &Grant) -> Option<Duration> {
    until(grant.expires_at)
}

fn until(unix_seconds: i64) -> Option<Duration> {
    let at = u64::try_from(unix_seconds).ok().filter(|at| *at > 0)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Some(Duration::from_secs(at).saturating_sub(now))
}

/// Whom grants stand for, remembered for a minute at most and never beyond the grant; the least recently asked for is forgotten
/// first.
pub struct Resolver {
    authority: Authority,
    known: Mutex<HashMap<(String, String, String), Known>>,
}

struct Known {
    authority: ResolvedAuthority,
    until: tokio::time::Instant,
    asked: tokio::time::Instant,
}

impl Resolver {
    /// An empty one.
    #[must_use]
    pub fn new(client: &Client) -> Arc<Self> {
        let resolver = Arc::new(Self { authority: client.authority(), known: Mutex::default() });
        let weak: std::sync::Weak<dyn Revoked> = Arc::downgrade(&(Arc::clone(&resolver) as Arc<dyn Revoked>));
        client.core.routes.watch_revocations(weak);
        resolver
    }

    /// Short and without a wait inside; a panic inside leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String, String), Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whom a grant stands for, if its subject is this one.
    ///
    /// # Errors
    /// What the server refused.
    pub async fn resolve(&self, grant_id: &str, subject_type: &str, subject_id: &str) -> Result<ResolvedAuthority> {
        let key = (grant_id.to_owned(), subject_type.to_owned(), subject_id.to_owned());
        let now = tokio::time::Instant::now();
        if let Some(known) = self.lock().get_mut(&key).filter(|known| known.until > now) {
            known.asked = now;
            return Ok(known.authority.clone());
        }
        let subject =
            Some(PrincipalRef { principal_type: subject_type.to_owned(), principal_id: subject_id.to_owned() });
        let request = ResolveAuthorityRequest { grant_id: grant_id.to_owned(), subject, ..Default::default() };
        let authority = self.authority.resolve(request).await?;
        let good_for = authority.grant.as_ref().and_then(|grant| until(grant.expires_at)).unwrap_or(RESOLVED_FOR);
        let known = Known { authority: authority.clone(), until: now + good_for.min(RESOLVED_FOR), asked: now };
        let mut all = self.lock();
        if all.len() >= RESOLVED_MAX {
            all.retain(|_, known| known.until > now);
            if all.len() >= RESOLVED_MAX
                && let Some(oldest) = all.iter().min_by_key(|(_, known)| known.asked).map(|(key, _)| key.clone())
            {
                all.remove(&oldest);
            }
        }
        all.insert(key, known);
        Ok(authority)
    }
}

impl Revoked for Resolver {
    fn revoked(&self, revocation: &AuthorityGrantRevocation) {
        let is_void = |id: &String| *id == revocation.grant_id;
        if revocation.cascade {
            // What was derived from it is not told by its id.
            self.lock().clear();
        } else {
            self.lock().retain(|(id, ..), _| !is_void(id));
        }
    }
}
