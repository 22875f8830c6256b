//! Between the contract's messages and core's plain data.

pub(super) mod tasks;

use prost::Message as _;
use trunkline_core::{
    Error, Kind,
    identity::Identity,
    message::{self, Envelope, Metric, Progress, Said},
};
use trunkline_proto::{
    own::About,
    v1::{
        AuthorizationContext, IncomingMessage, InitConnection, ProgressReport, ProgressUpdate,
        downstream_message::Payload as Down, init_connection::ClientType,
    },
};
use trunkline_store::log::Record;

/// Who the client says it is.
pub(super) fn identity(init: &InitConnection) -> Result<Identity, Error> {
    match &init.client_type {
        Some(ClientType::Agent(a)) => Identity::agent(&a.workspace, &a.implementation, &a.specifier),
        Some(ClientType::Task(t)) if t.unique_specifier.is_empty() => Identity::task(&t.workspace, &t.implementation),
        Some(ClientType::Task(t)) => Identity::unique_task(&t.workspace, &t.implementation, &t.unique_specifier),
        Some(ClientType::User(u)) => Identity::user(&u.user_id, &u.window_id),
        Some(ClientType::Orchestrator(o)) => Identity::orchestrator(&o.implementation, &o.specifier),
        Some(ClientType::WorkflowEngine(_)) => Ok(Identity::WorkflowEngine),
        Some(ClientType::MetricsBridge(_)) => Ok(Identity::MetricsBridge),
        Some(ClientType::Bridge(b)) => Identity::bridge(&b.implementation, &b.specifier),
        Some(ClientType::Service(s)) => Identity::service(&s.implementation, &s.specifier),
        None => Err(Error::new(Kind::Invalid, "ERR_INVALID_IDENTIFIER", "unknown principal type")),
    }
}

/// A record as the principal with this lane gets it, if it is meant for it.
pub(super) fn record(record: &Record, lane: &str) -> Result<Option<Down>, Error> {
    match message::decode(record)? {
        Said::Message(envelope) => Ok(Some(Down::Msg(incoming(envelope)))),
        Said::Progress(progress) if progress.is_for(lane) => update(progress, record.timestamp_ms).map(Some),
        Said::Progress(_) => Ok(None),
        Said::Notice(notice, workspace) => {
            Ok(Some(Down::ProgressUpdate(tasks::notice(notice, workspace, record.timestamp_ms).into())))
        }
    }
}

fn update(progress: Progress, timestamp_ms: u64) -> Result<Down, Error> {
    let unreadable = |e: prost::DecodeError| Error::new(Kind::Internal, "ERR_INTERNAL", format!("progress: {e}"));
    let report = ProgressReport::decode(progress.body).map_err(unreadable)?;
    Ok(Down::ProgressUpdate(Box::new(ProgressUpdate {
        source: progress.source,
        workspace: progress.workspace,
        recipient: progress.recipient,
        timestamp_ms: timestamp_ms as i64,
        task_id: report.task_id,
        state: report.state,
        completion: report.completion,
        summary: report.summary,
        step: report.step,
        request_id: report.request_id,
        metadata: report.metadata,
        kind: report.kind,
    })))
}

/// Whether a request is made in its sender's own name.
pub(super) fn is_direct(context: Option<&AuthorizationContext>) -> bool {
    context.is_none_or(|context| {
        matches!(context.authority_mode.as_str(), "" | "direct")
            && context.subject.is_none()
            && context.grant_id.is_empty()
    })
}

/// What of a metric core checks.
pub(super) fn metric(bytes: &[u8]) -> Result<Metric, String> {
    let metric = trunkline_proto::v1::Metric::decode(bytes).map_err(|e| e.to_string())?;
    let entries = metric.entries.into_iter().map(|entry| (entry.name, entry.qty)).collect();
    Ok(Metric { entries, metadata_keys: metric.metadata.len() })
}

/// A message as its receiver gets it.
pub(super) fn incoming(envelope: Envelope) -> IncomingMessage {
    let metadata = envelope.metadata;
    let about = (!metadata.is_empty()).then(|| About { entries: metadata.into_iter().collect() });
    IncomingMessage {
        source_topic: envelope.source,
        payload: envelope.payload,
        message_type: envelope.kind,
        workspace: envelope.workspace,
        about: about.map(Box::new),
        ..IncomingMessage::default()
    }
}
