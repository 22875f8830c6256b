//! Without `--dev`, a token opens the streams that it names, and pages of foreign origins open nothing.

use reqwest::Method;
use serde_json::json;
use tokio_tungstenite::tungstenite::{Error, client::IntoClientRequest as _};
use trunkline_agent_socket::{
    close::code,
    transport::{Transport as _, websocket},
};

use super::{FRAME_BYTES_MAX, Socket};
use crate::sandbox::rights::World;

/// A socket with a token, from a page; or the status of the refusal.
pub(super) async fn open(world: &World, token: &str, origin: Option<&str>) -> Result<Socket, u16> {
    let mut request = format!("ws://{}/agent-socket?access_token={token}", world.server.addresses().http)
        .into_client_request()
        .unwrap();
    if let Some(origin) = origin {
        request.headers_mut().insert("origin", origin.parse().unwrap());
    }
    match websocket::connect(request, FRAME_BYTES_MAX).await {
        Ok(socket) => {
            let (sender, receiver) = socket.split();
            Ok(Socket { sender, receiver })
        }
        Err(error) => match *error.downcast::<Error>().unwrap() {
            Error::Http(response) => Err(response.status().as_u16()),
            other => panic!("{other}"),
        },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_opens_the_streams_that_it_names() {
    let mut world = World::new().await;
    let mut token = async |scope: &str| {
        let reply = world.key("user", "ann", scope, "*").await;
        assert!(reply.success, "{}", reply.error);
        (reply.plaintext_token, reply.created_token.unwrap().id)
    };
    let (shows, shows_id) = token("socket:web-*").await;
    let (serves, _) = token("socket-runtime:web-a").await;
    let (nothing, _) = token("connect").await;
    assert!(!world.key("user", "ann", "socket:[", "*").await.success, "no pattern");
    assert_eq!(open(&world, "", None).await.err(), Some(401));
    for origin in ["https://evil.example", "null"] {
        assert_eq!(open(&world, &shows, Some(origin)).await.err(), Some(403), "{origin}");
    }
    let hello = |client: &str| json!({"type": "hello", "clientId": client});
    let own = format!("http://{}", world.server.addresses().http);
    let mut tab = open(&world, &shows, Some(&own)).await.ok().unwrap();
    tab.say(hello("web-a")).await;
    tab.expect("welcome").await;
    tab.expect("state_snapshot").await;
    let mut allowed = open(&world, &shows, Some("https://app.example")).await.ok().unwrap();
    allowed.say(hello("web-b")).await;
    allowed.expect("welcome").await;
    let runtime = json!({"type": "hello", "payload": {"role": "runtime", "runtimeGeneration": "g"}});
    for (token, said) in
        [(&shows, hello("app-a")), (&nothing, hello("web-a")), (&serves, hello("web-a")), (&shows, runtime.clone())]
    {
        let mut socket = open(&world, token, None).await.ok().unwrap();
        socket.say(said).await;
        assert_eq!(socket.closed().await.code, code::POLICY);
    }
    // A runtime tells only those that it serves, and hears only them.
    let mut socket = open(&world, &serves, None).await.ok().unwrap();
    socket.say(runtime).await;
    socket.expect("welcome").await;
    allowed.expect("state_snapshot").await;
    allowed.say(json!({"type": "turn_start", "turnId": "not yours"})).await;
    allowed.expect("turn_queued").await;
    tab.say(json!({"type": "turn_start", "turnId": "yours"})).await;
    assert_eq!(socket.expect("turn_start").await["turnId"], "yours");
    socket.say(json!({"type": "turn_done", "clientId": "web-a", "turnId": "yours", "seq": 1})).await;
    socket.expect("ack").await;
    tab.expect("turn_queued").await;
    tab.expect("turn_done").await;
    socket.say(json!({"type": "turn_done", "clientId": "web-b", "turnId": "not yours", "seq": 2})).await;
    assert_eq!(socket.closed().await.code, code::POLICY);
    // A token that is revoked ends its sockets.
    let (mut tabs, revoked) = ([tab, allowed], world.revoke(&shows_id).await);
    assert!(revoked);
    for tab in &mut tabs {
        assert_eq!(tab.closed().await.code, code::AWAY);
    }
    assert_eq!(open(&world, &shows, None).await.err(), Some(401));
    assert_eq!(world.web.request(Method::GET, "/agent-socket").send().await.unwrap().status(), 400);
    world.server.stop().await;
}
