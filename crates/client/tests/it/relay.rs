//! HTTP and tunnels from one client to another, through a server that relays their frames as the published one does: under ids of
//! its own, and the frame that opens a tunnel wrapped.

use std::time::Duration;

use axum::{
    Router,
    body::Body as AxumBody,
    extract::Path,
    http::{HeaderMap, StatusCode},
    response::IntoResponse as _,
    routing::{any, get, post},
};
use bytes::Bytes;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tower::ServiceExt as _;
use trunkline_client::{
    Agent, Kind, Service, Topic,
    authority::OnBehalf,
    http::{HeaderMode, Serve},
    kv::Scope,
    proto::{
        DownstreamMessage, KvResponse, ProxyError, ProxyHttpBodyChunk, ProxyHttpRequest, ProxyHttpResponse, TunnelAck,
        TunnelClose, TunnelData, downstream_message::Payload as Down, proxy_error, tunnel_close,
        upstream_message::Payload as Up,
    },
    tunnel::{Dial, Incoming, Protocol},
};

use crate::{
    peer::{Line, Peer, agent},
    server::soon,
};

/// Relays until both are gone. Calls of the first go to the second.
fn relay(caller: Line, service: Line) -> tokio::task::JoinHandle<()> {
    let (mut from_caller, to_caller) = caller.split();
    let (mut from_service, to_service) = service.split();
    tokio::spawn(async move {
        let wire = |id: &str| format!("_aether/wire/{id}");
        let own = |id: &str| id.strip_prefix("_aether/wire/").unwrap().to_owned();
        let (mut caller_over, mut service_over) = (false, false);
        while !(caller_over && service_over) {
            tokio::select! {
                up = from_caller.message(), if !caller_over => {
                    let Ok(Some(up)) = up else { caller_over = true; continue };
                    let down = match up.payload {
                        Some(Up::ProxyHttpRequest(mut it)) => { it.request_id = wire(&it.request_id); Down::ProxyHttpRequest(it) }
                        Some(Up::ProxyHttpBodyChunk(mut it)) => { it.request_id = wire(&it.request_id); Down::ProxyHttpBodyChunk(it) }
                        Some(Up::TunnelOpen(mut it)) => {
                            it.tunnel_id = wire(&it.tunnel_id);
                            let data = TunnelData { tunnel_id: it.tunnel_id.clone(), data: it.encode_to_vec().into(), ..Default::default() };
                            Down::TunnelData(data.into())
                        }
                        Some(Up::TunnelData(mut it)) => { it.tunnel_id = wire(&it.tunnel_id); Down::TunnelData(it) }
                        Some(Up::TunnelAck(mut it)) => { it.tunnel_id = wire(&it.tunnel_id); Down::TunnelAck(it) }
                        Some(Up::TunnelClose(mut it)) => { it.tunnel_id = wire(&it.tunnel_id); Down::TunnelClose(it) }
                        _ => continue,
                    };
                    let _ = to_service.send(Ok(DownstreamMessage { payload: Some(down), ..Default::default() })).await;
                }
                up = from_service.message(), if !service_over => {
                    let Ok(Some(up)) = up else { service_over = true; continue };
                    let down = match up.payload {
                        Some(Up::ProxyHttpResponse(mut it)) => { it.request_id = own(&it.request_id); Down::ProxyHttpResponse(it) }
                        Some(Up::ProxyHttpBodyChunk(mut it)) => { it.request_id = own(&it.request_id); Down::ProxyHttpBodyChunk(it) }
                        Some(Up::TunnelData(mut it)) => { it.tunnel_id = own(&it.tunnel_id); Down::TunnelData(it) }
                        Some(Up::TunnelAck(mut it)) => { it.tunnel_id = own(&it.tunnel_id); Down::TunnelAck(it) }
                        Some(Up::TunnelClose(mut it)) => { it.tunnel_id = own(&it.tunnel_id); Down::TunnelClose(it) }
                        _ => continue,
                    };
                    let _ = to_caller.send(Ok(DownstreamMessage { payload: Some(down), ..Default::default() })).await;
                }
            }
        }
    })
}

async fn both() -> (Agent, Service, tokio::task::JoinHandle<()>) {
    let mut peer = Peer::begin().await;
    let (agent, caller) = peer.accept(agent()).await;
    let (service, line) = peer.accept(Service::builder("memory", "one")).await;
    let relay = relay(caller, line);
    // The listener is not needed any more, what it accepted is.
    std::mem::forget(peer);
    (agent, service, relay)
}

fn memory() -> Topic {
    Topic::any_service("memory").unwrap()
}

