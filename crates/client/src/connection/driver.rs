//! The one task that owns the connection: dials, shakes hands, reads, and comes back when it breaks.

use std::{ops::ControlFlow, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Request, Streaming,
    transport::{Channel, Endpoint},
};
use tracing::Instrument as _;
use trunkline_proto::v1::{
    BuildInfo, DownstreamMessage, ExtensionDeclaration, InitConnection, aether_gateway_client::AetherGatewayClient,
    downstream_message::Payload as Down, upstream_message::Payload as Up,
};

use super::{
    Core, State, Welcome,
    acks::Ack,
    closed,
    feed::{Mark, Queued},
    inbound::Signal,
    lane::Pressure,
};
use crate::{
    error::{Error, Kind, Result},
    options::{ACK_EXTENSION, Options, url},
    reconnect::{End, Next, Record},
};

/// Largest frame that a server sends. The published contract's figure.
pub(crate) const FRAME_IN_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What the transport may have under way before it must be read: enough for a fast line, little enough for many clients.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// Runs until the client is over.
pub(super) async fn run(core: Arc<Core>, ready: oneshot::Sender<Result<()>>) {
    let span = tracing::info_span!("connection", identity = %*core.identity(), server = core.options.address);
    drive(core, ready).instrument(span).await;
}

async fn drive(core: Arc<Core>, ready: oneshot::Sender<Result<()>>) {
    let (mut ready, mut record, mut resume) = (Some(ready), Record::default(), core.options.resume.clone());
    let because = loop {
        let mut lasted = Duration::ZERO;
        let end = connection(&core, &mut resume, &mut ready, &mut record, &mut lasted).await;
        core.feed.detach();
        if core.closing.is_cancelled() {
            break closed();
        }
        let (policy, duplicate) = (&core.options.reconnect, core.options.duplicate.as_ref());
        if let End::Failed(error) = &end
            && ready.is_some()
            && !policy.at_first
        {
            break error.clone();
        }
        match record.ended(end, lasted, policy, duplicate, fastrand::f64()) {
            Next::Stop(error) => break error,
            Next::Again { attempt, delay, because } => {
                tracing::info!(attempt, ?delay, %because, "connecting again");
                core.routes.broken(&because);
                core.state.send_replace(State::Reconnecting { attempt, delay, because });
                tokio::select! {
                    () = sleep(delay) => {}
                    () = core.closing.cancelled() => break closed(),
                }
            }
        }
    };
    over(&core, because, ready.take());
}

/// Tells everybody who waits.
fn over(core: &Core, because: Error, ready: Option<oneshot::Sender<Result<()>>>) {
    let unsent = core.feed.drain();
    if unsent > 0 {
        tracing::warn!(unsent, %because, "the client ended before everything went out");
    }
    core.state.send_replace(State::Ended { because: because.clone(), unsent });
    core.flights.fail(&because);
    core.pending().fail(&because);
    core.routes.broken(&because);
    core.routes.end();
    core.leave_messages();
    core.inbox.end();
    match ready {
        // Whoever wanted to connect is told.
        Some(ready) => {
            let _ = ready.send(Err(because));
        }
        None if because.kind() != Kind::Closed => tracing::warn!(%because, "the client has ended"),
        None => {}
    }
}

/// One connection, from its first byte to its end.
async fn connection(
    core: &Arc<Core>,
    resume: &mut String,
    ready: &mut Option<oneshot::Sender<Result<()>>>,
    record: &mut Record,
    lasted: &mut Duration,
) -> End {
    let shaken = tokio::select! {
        shaken = timeout(core.options.connect_timeout, shake(core, resume)) => shaken,
        () = core.closing.cancelled() => return End::Clean,
    };
    let (mut down, welcome) = match shaken {
        Ok(Ok(shaken)) => shaken,
        Ok(Err(End::Failed(error))) => return End::Failed(error),
        Ok(Err(end)) => return end,
        Err(_) => {
            let message = format!("no connection to {} after {:?}", core.options.address, core.options.connect_timeout);
            return End::Failed(Error::new(Kind::Unavailable, message));
        }
    };
    let begun = Instant::now();
    record.accepted();
    welcome.session_id.clone_into(resume);
    accepted(core, welcome);
    if let Some(ready) = ready.take() {
        let _ = ready.send(Ok(()));
    }
    let end = read(core, &mut down).await;
    // Even a connection that ended at once was one.
    *lasted = begun.elapsed().max(Duration::from_nanos(1));
    let why = match &end {
        End::Failed(error) => error.clone(),
        End::Clean | End::Graceful(_) | End::Forced(_) => Error::new(Kind::Unavailable, "the server ended it"),
    };
    core.feed.detach();
    core.acks.end();
    core.inbox.messages.retain(|message| !message.ack.as_ref().is_some_and(Ack::is_stale));
    *core.again() = core.pending().broken(&why);
    end
}

