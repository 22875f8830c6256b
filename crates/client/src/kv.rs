//! Keys and their values, and checkpoints.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use trunkline_proto::v1::{
    AuthorizationContext, CheckpointOperation, CheckpointResponse, KvOperation, KvResponse, checkpoint_operation,
    downstream_message::Payload as Down,
    kv_operation::{OpType, Scope as WireScope},
    upstream_message::Payload as Up,
};

use crate::{
    connection::{Ask, Client},
    error::{Error, Result},
    reply,
};

/// Whose keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everybody's.
    Global,
    /// A workspace's; `None` for the caller's own.
    Workspace(Option<String>),
    /// The caller's about a user.
    User(String),
    /// The caller's about a user in a workspace.
    UserWorkspace(String, Option<String>),
    /// The caller's, wherever it is.
    GlobalExclusive,
    /// The caller's in a workspace.
    WorkspaceExclusive(Option<String>),
    /// Everybody's about a user.
    UserShared(String),
    /// Everybody's about a user in a workspace.
    UserWorkspaceShared(String, Option<String>),
}

impl Scope {
    /// The caller's own workspace.
    #[must_use]
    pub fn workspace() -> Self {
        Self::Workspace(None)
    }

    /// A workspace.
    #[must_use]
    pub fn of(workspace: impl Into<String>) -> Self {
        Self::Workspace(Some(workspace.into()))
    }

    fn operation(&self) -> KvOperation {
        let (scope, user, workspace) = match self {
            Self::Global => (WireScope::Global, None, None),
            Self::Workspace(workspace) => (WireScope::Workspace, None, workspace.as_ref()),
            Self::User(user) => (WireScope::User, Some(user), None),
            Self::UserWorkspace(user, workspace) => (WireScope::UserWorkspace, Some(user), workspace.as_ref()),
            Self::GlobalExclusive => (WireScope::GlobalExclusive, None, None),
            Self::WorkspaceExclusive(workspace) => (WireScope::WorkspaceExclusive, None, workspace.as_ref()),
            Self::UserShared(user) => (WireScope::UserShared, Some(user), None),
            Self::UserWorkspaceShared(user, workspace) => {
                (WireScope::UserWorkspaceShared, Some(user), workspace.as_ref())
            }
        };
        KvOperation {
            scope: scope.into(),
            user_id: user.cloned().unwrap_or_default(),
            workspace: workspace.cloned().unwrap_or_default(),
            ..KvOperation::default()
        }
    }
}

/// What can be done with the keys of one scope. Made by [`Client::kv`]. Requests of one client take effect in their order.
///
/// Requests that only look are made again by themselves if the connection breaks; others fail with
/// [`Kind::Interrupted`](crate::Kind::Interrupted). Keys are 1 to 256 bytes, values up to 1 MiB; a server may keep tighter limits.
#[derive(Clone, Debug)]
pub struct Kv {
    client: Client,
    scope: Scope,
    authorization: Option<AuthorizationContext>,
}

/// One page of a list of keys.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Page {
    /// The keys and their values, by key.
    pub entries: BTreeMap<String, Bytes>,
    /// For the next page, if there is one.
    pub next: Option<String>,
}

/// What came of a change with a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The number behind it; without the change the one that stands.
    pub value: i64,
    /// Whether it was changed.
    pub applied: bool,
}

impl Client {
    /// What can be done with the keys of a scope.
    #[must_use]
    pub fn kv(&self, scope: Scope) -> Kv {
        Kv { client: self.clone(), scope, authorization: None }
    }

    /// What can be done with this client's checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints { client: self.clone() }
    }
}

impl Kv {
    /// On behalf of somebody else, by a grant.
    #[must_use]
    pub fn authorized(mut self, authorization: impl Into<AuthorizationContext>) -> Self {
        self.authorization = Some(authorization.into());
        self
    }

    async fn run(&self, read: bool, op: OpType, operation: KvOperation) -> Result<Box<KvResponse>> {
        let ask = Ask { idempotent: read, ..Ask::change(what(op)) }.within(self.client.core.options.state_timeout);
        let authorization = self.authorization.clone();
        let build =
            |request_id| Up::KvOp(Box::new(KvOperation { op: op.into(), request_id, authorization, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Kv)?;
        if reply.success { Ok(reply) } else { Err(Error::from_words("")) }
    }

    fn on(&self, key: &str) -> KvOperation {
        KvOperation { key: key.to_owned(), ..self.scope.operation() }
    }

    /// The value of a key. One that is not there is `None`, and so is an empty value: the contract does not tell them apart.
    ///
    /// # Errors
    /// This and all others here: what the server refused, and [`Kind::Timeout`](crate::Kind::Timeout) after 5 s.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        let reply = self.run(true, OpType::Get, self.on(key)).await?;
        Ok(Some(reply.value).filter(|value| !value.is_empty()))
    }

    /// Sets a key, for good.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn put(&self, key: &str, value: impl Into<Bytes>) -> Result<()> {
        self.put_for(key, value, None).await
    }

