//! Streams: how many, for how long, and that nothing is lost between two.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use trunkline_client::Operator;
use trunkline_core::conversation::Options;
use trunkline_proto::{own::AppAgent, v1::MessageType};

use super::{
    AGENT, OTHER_AGENT, SECRET, agents::tell, begin, claims, hs256, now, say, server, server_with, show, sign, user,
    watch, watch_after,
};
use crate::{
    client::{Client, agent, lane},
    sandbox::{Events, Web},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_streams_a_user_and_the_third_waits() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let http = server.addresses().http;
    let (ann, bob) = (user(http, "ann"), user(http, "bob"));
    let (convo, second) = (begin(&ann).await, begin(&ann).await);
    let first = watch(&ann, &convo).await;
    let _other = watch(&ann, &second).await;
    let path = format!("/api/v2/agent_convos/{convo}/events");
    let refused = ann.request(Method::GET, &path).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"30".parse().unwrap()));
    // Others, and the same user before another agent, have places of their own.
    watch(&bob, &begin(&bob).await).await;
    let before_other = Web::new(http).with(&sign(&hs256(), &claims("ann", OTHER_AGENT), SECRET));
    watch(&before_other, &begin(&before_other).await).await;
    drop(first);
    let begun = Instant::now();
    while ann.request(Method::GET, &path).send().await.unwrap().status() != 200 {
        assert!(begun.elapsed() < Duration::from_secs(1), "a place is free as soon as its stream is closed");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_go_on_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let mut tab = watch(&ann, &convo).await;
    say(&ann, &convo, "one").await;
    let one = tab.expect("message").await;
    drop(tab);
    say(&ann, &convo, "two").await;
    server.stop().await;
    let server = self::server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    say(&ann, &convo, "three").await;
    let mut tab = watch_after(&ann, &convo, Some(&one.id)).await;
    assert_eq!(tab.expect("message").await.data["message"]["content"], "two");
    assert_eq!(tab.expect("message").await.data["message"]["content"], "three");
    // What is of another log, or nothing at all, is told as such.
    for last in [format!("{}-1", "0".repeat(32)), "7".to_owned(), "x".to_owned()] {
        drop(tab);
        tab = ann.open_after(&format!("/api/v2/agent_convos/{convo}/events"), Some(&last)).await;
        assert_eq!(tab.expect("ready").await.data["resumed"], false, "{last}");
    }
    say(&ann, &convo, "four").await;
    assert_eq!(tab.expect("message").await.data["message"]["content"], "four");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missed_between_two_streams_whatever_the_first_one_got() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let path = format!("/api/v2/agent_convos/{convo}/events");
    let agent = Client::connect(server.addresses().grpc, agent("one")).await.unwrap();
    for last_is_told in [true, false] {
        say(&ann, &convo, "hello").await;
        let mut tab = ann.open(&path).await;
        let ready = tab.expect("ready").await;
        drop(tab);
        agent.send(&format!("us::ann::{convo}"), "hi").await;
        while show(&ann, &convo).await["messages"].as_array().unwrap().last().unwrap()["content"] != "hi" {}
        if last_is_told {
            let mut tab = ann.open_after(&path, Some(&ready.id)).await;
            assert_eq!(tab.expect("ready").await.data["resumed"], true);
            assert_eq!(tab.expect("message").await.data["message"]["content"], "hi");
            tab.expect("turn_done").await;
        } else {
            // A published client never says it, and reads the messages. What it waits for is the end of the turn.
            let mut tab = ann.open(&path).await;
            assert_eq!(tab.expect("ready").await.data["resumed"], false);
            tab.expect("turn_done").await;
        }
    }
    // Nor pieces of what is being said.
    let piece = |text: &str| format!(r#"{{"type": "delta", "id": "m", "text": "{text}"}}"#);
    let lane = format!("us::ann::{convo}");
    say(&ann, &convo, "and?").await;
    for text in ["a", "b"] {
        tell(&agent, &lane, MessageType::Opaque, piece(text)).await;
    }
    let pieces = format!("{path}?deltas=1");
    let read = ann.get(&format!("/api/v2/agent_convos/{convo}")).await.1["last_event_id"].as_str().unwrap().to_owned();
    let began = ann.open(&pieces).await.expect("ready").await.id;
    for last in [None, Some(&*read), Some(&*began)] {
        let mut tab = ann.open_after(&pieces, last).await;
        tab.expect("ready").await;
        for text in ["a", "b"] {
            let mut piece = tab.next().await.unwrap();
            // Of what is behind the place that it names.
            while piece.name != "delta" {
                piece = tab.next().await.unwrap();
            }
            assert_eq!(piece.data["text"], text, "{last:?}");
        }
    }
    // Nothing is repeated behind what was said since.
    say(&ann, &convo, "one more").await;
    let mut tab = ann.open(&path).await;
    tab.expect("ready").await;
    agent.send(&format!("us::ann::{convo}"), "well").await;
    assert_eq!(tab.expect("message").await.data["message"]["content"], "well");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_where_a_conversation_was_read() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    say(&ann, &convo, "before").await;
    for query in ["", "?limit=10"] {
        let (_, shown) = ann.get(&format!("/api/v2/agent_convos/{convo}{query}")).await;
        let last = shown["last_event_id"].as_str().unwrap();
        say(&ann, &convo, "between").await;
        // By the address, as clients do that send no header; a header is newer, where there is one.
        let path = format!("/api/v2/agent_convos/{convo}/events?lastEventId={last}");
        let mut tab = ann.open(&path).await;
        assert_eq!(tab.expect("ready").await.data["resumed"], true);
        let between = tab.expect("message").await;
        assert_eq!(between.data["message"]["content"], "between");
        let mut again = ann.open_after(&path, Some(&between.id)).await;
        assert_eq!(again.expect("ready").await.id, between.id);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_that_did_not_change_is_not_sent_again_and_compressed_when_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let ann = user(server.addresses().http, "ann");
    let convo = begin(&ann).await;
    let said = "what was said ".repeat(100);
    for _ in 0..20 {
        say(&ann, &convo, &said).await;
    }
    let ask = async |known: &str| {
        let request = ann.request(Method::GET, &format!("/api/v2/agent_convos/{convo}"));
        let request = request.header("if-none-match", known).header("accept-encoding", "gzip");
        let shown = request.send().await.unwrap();
        assert_eq!(shown.headers()["cache-control"], "private, no-cache");
        let tag = shown.headers()["etag"].to_str().unwrap().to_owned();
        (shown.status().as_u16(), tag, shown.bytes().await.unwrap().len())
    };
    let (status, tag, bytes) = ask("\"other\"").await;
    assert!(status == 200 && bytes < said.len(), "{status}, {bytes} bytes");
    assert_eq!(ask(&tag).await, (304, tag.clone(), 0));
    say(&ann, &convo, "more").await;
    let (status, newer, _) = ask(&tag).await;
    assert!(status == 200 && newer != tag, "{status} {newer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_say_why_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with(dir.path(), Options { stream_seconds: 1, ..Options::default() }).await;
    let http = server.addresses().http;
    let ann = user(http, "ann");
    let convo = begin(&ann).await;
    let mut tab = watch(&ann, &convo).await;
    assert_eq!(tab.expect("closed").await.data, json!({"type": "closed", "reason": "server_cap"}));
    tab.ends().await;
    server.stop().await;
    let server = self::server(dir.path()).await;
    let http = server.addresses().http;
    let ending = |seconds: i64| {
        let mut claims = claims("ann", AGENT);
        claims["exp"] = json!(now() + seconds);
        Web::new(http).with(&sign(&hs256(), &claims, SECRET))
    };
    // Just behind the mark, and with less than that only with the token.
    let begun = Instant::now();
    let (mut long, mut short) = (watch(&ending(301), &convo).await, watch(&ending(3), &convo).await);
    assert_eq!(long.expect("closed").await.data["reason"], "auth_expiring");
    assert!(begun.elapsed() >= Duration::from_secs(1) && begun.elapsed() < Duration::from_millis(2900));
    assert_eq!(short.expect("closed").await.data["reason"], "auth_expiring");
    assert!(begun.elapsed() >= Duration::from_millis(1500));
    let mut tab = watch(&user(http, "ann"), &convo).await;
    let stop = tokio::spawn(server.stop());
    assert_eq!(tab.expect("closed").await.data["reason"], "shutdown");
    tab.ends().await;
    stop.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_with_what_the_app_takes_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let (http, grpc) = (server.addresses().http, server.addresses().grpc);
    let operator = Operator::builder().address(grpc.to_string()).connect().await.unwrap();
    let page = "https://page.example.org";
    let (app, _) = operator.create_app("club", None, vec![page.to_owned()]).await.unwrap();
    assert!(!app.key.is_empty());
    let agent = |name: &str| AppAgent { identity: lane(name), name: name.into(), ..AppAgent::default() };
    let one = operator.put_app_agent("club", agent("one")).await.unwrap().id;
    let two = operator.put_app_agent("club", agent("two")).await.unwrap().id;
    let signed = async |agent: &str, user: &str| {
        Web::new(http).with(&operator.sign_app_token("club", agent, user, None).await.unwrap())
    };
    let tab = async |web: &Web| watch(web, &begin(web).await).await;
    let closed = async |mut tab: Events| {
        let data = tab.expect("closed").await.data;
        assert_eq!(data, json!({"type": "closed", "reason": "auth_expiring"}));
        tab.ends().await;
    };
    let old = signed(&one, "old").await;
    let (old_tab, two_tab) = (tab(&old).await, tab(&signed(&two, "ann").await).await);
    let from_page = old.request(Method::GET, &format!("/api/v2/agent_convos/{}/events", begin(&old).await));
    let paged = Events::of(from_page.header("origin", page).send().await.unwrap());
    operator.rotate_app_secret("club").await.unwrap();
    let new = signed(&one, "new").await;
    let convo = begin(&new).await;
    let mut new_tab = watch(&new, &convo).await;
    // A page that is not the app's any more, whoever signed its token; and an agent that is not.
    operator.set_app_origins("club", Vec::<String>::new()).await.unwrap();
    let mut paged = paged;
    paged.expect("ready").await;
    closed(paged).await;
    operator.remove_app_agent("club", two).await.unwrap();
    closed(two_tab).await;
    // The older secret is good until it is retired.
    let again = tab(&old).await;
    operator.retire_app_secret("club").await.unwrap();
    closed(old_tab).await;
    closed(again).await;
    assert_eq!(say(&new, &convo, "still here").await.0, 200);
    assert_eq!(new_tab.expect("message").await.data["message"]["content"], "still here");
    operator.remove_app("club").await.unwrap();
    closed(new_tab).await;
    server.stop().await;
}