fn router() -> Router {
    Router::new()
        .route("/hello/{name}", get(async |Path(name): Path<String>| format!("hello {name}")))
        .route(
            "/echo",
            post(async |headers: HeaderMap, body: Bytes| {
                let mut answer = body.into_response();
                answer.headers_mut().insert("x-got", headers["x-sent"].clone());
                answer
            }),
        )
        .route("/teapot", any(async || StatusCode::IM_A_TEAPOT))
        .route("/panic", get(async || -> &'static str { panic!("a defect") }))
        .route("/never", get(async || -> &'static str { std::future::pending().await }))
        .route(
            "/ticks",
            get(async || {
                let ticks = tokio_stream::iter(0..3).map(|n| Ok::<_, std::io::Error>(format!("tick {n}\n")));
                AxumBody::from_stream(ticks)
            }),
        )
        .route("/whoami", get(async |headers: HeaderMap| headers["x-auth-user-id"].to_str().unwrap().to_owned()))
}

#[tokio::test]
async fn a_router_on_a_service_answers_calls() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve_http(router());
    let http = agent.http(memory());
    assert_eq!(soon(http.get("/hello/world?x=1").send()).await.unwrap().text().await.unwrap(), "hello world");
    for size in [0, 1, 256 * 1024, 256 * 1024 + 1, 1_900_000] {
        let body: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        let answer = soon(http.post("/echo").header("x-sent", "yes").body(body.clone()).send()).await.unwrap();
        assert_eq!(answer.headers()["x-got"], "yes", "{size}");
        assert_eq!(soon(answer.bytes()).await.unwrap(), body, "{size}");
    }
    for (path, status) in [("/teapot", 418), ("/nowhere", 404), ("/panic", 500)] {
        assert_eq!(soon(http.get(path).send()).await.unwrap().status(), status, "{path}");
    }
    let json = soon(http.post("/echo").header("x-sent", "y").json(&[1, 2]).send()).await.unwrap();
    assert_eq!(json.json::<Vec<u32>>().await.unwrap(), [1, 2]);
}

#[tokio::test]
async fn it_is_a_tower_service_like_any_other() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve_http(router());
    let http = agent.http(memory());
    let request = http::Request::builder().uri("http://ignored/hello/tower").body(AxumBody::empty()).unwrap();
    let answer = soon(http.oneshot(request)).await.unwrap();
    let body = axum::body::to_bytes(AxumBody::new(answer.into_body()), 1000).await.unwrap();
    assert_eq!(body, "hello tower");
}

#[tokio::test]
async fn an_answer_that_goes_on_comes_as_it_is_made() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve_http(router());
    let call = agent.http(memory()).get("/ticks").stream(Duration::from_secs(5));
    let mut answer = soon(call.send()).await.unwrap();
    let mut ticks = Vec::new();
    while let Some(tick) = soon(answer.chunk()).await.unwrap() {
        ticks.push(String::from_utf8(tick.to_vec()).unwrap());
    }
    assert_eq!(ticks, ["tick 0\n", "tick 1\n", "tick 2\n"]);
}

#[tokio::test]
async fn many_calls_are_under_way_at_once() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve_http(router());
    let http = agent.http(memory());
    let calls = (0..100).map(|n| {
        let http = http.clone();
        async move {
            let answer = http.get(format!("/hello/{n}")).send().await.unwrap();
            assert_eq!(answer.text().await.unwrap(), format!("hello {n}"));
        }
    });
    soon(futures_util::future::join_all(calls)).await;
}

#[tokio::test]
async fn a_call_that_is_not_answered_in_time_fails_and_others_do_not() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve_http(router());
    let http = agent.http(memory()).timeout(Duration::from_millis(50));
    assert_eq!(soon(http.get("/never").send()).await.unwrap_err().kind(), Kind::Timeout);
    soon(agent.http(memory()).get("/hello/again").send()).await.unwrap();
}

#[tokio::test]
async fn who_calls_is_told_strictly_and_paths_can_be_closed() {
    let (agent, service, _relay) = both().await;
    let serve = Serve::new(router()).header_mode(HeaderMode::Strict).allow_paths(["/whoami"]);
    let _serving = service.serve(serve.allow_partial());
    let http = agent.http(memory()).authorized(OnBehalf::of("user", "alice").by("g-1"));
    let answer = soon(http.get("/whoami").header("x-auth-user-id", "root").send()).await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "alice");
    assert_eq!(soon(http.get("/hello/x").send()).await.unwrap_err().kind(), Kind::Denied);
    let _serving = service.serve(Serve::new(router()));
    let refused = soon(http.get("/hello/x").send()).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Denied, "how far the authority goes is not known");
}