    /// Sets a key, for so long; seconds count. The time of an earlier value is forgotten.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn put_for(&self, key: &str, value: impl Into<Bytes>, ttl: impl Into<Option<Duration>>) -> Result<()> {
        let operation = KvOperation { value: value.into(), ttl: seconds(ttl.into()), ..self.on(key) };
        self.run(false, OpType::Put, operation).await.map(|_| ())
    }

    /// Removes a key, if it is there.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn delete(&self, key: &str) -> Result<()> {
        self.run(false, OpType::Delete, self.on(key)).await.map(|_| ())
    }

    /// One page of the keys that begin with a prefix, by key; a limit of 0 is the server's own, which is 100.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn page(&self, prefix: &str, limit: u32, cursor: Option<&str>) -> Result<Page> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let operation = KvOperation { limit, cursor: cursor.unwrap_or_default().to_owned(), ..self.on(prefix) };
        let reply = self.run(true, OpType::List, operation).await?;
        let next = Some(reply.next_cursor).filter(|cursor| reply.has_more && !cursor.is_empty());
        Ok(Page { entries: reply.kv_map.into_iter().collect(), next })
    }

    /// All keys that begin with a prefix, and their values, page by page. Keys that come and go meanwhile may be missing.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn list(&self, prefix: &str) -> Result<BTreeMap<String, Bytes>> {
        let mut page = self.page(prefix, 0, None).await?;
        let mut all = page.entries;
        while let Some(cursor) = page.next {
            page = self.page(prefix, 0, Some(&cursor)).await?;
            all.append(&mut page.entries);
        }
        Ok(all)
    }

    /// Adds one to a number, which begins at 0. Answers the number behind it.
    ///
    /// # Errors
    /// As [`Kv::get`]; also if the value is no number.
    pub async fn increment(&self, key: &str) -> Result<i64> {
        self.increment_for(key, None).await
    }

    /// As [`Kv::increment`]; a number that begins with this lasts so long.
    ///
    /// # Errors
    /// As [`Kv::increment`].
    pub async fn increment_for(&self, key: &str, ttl: impl Into<Option<Duration>>) -> Result<i64> {
        let operation = KvOperation { ttl: seconds(ttl.into()), ..self.on(key) };
        Ok(self.run(false, OpType::Increment, operation).await?.counter_value)
    }

    /// Takes one from a number, which begins at 0.
    ///
    /// # Errors
    /// As [`Kv::increment`].
    pub async fn decrement(&self, key: &str) -> Result<i64> {
        Ok(self.run(false, OpType::Decrement, self.on(key)).await?.counter_value)
    }

    /// Adds to a number, unless it would be over the ceiling then.
    ///
    /// # Errors
    /// As [`Kv::increment`].
    pub async fn increment_if(&self, key: &str, delta: u32, ceiling: i64) -> Result<Counted> {
        let operation = KvOperation { delta_value: delta.into(), guard_value: ceiling, ..self.on(key) };
        self.counted(OpType::IncrementIf, operation).await
    }

    /// Takes from a number, unless it would be under the floor then.
    ///
    /// # Errors
    /// As [`Kv::increment`].
    pub async fn decrement_if(&self, key: &str, delta: u32, floor: i64) -> Result<Counted> {
        let operation = KvOperation { delta_value: delta.into(), guard_value: floor, ..self.on(key) };
        self.counted(OpType::DecrementIf, operation).await
    }

    /// Sets a key that is not there. Answers whether it was set.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn set_if_absent(
        &self,
        key: &str,
        value: impl Into<Bytes>,
        ttl: impl Into<Option<Duration>>,
    ) -> Result<bool> {
        let operation = KvOperation { value: value.into(), ttl: seconds(ttl.into()), ..self.on(key) };
        Ok(self.run(false, OpType::SetNx, operation).await?.applied)
    }

    /// Sets a key that has the expected value. Answers whether it was set.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn compare_and_set(
        &self,
        key: &str,
        expected: impl Into<Bytes>,
        value: impl Into<Bytes>,
        ttl: impl Into<Option<Duration>>,
    ) -> Result<bool> {
        let (expected_value, value) = (expected.into(), value.into());
        let operation = KvOperation { expected_value, value, ttl: seconds(ttl.into()), ..self.on(key) };
        Ok(self.run(false, OpType::CompareAndSet, operation).await?.applied)
    }

    /// Removes a key that has the expected value. Answers whether it was removed.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn compare_and_delete(&self, key: &str, expected: impl Into<Bytes>) -> Result<bool> {
        let operation = KvOperation { expected_value: expected.into(), ..self.on(key) };
        Ok(self.run(false, OpType::CompareAndDelete, operation).await?.applied)
    }

    /// Adds a member to a set. Answers how many there are, and whether this one is new.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn set_add(
        &self,
        key: &str,
        member: impl Into<Bytes>,
        ttl: impl Into<Option<Duration>>,
    ) -> Result<Counted> {
        let operation = KvOperation { value: member.into(), ttl: seconds(ttl.into()), ..self.on(key) };
        self.counted(OpType::SetAdd, operation).await
    }

    /// How many members a set has; 0 if it is not there.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn set_size(&self, key: &str) -> Result<i64> {
        Ok(self.run(true, OpType::SetCard, self.on(key)).await?.counter_value)
    }

    /// Removes the keys that somebody keeps for itself and that begin with a prefix. Answers how many there were. For
    /// administrators.
    ///
    /// # Errors
    /// As [`Kv::get`].
    pub async fn purge_identity(&self, identity: &str, prefix: &str) -> Result<i64> {
        let operation = KvOperation { target_identity: identity.to_owned(), ..self.on(prefix) };
        Ok(self.run(false, OpType::PurgeIdentity, operation).await?.counter_value)
    }

    async fn counted(&self, op: OpType, operation: KvOperation) -> Result<Counted> {
        let reply = self.run(false, op, operation).await?;
        Ok(Counted { value: reply.counter_value, applied: reply.applied })
    }
}

