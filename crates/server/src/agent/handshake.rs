//! The first frame, and what is answered to it.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use trunkline_core::{
    identity::Identity,
    kv,
    session::Session,
    task::{Arrival, Desk, Mode},
    token,
};
use trunkline_proto::v1::{
    BuildInfo, ConfigSnapshot, ConnectionAck, ExtensionDeclaration, InitConnection, NegotiatedExtension,
    UpstreamMessage, downstream_message::Payload as Down, init_connection::ClientType, upstream_message::Payload as Up,
};

use super::{
    Gateway, Peer, convert,
    outbound::{Frame, Outbound},
    upstream::Upstream,
};
use crate::error::status;

/// Names extensions in the request's headers, comma-separated; those are always optional.
const EXTENSIONS_HEADER: &str = "aether-extensions";

/// Most extensions that a client may declare, so that the answer stays small.
const EXTENSIONS_MAX: usize = 64;

/// Profiles of one orchestrator, and bytes of each; those beyond are not offered anything.
const PROFILES_MAX: usize = 256;
const PROFILE_BYTES_MAX: usize = 256;

/// The client acknowledges what it is done with.
pub(super) const ACK_EXTENSION: &str = "https://trunkline.dev/ext/ack/v1";

/// What this server can do beyond the published contract.
const EXTENSIONS: [&str; 1] = [ACK_EXTENSION];

/// The version of those; a client that names none takes any.
const EXTENSION_VERSION: &str = "1";

/// A session, and what was agreed on.
pub(super) struct Agreed {
    pub(super) session: Session,
    pub(super) desk: Desk,
    /// The client acknowledges.
    pub(super) acks: bool,
}

/// From the first frame to the acknowledgement.
pub(super) async fn shake(
    gateway: &Gateway,
    metadata: &MetadataMap,
    peer: &Peer,
    inbound: &mut Upstream,
    outbound: &Outbound,
) -> Result<Agreed, Status> {
    let patience = Duration::from_secs(gateway.limits.handshake_seconds);
    let init = first_frame(inbound, patience).await?;
    let identity = convert::identity(&init);
    let identity = identity.map_err(|e| Status::invalid_argument(format!("invalid identity: {e}")))?;
    let credential = gateway
        .auth
        .admit(&identity, &init.credentials, peer.address, peer.certificate.as_deref())
        .await
        .map_err(|e| status(&e))?;
    inbound.know();
    gateway.conversations.check_window(&identity).await.map_err(|e| status(&e))?;
    let attached = gateway.sessions.attach(identity, credential, &init.resume_session_id).await;
    let session = attached.map_err(|e| status(&e))?;
    token::confirm(&gateway.gate, &session.caller.credential).await.map_err(|e| status(&e))?;
    let declared = declared(&init.extensions, metadata);
    let of_program = extensions_of(gateway, &session.caller.identity, &declared).await.map_err(|e| status(&e))?;
    let arrival = arrival(&init, &session);
    let arrived = gateway.tasks.arrive(&session.caller.identity, &session.caller.session, arrival).await;
    let desk = arrived.map_err(|e| status(&e))?;
    let (negotiated, refused) = negotiate(declared, &of_program);
    let acks = negotiated.iter().any(|each| each.supported && each.uri == ACK_EXTENSION);
    let ack = ack(&session, negotiated);
    if !outbound.send(Frame::uncounted(Down::ConnectionAck(ack.into()))).await {
        return Err(Status::cancelled("client is gone"));
    }
    if let Some(uri) = refused {
        let message = format!("ERR_EXTENSION_UNSUPPORTED: extension required but not supported: {uri}");
        return Err(Status::failed_precondition(message));
    }
    Ok(Agreed { session, desk, acks })
}

fn arrival(init: &InitConnection, session: &Session) -> Arrival {
    let (mut declines_pool, mut profiles) = (false, Vec::new());
    match &init.client_type {
        Some(ClientType::Service(service)) => declines_pool = service.no_pool_consumer,
        Some(ClientType::Orchestrator(orchestrator)) => profiles.clone_from(&orchestrator.supported_profiles),
        _ => {}
    }
    profiles.retain(|profile| !profile.is_empty() && profile.len() <= PROFILE_BYTES_MAX);
    profiles.truncate(PROFILES_MAX);
    // A process that was just started has no session to go on with.
    let is_same = !init.resume_session_id.is_empty();
    let (resumed, task) = (session.welcome.resumed, session.caller.credential.task);
    Arrival { resumed, is_same, declines_pool, profiles, task }
}

