//! Figures for operators, in Prometheus form. What is counted where it happens is here; what is looked up when somebody
//! asks is in `ops`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use crate::listen::Limit;

/// A refusal's stable code, or a status.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Code {
    pub(crate) code: &'static str,
}

/// A kind of principal.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Of {
    pub(crate) kind: &'static str,
}

/// A status of HTTP.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Answered {
    pub(crate) status: u16,
}

/// What a stream of events tells.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Tells {
    pub(crate) tells: &'static str,
}

/// A status of sandboxes.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfStatus {
    pub(crate) status: &'static str,
}

/// A part of the store.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Part {
    pub(crate) part: &'static str,
}

/// Memory of this process; 0 where the system does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

/// The figures.
pub(crate) struct Metrics {
    registry: Registry,
    /// Handshakes by how they ended.
    pub(crate) handshakes: Family<Code, Counter>,
    /// Messages and reports of progress that clients sent and that were accepted.
    pub(crate) accepted: Counter,
    accepted_rate: Rate,
    /// Messages and reports of progress that were handed to the transports.
    pub(crate) delivered: Counter,
    /// Messages that became dead letters.
    pub(crate) dead_letters: Counter,
    /// Requests that were refused.
    refused: Family<Code, Counter>,
    /// All of those, for whoever watches.
    pub(crate) refused_total: Counter,
    /// Bytes of replies that clients of the agent surface have not taken, and of those that are expected.
    pub(crate) reply_bytes: Gauge,
    pub(crate) connections: Family<Of, Gauge>,
    pub(crate) grpc_connections: Gauge,
    /// Connections that were one too many.
    pub(crate) grpc_refused: Counter,
    /// Idle connections of either kind that made room for others.
    connections_closed: Counter,
    pub(crate) http_connections: Gauge,
    /// Connections that were one too many.
    pub(crate) http_refused: Counter,
    pub(crate) http_answers: Family<Answered, Counter>,
    pub(crate) event_streams: Family<Tells, Gauge>,
    pub(crate) sandboxes: Family<OfStatus, Gauge>,
    /// Events that sandboxes told and that were accepted.
    pub(crate) sandbox_events: Counter,
    pub(crate) records: Gauge,
    pub(crate) log_buffered_bytes: Gauge,
    /// Positions beyond the log's tail.
    pub(crate) positions_clamped: Gauge,
    pub(crate) clock_steps: Gauge,
    pub(crate) data_free_bytes: Gauge,
    pub(crate) resident_bytes: Gauge,
    pub(crate) open_files: Gauge,
    pub(crate) uptime_seconds: Gauge,
    pub(crate) store_up: Family<Part, Gauge>,
    pub(crate) store_seconds: Family<Part, Gauge<f64, std::sync::atomic::AtomicU64>>,
}

/// Samples of a count, of which the first and the last say how fast it grows.
#[derive(Default)]
struct Rate(Mutex<VecDeque<(Instant, u64)>>);

impl Rate {
    fn sample(&self, now: Instant, count: u64) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push_back((now, count));
        if samples.len() > SAMPLES {
            samples.pop_front();
        }
    }

    fn per_second(&self) -> f64 {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some((begin, first)), Some((end, last))) = (samples.front(), samples.back()) else { return 0.0 };
        let seconds = end.saturating_duration_since(*begin).as_secs_f64();
        if seconds > 0.0 { last.saturating_sub(*first) as f64 / seconds } else { 0.0 }
    }
}

/// Of a [`Rate`], one a second: what it says is the mean of the last ten seconds.
const SAMPLES: usize = 11;

impl Metrics {
    /// Messages and reports of progress that were accepted in a second, lately.
    pub(crate) fn accepted_per_second(&self) -> f64 {
        self.accepted_rate.per_second()
    }

    /// Looks once a second how many were accepted. Does not end.
    pub(crate) async fn sample(self: Arc<Self>) {
        let mut looks = tokio::time::interval(Duration::from_secs(1));
        loop {
            self.accepted_rate.sample(Instant::now(), self.accepted.get());
            looks.tick().await;
        }
    }