fn what(op: OpType) -> &'static str {
    match op {
        OpType::Get => "get a key",
        OpType::List => "list keys",
        OpType::SetCard => "count a set",
        OpType::Delete | OpType::CompareAndDelete | OpType::PurgeIdentity => "remove keys",
        _ => "change a key",
    }
}

/// Whole seconds, and at least one: 0 would be forever.
fn seconds(ttl: Option<Duration>) -> i64 {
    ttl.map_or(0, |ttl| i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1))
}

/// How long a checkpoint is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Keep {
    /// As long as the server says.
    #[default]
    Default,
    /// Until it is removed.
    Forever,
    /// So long; seconds count.
    For(Duration),
}

/// What a client remembers for its successor under the same identity. Made by [`Client::checkpoints`]. The empty key stands for
/// `default`.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    client: Client,
}

/// What was remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// What.
    pub data: Bytes,
    /// When, in Unix seconds; 0 if the server does not say.
    pub saved_at_s: i64,
}

impl Checkpoints {
    async fn run(
        &self,
        op: checkpoint_operation::OpType,
        operation: CheckpointOperation,
    ) -> Result<CheckpointResponse> {
        // Only this identity writes here, and one connection has it: to save twice is to save once.
        let ask = Ask::read("use a checkpoint").within(self.client.core.options.state_timeout);
        let build =
            |request_id| Up::CheckpointOp(Box::new(CheckpointOperation { op: op.into(), request_id, ..operation }));
        let reply = reply!(self.client.core.ask(ask, build).await?, Down::Checkpoint)?;
        if reply.success { Ok(*reply) } else { Err(Error::from_words(&reply.error)) }
    }

    /// Remembers something, in place of what was there.
    ///
    /// # Errors
    /// What the server refused, and [`Kind::Timeout`](crate::Kind::Timeout) after 5 s. If the connection breaks, it is asked again
    /// with the next one.
    pub async fn save(&self, key: &str, data: impl Into<Bytes>, keep: Keep) -> Result<()> {
        let ttl = match keep {
            Keep::Default => -1,
            Keep::Forever => 0,
            Keep::For(ttl) => seconds(Some(ttl)),
        };
        let operation = CheckpointOperation { key: key.to_owned(), data: data.into(), ttl, ..Default::default() };
        self.run(checkpoint_operation::OpType::Save, operation).await.map(|_| ())
    }

    /// What was remembered. Nothing and empty data are the same to the contract.
    ///
    /// # Errors
    /// As [`Checkpoints::save`].
    pub async fn load(&self, key: &str) -> Result<Option<Checkpoint>> {
        let operation = CheckpointOperation { key: key.to_owned(), ..CheckpointOperation::default() };
        let reply = self.run(checkpoint_operation::OpType::Load, operation).await?;
        let found = Checkpoint { data: reply.data, saved_at_s: reply.saved_at };
        Ok(Some(found).filter(|found| !found.data.is_empty() || found.saved_at_s > 0))
    }

    /// Forgets it, if it is there.
    ///
    /// # Errors
    /// As [`Checkpoints::save`].
    pub async fn delete(&self, key: &str) -> Result<()> {
        let operation = CheckpointOperation { key: key.to_owned(), ..CheckpointOperation::default() };
        self.run(checkpoint_operation::OpType::Delete, operation).await.map(|_| ())
    }

    /// The keys of all that is remembered.
    ///
    /// # Errors
    /// As [`Checkpoints::save`].
    pub async fn list(&self) -> Result<Vec<String>> {
        Ok(self.run(checkpoint_operation::OpType::List, CheckpointOperation::default()).await?.keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_live_is_in_whole_seconds_and_never_forever_by_accident() {
        let cases = [(None, 0), (Some(0), 1), (Some(1), 1), (Some(1000), 1), (Some(1001), 2), (Some(60_000), 60)];
        for (ms, expected) in cases {
            assert_eq!(seconds(ms.map(Duration::from_millis)), expected, "{ms:?}");
        }
    }
}