#[tokio::test]
async fn what_is_on_the_way_can_say_why_a_call_fails() {
    use proxy_error::Kind as P;
    let cases = [
        (P::DialFailed, Kind::Unavailable),
        (P::Timeout, Kind::Timeout),
        (P::UpstreamReset, Kind::Interrupted),
        (P::AclDenied, Kind::Denied),
        (P::SidecarUnavailable, Kind::Unavailable),
        (P::PayloadTooLarge, Kind::Exhausted),
        (P::DecodeFailed, Kind::Invalid),
        (P::Unknown, Kind::Refused),
    ];
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    for (proxy, kind) in cases {
        let http = agent.http(memory());
        let calls = tokio::spawn(async move { http.get("/").send().await });
        let Up::ProxyHttpRequest(asked) = line.next().await else { panic!("expected a call") };
        let error = Some(ProxyError { kind: proxy.into(), message: "why".into() });
        let answer = ProxyHttpResponse { request_id: asked.request_id, error, ..Default::default() };
        line.put(Down::ProxyHttpResponse(answer.into())).await;
        let failed = soon(calls).await.unwrap().unwrap_err();
        assert_eq!((failed.kind(), failed.code()), (kind, proxy.as_str_name()));
    }
    let http = agent.http(memory());
    let calls = tokio::spawn(async move { http.get("/").send().await });
    assert!(matches!(line.next().await, Up::ProxyHttpRequest(_)));
    drop(line);
    assert_eq!(soon(calls).await.unwrap().unwrap_err().kind(), Kind::Interrupted, "a call does not survive a break");
}

async fn echo(incoming: Incoming) {
    match incoming.request().remote_hint.as_str() {
        "refuse" => incoming.refuse("ACL_DENIED: not you").await,
        _ => {
            let (mut read, mut write) = tokio::io::split(incoming.accept());
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_ends_on_each_side_apart() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve(Serve::nothing().tunnels(echo));
    let tunnel = agent.dial(Dial::tcp(Topic::service("memory", "one").unwrap())).await.unwrap();
    let (mut read, mut write) = tokio::io::split(tunnel);
    let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 253) as u8).collect();
    let expected = sent.clone();
    let writes = tokio::spawn(async move {
        for piece in sent.chunks(70_000) {
            write.write_all(piece).await.unwrap();
        }
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    soon(read.read_to_end(&mut got)).await.unwrap();
    soon(writes).await.unwrap();
    assert_eq!(got.len(), expected.len());
    assert!(got == expected);
}

#[tokio::test]
async fn a_refused_tunnel_says_so_at_the_first_read() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve(Serve::nothing().tunnels(echo));
    let dial = Dial::tcp(Topic::service("memory", "one").unwrap()).hint("refuse");
    let mut tunnel = agent.dial(dial).await.unwrap();
    let refused = soon(tunnel.read(&mut [0; 10])).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    let _serving = service.serve_http(router());
    let mut tunnel = agent.dial(Dial::tcp(memory())).await.unwrap();
    assert!(soon(tunnel.read(&mut [0; 10])).await.is_err(), "nobody takes tunnels there");
}

#[tokio::test]
async fn datagrams_stay_apart() {
    let (agent, service, _relay) = both().await;
    let _serving = service.serve(Serve::nothing().tunnels(async |incoming: Incoming| {
        assert_eq!(incoming.request().protocol(), Protocol::Udp);
        let mut tunnel = incoming.accept();
        let mut buffer = [0; 100];
        while let Ok(count @ 1..) = tunnel.read(&mut buffer).await {
            tunnel.write_all(&buffer[..count]).await.unwrap();
        }
    }));
    let mut tunnel = agent.dial(Dial::udp(memory())).await.unwrap();
    for text in ["one", "two"] {
        tunnel.write_all(text.as_bytes()).await.unwrap();
    }
    let mut buffer = [0; 100];
    for text in ["one", "two"] {
        let count = soon(tunnel.read(&mut buffer)).await.unwrap();
        assert_eq!(&buffer[..count], text.as_bytes());
    }
}

#[tokio::test]
async fn credit_is_in_bytes_and_peers_that_count_frames_are_borne_with() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let mut tunnel = agent.dial(Dial::tcp(memory())).await.unwrap();
    let Up::TunnelOpen(open) = line.next().await else { panic!("expected a tunnel") };
    let writes = tokio::spawn(async move {
        tunnel.write_all(&vec![1; 1_500_000]).await.unwrap();
        tunnel
    });
    let mut seen = 0;
    while seen < 1024 * 1024 {
        let Up::TunnelData(data) = line.next().await else { panic!("expected data") };
        seen += data.data.len();
    }
    assert_eq!(seen, 1024 * 1024, "no more than the window");
    let ack = TunnelAck { tunnel_id: open.tunnel_id.clone(), ack_seq: 3, credits: 16 };
    line.put(Down::TunnelAck(ack.into())).await;
    while seen < 1_500_000 {
        let Up::TunnelData(data) = line.next().await else { panic!("expected data") };
        seen += data.data.len();
    }
    let mut tunnel = soon(writes).await.unwrap();
    // What is read is told in bytes.
    for seq in 0..2 {
        let data = Bytes::from(vec![2; 200 * 1024]);
        let frame = TunnelData { tunnel_id: open.tunnel_id.clone(), seq, data, fin: false };
        line.put(Down::TunnelData(frame.into())).await;
    }
    soon(tunnel.read_exact(&mut vec![0; 400 * 1024])).await.unwrap();
    let Up::TunnelAck(ack) = line.next().await else { panic!("expected credit") };
    assert!(ack.credits >= 256 * 1024, "{ack:?}");
    let reason = tunnel_close::Reason::IdleTimeout.into();
    let close = TunnelClose { tunnel_id: open.tunnel_id, reason, detail: "no activity".into() };
    line.put(Down::TunnelClose(close.into())).await;
    assert_eq!(soon(tunnel.read(&mut [0; 1])).await.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_dropped_tunnel_is_closed_for_the_other_side() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let mut tunnel = agent.dial(Dial::tcp(memory())).await.unwrap();
    tunnel.write_all(b"last words").await.unwrap();
    drop(tunnel);
    assert!(matches!(line.next().await, Up::TunnelOpen(_)));
    assert!(matches!(line.next().await, Up::TunnelData(data) if data.data == "last words"));
    assert!(matches!(line.next().await, Up::TunnelClose(_)));
}

#[tokio::test]
async fn a_tunnel_ends_when_nothing_goes_through_it_or_too_much() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let closed = async |line: &mut Line| loop {
        if let Up::TunnelClose(close) = line.next().await {
            return close.reason();
        }
    };
    let idle = Dial::tcp(memory()).idle_timeout(Duration::from_millis(50));
    let mut tunnel = agent.dial(idle).await.unwrap();
    tunnel.write_all(b"hello").await.unwrap();
    assert_eq!(soon(tunnel.read(&mut [0; 1])).await.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    drop(tunnel);
    assert_eq!(closed(&mut line).await, tunnel_close::Reason::IdleTimeout);
    let mut tunnel = agent.dial(Dial::tcp(memory()).bytes_max(10)).await.unwrap();
    tunnel.write_all(b"0123456789").await.unwrap();
    let refused = soon(tunnel.write_all(b"1")).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::QuotaExceeded);
    drop(tunnel);
    assert_eq!(closed(&mut line).await, tunnel_close::Reason::Quota);
}