    pub(crate) fn new() -> Self {
        let mut all = Self {
            registry: Registry::with_prefix("trunkline"),
            handshakes: Family::default(),
            accepted: Counter::default(),
            accepted_rate: Rate::default(),
            delivered: Counter::default(),
            dead_letters: Counter::default(),
            refused: Family::default(),
            refused_total: Counter::default(),
            reply_bytes: Gauge::default(),
            connections: Family::default(),
            grpc_connections: Gauge::default(),
            grpc_refused: Counter::default(),
            connections_closed: Counter::default(),
            http_connections: Gauge::default(),
            http_refused: Counter::default(),
            http_answers: Family::default(),
            event_streams: Family::default(),
            sandboxes: Family::default(),
            sandbox_events: Counter::default(),
            records: Gauge::default(),
            log_buffered_bytes: Gauge::default(),
            positions_clamped: Gauge::default(),
            clock_steps: Gauge::default(),
            data_free_bytes: Gauge::default(),
            resident_bytes: Gauge::default(),
            open_files: Gauge::default(),
            uptime_seconds: Gauge::default(),
            store_up: Family::default(),
            store_seconds: Family::default(),
        };
        let r = &mut all.registry;
        r.register("handshakes", "Handshakes, by gRPC code", all.handshakes.clone());
        r.register("messages_accepted", "Messages and progress taken from clients", all.accepted.clone());
        r.register("messages_delivered", "Messages and progress handed to transports", all.delivered.clone());
        r.register("dead_letters", "Messages that sessions were lost over, given up", all.dead_letters.clone());
        r.register("requests_refused", "Requests refused, by stable code", all.refused.clone());
        let replies = all.reply_bytes.clone();
        r.register_with_unit(
            "agent_replies",
            "Replies under way to clients that did not take them yet",
            Unit::Bytes,
            replies,
        );
        r.register("connections", "Sessions attached to this node", all.connections.clone());
        r.register("grpc_connections", "Connections of agents, tasks and services", all.grpc_connections.clone());
        r.register("grpc_connections_refused", "Such connections beyond the limit", all.grpc_refused.clone());
        let closed = all.connections_closed.clone();
        r.register("idle_connections_closed", "Connections that were closed to make room", closed);
        r.register("http_connections", "Connections of browsers and sandboxes", all.http_connections.clone());
        r.register("http_connections_refused", "Such connections beyond the limit", all.http_refused.clone());
        r.register("http_answers", "Answers to them, by status", all.http_answers.clone());
        r.register("event_streams", "Streams of events that are open, by what they tell", all.event_streams.clone());
        r.register("sandboxes", "Sessions of sandboxes, by status", all.sandboxes.clone());
        r.register("sandbox_events", "Events taken from sandboxes", all.sandbox_events.clone());
        all.register_machine();
        all
    }

    /// The store's, the process's and the machine's.
    fn register_machine(&mut self) {
        let all = self;
        let r = &mut all.registry;
        r.register("log_records", "Records ever appended to the log", all.records.clone());
        let buffered = all.log_buffered_bytes.clone();
        r.register_with_unit("log_buffered", "Write buffers and block caches of the log", Unit::Bytes, buffered);
        let clamped = all.positions_clamped.clone();
        r.register("log_positions_clamped", "Reads from positions beyond the log's tail", clamped);
        r.register("clock_steps", "Steps of the machine's clock that were noticed", all.clock_steps.clone());
        let free = all.data_free_bytes.clone();
        r.register_with_unit("data_dir_free", "Room in the file system of the data directory", Unit::Bytes, free);
        r.register_with_unit("resident", "Memory of the process", Unit::Bytes, all.resident_bytes.clone());
        r.register("open_files", "Files and sockets of the process", all.open_files.clone());
        r.register_with_unit("uptime", "Since the start", Unit::Seconds, all.uptime_seconds.clone());
        r.register("store_up", "Whether a part of the store answers", all.store_up.clone());
        r.register_with_unit("store_answer", "How long it takes", Unit::Seconds, all.store_seconds.clone());
    }

    /// Notes that a request was refused.
    pub(crate) fn refuse(&self, code: &'static str) {
        self.refused.get_or_create(&Code { code }).inc();
        self.refused_total.inc();
    }

    /// A limit for connections of agents, counted here.
    pub(crate) fn grpc_limit(&self, most: u32) -> Limit {
        let (open, refused) = (self.grpc_connections.clone(), self.grpc_refused.clone());
        Limit { most, open, refused, closed: self.connections_closed.clone() }
    }

    /// A limit for connections of browsers and sandboxes, counted here.
    pub(crate) fn http_limit(&self, most: u32) -> Limit {
        let (open, refused) = (self.http_connections.clone(), self.http_refused.clone());
        Limit { most, open, refused, closed: self.connections_closed.clone() }
    }

    /// OpenMetrics text.
    pub(crate) fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