/// Dials, and waits for the server's word. What comes before that is handed on.
async fn shake(core: &Arc<Core>, resume: &str) -> std::result::Result<(Streaming<DownstreamMessage>, Welcome), End> {
    let channel = dial(&core.options).await.map_err(End::Failed)?;
    let outbound = core.feed.begin(core, Up::Init(Box::new(init(core, resume))));
    let mut client = AetherGatewayClient::new(channel)
        .max_decoding_message_size(FRAME_IN_BYTES_MAX)
        .max_encoding_message_size(FRAME_IN_BYTES_MAX);
    let mut request = Request::new(outbound);
    for (name, value) in &core.options.metadata {
        request.metadata_mut().insert(name.clone(), value.clone());
    }
    let failed = |status: tonic::Status| End::Failed(Error::from_status(&status));
    let mut down = client.connect(request).await.map_err(failed)?.into_inner();
    loop {
        let Some(frame) = down.message().await.map_err(failed)? else { return Err(End::Clean) };
        match frame.payload {
            Some(Down::ConnectionAck(ack)) => {
                let welcome = Welcome::of(*ack, core.options.at_least_once);
                // A refusal of an extension that is required comes right behind.
                if let Some(uri) = missing(core, &welcome) {
                    return Err(End::Failed(Error::new(Kind::Precondition, format!("the server does not have {uri}"))));
                }
                return Ok((down, welcome));
            }
            payload => {
                if let (Some(signal), _) = core.receive(DownstreamMessage { payload, ..frame }) {
                    return Err(end_of(signal));
                }
            }
        }
    }
}

fn missing(core: &Core, welcome: &Welcome) -> Option<String> {
    let required = core.options.extensions.iter().filter(|each| each.required);
    required.map(|each| &each.uri).find(|uri| !welcome.supports(uri)).cloned()
}

pub(crate) async fn dial(options: &Options) -> Result<Channel> {
    let unusable = |e: tonic::transport::Error| {
        Error::new(Kind::Invalid, format!("address {:?}: {}", options.address, root(&e))).with_source(e)
    };
    let url = url(options)?;
    let mut endpoint = Endpoint::from_shared(url.clone())
        .map_err(unusable)?
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    if url.starts_with("https://") {
        let tls = options.tls.clone().unwrap_or_default();
        endpoint = endpoint.tls_config(tls.config()).map_err(unusable)?;
    }
    if let Some((every, patience)) = options.keepalive {
        endpoint = endpoint.http2_keep_alive_interval(every).keep_alive_timeout(patience).keep_alive_while_idle(true);
    }
    endpoint.connect().await.map_err(|e| {
        let message = format!("cannot connect to {}: {}", options.address, root(&e));
        Error::new(Kind::Unavailable, message).with_source(e)
    })
}

/// The cause that says what happened.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

fn init(core: &Core, resume: &str) -> InitConnection {
    let mut extensions = core.options.extensions.clone();
    if !extensions.iter().any(|each| each.uri == ACK_EXTENSION) {
        let (uri, version) = (ACK_EXTENSION.to_owned(), "1".to_owned());
        extensions.push(ExtensionDeclaration { uri, version, ..ExtensionDeclaration::default() });
    }
    InitConnection {
        client_type: Some(core.claim.clone()),
        credentials: core.options.credentials.map().clone(),
        resume_session_id: resume.to_owned(),
        extensions,
        client_version: env!("CARGO_PKG_VERSION").to_owned(),
        client_sdk: "rust".to_owned(),
        client_build_info: Some(BuildInfo {
            runtime: "rust".to_owned(),
            os: format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
            ..BuildInfo::default()
        }),
    }
}