#[tokio::test]
async fn a_body_that_is_not_read_breaks_off_before_it_fills_the_memory() {
    let mut peer = Peer::begin().await;
    let (agent, mut line) = peer.agent().await;
    let (tell, ended) = tokio::sync::oneshot::channel();
    let tell = std::sync::Arc::new(std::sync::Mutex::new(Some(tell)));
    let (go, goes) = tokio::sync::watch::channel(false);
    let router = Router::new().fallback(move |body: AxumBody| {
        let (tell, mut goes) = (tell.lock().unwrap().take().unwrap(), goes.clone());
        async move {
            goes.wait_for(|goes| *goes).await.unwrap();
            tell.send(axum::body::to_bytes(body, usize::MAX).await.map(|all| all.len())).unwrap();
        }
    });
    let _serving = agent.serve_http(router);
    let request = ProxyHttpRequest {
        request_id: "r".into(),
        method: "POST".into(),
        path: "/".into(),
        body_chunked: true,
        ..Default::default()
    };
    line.put(Down::ProxyHttpRequest(request.into())).await;
    for seq in 0..150 {
        let data = Bytes::from(vec![0; 256 * 1024]);
        let chunk = ProxyHttpBodyChunk { request_id: "r".into(), is_request: true, seq, data, fin: false };
        line.put(Down::ProxyHttpBodyChunk(chunk.into())).await;
    }
    // A question behind it all, so that it is there.
    let asks = tokio::spawn(async move { agent.kv(Scope::workspace()).get("k").await });
    let asked = loop {
        if let Up::KvOp(asked) = line.next().await {
            break asked;
        }
    };
    let answer = KvResponse { request_id: asked.request_id, success: true, ..Default::default() };
    line.put(Down::Kv(answer.into())).await;
    soon(asks).await.unwrap().unwrap();
    go.send_replace(true);
    assert!(soon(ended).await.unwrap().is_err(), "37 MiB in a row are not kept");
}
