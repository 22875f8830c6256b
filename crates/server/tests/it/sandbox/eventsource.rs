//! The three streams with a published EventSource client, which comes back by itself; conformance/trunkline/eventsource has
//! the same with npm's.

use std::time::Duration;

use eventsource_client::{Client as _, ClientBuilder, ReconnectOptions, SSE};
use futures_util::StreamExt as _;
use launchdarkly_sdk_transport::HyperTransport;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{Event, Screen, Web};
use crate::process::Process;

/// What an EventSource hears, as it comes.
fn listen(web: &Web, path: &str) -> mpsc::UnboundedReceiver<Event> {
    let again = ReconnectOptions::reconnect(true).retry_initial(true).delay(Duration::from_millis(20)).build();
    let builder = ClientBuilder::for_url(&format!("{}{path}", web.base)).unwrap().reconnect(again);
    let client = builder.build_with_transport(HyperTransport::builder().build_http().unwrap());
    let (heard, hears) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut events = Box::pin(client.stream());
        while let Some(event) = events.next().await {
            let Ok(SSE::Event(event)) = event else { continue };
            let data: Value = serde_json::from_str(&event.data).unwrap();
            if heard.send(Event { name: event.event_type, id: event.id.unwrap_or_default(), data }).is_err() {
                return;
            }
        }
    });
    hears
}

async fn next(hears: &mut mpsc::UnboundedReceiver<Event>) -> Event {
    tokio::time::timeout(super::PATIENCE, hears.recv()).await.expect("an event").expect("it goes on")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eventsource_goes_on_after_the_server_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start_http(dir.path(), ([127, 0, 0, 1], 0).into(), 10_000);
    let (http, web) = (process.http, Web::new(process.http));
    web.make("s").await;
    let (mut all, mut watched) = (listen(&web, "/sessions/stream"), listen(&web, "/sessions/s/stream"));
    let mut commands = listen(&web, "/sessions/s/commands");
    let (mut sent, mut screen) = (0, Screen::default());
    for _ in 0..4 {
        let is_live =
            |event: &Event| event.data["session"]["status"] == "live" || event.data["fields"]["status"] == "live";
        while !is_live(&next(&mut all).await) {}
        for _ in 0..5 {
            assert_eq!(web.prompt("s", &sent.to_string()).await, 202);
            let events =
                json!([{"type": "user_prompt", "text": sent.to_string()}, {"type": "text_delta", "delta": "a"}]);
            web.tell("s", events).await;
            assert_eq!(next(&mut commands).await.data["text"], sent.to_string(), "each once, in order");
            sent += 1;
        }
        let expected = web.artifacts("s").await;
        while screen.shows() != expected {
            screen.hear(&next(&mut watched).await);
        }
        process.kill();
        process = Process::start_http(dir.path(), http, 10_000);
    }
    assert_eq!(web.artifacts("s").await.len(), 2 * sent);
}
