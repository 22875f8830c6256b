//! The operators' service beside the agents' one: `trunkline.v1.Operator`.

mod apps;
mod dead_letters;
mod figures;

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::http;
use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, body::Body, server::NamedService};
use trunkline_core::{
    caller::Caller,
    gate::{Administer, AsOf, Gate},
    identity::Identity,
    message::{Envelope, Progress},
    topic::is_progress,
};
use trunkline_proto::own::{
    App, AppAgent, AppSecret, AppToken, CreateAppRequest, DeadLetter, DeadLetterRequest, EraseAppUserReply,
    EraseAppUserRequest, Figures, ListAppsReply, ListAppsRequest, ListDeadLettersReply, ListDeadLettersRequest,
    PutAppAgentRequest, RemoveAppAgentRequest, RemoveAppRequest, RemoveDeadLetterReply, RotateAppSecretRequest,
    SetAppOriginsRequest, SignAppTokenRequest, TailItem, TailRequest, WatchRequest,
    operator_server::{Operator, OperatorServer},
};
use trunkline_store::log::{Item, Reader, Record};

use crate::{agent::Gateway, error::status, listen::Peer};

/// The service.
#[derive(Clone)]
pub(crate) struct Desk(pub(crate) Arc<Gateway>);

impl Desk {
    /// The last words of a stream, when the server stops or the caller's key is not good any more; ends what goes on.
    fn until_ended<T: Send + 'static>(
        &self,
        caller: Caller,
        items: impl Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        let gateway = self.0.clone();
        let ended: BoxFuture<'static, Status> = Box::pin(async move {
            match gateway.stop.run_until_cancelled(gateway.auth.ended(&caller)).await {
                Some(ended) => Status::unauthenticated(ended.to_string()),
                None => Status::unavailable("server shutting down"),
            }
        });
        let items: Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> = Box::pin(items);
        Box::pin(stream::unfold(Some((items, ended)), |going_on| async move {
            let (mut items, mut ended) = going_on?;
            tokio::select! {
                status = &mut ended => Some((Err(status), None)),
                item = items.next() => Some((item?, Some((items, ended)))),
            }
        }))
    }

    /// The administrator who calls.
    async fn admit(&self, headers: &http::HeaderMap, peer: Option<std::net::IpAddr>) -> Result<Caller, Status> {
        let operator = Identity::orchestrator("operator", "desk").map_err(|e| status(&e))?;
        let key = headers.get("x-api-key").and_then(|key| key.to_str().ok());
        let credentials: HashMap<_, _> = key.map(|key| ("x-api-key".to_owned(), key.to_owned())).into_iter().collect();
        let admitted = self.0.auth.admit(&operator, &credentials, peer, None).await;
        Ok(Caller::new(operator, String::new(), admitted.map_err(|e| status(&e))?))
    }
}

/// The service as a listener serves it. Who calls is admitted before anything of the request is read, which is kept until it
/// is whole.
#[derive(Clone)]
pub(crate) struct Admitting {
    desk: Desk,
    server: OperatorServer<Desk>,
}

impl Admitting {
    pub(crate) fn new(desk: Desk, request_bytes_max: usize) -> Self {
        let server = OperatorServer::new(desk.clone()).max_decoding_message_size(request_bytes_max);
        Self { desk, server }
    }
}

impl NamedService for Admitting {
    const NAME: &'static str = <OperatorServer<Desk> as NamedService>::NAME;
}

impl tower::Service<http::Request<Body>> for Admitting {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let Self { desk, mut server } = self.clone();
        Box::pin(async move {
            let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
            match desk.admit(request.headers(), peer).await {
                Ok(caller) => drop(request.extensions_mut().insert(Admitted(caller))),
                Err(refused) => return Ok(refused.into_http()),
            }
            server.call(request).await
        })
    }
}

/// Who calls.
#[derive(Clone)]
struct Admitted(Caller);

/// The administrator who calls, and for what.
fn called<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let (_, mut extensions, asked) = request.into_parts();
    let admitted = extensions.remove::<Admitted>();
    let Admitted(caller) = admitted.ok_or_else(|| Status::internal("nobody was admitted to this call"))?;
    Ok((caller, asked))
}

#[tonic::async_trait]
impl Operator for Desk {
    type TailStream = Pin<Box<dyn Stream<Item = Result<TailItem, Status>> + Send>>;

    async fn tail(&self, request: Request<TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        let (caller, TailRequest { topic, from_start }) = called(request)?;
        let permit = self.0.gate.authorize(&caller, Administer("topics")).map_err(|e| status(&e))?;
        let reader = self.0.gate.tap(&permit, &topic, from_start).map_err(|e| status(&e))?;
        // Pulled by the transport: who does not read holds nothing but its place.
        let tail = Tail { gate: self.0.gate.clone(), caller: caller.clone(), allowed: self.0.gate.as_of(), reader };
        Ok(Response::new(self.until_ended(caller, stream::unfold(Some(tail), Tail::next))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<Figures, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (caller, asked) = called(request)?;
        // Whether it may is told at once, and not by a stream that ends.
        self.0.gate.authorize(&caller, Administer("sessions")).map_err(|e| status(&e))?;
        let figures = figures::watch(self.0.clone(), caller.clone(), asked);
        Ok(Response::new(self.until_ended(caller, figures)))
    }

    async fn list_apps(&self, request: Request<ListAppsRequest>) -> Result<Response<ListAppsReply>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::list(self.0.conversations.apps(), &caller, &asked))
    }