/// What agents and tasks are told right after the acknowledgement: what they keep for themselves, and what is shared. Without the ledger it is
/// empty; the client can ask again.
pub(super) async fn snapshot(gateway: &Gateway, session: &Session, desk: &Desk) -> Option<Down> {
    // The others live in no workspace.
    session.caller.identity.workspace()?;
    let keys = kv::snapshot(&gateway.gate, &session.caller).await.unwrap_or_else(|error| {
        tracing::warn!(%error, identity = %session.caller.identity, "configuration snapshot is empty");
        Default::default()
    });
    let map = |entries: Vec<(String, Vec<u8>)>| entries.into_iter().map(|(key, value)| (key, value.into())).collect();
    Some(Down::Config(Box::new(ConfigSnapshot {
        kv: map(keys.workspace),
        global_kv: map(keys.global),
        workspace_exclusive_kv: map(keys.workspace_exclusive),
        global_exclusive_kv: map(keys.global_exclusive),
        incomplete: keys.is_cut,
        task_context: context(&session.caller.identity, desk),
    })))
}

/// Why an agent was started.
fn context(identity: &Identity, desk: &Desk) -> HashMap<String, String> {
    let start = desk.bound.as_ref().filter(|task| task.mode == Mode::Startup);
    let (Some(start), Identity::Agent(named)) = (start, identity) else { return HashMap::new() };
    let spec = &start.spec;
    let profile = spec.launch_params.get("profile").cloned().unwrap_or_default();
    let user = start.subject.clone();
    let own = [
        ("task_id", start.id.to_string()),
        ("workspace", named.workspace.clone()),
        ("implementation", named.implementation.clone()),
        ("specifier", named.specifier.clone()),
        ("profile", profile),
        ("user", user.clone()),
        ("root_user", user),
    ];
    let own = own.into_iter().filter(|(_, value)| !value.is_empty()).map(|(key, value)| (key.to_owned(), value));
    let metadata = spec.metadata.iter().map(|(key, value)| (key.clone(), value.clone()));
    let params = spec.launch_params.iter().map(|(key, value)| (format!("lp.{key}"), value.clone()));
    metadata.chain(params).chain(own).collect()
}

async fn first_frame(inbound: &mut Upstream, patience: Duration) -> Result<InitConnection, Status> {
    let frame = tokio::time::timeout(patience, inbound.message());
    let frame = frame.await.map_err(|_| Status::deadline_exceeded("timeout waiting for InitConnection"))?;
    match frame.map_err(transport_error)? {
        Some(UpstreamMessage { payload: Some(Up::Init(init)), .. }) => Ok(*init),
        Some(_) => Err(Status::invalid_argument("first message must be InitConnection")),
        None => Err(Status::invalid_argument("stream ended before InitConnection")),
    }
}

/// An oversized frame is a limit, whatever the library calls it.
pub(super) fn transport_error(error: Status) -> Status {
    match error.code() {
        Code::OutOfRange => Status::resource_exhausted(error.message().to_owned()),
        _ => error,
    }
}

/// An extension that a client declares.
struct Declared<'a> {
    uri: &'a str,
    version: &'a str,
    required: bool,
}

impl Declared<'_> {
    fn is_built_in(&self) -> bool {
        EXTENSIONS.contains(&self.uri)
    }

    /// Why this server and the client's program cannot do it; nothing if they can.
    fn rejection(&self, of_program: &[String]) -> &'static str {
        if self.is_built_in() {
            let is_version = self.version.is_empty() || self.version == EXTENSION_VERSION;
            return if is_version { "" } else { "extension version not supported by this gateway" };
        }
        let is_known = of_program.iter().any(|uri| uri == self.uri);
        if is_known { "" } else { "extension URI not supported by this gateway" }
    }
}

/// Those of the first frame, then those of the headers.
fn declared<'a>(first: &'a [ExtensionDeclaration], metadata: &'a MetadataMap) -> Vec<Declared<'a>> {
    let headers = metadata.get_all(EXTENSIONS_HEADER).into_iter().filter_map(|value| value.to_str().ok());
    let uris = headers.flat_map(|value| value.split(',')).map(str::trim);
    let from_headers = uris.map(|uri| Declared { uri, version: "", required: false });
    let first = first.iter().map(|each| Declared { uri: &each.uri, version: &each.version, required: each.required });
    first.chain(from_headers).filter(|each| !each.uri.is_empty()).take(EXTENSIONS_MAX).collect()
}