/// The server has accepted the client: what has to be said again goes first, then what waited.
fn accepted(core: &Arc<Core>, welcome: Welcome) {
    tracing::info!(session = welcome.session_id, resumed = welcome.resumed, "connected");
    let assigned = core.identity().assigned(&welcome.assigned_id);
    *core.identity() = assigned;
    core.acks.begin(welcome.supports(ACK_EXTENSION), welcome.resumed, &welcome.log_epoch);
    // Shared work of the last connection goes to others, and what is of another log means nothing.
    core.inbox.messages.retain(|message| !message.ack.as_ref().is_some_and(Ack::is_stale));
    let mut front = core.routes.restore();
    front.extend(core.flights.again(welcome.is_trunkline()));
    let again = std::mem::take(&mut *core.again());
    front.extend(again.into_iter().map(|(number, payload)| Queued { payload, mark: Mark::Request(number) }));
    // What did not go out the last time was behind what did.
    front.extend(core.feed.left_over());
    core.state.send_replace(State::Connected(Arc::new(welcome)));
    core.feed.open(front);
}

/// Frames that are handled before anything else is looked at.
const TURN: usize = 64;

/// Reads until it ends. Nothing is read while too much waits to be taken.
async fn read(core: &Core, down: &mut Streaming<DownstreamMessage>) -> End {
    let (mut pressure, mut said_goodbye) = (core.inbox.pressure(core.acks.is_on()), None);
    let closing = pin!(core.closing.cancelled());
    let mut closing = closing.fuse();
    loop {
        let may_read = match pressure {
            Pressure::None => true,
            Pressure::Soft => !core.pending().is_empty() || core.flights.is_waiting() || core.routes.is_waiting(),
            Pressure::Hard => false,
        };
        tokio::select! {
            frame = down.next(), if may_read || said_goodbye.is_some() => {
                if let ControlFlow::Break(end) = take(core, frame, &mut pressure) {
                    return end;
                }
                // What has come already is not waited for.
                for _ in 0..TURN {
                    if pressure > Pressure::None {
                        break;
                    }
                    let Some(frame) = down.next().now_or_never() else { break };
                    if let ControlFlow::Break(end) = take(core, frame, &mut pressure) {
                        return end;
                    }
                }
            }
            () = core.room.notified(), if pressure > Pressure::None => pressure = core.inbox.pressure(core.acks.is_on()),
            () = &mut closing, if said_goodbye.is_none() => {
                core.leave_messages();
                core.feed.close();
                said_goodbye = Some(Instant::now() + core.options.close_timeout);
            }
            () = until(said_goodbye), if said_goodbye.is_some() => {
                tracing::warn!("the server did not let go in time");
                return End::Clean;
            }
        }
    }
}

/// Handles one frame, or the end.
fn take(
    core: &Core,
    frame: Option<std::result::Result<DownstreamMessage, tonic::Status>>,
    pressure: &mut Pressure,
) -> ControlFlow<End> {
    match frame {
        Some(Ok(frame)) => {
            let (signal, now) = core.receive(frame);
            if now > Pressure::None || *pressure > Pressure::None {
                *pressure = core.inbox.pressure(core.acks.is_on());
            }
            signal.map_or(ControlFlow::Continue(()), |signal| ControlFlow::Break(end_of(signal)))
        }
        Some(Err(status)) => ControlFlow::Break(End::Failed(Error::from_status(&status))),
        None => ControlFlow::Break(End::Clean),
    }
}

async fn until(deadline: Option<Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline).await;
    }
}

fn end_of(signal: Signal) -> End {
    match signal {
        Signal::ForceDisconnect(reason) => End::Forced(reason),
        Signal::GracefulDisconnect(reason) => End::Graceful(reason),
    }
}