    async fn create_app(&self, request: Request<CreateAppRequest>) -> Result<Response<AppSecret>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::create(self.0.conversations.apps(), &caller, asked).await)
    }

    async fn set_app_origins(&self, request: Request<SetAppOriginsRequest>) -> Result<Response<App>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::set_origins(self.0.conversations.apps(), &caller, asked).await)
    }

    async fn put_app_agent(&self, request: Request<PutAppAgentRequest>) -> Result<Response<AppAgent>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::put_agent(self.0.conversations.apps(), &caller, asked).await)
    }

    async fn remove_app_agent(&self, request: Request<RemoveAppAgentRequest>) -> Result<Response<App>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::remove_agent(self.0.conversations.apps(), &caller, &asked).await)
    }

    async fn rotate_app_secret(&self, request: Request<RotateAppSecretRequest>) -> Result<Response<AppSecret>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::rotate(self.0.conversations.apps(), &caller, &asked).await)
    }

    async fn remove_app(&self, request: Request<RemoveAppRequest>) -> Result<Response<App>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::remove(self.0.conversations.apps(), &caller, &asked).await)
    }

    async fn sign_app_token(&self, request: Request<SignAppTokenRequest>) -> Result<Response<AppToken>, Status> {
        let (caller, asked) = called(request)?;
        answer(apps::sign(self.0.conversations.apps(), &caller, &asked))
    }

    async fn erase_app_user(
        &self,
        request: Request<EraseAppUserRequest>,
    ) -> Result<Response<EraseAppUserReply>, Status> {
        let (caller, EraseAppUserRequest { app, user }) = called(request)?;
        let erased = self.0.conversations.erase(&caller, &app, &user).await;
        answer(erased.map(|count| EraseAppUserReply { conversations: u32::try_from(count).unwrap_or(u32::MAX) }))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersReply>, Status> {
        let (caller, asked) = called(request)?;
        answer(dead_letters::list(&self.0.sessions, &caller, &asked).await)
    }

    async fn get_dead_letter(&self, request: Request<DeadLetterRequest>) -> Result<Response<DeadLetter>, Status> {
        let (caller, asked) = called(request)?;
        answer(dead_letters::get(&self.0.sessions, &caller, &asked.id).await)
    }

    async fn retry_dead_letter(&self, request: Request<DeadLetterRequest>) -> Result<Response<DeadLetter>, Status> {
        let (caller, asked) = called(request)?;
        answer(dead_letters::retry(&self.0.sessions, &caller, &asked.id).await)
    }

    async fn remove_dead_letter(
        &self,
        request: Request<DeadLetterRequest>,
    ) -> Result<Response<RemoveDeadLetterReply>, Status> {
        let (caller, asked) = called(request)?;
        answer(dead_letters::remove(&self.0.sessions, &caller, &asked.id).await)
    }
}

fn answer<T>(answer: Result<T, trunkline_core::Error>) -> Result<Response<T>, Status> {
    answer.map(Response::new).map_err(|e| status(&e))
}

/// What a topic holds, for an operator who may see it.
struct Tail {
    gate: Gate,
    caller: Caller,
    /// As of when it may.
    allowed: AsOf,
    reader: Reader,
}

impl Tail {
    /// The next item; the last one is an error. A right that was taken back shows nothing more.
    async fn next(this: Option<Self>) -> Option<(Result<TailItem, Status>, Option<Self>)> {
        let mut this = this?;
        loop {
            let next = match this.reader.next().await {
                Ok(Item::Record(record)) => item(&record),
                Ok(Item::Gap(gap)) => TailItem { gap_through: gap.through.0, ..TailItem::default() },
                Ok(Item::End { .. }) => return None,
                Ok(Item::Transient(_)) => continue,
                Err(error) => return Some((Err(status(&error.into())), None)),
            };
            let now = this.gate.as_of();
            if now != this.allowed {
                if let Err(refused) = this.gate.authorize(&this.caller, Administer("topics")) {
                    return Some((Err(status(&refused)), None));
                }
                this.allowed = now;
            }
            return Some((Ok(next), Some(this)));
        }
    }
}

/// A record that is neither message nor progress is shown as it lies in the log.
fn item(record: &Record) -> TailItem {
    let raw = TailItem { offset: record.offset.0, timestamp_ms: record.timestamp_ms, ..TailItem::default() };
    if is_progress(&record.topic)
        && let Ok(Progress { source, workspace, body, .. }) = Progress::decode(record)
    {
        return TailItem { source_topic: source, workspace, payload: body, ..raw };
    }
    match Envelope::decode(record) {
        Ok(Envelope { source, workspace, kind, payload, .. }) => {
            TailItem { source_topic: source, workspace, message_type: kind, payload, ..raw }
        }
        Err(_) => TailItem { payload: record.payload.clone(), ..raw },
    }
}
