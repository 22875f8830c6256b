//! Every bound, with its reason.

use std::time::{Duration, Instant};

/// What a refusal for want of connections tells clients to wait: about how long it takes until somebody else has left.
pub const CONNECTIONS_RETRY: Duration = Duration::from_secs(1);

/// Entries of a metric at most. The published contract's figure.
pub const METRIC_ENTRIES_MAX: usize = 1024;

/// Keys of a metric's metadata at most. The published contract's figure.
pub const METRIC_METADATA_MAX: usize = 64;

/// Longest target topic that a client may name, in bytes. The published contract's figure.
pub const TARGET_BYTES_MAX: usize = 256;

/// Longest name that a sender may give to a message, in bytes.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;

/// Longest identifier, in bytes. The published contract's figure.
pub const IDENTIFIER_BYTES_MAX: usize = 128;

/// Largest checkpoint, in bytes: what fits one frame of a client, with room for the rest of it.
pub const CHECKPOINT_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Longest key of a checkpoint, in bytes.
pub const CHECKPOINT_KEY_BYTES_MAX: usize = 512;

/// Checkpoints that one identity may keep. A reply lists all of their keys, so this bounds the reply.
pub const CHECKPOINTS_MAX: i64 = 10_000;

/// Longest key of the key-value store, in characters. The published contract's figure.
pub const KV_KEY_CHARS_MAX: usize = 256;

/// Keys on one page of a listing at most.
pub const KV_LIST_MAX: usize = 1000;

/// Largest member of a set of the key-value store, in bytes. A member is its own key in an index.
pub const KV_MEMBER_BYTES_MAX: usize = 4096;

/// Largest frame that a client gets, in encoded bytes: what the published clients take, because it is what gRPC libraries take
/// when nothing is set.
pub const FRAME_OUT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes on one page of a listing, unless a single value is larger. A reply holds each key twice, and fits a frame.
pub const KV_PAGE_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Bytes of keys and values in the snapshot that a client gets when it connects, of its own scopes and the shared ones together. They fit a frame.
pub const SNAPSHOT_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Largest value or payload that may be configured, in bytes: so large that it fits a frame to a client with what stands beside
/// it.
pub const CONTENT_BYTES_MAX: usize = FRAME_OUT_BYTES_MAX - 512 * 1024;

/// Bytes of the rows on one page of tasks or audit events, unless a single one has more: half of the 4 MiB that clients of
/// gRPC take where they do not say otherwise, because an encoded row is somewhat larger.
pub const LIST_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Rows that are counted at most for the total of a list. Counting reads what it counts, so an exact total of a large table
/// would cost more than the page that it is for.
pub const COUNT_MAX: i64 = 10_000;

/// Limits that an operator sets. 0 is no limit, except for sizes and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Messages that one connection may send, and tasks that it may make, a second. For a sandbox: requests that tell its events, and commands to it,
    /// together.
    pub messages_per_second: u32,
    /// How many of these at once after a pause.
    pub message_burst: u32,
    /// How long a client may take to say who it is, in seconds. The published default.
    pub handshake_seconds: u64,
    /// After how long a client is asked for a sign of life that sends nothing, in seconds. Balancers cut connections that are idle for
    /// 20 s and more; one that does not answer within 10 s is closed.
    pub keepalive_seconds: u64,
    /// Connections whose principals live in one workspace, on this node.
    pub connections_per_workspace: u32,
    /// Connections of agents, tasks and services to this node: more than a workspace may have, because each of these may carry
    /// up to 1000 principals, or none yet.
    pub grpc_connections: u32,
    /// Connections of browsers and sandboxes to this node.
    pub http_connections: u32,
    /// Streams of events that one bearer token may have open on this node.
    pub event_streams_per_token: u32,
    /// Audit events that one connection may submit a second, and at once after a pause.
    pub audit_events_per_second: u32,
    /// Largest payload of a message, in bytes. Clients rely on the published 1 MiB passing.
    pub payload_bytes_max: usize,
    /// Largest frame that a client may send, in bytes. The published default.
    pub frame_bytes_max: usize,
    /// Largest value of the key-value store, in bytes. The published default.
    pub kv_value_bytes_max: usize,
    /// Keys that one namespace of it may hold. The published default.
    pub kv_keys_per_namespace: u32,
    /// Members that one set of it may hold. A set is removed in one transaction, so this bounds that.
    pub kv_members_per_set: u32,
    /// Checkpoints that the principals of one workspace keep together, in MiB. The windows of one user have as much together,
    /// and so have the instances of each orchestrator, bridge and service.
    pub checkpoint_mib_per_workspace: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            messages_per_second: 10_000,
            message_burst: 20_000,
            handshake_seconds: 30,
            keepalive_seconds: 15,
            connections_per_workspace: 10_000,
            grpc_connections: 50_000,
            http_connections: 50_000,
            event_streams_per_token: 1000,
            audit_events_per_second: 1000,
            payload_bytes_max: 1024 * 1024,
            frame_bytes_max: 4 * 1024 * 1024,
            kv_value_bytes_max: 1024 * 1024,
            kv_keys_per_namespace: 10_000,
            kv_members_per_set: 10_000,
            checkpoint_mib_per_workspace: 1024,
        }
    }
}

/// Admits `rate` a second on average and `burst` at once.
#[derive(Debug)]
pub struct TokenBucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    refilled: Instant,
}

impl TokenBucket {
    /// Full; `None` for a rate of 0, which is no limit.
    #[must_use]
    pub fn new(rate: u32, burst: u32, now: Instant) -> Option<Self> {
        let burst = f64::from(burst.max(1));
        (rate > 0).then(|| Self { rate: f64::from(rate), burst, tokens: burst, refilled: now })
    }

    /// So many a minute, and as many at once; `None` for 0, which is no limit.
    #[must_use]
    pub fn per_minute(rate: u32, now: Instant) -> Option<Self> {
        let rate = f64::from(rate);
        (rate > 0.0).then(|| Self { rate: rate / 60.0, burst: rate, tokens: rate, refilled: now })
    }

    /// Whether nothing was taken for long.
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.tokens + elapsed * self.rate >= self.burst
    }

    /// Takes one token, or says how long to wait: at least the published 10 ms.
    ///
    /// # Errors
    /// The time until a token is there on average.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate).min(self.burst);
        self.refilled = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_millis((1000.0 / self.rate) as u64).max(Duration::from_millis(10)))
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, Instant, TokenBucket};

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(100, 200, start).unwrap();
        assert_eq!((0..300).filter(|_| bucket.take(start).is_ok()).count(), 200);
        assert_eq!(bucket.take(start), Err(Duration::from_millis(10)));
        let later = start + Duration::from_millis(500);
        assert_eq!((0..300).filter(|_| bucket.take(later).is_ok()).count(), 50);
        assert_eq!(TokenBucket::new(2, 1, start).unwrap().take(start), Ok(()));
        assert!(TokenBucket::new(0, 1, start).is_none(), "0 is no limit");
    }
}