/// What the registration of an agent's program says that it speaks, if the agent declares anything that is not built in.
async fn extensions_of(
    gateway: &Gateway,
    identity: &Identity,
    declared: &[Declared<'_>],
) -> Result<Vec<String>, trunkline_core::Error> {
    match identity {
        Identity::Agent(named) if declared.iter().any(|each| !each.is_built_in()) => {
            gateway.tasks.registry().extensions(&named.implementation).await
        }
        _ => Ok(Vec::new()),
    }
}

/// One result a declaration, in order; and the first required one that is not there.
fn negotiate(declared: Vec<Declared<'_>>, of_program: &[String]) -> (Vec<NegotiatedExtension>, Option<String>) {
    let refused = declared.iter().find(|each| each.required && !each.rejection(of_program).is_empty());
    let refused = refused.map(|each| each.uri.to_owned());
    let negotiated = declared.into_iter().map(|each| {
        let rejection_reason = each.rejection(of_program).to_owned();
        NegotiatedExtension {
            uri: each.uri.to_owned(),
            version: each.version.to_owned(),
            supported: rejection_reason.is_empty(),
            rejection_reason,
        }
    });
    (negotiated.collect(), refused)
}

fn ack(session: &Session, negotiated_extensions: Vec<NegotiatedExtension>) -> ConnectionAck {
    let assigned_id = match &session.caller.identity {
        Identity::Task(named) => named.specifier.clone(),
        _ => String::new(),
    };
    let named = |uri: &&str| negotiated_extensions.iter().any(|each| each.uri == *uri);
    let others = EXTENSIONS.into_iter().filter(|uri| !named(uri)).map(ToOwned::to_owned).collect();
    ConnectionAck {
        session_id: session.caller.session.clone(),
        resumed: session.welcome.resumed,
        assigned_id,
        negotiated_extensions,
        server_supported_extensions: others,
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
        server_build_info: Some(BuildInfo {
            commit: env!("TRUNKLINE_COMMIT").to_owned(),
            built_at: env!("TRUNKLINE_BUILT_AT").to_owned(),
            runtime: "rust".to_owned(),
            os: format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
        }),
        initial_connection_unix_ms: session.welcome.initial_connection_ms as i64,
        reconnection_count: session.welcome.reconnections as i32,
        log_epoch: session.log_epoch(),
    }
}

#[cfg(test)]
mod tests {
    use super::{ACK_EXTENSION, EXTENSIONS_HEADER, ExtensionDeclaration, MetadataMap, declared, negotiate};

    #[test]
    fn declarations_come_before_headers_and_keep_their_order() {
        let declare = |uri: &str, required| ExtensionDeclaration { uri: uri.into(), required, ..Default::default() };
        let mut headers = MetadataMap::new();
        headers.append(EXTENSIONS_HEADER, "urn:c, ,urn:a".parse().unwrap());
        headers.append(EXTENSIONS_HEADER, "urn:d".parse().unwrap());
        let first = [declare("urn:a", false), declare("", true), declare("urn:b", true)];
        let (results, refused) = negotiate(declared(&first, &headers), &[]);
        let uris: Vec<_> = results.iter().map(|result| result.uri.as_str()).collect();
        assert_eq!(uris, ["urn:a", "urn:b", "urn:c", "urn:a", "urn:d"]);
        assert!(results.iter().all(|result| !result.supported && !result.rejection_reason.is_empty()));
        assert_eq!(refused.as_deref(), Some("urn:b"));
        let (first, none) = ([declare(ACK_EXTENSION, true)], MetadataMap::new());
        let (results, refused) = negotiate(declared(&first, &none), &[]);
        assert!(results[0].supported && results[0].rejection_reason.is_empty() && refused.is_none());
    }

    #[test]
    fn a_version_that_is_not_spoken_is_not_supported() {
        let declare = |version: &str| ExtensionDeclaration {
            uri: ACK_EXTENSION.into(),
            version: version.into(),
            required: true,
            ..Default::default()
        };
        for (version, supported) in [("", true), ("1", true), ("2", false)] {
            let (first, none) = ([declare(version)], MetadataMap::new());
            let (results, refused) = negotiate(declared(&first, &none), &[]);
            assert_eq!((results[0].supported, refused.is_none()), (supported, supported), "{version}");
        }
    }

    #[test]
    fn what_a_program_is_registered_with_is_supported() {
        let declare = |uri: &str| ExtensionDeclaration { uri: uri.into(), required: true, ..Default::default() };
        let (first, none) = ([declare("urn:a"), declare("urn:b")], MetadataMap::new());
        let (results, refused) = negotiate(declared(&first, &none), &["urn:a".to_owned()]);
        assert_eq!(results.iter().map(|each| each.supported).collect::<Vec<_>>(), [true, false]);
        assert_eq!(refused.as_deref(), Some("urn:b"));
    }
}
